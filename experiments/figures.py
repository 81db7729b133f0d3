"""Figures of a study: loss curves, loss against learning rate, and loss by variant."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from sklearn.isotonic import isotonic_regression

from experiments.start import gradients_of
from experiments.summary import MethodSummary, tuned_baseline
from experiments.tables import probed
from lowrank_optax import plots

BLACK, GREY = "black", "0.75"
OWN_COLORS = {
    "polora-start": "tab:blue",
    "polora": "tab:green",
    "full-adamw": "tab:orange",
    "adamw-start": "tab:red",
}
"""Of the methods that most figures show; the baseline is black."""

COLORS = ["tab:purple", "tab:cyan", "tab:olive", "tab:pink", "tab:brown"]
"""Of other highlighted methods, the best first."""


def looks(summaries: Sequence[MethodSummary]) -> dict[str, dict[str, Any]]:
    """Returns how each method is drawn: the baseline black, the five best colored, others grey."""
    baseline = tuned_baseline(summaries)
    name = baseline.method if baseline else None
    ranked = [s.method for s in by_loss(summaries) if s.best and s.method != name][: len(COLORS)]
    colored = {method: OWN_COLORS[method] for method in ranked if method in OWN_COLORS}
    colored |= zip((method for method in ranked if method not in colored), COLORS, strict=False)
    if name:
        colored[name] = BLACK
    return {
        s.method: {"color": colored[s.method], "zorder": 3}
        if s.method in colored
        else {"color": GREY, "zorder": 2}
        for s in summaries
    }


def by_loss(summaries: Sequence[MethodSummary]) -> list[MethodSummary]:
    """Sorts by mean final loss, the best first and those without a finished run last."""
    return sorted(summaries, key=lambda s: statistics.mean(_final(s)) if s.best else math.inf)


def draw_variant(summaries: Sequence[MethodSummary], title: str, path: Path) -> None:
    """Draws loss curves, final losses and the sweeps of the methods of one variant.

    Args:
        summaries: What to draw.
        title: Title of the whole figure.
        path: The PNG file to write.
    """
    is_swept = any(len(summary.sweep) > 1 for summary in summaries)
    height = max(4.8, 1.6 + 0.26 * len(summaries))
    figure = Figure(figsize=(15 if is_swept else 10.5, height), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 3 if is_swept else 2)
    styles = looks(summaries)
    _draw_curves(panels[0], summaries, styles)
    _draw_finals(panels[1], summaries, styles)
    if is_swept:
        _draw_sweeps(panels[2], summaries, styles)
    save(figure, path)


def draw_variants(by_variant: Mapping[str, Sequence[MethodSummary]], axis: str, path: Path) -> None:
    """Draws the best final validation loss of every method by variant.

    Args:
        by_variant: The summaries of each variant, in the order of the axis.
        axis: What the variants are a series of.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    names = list(by_variant)
    everything = [summary for found in by_variant.values() for summary in found]
    styles = looks(list({summary.method: summary for summary in everything}.values()))
    ends = []
    for method, look in styles.items():
        points = [
            (names.index(variant), statistics.mean(summary.losses("validation")))
            for variant, found in by_variant.items()
            for summary in found
            if summary.method == method and summary.best
        ]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, **look)
        ends.append((*points[-1], method, look["color"]))
    axes.set_xticks(range(len(names)), names)
    axes.set(yscale="log", ylabel="final validation loss", xlabel=axis)
    axes.grid(alpha=0.2)
    _log_ticks(axes)
    _label_ends(axes, ends)
    save(figure, path)


