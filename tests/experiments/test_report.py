import math
import statistics
from io import StringIO
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from experiments.errors import ExperimentError
from experiments.figures import draw_variant
from experiments.report import (
    Variant,
    check_pages,
    draw_pages,
    make_pages,
    readme_block,
    replace_block,
    write_pages,
)
from experiments.schema import Plan
from experiments.study import Study
from experiments.summary import difference, steps_to, summarize
from experiments.tables import comparison_table, screen_table, sweep_table
from tests.experiments.samples import make_result
from tests.experiments.test_cli import invoke

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results():
    return [
        make_result(learning_rate=1e-3, loss=0.9),
        make_result(learning_rate=1e-2, loss=0.4),
        make_result(learning_rate=1e-1, loss=0.6),
        make_result(learning_rate=1e-2, loss=0.42, seed=1),
        make_result(method="altlora", learning_rate=0.1, loss=0.5),
        make_result(method="altlora", learning_rate=0.1, loss=0.52, seed=1),
        make_result(method="altlora", learning_rate=1.0, loss=0.1, status="diverged"),
        make_result(method="oplora", learning_rate=0.1, loss=0.3),
        make_result(method="altlora-plus", learning_rate=9.0, loss=math.nan, status="diverged"),
    ]


def test_summary_chooses_the_finished_run_with_the_lowest_validation_loss(results):
    adamw, altlora, _, lost = summarize(results)
    assert [run.config.seed for run in adamw.best] == [0, 1]
    assert adamw.best[0].config.learning_rate == 1e-2
    assert not adamw.at_edge
    assert altlora.best[0].config.learning_rate == 0.1
    assert altlora.at_edge
    assert lost.best == []


def test_a_difference_is_claimed_above_twice_the_pooled_standard_error():
    own, base = [1.0, 2.0, 3.0], [4.0, 6.0, 5.0]
    found = difference(own, base)
    assert found.value == -3.0
    assert found.error == pytest.approx(math.sqrt(2 / 3))
    assert found.claimed
    assert not difference(own, [x + 1.6 for x in own]).claimed
    assert difference(own, [x + 1.7 for x in own]).claimed
    assert not difference([1.0], base).claimed


def test_steps_to_a_loss_are_the_median_over_seeds(results):
    adamw, *_ = summarize(results)
    assert steps_to(adamw, 0.41) is None  # one of two seeds
    assert steps_to(adamw, 0.43) == 2
    assert steps_to(adamw, 1.0) == 0


def test_tables_show_spread_claim_edge_and_divergence(results):
    table = comparison_table(summarize(results))
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()}
    assert "0.41 ± 0.014" in rows["adamw"]
    assert "+0.1 ± 0.01: worse" in rows["altlora"]
    assert "| 0.1* |" in rows["altlora"]
    assert rows["altlora"].endswith("| 1/2 |")
    assert "-0.11 (too few seeds)" in rows["oplora"]
    assert rows["altlora-plus"].endswith("| 1/1 |")
    sweep = sweep_table(summarize(results)).splitlines()
    assert sweep[0] == "| method | 0.001 | 0.01 | 0.1 | 1 | 9 |"
    assert sweep[2] == "| adamw | 0.9 | 0.4 | 0.6 |  |  |"
    assert sweep[3] == "| altlora |  |  | 0.5 | diverged |  |"
    text = StringIO()
    Console(file=text, width=100).print(screen_table(summarize(results), "a title"))
    assert "0.41 ± 0.014" in text.getvalue()


def test_what_is_missing_is_said(results):
    study = Study(
        task="digits",
        plan=Plan(steps=2, eval_every=2, head_learning_rate=1e-3),
        learning_rates={"adamw": (1e-3, 1e-2, 1e-1), "altlora": (0.1, 1.0), "sgd": (1.0,)},
        seeds=(0, 1),
    )
    missing = Variant("", study, results).missing
    assert [line.split(" (")[0] for line in missing] == ["`altlora`", "`sgd`"]
    assert "next: learning rate 0.1, seed 0" in missing[0].replace("0.01", "0.1")
    assert "nothing has run" in missing[1]


