"""The command line: `python -m experiments demo | list | run STUDY`."""

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
from experiments.methods import METHODS
from experiments.report import draw_figure, make_table, summarize
from experiments.study import (
    Study,
    StudyFile,
    load_study,
    override,
    parse_overrides,
    select,
    study_names,
)
from experiments.sweep import run_study
from experiments.tasks import load_task

app = typer.Typer(
    help="Fine-tuning experiments with LoRA optimizers.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()

OutOption = Annotated[Path | None, typer.Option(help="Folder for results and figure.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Overwrite results that are there.")]


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
    """Adapts a small ViT to new digits: AdamW against AltLoRA and AltLoRA+."""
    with _clear_errors():
        file = load_study("digits")
        study = override(file.study, file.smoke) if quick else file.study
        _run(file, study, None, out or Path("outputs/demo"), fresh=fresh)


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
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the task's data.")] = None,
    out: OutOption = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps, to see it work.")] = False,
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
    fresh: FreshOption = False,
) -> None:
    """Runs a study; runs whose results are in the output folder are not repeated."""
    with _clear_errors():
        file = load_study(study)
        changes: dict[str, Any] = dict(file.smoke) if smoke else {}
        changes |= parse_overrides(overrides or [])
        if steps is not None:
            changes["plan.steps"] = steps
        if seed:
            changes["seeds"] = seed
        chosen = select(override(file.study, changes), method or [], learning_rate or [])
        _run(file, chosen, data_dir, out or Path("outputs") / study, fresh=fresh)


def _run(file: StudyFile, study: Study, data_dir: Path | None, out: Path, *, fresh: bool) -> None:
    begin = time.perf_counter()
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        preparing = progress.add_task(f"preparing {study.task}", total=None)
        task = load_task(
            study.task,
            study.task_options,
            data_dir,
            lambda done, total: progress.update(preparing, completed=done, total=total),
        )
        progress.update(preparing, completed=1, total=1)
        results = run_study(study, task, out, fresh=fresh, progress=progress)
    summaries = summarize(results)
    title = f"{file.name}: {study.plan.steps} steps"
    console.print(make_table(summaries, title))
    if any(summary.at_edge for summary in summaries):
        console.print("* an end of the sweep: learning rates beyond it may be better.")
    figure = out / f"{file.name}.png"
    draw_figure(summaries, title, figure)
    console.print(f"{len(results)} results and {figure} in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    app()
