"""What is to run of a study: the sweep of every method, then the other seeds at its best rate.

It follows from the results that are there alone, so a study that was killed goes on as if it had
not been.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.errors import ExperimentError
from experiments.schema import RunResult, read_result
from experiments.start import options_of, parse_start
from experiments.study import Study
from experiments.tasks import parse_options


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
        beside: A result of the variant, by any method: its data are what all are to have.
        save_adapter: Whether every run writes its adapter too, see `experiments.adapter_file`.
    """

    name: str
    variant: str
    study: Study
    method: str
    data_dir: Path | None
    out: Path
    stored: tuple[RunResult, ...]
    beside: RunResult | None = None
    save_adapter: bool = False

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


class Ahead(NamedTuple):
    """What a method has still to run, as far as its results say.

    Attributes:
        runs: What is known, and may run side by side.
        later: How many follow, if these leave the best rate where it is and the sweep as it is.
    """

    runs: list[Run]
    later: int

    @property
    def total(self) -> int:
        """How many runs these are."""
        return len(self.runs) + self.later


def look_ahead(study: Study, method: str, results: Iterable[RunResult]) -> Ahead:
    """Decides what a method has still to run.

    Args:
        study: One variant.
        method: Name of the method.
        results: The results of this method in this variant.
    """
    losses = {Run(r.config.learning_rate, r.config.seed): r.validation_loss for r in results}
    first = study.first_seeds
    planned = study.learning_rates[method]
    swept = {run.learning_rate for run in losses if run.seed == first[0]}
    rates = sorted(swept.union(planned))

    def total(rate: float) -> float:
        return sum(losses.get(Run(rate, seed), math.inf) for seed in first)

    best = min(rates, key=total)
    rest = [run for seed in study.seeds if (run := Run(best, seed)) not in losses]
    later = sum(run.seed not in first for run in rest)
    if missing := [run for rate in rates for s in first if (run := Run(rate, s)) not in losses]:
        return Ahead(missing, later)
    if len(planned) > 1 and len(rates) - len(planned) < study.extensions:
        if best == rates[0]:
            return Ahead([Run(_beyond(rates[1], rates[0]), s) for s in first], later)
        if best == rates[-1]:
            return Ahead([Run(_beyond(rates[-2], rates[-1]), s) for s in first], later)
    return Ahead(rest, 0)


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
    runs = look_ahead(study, method, results).runs
    return next((run for run in runs if run not in running), None)


def _beyond(inner: float, end: float) -> float:
    """The rate beyond an end of a sweep: on the grid 1, 3, 10, … if factors are about 3."""
    step = end / inner
    is_fine = 1 / 5 < step < 5
    return float(f"{inner * (10 if step > 1 else 0.1) if is_fine else end * step:.3g}")


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
    save_adapter: bool = False,
) -> list[Job]:
    """Lays out the work, with the results that are there already.

    Args:
        name: Name of the study.
        parts: Its variants.
        data_dir: Where the data are.
        out: Folder of the results.
        resume: Whether results that are there count; only failed runs are repeated.
        fresh: Whether results that are there are deleted, with their adapters.
        save_adapter: Whether every run writes its adapter too.

    Raises:
        ExperimentError: There are results, and neither is asked for, or both are; or they are
            unreadable, or of other settings; or a method's adapter cannot be saved.
    """
    if resume and fresh:
        raise ExperimentError(
            "--resume goes on from the results that are there and --fresh deletes them: pass one "
            "of the two; nothing was deleted"
        )
    if save_adapter:
        for study in parts.values():
            for method in study.learning_rates:
                _require_fixed_kernels(study, method)
    found = read_results(out)
    jobs = []
    for variant, study in parts.items():
        swept = study.learning_rates if fresh else ()
        beside = [
            r
            for r in found
            if r.config.variant == variant and r.config.method not in swept and r.status != "failed"
        ]
        require_same_data(beside, out)
        for method in study.learning_rates:
            mine = [r for r in found if (r.config.variant, r.config.method) == (variant, method)]
            if mine and not (resume or fresh):
                raise ExperimentError(
                    f"{out} holds {len(mine)} results of {method!r}: pass --resume to go on from "
                    "them, --fresh to delete them, or another --out"
                )
            for result in mine:
                if fresh:
                    path = out / result.config.file_name()
                    path.unlink()
                    adapter_path(path).unlink(missing_ok=True)
                else:
                    _require_same_settings(result, name, study, out)
            kept = () if fresh else tuple(r for r in mine if r.status != "failed")
            one = beside[0] if beside else None
            jobs.append(Job(name, variant, study, method, data_dir, out, kept, one, save_adapter))
    return jobs


