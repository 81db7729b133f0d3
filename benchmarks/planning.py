"""What a LoRA training step of a large model needs on many devices, without having them.

``python -m benchmarks.planning`` compiles a whole step, forward, backward and update, of models of
Llama 3's shapes ahead of time from shapes alone, on 8, 64 and 256 virtual CPU devices, and asks the
compiled program for its memory on each device and for what it sends. No number is ever computed.

The model is what matters for these two: attention with rotary positions and grouped keys, a gated
MLP, RMS norms, layers scanned with rematerialization, kernels in bfloat16, adapters in float32 on
all seven linear maps of a layer, cross entropy over the vocabulary. Kernels are sharded over the
mesh axis "model" as Megatron does and over "data" besides (FSDP); each "data" slice has one
sequence. Factors, shadows, frames and the optimizer's state follow.
"""

import math
import multiprocessing
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import typer
from jax.sharding import AxisType, Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from lowrank_optax import LoRAPair, altlora_plus, frame, nn, oplora, sds_lora, shadow, sharding
from tests import collectives

SCALE = 2.0
HEAD_SIZE = 128
ROPE_BASE = 500_000.0


class Model(NamedTuple):
    """The sizes of a model.

    Args:
        layers: transformer blocks.
        width: of the residual stream.
        hidden: of the MLP.
        kv_heads: heads of keys and values; queries have ``width / HEAD_SIZE``.
        vocabulary: tokens.
    """

    layers: int
    width: int
    hidden: int
    kv_heads: int
    vocabulary: int

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        """Shapes of a layer's linear maps, (in, out)."""
        kv = self.kv_heads * HEAD_SIZE
        return {
            "q": (self.width, self.width),
            "k": (self.width, kv),
            "v": (self.width, kv),
            "o": (self.width, self.width),
            "gate": (self.width, self.hidden),
            "up": (self.width, self.hidden),
            "down": (self.hidden, self.width),
        }


MODELS = {
    "llama-3-8b": Model(32, 4096, 14336, 8, 128256),
    "llama-3-70b": Model(80, 8192, 28672, 8, 128256),
}
MESHES = {8: (2, 4), 64: (8, 8), 256: (32, 8)}  # data × model

RECIPE = sharding.fsdp(
    within=sharding.tensor_parallel(["layers/(q|k|v|gate|up)$", "head"], ["layers/(o|down)$"]),
    min_size=2**20,  # not the stacked weights of the norms
)


class Method(NamedTuple):
    """A way to train pairs: the optimizer, and what it needs in a pair's place."""

    tx: optax.GradientTransformation
    node: Callable[[LoRAPair], Any] = lambda pair: pair


METHODS = {
    "adamw": Method(optax.adamw(1e-4)),
    "altlora_plus": Method(altlora_plus(1e-4, scale=SCALE)),
    "oplora": Method(oplora(0.1, scale=SCALE), lambda pair: shadow(pair, jax.random.key(0))),
    "sds_lora": Method(sds_lora(1e-4, total_steps=1000, scale=SCALE), frame),
}


def make_params(model: Model, rank: int, method: Method) -> tuple[Any, Any]:
    """Makes the trained nodes and the frozen parameters, layers stacked."""

    def node(n_in: int, n_out: int) -> Any:
        a = jnp.ones((model.layers, n_in, rank))
        return method.node(LoRAPair(a, jnp.zeros((model.layers, rank, n_out))))

    frozen = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    kernels = {name: frozen(model.layers, *shape) for name, shape in model.kernels.items()}
    norms = {name: frozen(model.layers, model.width) for name in ("before", "between")}
    return {"layers": {name: node(*shape) for name, shape in model.kernels.items()}}, {
        "layers": {**kernels, **norms},
        "embedding": frozen(model.vocabulary, model.width),
        "norm": frozen(model.width),
        "head": frozen(model.width, model.vocabulary),
    }


