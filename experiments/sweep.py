"""Runs a study: the sweep of every method, then the other seeds at its best learning rate.

What is to run next follows from the results that are there alone, so a study that was killed goes
on as if it had not been.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

from rich.progress import Progress

from experiments.errors import ExperimentError
from experiments.schema import RunResult, read_result
from experiments.study import Study
from experiments.tasks import load_task, parse_options
from experiments.tasks.base import Task
from experiments.trainer import Trainer, step_ratio

BASELINE = "adamw"
"""The method whose steps all others are timed against."""


class Job(NamedTuple):
    """All runs of one method in one variant of a study, one process's work.

    Attributes:
        name: Name of the study.
        variant: Name of the variant.
        study: The variant.
        method: Name of the method.
        data_dir: Where the data are.
        out: Folder of the results.
        stored: Results that are there already.
    """

    name: str
    variant: str
    study: Study
    method: str
    data_dir: Path | None
    out: Path
    stored: tuple[RunResult, ...]

    @property
    def label(self) -> str:
        """The job's name on the screen."""
        return f"{self.variant} {self.method}".strip()


class Listener(NamedTuple):
    """Who is told how far the jobs are: of steps within a run, and of every result."""

    on_step: Callable[[str, int, int], None]
    on_result: Callable[[str, RunResult], None]


def next_run(study: Study, method: str, results: Iterable[RunResult]) -> tuple[float, int] | None:
    """Decides what a method's next run is.

    Args:
        study: One variant.
        method: Name of the method.
        results: The results of this method in this variant.

    Returns:
        Learning rate and seed, or None if there is nothing left to run.
    """
    losses = {(r.config.learning_rate, r.config.seed): r.validation_loss for r in results}
    first, *others = study.seeds
    planned = study.learning_rates[method]
    for rate in planned:
        if (rate, first) not in losses:
            return rate, first
    rates = sorted(rate for rate, seed in losses if seed == first)
    best = min(rates, key=lambda rate: losses[rate, first])
    if len(planned) > 1 and len(rates) - len(planned) < study.extensions:
        if best == rates[0]:
            return _round(rates[1] / 10), first
        if best == rates[-1]:
            return _round(rates[-2] * 10), first
    for seed in others:
        if (best, seed) not in losses:
            return best, seed
    return None


def _round(rate: float) -> float:
    return float(f"{rate:.3g}")


def read_results(folder: Path) -> list[RunResult]:
    """Reads all results of a folder, in the order of their names; none if it does not exist."""
    return [read_result(path) for path in sorted(folder.glob("*.json"))]


def plan_jobs(
    name: str,
    parts: Mapping[str, Study],
    data_dir: Path | None,
    out: Path,
    *,
    resume: bool,
    fresh: bool,
) -> list[Job]:
    """Lays out the work, with the results that are there already.

    Args:
        name: Name of the study.
        parts: Its variants.
        data_dir: Where the data are.
        out: Folder of the results.
        resume: Whether results that are there count; only failed runs are repeated.
        fresh: Whether results that are there are deleted.

    Raises:
        ExperimentError: There are results, and neither is asked for; or they are unreadable, or of
            other settings.
    """
    found = read_results(out)
    jobs = []
    for variant, study in parts.items():
        for method in study.learning_rates:
            mine = [r for r in found if (r.config.variant, r.config.method) == (variant, method)]
            if mine and not (resume or fresh):
                raise ExperimentError(
                    f"{out} holds {len(mine)} results of {method!r}: pass --resume to go on from "
                    "them, --fresh to delete them, or another --out"
                )
            for result in mine:
                if fresh:
                    (out / result.config.file_name()).unlink()
                else:
                    _require_same_settings(result, name, study, out)
            kept = () if fresh else tuple(r for r in mine if r.status != "failed")
            jobs.append(Job(name, variant, study, method, data_dir, out, kept))
    return jobs


def _require_same_settings(result: RunResult, name: str, study: Study, out: Path) -> None:
    config = result.config
    options = parse_options(study.task, study.task_options).model_dump(mode="json")
    expected = {"study": name, "task": study.task, "task_options": options, "plan": study.plan}
    for key, value in expected.items():
        there = getattr(config, key)
        if there != value:
            raise ExperimentError(
                f"{out / config.file_name()} has another {key} than this run ({there}, not "
                f"{value}): pass --fresh to delete it, or another --out"
            )


def run_jobs(jobs: list[Job], workers: int, progress: Progress) -> list[RunResult]:
    """Runs what is not there yet, one JSON file a run.

    Args:
        jobs: What to run.
        workers: How many processes; 1 for this one.
        progress: Where to show how far it is.

    Returns:
        The results of all runs, reused ones included.

    Raises:
        ExperimentError: Data or weights are missing, or `out` cannot be written.
    """
    overall = progress.add_task("all runs", total=_planned(jobs), completed=_stored(jobs))
    lines = {}

    def on_step(label: str, done: int, total: int) -> None:
        if label not in lines:
            lines[label] = progress.add_task(label, total=total)
        progress.update(lines[label], completed=done, total=total, visible=done < total)

    def on_result(label: str, result: RunResult) -> None:
        progress.advance(overall)
        if result.status != "finished":
            why = f": {result.error}" if result.error else f" after {result.steps_done} steps"
            rate = f"lr {result.config.learning_rate:g} seed {result.config.seed}"
            progress.console.print(f"{label} {rate} {result.status}{why}")

    listener = Listener(on_step, on_result)
    if workers == 1:
        workshop = Workshop()
        return [result for job in jobs for result in run_job(job, listener, workshop)]
    return _run_in_processes(jobs, workers, listener)


