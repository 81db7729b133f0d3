"""Runs a study: the sweep of every method, then the other seeds at its best learning rate.

What is to run next follows from the results that are there alone, so a study that was killed goes
on as if it had not been.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, suppress
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


OnProgress = Callable[[str, int, int], None]
"""Told the name of what is running, the steps done and the steps in all."""


class Job(NamedTuple):
    """All runs of one method in one variant of a study.

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


class Run(NamedTuple):
    """One run of a job.

    Attributes:
        learning_rate: Its learning rate.
        seed: Its seed.
    """

    learning_rate: float
    seed: int


def next_run(
    study: Study, method: str, results: Iterable[RunResult], running: Collection[Run] = ()
) -> Run | None:
    """Decides what a method's next run is.

    Args:
        study: One variant.
        method: Name of the method.
        results: The results of this method in this variant.
        running: Its runs whose results are not there yet.

    Returns:
        The run, or None if there is nothing left to run, or nothing before another one has ended.
    """
    losses = {Run(r.config.learning_rate, r.config.seed): r.validation_loss for r in results}
    first, *others = study.seeds
    planned = [Run(rate, first) for rate in study.learning_rates[method]]
    for run in planned:
        if run not in losses and run not in running:
            return run
    if any(run.seed == first for run in running):
        return None  # the best rate is not known yet
    rates = sorted(run.learning_rate for run in losses if run.seed == first)
    best = min(rates, key=lambda rate: losses[Run(rate, first)])
    if len(planned) > 1 and len(rates) - len(planned) < study.extensions:
        if best == rates[0]:
            return Run(_round(rates[1] / 10), first)
        if best == rates[-1]:
            return Run(_round(rates[-2] * 10), first)
    for seed in others:
        run = Run(best, seed)
        if run not in losses and run not in running:
            return run
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

    A worker stays with a method as long as there is something to run of it, then takes one that
    nobody works on, then helps another worker.

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

    def on_progress(label: str, done: int, total: int) -> None:
        if label not in lines:
            lines[label] = progress.add_task(label, total=total)
        progress.update(lines[label], completed=done, total=total, visible=done < total)

    def on_result(label: str, result: RunResult) -> None:
        progress.advance(overall)
        if result.status != "finished":
            why = f": {result.error}" if result.error else f" after {result.steps_done} steps"
            rate = f"lr {result.config.learning_rate:g} seed {result.config.seed}"
            progress.console.print(f"{label} {rate} {result.status}{why}")

    board = Board(jobs, on_result)
    if workers == 1:
        workshop, job = Workshop(), None
        while (assignment := board.assign(job)) is not None:
            job, run = assignment
            board.enter(job, run, workshop.run(job, run, on_progress))
    else:
        _run_in_processes(board, workers, on_progress)
    return board.all_results()


def _planned(jobs: list[Job]) -> int:
    per_method = (len(job.study.learning_rates[job.method]) + len(job.study.seeds) for job in jobs)
    return sum(per_method) - len(jobs)


def _stored(jobs: list[Job]) -> int:
    return sum(len(job.stored) for job in jobs)


class Board:
    """What has been run, what is running, and so what is next.

    Args:
        jobs: All jobs.
        on_result: Told a job's label and every new result of it.
    """

    def __init__(self, jobs: list[Job], on_result: Callable[[str, RunResult], None]) -> None:
        self._jobs = jobs
        self._results = [list(job.stored) for job in jobs]
        self._running: list[set[Run]] = [set() for _ in jobs]
        self._on_result = on_result

    def assign(self, last: Job | None) -> tuple[Job, Run] | None:
        """Takes the next run for a worker; None if there is none now.

        Args:
            last: The worker's last job, whose programs it has compiled.
        """

        def by_preference(index: int) -> tuple[bool, bool]:
            return self._jobs[index] is not last, bool(self._running[index])

        for index in sorted(range(len(self._jobs)), key=by_preference):
            job, running = self._jobs[index], self._running[index]
            run = next_run(job.study, job.method, self._results[index], running)
            if run is not None:
                running.add(run)
                return job, run
        return None

    def enter(self, job: Job, run: Run, result: RunResult) -> None:
        """Enters the result of a run that `assign` gave out."""
        index = next(i for i, each in enumerate(self._jobs) if each is job)
        self._running[index].remove(run)
        self._results[index].append(result)
        self._on_result(job.label, result)

    def all_results(self) -> list[RunResult]:
        """Returns the results of all jobs, reused ones included."""
        return [result for results in self._results for result in results]


