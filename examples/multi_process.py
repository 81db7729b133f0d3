"""Trains adapters on the devices of several processes, and goes on after a loss of some of them.

Two processes on the CPU of one machine, which find each other by an address::

    python -m examples.multi_process --coordinator localhost:9876 --processes 2 --process 0 &
    python -m examples.multi_process --coordinator localhost:9876 --processes 2 --process 1

On a TPU pod, under SLURM or Open MPI each process runs the same command, and JAX asks the cluster
who it is; ``--checkpoint-dir`` must then be a folder that all of them see::

    python -m examples.multi_process --cluster --checkpoint-dir /shared/run

With neither, this is a run of a single process. A run that is started again goes on from its last
checkpoint, with as many processes as before or another number of them. At the end process 0 writes
the adapter as PEFT reads it, whole, however it was spread.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from rich.progress import track

from lowrank_optax import (
    LoRAPair,
    adapters,
    altlora_plus,
    checkpoints,
    frame,
    nn,
    oplora,
    sds_lora,
    shadow,
    sharding,
)

N_IN, N_HIDDEN, N_OUT, RANK = 24, 48, 12, 4
BATCH = 48  # of all processes together, so that their number changes nothing
SEED = 0


class Method(NamedTuple):
    """A way to train pairs.

    Args:
        tx: the optimizer.
        start: makes of a pair and a key what the optimizer needs in its place.
    """

    tx: optax.GradientTransformation
    start: Callable[[LoRAPair, jax.Array], Any] = lambda pair, key: pair


def _framed(pair: LoRAPair, key: jax.Array) -> Any:
    """Gives frames memory of their own, as they start as the factors and the step donates both."""
    return jax.tree.map(jnp.copy, frame(pair))


METHODS = {
    "adamw": Method(optax.adamw(1e-2)),
    "altlora_plus": Method(altlora_plus(1e-2)),
    "oplora": Method(oplora(0.3), shadow),
    "sds_lora": Method(sds_lora(1e-2, total_steps=100), _framed),
}


class Layout(NamedTuple):
    """How the model lies.

    Args:
        recipe: of the kernels; factors, shadows, frames and the optimizer's state follow.
        axis: the axis of the mesh that gets all devices, "data" or "model".
    """

    recipe: sharding.Recipe
    axis: str = "data"


RECIPES = {
    "data_parallel": Layout(sharding.data_parallel()),
    "fsdp": Layout(sharding.fsdp(min_size=0)),
    "tensor_parallel": Layout(sharding.tensor_parallel(["up"], ["down"]), "model"),
}


def make_model(method: Method) -> tuple[Any, Any]:
    """Draws the pairs and the frozen kernels, the same in every process."""
    keys = iter(jax.random.split(jax.random.key(SEED), 6))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[0])

    kernels = {"up": normal(N_IN, N_HIDDEN), "down": normal(N_HIDDEN, N_OUT)}
    pairs = {}
    for name, kernel in kernels.items():
        n_in, n_out = kernel.shape
        pair = LoRAPair(normal(n_in, RANK), jnp.zeros((RANK, n_out)))
        pairs[name] = method.start(pair, next(keys))
    return pairs, kernels


def loss(pairs: Any, kernels: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Takes the mean over the batch of all processes, as if there was one."""
    x, y = batch
    layer = lambda name, x: x @ kernels[name] + nn.lora_apply(x, pairs[name])
    return jnp.mean(jnp.square(layer("down", jnp.tanh(layer("up", x))) - y))


