"""What a study found, as numbers: made from results only."""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from experiments.peers import TUNED_ADAMW
from experiments.schema import RunConfig, RunResult, Scores
from experiments.start import gradients_of


class SweepPoint(NamedTuple):
    """The runs of a sweep at one learning rate.

    Attributes:
        learning_rate: The rate.
        runs: The runs, one a seed of the sweep.
    """

    learning_rate: float
    runs: list[RunResult]

    @property
    def finished(self) -> bool:
        """Whether all runs finished."""
        return all(run.status == "finished" for run in self.runs)

    @property
    def validation_loss(self) -> float:
        """The mean final validation loss; infinite unless all runs finished."""
        return statistics.mean(run.validation_loss for run in self.runs)


@dataclass(frozen=True)
class MethodSummary:
    """One method's sweep and its runs at the best learning rate.

    Attributes:
        method: Name of the method.
        sweep: The runs of the first seeds, by rising learning rate.
        best: All finished runs at the learning rate with the lowest mean final validation loss in
            the sweep, one a seed; empty if none finished.
        broken: How many further seeds did not finish at that rate.
    """

    method: str
    sweep: list[SweepPoint]
    best: list[RunResult]
    broken: int = 0

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is an end of the sweep, so that it proves little."""
        ends = {self.sweep[0].learning_rate, self.sweep[-1].learning_rate}
        return len(self.sweep) > 1 and any(r.config.learning_rate in ends for r in self.best)

    @property
    def lost(self) -> int:
        """How many runs of the sweep, or at the best rate, diverged or failed."""
        return sum(run.status != "finished" for run in self.sweep_runs) + self.broken

    @property
    def sweep_runs(self) -> list[RunResult]:
        """The runs of the sweep, by rising learning rate and seed."""
        return [run for point in self.sweep for run in point.runs]

    @property
    def config(self) -> RunConfig:
        """The configuration of the first run, for what all runs share."""
        return self.sweep[0].runs[0].config

    @property
    def reported_split(self) -> str:
        """The test where there is one."""
        return "test" if all("test" in run.final for run in self.best) else "validation"

    def losses(self, split: str) -> list[float]:
        """Returns the final losses of the best runs."""
        return [run.final[split].loss for run in self.best]

    def scores(self, split: str, name: str) -> list[float]:
        """Returns another final score of the best runs; empty where there is none."""
        values = [getattr(run.final.get(split, Scores(loss=0.0)), name) for run in self.best]
        return [value for value in values if value is not None]


class Variant(Protocol):
    """One variant of a study and what was found in it."""

    name: str
    summaries: list[MethodSummary]
    missing: Mapping[str, str]
    """What is still to run of each method."""


def is_complete(variant: Variant, methods: Collection[str]) -> bool:
    """Says whether methods have all their runs in a variant."""
    ran = {summary.method for summary in variant.summaries}
    return set(methods) <= ran - set(variant.missing)


@dataclass(frozen=True)
class Difference:
    """How a method's final loss differs from the baseline's.

    Attributes:
        value: Difference of the means, negative where the method is better.
        error: Pooled standard error of it; None with fewer than two runs each.
    """

    value: float
    error: float | None

    @property
    def claimed(self) -> bool:
        """Whether it exceeds twice its error."""
        return self.error is not None and abs(self.value) > 2 * self.error


class Goal(NamedTuple):
    """What the baseline reaches: the lowest point of its mean validation curve.

    Attributes:
        loss: The mean validation loss there.
        step: The step there.
    """

    loss: float
    step: int


@dataclass(frozen=True)
class Speedup:
    """The baseline's steps to its goal, in units of a method's: 1.5 means a third fewer steps.

    A start from the gradient counts as many steps as it takes gradients.

    Attributes:
        reached: Of the runs at the best learning rate that reach the goal, one a seed.
        runs: How many runs there are, those that broke down included.
        of_means: Where the mean of the curves crosses the goal, in place of each; None if it does
            not.
        forgiving: The mean over the best learning rate and its two neighbours in the sweep, where
            a run that does not reach the goal counts as zero; None if the best is an end of the
            sweep.
    """

    reached: list[float]
    runs: int
    of_means: float | None
    forgiving: float | None

    @property
    def mean(self) -> float | None:
        """The mean over the seeds; None unless all of them reach the goal."""
        return statistics.mean(self.reached) if 0 < len(self.reached) == self.runs else None


def summarize(results: Iterable[RunResult]) -> list[MethodSummary]:
    """Groups the results of one variant by method, in the order in which they come.

    The seeds of a method's sweep are those with the most learning rates; the first one where each
    has one rate.
    """
    by_method: dict[str, list[RunResult]] = {}
    for result in results:
        by_method.setdefault(result.config.method, []).append(result)
    return [_summarize_method(method, runs) for method, runs in by_method.items()]


def _summarize_method(method: str, runs: list[RunResult]) -> MethodSummary:
    runs = sorted(runs, key=lambda run: run.config.seed)
    seeds = [run.config.seed for run in runs]
    most = max(map(seeds.count, seeds))
    swept = [seed for seed in sorted(set(seeds)) if seeds.count(seed) == most]
    swept = swept if most > 1 else swept[:1]
    at: dict[float, list[RunResult]] = {}
    for run in runs:
        at.setdefault(run.config.learning_rate, []).append(run)
    points = (
        SweepPoint(rate, [run for run in at[rate] if run.config.seed in swept])
        for rate in sorted(at)
    )
    sweep = [point for point in points if point.runs]
    chosen = min(sweep, key=lambda point: point.validation_loss)
    there = at[chosen.learning_rate]
    best = [run for run in there if run.status == "finished"]
    broken = sum(run.status != "finished" for run in there if run not in chosen.runs)
    return MethodSummary(method, sweep, best, broken)


def difference(own: Sequence[float], base: Sequence[float]) -> Difference:
    """Compares two samples.

    Args:
        own: A method's losses, one a seed.
        base: The baseline's.

    Returns:
        The difference of the means; its error is that of two samples with one variance.
    """
    value = statistics.mean(own) - statistics.mean(base)
    freedom = len(own) + len(base) - 2
    if min(len(own), len(base)) < 2:
        return Difference(value, None)
    squares = [(len(x) - 1) * statistics.variance(x) for x in (own, base)]
    return Difference(value, math.sqrt(sum(squares) / freedom * (1 / len(own) + 1 / len(base))))


def paired_difference(own: MethodSummary, base: MethodSummary, split: str) -> Difference:
    """Compares two methods seed by seed: runs of one seed see the same data in the same order.

    Args:
        own: A method.
        base: The baseline.
        split: Of the final losses.

    Returns:
        The mean over the seeds of both of the difference; its error is that of a mean. None is
        claimed from it: the protocol of the studies compares two samples.

    Raises:
        ValueError: No seed is in both.
    """
    losses = {run.config.seed: run.final[split].loss for run in base.best}
    differences = [
        run.final[split].loss - losses[run.config.seed]
        for run in own.best
        if run.config.seed in losses
    ]
    if not differences:
        raise ValueError(f"{own.method} and {base.method} have no seed in common; run one for both")
    if len(differences) < 2:
        return Difference(differences[0], None)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(statistics.mean(differences), error)


def tuned_baseline(summaries: Sequence[MethodSummary]) -> MethodSummary | None:
    """Returns the baseline: of LoRA with AdamW, at each ratio of b's rate to a's, the best.

    Args:
        summaries: The methods of one variant.

    Returns:
        The one with the lowest mean final validation loss; None if none has finished.
    """
    tuned = [s for s in summaries if s.method in TUNED_ADAMW and s.best]
    return min(tuned, key=lambda s: statistics.mean(s.losses("validation")), default=None)


Curve = Sequence[tuple[int, float]]
"""Steps and validation losses."""


def curve_of(run: RunResult) -> Curve:
    """Returns the steps and validation losses of a run."""
    return [(point.step, point.validation.loss) for point in run.curve]


def steps_to(curve: Curve, loss: float) -> float | None:
    """Returns the step at which a validation loss first is at or below a value.

    Between two evaluations the loss is taken to be linear in the step.

    Args:
        curve: The losses.
        loss: The value.

    Returns:
        The step; None if the curve never gets there.
    """
    before = None
    for step, value in curve:
        if value <= loss:
            if before is None:
                return float(step)
            part = (before[1] - loss) / (before[1] - value)
            return before[0] + part * (step - before[0])
        before = (step, value) if math.isfinite(value) else None
    return None


def mean_curve(runs: Sequence[RunResult]) -> Curve:
    """Returns the mean validation losses of runs that were evaluated at the same steps."""
    points = zip(*map(curve_of, runs), strict=True)
    return [(each[0][0], statistics.mean(loss for _, loss in each)) for each in points]


def goal_of(baseline: MethodSummary) -> Goal:
    """Returns the lowest point of a method's mean validation curve."""
    return min(Goal(loss, step) for step, loss in mean_curve(baseline.best))