class Workshop:
    """The last task, baseline and trainer of a process, which many runs share."""

    def __init__(self) -> None:
        self._task: tuple[Any, Task[Any]] | None = None
        self._baseline: tuple[Any, Trainer] | None = None
        self._trainer: tuple[Any, Trainer, float | None] | None = None

    def run(self, job: Job, run: Run, on_progress: OnProgress) -> RunResult:
        """Runs and writes one run of a job.

        Args:
            job: The job.
            run: Which of its runs.
            on_progress: Told of every step.
        """
        trainer, ratio = self._trainer_of(job, on_progress)
        label = f"{job.label} lr {run.learning_rate:g} seed {run.seed}"
        ended = trainer.run(*run, functools.partial(on_progress, label)).result
        result = ended.model_copy(update={"step_ratio": ratio})
        result.write(job.out)
        return result

    def _trainer_of(self, job: Job, on_progress: OnProgress) -> tuple[Trainer, float | None]:
        """The trainer, and its steps' time in units of the baseline's."""
        key = (job.study, job.variant, job.method, job.data_dir)
        if self._trainer is None or self._trainer[0] != key:
            is_baseline = job.method == BASELINE
            trainer = (
                self._baseline_of(job, on_progress) if is_baseline else self._make(job, on_progress)
            )
            _require_same_data(job, trainer.task)
            ratio = None
            if BASELINE in job.study.learning_rates:
                ratio = step_ratio(trainer, self._baseline_of(job, on_progress))
            self._trainer = key, trainer, ratio
        return self._trainer[1:]

    def _baseline_of(self, job: Job, on_progress: OnProgress) -> Trainer:
        key = (job.study, job.variant, job.data_dir)
        if self._baseline is None or self._baseline[0] != key:
            self._baseline = key, self._make(job._replace(method=BASELINE), on_progress)
        return self._baseline[1]

    def _make(self, job: Job, on_progress: OnProgress) -> Trainer:
        return Trainer(
            self._load(job, on_progress),
            job.method,
            job.study.plan,
            job.study.method_options.get(job.method),
            study=job.name,
            variant=job.variant,
        )

    def _load(self, job: Job, on_progress: OnProgress) -> Task[Any]:
        study = job.study
        key = (study.task, study.task_options, job.data_dir)
        if self._task is None or self._task[0] != key:
            on_step = functools.partial(on_progress, f"preparing {study.task}")
            on_step(0, 1)
            self._task = key, load_task(study.task, study.task_options, job.data_dir, on_step)
            on_step(1, 1)
        return self._task[1]


def _require_same_data(job: Job, task: Task[Any]) -> None:
    for result in job.stored:
        if result.config.data != task.data:
            raise ExperimentError(
                f"{job.out / result.config.file_name()} was made with other data "
                f"({result.config.data}, not {task.data}): pass --fresh to delete it, or "
                "another --out"
            )


def _run_in_processes(board: Board, workers: int, on_progress: OnProgress) -> None:
    # Spawned: JAX does not survive a fork. A pool of one process each, so that a job finds its way
    # back to the process that has compiled it.
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ExitStack() as open_pools:
        steps = manager.Queue()
        pools = [
            open_pools.enter_context(ProcessPoolExecutor(1, context, _settle, (share,)))
            for share in share_cores(workers)
        ]
        last: list[Job | None] = [None] * workers
        busy: dict[int, tuple[Job, Run, Future[RunResult]]] = {}
        while True:
            for worker in set(range(workers)) - set(busy):
                if (assignment := board.assign(last[worker])) is not None:
                    future = pools[worker].submit(_work, *assignment, steps)
                    last[worker] = assignment[0]
                    busy[worker] = *assignment, future
            _pass_on(steps, on_progress)
            if not busy:
                return
            for worker, (job, run, future) in list(busy.items()):
                if future.done():
                    board.enter(job, run, future.result())  # an error ends the others too
                    del busy[worker]


def _pass_on(steps: Any, on_progress: OnProgress) -> None:
    with suppress(Empty):
        on_progress(*steps.get(timeout=0.05))
        while True:
            on_progress(*steps.get_nowait())


def share_cores(workers: int) -> list[set[int]]:
    """Deals this process's cores out to workers; with more workers than cores, some share one.

    Empty sets where the system does not let a process choose its cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::workers]) or {cores[i % len(cores)]} for i in range(workers)]


def _settle(share: set[int]) -> None:
    """Keeps a worker, and the threads that JAX starts later, to its own cores."""
    if share:
        os.sched_setaffinity(0, share)


_WORKSHOP = Workshop()
"""Of this process, when it works for another."""


def _work(job: Job, run: Run, steps: Any) -> RunResult:
    return _WORKSHOP.run(job, run, lambda *step: steps.put(step))
