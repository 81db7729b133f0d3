"""Convergence and the condition number of the factors: gradient descent on a matrix problem.

``python -m benchmarks.conditioning --out benchmarks/results/conditioning.json`` descends in float64
on the two problems of ``experiments.tasks.conditioning``, in which half of the singular values of
either factor are 1/κ of the others.

LoRA descends on the factors, SDS-LoRA through the frames of the same ΔK, as between two refreshes:
with constant frames the loss of ``ΔK = s (a F + E b)`` is a quadratic, and s² and 2 s² are the only
eigenvalues of its Hessian above 0. A refresh is another matter: it moves the limit, and the paper's
moves ΔK too.

Each method takes the best of ``STEP_SIZES``, in units of 1/L: L is s² (‖a‖² + ‖b‖²) at the start
for LoRA and 2 s² for SDS-LoRA, the largest eigenvalues. For eigenvalues between s² and 2 s² the
best step there is has size 4/3.

The excess is the squared distance of ΔK to its limit: T for LoRA, for SDS-LoRA what its frames
can represent of T. The rate is how much its logarithm falls per step, fitted by least squares over
the second half of the run, which ends where rounding begins.
"""

import pathlib
from typing import Annotated, Any, NamedTuple, get_args

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

from benchmarks.record import write_record
from experiments.tasks.conditioning import N_IN, SCALE, Kind, Problem, make_problem
from lowrank_optax import FramedPair, LoRAPair, frame, nn, sds_lora

STEP_SIZES = (0.5, 1.0, 4 / 3, 1.9)
FLOOR = 1e-24
CONDITIONS = (1.0, 1e1, 1e2, 1e3, 1e4)
METHODS = ("LoRA", "SDS-LoRA")
COLORS = {"LoRA": "C1", "SDS-LoRA": "C0"}


class Descent(NamedTuple):
    """What gradient descent did.

    Args:
        step_size: the best one, in units of 1/L.
        excess: squared distance to the limit before every step, relative to the first, (steps,).
        rate: fall of its logarithm per step.
    """

    step_size: float
    excess: np.ndarray
    rate: float


def descend(method: str, problem: Problem, steps: int) -> Descent:
    """Runs gradient descent with every step size and keeps the fastest.

    Args:
        method: one of ``METHODS``.
        problem: from :func:`make_problem`, in float64.
        steps: how many.

    Returns:
        The fastest descent.
    """
    if method == "LoRA":
        node: Any = problem.start
        limit = problem.target
        norms = [jnp.linalg.norm(x, 2) ** 2 for x in problem.start]
        curvature = SCALE**2 * sum(norms)
    else:
        node = switched(problem.start)
        limit = problem.target - _outside("a", node, _outside("b", node, problem.target))
        curvature = 2 * SCALE**2
    rates = jnp.array(STEP_SIZES) / curvature
    curves = np.asarray(_descend(node, problem.target, limit, rates, steps))
    fitted = [Descent(size, c, fit_rate(c)) for size, c in zip(STEP_SIZES, curves, strict=True)]
    return max(fitted, key=lambda descent: descent.rate)


@jax.jit
def switched(pair: LoRAPair) -> FramedPair:
    """Gives a pair the frames that it has after the switch of SDS-LoRA, ΔK unchanged."""
    node = frame(pair)
    tx = sds_lora(optax.sgd(0.0), total_steps=2, warmup_steps=1, scale=SCALE)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, node), tx.init(node), node)
    return optax.apply_updates(node, updates)


