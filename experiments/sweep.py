"""Runs a study: the sweep of every method, then the other seeds at its best learning rate."""

from pathlib import Path
from typing import Any

from rich.progress import Progress

from experiments.schema import RunResult, read_result
from experiments.study import Study
from experiments.tasks.base import Task
from experiments.trainer import Trainer


def run_study(
    study: Study, task: Task[Any], out: Path, *, fresh: bool, progress: Progress
) -> list[RunResult]:
    """Runs what is not there yet, one JSON file a run.

    Args:
        study: What to run.
        task: The study's task, loaded.
        out: Folder of the results. A finished or diverged run found there is reused.
        fresh: Whether to run, and to overwrite, what is there already.
        progress: Where to show how far it is.

    Returns:
        The results of all runs of the study, reused ones included.

    Raises:
        ExperimentError: A result in `out` is unreadable, or `out` cannot be written.
    """
    overall = progress.add_task("all runs", total=study.runs())
    current = progress.add_task("", total=study.plan.steps)
    results: list[RunResult] = []
    reused = 0

    def one(trainer: Trainer, learning_rate: float, seed: int) -> RunResult:
        nonlocal reused
        config = trainer.config(learning_rate, seed)
        path = out / config.file_name()
        label = f"{config.method} lr {learning_rate:g} seed {seed}"
        progress.update(current, description=label, completed=0)
        stored = read_result(path) if path.exists() and not fresh else None
        if stored is not None and stored.status != "failed":
            reused += 1
            result = stored
        else:
            result = trainer.run(
                learning_rate, seed, lambda done, total: progress.update(current, completed=done)
            ).result
            result.write(out, replace=fresh or stored is not None)
            if result.status != "finished":
                why = f": {result.error}" if result.error else f" after {result.steps_done} steps"
                progress.console.print(f"{label} {result.status}{why}")
        results.append(result)
        progress.advance(overall)
        return result

    first, *others = study.seeds
    for method, rates in study.learning_rates.items():
        trainer = Trainer(task, method, study.plan)
        sweep = [one(trainer, rate, first) for rate in rates]
        best = min(sweep, key=lambda result: result.validation_loss)
        for seed in others:
            one(trainer, best.config.learning_rate, seed)
    if reused:
        progress.console.print(
            f"Reused {reused} of {len(results)} runs found in {out}; "
            "--fresh runs them again, another --out keeps both."
        )
    return results
