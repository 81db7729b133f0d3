"""What grows with a decoder's width, with the rank and with the length of training."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.headline import RECOMMENDED, Comparison, compare
from experiments.peers import TUNED_ADAMW
from experiments.summary import Variant, is_complete, paired_difference
from experiments.tables import NOTHING, markdown, spread, times, verdict

STUDY = "scaling"
MIDDLE = "middle"
"""The variant around which the others change one thing."""

SHOWN = (RECOMMENDED, "adamw-start")


class Size(NamedTuple):
    """What is changed in the study: all other settings are the same."""

    width: int
    rank: int
    steps: int


class Point(NamedTuple):
    """A comparison at one value of what is changed."""

    value: int
    comparison: Comparison


Series = Mapping[str, Sequence[Point]]
"""The points along each of width, rank and steps, by rising value."""


def size_of(variant: Variant) -> Size:
    """Returns the sizes of a variant, as its runs record them."""
    config = variant.summaries[0].config
    options = config.task_options
    return Size(options["width"], options["rank"], config.plan.steps)


def series(variants: Sequence[Variant]) -> Series:
    """Sorts the variants of the study along width, rank and steps; the middle belongs to each.

    Args:
        variants: What has run of the study; of them, those whose comparison is complete count.

    Returns:
        The points by what changes, where one beside the middle has run; empty without the middle.
    """
    found = {}
    for variant in variants:
        comparison = compare(variant.name, STUDY, variant.summaries)
        if comparison is not None and is_complete(variant, [RECOMMENDED, *TUNED_ADAMW]):
            found[variant.name] = size_of(variant), comparison
    if MIDDLE not in found:
        return {}
    middle, _ = found[MIDDLE]
    along: dict[str, list[Point]] = {}
    for axis in Size._fields:
        at_middle = {axis: getattr(middle, axis)}
        points = sorted(
            (
                Point(getattr(size, axis), comparison)
                for size, comparison in found.values()
                if size._replace(**at_middle) == middle
            ),
            key=lambda point: point.value,
        )
        if len(points) > 1:
            along[axis] = points
    return along


def scaling_table(found: Series) -> str:
    """Writes a row for each point, in Markdown."""
    rows = []
    for axis, points in found.items():
        for value, comparison in points:
            best = comparison.baseline
            speedups = [
                times(comparison.speedups[name]) if name in comparison.speedups else NOTHING
                for name in SHOWN
            ]
            loss = f"{spread(best.losses(best.reported_split))} ({best.method})"
            seed_by_seed = [_paired(comparison, at) for at in (best.reported_split, "validation")]
            rows.append(
                [axis, str(value), loss, *speedups, verdict(comparison.loss), *seed_by_seed]
            )
    headings = ["what changes", "value", "AdamW's loss"]
    headings += [f"fewer steps: {name}" for name in SHOWN]
    headings += [f"loss of {RECOMMENDED} – AdamW's", "seed by seed", "seed by seed, validation"]
    return markdown(headings, rows)


def _paired(comparison: Comparison, split: str) -> str:
    found = paired_difference(comparison.recommended, comparison.baseline, split)
    return f"{found.value:+.2g}" + (f" ± {found.error:.1g}" if found.error is not None else "")