def draw_probes(summaries: Sequence[MethodSummary], title: str, path: Path) -> None:
    """Draws the probes of the best runs against the step, means over seeds.

    Args:
        summaries: What to draw.
        title: Title of the whole figure.
        path: The PNG file to write.
    """
    names = probed(summaries)
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(11, 3.75 * rows), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    styles = looks(summaries)
    for axes, (name, heading) in zip(panels.flat, names.items(), strict=False):
        ends = []
        for summary in (s for s in summaries if s.best):
            steps = [point.step for point in summary.best[0].probes]
            values = zip(*(run.probes for run in summary.best), strict=True)
            means = [statistics.mean(getattr(p, name) for p in points) for points in values]
            look = styles[summary.method]
            axes.plot(steps, means, **look)
            ends.append((steps[-1], means[-1], summary.method, look["color"]))
        axes.set_title(heading, fontsize=10)
        axes.grid(alpha=0.2)
        _label_ends(axes, ends)
    for axes in panels.flat[len(names) - 2 : len(names)]:  # the last one of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    save(figure, path)


def _log_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    if low > 0 and high / low < 50:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _final(summary: MethodSummary) -> list[float]:
    return summary.losses(summary.reported_split)


def _seeds(summary: MethodSummary) -> list[tuple[float, ...]]:
    """Returns the losses of all seeds, evaluation by evaluation."""
    losses = [[point.validation.loss for point in run.curve] for run in summary.best]
    return list(zip(*losses, strict=True))