def fit_rate(excess: np.ndarray) -> float:
    """Fits how much the logarithm of a curve falls per step; minus infinity if it diverged.

    Args:
        excess: relative to its first value, (steps,).

    Returns:
        The negative slope over the second half of what lies above ``FLOOR``.
    """
    if not excess[-1] < 1:
        return -np.inf
    below = excess < FLOOR
    stop = int(np.argmax(below)) if below.any() else len(excess)
    window = np.arange(stop // 2, stop)
    return -float(np.polyfit(window, np.log(excess[window]), 1)[0])


@jax.jit(static_argnames="steps")
def _descend(
    start: Any, target: jax.Array, limit: jax.Array, rates: jax.Array, steps: int
) -> jax.Array:
    def delta(node: Any) -> jax.Array:
        return nn.lora_apply(jnp.eye(N_IN), node, SCALE)

    def loss(node: Any) -> jax.Array:
        return 0.5 * jnp.sum((delta(node) - target) ** 2)

    def run(rate: jax.Array) -> jax.Array:
        tx = optax.sgd(rate)

        def step(carry: Any, _: None) -> Any:
            node, state = carry
            excess = jnp.sum((delta(node) - limit) ** 2)
            updates, state = tx.update(jax.grad(loss)(node), state)
            return (optax.apply_updates(node, updates), state), excess

        _, excess = jax.lax.scan(step, (start, tx.init(start)), length=steps)
        return excess / excess[0]

    return jax.vmap(run)(rates)


def _outside(side: str, node: FramedPair, matrix: jax.Array) -> jax.Array:
    """Removes from a matrix (in, out) what lies in the frame of one side."""
    if side == "a":
        return matrix - node.f_in @ (node.f_in.T @ matrix)
    return matrix - (matrix @ node.f_out.T) @ node.f_out


def draw_figure(results: dict[tuple[Kind, str, float], Descent], path: pathlib.Path) -> None:
    """Draws the curves of the first problem, and the fitted rates of both.

    Args:
        results: by problem, method and condition number.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    conditions = sorted({condition for _, _, condition in results})
    for index, condition in enumerate(conditions):
        lora = results["factorization", "LoRA", condition]
        shade = 1 - 0.75 * index / max(len(conditions) - 1, 1)
        steps = np.arange(len(lora.excess)) + 1
        left.plot(steps, lora.excess, color="C1", alpha=shade, label=f"LoRA, κ = {condition:g}")
    for index, condition in enumerate(conditions):
        excess = results["factorization", "SDS-LoRA", condition].excess
        name = "SDS-LoRA, every κ" if index == 0 else None
        left.plot(np.arange(len(excess)) + 1, excess, color="C0", label=name)
    left.set(xscale="log", yscale="log", xlabel="step", ylabel="excess / excess at the start")
    left.set(ylim=(FLOOR, 5))
    left.set_title("Same ΔK, factored ever worse")
    left.legend(loc="lower right", fontsize=9)
    styles: dict[Kind, tuple[str, str]] = {
        "factorization": ("o-", "factorization"),
        "adapter": ("s--", "ΔK itself"),
    }
    for kind, (style, what) in styles.items():
        for method in METHODS:
            rates = [results[kind, method, condition].rate for condition in conditions]
            label = f"{method}, ill-conditioned {what}"
            right.plot(conditions, rates, style, color=COLORS[method], label=label, ms=5)
    right.set(xscale="log", yscale="log", xlabel="condition number κ of a and of b")
    right.set(ylabel="fall of log(excess) per step")
    right.set_title("Fitted linear rates")
    right.legend(loc="lower left", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 2000,
    out: Annotated[
        pathlib.Path | None, typer.Option(help="JSON file to write; a PNG is put beside it.")
    ] = None,
) -> None:
    """Fits all rates and prints them; writes JSON and a figure with --out."""
    jax.config.update("jax_enable_x64", True)
    console = Console()
    table = Table("ill-conditioned", "κ", "method", "step × L", "rate", box=SIMPLE_HEAD)
    results, rows = {}, []
    todo = [(kind, c, method) for kind in get_args(Kind) for c in CONDITIONS for method in METHODS]
    for kind, condition, method in track(todo, "descending", console=console, transient=True):
        descent = descend(method, make_problem(kind, condition), steps)
        results[kind, method, condition] = descent
        row = {
            "problem": kind,
            "condition": condition,
            "method": method,
            "step_size_times_l": round(descent.step_size, 3),
            "rate": float(f"{descent.rate:.4g}"),
            "excess_at_the_end": float(f"{descent.excess[-1]:.3g}"),
        }
        rows.append(row)
        table.add_row(*(f"{x:g}" if isinstance(x, float) else x for x in list(row.values())[:-1]))
    console.print(table)
    if out is not None:
        write_record(out, "conditioning", console, steps=steps, rows=rows)
        draw_figure(results, out.with_suffix(".png"))
        console.print(f"written to {out.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
