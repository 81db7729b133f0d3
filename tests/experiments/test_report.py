import math
import statistics
from io import StringIO
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from experiments.errors import ExperimentError
from experiments.figures import OWN_COLORS, _limit, draw_variant, looks
from experiments.headline import claim, compare, headline_table
from experiments.report import (
    Variant,
    check_pages,
    draw_pages,
    index_block,
    make_pages,
    replace_block,
    write_pages,
)
from experiments.schema import Plan
from experiments.study import Study
from experiments.summary import (
    Speedup,
    difference,
    goal_of,
    speedup,
    steps_to,
    summarize,
    tuned_baseline,
)
from experiments.tables import comparison_table, screen_table, sweep_table
from tests.experiments.samples import make_result, with_curve
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


def test_steps_to_a_loss_are_interpolated_between_evaluations():
    curve = [(0, 4.0), (10, 2.0), (20, 1.0), (30, 1.5)]
    assert steps_to(curve, 2.0) == 10
    assert steps_to(curve, 3.0) == 5
    assert steps_to(curve, 1.2) == pytest.approx(18)
    assert steps_to(curve, 5.0) == 0
    assert steps_to(curve, 0.9) is None


def test_a_seed_that_breaks_down_at_the_best_rate_is_counted(curves):
    lost = make_result(method="polora-start", learning_rate=0.1, seed=2, status="diverged")
    adamw, _, polora = summarize([*curves, lost])
    assert (len(polora.best), polora.broken, polora.lost) == (2, 1, 1)
    found = speedup(polora, goal_of(adamw))
    assert (len(found.reached), found.runs, found.mean) == (2, 3, None)


def test_the_baseline_is_the_best_of_adamw_at_all_ratios(curves):
    assert tuned_baseline(summarize(curves)).method == "adamw"
    better = with_curve(4.0, 0.2, 0.2, 0.2, method="lora-plus")
    assert tuned_baseline(summarize([*curves, better])).method == "lora-plus"
    assert tuned_baseline(summarize(curves[3:])) is None


def test_speedup_is_the_baselines_steps_by_the_methods(curves):
    adamw, _, polora = summarize(curves)
    goal = goal_of(adamw)
    assert goal == (1.5, 20)
    found = speedup(polora, goal)
    start = 2  # gradients
    assert found.reached == pytest.approx([20 / (10 + start), 20 / (15 + start)])
    assert found.mean == pytest.approx((20 / 12 + 20 / 17) / 2)
    of_means = 10 + 10 * (1.75 - 1.5) / (1.75 - 1.0)
    assert found.of_means == pytest.approx(20 / (of_means + start))
    assert found.forgiving == pytest.approx((0 + 20 / 12 + 20 / (10 * 2.5 / 3 + start)) / 3)
    at_edge = speedup(summarize(curves[4:])[0], goal)
    assert at_edge.forgiving is None
    assert speedup(adamw, goal).mean is None  # one of two seeds does not reach the mean


def test_steps_are_not_told_where_evaluations_are_rare(curves):
    often, rarely = (
        [
            run.model_copy(
                update={
                    "config": run.config.model_copy(
                        update={"plan": run.config.plan.model_copy(update={"steps": steps})}
                    )
                }
            )
            for run in curves
        ]
        for steps in (20 * curves[0].config.plan.eval_every, 2 * curves[0].config.plan.eval_every)
    )
    assert "1 (20 steps; its seeds: 1 of 2 reach it)" in comparison_table(summarize(often))
    row = comparison_table(summarize(rarely)).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")][3:5] == ["–", "–"]


def test_the_claim_counts_the_comparisons(curves):
    found = compare("digits, peers", "digits", summarize(curves))
    assert found.speedups["polora-start"].mean == pytest.approx((20 / 12 + 20 / 17) / 2)
    speedups = {"polora-start": Speedup([1.7], 2, None, None)}  # one seed of two arrives
    text = claim([found, found._replace(study="mnist"), found._replace(speedups=speedups)])
    assert "In 2 of 3 comparisons in 2 studies, every seed of PoLoRA" in text
    assert "1.42 to 1.42 times fewer steps there (median 1.42)" in text
    assert "at least 1.5 times fewer in 0, at least 2 times in 0" in text
    assert "The mean curve of the seeds gets there in 2 of 3, in 1.30 to 1.30 times fewer" in text
    assert "the median over all 3 is 1.30." in text
    assert "loss on the test is lower than AdamW's in 3 of 3 and higher in 0; on validation" in text
    row = headline_table([found]).splitlines()[2]
    assert row.startswith("| [digits, peers](digits.md) | 2 ± 0.71 (adamw, 0.001) |")
    assert "1.42× ± 0.35 | 1.30×" in row
    assert compare("x", "x", summarize(curves[:3])) is None
    assert claim([]) == "No comparison has run yet."


