"""The linear task of the OPLoRA paper (arXiv 2509.19977): how near LoRA methods come to SVDLoRA.

``python -m benchmarks.linear_task --out benchmarks/results/linear_task.json`` fits a random 200×600
matrix at rank 8 from mini-batches of its rows, as the released code does (zeligism/PSI-LoRA,
9cb3fa6): the loss is the squared error summed over the batch, without ½; an epoch is four batches,
of 64, 64, 64 and 8 rows; the seeds are 0 to 4. Beside the JSON record it draws a PNG.

The excess loss is that over the best rank-8 matrix, relative to it.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.timing import environment
from lowrank_optax import LoRAPair, nn, oplora, oplora_proj, shadow
from lowrank_optax.methods.svd_lora import pair_of_delta, svd_lora

N_IN, N_OUT, RANK = 200, 600, 8
BATCH_SIZE = 64
MOMENTUM = 0.75
RIDGE = 1e-3
EPOCHS_SHOWN = (1, 5, 10, 25, 50, 100)

Start = Callable[[LoRAPair, jax.Array], Any]


class Method(NamedTuple):
    """One row of the comparison.

    Args:
        learning_rate: the released script's, given to ``make``.
        make: the optimizer of a learning rate.
        start: the parameters, from the pair that all methods start at and a random key.
    """

    learning_rate: float
    make: Callable[[float], optax.GradientTransformation]
    start: Start


def dense(pair: LoRAPair, key: jax.Array) -> jax.Array:
    """Starts SVDLoRA from the product of the pair."""
    return nn.lora_delta(pair)


def plain(pair: LoRAPair, key: jax.Array) -> LoRAPair:
    """Starts from the pair."""
    return pair


def shadowed(**keywords: Any) -> Start:
    """Starts from the pair with OPLoRA's shadows."""
    return lambda pair, key: shadow(pair, key, **keywords)


def preconditioned_sgd(learning_rate: float) -> optax.GradientTransformation:
    """Momentum SGD on gradients preconditioned by damped inverse Gram matrices."""
    direction = oplora(1.0, 0.0, iterations=0, lmbd=RIDGE)
    return optax.chain(direction, optax.trace(MOMENTUM), optax.scale(learning_rate))


METHODS = {
    "SVDLoRA (SGD)": Method(0.1, lambda lr: svd_lora(optax.sgd(lr, MOMENTUM), RANK), dense),
    "OPLoRA k=1": Method(0.1, lambda lr: oplora(lr, MOMENTUM, lmbd=RIDGE), shadowed()),
    "OPLoRA k=2": Method(
        0.1, lambda lr: oplora(lr, MOMENTUM, iterations=2, lmbd=RIDGE), shadowed(iterations=2)
    ),
    "OPLoRA-proj k=1": Method(
        0.1,
        lambda lr: oplora_proj(lr, MOMENTUM, lmbd=RIDGE),
        shadowed(iterations=2, momentum_rank=0),
    ),
    "preconditioned SGD": Method(0.1, preconditioned_sgd, plain),
    "LoRA AdamW": Method(0.05, lambda lr: optax.adamw(lr, weight_decay=1e-4), plain),
    "LoRA SGD": Method(0.002, lambda lr: optax.sgd(lr, MOMENTUM), plain),
}


def run(name: str, seed: int, epochs: int) -> np.ndarray:
    """Trains one method.

    Args:
        name: a key of ``METHODS``.
        seed: of the target, the start and the order of the rows.
        epochs: how many.

    Returns:
        The relative excess loss after each epoch, (epochs,).
    """
    with jax.default_matmul_precision("highest"):
        return np.asarray(_train(jax.random.key(seed), name, epochs))


@functools.partial(jax.jit, static_argnames=("name", "epochs"))
def _train(key: jax.Array, name: str, epochs: int) -> jax.Array:
    method = METHODS[name]
    tx = method.make(method.learning_rate)
    target_key, start_key, shadow_key, order_key = jax.random.split(key, 4)
    target = jax.random.normal(target_key, (N_IN, N_OUT))
    best_loss = jnp.sum(jnp.linalg.svd(target, compute_uv=False)[RANK:] ** 2)
    bound = N_IN**-0.5
    kernel = jax.random.uniform(start_key, (N_IN, N_OUT), minval=-bound, maxval=bound)
    start = method.start(pair_of_delta(kernel, RANK), shadow_key)

    inputs = jnp.eye(N_IN + 1, N_IN)  # the last, all zero, fills the last batch
    outputs = inputs @ target

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        x = inputs[rows]
        y = x @ params if isinstance(params, jax.Array) else nn.lora_apply(x, params)
        return jnp.sum((y - outputs[rows]) ** 2)

    def step(carry: Any, rows: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: Any, key: jax.Array) -> Any:
        order = jax.random.permutation(key, N_IN)
        order = jnp.pad(order, (0, -N_IN % BATCH_SIZE), constant_values=N_IN)
        carry, _ = jax.lax.scan(step, carry, order.reshape(-1, BATCH_SIZE))
        return carry, loss(carry[0], jnp.arange(N_IN)) / best_loss - 1

    carry = (start, tx.init(start))
    return jax.lax.scan(epoch, carry, jax.random.split(order_key, epochs))[1]


def draw_figure(curves: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Draws excess loss against the epoch: the mean over seeds, and a band of their range.

    Args:
        curves: excess losses by method, (seeds, epochs).
        path: the PNG file to write.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(curves.items()):
        epochs = np.arange(1, values.shape[1] + 1)
        label = f"{name}, lr {METHODS[name].learning_rate:g}"
        axes.plot(epochs, values.mean(0), color=f"C{index}", label=label)
        axes.fill_between(epochs, values.min(0), values.max(0), color=f"C{index}", alpha=0.2, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="epoch", ylabel="excess loss / best rank-8 loss")
    axes.set_title(f"Linear task {N_IN}→{N_OUT}, rank {RANK}, batch {BATCH_SIZE}")
    axes.grid(alpha=0.2)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(
    epochs: Annotated[int, typer.Option(help="Epochs of each run.")] = 100,
    seeds: Annotated[int, typer.Option(help="Seeds, from 0.")] = 5,
    out: Annotated[
        pathlib.Path | None, typer.Option(help="JSON file to write; a PNG is put beside it.")
    ] = None,
) -> None:
    """Trains all methods and prints medians over seeds; writes JSON and a figure with --out."""
    console = Console()
    shown = [epoch for epoch in EPOCHS_SHOWN if epoch <= epochs]
    table = Table("epoch", *map(str, shown), box=SIMPLE_HEAD, pad_edge=False)
    rows = []
    curves = {}
    for name in track(METHODS, "training", console=console, transient=True):
        curves[name] = np.stack([run(name, seed, epochs) for seed in range(seeds)])
        rate = METHODS[name].learning_rate
        for seed, curve in enumerate(curves[name]):
            excess = {str(epoch): float(f"{curve[epoch - 1]:.3g}") for epoch in shown}
            rows.append({"method": name, "learning_rate": rate, "seed": seed, "excess": excess})
        median = np.median(curves[name], axis=0)
        table.add_row(name, *(f"{median[epoch - 1]:.1e}" for epoch in shown))
    console.print(table)
    if out is not None:
        record = {
            "command": f"python -m benchmarks.linear_task --epochs {epochs} --seeds {seeds}",
            **environment(),
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n")
        draw_figure(curves, out.with_suffix(".png"))
        console.print(f"written to {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
