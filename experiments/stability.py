"""How forgiving a method is: the learning rates near its best that are nearly as good."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from experiments.hunt import is_attempt
from experiments.summary import MethodSummary, SweepPoint, Variant
from experiments.tables import NOTHING, markdown

SLACK = 1.05
"""A rate is nearly as good if its final validation loss is at most so many times the best one's."""

BROKEN = 1.25
"""A seed has broken down if its final validation loss is so many times the median of the seeds."""

SYNTHETIC = {"linear", "conditioning"}
"""Tasks whose loss falls to zero, where 5 % of it means little."""

BASELINE = "adamw"


class Range(NamedTuple):
    """The learning rates that are nearly as good as a method's best in one comparison.

    Attributes:
        comparison: Name of the study and the variant.
        low: The lowest.
        high: The highest.
        is_open: Whether an end of the sweep is among them, so that there may be more.
    """

    comparison: str
    low: float
    high: float
    is_open: bool

    @property
    def decades(self) -> float:
        """The width on a logarithmic scale."""
        return math.log10(self.high / self.low)


def range_of(summary: MethodSummary, comparison: str) -> Range | None:
    """Finds where a sweep crosses `SLACK` times its lowest loss, on both sides of it.

    Between two rates the loss is taken to be linear in the logarithm of the rate; beside a run that
    did not finish the range ends.

    Args:
        summary: The method.
        comparison: Name of the study and the variant.

    Returns:
        The range; None without a sweep.
    """
    points = summary.sweep
    if len(points) < 3 or not summary.best:
        return None
    best = min(points, key=lambda point: point.validation_loss)
    at, limit = points.index(best), SLACK * best.validation_loss
    low, is_open_below = _end(points[at::-1], limit)
    high, is_open_above = _end(points[at:], limit)
    return Range(comparison, low, high, is_open_below or is_open_above)


def _end(points: Sequence[SweepPoint], limit: float) -> tuple[float, bool]:
    """Returns the last rate within the limit, going away from the best, and if it is the last."""
    for inner, outer in pairwise(points):
        if outer.validation_loss > limit:
            rate, beyond = inner.learning_rate, outer.learning_rate
            rise = outer.validation_loss - inner.validation_loss
            part = (limit - inner.validation_loss) / rise if math.isfinite(rise) else 0.0
            return rate * (beyond / rate) ** part, False
    return points[-1].learning_rate, True


def ranges(studies: Mapping[str, Sequence[Variant]]) -> dict[str, list[Range]]:
    """Finds the ranges of all methods, the most forgiving first.

    Args:
        studies: The variants by study.

    Returns:
        The ranges by method, ordered by the median of their widths; methods with fewer than three
        comparisons last.
    """
    found: dict[str, list[Range]] = {}
    for study, variant in _comparisons(studies):
        for summary in variant.summaries:
            each = range_of(summary, f"{study}, {variant.name}".removesuffix(", "))
            if each is not None:
                found.setdefault(summary.method, []).append(each)
    return dict(sorted(found.items(), key=lambda item: (len(item[1]) < 3, -_median(item[1]))))


def _comparisons(studies: Mapping[str, Sequence[Variant]]) -> Iterator[tuple[str, Variant]]:
    """Yields study and variant of what AdamW takes part in."""
    for study in sorted(set(studies) - SYNTHETIC):
        for variant in studies[study]:
            has_baseline = any(summary.method == BASELINE for summary in variant.summaries)
            if has_baseline and not is_attempt(variant.name):
                yield study, variant


def _median(found: Sequence[Range]) -> float:
    return statistics.median(each.decades for each in found)


def stability_table(
    found: Mapping[str, Sequence[Range]], lost: Mapping[str, str], broken: Mapping[str, str]
) -> str:
    """Writes a row for each method, in Markdown.

    Args:
        found: The ranges by method.
        lost: How many runs were lost, by method.
        broken: How many seeds broke down, by method.
    """
    rows = []
    base = {one.comparison: one.decades for one in found.get(BASELINE, ())}
    for method, each in found.items():
        beside = [base[one.comparison] for one in each if one.comparison in base]
        narrow = min(each, key=lambda one: one.decades)
        rows.append(
            [
                method,
                str(len(each)),
                f"{_median(each):.2f}",
                f"{statistics.median(beside):.2f}" if beside else NOTHING,
                f"{narrow.decades:.2f} ({narrow.comparison})",
                str(sum(one.is_open for one in each)),
                lost.get(method, NOTHING),
                broken.get(method, NOTHING),
            ]
        )
    headings = [
        "method",
        "comparisons",
        "decades, median",
        "AdamW's there",
        "narrowest",
        "open",
        "runs lost",
        "seeds broken down",
    ]
    return markdown(headings, rows)


def lost_runs(studies: Mapping[str, Sequence[Variant]]) -> dict[str, str]:
    """Counts the runs that diverged or failed at a rate at most three times the best one.

    Higher rates are meant to break down; these are those that a user might take.

    Args:
        studies: The variants by study.

    Returns:
        Lost and all such runs, by method.
    """

    def lost(summary: MethodSummary) -> tuple[int, int]:
        limit = 3.5 * summary.best[0].config.learning_rate
        near = [run for run in summary.sweep_runs if run.config.learning_rate <= limit]
        return sum(run.status != "finished" for run in near), len(near)

    return _counted(studies, lost)


def broken_seeds(studies: Mapping[str, Sequence[Variant]]) -> dict[str, str]:
    """Counts the seeds that break down at the rate that is best in the sweep.

    They do not finish, or end at more than `BROKEN` times the median of the method's seeds.

    Args:
        studies: The variants by study.

    Returns:
        Such seeds and all seeds, by method.
    """

    def broken(summary: MethodSummary) -> tuple[int, int]:
        losses = summary.losses("validation")
        gone = sum(loss > BROKEN * statistics.median(losses) for loss in losses)
        return gone + summary.broken, len(losses) + summary.broken

    return _counted(studies, broken)


def _counted(
    studies: Mapping[str, Sequence[Variant]], count: Callable[[MethodSummary], tuple[int, int]]
) -> dict[str, str]:
    """Adds up, by method, how many of how many there are."""
    counts: dict[str, tuple[int, int]] = {}
    for _, variant in _comparisons(studies):
        for summary in (each for each in variant.summaries if each.best):
            some, all_ = counts.get(summary.method, (0, 0))
            more, total = count(summary)
            counts[summary.method] = some + more, all_ + total
    return {method: f"{some} of {all_}" for method, (some, all_) in counts.items()}
