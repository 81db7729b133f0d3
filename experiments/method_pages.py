"""Figures and tables of the methods' pages, and the guide's: `python -m experiments.method_pages`.

The tables come from the committed results of the studies and benchmarks.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.hunt import is_attempt
from experiments.method_figures import draw, find
from experiments.pages import CHOICES, PAGE_OF, Page
from experiments.report import Variant, read_variants, replace_block, write_pages
from experiments.study import load_study, study_names
from experiments.summary import MethodSummary, difference, tuned_baseline
from experiments.tables import NOTHING, markdown

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "methods"
GUIDE = ROOT / "docs" / "choosing.md"
NO_BREAK = "\u00a0"
OTHER_QUESTIONS = {"conditioning", "mechanism", "mechanism-glue"}
RESULTS = ROOT / "experiments" / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"


def all_variants() -> Iterator[tuple[str, Variant]]:
    """Yields the variants of the studies that have an AdamW to compare with, by study."""
    for name in study_names():
        if (RESULTS / name).is_dir():
            for variant in read_variants(load_study(name), RESULTS):
                if not is_attempt(variant.name) and tuned_baseline(variant.summaries):
                    yield name, variant


def rate_table(page: Page, variants: Sequence[tuple[str, Variant]]) -> str:
    """Writes each method's best rate and final loss, a row a comparison, in Markdown."""
    rows, found = [], [m for m in page.methods if any(find(v, m) for _, v in variants)]
    for study, variant in variants:
        if study in OTHER_QUESTIONS:
            continue
        baseline = tuned_baseline(variant.summaries)
        mine = [find(variant, method) for method in found]
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
        found = [find(variant, method) for method in CHOICES]
        if study not in OTHER_QUESTIONS and sum(summary is not None for summary in found) > 1:
            label = f"[{study}](results/{study}.md)" + f", {variant.name}" * bool(variant.name)
            rows.append([label, *(_rate(s) if s else NOTHING for s in found)])
    return markdown(["study", *(f"`{method}`" for method in CHOICES)], rows)


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
    steps = _rows("train_step_others_cpu", "train_step_peers_cpu", "train_step_cpu")
    updates = _rows("update_step_others", "update_step_polora", "update_step_r16_run1")
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


def _rows(*files: str) -> dict[str, Any]:
    """Returns the rows of benchmarks by method; where several have it, the last one's."""
    records = [json.loads((BENCHMARKS / f"{file}.json").read_text()) for file in files]
    rows = [row for record in records for row in record["rows"]]
    return {row["method"]: row for row in rows if row.get("rank", 16) == 16}


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