def adapter_path(result: Path) -> Path:
    """Returns where a run's adapter is, by the file of its result."""
    return result.with_suffix(".safetensors")


def without_adapter(jobs: Iterable[Job]) -> list[Path]:
    """Returns the stored results of finished runs that have no adapter beside them."""
    paths = [
        job.out / result.config.file_name()
        for job in jobs
        for result in job.stored
        if result.status == "finished"
    ]
    return [path for path in paths if not adapter_path(path).exists()]


def _require_fixed_kernels(study: Study, method: str) -> None:
    start = options_of(method, study.method_options.get(method, {})).get("start")
    if start is not None and parse_start(start).keep_function:
        raise ExperimentError(
            f"--save-adapter: the start of {method!r} corrects the kernels, so its adapter does "
            f"not fit the pretrained model; pass --override 'method_options.{method}={{...}}' with "
            "a start whose keep_function is false, or leave the method out with --method"
        )


def _require_same_settings(result: RunResult, name: str, study: Study, out: Path) -> None:
    if found := other_setting(result, name, study):
        raise ExperimentError(
            f"{out / result.config.file_name()} has another {found}: pass --fresh to delete it, "
            "or another --out"
        )


def other_setting(result: RunResult, name: str, study: Study) -> str:
    """Says which setting of a result is not the study's; empty if all are.

    Args:
        result: The result.
        name: Name of the study.
        study: The variant that the result is of.
    """
    config = result.config
    options = parse_options(study.task, study.task_options).model_dump(mode="json")
    expected = {
        "study": name,
        "task": study.task,
        "task_options": options,
        "method_options": options_of(config.method, study.method_options.get(config.method, {})),
        "plan": study.plan,
    }
    for key, value in expected.items():
        there = getattr(config, key)
        if there != value:
            return f"{key} than the study ({there}, not {value})"
    return ""


def require_same_data(results: Sequence[RunResult], folder: Path) -> None:
    """Refuses a comparison of runs on different data, or from different pretrained weights.

    Args:
        results: Results of one variant.
        folder: Where they are.

    Raises:
        ExperimentError: Two of them differ.
    """
    for result in results:
        if result.config.data != results[0].config.data:
            raise ExperimentError(
                f"{folder / result.config.file_name()} was made with other data than "
                f"{results[0].config.file_name()} ({result.config.data}, not "
                f"{results[0].config.data}): move away or delete (--fresh) the older ones"
            )


class Board:
    """What has been run, what is running, and so what is next.

    Args:
        jobs: All jobs.
        on_result: Told every new result and the job that it is of.
    """

    def __init__(self, jobs: list[Job], on_result: Callable[[Job, RunResult], None]) -> None:
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
        self._on_result(job, result)

    def expected(self) -> int:
        """Returns how many results there will be if no sweep grows further than is known now."""
        ahead = (
            look_ahead(job.study, job.method, results).total
            for job, results in zip(self._jobs, self._results, strict=True)
        )
        return len(self.all_results()) + sum(ahead)

    def all_results(self) -> list[RunResult]:
        """Returns the results of all jobs, reused ones included."""
        return [result for results in self._results for result in results]
