"""Trains adapters on all devices of a machine; kernels, factors and state are spread over them.

FSDP: each kernel is divided over the devices, and a factor lies as the kernel it belongs to. On a
CPU eight virtual devices show how::

    python -m examples.multi_device --devices 8

On GPUs or a TPU leave out ``--devices``. The model is one of Flax NNX; its adapters learn the
digits of scikit-learn. It needs ``pip install '.[cli]' scikit-learn`` in a checkout. For several
machines see `examples.multi_process`.
"""

import pathlib
import shutil
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from rich.progress import track
from sklearn.datasets import load_digits

from lowrank_optax import adapters, find_pairs, nn, polora, sharding

BATCH, OUT = 128, pathlib.Path("outputs/multi_device")


class Network(nnx.Module):
    """Four linear layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(64, 256, rngs=rngs)
        self.up = nnx.Linear(256, 1024, rngs=rngs)
        self.down = nnx.Linear(1024, 256, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Gives the logits of ten digits."""
        x = self.embed(x)
        return self.head(x + self.down(nnx.gelu(self.up(x))))


def show(title: str, array: Any) -> None:
    """Prints how an array lies, and what the first device has of it."""
    shard = array.addressable_shards[0].data.shape
    print(f"  {title:22} {array.shape!s:12} {array.sharding.spec!s:18} on each device {shard}")


def main(
    devices: Annotated[int | None, typer.Option(help="Virtual devices of the CPU.")] = None,
    steps: Annotated[int, typer.Option(help="Updates.")] = 100,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak; bounds an update's norm.")] = 0.3,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the adapter.")] = OUT,
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is there.")] = False,
) -> tuple[float, float]:
    """Trains adapters on a mesh of all devices by FSDP, and saves them."""
    if out.exists() and not (overwrite and (out / "adapter_config.json").exists()):
        raise typer.BadParameter(f"{out} exists. --overwrite replaces it if it is an adapter.")
    if devices is not None:  # before JAX starts
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    print(f"{jax.device_count()} devices of the kind {jax.devices()[0].platform}")

    # The model in three parts: what it is, what is trained, what is frozen.
    model = Network(nnx.Rngs(0))
    nn.add_lora(model, "up|down", nn.LoRAConfig(rank, alpha=2.0 * rank), rngs=nnx.Rngs(1))
    parts: Any = nnx.split(model, nnx.LoRAParam, ...)
    graph, lora, frozen = parts
    scales = nn.lora_scales(model)

    def loss_fn(lora: Any, frozen: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, lora, frozen)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    # Each part goes to its place, and `train_step` keeps it there.
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    tx = polora(schedule, scale=scales)
    lora, frozen = (sharding.shard_model(part, mesh, sharding.fsdp()) for part in (lora, frozen))
    state = sharding.shard_state(tx, lora)
    step = sharding.train_step(loss_fn, tx, lora)
    show("kernel of `up`", frozen["up"]["base"]["kernel"][...])
    found = find_pairs(lora)
    pair, momentum = (
        found.take(tree)[[at.path for at in found.pairs].index("up")]
        for tree in (lora, state.pairs.mu)
    )
    show("a of `up`", pair.a)
    show("b of `up`", pair.b)
    show("momentum of that a", momentum.a)

    # The batch is divided too.
    images, labels = load_digits(return_X_y=True)
    images, rng = (images / 16).astype(np.float32), np.random.default_rng(0)
    over_data = NamedSharding(mesh, jax.P("data"))
    test = jax.device_put((images[:256], labels[:256]), over_data)
    measure = jax.jit(loss_fn)
    before = float(measure(lora, frozen, test))
    for _ in track(range(steps), "training"):
        rows = rng.integers(256, len(images), BATCH)
        batch = jax.device_put((images[rows], labels[rows]), over_data)
        lora, state, loss = step(lora, state, frozen, batch)
        loss.block_until_ready()  # virtual devices share threads: one program at a time
    after = float(measure(lora, frozen, test))
    print(f"held-out loss: {before:.4f} before, {after:.4f} after")

    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    adapters.save_peft(out, lora, scale=scales)
    print(f"The adapter is in {out}, as if one device had made it. Next: checkpoints.save writes")
    print("lora and state as they lie, and docs/sharding.md has recipes for larger models.")
    return before, after


if __name__ == "__main__":
    typer.run(main)
