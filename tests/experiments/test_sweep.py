import io
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

import experiments.workers
from experiments.errors import ExperimentError
from experiments.schema import Plan, RunResult
from experiments.study import Study, expand, load_study
from experiments.summary import summarize
from experiments.sweep import Board, next_run, plan_jobs, read_results
from experiments.tables import sweep_table
from experiments.workers import run_jobs, share_cores
from tests.experiments.samples import make_result
from tests.experiments.test_cli import invoke

ROOT = Path(__file__).parents[2]
STUDY = Study(
    task="digits",
    plan=Plan(steps=2, eval_every=2, head_learning_rate=1e-3),
    learning_rates={"adamw": (0.01, 0.03, 0.1)},
    seeds=(0, 5),
    extensions=2,
)
TIMES: Any = {
    "curve": {"__all__": {"seconds"}},
    "best": {"seconds"},
    **dict.fromkeys(["compile_seconds", "wall_seconds", "median_step_seconds", "step_ratio"], True),
}
SMOKE = ["run", "linear", "--smoke", "--variant=stochastic"]


def trace(losses):
    """Runs a study whose runs end at given losses by learning rate, and returns what ran."""
    results, ran = [], []
    while (coming := next_run(STUDY, "adamw", results)) is not None:
        assert len(ran) < 20
        ran.append(coming)
        loss = losses.get(coming[0])
        status = "diverged" if loss is None else "finished"
        results.append(
            make_result(learning_rate=coming[0], seed=coming[1], loss=loss or 9.0, status=status)
        )
    return ran


def numbers(folder: Path) -> list[dict]:
    """What runs computed, apart from times."""
    return [result.model_dump(exclude=TIMES) for result in read_results(folder)]


def test_an_interior_best_rate_gets_the_other_seeds():
    assert trace({0.01: 2.0, 0.03: 1.0, 0.1: 3.0}) == [(0.01, 0), (0.03, 0), (0.1, 0), (0.03, 5)]


def test_a_sweep_grows_until_the_best_rate_is_interior():
    losses = {0.01: 3.0, 0.03: 2.0, 0.1: 1.0, 0.3: 1.5}
    assert trace(losses)[3:] == [(0.3, 0), (0.1, 5)]
    assert trace({0.01: 1.0, 0.03: 2.0, 0.1: 3.0, 0.003: 4.0})[3:] == [(0.003, 0), (0.01, 5)]


def test_a_sweep_stops_growing():
    assert trace({0.01: 3.0, 0.03: 2.0, 0.1: 1.0, 0.3: 0.5, 1.0: 0.2})[3:] == [
        (0.3, 0),
        (1.0, 0),
        (1.0, 5),
    ]


def test_if_all_diverge_lower_rates_are_tried():
    assert trace({0.003: 1.0})[3:] == [(0.003, 0), (0.001, 0), (0.003, 5)]


def test_a_result_that_is_not_finished_is_not_the_best():
    assert trace({0.01: 2.0, 0.03: 1.0})[-1] == (0.03, 5)


def test_a_sweep_of_several_seeds_chooses_by_their_mean():
    study = STUDY.model_copy(update={"seeds": (0, 5, 7), "sweep_seeds": 2})
    losses = {
        **{(0.01, 0): 3.0, (0.01, 5): 2.0, (0.03, 0): 1.0, (0.03, 5): 2.5},
        **{(0.1, 0): 1.2, (0.1, 5): 1.9, (0.3, 0): 0.1, (0.3, 5): 9.0, (0.1, 7): 1.5},
    }
    results, ran = [], []
    while (coming := next_run(study, "adamw", results)) is not None:
        ran.append(coming)
        changes = {"learning_rate": coming.learning_rate, "seed": coming.seed}
        results.append(make_result(loss=losses[coming], **changes))
    assert ran == list(losses)  # 0.3 is best with the first seed, 0.1 with both
    (summary,) = summarize(results)
    assert [point.learning_rate for point in summary.sweep] == [0.01, 0.03, 0.1, 0.3]
    assert summary.sweep[1].validation_loss == pytest.approx(1.75)
    assert [run.config.seed for run in summary.best] == [0, 5, 7]
    assert summary.best[0].config.learning_rate == 0.1
    assert study.runs() == 3 * 2 + 1


