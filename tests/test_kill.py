"""Kill −9 in a step and in a save: training goes on bit by bit as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from lowrank_optax import checkpoints
from tests.kill_worker import ROWS, STEPS

ROOT = Path(__file__).parents[1]
# Of a third save: a listing, folders made, a file opened, three names changed, an old save removed.
TOUCHES = (1, 5, 10, 15, 28, 31, 36, 40)


def run(folder: Path, kill_at: int | None = None, touch: int | None = None) -> list[str]:
    """Runs the worker; returns what it said.

    Args:
        folder: of the worker.
        kill_at: after so many lines it is killed.
        touch: and not before it has touched files so many times after that.
    """
    command = [sys.executable, "-m", "tests.kill_worker", str(folder)]
    command += [] if touch is None else [str(kill_at), str(touch)]
    said = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        for line in worker.stdout or ():
            said.append(line.strip())
            if touch is None and len(said) == kill_at:
                os.kill(worker.pid, 9)
                break
    assert kill_at is not None or said[-1] == "done"
    return said


def results(folder: Path):
    return {m.name: checkpoints.read(folder / m.name, STEPS) for m in ROWS}


def test_a_killed_run_goes_on_bit_by_bit(tmp_path):
    """Every second time it is killed in a save. A method has 2 STEPS lines: none is passed whole."""
    run(tmp_path / "whole")
    killed = []
    while True:
        count = len(killed)
        in_save = {"touch": TOUCHES[count // 2 % len(TOUCHES)]} if count % 2 else {}
        said = run(tmp_path / "killed", 2 * STEPS - 1 + count % 2, **in_save)
        if said[-1] == "done":
            break
        killed.append(said[-1].split())
        assert len(killed) < 2 * STEPS * len(ROWS)
    assert {"step", "touch"} == {what for what, *_ in killed}
    assert {"open", "os.mkdir", "os.rename"} <= {how for _, how, _ in killed}
    assert {method.name for method in ROWS} == {name for *_, name in killed}
    ours, whole = results(tmp_path / "killed"), results(tmp_path / "whole")
    assert {checkpoint.step for checkpoint in ours.values()} == {STEPS}
    jax.tree.map(np.testing.assert_array_equal, ours, whole)
