"""The figure of a method's page: one step on a small problem, and loss curves of a study."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.pages import Page
from experiments.report import Variant
from experiments.start import WeightStart, parse_start
from experiments.summary import MethodSummary, tuned_baseline

COLORS = ("#0f9d8a", "#e07b00", "#4c8eda", "#c2549c", "#a08000")


def find(variant: Variant, method: str) -> MethodSummary | None:
    """Returns what a variant found of a method; None if no run of it has finished."""
    return next((s for s in variant.summaries if s.method == method and s.best), None)


def draw(page: Page, variants: Sequence[tuple[str, Variant]], path: Path) -> None:
    """Draws a page's figure, readable on a light and on a dark ground.

    Args:
        page: The page.
        variants: All variants.
        path: The SVG file to write.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    grey = "#808080"
    colors = dict(zip(_shown(page), COLORS, strict=False))
    colors["adamw"] = grey
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    look: dict[str, Any] = dict.fromkeys(parts, grey)
    look.update({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.size": 9})
    with mpl.rc_context(look):
        figure = Figure(figsize=(9.0 if page.curves else 4.8, 3.2), layout="constrained")
        panels = figure.subplots(1, 2 if page.curves else 1, squeeze=False)[0]
        _draw_steps(panels[0], page, colors)
        if page.curves:
            _draw_curves(panels[1], page.curves, variants, colors)
        for axes in panels:
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if axes.get_ylim()[0] > 0.1 else NullFormatter())
            axes.grid(alpha=0.25, color=grey)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
            axes.set_facecolor("none")
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def _shown(page: Page) -> list[str]:
    names = [*page.steps, *(page.curves[2] if page.curves else ())]
    return [name for name in dict.fromkeys(names) if name != "adamw"]


def _draw_steps(axes: Any, page: Page, colors: Mapping[str, str]) -> None:
    for method in dict.fromkeys(("full gradient", "adamw", *page.steps)):
        values, cosine = one_step(method, usual=page.usual_start)
        label = method if method == "full gradient" else f"{method}, cosine {cosine:.2f}"
        style = "--" if method == "full gradient" else "o-"
        color = colors.get(method, "#808080")
        axes.plot(range(1, len(values) + 1), values, style, ms=3, label=label, color=color)
    axes.set(yscale="log", xlabel="singular value", ylim=(0.03, 1.3))
    axes.set_title("One step's change of s·a·b, and its cosine with –G", fontsize=9)


def _draw_curves(
    axes: Any, curves: tuple[str, str, tuple[str, ...]], variants: Any, colors: Mapping[str, str]
) -> None:
    study, name, methods = curves
    variant = next(v for found, v in variants if (found, v.name) == (study, name))
    baseline = tuned_baseline(variant.summaries)
    shown = [s for s in (baseline, *(find(variant, method) for method in methods)) if s]
    last = []
    for summary in _distinct(shown):
        steps = [point.step for point in summary.best[0].curve]
        losses = [[point.validation.loss for point in run.curve] for run in summary.best]
        medians = [statistics.median(column) for column in zip(*losses, strict=True)]
        is_base = summary is baseline
        label = f"tuned AdamW ({summary.method})" if is_base else summary.method
        color = colors.get(summary.method, "#808080")
        axes.plot(steps, medians, label=label, color=color, lw=1.6)
        last += medians[len(medians) // 6 :]
    axes.set(yscale="log", xlabel="step", ylim=(0.93 * min(last), 1.07 * max(last)))
    axes.set_title(f"Validation loss, {study} {name}, median of seeds", fontsize=9)


def _distinct(summaries: Sequence[MethodSummary]) -> list[MethodSummary]:
    return list({summary.method: summary for summary in summaries}.values())


def one_step(method: str, *, usual: bool) -> tuple[list[float], float]:
    """Computes what one step of a method does to a small layer.

    The layer is 48→32 with a pair of rank 8, and learns a linear map. Its factors have condition 30
    each, or those of a usual start. The step is the third from there, at a tiny learning rate.

    Args:
        method: Name of the method, or "full gradient".
        usual: Whether factors start as `nn.add_lora` draws them, or as the method's own start.

    Returns:
        The eight largest singular values of the change of s·a·b, in units of the largest, and the
        cosine of the change with the negative full gradient.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from experiments.methods import METHODS, Setting
    from lowrank_optax import nn

    rank, n_in, n_out = 8, 48, 32
    keys = iter(jax.random.split(jax.random.key(0), 8))
    spread = jnp.logspace(0, -1.5, rank)

    def spread_factor(key: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
        frame, _ = jnp.linalg.qr(jax.random.normal(key, (max(shape), rank)))
        return (frame * spread if shape[1] == rank else (frame * spread[::-1]).T).astype(dtype)

    target = jax.random.normal(next(keys), (n_in, n_out)) / 4
    x = jax.random.normal(next(keys), (256, n_in))
    row = METHODS["adamw" if method == "full gradient" else method]
    model = nnx.Sequential(nnx.Linear(n_in, n_out, use_bias=False, rngs=nnx.Rngs(0)))
    config = nn.LoRAConfig(rank=rank, alpha=2.0 * rank)
    if not usual:
        config = dataclasses.replace(config, a_init=spread_factor, b_init=spread_factor)
    row.adapters.add_to(model, "layers/0", config, rngs=nnx.Rngs(1))
    loss_of = lambda model, batch: jnp.mean((model(batch) - batch @ target) ** 2)
    options = {key: value for key, value in row.options.items() if key != "start"}
    if "start" in row.options:
        start = parse_start(row.options["start"])
        if isinstance(start, WeightStart):
            nn.weight_start(model, start.method, progress=False)
        else:
            settings = start.model_dump(exclude={"batches"})
            nn.gradient_start(model, loss_of, [x], progress=False, **settings)
    if options.get("warmup_steps"):
        options["warmup_steps"] = 2
    scales = {"layers/0": model.layers[0].scale} if hasattr(model.layers[0], "scale") else {}
    setting = Setting(lambda count: 1e-5, 10, lambda path: scales.get(path, 1.0), rank)
    optimizer = nnx.Optimizer(model, row.make(setting, **options), wrt=row.adapters.trained)
    kernel = lambda: model(jnp.eye(n_in))
    for _ in range(3):
        before = kernel()
        diff = nnx.DiffState(0, row.adapters.trained)
        optimizer.update(model, nnx.grad(loss_of, argnums=diff)(model, x))
    full = -jax.grad(lambda k: jnp.mean((x @ k - x @ target) ** 2))(before)
    change = full if method == "full gradient" else kernel() - before
    values = jnp.linalg.svdvals(change)[:rank]
    cosine = jnp.vdot(change, full) / jnp.linalg.norm(change) / jnp.linalg.norm(full)
    return [float(value) for value in values / values[0]], float(cosine)
