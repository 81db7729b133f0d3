"""Tables and figures of the pages of methods."""

import itertools
import xml.etree.ElementTree as ET

import jax
import pytest

from experiments import method_figures, method_pages
from experiments.methods import METHODS
from experiments.pages import PAGE_OF


@pytest.fixture(scope="module")
def variants():
    return list(method_pages.all_variants())


def test_tables_follow_from_the_results(variants):
    pages = method_pages.make_pages(variants)
    wrong = [page.name for page, text in pages.items() if page.read_text() != text]
    assert not wrong, "run `python -m experiments.method_pages`"


def test_every_page_has_a_row_and_a_figure():
    pages = {page.stem for page in method_pages.PAGES.glob("*.md")}
    assert set(PAGE_OF) == pages
    for name, page in PAGE_OF.items():
        assert set(page.methods) | set(page.steps) <= set(METHODS)
        ET.parse(method_pages.PAGES / f"{name}.svg")


def test_a_figure_is_drawn(variants, tmp_path):
    method_figures.draw(PAGE_OF["scaled_adamw"], variants, tmp_path / "x.svg")
    text = "".join(ET.parse(tmp_path / "x.svg").getroot().itertext())
    assert "scaled-adamw, cosine" in text


def test_one_step_of_svd_lora_is_nearest_to_the_gradient():
    """No step of rank 8 can be nearer than the gradient's own best part; AdamW's is far from it."""
    with jax.enable_x64(True):
        found = {
            m: method_figures.one_step(m, usual=False)
            for m in ("full gradient", "svd-lora", "adamw")
        }
    cosine = {method: c for method, (_, c) in found.items()}
    assert cosine["full gradient"] == pytest.approx(1.0)
    assert cosine["full gradient"] > cosine["svd-lora"] > cosine["adamw"] > 0
    for values, _ in found.values():
        assert values[0] == pytest.approx(1.0)
        assert all(x >= y for x, y in itertools.pairwise(values))
