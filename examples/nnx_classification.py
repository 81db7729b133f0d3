"""Adapts a Flax NNX classifier to new classes: PoLoRA, started from the gradient.

A small network learns the digits 0 to 4 of scikit-learn. Then its weights are frozen, and adapters
of rank 4 teach it the digits 5 to 9::

    python -m examples.nnx_classification --out outputs/digits

It needs ``pip install '.[cli]' scikit-learn`` in a checkout. The steps with your own model are the
same from "Adapters" on.
"""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from flax import nnx
from rich.progress import track
from sklearn.datasets import load_digits

from lowrank_optax import adapters, nn, polora

BATCH, OUT = 64, pathlib.Path("outputs/nnx_classification")
Examples = tuple[np.ndarray, np.ndarray]


class Network(nnx.Module):
    """Three linear layers on 8×8 pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 256, rngs=rngs)
        self.second = nnx.Linear(256, 256, rngs=rngs)
        self.head = nnx.Linear(256, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Gives the logits of five classes."""
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


def load(first: int) -> tuple[Examples, Examples]:
    """Loads five digits from `first` on, for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(np.flatnonzero(labels // 5 == first // 5))
    x, y, cut = (images[order] / 16).astype(np.float32), labels[order] - first, 630
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def batches(examples: Examples, steps: int, seed: int) -> Iterator[Examples]:
    """Draws batches."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(examples[0]), BATCH)
        yield examples[0][rows], examples[1][rows]


def loss_fn(model: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy of a batch."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def train(model: Any, tx: Any, wrt: Any, examples: Examples, steps: int, title: str) -> None:
    """Trains the variables of one kind, and no others, in place."""
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model: Any, optimizer: Any, batch: Any) -> None:
        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, batch)
        optimizer.update(model, grads)

    for batch in track(batches(examples, steps, seed=1), title, total=steps):
        step(model, optimizer, batch)


def main(
    steps: Annotated[int, typer.Option(help="Updates of the adapters.")] = 200,
    rank: Annotated[int, typer.Option(help="Rank of the adapters, at most 4.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Peak; bounds an update's norm.")] = 0.3,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the adapter.")] = pathlib.Path(
        "outputs/nnx_classification"
    ),
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is there.")] = False,
) -> tuple[float, float]:
    """Trains a network on the digits 0-4, adapts it to 5-9, and saves the adapter."""
    if out.exists() and not (overwrite and (out / "adapter_config.json").exists()):
        raise typer.BadParameter(f"{out} exists. --overwrite replaces it if it is an adapter.")

    # A base model. Yours comes from a checkpoint.
    model: Any = Network(nnx.Rngs(0))
    train(model, optax.adam(1e-3), nnx.Param, load(0)[0], 200, "digits 0-4")

    # Adapters beside three kernels, started from the gradient of a batch: it costs two gradients.
    examples, held_out = load(5)
    nn.add_lora(model, "first|second|head", nn.LoRAConfig(rank, alpha=2.0 * rank), rngs=nnx.Rngs(1))
    before = float(loss_fn(model, held_out))
    batch = next(iter(batches(examples, 1, seed=2)))
    nn.gradient_start(model, loss_fn, [batch], gamma=1e6, iterations=0)
    print(nn.lora_summary(model))

    # PoLoRA on the adapters alone: `wrt` leaves all other weights as they are.
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    tx = polora(schedule, scale=nn.lora_scales(model))
    train(model, tx, nnx.LoRAParam, examples, steps, "digits 5-9")
    after = float(loss_fn(model, held_out))
    accuracy = float((model(held_out[0]).argmax(-1) == held_out[1]).mean())
    print(f"held-out loss on 5-9: {before:.4f} before, {after:.4f} after ({accuracy:.1%} right)")

    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    adapters.save_peft(out, model)
    print(f"The adapter is in {out}. Next: `python -m lowrank_optax inspect` looks into it,")
    print("adapters.load_peft puts it into the base model, nn.merge_lora into the kernels.")
    return before, after


if __name__ == "__main__":
    typer.run(main)
