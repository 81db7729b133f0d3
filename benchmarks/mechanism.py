"""What SDS-LoRA changes about the gradients of a real run: their rank and their direction.

``python -m benchmarks.mechanism --out benchmarks/results/mechanism.json`` trains adapters of the
small ViT of ``experiments`` on the digits 5-9 with AdamW, as the study ``digits`` does, and looks
at every step at all adapted kernels: the effective rank of the gradients of ``a`` and of ``b``,
and the cosine between the full gradient of the kernel and the change that a step along the
gradients of the factors makes. Beside the JSON record it draws a PNG.

Each method has the best of the peak rates 3e-3 and 1e-2 by the loss of the last 20 steps of seed 0
(SDS-LoRA with and without warm-up also of 1e-3). "No warm-up" is this library's start at random
frames, the paper's begins with ordinary LoRA, up to the dotted line; "preserving" is this library's
refresh that keeps ΔK, at the rate of the paper's.

Adapters are added to kernels, so that one backward pass gives the full gradients, and the
gradients of the factors follow from these.
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
from flax import nnx
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.timing import environment
from experiments.adapters import LowRank
from experiments.schema import Plan
from experiments.tasks.digits import Digits, DigitsOptions
from experiments.trainer import warmup_cosine
from lowrank_optax import LoRAPair, diagnostics, frame, nn, sds_lora

HEAD_LEARNING_RATE = 3e-3
WARM_UP = 10
QUANTITIES = {
    "rank_a": "effective rank of the gradient of a",
    "rank_b": "effective rank of the gradient of b",
    "alignment": "cosine with the full gradient",
    "loss": "training loss",
}
SMOOTHED = 10


class Method(NamedTuple):
    """One line of the figure.

    Args:
        learning_rate: peak rate of the adapters.
        make: the optimizer, from AdamW, the steps of the run and the forward scale.
        start: what the method needs in place of a pair, from the pair and a random key.
    """

    learning_rate: float
    make: Callable[[optax.GradientTransformation, int, float], optax.GradientTransformation]
    start: Callable[[LoRAPair, jax.Array], Any]


METHODS = {
    "LoRA": Method(1e-2, lambda adamw, steps, scale: adamw, lambda pair, key: pair),
    "SDS-LoRA": Method(
        3e-3,
        lambda adamw, steps, scale: sds_lora(
            adamw, total_steps=steps, warmup_steps=WARM_UP, scale=scale
        ),
        lambda pair, key: frame(pair),
    ),
    "SDS-LoRA, preserving": Method(
        3e-3,
        lambda adamw, steps, scale: sds_lora(
            adamw, total_steps=steps, warmup_steps=WARM_UP, scale=scale, refresh="preserving"
        ),
        lambda pair, key: frame(pair),
    ),
    "SDS-LoRA, no warm-up": Method(
        1e-2,
        lambda adamw, steps, scale: sds_lora(adamw, total_steps=steps, warmup_steps=0, scale=scale),
        frame,
    ),
}


class Adapted(NamedTuple):
    """The task's model taken apart.

    Args:
        graph: structure of the model without adapters.
        base: its weights, by path.
        pairs: the adapters at the start, by the path of their kernel.
        scale: the forward scale of all of them.
    """

    graph: Any
    base: dict[Any, jax.Array]
    pairs: dict[Any, LoRAPair]
    scale: float


def take_apart(task: Digits, seed: int) -> Adapted:
    """Builds the task's model and takes its adapters off.

    Args:
        task: whose model.
        seed: of the adapters and of the head.

    Returns:
        The parts.
    """
    model = task.build_model(seed, LowRank())
    [scale] = set(nn.lora_scales(model).values())
    factors = nnx.to_flat_state(nnx.as_pure(nnx.state(model, nnx.LoRAParam)))
    leaves = dict(factors)
    pairs = {
        (*path[:-1], "kernel"): LoRAPair(leaf, leaves[*path[:-1], "lora_b"])
        for path, leaf in leaves.items()
        if path[-1] == "lora_a"
    }
    nn.remove_lora(model)
    graph, state = nnx.split(model)
    return Adapted(graph, dict(nnx.to_flat_state(nnx.as_pure(state))), pairs, scale)


def train(task: Digits, name: str, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Trains one method.

    Args:
        task: what to train.
        name: a key of ``METHODS``.
        steps: how many.
        seed: of the adapters, the head and the order of the data.

    Returns:
        ``QUANTITIES`` before every step, (steps,); those of the adapters are means over kernels.
    """
    method, parts = METHODS[name], take_apart(task, seed)
    shape = warmup_cosine(Plan(steps=steps, eval_every=steps, head_learning_rate=1.0))
    adamw = lambda peak: optax.adamw(lambda count: peak * shape(count), weight_decay=0.0)
    tx = {
        "pairs": method.make(adamw(method.learning_rate), steps, parts.scale),
        "head": adamw(HEAD_LEARNING_RATE),
    }
    keys = jax.random.split(jax.random.key(seed), len(parts.pairs))
    nodes = {
        "/".join(map(str, path)): method.start(pair, key)
        for (path, pair), key in zip(parts.pairs.items(), keys, strict=True)
    }
    head = {path: leaf for path, leaf in parts.base.items() if path[0] == "head"}
    params = {"pairs": nodes, "head": head}

    def deltas(nodes: dict[str, Any]) -> dict[str, jax.Array]:
        dense = lambda node: nn.lora_apply(jnp.eye(node.a.shape[0]), node, parts.scale)
        return {path: dense(node) for path, node in nodes.items()}

    def loss(changes: dict[str, jax.Array], head: Any, batch: Any) -> jax.Array:
        by_path = {
            path: parts.base[path] + change
            for path, change in zip(parts.pairs, changes.values(), strict=True)
        }
        flat = {**parts.base, **head, **by_path}
        model = nnx.merge(parts.graph, nnx.from_flat_state(flat.items()))
        totals = task.totals(model, batch)
        return totals.loss / totals.weight

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, states: Any, batch: Any) -> Any:
        changes, pull_back = jax.vjp(deltas, params["pairs"])
        value, (full, head_grads) = jax.value_and_grad(loss, (0, 1))(changes, params["head"], batch)
        [grads] = pull_back(full)
        seen = {"loss": value, **_look_at(params["pairs"], grads, full)}
        moved, new_states = {}, {}
        for part, part_grads in {"pairs": grads, "head": head_grads}.items():
            updates, new_states[part] = tx[part].update(part_grads, states[part], params[part])
            moved[part] = optax.apply_updates(params[part], updates)
        return moved, new_states, seen

    params = jax.tree.map(jnp.copy, params)  # donated, while the parts stay
    states = {part: tx[part].init(params[part]) for part in tx}
    batches, history = task.train_batches(seed), []
    for _ in range(steps):
        params, states, seen = step(params, states, next(batches))
        history.append(seen)
    return {name: np.array([seen[name] for seen in history]) for name in QUANTITIES}


