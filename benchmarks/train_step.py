"""Cost of a full train step, forward, backward and update, against LoRA with AdamW.

``python -m benchmarks.train_step`` measures memory and time of a stack of frozen linear layers with
adapters, tanh between them, parameters and state donated. ``--layout stacked`` scans over layers.

Two methods make the step of OPLoRA in the ways that its shadows avoid; that their step is the same
is checked before anything is measured:

- "kept": every layer's input and output gradient live until the optimizer, as in the released
  PyTorch code, which keeps them in hooks.
- "dense": the backward pass makes the dense gradient of every kernel.

"silent" is OPLoRA without the host callbacks by which it warns.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
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
from benchmarks.timing import WARM_UP, Runner, megabytes, time_in_turn, times_beside
from lowrank_optax import (
    LoRAPair,
    Metric,
    ShadowedPair,
    altlora,
    altlora_plus,
    frame,
    lora_fa,
    lora_muon,
    lora_plus,
    lora_pro,
    lora_pro_efficient,
    lora_rite,
    lora_soap,
    nn,
    notices,
    oplora,
    oplora_proj,
    polora,
    reflora,
    scaled_adamw,
    scaled_oplora,
    sds_lora,
    shadow,
)

LEARNING_RATE = 1e-3
SGD_LEARNING_RATE = 1.0  # OPLoRA's is in units of SGD's
SCALE = 2.0
LAYOUTS = ("separate", "stacked")


class Batch(NamedTuple):
    """What a step reads and does not change.

    Args:
        kernels: the frozen kernels, one (n, n) for each layer, or (layers, n, n).
        x: the inputs, (tokens, n).
        target: as ``x``.
    """

    kernels: Any
    x: jax.Array
    target: jax.Array


def _forward(params: Any, batch: Batch) -> jax.Array:
    def layer(x: jax.Array, kernel: jax.Array, node: Any) -> jax.Array:
        return jnp.tanh(x @ kernel + nn.lora_apply(x, node, SCALE))

    if isinstance(params, list):
        x = batch.x
        for kernel, node in zip(batch.kernels, params, strict=True):
            x = layer(x, kernel, node)
        return x
    step = lambda x, each: (layer(x, *each), None)
    y, _ = jax.lax.scan(step, batch.x, (batch.kernels, params))
    return y


def _loss(y: jax.Array, batch: Batch) -> jax.Array:
    return jnp.mean(jnp.square(y - batch.target), dtype=jnp.float32)


def gradients(params: Any, batch: Batch) -> Any:
    """Differentiates as a user of the library would."""
    return jax.grad(lambda params: _loss(_forward(params, batch), batch))(params)


def gradients_from_kept(params: list[ShadowedPair], batch: Batch) -> list[ShadowedPair]:
    """Makes the same products after the backward pass, from all layers' inputs and dy."""
    plain = [LoRAPair(node.a, node.b) for node in params]

    def loss(zeros: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        x, inputs = batch.x, []
        for kernel, pair, zero in zip(batch.kernels, plain, zeros, strict=True):
            inputs.append(x)
            x = jnp.tanh(x @ kernel + nn.lora_apply(x, pair, SCALE) + zero)
        return _loss(x, batch), inputs

    dys, inputs = jax.grad(loss, has_aux=True)([jnp.zeros_like(batch.x) for _ in params])
    params = _after(params, dys[0])  # the first layer's is the last of the backward pass
    return [_products(*each) for each in zip(params, inputs, dys, strict=True)]


def gradients_from_dense(params: Any, batch: Batch) -> Any:
    """Makes the same products from the dense gradients of the kernels."""
    is_node = lambda x: isinstance(x, ShadowedPair)
    plain = jax.tree.map(lambda node: LoRAPair(node.a, node.b), params, is_leaf=is_node)
    loss = lambda kernels: _loss(_forward(plain, batch._replace(kernels=kernels)), batch)

    def products(node: ShadowedPair, g: jax.Array) -> ShadowedPair:
        return _products(node, jnp.broadcast_to(jnp.eye(g.shape[-1], dtype=g.dtype), g.shape), g)

    return jax.tree.map(products, params, jax.grad(loss)(batch.kernels), is_leaf=is_node)


def _products(node: ShadowedPair, x: jax.Array, dy: jax.Array) -> ShadowedPair:
    """Makes the gradient that a layer with input x and output gradient dy gives its node."""
    return jax.vjp(lambda node: nn.lora_apply(x, node, SCALE), node)[1](dy)[0]


def _after(tree: Any, signal: jax.Array) -> Any:
    """Returns a tree unchanged, but not before a signal is computed.

    The CPU compiler drops optimization barriers before it schedules; it does not see that the
    integer here is zero.
    """
    bits = jax.lax.bitcast_convert_type(signal.ravel()[0].astype(jnp.float32), jnp.int32)
    zero = jnp.minimum(jnp.maximum(bits, 0), 0)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


class Method(NamedTuple):
    """A way to make a train step.

    Args:
        make: the optimizer.
        start: what stands for a pair in the parameters, from the pair and a key.
        gradients: their gradients, from the parameters and the batch.
    """

    make: Callable[[], optax.GradientTransformation]
    start: Callable[[LoRAPair, jax.Array], Any] = lambda pair, key: pair
    gradients: Callable[[Any, Batch], Any] = gradients


def _oplora(k: int, gradients: Callable[[Any, Batch], Any] = gradients) -> Method:
    make = functools.partial(oplora, SGD_LEARNING_RATE, iterations=k, scale=SCALE)
    return Method(make, functools.partial(shadow, iterations=k), gradients)


def _silent(method: Method) -> Method:
    """Makes a method's update without host callbacks."""

    def make() -> optax.GradientTransformation:
        tx = method.make()

        def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            with notices(False):
                return tx.update(grads, state, params)

        return optax.GradientTransformation(tx.init, update)

    return method._replace(make=make)


METHODS: dict[str, Method] = {
    "adamw": Method(lambda: optax.adamw(LEARNING_RATE)),
    "polora": Method(lambda: polora(LEARNING_RATE, scale=SCALE)),
    "polora two-sided": Method(lambda: polora(LEARNING_RATE, partner="gram", scale=SCALE)),
    "lora_muon": Method(lambda: lora_muon(LEARNING_RATE)),
    "lora_rite": Method(lambda: lora_rite(LEARNING_RATE)),
    "scaled_adamw": Method(lambda: scaled_adamw(LEARNING_RATE)),
    "lora_plus": Method(lambda: lora_plus(LEARNING_RATE)),
    "lora_fa": Method(lambda: lora_fa(LEARNING_RATE, scale=SCALE)),
    "lora_pro": Method(lambda: lora_pro(LEARNING_RATE, scale=SCALE)),
    "lora_pro_efficient": Method(lambda: lora_pro_efficient(LEARNING_RATE, scale=SCALE)),
    "lora_soap": Method(lambda: lora_soap(LEARNING_RATE)),
    "reflora": Method(lambda: reflora(LEARNING_RATE, warmup_steps=0)),
    "reflora scalar": Method(lambda: reflora(LEARNING_RATE, refactoring="scalar", warmup_steps=0)),
    "altlora": Method(lambda: altlora(LEARNING_RATE, scale=SCALE)),
    "altlora_plus": Method(lambda: altlora_plus(LEARNING_RATE, scale=SCALE)),
    "oplora k=1": _oplora(1),
    "oplora k=2": _oplora(2),
    "oplora k=1, silent": _silent(_oplora(1)),
    "oplora_proj k=1": Method(
        lambda: oplora_proj(SGD_LEARNING_RATE, scale=SCALE),
        functools.partial(shadow, iterations=2, momentum_rank=0),
    ),
    "scaled_oplora k=1": Method(
        lambda: scaled_oplora(SGD_LEARNING_RATE, scale=SCALE),
        functools.partial(shadow, metric=Metric()),
    ),
    # A schedule of which every run sees the warm-up, the switch, and refreshes at every step.
    "sds_lora": Method(
        lambda: sds_lora(LEARNING_RATE, total_steps=100, warmup_steps=WARM_UP, scale=SCALE),
        lambda pair, key: frame(pair),
    ),
    "oplora k=1, kept": _oplora(1, gradients_from_kept),
    "oplora k=2, kept": _oplora(2, gradients_from_kept),
    "oplora k=1, dense": _oplora(1, gradients_from_dense),
    "oplora k=2, dense": _oplora(2, gradients_from_dense),
}


def make_problem(
    layers: int, width: int, tokens: int, rank: int, dtype: Any
) -> tuple[list[LoRAPair], Batch]:
    """Draws the pairs, in float32 and with b not zero, and the batch, in ``dtype``."""
    keys = iter(jax.random.split(jax.random.key(0), 3 * layers + 2))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[0])

    pairs = [LoRAPair(normal(width, rank), 0.1 * normal(rank, width)) for _ in range(layers)]
    kernels = [normal(width, width) for _ in range(layers)]
    x, target = (np.sqrt(tokens) * normal(tokens, width) for _ in range(2))
    return pairs, jax.tree.map(lambda x: x.astype(dtype), Batch(kernels, x, target))