def loss(trained: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
    """Computes the mean cross entropy of the next tokens.

    Args:
        trained: the nodes.
        frozen: all other parameters.
        tokens: (batch, length + 1), int32.

    Returns:
        A scalar, float32.
    """
    x = _on_data(jnp.take(frozen["embedding"], tokens[:, :-1], axis=0))

    @jax.checkpoint
    def block(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, None]:
        nodes, weights = layer
        linear = lambda name, x: x @ weights[name] + nn.lora_apply(x, nodes[name], SCALE)
        y = _norm(x, weights["before"])
        x = _on_data(x + linear("o", _attention(*(linear(name, y) for name in "qkv"))))
        y = _norm(x, weights["between"])
        return _on_data(x + linear("down", jax.nn.silu(linear("gate", y)) * linear("up", y))), None

    x, _ = jax.lax.scan(block, x, (trained["layers"], frozen["layers"]))
    logits = (_norm(x, frozen["norm"]) @ frozen["head"]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses)


def _on_data(x: jax.Array) -> jax.Array:
    """Keeps the residual stream sharded over the batch alone."""
    return jax.lax.with_sharding_constraint(x, jax.P("data"))


def _norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * weight


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    heads = lambda x: x.reshape(*x.shape[:-1], -1, HEAD_SIZE)
    y = jax.nn.dot_product_attention(
        _rotated(heads(q)), _rotated(heads(k)), heads(v), is_causal=True
    )
    return y.reshape(q.shape)


def _rotated(x: jax.Array) -> jax.Array:
    """Rotates the halves of each head by the position."""
    frequencies = ROPE_BASE ** (-jnp.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def compile_step(model: Model, method: Method, mesh: Mesh, rank: int, length: int) -> Any:
    """Compiles a training step from shapes.

    Args:
        model: the sizes.
        method: the optimizer.
        mesh: with the axes "data" and "model".
        rank: of all adapters.
        length: of a sequence; there is one for each slice of "data".

    Returns:
        The compiled step.
    """
    like = lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)

    def placed(shapes: Any) -> Any:
        specs = sharding.partition_specs(shapes, mesh, RECIPE)
        return jax.tree.map(lambda x, spec: like(x, NamedSharding(mesh, spec)), shapes, specs)

    trained, frozen = map(placed, jax.eval_shape(lambda: make_params(model, rank, method)))
    state = jax.eval_shape(method.tx.init, trained)
    state = jax.tree.map(like, state, sharding.state_shardings(method.tx, trained))
    tokens = jax.ShapeDtypeStruct((mesh.shape["data"], length + 1), jnp.int32)
    step = sharding.train_step(loss, method.tx, trained)
    return step.lower(trained, state, frozen, tokens).compile()


def plan(devices: int, models: list[str], methods: list[str], rank: int, length: int) -> list[Any]:
    """Compiles for so many devices, in a process in which no backend has started."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = jax.make_mesh(MESHES[devices], ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows = []
    for name in models:
        for method in methods:
            start = time.perf_counter()
            compiled = compile_step(MODELS[name], METHODS[method], mesh, rank, length)
            memory = compiled.memory_analysis()
            sent = collectives.traffic(compiled)
            rows.append(
                {
                    "model": name,
                    "devices": devices,
                    "mesh": dict(mesh.shape),
                    "method": method,
                    "arguments_gb": memory.argument_size_in_bytes / 1e9,
                    "temporary_gb": memory.temp_size_in_bytes / 1e9,
                    "collectives_gb": {kind: size / 1e9 for kind, size in sent.items()},
                    "compile_s": time.perf_counter() - start,
                }
            )
    return rows


def main(
    devices: Annotated[list[int] | None, typer.Option(help=f"{list(MESHES)}.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"{list(MODELS)}.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"{list(METHODS)}.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    out: Annotated[pathlib.Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Plans and prints; writes JSON with --out."""
    console = Console()
    table = Table("model", "devices", "method", "arguments GB", "temporary GB", "sent GB", "s")
    rows = []
    spawn = multiprocessing.get_context("spawn")  # a process has the devices it started with
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for number in devices or MESHES:
            job = (number, model or list(MODELS), method or list(METHODS), rank, length)
            for row in pool.submit(plan, *job).result():
                rows.append(row)
                table.add_row(
                    row["model"],
                    str(row["devices"]),
                    row["method"],
                    f"{row['arguments_gb']:.2f}",
                    f"{row['temporary_gb']:.2f}",
                    f"{math.fsum(row['collectives_gb'].values()):.2f}",
                    f"{row['compile_s']:.0f}",
                )
    console.print(table)
    if out is not None:
        write_record(out, "planning", console, rank=rank, length=length, rows=rows)


if __name__ == "__main__":
    typer.run(main)