def _planned(jobs: list[Job]) -> int:
    per_method = (len(job.study.learning_rates[job.method]) + len(job.study.seeds) for job in jobs)
    return sum(per_method) - len(jobs)


def _stored(jobs: list[Job]) -> int:
    return sum(len(job.stored) for job in jobs)


class Workshop:
    """The last task and the last baseline of a process, which many jobs share."""

    def __init__(self) -> None:
        self._task: tuple[Any, Task[Any]] | None = None
        self._baseline: tuple[Any, Trainer] | None = None

    def trainer(self, job: Job, listener: Listener) -> Trainer:
        """Returns a job's trainer."""
        return self.baseline(job, listener) if job.method == BASELINE else self._make(job, listener)

    def baseline(self, job: Job, listener: Listener) -> Trainer:
        """Returns the trainer of the baseline in the variant of a job."""
        key = (job.study, job.variant, job.data_dir)
        if self._baseline is None or self._baseline[0] != key:
            self._baseline = key, self._make(job._replace(method=BASELINE), listener)
        return self._baseline[1]

    def _make(self, job: Job, listener: Listener) -> Trainer:
        return Trainer(
            self._load(job, listener),
            job.method,
            job.study.plan,
            job.study.method_options.get(job.method),
            study=job.name,
            variant=job.variant,
        )

    def _load(self, job: Job, listener: Listener) -> Task[Any]:
        study = job.study
        key = (study.task, study.task_options, job.data_dir)
        if self._task is None or self._task[0] != key:
            on_step = functools.partial(listener.on_step, f"preparing {study.task}")
            on_step(0, 1)
            self._task = key, load_task(study.task, study.task_options, job.data_dir, on_step)
            on_step(1, 1)
        return self._task[1]


def run_job(job: Job, listener: Listener, workshop: Workshop) -> list[RunResult]:
    """Runs what is left of one job.

    Args:
        job: The job.
        listener: Told of every step and result.
        workshop: Where task and trainer come from.

    Returns:
        The job's results, reused ones included.
    """
    results = list(job.stored)
    trainer: Trainer | None = None
    ratio = None
    while (coming := next_run(job.study, job.method, results)) is not None:
        rate, seed = coming
        if trainer is None:
            trainer = workshop.trainer(job, listener)
            _require_same_data(job, trainer.task)
            if BASELINE in job.study.learning_rates:
                ratio = step_ratio(trainer, workshop.baseline(job, listener))
        label = f"{job.label} lr {rate:g} seed {seed}"
        result = trainer.run(rate, seed, functools.partial(listener.on_step, label)).result
        result = result.model_copy(update={"step_ratio": ratio})
        result.write(job.out)
        results.append(result)
        listener.on_result(job.label, result)
    return results


def _require_same_data(job: Job, task: Task[Any]) -> None:
    for result in job.stored:
        if result.config.data != task.data:
            raise ExperimentError(
                f"{job.out / result.config.file_name()} was made with other data "
                f"({result.config.data}, not {task.data}): pass --fresh to delete it, or "
                "another --out"
            )


def _run_in_processes(jobs: list[Job], workers: int, listener: Listener) -> list[RunResult]:
    # Spawned: JAX does not survive a fork.
    context = multiprocessing.get_context("spawn")
    tell: dict[str, Callable[..., None]] = {
        "step": listener.on_step,
        "result": listener.on_result,
    }
    with context.Manager() as manager:
        shares = manager.Queue()
        for share in share_cores(workers):
            shares.put(share)
        with ProcessPoolExecutor(workers, context, _settle, (shares,)) as pool:
            events = manager.Queue()
            futures = [pool.submit(_work, job, events) for job in jobs]
            try:
                while not all(future.done() for future in futures) or not events.empty():
                    with suppress(Empty):
                        kind, arguments = events.get(timeout=0.2)
                        tell[kind](*arguments)
                    for future in futures:
                        if future.done():
                            future.result()  # an error ends the others too
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return [result for future in futures for result in future.result()]


def share_cores(workers: int) -> list[set[int]]:
    """Deals this process's cores out to workers; with more workers than cores, some share one.

    Empty sets where the system does not let a process choose its cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::workers]) or {cores[i % len(cores)]} for i in range(workers)]


def _settle(shares: Any) -> None:
    """Keeps a worker, and the threads that JAX starts later, to its own cores."""
    if share := shares.get():
        os.sched_setaffinity(0, share)


_WORKSHOP = Workshop()
"""Of this process, when it works for another."""


def _work(job: Job, events: Any) -> list[RunResult]:
    listener = Listener(
        lambda *arguments: events.put(("step", arguments)),
        lambda *arguments: events.put(("result", arguments)),
    )
    return run_job(job, listener, _WORKSHOP)
