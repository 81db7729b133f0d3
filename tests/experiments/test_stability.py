"""The range of good learning rates, on sweeps with a known loss."""

import math

import pytest

from experiments.stability import broken_seeds, lost_runs, range_of, ranges, stability_table
from experiments.summary import summarize
from tests.experiments.samples import make_result


class Variant:
    def __init__(self, name, results, missing=()):
        self.name = name
        self.summaries = summarize(results)
        self.missing = dict.fromkeys(missing, "")


def sweep(losses, method="adamw"):
    """A sweep whose final losses are given by rate; None for a diverged run."""
    runs = [
        make_result(
            method=method,
            learning_rate=rate,
            loss=1e9 if loss is None else loss,
            status="diverged" if loss is None else "finished",
        )
        for rate, loss in losses.items()
    ]
    return runs


def test_the_range_ends_where_the_loss_crosses_five_per_cent():
    """From 1.0 to 1.1 a decade away on both sides: 1.05 is half a decade away."""
    (summary,) = summarize(sweep({0.01: 1.1, 0.1: 1.0, 1.0: 1.1}))
    found = range_of(summary, "somewhere")
    assert found.decades == pytest.approx(1.0)
    assert found.low == pytest.approx(0.1 / math.sqrt(10))
    assert not found.is_open


def test_the_end_of_a_sweep_leaves_the_range_open():
    (summary,) = summarize(sweep({0.01: 1.02, 0.1: 1.0, 1.0: 1.2}))
    found = range_of(summary, "somewhere")
    assert (found.low, found.is_open) == (0.01, True)
    assert found.decades == pytest.approx(1.25)


def test_beside_a_diverged_run_the_range_ends():
    (summary,) = summarize(sweep({0.01: 1.2, 0.1: 1.0, 1.0: None}))
    found = range_of(summary, "somewhere")
    assert found.high == 0.1
    assert found.decades == pytest.approx(0.25)


def test_one_rate_is_no_range():
    (summary,) = summarize(sweep({0.1: 1.0}))
    assert range_of(summary, "somewhere") is None


def test_methods_are_ordered_by_their_median_and_compared_with_adamw():
    narrow = {0.01: 2.0, 0.1: 1.0, 1.0: 2.0}
    wide = {0.01: 1.1, 0.1: 1.0, 1.0: 1.1}
    runs = [*sweep(narrow), *sweep(wide, "polora")]
    studies = {name: [Variant("", runs)] for name in ("cifar", "digits", "mnist")}
    studies["digits"].append(Variant("hunt-adamw-b2-99", sweep(wide)))  # no comparison
    found = ranges(studies | {"linear": [Variant("", runs)]})
    assert {method: len(each) for method, each in found.items()} == {"polora": 3, "adamw": 3}
    assert list(found) == ["polora", "adamw"]
    table = stability_table(found, lost_runs(studies), broken_seeds(studies))
    assert "| polora | 3 | 1.00 | 0.10 | 1.00 (cifar) | 0 | 0 of 6 | 0 of 3 |" in table


def test_methods_of_few_comparisons_come_last():
    wide = [*sweep({0.01: 1.01, 0.1: 1.0, 1.0: 1.01}, "polora")]
    adamw = sweep({0.01: 2.0, 0.1: 1.0, 1.0: 2.0})
    studies = {name: [Variant("", adamw)] for name in ("cifar", "digits")}
    found = ranges(studies | {"mnist": [Variant("", [*adamw, *wide])]})
    assert list(found) == ["adamw", "polora"]


def test_seeds_that_break_down_at_the_best_rate_are_counted():
    runs = [make_result(learning_rate=0.1, seed=seed, loss=1.0) for seed in range(3)]
    runs.append(make_result(learning_rate=0.1, seed=3, loss=1.6))
    runs.append(make_result(learning_rate=0.1, seed=4, status="diverged", loss=1e9))
    assert broken_seeds({"mnist": [Variant("", runs)]}) == {"adamw": "2 of 5"}


def test_only_runs_that_a_user_might_make_count_as_lost():
    runs = sweep({0.03: 1.1, 0.1: 1.0, 0.3: None, 1.0: None})
    assert lost_runs({"mnist": [Variant("", runs)]}) == {"adamw": "1 of 3"}
