"""Cost of one optimizer step on Llama-3-8B-shaped adapters, as a ratio to AdamW.

``python -m benchmarks.update_step`` measures update + apply under jit with donation, at a quarter
of Llama-3-8B's width: 32 layers of seven linear maps, 224 pairs, 10.5M parameters at r = 16. All
methods are timed in turn, so that drift of the machine's speed falls on all alike; the ratio
compares medians. ``--width 1`` is the full size, for an accelerator.

The methods are those of plain pairs. OPLoRA and SDS-LoRA keep shadows or frames beside a pair,
which the backward pass fills: ``benchmarks.train_step`` measures them.
"""

import pathlib
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.record import write_record
from benchmarks.timing import Runner, megabytes, time_in_turn, times_beside
from lowrank_optax import (
    LoRAPair,
    altlora,
    altlora_plus,
    engine,
    lora_fa,
    lora_muon,
    lora_plus,
    lora_pro_efficient,
    lora_rite,
    lora_soap,
    polora,
    reflora,
    scaled_adamw,
)

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

DECAY = 0.9
RATE = 1e-6
"""So low that the pairs stay what they are, however many updates are timed."""


class _Products(NamedTuple):
    """One entry for each factor that moves; the r×r matrices, stacked, are for its next move."""

    momenta: list[jax.Array]
    projections: jax.Array
    transports: jax.Array


def products_alone(sides: str) -> optax.GradientTransformation:
    """Makes what no step of AltLoRA can do without, by hand; no method, but a measure for one.

    A gradient and a momentum are multiplied by an r×r matrix, the moved factor by itself and by its
    move, and all Gram matrices are inverted in one call. A factor's own matrices stand for those of
    the factor across from it: the number and the sizes of the products are AltLoRA's. The compiler
    may still find a better schedule for a method.

    Args:
        sides: the factors that move: "ab" as in simultaneous order, or "b" as in alternating order,
            always the same one, so that there is no choice at run time.
    """
    is_pair = lambda x: isinstance(x, LoRAPair)
    mix = {"a": lambda x, m: x @ m, "b": lambda x, m: m.mT @ x}
    cross = {"a": lambda x, y: x.mT @ y, "b": lambda x, y: x @ y.mT}

    def init(params: Any) -> _Products:
        pairs = jax.tree.leaves(params, is_leaf=is_pair)
        factors = [(side, getattr(pair, side)) for pair in pairs for side in sides]
        matrices = jnp.stack([jnp.zeros_like(cross[side](x, x)) for side, x in factors])
        return _Products([jnp.zeros_like(x) for _, x in factors], matrices, matrices)

    def update(grads: Any, state: _Products, params: Any = None) -> tuple[Any, _Products]:
        pairs, structure = jax.tree.flatten(params, is_leaf=is_pair)
        before = zip(*state, strict=True)
        updates, momenta, grams, drifts = [], [], [], []
        for pair, grad in zip(pairs, jax.tree.leaves(grads, is_leaf=is_pair), strict=True):
            steps = jax.tree.map(jnp.zeros_like, pair)
            for side in sides:
                old, projection, transport = next(before)
                projected = mix[side](getattr(grad, side), projection)
                momentum = DECAY * mix[side](old, transport) + (1 - DECAY) * projected
                step = -RATE * momentum
                moved = getattr(pair, side) + step
                grams.append(cross[side](moved, moved))
                drifts.append(cross[side](step, moved))
                momenta.append(momentum)
                steps = steps._replace(**{side: step})
            updates.append(steps)
        inverses = engine.damped_inverse(jnp.stack(grams), 1e-6)
        transports = engine.product(jnp.stack(grams) - jnp.stack(drifts), inverses)
        return jax.tree.unflatten(structure, updates), _Products(momenta, inverses, transports)

    return optax.GradientTransformation(init, update)


METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(RATE),
    "altlora": lambda: altlora(RATE),
    "altlora_plus": lambda: altlora_plus(RATE),
    "lora_muon": lambda: lora_muon(RATE),
    "polora": lambda: polora(RATE),
    "polora two-sided": lambda: polora(RATE, partner="gram"),
    "scaled_adamw": lambda: scaled_adamw(RATE),
    "lora_rite": lambda: lora_rite(RATE),
    "lora_plus": lambda: lora_plus(RATE),
    "lora_fa": lambda: lora_fa(RATE),
    # Not `lora_pro`: its dense moments of these pairs are 3.5 GB at a quarter of the width.
    "lora_pro_efficient": lambda: lora_pro_efficient(RATE),
    "lora_soap": lambda: lora_soap(RATE),
    "reflora": lambda: reflora(RATE, warmup_steps=0),
    "reflora scalar": lambda: reflora(RATE, refactoring="scalar", warmup_steps=0),
    "products alone": lambda: products_alone("ab"),
    "altlora alternating": lambda: altlora(RATE, order="alternating"),
    "altlora_plus alternating": lambda: altlora_plus(RATE, order="alternating"),
    "products alone alternating": lambda: products_alone("b"),
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


def make_runner(tx: optax.GradientTransformation, params: Any, updates: int = 1) -> Runner:
    """Compiles an optimizer's update + apply, with (params, state) as its carry.

    Args:
        tx: the optimizer.
        params: the pairs.
        updates: how many of them one call makes.
    """

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    grads = jax.tree.map(lambda x: 0.1 * x + 0.01, params)
    return Runner(step, (params, jax.jit(tx.init)(params)), grads, repeats=updates)


def measure(params: Any, methods: list[str], steps: int, console: Console) -> dict[str, Any]:
    """Measures all methods on one set of parameters, AdamW among them."""
    runners = {
        name: make_runner(METHODS[name](), params)
        for name in track(methods, "compiling", console=console, transient=True)
    }
    time_in_turn(runners, steps, console)
    return {name: result_of(runner, runners["adamw"]) for name, runner in runners.items()}


def result_of(runner: Runner, base: Runner) -> dict[str, float]:
    """Times and memory of an update, after both were timed.

    "moved_mb" is what no update can do without: it reads gradients, parameters and state, and
    writes the last two.
    """
    params, state = map(megabytes, runner.carry)
    return {
        **times_beside(runner, base),
        "temporary_mb": runner.memory.temp_size_in_bytes / 1e6,
        "params_mb": params,
        "state_mb": state,
        "moved_mb": megabytes(runner.arguments) + 2 * (params + state),
    }


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
    methods = ["adamw", *(method or list(METHODS)[1:])]
    table = Table("layout", "r", "method", "median ms", "× AdamW", "compile s")
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
                )
    console.print(table)
    if out is not None:
        write_record(out, "update_step", console, width=width, rows=rows)


if __name__ == "__main__":
    typer.run(main)
