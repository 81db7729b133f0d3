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
        speedups: Of each method of `SHOWN` that has run.
        loss: How the recommended method's final loss differs from the baseline's.
    """

    label: str
    study: str
    baseline: MethodSummary
    speedups: dict[str, Speedup]
    loss: Difference


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
    split = baseline.reported_split
    loss = difference(by_name[RECOMMENDED].losses(split), baseline.losses(split))
    return Comparison(label, study, baseline, found, loss)


def claim(comparisons: Sequence[Comparison]) -> str:
    """Writes in a few sentences what the recommended method gains, counted from the comparisons."""
    found = [comparison.speedups[RECOMMENDED] for comparison in comparisons]
    reached = sorted(speedup.mean for speedup in found if speedup.mean is not None)
    if not reached:
        return "No comparison has run yet."
    of_means = sorted(
        speedup.of_means
        for speedup in found
        if speedup.mean is not None and speedup.of_means is not None
    )
    at_least = lambda least: sum(mean >= least for mean in reached)
    sentence = (
        f"In {len(reached)} of {len(found)} comparisons on "
        f"{len({c.study for c in comparisons})} tasks, every seed of PoLoRA started from the "
        f"gradient reaches the best validation loss of tuned LoRA AdamW. It needs "
        f"{reached[0]:.2f} to {reached[-1]:.2f} times fewer steps there (median "
        f"{statistics.median(reached):.2f}), at least 1.5 times fewer in {at_least(1.5)}, "
        f"at least 2 times in {at_least(2.0)}"
    )
    if of_means:
        sentence += (
            f". Each seed counts from its first evaluation below that loss, which favours noisy "
            f"curves; by the mean curves these numbers are {of_means[0]:.2f} to {of_means[-1]:.2f} "
            f"(median {statistics.median(of_means):.2f})"
        )
    claimed = [comparison.loss for comparison in comparisons if comparison.loss.claimed]
    better = sum(loss.value < 0 for loss in claimed)
    return (
        f"{sentence}. Of all {len(found)} comparisons, its final loss is lower than AdamW's in "
        f"{better}, higher in {len(claimed) - better}, and not distinguishable in "
        f"{len(found) - len(claimed)}."
    )


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
        rows.append([page, loss, *shown, verdict(comparison.loss)])
    shown = [RECOMMENDED, "its mean curve", *SHOWN[1:]]
    headings = ["comparison", "AdamW's loss", *shown, f"loss of {RECOMMENDED} – AdamW's"]
    return markdown(headings, rows)