def _look_at(nodes: Any, grads: Any, full: Any) -> dict[str, jax.Array]:
    """Means over kernels of what the figure shows."""
    mean = lambda values: jnp.mean(jnp.stack(list(values)))
    return {
        "rank_a": mean(diagnostics.effective_rank(grads[path].a) for path in nodes),
        "rank_b": mean(diagnostics.effective_rank(grads[path].b) for path in nodes),
        "alignment": mean(
            diagnostics.alignment(node, grads[path], full[path]) for path, node in nodes.items()
        ),
    }


def draw_figure(curves: dict[str, dict[str, np.ndarray]], rank: int, path: pathlib.Path) -> None:
    """Draws every quantity against the step, means over seeds, and after the warm-up over steps.

    Args:
        curves: by method and quantity, (seeds, steps).
        rank: of the adapters.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (quantity, title) in zip(panels.flat, QUANTITIES.items(), strict=True):
        for index, (name, values) in enumerate(curves.items()):
            mean = values[quantity].mean(0)
            steps = np.arange(1, len(mean) + 1)
            axes.plot(steps, mean, color=f"C{index}", lw=0.8, alpha=0.35)
            smooth = np.convolve(mean[WARM_UP:], np.ones(SMOOTHED) / SMOOTHED, "valid")
            middle = WARM_UP + (SMOOTHED + 1) / 2 + np.arange(len(smooth))
            axes.plot(middle, smooth, color=f"C{index}", label=name)
        axes.axvline(WARM_UP + 0.5, color="0.6", lw=0.8, ls=":")
        axes.set_title(title)
        axes.grid(alpha=0.2)
    for axes in panels[0]:
        axes.set(ylim=(1, rank))
    panels[1, 0].set(ylim=(0, None), xlabel="step")
    panels[1, 1].set(xlabel="step", yscale="log")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 200,
    seeds: Annotated[int, typer.Option(help="Seeds, from 0.")] = 3,
    out: Annotated[
        pathlib.Path | None, typer.Option(help="JSON file to write; a PNG is put beside it.")
    ] = None,
) -> None:
    """Trains all methods and prints means after warm-up; writes JSON and a figure with --out."""
    console = Console()
    task = Digits(DigitsOptions())
    curves = {}
    for name in track(METHODS, "training", console=console, transient=True):
        runs = [train(task, name, steps, seed) for seed in range(seeds)]
        curves[name] = {key: np.stack([run[key] for run in runs]) for key in QUANTITIES}
    table = Table("method", "peak lr", *QUANTITIES, box=SIMPLE_HEAD, pad_edge=False)
    rows = []
    for name, values in curves.items():
        rate = METHODS[name].learning_rate
        means = {key: curve[:, WARM_UP:].mean() for key, curve in values.items()}
        table.add_row(name, f"{rate:g}", *(f"{mean:.3f}" for mean in means.values()))
        after = {key: round(float(mean), 4) for key, mean in means.items()}
        blocks = {
            key: [
                float(f"{block.mean():.3g}")
                for block in np.split(curve, range(SMOOTHED, steps, SMOOTHED), axis=1)
            ]
            for key, curve in values.items()
        }
        rows.append(
            {
                "method": name,
                "learning_rate": rate,
                "mean_after_warm_up": after,
                "means_of_ten_steps": blocks,
            }
        )
    console.print(table)
    if out is not None:
        record = {
            "command": f"python -m benchmarks.mechanism --steps {steps} --seeds {seeds}",
            **environment(),
            "task_options": task.options.model_dump(mode="json"),
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n")
        draw_figure(curves, task.options.rank, out.with_suffix(".png"))
        console.print(f"written to {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