def speedup(summary: MethodSummary, goal: Goal) -> Speedup:
    """Counts how many times fewer steps than the baseline's a method needs to the baseline's goal.

    Args:
        summary: The method.
        goal: What the baseline reaches, and when.
    """

    def times(curve: Curve, run: RunResult) -> float:
        steps = steps_to(curve, goal.loss)
        if steps is None:
            return 0.0
        steps += gradients_of(run.config.method_options)
        return goal.step / steps if steps else math.inf

    def of_run(run: RunResult) -> float:
        return times(curve_of(run), run) if run.status == "finished" else 0.0

    values = [of_run(run) for run in summary.best]
    of_means = forgiving = None
    if summary.best:
        of_means = times(mean_curve(summary.best), summary.best[0]) or None
        rates = [point.learning_rate for point in summary.sweep]
        at = rates.index(summary.best[0].config.learning_rate)
        near = summary.sweep[max(at - 1, 0) : at + 2]
        runs = [run for point in near for run in point.runs]
        forgiving = statistics.mean(map(of_run, runs)) if len(near) == 3 else None
    reached = [value for value in values if value]
    return Speedup(reached, len(values) + summary.broken, of_means, forgiving)


def memory(run: RunResult) -> int:
    """Adds up the bytes of the trained leaves, the optimizer's state and a step's temporaries."""
    return run.trained_bytes + run.optimizer_state_bytes + (run.step_temporary_bytes or 0)
