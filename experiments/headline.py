"""What a reader asks first: how many times fewer steps than tuned AdamW, on every task."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from experiments.summary import (
    Difference,
    MethodSummary,
    Speedup,
    difference,
    goal_of,
    speedup,
    tuned_baseline,
)
from experiments.tables import NOTHING, markdown, spread, times, verdict

RECOMMENDED = "polora-start"
SHOWN = (RECOMMENDED, "polora", "adamw-start", "full-adamw")


class Comparison(NamedTuple):
    """One comparison of the peers.

    Attributes:
        label: Name of the study and the variant.
        study: Name of the study.
        baseline: AdamW as it was best.
        recommended: The recommended method.
        speedups: Of each method of `SHOWN` that has run.
        loss: How the recommended method's final loss differs from the baseline's, on the test where
            there is one.
        validation: The same on validation.
    """

    label: str
    study: str
    baseline: MethodSummary
    recommended: MethodSummary
    speedups: dict[str, Speedup]
    loss: Difference
    validation: Difference


def compare(label: str, study: str, summaries: Sequence[MethodSummary]) -> Comparison | None:
    """Compares the recommended method with tuned AdamW; None where it has not run.

    Args:
        label: Name of the study and the variant.
        study: Name of the study.
        summaries: The methods of the variant.
    """
    by_name = {summary.method: summary for summary in summaries if summary.best}
    baseline = tuned_baseline(summaries)
    if baseline is None or RECOMMENDED not in by_name:
        return None
    goal = goal_of(baseline)
    found = {name: speedup(by_name[name], goal) for name in SHOWN if name in by_name}
    recommended = by_name[RECOMMENDED]
    loss, validation = (
        difference(recommended.losses(split), baseline.losses(split))
        for split in (baseline.reported_split, "validation")
    )
    return Comparison(label, study, baseline, recommended, found, loss, validation)


def claim(comparisons: Sequence[Comparison]) -> str:
    """Writes in a few sentences what the recommended method gains, counted from the comparisons."""
    found = [comparison.speedups[RECOMMENDED] for comparison in comparisons]
    reached = sorted(speedup.mean for speedup in found if speedup.mean is not None)
    if not reached:
        return "No comparison has run yet."
    number = len(found)
    at_least = lambda least: sum(mean >= least for mean in reached)
    of_means = sorted(speedup.of_means or 0.0 for speedup in found)
    arrived = [value for value in of_means if value]
    lower, higher = _claimed([comparison.loss for comparison in comparisons])
    lower_too, higher_too = _claimed([comparison.validation for comparison in comparisons])
    return " ".join(
        [
            f"In {len(reached)} of {number} comparisons in {len({c.study for c in comparisons})}"
            " studies, every seed of PoLoRA started from the gradient reaches the best validation"
            f" loss of tuned LoRA AdamW. It needs {_range(reached)} times fewer steps there (median"
            f" {statistics.median(reached):.2f}), at least 1.5 times fewer in {at_least(1.5)}, at"
            f" least 2 times in {at_least(2.0)}.",
            "Each seed counts from its first evaluation below that loss, which favours noisy"
            f" curves. The mean curve of the seeds gets there in {len(arrived)} of {number}, in"
            f" {_range(arrived)} times fewer steps; the median over all {number} is"
            f" {statistics.median(of_means):.2f}."
            if arrived
            else "The mean curve of the seeds gets there in none.",
            f"The final loss on the test is lower than AdamW's in {lower} of {number} and higher in"
            f" {higher}; on validation it is lower in {lower_too} and higher in {higher_too}. The"
            " others are not distinguishable.",
        ]
    )


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:.2f} to {values[-1]:.2f}"


def _claimed(differences: Sequence[Difference]) -> tuple[int, int]:
    """How many differences are claimed, for the method and against it."""
    claimed = [found.value for found in differences if found.claimed]
    return sum(value < 0 for value in claimed), sum(value > 0 for value in claimed)


def headline_table(comparisons: Sequence[Comparison]) -> str:
    """Writes a row for every comparison, in Markdown."""
    rows = []
    for comparison in comparisons:
        speedups = comparison.speedups
        shown = [times(speedups[name]) if name in speedups else NOTHING for name in SHOWN]
        of_means = speedups[RECOMMENDED].of_means
        shown.insert(1, NOTHING if of_means is None else f"{of_means:.2f}×")
        best = comparison.baseline
        rate = f"{best.best[0].config.learning_rate:g}"
        loss = f"{spread(best.losses(best.reported_split))} ({best.method}, {rate})"
        page = f"[{comparison.label}]({comparison.study}.md)"
        rows.append([page, loss, *shown, verdict(comparison.loss), verdict(comparison.validation)])
    shown = [RECOMMENDED, "its mean curve", *SHOWN[1:]]
    against = f"loss of {RECOMMENDED} – AdamW's"
    headings = ["comparison", "AdamW's loss", *shown, against, "the same on validation"]
    return markdown(headings, rows)
