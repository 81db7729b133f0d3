"""The command line: `python -m experiments demo | list | run STUDY | report`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.errors import ExperimentError
from experiments.figures import draw_variant
from experiments.methods import METHODS
from experiments.report import check_pages, draw_pages, make_pages, write_pages
from experiments.schema import RunResult
from experiments.study import expand, load_study, parse_overrides, select, study_names, with_task
from experiments.summary import summarize
from experiments.sweep import Job, plan_jobs
from experiments.tables import screen_table
from experiments.workers import run_jobs

app = typer.Typer(
    help="Fine-tuning experiments with LoRA optimizers.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()

DEMONSTRATED = ["adamw", "polora-start", "altlora-plus-simultaneous", "sds-lora"]

OutOption = Annotated[Path | None, typer.Option(help="Folder for results and figure.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the results that are there.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Delete the results that are there, and begin anew.")
]


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Shows an `ExperimentError` as one message, without a traceback, and exits with status 2."""
    try:
        yield
    except ExperimentError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def demo(
    out: OutOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short version, for CI.")] = False,
    fresh: FreshOption = False,
) -> None:
    """Adapts a small ViT to new digits: AdamW, PoLoRA, AltLoRA+ and SDS-LoRA."""
    with _clear_errors():
        file = load_study("digits")
        parts = expand(file.study, file.smoke if quick else {"seeds": (0, 1, 2)}, ["peers"])
        parts = {name: select(study, DEMONSTRATED, []) for name, study in parts.items()}
        folder = out or Path("outputs/demo")
        jobs = plan_jobs(file.name, parts, None, folder, resume=not fresh, fresh=fresh)
        _run(file.name, jobs, folder, workers=1)


@app.command(name="list")
def list_all() -> None:
    """Lists the studies and the methods."""
    console.print("[bold]Studies[/bold]  (python -m experiments run STUDY)")
    for name in study_names():
        summary = load_study(name).description.splitlines()[0]
        console.print(f"  {name:28}{summary}", highlight=False, soft_wrap=True)
    console.print("[bold]Methods[/bold]  (--method)")
    for name, method in METHODS.items():
        console.print(f"  {name:28}{method.summary}", highlight=False)


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="Name of a study; `list` shows them.")],
    *,
    task: Annotated[
        str | None, typer.Option(help="Another task than the study's, with its own defaults.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name on the Hugging Face hub, or a folder.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder that holds the data sets: `mnist`, `sst2`, …")
    ] = None,
    out: OutOption = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps, to see it work.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that work side by side.")] = 1,
    resume: ResumeOption = False,
    fresh: FreshOption = False,
    variant: Annotated[list[str] | None, typer.Option(help="Only this; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this; repeatable.")] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="In place of the sweep; repeatable.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Same as --override plan.steps=N.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="In place of the seeds.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--override", help="key=value, e.g. task_options.rank=4; repeatable."),
    ] = None,
) -> None:
    """Runs a study, one JSON file a run, and shows what came out."""
    with _clear_errors():
        file = load_study(study)
        base = file.study if task is None else with_task(file.study, task)
        changes: dict[str, Any] = dict(file.smoke) if smoke else {}
        changes |= parse_overrides(overrides or [])
        if steps is not None:
            changes["plan.steps"] = steps
        if seed:
            changes["seeds"] = seed
        if model is not None:
            changes["task_options.model"] = model
        parts = expand(base, changes, variant or [])
        chosen = {
            name: select(part, method or [], learning_rate or []) for name, part in parts.items()
        }
        folder = out or Path("outputs") / study
        planned = plan_jobs(study, chosen, data_dir, folder, resume=resume, fresh=fresh)
        _run(study, planned, folder, workers=jobs)


@app.command()
def report(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the pages are not up to date.")
    ] = False,
    results: Annotated[
        Path, typer.Option(help="Folder with one folder of results a study.")
    ] = Path("experiments/results"),
    docs: Annotated[Path, typer.Option(help="Folder of the pages.")] = Path("docs/results"),
    readme: Annotated[Path, typer.Option(help="File with the markers.")] = Path("README.md"),
) -> None:
    """Writes tables and figures of the stored results into the documentation."""
    with _clear_errors():
        if not results.is_dir():
            raise ExperimentError(
                f"{results} does not exist; run a study with --out {results}/STUDY"
            )
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
    columns = (
        TextColumn("{task.description:40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
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


if __name__ == "__main__":
    app()