def read_examples(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Reads examples by number, as from a file; here each is drawn from its number."""
    teacher = np.random.default_rng(SEED).standard_normal((N_IN, N_OUT)) / np.sqrt(N_IN)
    x = np.array([np.random.default_rng((SEED, n)).standard_normal(N_IN) for n in numbers])
    return x.astype(np.float32), np.sin(x @ teacher).astype(np.float32)


def load_batch(step: int, lies: NamedSharding) -> Any:
    """Loads a batch, of which every process reads only what its own devices hold.

    Args:
        step: says which examples, and nothing else does: a resumed run reads on where it was.
        lies: how the batch lies.

    Returns:
        Inputs and targets, as global arrays.
    """
    mine = lies.addressable_devices_indices_map((BATCH,)).values()
    spans = sorted({index[0].indices(BATCH)[:2] for index in mine if index})
    local = read_examples([step * BATCH + row for span in spans for row in range(*span)])
    put = lambda x: jax.make_array_from_process_local_data(lies, x, (BATCH, *x.shape[1:]))
    return jax.tree.map(put, local)


def main(
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "altlora_plus",
    recipe: Annotated[str, typer.Option(help=f"{', '.join(RECIPES)}.")] = "data_parallel",
    steps: Annotated[int, typer.Option(help="Updates, with those before a checkpoint.")] = 100,
    checkpoint_dir: Annotated[
        pathlib.Path, typer.Option(help="Where checkpoints are read and written.")
    ] = pathlib.Path("outputs/multi_process"),
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    adapter_dir: Annotated[
        pathlib.Path, typer.Option(help="Where the adapter is written; a new folder.")
    ] = pathlib.Path("outputs/multi_process_adapter"),
    losses_out: Annotated[
        pathlib.Path | None, typer.Option(help="File of JSON lines to add to, one for each step.")
    ] = None,
    coordinator: Annotated[str | None, typer.Option(help="host:port of process 0.")] = None,
    processes: Annotated[int | None, typer.Option(help="How many there are.")] = None,
    process: Annotated[int | None, typer.Option(help="Which of them this is, from 0.")] = None,
    cluster: Annotated[bool, typer.Option(help="Ask the cluster for these three.")] = False,
    heartbeat: Annotated[
        int,
        typer.Option(help="Seconds of silence after which a process is lost, and the run ends."),
    ] = 100,
) -> None:
    """Trains and prints losses. A step that is done again after a resume prints again."""
    if adapter_dir.exists():
        raise typer.BadParameter(f"{adapter_dir} exists: this run is complete, or take another.")
    if cluster or coordinator is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # other devices ignore it
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=heartbeat
        )

    tx, layout = METHODS[method].tx, RECIPES[recipe]
    sizes = {"data": 1, "model": 1, layout.axis: jax.device_count()}
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2)
    pairs, kernels = sharding.shard_model(make_model(METHODS[method]), mesh, layout.recipe)
    batches = NamedSharding(mesh, jax.P("data"))
    train_step = sharding.train_step(loss, tx, pairs)

    state = sharding.shard_state(tx, pairs)
    done = max(checkpoints.steps(checkpoint_dir), default=0)
    if done:  # each process reads what its own devices hold; how pairs and state lie now counts
        _, pairs, state, _ = checkpoints.restore(checkpoint_dir, params=pairs, opt_state=state)
    watched = sys.stdout.isatty() and jax.process_index() == 0  # a log gets the losses alone
    for step in track(range(done, steps), "training", disable=not watched):
        pairs, state, value = train_step(pairs, state, kernels, load_batch(step, batches))
        report(step + 1, float(value), losses_out)
        if (step + 1) % every == 0 or step + 1 == steps:
            checkpoints.save(checkpoint_dir, step + 1, params=pairs, opt_state=state, keep=2)

    whole = multihost_utils.process_allgather(pairs, tiled=True)  # by all processes together
    if jax.process_index() == 0:
        adapters.save_peft(adapter_dir, whole, scale=1.0)


def report(step: int, value: float, out: pathlib.Path | None) -> None:
    """Adds a line, once for all processes; whoever reads the file sees whole lines."""
    if jax.process_index() != 0:
        return
    line = json.dumps({"step": step, "loss": value, "processes": jax.process_count()})
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    typer.run(main)
