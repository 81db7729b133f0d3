"""Adapts an unchanged Flax Linen model: an interceptor, a TrainState, a base that stays frozen.

A small network learns the digits 0 to 4 of scikit-learn. Then an interceptor gives its layers
adapters, which learn the digits 5 to 9. They have a collection of their own, ``"lora"``, so the
base is never differentiated. At the end the script compares it with what it was, bit by bit::

    python -m examples.linen_frozen_base --out outputs/digits

It needs ``pip install '.[cli]' scikit-learn`` in a checkout.
"""

import pathlib
import shutil
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from flax import linen
from flax.training.train_state import TrainState
from rich.progress import track
from sklearn.datasets import load_digits

from lowrank_optax import adapters, nn, polora

BATCH, TARGETS = 64, "first|second|head"
OUT = pathlib.Path("outputs/linen_frozen_base")
Examples = tuple[np.ndarray, np.ndarray]


class Network(linen.Module):
    """Three dense layers on 8×8 pixels; it knows nothing of adapters."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Gives the logits of five classes."""
        x = linen.relu(linen.Dense(256, name="first")(x))
        x = linen.relu(linen.Dense(256, name="second")(x))
        return linen.Dense(5, name="head")(x)


def load(first: int) -> tuple[Examples, Examples]:
    """Loads five digits from `first` on, for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(np.flatnonzero(labels // 5 == first // 5))
    x, y, cut = (images[order] / 16).astype(np.float32), labels[order] - first, 630
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def cross_entropy(logits: Any, labels: Any) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(state: TrainState, loss_fn: Any, examples: Examples, steps: int, title: str) -> Any:
    """Trains what a state holds; returns its parameters."""

    @jax.jit
    def step(state: TrainState, batch: Any) -> TrainState:
        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, batch))

    rng = np.random.default_rng(1)
    for _ in track(range(steps), title):
        rows = rng.integers(0, len(examples[0]), BATCH)
        state = step(state, (examples[0][rows], examples[1][rows]))
    return state.params


def main(
    steps: Annotated[int, typer.Option(help="Updates of the adapters.")] = 200,
    rank: Annotated[int, typer.Option(help="Rank of the adapters, at most 4.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Peak; bounds an update's norm.")] = 0.3,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the adapter.")] = OUT,
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is there.")] = False,
) -> tuple[float, float]:
    """Trains a network on the digits 0-4, adapts it to 5-9 with a frozen base, and saves."""
    if out.exists() and not (overwrite and (out / "adapter_config.json").exists()):
        raise typer.BadParameter(f"{out} exists. --overwrite replaces it if it is an adapter.")

    # A base model. Yours comes from a checkpoint.
    model, (old, _) = Network(), load(0)
    params = model.init(jax.random.key(0), old[0][:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    loss_fn = lambda p, batch: cross_entropy(model.apply({"params": p}, batch[0]), batch[1])
    base = train(state, loss_fn, old, 200, "digits 0-4")
    original = jax.tree.map(np.array, base)

    # `init` under the interceptor makes the factors too. We keep the base that we have.
    examples, held_out = load(5)
    config = nn.LoRAConfig(rank, alpha=2.0 * rank)
    with nn.lora_interceptor(TARGETS, config) as found:
        lora = model.init(jax.random.key(1), examples[0][:1])["lora"]
    scales = {path: adapter.scale for path, adapter in found.items()}
    print(nn.lora_summary(lora, scale=scales))

    def adapted_loss(lora: Any, batch: Any) -> jax.Array:
        with nn.lora_interceptor(TARGETS, config):  # inside of what JAX differentiates
            return cross_entropy(model.apply({"params": base, "lora": lora}, batch[0]), batch[1])

    # The state holds the adapters only.
    before = float(adapted_loss(lora, held_out))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    tx = polora(schedule, scale=scales)
    state = TrainState.create(apply_fn=model.apply, params=lora, tx=tx)
    lora = train(state, adapted_loss, examples, steps, "digits 5-9")
    after = float(adapted_loss(lora, held_out))
    print(f"held-out loss on 5-9: {before:.4f} before, {after:.4f} after")
    jax.tree.map(np.testing.assert_array_equal, base, original)
    print("The base is what it was, to the last bit.")
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    adapters.save_peft(out, lora, scale=scales)
    print(f"The adapter is in {out}. Next: `python -m lowrank_optax inspect` looks into it,")
    print("adapters.load_peft reads it, nn.merge_lora_variables makes plain parameters of both.")
    return before, after


if __name__ == "__main__":
    typer.run(main)