def test_a_rate_at_which_a_seed_of_the_sweep_breaks_down_is_not_the_best():
    runs = [
        make_result(learning_rate=0.01, seed=0, loss=2.0),
        make_result(learning_rate=0.01, seed=5, loss=2.0),
        make_result(learning_rate=0.03, seed=0, loss=1.0),
        make_result(learning_rate=0.03, seed=5, status="diverged"),
    ]
    (summary,) = summarize(runs)
    assert summary.best[0].config.learning_rate == 0.01
    assert (summary.lost, summary.broken) == (1, 0)
    assert not summary.sweep[1].finished
    assert "| adamw | 2 | 1 diverged |" in sweep_table([summary])


def test_workers_stay_with_a_method_then_help_and_wait_for_the_best_rate(tmp_path):
    both = STUDY.model_copy(update={"learning_rates": {"adamw": (1.0, 2.0, 3.0), "sgd": (1.0,)}})
    told = []
    board = Board(
        plan_jobs("digits", {"": both}, None, tmp_path, resume=False, fresh=False),
        lambda job, result: told.append((job.method, result.config.learning_rate)),
    )

    def end(job, run):
        loss = {1.0: 3.0, 2.0: 2.0, 3.0: 2.5}[run.learning_rate]
        changes = {"method": job.method, "learning_rate": run.learning_rate, "seed": run.seed}
        board.enter(job, run, make_result(loss=loss, **changes))

    def names(assignment):
        return assignment[0].method, *assignment[1]

    one, two = board.assign(None), board.assign(None)
    assert names(one) == ("adamw", 1.0, 0)
    assert names(two) == ("sgd", 1.0, 0)  # nobody works on it
    end(*one)
    end(*two)
    two = board.assign(two[0])
    assert names(two) == ("sgd", 1.0, 5)  # its worker stays with it
    one = board.assign(one[0])
    assert names(one) == ("adamw", 2.0, 0)
    end(*two)
    two = board.assign(two[0])
    assert names(two) == ("adamw", 3.0, 0)  # nothing else is left: it helps
    end(*two)
    assert board.assign(two[0]) is None  # the best rate is not known yet
    end(*one)
    one = board.assign(one[0])
    assert names(one) == ("adamw", 2.0, 5)
    assert board.assign(two[0]) is None
    end(*one)
    assert board.assign(one[0]) is None
    assert len(board.all_results()) == 6
    assert told[-1] == ("adamw", 2.0)


def command(*arguments) -> list[str]:
    """A process of its own: pytest's compiles with other settings."""
    return [sys.executable, "-m", "experiments", *map(str, arguments)]


def finish(*arguments) -> str:
    done = subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small study, not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    finish(*SMOKE, "--out", out)
    assert len(numbers(out)) == 3
    return out


def test_a_killed_and_resumed_study_equals_an_uninterrupted_one(whole, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(*SMOKE, "--out", out), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.read_bytes() for path in out.glob("*.json")}
    assert 1 <= len(done) < 3
    (out / f".half-written.json.{process.pid}.tmp").write_text('{"schema_version": 2, "conf')

    code, output = invoke(*SMOKE, "--out", out)
    assert code == 2
    assert "pass --resume to go on from them" in output
    finish(*SMOKE, "--out", out, "--resume")
    assert numbers(out) == numbers(whole)
    assert {path: path.read_bytes() for path in done} == done  # not run again


def test_two_processes_find_the_same(whole, tmp_path):
    screen = finish(*SMOKE, "--out", tmp_path, "--jobs=2")
    assert numbers(tmp_path) == numbers(whole)
    assert re.search(r"all runs +\S+ 3/3 ", screen)


def test_an_error_in_a_process_is_shown(tmp_path):
    code, output = invoke("run", "mnist", "--smoke", "--jobs=2", "--out", tmp_path)
    assert code == 2
    assert "--data-dir must name a folder that holds mnist/mnist.npz" in output


