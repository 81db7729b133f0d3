"""What a study found: a summary by method, a table and a figure, made from results only."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.box import SIMPLE
from rich.table import Table

from experiments.schema import RunResult


@dataclass(frozen=True)
class MethodSummary:
    """One method's sweep and its runs at the best learning rate.

    Attributes:
        method: Name of the method.
        sweep: The runs of the first seed, by rising learning rate.
        best: All finished runs at the learning rate with the lowest final validation loss in the
            sweep, one a seed; empty if none finished.
    """

    method: str
    sweep: list[RunResult]
    best: list[RunResult]

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is an end of the sweep, so that it proves little."""
        ends = {self.sweep[0].config.learning_rate, self.sweep[-1].config.learning_rate}
        return len(self.sweep) > 1 and any(r.config.learning_rate in ends for r in self.best)


def summarize(results: Iterable[RunResult]) -> list[MethodSummary]:
    """Groups the results of one study by method, in the order in which they ran."""
    by_method: dict[str, list[RunResult]] = {}
    for result in results:
        by_method.setdefault(result.config.method, []).append(result)
    summaries = []
    for method, runs in by_method.items():
        seed = runs[0].config.seed
        sweep = sorted(
            (run for run in runs if run.config.seed == seed),
            key=lambda run: run.config.learning_rate,
        )
        chosen = min(sweep, key=lambda run: run.validation_loss).config.learning_rate
        best = [
            run for run in runs if run.status == "finished" and run.config.learning_rate == chosen
        ]
        summaries.append(MethodSummary(method, sweep, best))
    return summaries


def make_table(summaries: list[MethodSummary], title: str) -> Table:
    """Returns a table with one row a method, at its best learning rate."""
    seeds = max(len(summary.best) for summary in summaries)
    splits = ["validation"]
    if any("test" in run.final for summary in summaries for run in summary.best):
        splits.append("test")
    lost = any(run.status != "finished" for summary in summaries for run in summary.sweep)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    caption = f"{spread}; accuracy in %; kB of optimizer state"
    caption += "; lost: diverged or failed" * lost
    table = Table(title=title, caption=caption, box=SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("method", no_wrap=True)
    headings = ["lr", "val. loss", "val. acc.", "test acc.", "ms/step", "kB", "lost"]
    shown = {"test acc.": len(splits) > 1, "lost": lost}
    for heading in headings:
        if shown.get(heading, True):
            table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(summary.method, *_cells(summary, splits), *([_lost(summary)] * lost))
    return table


def _cells(summary: MethodSummary, splits: list[str]) -> list[str]:
    runs = summary.best
    if not runs:
        return ["-"] * (4 + len(splits))
    return [
        f"{runs[0].config.learning_rate:g}" + ("*" if summary.at_edge else ""),
        _spread([run.final["validation"].loss for run in runs], ".3f"),
        *(_accuracy(runs, split) for split in splits),
        f"{1e3 * statistics.median(run.median_step_seconds or 0.0 for run in runs):.1f}",
        f"{runs[0].optimizer_state_bytes / 1e3:.0f}",
    ]


def _accuracy(runs: list[RunResult], split: str) -> str:
    values = [run.final[split].accuracy for run in runs]
    return _spread([100 * value for value in values if value is not None], ".1f")


def _lost(summary: MethodSummary) -> str:
    count = sum(run.status != "finished" for run in summary.sweep)
    return f"{count}/{len(summary.sweep)}"


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "-"
    mean = format(statistics.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


def draw_figure(summaries: list[MethodSummary], title: str, path: Path) -> None:
    """Draws loss curves at the best learning rates, and loss against learning rate.

    Args:
        summaries: What to draw.
        title: Title of the whole figure.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title)
    curves, sweeps = figure.subplots(1, 2)
    for index, summary in enumerate(summaries):
        _draw_curves(curves, summary, f"C{index}")
        _draw_sweep(sweeps, summary, f"C{index}")
    curves.set(xlabel="step", ylabel="validation loss", yscale="log")
    curves.set_title("Each method at its best learning rate")
    sweeps.set(xlabel="peak learning rate", ylabel="final validation loss")
    sweeps.set(xscale="log", yscale="log")
    sweeps.set_title("Sweep (first seed); × = diverged")
    for axes in (curves, sweeps):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.2)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, summary: MethodSummary, color: str) -> None:
    """Draws the mean over seeds, and a band from the lowest to the highest."""
    if not summary.best:
        return
    steps = [point.step for point in summary.best[0].curve]
    losses = [[point.validation.loss for point in run.curve] for run in summary.best]
    columns = list(zip(*losses, strict=True))
    rate = summary.best[0].config.learning_rate
    axes.plot(
        steps,
        list(map(statistics.mean, columns)),
        color=color,
        label=f"{summary.method}, lr {rate:g}",
    )
    axes.fill_between(
        steps, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.2, lw=0
    )


def _draw_sweep(axes: Axes, summary: MethodSummary, color: str) -> None:
    """Draws the finished runs as a line, and the diverged ones as crosses at the top edge."""
    done = [run for run in summary.sweep if run.status == "finished"]
    lost = [run for run in summary.sweep if run.status != "finished"]
    axes.plot(
        [run.config.learning_rate for run in done],
        [run.validation_loss for run in done],
        "o-",
        color=color,
        label=summary.method,
    )
    axes.plot(
        [run.config.learning_rate for run in lost],
        [0.98] * len(lost),
        "x",
        color=color,
        transform=axes.get_xaxis_transform(),
    )
