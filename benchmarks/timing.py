"""What the benchmarks share: compiled steps, timed in turn, and a description of the machine."""

import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

WARM_UP = 2


class Runner:
    """A compiled step ``(carry, *arguments) → carry`` with its own, donated carry."""

    def __init__(self, step: Callable[..., Any], carry: Any, *arguments: Any) -> None:
        self.carry = jax.tree.map(lambda x: x.copy(), carry)
        self.arguments = arguments
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.carry, *arguments)
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        self.trace_s, self.compile_s = traced - start, time.perf_counter() - traced
        self.memory: Any = self.compiled.memory_analysis()
        self.times: list[float] = []

    def run(self) -> None:
        """Times one step."""
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.compiled(self.carry, *self.arguments))
        self.times.append(time.perf_counter() - start)


def time_in_turn(runners: Mapping[str, Runner], steps: int, console: Console) -> None:
    """Times all steps in turn, so that drift of the machine's speed falls on all alike."""
    for index in track(range(WARM_UP + steps), "timing", console=console, transient=True):
        for runner in runners.values():
            runner.run()
            if index < WARM_UP:
                runner.times.clear()


def compare(runner: Runner, base: Runner) -> dict[str, float]:
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


def write_record(out: pathlib.Path, benchmark: str, console: Console, **content: Any) -> None:
    """Writes what a benchmark found as JSON, in one step, with its command and where it ran."""
    command = f"python -m benchmarks.{benchmark} {shlex.join(sys.argv[1:])}"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": command, **environment(), **content}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    console.print(f"written to {out}")


def environment() -> dict[str, Any]:
    """Versions, machine and device, for a benchmark's record."""
    device = jax.devices()[0]
    return {
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, np)},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device.device_kind,
        "backend": device.platform,
    }