@pytest.mark.parametrize("workers", [1, 2, 3, 200])
def test_workers_share_all_cores_and_each_has_one(monkeypatch, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 5, 7}, raising=False)
    shares = share_cores(workers)
    assert len(shares) == workers
    assert all(shares)
    assert set.union(*shares) == {0, 2, 3, 5, 7}
    assert sum(map(len, shares)) == max(5, workers)


class WatchedProgress(Progress):
    """Remembers what its first bar has shown."""

    def __init__(self) -> None:
        super().__init__(console=Console(file=io.StringIO()))
        self.seen: list[tuple[float, float | None]] = []

    def update(self, task_id, **fields: Any) -> None:
        super().update(task_id, **fields)
        if task_id == self.task_ids[0]:
            self.seen.append((self.tasks[0].completed, self.tasks[0].total))


@pytest.fixture
def made_up_runs(monkeypatch):
    """Runs that take no time and are the better the higher their rate; the first diverges.

    Workers are threads.
    """
    before = [("an adamw run that has not begun", 0, 1)]

    def run(job, run, on_progress):
        label = f"adamw lr {run.learning_rate:g} seed {run.seed}"
        on_progress(*before[-1])  # as if it were late
        for step in (1, 2):
            on_progress(label, step, 5)
        before.append((label, 2, 5))
        status = "diverged" if run.learning_rate == 0.01 else "finished"
        loss = 1 / run.learning_rate
        return make_result(learning_rate=run.learning_rate, seed=run.seed, loss=loss, status=status)

    monkeypatch.setattr(experiments.workers.Workshop, "run", staticmethod(run))
    monkeypatch.setattr(
        experiments.workers, "_work", lambda job, one, q: run(job, one, lambda *s: q.put(s))
    )
    monkeypatch.setattr(
        experiments.workers, "ProcessPoolExecutor", lambda *settings: ThreadPoolExecutor(1)
    )


@pytest.mark.usefixtures("made_up_runs")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("there", [0, 4])
def test_the_bar_grows_with_the_sweep_and_counts_every_result_once(workers, there, tmp_path):
    for rate in (0.01, 0.03, 0.1, 0.3)[:there]:
        stored(tmp_path, learning_rate=rate, loss=1 / rate)
    progress = WatchedProgress()
    results = run_jobs(jobs(tmp_path, resume=True), workers, progress)
    assert len(results) == 6
    shown = [(0, 4), (1, 4), (2, 4), (3, 5), (4, 6), (5, 6), (6, 6)]
    assert progress.seen == shown[there:]
    assert [task.visible for task in progress.tasks[2:]] == [False] * (6 - there)


def test_what_is_there_of_the_other_seeds_is_not_expected_again(tmp_path):
    for rate, seed in ((0.03, 0), (0.1, 0), (0.03, 5)):  # the run at 0.01 failed, say
        stored(tmp_path, learning_rate=rate, seed=seed, loss=rate)
    board = Board(jobs(tmp_path, resume=True), lambda job, result: None)
    assert board.expected() == 4


def jobs(out: Path, *, resume: bool = False, fresh: bool = False):
    parts = expand(STUDY, {}, [])
    return plan_jobs("digits", parts, None, out, resume=resume, fresh=fresh)


def stored(out: Path, **changes) -> RunResult:
    """Writes a made-up result of the study."""
    options = load_study("digits").study.task_options
    assert options == {}
    result = make_result(**changes)
    from experiments.tasks import parse_options

    full = parse_options("digits", {}).model_dump(mode="json")
    config = result.config.model_copy(update={"task_options": full})
    result = result.model_copy(update={"config": config})
    result.write(out)
    return result


def test_failed_runs_are_run_again(tmp_path):
    kept = stored(tmp_path, learning_rate=0.01)
    stored(tmp_path, learning_rate=0.03, status="failed")
    (job,) = jobs(tmp_path, resume=True)
    assert job.stored == (kept,)


def test_fresh_deletes_what_is_there(tmp_path):
    stored(tmp_path)
    stored(tmp_path, method="altlora")
    with pytest.raises(ExperimentError, match="--resume to go on"):
        jobs(tmp_path)
    (job,) = jobs(tmp_path, fresh=True)
    assert job.stored == ()
    assert [result.config.method for result in read_results(tmp_path)] == ["altlora"]


