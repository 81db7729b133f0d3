"""Tables of a study: the same cells on the screen and in the documentation."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.box import SIMPLE
from rich.table import Table

from experiments.schema import RunResult
from experiments.summary import (
    Difference,
    MethodSummary,
    Speedup,
    SweepPoint,
    difference,
    goal_of,
    memory,
    speedup,
    tuned_baseline,
)

Cell = Callable[[MethodSummary, MethodSummary | None], str]
NOTHING = "–"

SCORES = (
    ("accuracy", 100, "accuracy, %"),
    ("matthews", 1, "Matthews"),
    ("solved", 100, "solved, %"),
)
"""What a task may be scored by besides the loss: the field, its factor and its heading."""

PROBES = {
    "rank_a": "effective rank of the gradient of a",
    "rank_b": "effective rank of the gradient of b",
    "gradient_alignment": "cosine: full gradient, step along the factors' gradients",
    "step_alignment": "cosine: negative full gradient, the optimizer's step",
    "step_rank": "effective rank of the step of ΔK",
    "delta_rank": "effective rank of ΔK",
    "step_norm": "spectral norm of the step of ΔK",
}


class Column(NamedTuple):
    """A column: its heading and what stands in the row of a method, given the baseline."""

    heading: str
    cell: Cell
    on_screen: bool = False


def spread(values: Sequence[float], factor: float = 1.0) -> str:
    """Writes mean and standard deviation, in four and two digits."""
    if not values:
        return NOTHING
    mean = f"{factor * statistics.mean(values):.4g}"
    return f"{mean} ± {factor * statistics.stdev(values):.2g}" if len(values) > 1 else mean


def columns(summaries: Sequence[MethodSummary]) -> list[Column]:
    """Returns the columns that these methods fill."""
    splits = ["validation"]
    if any("test" in run.final for summary in summaries for run in summary.best):
        splits.append("test")
    chosen = [
        Column("lr", _rate, True),
        Column("fewer steps", _speedup, True),
        Column("lr off by one", _forgiving),
    ]
    for split in splits:
        losses = lambda summary, _, split=split: spread(summary.losses(split))
        chosen.append(Column(f"{split} loss", losses, split == "validation"))
    for name, factor, heading in SCORES:
        for split in splits:
            if any(summary.scores(split, name) for summary in summaries):
                scores = lambda summary, _, split=split, name=name, factor=factor: spread(
                    summary.scores(split, name), factor
                )
                chosen.append(Column(f"{split} {heading}", scores, True))
    chosen += [
        Column(f"{splits[-1]} loss – AdamW's", _verdict),
        Column("time to AdamW's loss", _time),
        Column("time a step", _step_ratio, True),
        Column("memory", _memory),
        Column("parameters", _parameters),
        Column("lost", _lost, True),
    ]
    return chosen


def cells(summaries: Sequence[MethodSummary]) -> tuple[list[Column], list[list[str]]]:
    """Returns the columns and the cells of all rows, the method's name excepted."""
    baseline = tuned_baseline(summaries)
    chosen = columns(summaries)
    return chosen, [[column.cell(s, baseline) for column in chosen] for s in summaries]


