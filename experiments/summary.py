"""What a study found, as numbers: made from results only."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.schema import RunResult, Scores


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

    @property
    def lost(self) -> int:
        """How many runs of the sweep diverged or failed."""
        return sum(run.status != "finished" for run in self.sweep)

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


def summarize(results: Iterable[RunResult]) -> list[MethodSummary]:
    """Groups the results of one variant by method, in the order in which they come.

    The first seed of a method is that with the most learning rates.
    """
    by_method: dict[str, list[RunResult]] = {}
    for result in results:
        by_method.setdefault(result.config.method, []).append(result)
    return [_summarize_method(method, runs) for method, runs in by_method.items()]


def _summarize_method(method: str, runs: list[RunResult]) -> MethodSummary:
    seeds = [run.config.seed for run in runs]
    first = max(sorted(set(seeds)), key=seeds.count)
    rate_of = lambda run: run.config.learning_rate
    sweep = sorted((run for run in runs if run.config.seed == first), key=rate_of)
    chosen = rate_of(min(sweep, key=lambda run: run.validation_loss))
    best = [run for run in runs if run.status == "finished" and rate_of(run) == chosen]
    return MethodSummary(method, sweep, sorted(best, key=lambda run: run.config.seed))


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


def steps_to(summary: MethodSummary, loss: float) -> float | None:
    """Counts the steps until the validation loss is first at or below a value.

    Args:
        summary: The method.
        loss: The value.

    Returns:
        The median over the best runs, in steps of the evaluations; None if half of them or more
        never get there.
    """
    steps = [
        min((p.step for p in run.curve if p.validation.loss <= loss), default=math.inf)
        for run in summary.best
    ]
    middle = statistics.median_high(steps) if steps else math.inf
    return None if math.isinf(middle) else middle


def memory(run: RunResult) -> int:
    """Adds up the bytes of the trained leaves, the optimizer's state and a step's temporaries."""
    return run.trained_bytes + run.optimizer_state_bytes + (run.step_temporary_bytes or 0)
