"""Every Python block of the README and of the documentation runs, in the order of its page."""

import importlib.util
import pathlib
import re
import warnings

import pytest

from lowrank_optax import nn
from tests.test_house import METHODS

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r' requires="(\w+)"')
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_BLOCKS = [page for page in PAGES if BLOCK.search(page.read_text())]


def blocks(page):
    """What each block needs, the line at which it stands, and its code."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        assert not match[1] or NEEDS.fullmatch(match[1]), f"{page}: {match[0].splitlines()[0]}"
        needs = NEEDS.fullmatch(match[1])
        yield needs and needs[1], text[: match.start(2)].count("\n"), match[2]


def run(page, scope=None):
    """Runs a page in one namespace, as pasted by a reader who has every library that is here."""
    scope = {"__name__": "__main__"} if scope is None else scope
    for needs, line, code in blocks(page):
        if needs and importlib.util.find_spec(needs) is None:
            print(f"{page.name}, line {line}: not run, {needs} is not installed")
            continue
        exec(compile("\n" * line + code, page, "exec"), scope)
    return scope


@pytest.mark.parametrize("page", WITH_BLOCKS[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        run(page)
    assert not list(tmp_path.iterdir()), "a page leaves files in the reader's folder"
    with capsys.disabled():
        for line in capsys.readouterr().out.splitlines():
            if "is not installed" in line:
                print(f"\n{line}")


def test_other_kinds_of_fences_hide_no_python():
    """A block that runs nowhere would be one that nobody checks."""
    for page in PAGES:
        fences = re.findall(r"^ *[`~]{3,}([^\n]+)$", page.read_text(), re.MULTILINE)
        known = re.compile(r'python( requires="\w+")?|sh|text')
        assert all(known.fullmatch(fence) for fence in fences), f"{page}: {fences}"


def test_the_block_of_the_readme_trains():
    [(needs, _, code)] = blocks(ROOT / "README.md")
    assert needs is None
    assert len([line for line in code.splitlines() if line]) <= 15
    scope = run(ROOT / "README.md")
    trained = scope["loss_fn"](scope["model"], scope["batch"])
    nn.remove_lora(scope["model"])
    assert trained < 0.5 * scope["loss_fn"](scope["model"], scope["batch"])


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_page_of_checkpoints_goes_on_bit_by_bit():
    scope = run(ROOT / "docs" / "checkpoints.md")
    assert scope["its_loss"] == scope["loss"]
    lies = scope["lora"]["layers_0"]["lora_a"].sharding
    assert len(lies.device_set) == 8


@pytest.mark.parametrize("name", ["nnx", "linen", "trees"])
def test_the_pages_of_the_start_train(name):
    assert run(ROOT / "docs" / "start" / f"{name}.md")["loss"] < 0.9


def test_links_of_the_pages_lead_somewhere():
    """Relative links, as GitHub follows them; `make docs` checks them on the site."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_method_has_a_page_and_every_page_a_place():
    """That the site builds is checked by `make docs`, which needs packages from the network."""
    methods = [p.read_text() for p in (ROOT / "docs" / "methods").glob("*.md")]
    for name in METHODS:
        assert any(f"`{name}" in text or f" {name}(" in text for text in methods), name
    navigation = set(re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert navigation == {str(p.relative_to(ROOT / "docs")) for p in PAGES[1:]}