def screen_table(summaries: Sequence[MethodSummary], title: str) -> Table:
    """Makes a table with one row a method, at its best learning rate."""
    chosen, rows = cells(summaries)
    caption = "mean ± standard deviation over seeds; * best rate at an end of the sweep"
    table = Table(title=title, caption=caption, box=SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("method", no_wrap=True)
    shown = [index for index, column in enumerate(chosen) if column.on_screen]
    for index in shown:
        table.add_column(chosen[index].heading, justify="right")
    for summary, row in zip(summaries, rows, strict=True):
        table.add_row(summary.method, *(row[index] for index in shown))
    return table


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison_table(summaries: Sequence[MethodSummary]) -> str:
    """Writes the whole table in Markdown."""
    chosen, rows = cells(summaries)
    named = [[s.method, *row] for s, row in zip(summaries, rows, strict=True)]
    return markdown(["method", *(column.heading for column in chosen)], named)


def sweep_table(summaries: Sequence[MethodSummary]) -> str:
    """Writes the mean final validation loss of the sweep's seeds at every learning rate."""
    rates = sorted({point.learning_rate for s in summaries for point in s.sweep})
    rows = []
    for summary in summaries:
        found = {point.learning_rate: _sweep_cell(point) for point in summary.sweep}
        rows.append([summary.method, *(found.get(rate, "") for rate in rates)])
    return markdown(["method", *(f"{rate:g}" for rate in rates)], rows)


def _sweep_cell(point: SweepPoint) -> str:
    if point.finished:
        return f"{point.validation_loss:.4g}"
    states = Counter(run.status for run in point.runs if run.status != "finished")
    return ", ".join(
        f"{count} {state}" if len(point.runs) > 1 else state for state, count in states.items()
    )


def probed(summaries: Sequence[MethodSummary]) -> dict[str, str]:
    """Returns the probes that all runs have, with their headings; earlier runs have fewer."""
    points = [point for s in summaries for run in s.best for point in run.probes]
    return {
        name: heading
        for name, heading in PROBES.items()
        if points and all(getattr(point, name) is not None for point in points)
    }


def probe_table(summaries: Sequence[MethodSummary]) -> str:
    """Writes the probes' means over steps and seeds, in Markdown; empty if there are none."""
    names = probed(summaries)
    rows = [
        [s.method, *(probe_mean(s.best, name) for name in names)]
        for s in summaries
        if any(run.probes for run in s.best)
    ]
    return markdown(["method", *names.values()], rows) if rows else ""


def probe_mean(runs: Sequence[RunResult], name: str) -> str:
    """Writes a probe's mean over the steps, its mean and standard deviation over the runs."""
    return spread([statistics.mean(getattr(p, name) for p in run.probes) for run in runs])


def _rate(summary: MethodSummary, baseline: MethodSummary | None) -> str:
    if not summary.best:
        return NOTHING
    return f"{summary.best[0].config.learning_rate:g}" + "*" * summary.at_edge


def _verdict(summary: MethodSummary, baseline: MethodSummary | None) -> str:
    if baseline is None or summary is baseline or not summary.best:
        return NOTHING
    split = summary.reported_split
    return verdict(difference(summary.losses(split), baseline.losses(split)))


def verdict(found: Difference) -> str:
    """Writes a difference, its pooled standard error, and how many of these it is."""
    if found.error is None:
        return f"{found.value:+.2g} (too few seeds)"
    word = ("better" if found.value < 0 else "worse") if found.claimed else "within noise"
    units = f"{found.value / found.error:+.1f}" if found.error else "∞"
    return f"{found.value:+.2g} ± {found.error:.1g} ({units}): {word}"


def times(found: Speedup) -> str:
    """Writes by how many times a method needs fewer steps, or how many seeds get there."""
    if found.mean is None:
        return f"{len(found.reached)} of {found.runs} reach it" if found.runs else NOTHING
    spread = f" ± {statistics.stdev(found.reached):.2f}" if len(found.reached) > 1 else ""
    return f"{found.mean:.2f}×{spread}"


def _has_steps(summary: MethodSummary, baseline: MethodSummary | None) -> bool:
    """Whether steps to a loss can be told: evaluations are no rarer than every 5 % of a run."""
    if baseline is None or not summary.best:
        return False
    plan = baseline.best[0].config.plan
    return 20 * plan.eval_every <= plan.steps


def _speedup(summary: MethodSummary, baseline: MethodSummary | None) -> str:
    if baseline is None or not _has_steps(summary, baseline):
        return NOTHING
    goal = goal_of(baseline)
    found = times(speedup(summary, goal))
    return f"1 ({goal.step} steps; its seeds: {found})" if summary is baseline else found


def _forgiving(summary: MethodSummary, baseline: MethodSummary | None) -> str:
    if baseline is None or not _has_steps(summary, baseline):
        return NOTHING
    found = speedup(summary, goal_of(baseline)).forgiving
    return NOTHING if found is None else f"{found:.2f}×"


def _time(summary: MethodSummary, baseline: MethodSummary | None) -> str:
    if baseline is None or not _has_steps(summary, baseline):
        return NOTHING
    if summary.best[0].step_ratio is None:
        return NOTHING
    if summary is baseline:
        return "1.00×"
    mean = speedup(summary, goal_of(baseline)).mean
    return NOTHING if mean is None else f"{_ratio(summary) / _ratio(baseline) / mean:.2f}×"


def _ratio(summary: MethodSummary) -> float:
    ratios = [run.step_ratio for run in summary.sweep_runs if run.step_ratio is not None]
    return statistics.median(ratios)


def _step_ratio(summary: MethodSummary, baseline: MethodSummary | None) -> str:
    is_measured = summary.sweep_runs[0].step_ratio is not None
    return f"{_ratio(summary):.2f}×" if is_measured else NOTHING


def _memory(summary: MethodSummary, baseline: MethodSummary | None) -> str:
    if baseline is None or not summary.best:
        return NOTHING
    return f"{memory(summary.best[0]) / memory(baseline.best[0]):.2f}×"


def _parameters(summary: MethodSummary, baseline: MethodSummary | None) -> str:
    return f"{summary.sweep_runs[0].trainable_parameters:,}"


def _lost(summary: MethodSummary, baseline: MethodSummary | None) -> str:
    return f"{summary.lost}/{len(summary.sweep_runs)}"