def test_resume_and_fresh_together_delete_nothing(tmp_path):
    stored(tmp_path)
    (tmp_path / "figure.png").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExperimentError, match="pass one of the two; nothing was deleted"):
        jobs(tmp_path, resume=True, fresh=True)
    assert sorted(tmp_path.iterdir()) == before


def test_results_of_other_settings_are_not_mixed(tmp_path):
    make_result().write(tmp_path)
    with pytest.raises(ExperimentError, match="another task_options than the study"):
        jobs(tmp_path, resume=True)


def test_results_of_other_options_of_a_method_are_not_mixed(tmp_path):
    stored(tmp_path)
    assert jobs(tmp_path, resume=True)
    parts = expand(STUDY, {"method_options.adamw": {"b1": 0.8}}, [])
    with pytest.raises(ExperimentError, match="another method_options than the study"):
        plan_jobs("digits", parts, None, tmp_path, resume=True, fresh=False)


def of_other_data(result: RunResult) -> RunResult:
    config = result.config.model_copy(update={"data": {"source": "made up again"}})
    return result.model_copy(update={"config": config})


def test_methods_on_different_data_are_not_mixed(tmp_path):
    stored(tmp_path)
    of_other_data(stored(tmp_path, method="altlora")).write(tmp_path)
    both = STUDY.model_copy(update={"learning_rates": {"adamw": (0.01,), "altlora": (0.01,)}})
    with pytest.raises(ExperimentError, match=r"was made with other data than .*: move away"):
        plan_jobs("digits", {"": both}, None, tmp_path, resume=True, fresh=False)


def test_a_method_does_not_run_beside_results_of_other_data(tmp_path):
    invoke(*SMOKE, "--method=adamw", "--out", tmp_path)
    (path,) = tmp_path.glob("*.json")
    other = of_other_data(read_results(tmp_path)[0])
    path.unlink()
    other.write(tmp_path)
    code, output = invoke(*SMOKE, "--method=svd-lora", "--resume", "--out", tmp_path)
    assert code == 2
    assert "was made with other data" in output
    assert [result.config.method for result in read_results(tmp_path)] == ["adamw"]


def test_results_of_an_older_schema_are_kept_and_named(tmp_path):
    path = make_result().write(tmp_path)
    path.write_text(path.read_text().replace('"schema_version":2', '"schema_version":1'))
    before = path.read_bytes()
    for how in ({"resume": True}, {"fresh": True}):
        with pytest.raises(ExperimentError, match=rf"{path.name} is not a result of schema 2"):
            jobs(tmp_path, **how)
    assert path.read_bytes() == before


def test_a_full_disk_loses_no_finished_run(tmp_path, monkeypatch):
    real, calls = os.replace, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(os, "replace", full)
    code, output = invoke(*SMOKE, "--out", tmp_path)
    assert code == 2
    assert "No space left on device" in output
    (first,) = tmp_path.iterdir()
    content = first.read_bytes()
    monkeypatch.undo()
    code, output = invoke(*SMOKE, "--out", tmp_path, "--resume")
    assert code == 0, output
    assert len(read_results(tmp_path)) == 3
    assert first.read_bytes() == content


@pytest.mark.parametrize(
    ("rates", "best", "beyond"),
    [
        ((0.01, 0.03, 0.1), 0.01, 0.003),
        ((0.01, 0.03, 0.1), 0.1, 0.3),
        ((0.1, 1.0), 0.1, 0.01),
        ((0.05, 1.0), 1.0, 20.0),
    ],
)
def test_the_next_rate_lies_beyond_the_end_of_a_sweep(rates, best, beyond):
    plan = Plan(steps=2, eval_every=2, head_learning_rate=1e-3)
    study = Study(task="digits", plan=plan, learning_rates={"adamw": rates})
    results = [make_result(learning_rate=rate, loss=0.5 if rate == best else 1.0) for rate in rates]
    assert next_run(study, "adamw", results).learning_rate == pytest.approx(beyond)
