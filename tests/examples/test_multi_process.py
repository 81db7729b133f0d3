"""Runs of several processes are the run of one, also when a process dies and others go on."""

import contextlib
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import typer

from examples import multi_process
from lowrank_optax import adapters

ROOT = pathlib.Path(__file__).parents[2]
TOLERANCE = 1e-6  # of a loss, in float32: about eight units in the last place
SECONDS = 240  # after which a run hangs
HEARTBEAT = 15  # seconds of silence: more than a busy machine makes a process wait
ENDLESS = 10**6  # steps that no run here makes: it cannot end before it is killed


class Run:
    """Some processes of one run; leaving the context ends what is left of them.

    Args:
        folder: where its checkpoints, losses and logs are; a later run may go on there.
        processes: how many.
        devices: of each process.
        options: of the command, by name.
        slurm: whether processes find each other by what SLURM would tell them.
    """

    def __init__(self, folder, processes, options, devices=1, slurm=False):
        self.folder, self.processes = folder, []
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "examples.multi_process"]
        command += [part for name, x in options.items() for part in (f"--{name}", str(x))]
        command += ["--checkpoint-dir", str(folder / "checkpoints")]
        command += ["--adapter-dir", str(folder / "adapter")]
        command += ["--losses-out", str(folder / "losses"), "--heartbeat", str(HEARTBEAT)]
        common = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        identify = by_slurm if slurm else by_address
        port = str(free_port())
        for process in range(processes):
            own, env = identify(port, processes, process) if processes > 1 else ([], {})
            with self.log(process).open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *own], cwd=ROOT, env=common | env, stdout=log, stderr=log
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, process):
        return self.folder / f"{process}.log"

    def ends(self):
        """Waits for all processes; returns their exit codes."""
        late = time.monotonic() + SECONDS
        return [process.wait(max(0, late - time.monotonic())) for process in self.processes]

    def succeeds(self):
        codes = self.ends()
        logs = [self.log(process).read_text()[-2000:] for process in range(len(codes))]
        assert not any(codes), "\n".join(logs)

    def reaches(self, condition):
        """Waits for a condition while all processes run."""
        late = time.monotonic() + SECONDS
        while not condition():
            for index, process in enumerate(self.processes):
                assert process.poll() is None, self.log(index).read_text()[-2000:]
            assert time.monotonic() < late, "the run hangs"
            time.sleep(0.02)


def by_address(port, processes, process):
    address = ["--coordinator", f"localhost:{port}"]
    return [*address, "--processes", str(processes), "--process", str(process)], {}


def by_slurm(port, processes, process):
    names = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": processes}
    names |= {"PROCID": process, "LOCALID": process}
    env = {f"SLURM_{name}": str(value) for name, value in names.items()}
    return ["--cluster"], {**env, "JAX_COORDINATOR_PORT": port}


def free_port():
    with contextlib.closing(socket.socket()) as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def lines(folder):
    """What was reported so far: dicts of step, loss and processes."""
    file = folder / "losses"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_checkpoint(folder):
    """The last step whose checkpoint is whole; parts of others have longer names."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def assert_losses(folder, reference):
    """Each loss of a run, also one computed twice, is that of the reference at its step."""
    want = {line["step"]: line["loss"] for line in lines(reference)}
    got = lines(folder)
    assert sorted({line["step"] for line in got}) == sorted(want) == [*range(1, len(want) + 1)]
    assert want[len(want)] < 0.9 * want[1]
    for line in got:
        assert line["loss"] == pytest.approx(want[line["step"]], rel=TOLERANCE, abs=0), line


def assert_adapters(folder, reference):
    """The adapters that runs have saved are the same, to rounding."""
    got, want = (adapters.read_peft(run / "adapter").pairs for run in (folder, reference))
    assert set(got) == set(want) == {"up", "down"}
    for name, pair in want.items():
        for one, other in zip(pair, got[name], strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


def run_here(folder, **options):
    """The run of one process: this one, whose eight devices hold what several held."""
    files = {"checkpoint_dir": "checkpoints", "losses_out": "losses", "adapter_dir": "adapter"}
    multi_process.main(**{name: folder / file for name, file in files.items()}, **options)


@pytest.mark.parametrize(
    ("method", "recipe", "slurm"),
    [("altlora_plus", "data_parallel", True), ("oplora", "tensor_parallel", False)],
)
def test_two_processes_train_as_one(method, recipe, slurm, tmp_path):
    options = {"method": method, "recipe": recipe, "steps": 24, "every": 24}
    with Run(tmp_path / "two", 2, options, devices=2, slurm=slurm) as run:
        run.succeeds()
    (tmp_path / "one").mkdir()
    run_here(tmp_path / "one", **options)
    assert_losses(tmp_path / "two", tmp_path / "one")
    assert_adapters(tmp_path / "two", tmp_path / "one")
    with pytest.raises(typer.BadParameter, match="exists"):
        run_here(tmp_path / "one", **options)


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([(2, 0, 1)], id="once"),
        pytest.param([(2, 1, 3), (3, 0, 1)], id="twice", marks=pytest.mark.slow),
    ],
)
def test_killed_runs_go_on_with_other_numbers_of_processes(kills, tmp_path):
    """A run of so many loses one process; so many others go on, and the last time one ends it."""
    folder = tmp_path / "killed"
    options = {"method": "sds_lora", "recipe": "fsdp"}
    resumed_at = {2: 0}
    for processes, victim, resumed_by in kills:
        start = last_checkpoint(folder)
        with Run(folder, processes, {**options, "steps": ENDLESS, "every": 8}) as run:
            run.reaches(lambda start=start: last_checkpoint(folder) > start)
            run.reaches(lambda: lines(folder)[-1]["step"] > last_checkpoint(folder))
            run.processes[victim].kill()
            assert all(run.ends())  # the others see it: nobody waits for ever
        resumed_at[resumed_by] = last_checkpoint(folder)
    steps = max(line["step"] for line in lines(folder)) + 4
    run_here(folder, **options, steps=steps)
    (tmp_path / "uninterrupted").mkdir()
    run_here(tmp_path / "uninterrupted", **options, steps=steps)

    first = {}
    for line in lines(folder):
        first.setdefault(line["processes"], line["step"])
    assert first == {processes: done + 1 for processes, done in resumed_at.items()}
    assert all(one < other for one, other in itertools.pairwise(resumed_at.values()))
    assert_losses(folder, tmp_path / "uninterrupted")
    assert_adapters(folder, tmp_path / "uninterrupted")