def _draw_curves(
    axes: Axes, summaries: Sequence[MethodSummary], styles: Mapping[str, dict[str, Any]]
) -> None:
    """Draws the median over seeds, and the seeds of the highlighted methods as thin lines."""
    ends, seen = [], []
    for summary in (s for s in summaries if s.best):
        started = gradients_of(summary.best[0].config.method_options)
        steps = [started + point.step for point in summary.best[0].curve]
        look = styles[summary.method]
        medians = list(map(statistics.median, _seeds(summary)))
        axes.plot(steps, medians, lw=1.8, **look)
        if look["color"] != GREY:
            for run in summary.best:
                losses = [point.validation.loss for point in run.curve]
                axes.plot(steps, losses, lw=0.6, alpha=0.5, **look)
            seen += medians[len(medians) // 5 :]
            ends.append((steps[-1], medians[-1], summary.method, look["color"]))
    axes.set(xlabel="step, the start's included", ylabel="validation loss", yscale="log")
    axes.set_title("Best learning rates; median, thin: seeds", fontsize=10)
    axes.grid(alpha=0.2)
    if seen:  # what happens in the first fifth, or to the worst, would squeeze the rest
        axes.set_ylim(0.95 * min(seen), 1.05 * max(seen))
    _log_ticks(axes)
    _label_ends(axes, ends)


def _draw_finals(
    axes: Axes, summaries: Sequence[MethodSummary], styles: Mapping[str, dict[str, Any]]
) -> None:
    """Draws every seed's final loss as a dot and their mean as a bar, the best method on top."""
    ranked = by_loss(summaries)
    finals = [_final(summary) for summary in ranked if summary.best]
    limit = _limit(finals)
    for row, summary in enumerate(ranked):
        color = styles[summary.method]["color"]
        color = "0.5" if color == GREY else color
        if not summary.best:
            axes.plot([0.98], [row], "x", color=color, transform=axes.get_yaxis_transform())
            continue
        losses = _final(summary)
        inside = [loss for loss in losses if loss <= limit]
        axes.plot(inside, [row] * len(inside), "o", markersize=4, alpha=0.6, color=color)
        if len(inside) < len(losses):
            axes.plot([0.98], [row], ">", color=color, transform=axes.get_yaxis_transform())
        mean = statistics.mean(losses)
        if mean <= limit:
            axes.plot([mean], [row], "|", markersize=14, markeredgewidth=2, color=color)
    axes.set_yticks(range(len(ranked)), [_row_name(summary) for summary in ranked])
    for label, summary in zip(axes.get_yticklabels(), ranked, strict=True):
        color = styles[summary.method]["color"]
        label.set_color("0.4" if color == GREY else color)
    axes.invert_yaxis()
    if finals:
        axes.set_xlim(right=limit + 0.05 * (limit - min(map(min, finals))))
    axes.xaxis.set_major_locator(MaxNLocator(6))  # losses of close methods have many digits
    split = next((s.reported_split for s in ranked if s.best), "validation")
    axes.set(xlabel=f"final {split} loss")
    axes.set_title("Dots: seeds, bars: means, ▸ beyond, × diverged", fontsize=10)
    axes.grid(alpha=0.2)


def _limit(finals: Sequence[Sequence[float]]) -> float:
    """Where the axis of final losses ends, so that the worst do not squeeze the others.

    Methods far behind the middle one are beyond, with all their seeds, and so is a seed that is
    farther from the methods that are shown than these from each other.
    """
    if not finals:
        return 1.0
    means = [statistics.mean(losses) for losses in finals]
    best, middle = min(means), statistics.median(means)
    shown = [mean <= middle + 4 * (middle - best) for mean in means]
    last = max(itertools.compress(means, shown))
    worst = max(map(max, itertools.compress(finals, shown)))
    return min(worst, 2 * last - best) if last > best else worst


def _row_name(summary: MethodSummary) -> str:
    return (
        f"{summary.method}, {summary.best[0].config.learning_rate:g}"
        if summary.best
        else (summary.method)
    )


def _draw_sweeps(
    axes: Axes, summaries: Sequence[MethodSummary], styles: Mapping[str, dict[str, Any]]
) -> None:
    """Draws the sweeps' means as lines, rates with unfinished runs as crosses at the top."""
    losses = {
        summary.method: {
            point.learning_rate: point.validation_loss if point.finished else math.nan
            for point in summary.sweep
        }
        for summary in summaries
    }
    baseline = tuned_baseline(summaries)
    small = {name: {"marker": ".", **look} for name, look in styles.items()}
    plots.sweeps(losses, baseline.method if baseline else None, axes, small)
    axes.set(xlabel="peak learning rate", ylabel="final validation loss", yscale="log")
    seeds = max(len(point.runs) for summary in summaries for point in summary.sweep)
    of_what = f"mean of {seeds} seeds" if seeds > 1 else "first seed"
    axes.set_title(f"Sweep, {of_what}; • best, × diverged", fontsize=10)
    axes.grid(alpha=0.2)
    done = [
        point
        for summary in summaries
        for point in summary.sweep
        if point.finished and styles[summary.method]["color"] != GREY
    ]
    if done:
        ends = [point.validation_loss for point in done]
        start = max(run.curve[0].validation.loss for point in done for run in point.runs)
        axes.set_ylim(0.95 * min(ends), min(1.05 * max(ends), 1.3 * start))
    _log_ticks(axes)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes names at the right ends of lines, moved apart where they would overlap.

    Args:
        axes: Where the lines are.
        ends: x and y of each line's end, its name and color.
    """
    low, high = axes.get_ylim()
    is_log = axes.get_yscale() == "log"
    to_part = (
        (lambda y: math.log(y / low) / math.log(high / low))
        if is_log
        else (lambda y: (y - low) / (high - low))
    )
    placed = sorted((min(max(to_part(y), 0.0), 1.0), name, color) for _, y, name, color in ends)
    gap = 0.045
    stack = [gap * index for index in range(len(placed))]
    # The nearest heights that are a gap apart or more: an isotonic regression of what is above it.
    over = [part - low for (part, _, _), low in zip(placed, stack, strict=True)]
    room = max(0.0, 1.0 - gap * (len(placed) - 1))
    heights = isotonic_regression(over, y_min=0.0, y_max=room) + stack if placed else []
    for height, (_, name, color) in zip(heights, placed, strict=True):
        axes.annotate(
            name,
            (1.01, height),
            xycoords="axes fraction",
            color="0.5" if color == GREY else color,
            fontsize=8,
            va="center",
        )
