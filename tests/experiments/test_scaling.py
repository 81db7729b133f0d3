"""What grows with width, rank and steps: the points along each, their table and their figure."""

import pytest

from experiments.overview_figures import draw_scaling
from experiments.report import counted_comparisons
from experiments.scaling import scaling_table, series
from experiments.schema import CurvePoint, Scores
from experiments.studies.scaling import VARIANTS
from experiments.summary import paired_difference, summarize
from tests.experiments.samples import make_result
from tests.experiments.test_stability import Variant


def variant(name, *, width=128, rank=8, steps=800, speedup=2.0, loss=0.9, missing=()):
    """AdamW at loss 1 after all steps, and PoLoRA that crosses it after `steps / speedup`."""
    runs = []
    others = [(method, 1.1, 1.5) for method in ("lora-plus-4", "lora-plus")]
    for method, final, half in (("adamw", 1.0, 1.5), *others, ("polora-start", loss, 1.0)):
        for seed in range(3):
            # The seeds' mean is `final`; only it, not its spread, matters here.
            end = final + 0.01 * (seed - 1)
            run = make_result(method=method, seed=seed, loss=end)
            points = [(0, 2.0), (round(steps / speedup), half), (steps, end)]
            curve = [
                CurvePoint(step=step, seconds=0.0, validation=Scores(loss=value, accuracy=None))
                for step, value in points
            ]
            options = {"width": width, "rank": rank}
            plan = run.config.plan.model_copy(update={"steps": steps})
            config = run.config.model_copy(update={"task_options": options, "plan": plan})
            runs.append(run.model_copy(update={"config": config, "curve": curve}))
    return Variant(name, runs, missing)


@pytest.fixture
def variants():
    return [
        variant("steps-3200", steps=3200, speedup=4.0, loss=0.8),
        variant("middle"),
        variant("rank-2", rank=2, speedup=1.6),
        variant("width-256", width=256, loss=1.2),
    ]


def test_the_middle_lies_on_all_three_lines(variants):
    along = {axis: [point.value for point in points] for axis, points in series(variants).items()}
    assert along == {"width": [128, 256], "rank": [2, 8], "steps": [800, 3200]}


def test_nothing_is_shown_without_the_middle_and_another_point(variants):
    long, middle, *_ = variants
    assert series([long]) == {}
    assert series([middle]) == {}
    assert list(series([long, middle])) == ["steps"]


def test_what_is_not_complete_is_no_point(variants):
    for method in ("polora-start", "lora-plus-4"):
        unfinished = variant("rank-32", rank=32, missing=[method])
        assert [point.value for point in series([*variants, unfinished])["rank"]] == [2, 8]


def test_of_one_task_at_many_sizes_the_middle_alone_is_counted(variants):
    assert [found.label for found in counted_comparisons({"scaling": variants})] == [
        "scaling, middle"
    ]


def test_a_row_for_each_point(variants):
    rows = scaling_table(series(variants)).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[:2] for row in cells] == [
        ["width", "128"],
        ["width", "256"],
        ["rank", "2"],
        ["rank", "8"],
        ["steps", "800"],
        ["steps", "3200"],
    ]
    start = 2  # gradients
    expected = [800 / (400 + start), 800 / (400 + start), 800 / (500 + start)]
    expected += [800 / (400 + start), 800 / (400 + start), 3200 / (800 + start)]
    assert [row[3] for row in cells] == [f"{value:.2f}× ± 0.00" for value in expected]
    assert cells[0][5].endswith("better")
    assert cells[1][5].endswith("worse")
    # Seeds differ alike in both methods: by pairs nothing is left of it.
    assert [row[6:] for row in cells[:2]] == [["-0.1 ± 0", "-0.1 ± 0"], ["+0.2 ± 0", "+0.2 ± 0"]]


def summary_of(losses):
    """A method with a final loss for each seed."""
    return summarize(
        [make_result(method="adamw", seed=seed, loss=loss) for seed, loss in losses.items()]
    )[0]


def test_seed_by_seed_takes_the_seeds_of_both():
    own, base = summary_of({0: 1.0, 1: 2.0, 2: 9.0}), summary_of({1: 1.5, 0: 0.1})
    found = paired_difference(own, base, "validation")
    assert found.value == pytest.approx((0.9 + 0.5) / 2)
    assert found.error == pytest.approx(0.2)  # |0.9 − 0.5| / √2 over √2
    assert paired_difference(own, summary_of({2: 8.0}), "validation").error is None
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference(own, summary_of({7: 8.0}), "validation")


def test_the_figure_has_a_column_for_each(variants, tmp_path):
    draw_scaling(series(variants), "What grows", tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_one_thing_changes_at_a_time():
    def settings(name):
        options = VARIANTS[name]
        return options["task_options.width"], options["task_options.rank"], options["plan.steps"]

    middle = settings("middle")
    for name in VARIANTS:
        assert sum(map(int.__ne__, settings(name), middle)) == (name != "middle")
        assert VARIANTS[name]["task_options.alpha"] == 2 * VARIANTS[name]["task_options.rank"]
