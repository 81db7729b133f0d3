"""Who runs a study: this process, or several that share its cores."""

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from queue import Empty
from typing import Any

from flax import nnx
from rich.progress import Progress, TaskID

from experiments.adapter_file import require_no_file, save_adapter
from experiments.errors import ExperimentError
from experiments.schema import RunResult
from experiments.sweep import Board, Job, Run, adapter_path
from experiments.task import Task
from experiments.tasks import load_task
from experiments.trainer import Trainer, step_ratio

BASELINE = "adamw"
"""The method whose steps all others are timed against."""

OnProgress = Callable[[str, int, int], None]
"""Told the name of what is running, the steps done and the steps in all."""


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
    overall = progress.add_task("all runs")
    lines: dict[str, TaskID] = {}
    ended: set[str] = set()

    def on_progress(label: str, done: int, total: int) -> None:
        if label in ended:
            return  # another process's last steps may come after its result
        if label not in lines:
            lines[label] = progress.add_task(label, total=total)
        progress.update(lines[label], completed=done, total=total, visible=done < total)

    def count() -> None:
        progress.update(overall, completed=len(board.all_results()), total=board.expected())

    def on_result(job: Job, result: RunResult) -> None:
        label = _label(job, Run(result.config.learning_rate, result.config.seed))
        ended.add(label)
        if label in lines:  # it diverged or failed before its last step
            progress.update(lines[label], visible=False)
        if result.status != "finished":
            why = f" after {result.steps_done} steps"
            if result.error:
                why = f": {result.error}; --resume runs it again"
            progress.console.print(f"{label} {result.status}{why}")
        count()

    board = Board(jobs, on_result)
    count()
    if workers == 1:
        workshop, job = Workshop(), None
        while (assignment := board.assign(job)) is not None:
            job, run = assignment
            board.enter(job, run, workshop.run(job, run, on_progress))
    else:
        _run_in_processes(board, workers, on_progress)
    return board.all_results()


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
        path = adapter_path(job.out / trainer.config(*run).file_name())
        if job.save_adapter:
            require_no_file(path)
        ended = trainer.run(*run, functools.partial(on_progress, _label(job, run)))
        result = ended.result.model_copy(update={"step_ratio": ratio})
        if job.save_adapter and result.status == "finished":
            trained = nnx.Any(trainer.task.head, trainer.method.adapters.trained)
            save_adapter(path, ended.model, trained, result)  # first: a result says all is there
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


def _label(job: Job, run: Run) -> str:
    """The run's name on the screen."""
    return f"{job.label} lr {run.learning_rate:g} seed {run.seed}"


def _require_same_data(job: Job, task: Task[Any]) -> None:
    there = job.beside
    if there is not None and there.config.data != task.data:
        raise ExperimentError(
            f"{job.out / there.config.file_name()} was made with other data "
            f"({there.config.data}, not {task.data}): pass --fresh to delete the variant's "
            "results, or another --out"
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
                    board.enter(job, run, _result_of(future))  # an error ends the others too
                    del busy[worker]


def _result_of(future: Future[RunResult]) -> RunResult:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ExperimentError(
            "a worker was killed, which mostly means that memory ran out: what has finished is "
            "written; go on with --resume and fewer --jobs"
        ) from error


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