def test_tables_show_spread_claim_edge_and_divergence(results):
    table = comparison_table(summarize(results))
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()}
    assert "0.41 ± 0.014" in rows["adamw"]
    assert "+0.1 ± 0.01 (+7.1): worse" in rows["altlora"]
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
    assert list(missing) == ["altlora", "sgd"]
    assert missing["altlora"] == "`altlora` (3 runs so far)"
    assert missing["sgd"] == "`sgd`"


def test_the_index_leaves_out_what_adamw_was_not_to_run_beside(results):
    plan = Plan(steps=2, eval_every=2, head_learning_rate=1e-3)
    beside = Study(task="digits", plan=plan, learning_rates={"adamw": (1e-2,), "altlora": (0.1,)})
    alone = Study(task="digits", plan=plan, learning_rates={"altlora": (0.1,)})
    block = index_block({"one": [Variant("", beside, results), Variant("other", alone, results)]})
    assert "[one](one.md) | 0.41 ± 0.014 (adamw) |  |  | altlora |" in block
    assert "other" not in block


def test_a_method_has_one_color_in_all_figures_and_no_two_share_one():
    best_first = ["lora-rite", "polora-start", "reflora", "polora", "full-adamw", "lora-muon"]
    runs = [make_result(method=name, loss=0.1 * i) for i, name in enumerate(best_first)]
    styles = looks(summarize([*runs, make_result(loss=9.0)]))
    colors = {name: styles[name]["color"] for name in best_first}
    assert styles["adamw"]["color"] == "black"
    assert colors.pop("lora-muon") == "0.75"
    assert len(set(colors.values())) == 5
    for name in ("polora-start", "polora", "full-adamw"):
        assert colors[name] == OWN_COLORS[name]
    alone = looks(summarize([make_result(method="polora", loss=0.1), make_result(loss=9.0)]))
    assert alone["polora"]["color"] == colors["polora"]


def test_figure_is_a_readable_png(results, tmp_path):
    path = tmp_path / "new" / "figure.png"
    draw_variant(summarize(results), "a title", path)
    pixels = imread(path)
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("finals", "limit"),
    [
        ([[1.0, 1.2], [1.9, 2.3]], 2.3),  # of two close methods every seed is seen
        ([[1.0, 1.2], [1.9, 2.3], [30.0, 31.0]], 2.3),
        ([[1.0, 1.2], [1.9, 1.9, 10.0, 1.8]], 6.7),  # a seed that broke down is beyond
        ([[1.0, 3.0]], 3.0),
        ([], 1.0),
    ],
)
def test_the_axis_of_final_losses_shows_all_seeds_but_those_far_behind(finals, limit):
    assert _limit(finals) == pytest.approx(limit)


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
    readme.write_text("above\n<!-- claim: begin -->\nold\n<!-- claim: end -->\nbelow\n")
    pages = make_pages(committed, docs, readme)
    assert check_pages(pages)
    assert set(write_pages(pages)) == {docs / "conditioning.md", docs / "README.md", readme}
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


def test_results_of_no_study_or_of_other_settings_are_errors(tmp_path):
    (tmp_path / "nonsense").mkdir()
    with pytest.raises(ExperimentError, match="holds results of no study"):
        make_pages(tmp_path, tmp_path, tmp_path / "none.md")
    (tmp_path / "nonsense").rename(tmp_path / "digits")
    make_result().write(tmp_path / "digits")
    with pytest.raises(ExperimentError, match="has another variant than the study's: move it away"):
        make_pages(tmp_path, tmp_path, tmp_path / "none.md")
    next((tmp_path / "digits").iterdir()).unlink()
    make_result(variant="peers").write(tmp_path / "digits")
    with pytest.raises(ExperimentError, match="has another task_options than the study"):
        make_pages(tmp_path, tmp_path, tmp_path / "none.md")


def test_a_readme_without_markers_is_an_error():
    with pytest.raises(ExperimentError, match="must hold"):
        replace_block("no markers", "block", "README.md")


def test_the_committed_pages_follow_from_the_committed_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, output = invoke("report", "--check")
    assert code == 0, output