def test_the_readme_leaves_out_what_adamw_was_not_to_run_beside(results):
    plan = Plan(steps=2, eval_every=2, head_learning_rate=1e-3)
    beside = Study(task="digits", plan=plan, learning_rates={"adamw": (1e-2,), "altlora": (0.1,)})
    alone = Study(task="digits", plan=plan, learning_rates={"altlora": (0.1,)})
    block = readme_block({"one": [Variant("", beside, results), Variant("other", alone, results)]})
    assert "[one](docs/results/one.md) | 0.41 ± 0.014 |  |  | altlora |" in block
    assert "other" not in block


def test_figure_is_a_readable_png(results, tmp_path):
    path = tmp_path / "new" / "figure.png"
    draw_variant(summarize(results), "a title", path)
    pixels = imread(path)
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.05


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A copy of one small committed study."""
    results = tmp_path_factory.mktemp("results")
    (results / "conditioning").mkdir()
    for path in (ROOT / "experiments" / "results" / "conditioning").glob("kappa-1-*.json"):
        (results / "conditioning" / path.name).write_bytes(path.read_bytes())
    return results


def test_pages_follow_from_the_results_and_keep_what_is_around(committed, tmp_path):
    docs, readme = tmp_path / "docs", tmp_path / "README.md"
    readme.write_text("above\n<!-- results: begin -->\nold\n<!-- results: end -->\nbelow\n")
    pages = make_pages(committed, docs, readme)
    assert check_pages(pages)
    assert set(write_pages(pages)) == {docs / "conditioning.md", readme}
    draw_pages(committed, docs)
    assert readme.read_text().startswith("above\n")
    assert readme.read_text().endswith("\nbelow\n")
    assert "old" not in readme.read_text()

    page = docs / "conditioning.md"
    page.write_text(
        page.read_text().replace("<!-- results: begin", "By hand.\n\n<!-- results: begin")
    )
    again = make_pages(committed, docs, readme)
    assert check_pages(again) == []
    assert "By hand." in again[page]
    page.write_text(page.read_text().replace("| adamw |", "| adamW |"))
    wrong = check_pages(make_pages(committed, docs, readme))
    assert wrong == [f"{page} does not follow from the results"]


def test_numbers_of_a_page_are_those_of_the_runs(committed, tmp_path):
    pages = make_pages(committed, tmp_path, tmp_path / "none.md")
    text = pages[tmp_path / "conditioning.md"]
    (line, *_) = [line for line in text.splitlines() if line.startswith("| adamw |")]
    rate = line.split("|")[2].strip()
    from experiments.sweep import read_results

    losses = [
        r.final["validation"].loss
        for r in read_results(committed / "conditioning")
        if r.config.method == "adamw" and f"{r.config.learning_rate:g}" == rate
    ]
    assert len(losses) == 3
    assert f"| {statistics.mean(losses):.4g} ± " in line


def test_results_of_no_study_or_another_plan_are_errors(tmp_path):
    (tmp_path / "nonsense").mkdir()
    with pytest.raises(ExperimentError, match="holds results of no study"):
        make_pages(tmp_path, tmp_path, tmp_path / "none.md")
    (tmp_path / "nonsense").rename(tmp_path / "digits")
    make_result().write(tmp_path / "digits")
    with pytest.raises(ExperimentError, match="was not made by the study as it is now"):
        make_pages(tmp_path, tmp_path, tmp_path / "none.md")


def test_a_readme_without_markers_is_an_error():
    with pytest.raises(ExperimentError, match="must hold"):
        replace_block("no markers", "block", "README.md")


def test_the_committed_pages_follow_from_the_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, output = invoke("report", "--check")
    assert code == 0, output
