"""Figures of a study: loss curves, loss against learning rate, and loss by variant."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.summary import MethodSummary

COLORS = [f"C{index}" for index in range(10)]
STYLES = ["-", "--", ":"]


def styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns a line style for each method, none used twice up to thirty."""
    return {
        method: {"color": COLORS[i % 10], "linestyle": STYLES[i // 10 % 3]}
        for i, method in enumerate(methods)
    }


def draw_variant(summaries: Sequence[MethodSummary], title: str, path: Path) -> None:
    """Draws loss curves at the best learning rates, and loss against learning rate.

    Args:
        summaries: What to draw.
        title: Title of the whole figure.
        path: The PNG file to write.
    """
    is_swept = any(len(summary.sweep) > 1 for summary in summaries)
    figure = Figure(figsize=(11 if is_swept else 6.5, 5.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2 if is_swept else 1, squeeze=False)[0]
    curves = panels[0]
    looks = styles([summary.method for summary in summaries])
    for summary in summaries:
        _draw_curves(curves, summary, looks[summary.method])
    curves.set(xlabel="step", ylabel="validation loss", yscale="log")
    curves.set_title("Each method at its best learning rate")
    for axes in panels[1:]:
        for summary in summaries:
            _draw_sweep(axes, summary, looks[summary.method])
        axes.set(xlabel="peak learning rate", ylabel="final validation loss")
        axes.set(xscale="log", yscale="log")
        axes.set_title("Sweep (first seed); × = diverged or failed")
    start = [run.curve[0].validation.loss for s in summaries for run in s.best if run.curve]
    for axes in panels:
        if start:  # runs that got worse than the start would squeeze the others
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.3 * max(start)))
        axes.grid(alpha=0.2)
    falling = [each[1] for s in summaries if len(each := _medians(s)) > 1 and each[1] < each[0]]
    if falling:  # and so would the way to the first evaluation
        curves.set_ylim(top=1.1 * max(falling))
    for axes in panels:
        _log_ticks(axes)
    handles = curves.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4 if is_swept else 2)
    _save(figure, path)


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
    methods = list(dict.fromkeys(s.method for found in by_variant.values() for s in found))
    for method, look in styles(methods).items():
        points = [
            (names.index(variant), statistics.mean(summary.losses("validation")))
            for variant, found in by_variant.items()
            for summary in found
            if summary.method == method and summary.best
        ]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method, **look)
    axes.set_xticks(range(len(names)), names)
    axes.set(yscale="log", ylabel="final validation loss", xlabel=axis)
    axes.grid(alpha=0.2)
    figure.legend(loc="outside lower center", ncols=4)
    _save(figure, path)


PROBES = {
    "rank_a": "effective rank of the gradient of a",
    "rank_b": "effective rank of the gradient of b",
    "gradient_alignment": "cosine: full gradient, step along the factors' gradients",
    "step_alignment": "cosine: negative full gradient, the optimizer's step",
}


def draw_probes(summaries: Sequence[MethodSummary], title: str, path: Path) -> None:
    """Draws the probes of the best runs against the step, means over seeds.

    Args:
        summaries: What to draw.
        title: Title of the whole figure.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2, sharex=True)
    looks = styles([summary.method for summary in summaries])
    for axes, (name, heading) in zip(panels.flat, PROBES.items(), strict=True):
        for summary in (s for s in summaries if s.best):
            steps = [point.step for point in summary.best[0].probes]
            values = zip(*(run.probes for run in summary.best), strict=True)
            means = [statistics.mean(getattr(p, name) for p in points) for points in values]
            axes.plot(steps, means, label=summary.method, **looks[summary.method])
        axes.set_title(heading)
        axes.grid(alpha=0.2)
    for axes in panels[1]:
        axes.set_xlabel("step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _save(figure, path)


def _log_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    if low > 0 and high / low < 50:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _seeds(summary: MethodSummary) -> list[tuple[float, ...]]:
    """Returns the losses of all seeds, evaluation by evaluation."""
    losses = [[point.validation.loss for point in run.curve] for run in summary.best]
    return list(zip(*losses, strict=True))


def _medians(summary: MethodSummary) -> list[float]:
    return list(map(statistics.median, _seeds(summary)))


def _draw_curves(axes: Axes, summary: MethodSummary, look: dict[str, Any]) -> None:
    """Draws the median over seeds, and a band from the lowest to the highest."""
    if not summary.best:
        return
    steps = [point.step for point in summary.best[0].curve]
    values = _seeds(summary)
    rate = summary.best[0].config.learning_rate
    label = f"{summary.method}, lr {rate:g}"
    axes.plot(steps, _medians(summary), label=label, **look)
    band = {"color": look["color"], "alpha": 0.15, "lw": 0}
    axes.fill_between(steps, list(map(min, values)), list(map(max, values)), **band)


def _draw_sweep(axes: Axes, summary: MethodSummary, look: dict[str, Any]) -> None:
    """Draws the finished runs as a line, and the others as crosses at the top edge."""
    done = [run for run in summary.sweep if run.status == "finished"]
    lost = [run for run in summary.sweep if run.status != "finished"]
    rates = [run.config.learning_rate for run in done]
    axes.plot(rates, [run.validation_loss for run in done], marker="o", markersize=4, **look)
    axes.plot(
        [run.config.learning_rate for run in lost],
        [0.98] * len(lost),
        "x",
        color=look["color"],
        transform=axes.get_xaxis_transform(),
    )
