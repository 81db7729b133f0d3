"""What the commands of `python -m experiments` do, `list` excepted, which has to be quick."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.adapters import WholeModel
from experiments.errors import ExperimentError
from experiments.figures import draw_variant
from experiments.methods import get_method
from experiments.peers import peers
from experiments.report import check_pages, draw_pages, make_pages, write_pages
from experiments.schema import RunResult
from experiments.study import expand, load_study, parse_overrides, select, with_task
from experiments.summary import summarize
from experiments.sweep import Job, plan_jobs, without_adapter
from experiments.tables import screen_table
from experiments.tasks import check_task, require_model_option
from experiments.workers import run_jobs

console = Console()

COLUMNS = (
    TextColumn("{task.description:40}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
"""Of a progress bar."""

DEMONSTRATED = ["adamw", "polora-start", "altlora-plus-simultaneous", "sds-lora"]

DEMO = {"seeds": (0, 1, 2), "learning_rates": peers(adamw=1e-2, polora=0.3, count=3)}
"""Less than the study, so that the demo takes minutes."""


def demo(*, out: Path | None, quick: bool, fresh: bool) -> None:
    """Adapts a small ViT to new digits: AdamW, PoLoRA, AltLoRA+ and SDS-LoRA."""
    file = load_study("digits")
    parts = expand(file.study, file.smoke if quick else DEMO, ["peers"])
    parts = {name: select(study, DEMONSTRATED, []) for name, study in parts.items()}
    folder = out or Path("outputs/demo")
    jobs = plan_jobs(file.name, parts, None, folder, resume=not fresh, fresh=fresh)
    _run(file.name, jobs, folder, workers=1)


def run(
    *,
    study: str,
    task: str | None,
    model: str | None,
    data_dir: Path | None,
    out: Path | None,
    smoke: bool,
    jobs: int,
    resume: bool,
    fresh: bool,
    save_adapter: bool,
    variant: list[str],
    method: list[str],
    learning_rate: list[float],
    steps: int | None,
    seed: list[int],
    override: list[str],
) -> None:
    """Runs a study, one JSON file a run, and shows what came out."""
    file = load_study(study)
    base = file.study if task is None else with_task(file.study, task)
    changes: dict[str, Any] = dict(file.smoke) if smoke else {}
    changes |= parse_overrides(override)
    if steps is not None:
        changes["plan.steps"] = steps
    if seed:
        changes["seeds"] = seed
    if model is not None:
        require_model_option(base.task)
        changes["task_options.model"] = model
    parts = expand(base, changes, variant)
    chosen = {name: select(part, method, learning_rate) for name, part in parts.items()}
    for part in chosen.values():
        check_task(part.task, part.task_options)
    folder = out or Path("outputs") / study
    planned = plan_jobs(
        study,
        chosen,
        data_dir,
        folder,
        resume=resume,
        fresh=fresh,
        save_adapter=save_adapter,
    )
    if save_adapter:
        _tell_of_adapters(planned, folder)
    _run(study, planned, folder, workers=jobs)


def pretrain(
    *,
    data_dir: Path | None,
    out: Path | None,
    width: int,
    depth: int,
    steps: int,
    learning_rate: float | None,
    batch_size: int,
) -> None:
    """Pretrains a small decoder on books, and writes it in the Hugging Face form."""
    # Here, for the other commands do without a tokenizer.
    from experiments.decoder import make_decoder, require_no_folder
    from experiments.tasks.books import Books, BooksOptions

    sizes: dict[str, Any] = {"width": width, "depth": depth, "batch_size": batch_size}
    check_task(Books.name, sizes)
    folder = out or Path("build/decoders") / f"w{width}"
    rate = 0.4 / width if learning_rate is None else learning_rate
    require_no_folder(folder)
    task = Books(BooksOptions(**sizes), data_dir)
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task(f"decoder of width {width}", total=steps)
        result = make_decoder(
            task,
            folder,
            steps=steps,
            learning_rate=rate,
            on_step=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    loss = result.final["test"].loss
    console.print(
        f"{folder}: {result.trainable_parameters:,} parameters, test loss {loss:.3f} nats a token, "
        f"{result.wall_seconds:.0f} s"
    )


def _tell_of_adapters(jobs: list[Job], out: Path) -> None:
    whole = {job.method for job in jobs if isinstance(get_method(job.method).adapters, WholeModel)}
    for name in sorted(whole):
        console.print(f"{name} has no adapters: its files hold all the weights that it trains")
    if lacking := without_adapter(jobs):
        names = ", ".join(path.name for path in lacking)
        console.print(
            f"{len(lacking)} results in {out} have no adapter and are not run again; move them "
            f"away for that: {names}",
            soft_wrap=True,
        )


def report(*, check: bool, results: Path, docs: Path, readme: Path) -> None:
    """Writes tables and figures of the stored results into the documentation."""
    if not results.is_dir():
        raise ExperimentError(f"{results} does not exist; run a study with --out {results}/STUDY")
    pages = make_pages(results, docs, readme)
    if check:
        wrong = check_pages(pages)
        if wrong:
            raise ExperimentError("; ".join(wrong) + ": run `python -m experiments report`")
        console.print(f"{len(pages)} pages follow from the results")
        return
    changed = write_pages(pages)
    figures = draw_pages(results, docs)
    console.print(f"{len(changed)} of {len(pages)} pages changed, {len(figures)} figures drawn")


def _run(name: str, jobs: list[Job], out: Path, *, workers: int) -> None:
    begin = time.perf_counter()
    with Progress(*COLUMNS, console=console) as progress:
        results = run_jobs(jobs, workers, progress)
    by_variant: dict[str, list[RunResult]] = {}
    for result in results:
        by_variant.setdefault(result.config.variant, []).append(result)
    for variant, runs in by_variant.items():
        summaries = summarize(runs)
        title = f"{name} {variant}".strip() + f": {runs[0].config.plan.steps} steps"
        console.print(screen_table(summaries, title))
        draw_variant(summaries, title, out / f"{variant or name}.png")
    console.print(f"{len(results)} results in {out} after {time.perf_counter() - begin:.0f} s")
