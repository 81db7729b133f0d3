"""Adapts a small language model with accumulated gradients and checkpoints; a rerun goes on.

A transformer on characters learns the manual that Python carries in `pydoc_data`. Then adapters
teach it another text, by default a source file of Python's standard library::

    python -m examples.nnx_language_model --text FILE --folder outputs/my-run

The same command after Ctrl-C or a crash goes on from the last checkpoint, to the same bits. It
needs ``pip install '.[cli,checkpoints]'`` in a checkout. `optax.MultiSteps` works with all methods
of this library but `oplora` and `scaled_oplora` with ``iterations`` of 1 or more. They read
products that are quadratic in the gradient of one batch: they warn, and do not move.
"""

import argparse
import pathlib
from pydoc_data import topics
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from rich.progress import track

from lowrank_optax import adapters, checkpoints, nn, polora

WIDTH, LENGTH, BATCH = 64, 64, 16
SOURCE, OUT = pathlib.Path(argparse.__file__), pathlib.Path("outputs/nnx_language_model")


class LanguageModel(nnx.Module):
    """Two blocks of attention and neurons, between an embedding and a head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embeddings = nnx.List([nnx.Embed(n, WIDTH, rngs=rngs) for n in (128, LENGTH)])
        make = lambda: nnx.Dict(
            norm=nnx.LayerNorm(WIDTH, rngs=rngs),
            attention=nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs),
            next_norm=nnx.LayerNorm(WIDTH, rngs=rngs),
            up=nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs),
            down=nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs),
        )
        self.blocks, self.head = nnx.List([make(), make()]), nnx.Linear(WIDTH, 128, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Gives the logits of each next character."""
        x = self.embeddings[0](tokens) + self.embeddings[1](jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x += block.attention(block.norm(x), mask=nnx.make_causal_mask(tokens))
            x += block.down(nnx.gelu(block.up(block.next_norm(x))))
        return self.head(x)


def loss_fn(model: Any, tokens: Any) -> jax.Array:
    """Mean cross-entropy of the next character."""
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def draw(text: bytes, seed: tuple[int, int]) -> np.ndarray:
    """Draws a batch by its number alone, so that a resumed run reads on where it was."""
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH, BATCH)
    return np.frombuffer(text, np.uint8)[starts[:, None] + np.arange(LENGTH + 1)].astype(int)


@nnx.jit(static_argnames="wrt")
def train_step(model: Any, optimizer: Any, tokens: Any, wrt: Any) -> None:
    """Takes a batch; its gradient moves what is trained, or is accumulated."""
    optimizer.update(model, nnx.grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, tokens))


def main(
    text: Annotated[
        pathlib.Path, typer.Option(help="Read as UTF-8.", show_default="argparse.py")
    ] = SOURCE,
    steps: Annotated[int, typer.Option(help="Batches; the rate decays to the last.")] = 600,
    accumulate: Annotated[int, typer.Option(help="Batches of one update.")] = 4,
    base_steps: Annotated[int, typer.Option(help="Batches of the base model before.")] = 600,
    every: Annotated[int, typer.Option(help="Batches between checkpoints.")] = 50,
    folder: Annotated[pathlib.Path, typer.Option(help="All files of this run.")] = OUT,
) -> tuple[float, float]:
    """Adapts a language model to a text, or goes on with a run that was stopped."""
    base, run, out = (folder / name for name in ("base", "checkpoints", "adapter"))
    if out.exists():
        raise typer.BadParameter(f"{out} exists: this run is complete. Take another --folder.")

    # The base model, trained once. Yours comes from a checkpoint.
    model = LanguageModel(nnx.Rngs(0))
    if checkpoints.steps(base):
        target = nnx.state(model, nnx.Param)
        nnx.update(model, checkpoints.restore(base, params=target, opt_state={}).params)
    else:
        english = "\n".join(topics.topics.values()).encode("ascii", "replace")
        optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
        for number in track(range(base_steps), "the manual"):
            train_step(model, optimizer, draw(english, (0, number)), nnx.Param)
        checkpoints.save(base, base_steps, params=nnx.state(model, nnx.Param), opt_state={})

    # The text, of which the last tenth is held out, and the adapters.
    source = text.read_text("utf-8", "replace").encode("ascii", "replace")
    source, held_out = source[: len(source) * 9 // 10], source[len(source) * 9 // 10 :]
    test = np.concatenate([draw(held_out, (1, number)) for number in range(8)])
    config = nn.LoRAConfig(rank=8, alpha=16.0)
    nn.add_lora(model, "query|key|value|out|up|down", config, rngs=nnx.Rngs(1))
    before = float(loss_fn(model, test))

    # `steps` counts batches, the schedule counts updates.
    updates = max(1, steps // accumulate)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, updates // 10, updates)
    tx = optax.MultiSteps(polora(schedule, scale=nn.lora_scales(model)), accumulate)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    # What a run needs to go on: a gradient that is half accumulated is in the state too.
    parts = {"params": (model, nnx.LoRAParam), "opt_state": (optimizer,)}
    trees: Any = lambda: {name: nnx.state(*part) for name, part in parts.items()}
    done = max(checkpoints.steps(run), default=0)
    if done:
        found = checkpoints.restore(run, **trees())
        nnx.update(model, found.params)
        nnx.update(optimizer, found.opt_state)
        print(f"goes on after {done} of {steps} batches")
    else:
        batch = draw(source, (2, 0))
        nn.gradient_start(model, loss_fn, [batch], gamma=1e6, iterations=0)
    for number in track(range(done, steps), "the text"):
        train_step(model, optimizer, draw(source, (3, number)), nnx.LoRAParam)
        if (number + 1) % every == 0 or number + 1 == steps:
            checkpoints.save(run, number + 1, **trees(), keep=2)

    after = float(loss_fn(model, test))
    print(f"held-out loss, per character: {before:.3f} before, {after:.3f} after")
    adapters.save_peft(out, model)
    print(f"The adapter is in {out}. Next: `python -m lowrank_optax inspect` looks into it,")
    print("adapters.load_peft puts it into the base model, nn.merge_lora into the kernels.")
    return before, after


if __name__ == "__main__":
    typer.run(main)