def make_runner(name: str, pairs: Sequence[LoRAPair], batch: Batch, layout: str) -> Runner:
    """Compiles a method's train step.

    Args:
        name: a key of ``METHODS``.
        pairs: the adapters at the start.
        batch: the batch of every step.
        layout: one of ``LAYOUTS``.

    Returns:
        The step, with (params, state) as its carry.
    """
    method = METHODS[name]
    tx = method.make()
    keys = jax.random.split(jax.random.key(1), len(pairs))
    params: Any = [method.start(*each) for each in zip(pairs, keys, strict=True)]
    if layout == "stacked":
        stack = lambda *layers: jnp.stack(layers)
        params = jax.tree.map(stack, *params)
        batch = batch._replace(kernels=stack(*batch.kernels))

    def step(carry: Any, batch: Batch) -> Any:
        params, state = carry
        updates, state = tx.update(method.gradients(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return Runner(step, (params, jax.jit(tx.init)(params)), batch)


def disagreement(name: str, reference: str, steps: int) -> float:
    """Runs two methods from one start on a small float32 problem.

    Args:
        name: a key of ``METHODS``.
        reference: another, with the same leaves.
        steps: how many.

    Returns:
        The largest difference of a parameter, relative to how far the reference moved its leaf.
    """
    problem = make_problem(layers=3, width=32, tokens=64, rank=4, dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        runners = [make_runner(each, *problem, "separate") for each in (name, reference)]
    start = jax.tree.map(np.array, runners[1].carry[0])
    for runner in runners:
        for _ in range(steps):
            runner.run()

    got, want = (jax.tree.map(np.array, runner.carry[0]) for runner in runners)
    return relative_difference(got, want, start)


def relative_difference(got: Any, want: Any, start: Any) -> float:
    """Returns the largest difference of a leaf, relative to how far the wanted one moved."""

    def of_leaf(got: np.ndarray, want: np.ndarray, start: np.ndarray) -> float:
        moved = np.max(np.abs(want - start))
        return float(np.max(np.abs(got - want)) / (moved or 1))  # nothing moves the Krylov leaf

    # NumPy's maximum keeps NaN, Python's drops it.
    return float(np.max(jax.tree.leaves(jax.tree.map(of_leaf, got, want, start))))


def check_alternatives(methods: Sequence[str]) -> None:
    """Raises unless each other way to OPLoRA's step makes the same step."""
    for name in methods:
        reference, _, way = name.partition(", ")
        if way and not (wrong := disagreement(name, reference, steps=3)) < 1e-3:
            raise AssertionError(f"{name} differs from {reference} by {wrong:.1e} of its move")


def measure(
    methods: Sequence[str],
    pairs: Sequence[LoRAPair],
    batch: Batch,
    layout: str,
    steps: int,
    console: Console,
) -> list[dict[str, Any]]:
    """Measures methods in one layout, AdamW first; without times if no steps are asked for."""
    runners = {}
    for name in track(methods, f"compiling, {layout}", console=console, transient=True):
        if layout == "stacked" and METHODS[name].gradients is gradients_from_kept:
            continue  # the zeros it adds to each layer's output would be a stack in memory
        runners[name] = make_runner(name, pairs, batch, layout)
    if steps:
        time_in_turn(runners, steps, console)
    return rows_of(runners, layout)


def rows_of(runners: Mapping[str, Runner], layout: str) -> list[dict[str, Any]]:
    """Describes memory, and times where steps were timed, of steps of one layout."""
    base = runners["adamw"]
    rows = []
    for name, runner in runners.items():
        params, state = runner.carry
        rows.append(
            {
                "layout": layout,
                "method": name,
                "temporary_mb": runner.memory.temp_size_in_bytes / 1e6,
                "temporary_ratio": runner.memory.temp_size_in_bytes
                / base.memory.temp_size_in_bytes,
                "argument_mb": runner.memory.argument_size_in_bytes / 1e6,
                "output_mb": runner.memory.output_size_in_bytes / 1e6,
                "params_mb": megabytes(params),
                "state_mb": megabytes(state),
                "leaves": len(jax.tree.leaves(runner.carry)),
                "compile_s": runner.compile_s,
                **(times_beside(runner, base) if runner.times else {}),
            }
        )
    return rows


def main(
    method: Annotated[
        list[str] | None, typer.Option(help=f"Methods beside AdamW: {list(METHODS)[1:]}.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Adapted layers.")] = 8,
    width: Annotated[int, typer.Option(help="Inputs and outputs of a layer.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 8192,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of activations and kernels.")] = "float32",
    layout: Annotated[list[str] | None, typer.Option(help=f"{', '.join(LAYOUTS)}.")] = None,
    steps: Annotated[int, typer.Option(help="Timed steps of each method; 0: memory only.")] = 10,
    out: Annotated[pathlib.Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measures and prints; writes JSON with --out."""
    console = Console()
    methods = ["adamw", *(method or list(METHODS)[1:])]
    check_alternatives(methods)
    pairs, batch = make_problem(layers, width, tokens, rank, jnp.dtype(dtype))
    rows = []
    for kind in layout or LAYOUTS:
        table = Table(
            *("method", "temp. MB", "× AdamW", "params MB", "state MB", "leaves"),
            *("median ms", "× AdamW"),
            title=f"{kind} layers",
        )
        table.columns[0].no_wrap = True
        for row in measure(methods, pairs, batch, kind, steps, console):
            rows.append(row)
            table.add_row(
                row["method"],
                f"{row['temporary_mb']:.1f}",
                f"{row['temporary_ratio']:.3f}",
                f"{row['params_mb']:.2f}",
                f"{row['state_mb']:.2f}",
                str(row["leaves"]),
                *((f"{row['median_ms']:.0f}", f"{row['ratio']:.2f}") if steps else ()),
            )
        console.print(table)
    if out is not None:
        settings = {
            "layers": layers,
            "width": width,
            "tokens": tokens,
            "rank": rank,
            "dtype": dtype,
        }
        write_record(out, "train_step", console, **settings, rows=rows)


if __name__ == "__main__":
    typer.run(main)
