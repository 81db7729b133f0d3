"""Cost of one optimizer step on Llama-3-8B-shaped adapters, as a ratio to AdamW.

``python -m benchmarks.update_step`` measures update + apply under jit with donation, at a quarter
of Llama-3-8B's width: 32 layers of seven linear maps, 224 pairs, 10.5M parameters at r = 16. All
methods are timed in turn, so that drift of the machine's speed falls on all alike; the ratio
compares medians. ``--width 1`` is the full size, for an accelerator.
"""

import functools
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lowrank_optax import LoRAPair, altlora, altlora_plus

LLAMA_3_8B = [
    (4096, 4096),
    (4096, 1024),
    (4096, 1024),
    (4096, 4096),
    (4096, 14336),
    (4096, 14336),
    (14336, 4096),
]
N_LAYERS = 32

METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-3),
    "altlora": lambda: altlora(1e-3),
    "altlora_plus": lambda: altlora_plus(1e-3),
    "altlora, simultaneous": lambda: altlora(1e-3, order="simultaneous"),
    "altlora_plus, simultaneous": lambda: altlora_plus(1e-3, order="simultaneous"),
}


def make_params(rank: int, width: float, stacked: bool) -> Any:
    """Makes the pairs of all layers: one by one, or stacked over layers as in a scanned model."""
    key = jax.random.key(0)

    def pair(n_in: int, n_out: int, batch: tuple[int, ...]) -> LoRAPair:
        key_a, key_b = jax.random.split(jax.random.fold_in(key, n_in * n_out))
        a = jax.random.normal(key_a, (*batch, n_in, rank)) / np.sqrt(n_in)
        b = 0.1 * jax.random.normal(key_b, (*batch, rank, n_out)) / np.sqrt(rank)
        return LoRAPair(a, b)

    shapes = [(int(n_in * width), int(n_out * width)) for n_in, n_out in LLAMA_3_8B]
    if stacked:
        return [pair(*shape, (N_LAYERS,)) for shape in shapes]
    return [[pair(*shape, ()) for shape in shapes] for _ in range(N_LAYERS)]


class Runner:
    """A compiled update + apply with its own donated state."""

    def __init__(self, tx: optax.GradientTransformation, params: Any) -> None:
        self.params = jax.tree.map(jnp.copy, params)
        self.state = jax.jit(tx.init)(self.params)
        self.grads = jax.tree.map(lambda x: 0.1 * x + 0.01, params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        start = time.perf_counter()
        lowered = step.lower(self.params, self.state, self.grads)
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        self.trace_s, self.compile_s = traced - start, time.perf_counter() - traced
        memory = self.compiled.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes if memory else float("nan")
        self.times: list[float] = []

    def run(self) -> None:
        """Times one step."""
        start = time.perf_counter()
        self.params, self.state = self.compiled(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))
        self.times.append(time.perf_counter() - start)


def measure(params: Any, methods: list[str], steps: int, console: Console) -> dict[str, Any]:
    """Measures all methods on one set of parameters, AdamW among them."""
    runners = {}
    for name in track(methods, "compiling", console=console, transient=True):
        runners[name] = Runner(METHODS[name](), params)
    for index in track(range(steps + 2), "timing", console=console, transient=True):
        for runner in runners.values():
            runner.run()
            if index < 2:
                runner.times.clear()  # warm-up
    result = {}
    base = runners["adamw"]
    for name, runner in runners.items():
        median = statistics.median(runner.times)
        result[name] = {
            "median_ms": 1e3 * median,
            "ratio": median / statistics.median(base.times),
            "min_ratio": min(runner.times) / min(base.times),
            "compile_s": runner.compile_s,
            "compile_ratio": runner.compile_s / base.compile_s,
            "trace_s": runner.trace_s,
            "temporary_mb": runner.temporary_bytes / 1e6,
        }
    return result


def main(
    rank: Annotated[list[int] | None, typer.Option(help="Ranks to measure.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Methods beside AdamW: {list(METHODS)[1:]}.")
    ] = None,
    width: Annotated[float, typer.Option(help="Fraction of Llama-3-8B's width.")] = 0.25,
    steps: Annotated[int, typer.Option(help="Timed steps of each method.")] = 30,
    layout: Annotated[list[str] | None, typer.Option(help="separate, stacked.")] = None,
    out: Annotated[pathlib.Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measures and prints; writes JSON with --out."""
    console = Console()
    methods = ["adamw", *(method or ["altlora", "altlora_plus"])]
    table = Table("layout", "r", "method", "median ms", "× AdamW", "compile s", "× AdamW")
    rows = []
    for kind in layout or ["separate", "stacked"]:
        for r in rank or [4, 16, 64]:
            params = make_params(r, width, stacked=kind == "stacked")
            for name, result in measure(params, methods, steps, console).items():
                rows.append({"layout": kind, "rank": r, "method": name, **result})
                table.add_row(
                    kind,
                    str(r),
                    name,
                    f"{result['median_ms']:.1f}",
                    f"{result['ratio']:.2f}",
                    f"{result['compile_s']:.1f}",
                    f"{result['compile_ratio']:.2f}",
                )
    console.print(table)
    if out is not None:
        device = jax.devices()[0]
        record = {
            "command": f"python -m benchmarks.update_step --width {width} --steps {steps}",
            "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, np)},
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": device.device_kind,
            "backend": device.platform,
            "width": width,
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n")
        console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
