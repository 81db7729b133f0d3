"""Figures and tables of the methods' pages, and the guide's: `python -m experiments.method_pages`.

The tables come from the committed results of the studies and benchmarks. A figure has two panels:
one step of each method on a small problem, computed here, and loss curves of a study.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.hunt import is_attempt
from experiments.report import Variant, read_variants, replace_block, write_pages
from experiments.start import WeightStart, parse_start
from experiments.study import load_study, study_names
from experiments.summary import MethodSummary, difference, tuned_baseline
from experiments.tables import NOTHING, markdown

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "methods"
GUIDE = ROOT / "docs" / "choosing.md"
COLORS = ("#0f9d8a", "#e07b00", "#4c8eda", "#c2549c", "#a08000")
NO_BREAK = "\u00a0"
OTHER_QUESTIONS = {"conditioning", "mechanism", "mechanism-glue"}
RESULTS = ROOT / "experiments" / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Page:
    """What the page of a method shows.

    Attributes:
        methods: Columns of the table of learning rates, as in `experiments.methods`.
        costs: Rows of the table of costs, as the benchmarks name them, by what the page calls them;
            a page without any has no table.
        steps: Methods of the figure's left panel.
        curves: Study and variant of the right panel, and its methods.
        gradient_start: Whether the left panel begins at a usual start, not at trained factors.
    """

    methods: tuple[str, ...]
    costs: Mapping[str, str]
    steps: tuple[str, ...]
    curves: tuple[str, str, tuple[str, ...]] | None
    gradient_start: bool = False


CHOICES = (
    "adamw",
    "polora-start",
    "polora",
    "lora-plus",
    "lora-rite",
    "altlora-simultaneous",
    "altlora-plus-simultaneous",
    "sds-lora",
    "oplora",
)
"""Columns of the guide's table of rates."""

_WEIGHT_STARTS = ("adamw-pissa", "adamw-olora", "polora-pissa")
_STARTS = ("adamw-start", "polora-start", "sds-lora-start")
_ALTLORA = ("altlora", "altlora-simultaneous", "altlora-sequential")
_ALTLORA_PLUS = ("altlora-plus", "altlora-plus-simultaneous", "altlora-plus-sequential")

PAGE_OF = {
    "polora": Page(
        ("polora", "polora-start", "polora-two-sided", "polora-two-sided-start"),
        {"`polora`": "polora", '`polora`, `partner="gram"`': "polora two-sided"},
        ("polora", "polora-two-sided"),
        ("cifar-transfer", "peers", ("polora", "polora-start")),
    ),
    "gradient_starts": Page(
        _STARTS,
        {},
        ("adamw-start", "polora-start"),
        ("lm", "peers", ("adamw", "adamw-start", "polora", "polora-start")),
        gradient_start=True,
    ),
    "weight_starts": Page(_WEIGHT_STARTS, {}, _WEIGHT_STARTS, None, gradient_start=True),
    "altlora": Page(
        (*_ALTLORA, *_ALTLORA_PLUS),
        {"`altlora`": "altlora", "`altlora_plus`": "altlora_plus"},
        ("altlora-simultaneous", "altlora-plus-simultaneous"),
        ("linear", "stochastic", ("altlora-simultaneous", "altlora-plus-simultaneous")),
    ),
    "oplora": Page(
        ("oplora", "oplora-2", "oplora-proj", "scaled-oplora", "preconditioned"),
        {
            "`oplora`": "oplora k=1",
            "`oplora`, `iterations=2`": "oplora k=2",
            "`oplora_proj`": "oplora_proj k=1",
        },
        ("oplora", "oplora-proj", "scaled-oplora"),
        ("linear", "stochastic", ("oplora", "oplora-2", "svd-lora")),
    ),
    "sds_lora": Page(
        ("sds-lora", "sds-lora-no-warmup", "sds-lora-start"),
        {"`sds_lora`": "sds_lora"},
        ("sds-lora", "sds-lora-sgd"),
        ("lm", "peers", ("sds-lora", "sds-lora-start")),
    ),
    "svd_lora": Page(
        ("svd-lora",), {}, ("svd-lora",), ("linear", "stochastic", ("svd-lora", "oplora-2"))
    ),
    "scaled_adamw": Page(
        ("scaled-adamw",), {"`scaled_adamw`": "scaled_adamw"}, ("scaled-adamw",), None
    ),
    "lora_plus": Page(
        ("lora-plus-4", "lora-plus"),
        {},
        ("lora-plus-4", "lora-plus"),
        ("cifar", "peers", ("lora-plus-4", "lora-plus", "adamw")),
    ),
    "lora_rite": Page(
        ("lora-rite",),
        {"`lora_rite`": "lora_rite"},
        ("lora-rite",),
        ("lm", "rank-32", ("lora-rite",)),
    ),
    "lora_fa": Page(("lora-fa",), {}, ("lora-fa",), None),
    "lora_pro": Page(
        ("lora-pro", "lora-pro-efficient"), {}, ("lora-pro", "lora-pro-efficient"), None
    ),
    "reflora": Page(("reflora", "reflora-scalar"), {}, ("reflora", "reflora-scalar"), None),
    "lora_soap": Page(("lora-soap",), {}, ("lora-soap",), None),
    "lora_muon": Page(
        ("lora-muon",),
        {"`lora_muon`": "lora_muon"},
        ("lora-muon",),
        ("cifar-transfer", "peers", ("lora-muon",)),
    ),
}


