"""Kill −9 in a step and in a save: every method goes on bit by bit as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.conformance.methods import METHODS
from tests.kill_worker import STEPS

ROOT = Path(__file__).parents[1]


def run(folder: Path, kill_at: int | None) -> list[str]:
    """Runs the worker, and kills it after so many lines; returns what it said."""
    command = [sys.executable, "-m", "tests.kill_worker", str(folder)]
    said = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        for line in worker.stdout or ():
            said.append(line.strip())
            if len(said) == kill_at:
                os.kill(worker.pid, 9)
                break
    assert kill_at is not None or said[-1] == "done"
    return said


def results(folder: Path):
    checkpointer = ocp.StandardCheckpointer()
    return {m.name: checkpointer.restore(folder / m.name / str(STEPS)) for m in METHODS}


def test_a_killed_run_goes_on_bit_by_bit(tmp_path):
    run(tmp_path / "whole", None)
    killed = []
    # A method has 2 STEPS lines, so that no run gets past a whole one.
    while (said := run(tmp_path / "killed", 2 * STEPS - 1 + len(killed) % 2))[-1] != "done":
        killed.append(said[-1].split())
        assert len(killed) < 2 * STEPS * len(METHODS)
    assert {"step", "save"} == {what for what, *_ in killed}
    assert {method.name for method in METHODS} == {name for *_, name in killed}
    ours, whole = results(tmp_path / "killed"), results(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, ours, whole)
