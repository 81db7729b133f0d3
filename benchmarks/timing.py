"""Steps of a benchmark: compiled, and timed in turn."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from benchmarks.record import QUIET, Item

WARM_UP = 2


class Runner:
    """A compiled step ``(carry, *arguments) → carry`` with its own, donated carry.

    Args:
        step: the step.
        carry: what it starts from.
        arguments: what it reads and does not change.
        repeats: how many steps one call makes, in a loop on the device. To hand a device hundreds
            of arrays takes longer than a short step; ``times`` are of one step all the same.
    """

    def __init__(
        self, step: Callable[..., Any], carry: Any, *arguments: Any, repeats: int = 1
    ) -> None:
        self.carry = jax.tree.map(lambda x: x.copy(), carry)
        self.arguments = arguments
        self.repeats = repeats
        called = step if repeats == 1 else _in_a_loop(step, repeats)
        start = time.perf_counter()
        lowered = jax.jit(called, donate_argnums=0).lower(self.carry, *arguments)
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        self.trace_s, self.compile_s = traced - start, time.perf_counter() - traced
        self.memory: Any = self.compiled.memory_analysis()
        self.times: list[float] = []

    def run(self) -> None:
        """Times one call."""
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.compiled(self.carry, *self.arguments))
        self.times.append((time.perf_counter() - start) / self.repeats)


def _in_a_loop(step: Callable[..., Any], repeats: int) -> Callable[..., Any]:
    def steps(carry: Any, *arguments: Any) -> Any:
        def body(_: jax.Array, carry: Any) -> Any:
            # Behind the barrier the arguments belong to this step, so that nothing which is made of
            # them alone is made once for all steps.
            return step(*jax.lax.optimization_barrier((carry, *arguments)))

        return jax.lax.fori_loop(0, repeats, body, carry)

    return steps


def time_in_turn(runners: Mapping[str, Runner], steps: int, console: Console) -> None:
    """Times all steps in turn, so that drift of the machine's speed falls on all alike."""
    for index in track(range(WARM_UP + steps), "timing", console=console, transient=True):
        for runner in runners.values():
            runner.run()
            if index < WARM_UP:
                runner.times.clear()


def times_beside(runner: Runner, base: Runner) -> dict[str, float]:
    """Times of a runner, and as ratios to a base that was timed in turn with it."""
    median = statistics.median(runner.times)
    return {
        "median_ms": 1e3 * median,
        "ratio": median / statistics.median(base.times),
        "min_ratio": min(runner.times) / min(base.times),
        "compile_s": runner.compile_s,
        "compile_ratio": runner.compile_s / base.compile_s,
        "trace_s": runner.trace_s,
    }


class BesideAdamW:
    """Times steps of one layout, each in turn with AdamW's.

    Args:
        make: compiles a method's step.
        describe: makes its row, from its name, its step and AdamW's.
        steps: how many are timed.
    """

    def __init__(
        self,
        make: Callable[[str], Runner],
        describe: Callable[[str, Runner, Runner], dict[str, Any]],
        steps: int,
    ) -> None:
        self.make, self.describe, self.steps = make, describe, steps

    @functools.cached_property
    def base(self) -> Runner:
        """AdamW's step."""
        return self.make("adamw")

    def row(self, name: str) -> dict[str, Any]:
        """Compiles and times one method."""
        runner = self.base if name == "adamw" else self.make(name)
        self.base.times.clear()
        try:
            time_in_turn({"adamw": self.base, name: runner}, self.steps, QUIET)
        except jax.errors.JaxRuntimeError:
            del self.base  # the failed step had AdamW's arrays, perhaps
            raise
        return self.describe(name, runner, self.base)

    def items(self, names: Iterable[str], layout: str, seconds: float) -> list[Item]:
        """Returns an item for each method, of which the first may take so many seconds."""
        find = lambda name: functools.partial(self.row, name)
        return [Item(f"{layout}, {name}", find(name), layout, seconds) for name in names]


def megabytes(tree: Any) -> float:
    """Returns the size of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6