def all_variants() -> Iterator[tuple[str, Variant]]:
    """Yields the variants of the studies that have an AdamW to compare with, by study."""
    for name in study_names():
        if (RESULTS / name).is_dir():
            for variant in read_variants(load_study(name), RESULTS):
                if not is_attempt(variant.name) and tuned_baseline(variant.summaries):
                    yield name, variant


def rate_table(page: Page, variants: Sequence[tuple[str, Variant]]) -> str:
    """Writes each method's best rate and final loss, a row a comparison, in Markdown."""
    rows, found = [], [m for m in page.methods if any(_find(v, m) for _, v in variants)]
    for study, variant in variants:
        if study in OTHER_QUESTIONS:
            continue
        baseline = tuned_baseline(variant.summaries)
        mine = [_find(variant, method) for method in found]
        if baseline is None or not any(mine):
            continue
        label = f"[{study}](../results/{study}.md)" + f", {variant.name}" * bool(variant.name)
        split = baseline.reported_split
        loss = f"{statistics.mean(baseline.losses(split)):.3g} (`{baseline.method}`)"
        rows.append([label, loss, *(_cell(summary, baseline) for summary in mine)])
    if not rows:
        return "No study has run this method yet."
    return (
        "Best learning rate of each study's sweep: the mean final loss there. `*`: the rate is "
        "an end of its sweep. + or –: better or worse than tuned AdamW by more than twice the "
        "pooled standard error.\n\n"
        + markdown(["study", "AdamW's loss", *(f"`{name}`" for name in found)], rows)
    )


def rate_overview(variants: Sequence[tuple[str, Variant]]) -> str:
    """Writes the best rate of the methods that a user would choose, a row a comparison."""
    rows = []
    for study, variant in variants:
        found = [_find(variant, method) for method in CHOICES]
        if study not in OTHER_QUESTIONS and sum(summary is not None for summary in found) > 1:
            label = f"[{study}](results/{study}.md)" + f", {variant.name}" * bool(variant.name)
            rows.append([label, *(_rate(s) if s else NOTHING for s in found)])
    return markdown(["study", *(f"`{method}`" for method in CHOICES)], rows)


def _find(variant: Variant, method: str) -> MethodSummary | None:
    return next((s for s in variant.summaries if s.method == method and s.best), None)


def _cell(summary: MethodSummary | None, baseline: MethodSummary) -> str:
    if summary is None:
        return NOTHING
    split = baseline.reported_split
    rate, loss = _rate(summary), f"{statistics.mean(summary.losses(split)):.3g}"
    if summary is baseline:
        return f"{rate}: {loss}".replace(" ", NO_BREAK)
    verdict = difference(summary.losses(split), baseline.losses(split))
    sign = (" +" if verdict.value < 0 else " –") if verdict.claimed else ""
    return f"{rate}: {loss}{sign}".replace(" ", NO_BREAK)


def _rate(summary: MethodSummary) -> str:
    return f"{summary.best[0].config.learning_rate:g}" + r"\*" * summary.at_edge


def cost_table(page: Page) -> str:
    """Writes what the benchmarks measured of the page's methods, in Markdown."""
    steps = _rows("train_step_cpu.json") | _rows("train_step_peers_cpu.json")
    updates: dict[str, Any] = {}
    for file in ("update_step_polora.json", "update_step_r16_run1.json"):
        updates |= _rows(file)
    rows = []
    for name, method in {"LoRA AdamW": "adamw", **page.costs}.items():
        step, update = steps.get(method), updates.get(method)
        rows.append(
            [
                name,
                f"{step['ratio']:.2f}×" if step else NOTHING,
                f"{step['temporary_ratio']:.3f}×" if step else NOTHING,
                f"{step['params_mb']:.2f}" if step else NOTHING,
                f"{step['state_mb']:.2f}" if step else NOTHING,
                f"{update['ratio']:.2f}×" if update else NOTHING,
            ]
        )
    headings = ["", "training step", "its memory", "leaves, MB", "state, MB", "update alone"]
    return (
        "Against LoRA AdamW in the same process, on two CPU cores, r = 16; [how it was "
        "measured](../cost.md).\n\n" + markdown(headings, rows)
    )


def _rows(file: str) -> dict[str, Any]:
    rows = json.loads((BENCHMARKS / file).read_text())["rows"]
    return {r["method"]: r for r in rows if r.get("rank", 16) == 16}


def make_pages(variants: Sequence[tuple[str, Variant]]) -> dict[Path, str]:
    """Writes, in memory, the pages with their generated blocks."""
    overview = replace_block(GUIDE.read_text(), rate_overview(variants), str(GUIDE), "rates")
    pages = {GUIDE: overview}
    for name, page in PAGE_OF.items():
        path = PAGES / f"{name}.md"
        text = replace_block(path.read_text(), rate_table(page, variants), str(path), "rates")
        pages[path] = (
            replace_block(text, cost_table(page), str(path), "costs") if page.costs else text
        )
    return pages


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
        values, cosine = one_step(method, usual=page.gradient_start)
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
    shown = [s for s in (baseline, *(_find(variant, method) for method in methods)) if s]
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


def main() -> None:
    """Writes the tables and draws the figures, or checks the tables."""
    import jax

    parser = argparse.ArgumentParser(prog="python -m experiments.method_pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say what is not up to date")
    check = parser.parse_args().check
    variants = list(all_variants())
    pages = make_pages(variants)
    if check:
        wrong = [str(path) for path, text in pages.items() if path.read_text() != text]
        raise SystemExit(f"not up to date: {', '.join(wrong)}" if wrong else 0)
    write_pages(pages)
    with jax.enable_x64(True):
        for name, page in PAGE_OF.items():
            draw(page, variants, PAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
