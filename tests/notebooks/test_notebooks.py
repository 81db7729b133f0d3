"""The notebooks: both files of each in step, outputs fit to be shown, and what each concludes."""

import base64
import importlib.util
import re
import subprocess
import sys
import types

import nbformat
import pytest

from tests.notebooks import runner

PICTURES = 2  # of each notebook, at least
LARGEST_PICTURE = 100_000  # bytes
NOT_FOR_READERS = re.compile(
    r"/(?:work|tmp|root|home|usr|opt)/|site-packages|127\.0\.0\.1|localhost"
)

each_notebook = pytest.mark.parametrize("source", runner.SOURCES, ids=lambda path: path.stem)


def committed(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def outputs_of(notebook):
    return [x for cell in notebook.cells if cell.cell_type == "code" for x in cell.outputs]


def test_there_are_five():
    names = [source.stem for source in runner.SOURCES]
    assert [name[:2] for name in names] == ["01", "02", "03", "04", "05"]
    assert sorted(CLAIMS) == names


@each_notebook
def test_both_files_have_the_same_cells(source):
    shown = committed(source)
    assert runner.sources_of(shown) == runner.sources_of(runner.read(source))
    assert all(cell.execution_count for cell in shown.cells if cell.cell_type == "code")


@each_notebook
def test_outputs_are_fit_to_be_shown(source):
    outputs = outputs_of(committed(source))
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [x.data["image/png"] for x in outputs if "image/png" in x.get("data", {})]
    assert len(pictures) >= PICTURES
    assert max(len(base64.b64decode(picture)) for picture in pictures) <= LARGEST_PICTURE
    for output in outputs:
        data = {kind: x for kind, x in output.get("data", {}).items() if kind != "image/png"}
        for text in [output.get("text", ""), *data.values()]:
            assert not NOT_FOR_READERS.search(text), text


def test_the_shown_adapter_was_checked_in_pytorch():
    [source] = [source for source in runner.SOURCES if source.stem == "03_finetune_minilm"]
    texts = [output.get("text", "") for output in outputs_of(committed(source))]
    assert any("largest difference of embeddings" in text for text in texts)
    assert not any("SKIPPED" in text for text in texts)


@each_notebook
def test_it_says_what_it_is_and_installs_what_it_needs(source):
    cells = runner.read(source).cells
    assert cells[0].source.startswith("# ")
    assert "lowrank-optax[notebooks]" in cells[1].source
    assert "numbers = {" in cells[-1].source


def install(source, monkeypatch, *, installed, code=0, jax_version=(0, 10, 2)):
    """Runs the first code cell where pip and JAX are others."""
    version = ".".join(map(str, jax_version))
    old = types.SimpleNamespace(__version__=version, __version_info__=jax_version)
    monkeypatch.setitem(sys.modules, "jax", old)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    ran = []
    done = types.SimpleNamespace(returncode=code)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command) or done)
    exec(runner.read(source).cells[1].source, {})
    return ran


@each_notebook
def test_the_install_cell_asks_pip_once_for_the_package(source, monkeypatch):
    assert install(source, monkeypatch, installed=True) == []
    first = install(source, monkeypatch, installed=False)[0]
    assert first[:4] == [sys.executable, "-m", "pip", "install"]
    assert "lowrank-optax[notebooks]" in first


@each_notebook
def test_without_a_network_it_says_what_to_install(source, monkeypatch):
    with pytest.raises(SystemExit, match=r"pip failed.*checkout.*lowrank-optax\[notebooks\]"):
        install(source, monkeypatch, installed=False, code=1)


@each_notebook
def test_an_old_jax_is_named_with_the_remedy(source, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"JAX 0.10.1 or newer, and here is 0.7.2.*pip install -U jax"
    ):
        install(source, monkeypatch, installed=True, jax_version=(0, 7, 2))


def of_quickstart(found):
    assert found["reached"] is not None
    assert found["reached"] < found["steps"]
    assert found["last"]["PoLoRA"] < found["last"]["AdamW"]
    assert found["inside"] == {"AdamW": True, "PoLoRA": True}  # no best rate at an end
    assert found["frozen"]


def of_how_it_works(found):
    assert found["effective_rank"] < 16  # of 256
    assert found["energy_of_rank"] > 0.95
    assert found["dependence"]["AltLoRA"] < 0.01
    assert found["dependence"]["AdamW"] > 1
    best = found["alignment"]["frames of the gradient"]
    assert best > 0.95
    assert best == max(found["alignment"].values())
    assert found["excess"]["OPLoRA, k = 1"] < 0.1 * found["excess"]["no step"]
    assert found["excess"]["OPLoRA, k = 2"] < 0.01 * found["excess"]["no step"]
    assert found["polora_largest"] <= found["polora_bound"] * 1.0001
    assert found["polora_largest"] > 0.9 * found["polora_bound"]  # the bound is nearly reached
    assert found["cosines"]["OPLoRA"] > found["cosines"]["AdamW"]
    assert found["cosines"]["AltLoRA"] > found["cosines"]["AdamW"]
    assert found["memory"]["PoLoRA"] < 1.5 < found["memory"]["AdamW"] < 2.1


def of_minilm(found):
    assert found["test_losses"]["PoLoRA"] < found["test_losses"]["probe"] - 0.02
    assert found["reached"]["PoLoRA"] > found["probe"] + 0.02
    assert found["test_losses"]["AdamW"] < found["test_losses"]["probe"]
    assert found["torch_error"] is None or found["torch_error"] < 1e-4


def of_many_devices(found):
    assert found["devices"] == 8
    whole, fsdp, both = (found["total"][name] for name in found["total"])
    assert both < fsdp < whole / 3
    assert max(found["worst"].values()) < 1e-3
    assert found["last_loss"] < 0.1 * found["first_loss"]


def of_linen(found):
    assert found["base_moved"] == 0
    assert found["kept"] == found["pretrained"] > 0.97
    assert found["before"] < 0.3
    assert found["reached"] > 0.95
    assert found["merged_difference"] < 1e-5
    assert max(found["last"].values()) < 0.2


CLAIMS = {
    "01_quickstart": of_quickstart,
    "02_how_it_works": of_how_it_works,
    "03_finetune_minilm": of_minilm,
    "04_many_devices": of_many_devices,
    "05_linen": of_linen,
}


# The longest first, so that two workers end at about the same time.
BY_LENGTH = sorted(CLAIMS, key=lambda name: name != "03_finetune_minilm")


@pytest.mark.notebooks
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_its_claims_hold_with_every_cell_run_so_many_times(name, times, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # those of the tests, not of a reader
    notebook = runner.read(runner.FOLDER / f"{name}.py")
    CLAIMS[name](runner.numbers_of(notebook, tmp_path, times))
