"""Figures over all studies: speedups, ranges of good rates, rules, and what grows with size."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.figures import BLACK, COLORS, GREY, OWN_COLORS, save
from experiments.headline import RECOMMENDED, SHOWN, Comparison
from experiments.peers import TUNED_ADAMW
from experiments.rules import Trial
from experiments.scaling import SHOWN as GROWING
from experiments.scaling import Point, Series
from experiments.stability import Range


def draw_speedups(comparisons: Sequence[Comparison], title: str, path: Path) -> None:
    """Draws by how many times a method needs fewer steps than tuned AdamW, a row a comparison.

    Args:
        comparisons: The comparisons.
        title: Title of the figure.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(8.5, 1.6 + 0.42 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title)
    axes.axvline(1.0, color=BLACK, lw=1)
    axes.text(1.0, -0.9, " AdamW", color=BLACK, fontsize=8)
    for place, method in enumerate(SHOWN):
        color = OWN_COLORS[method]
        for row, comparison in enumerate(comparisons):
            found = comparison.speedups.get(method)
            height = row + 0.16 * (place - (len(SHOWN) - 1) / 2)
            if found is None:
                continue
            if found.mean is None:
                axes.plot([0.01], [height], "x", color=color, transform=axes.get_yaxis_transform())
                continue
            axes.plot([min(found.reached), max(found.reached)], [height] * 2, color=color, lw=1.5)
            axes.plot([found.mean], [height], "o", markersize=5, color=color)
        axes.plot([], [], "o-", color=color, label=method)
    axes.set_yticks(range(len(comparisons)), [comparison.label for comparison in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -1.1)
    axes.set_xlabel(
        "AdamW's steps to its best validation loss / the method's\n"
        "lines span the seeds; ×: not every seed gets there"
    )
    axes.grid(axis="x", alpha=0.2)
    figure.legend(loc="outside lower center", ncols=len(SHOWN))
    save(figure, path)


def draw_stability(found: Mapping[str, Sequence[Range]], title: str, path: Path) -> None:
    """Draws how wide the range of good learning rates is, a row a method.

    Args:
        found: The ranges by method, the most forgiving first; those of fewer than three
            comparisons are left out.
        title: Title of the figure.
        path: The PNG file to write.
    """
    found = {method: each for method, each in found.items() if len(each) >= 3}
    figure = Figure(figsize=(8.5, 1.6 + 0.26 * len(found)), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title)
    for row, (method, each) in enumerate(found.items()):
        color = OWN_COLORS[RECOMMENDED] if "polora" in method else "0.5"
        color = BLACK if method in TUNED_ADAMW else color
        closed = [one.decades for one in each if not one.is_open]
        opened = [one.decades for one in each if one.is_open]
        axes.plot(closed, [row] * len(closed), "o", markersize=4, alpha=0.6, color=color)
        axes.plot(opened, [row] * len(opened), ">", markersize=5, alpha=0.6, color=color)
        median = statistics.median(one.decades for one in each)
        axes.plot([median], [row], "|", markersize=14, markeredgewidth=2, color=color)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlim(left=0.0)
    axes.set_xlabel("decades of learning rates within 5 % of the best loss")
    axes.set_title("Dots: comparisons, ▸ an end of the sweep is within, bars: medians", fontsize=10)
    axes.grid(axis="x", alpha=0.2)
    save(figure, path)


def draw_rules(found: Sequence[Trial], title: str, path: Path) -> None:
    """Draws the best learning rate of every sweep against that by the rule.

    Args:
        found: The rules beside the sweeps.
        title: Title of the figure.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(8.5, 6.5), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title)
    rates = [rate for trial in found for rate in (trial.predicted, trial.best)]
    ends = np.array([min(rates) / 1.5, max(rates) * 1.5])
    axes.plot(ends, ends, color=BLACK, lw=1)
    axes.fill_between(ends, ends / 3, ends * 3, color=GREY, alpha=0.35, lw=0)
    others, markers = itertools.cycle(COLORS), "osD^v<>pPX*h"
    methods = dict.fromkeys(trial.method for trial in found)
    own = {"adamw": BLACK, **OWN_COLORS}
    for method, marker in zip(methods, markers, strict=False):
        color = own[method] if method in own else next(others)
        for is_fitted in (True, False):
            some = [t for t in found if t.method == method and t.is_fitted == is_fitted]
            axes.plot(
                [trial.predicted for trial in some],
                [trial.best for trial in some],
                marker,
                color=color,
                markersize=6,
                fillstyle="none" if is_fitted else "full",
                label=method if is_fitted else None,
            )
    axes.set(xscale="log", yscale="log", xlabel="learning rate by the rule")
    axes.set(ylabel="best learning rate of the sweep", xlim=ends, ylim=ends)
    axes.set_title(
        "Hollow: the rules were fitted to these; filled: not; grey: one step of a sweep",
        fontsize=10,
    )
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right center", fontsize=8)
    save(figure, path)


def draw_scaling(found: Series, title: str, path: Path) -> None:
    """Draws speedups and differences of final losses along width, rank and steps.

    Args:
        found: The points along each.
        title: Title of the figure.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    figure.suptitle(f"{title}\nDots: seeds; ×: some do not get there; bars: two standard errors")
    panels = figure.subplots(2, len(found), sharey="row", sharex="col", squeeze=False)
    for (upper, lower), (axis, points) in zip(panels.T, found.items(), strict=True):
        _draw_speedups_along(upper, points)
        _draw_losses_along(lower, points)
        values = [point.value for point in points]
        lower.set(xscale="log", xlabel=axis)
        lower.set_xticks(values, [f"{value:,}" for value in values])
        for each in (upper, lower):
            each.xaxis.set_minor_locator(NullLocator())
            each.grid(alpha=0.2)
    panels[0, 0].set_ylabel("AdamW's steps / the method's")
    panels[1, 0].set_ylabel(f"loss of {RECOMMENDED} – AdamW's")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


def _draw_speedups_along(axes: Axes, points: Sequence[Point]) -> None:
    axes.axhline(1.0, color=BLACK, lw=1)
    for place, name in enumerate(GROWING):
        color, line = OWN_COLORS[name], []
        for value, comparison in points:
            speedup = comparison.speedups.get(name)
            if speedup is None:
                continue
            beside = value * 1.05 ** (place - (len(GROWING) - 1) / 2)  # two methods, side by side
            axes.plot(
                [beside] * len(speedup.reached), speedup.reached, "o", markersize=4, color=color
            )
            if speedup.mean is None:
                axes.plot([beside], [0.02], "x", color=color, transform=axes.get_xaxis_transform())
            else:
                line.append((beside, speedup.mean))
        axes.plot(*(zip(*line, strict=True) if line else ([], [])), "o-", color=color, label=name)


def _draw_losses_along(axes: Axes, points: Sequence[Point]) -> None:
    axes.axhline(0.0, color=BLACK, lw=1)
    values, losses = zip(*((value, comparison.loss) for value, comparison in points), strict=True)
    axes.errorbar(
        values,
        [loss.value for loss in losses],
        [2 * (loss.error or 0.0) for loss in losses],
        fmt="o-",
        markersize=4,
        capsize=3,
        color=OWN_COLORS[RECOMMENDED],
    )
