"""Kill −9 in a step and in a save: training goes on bit by bit as if nothing had happened."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from lowrank_optax import checkpoints
from tests.conformance.methods import FIRST_FORMS
from tests.kill_worker import STEPS

ROOT = Path(__file__).parents[1]
# Of a third save: a listing, folders made, a file opened, three names changed, an old save removed.
TOUCHES = (1, 5, 10, 15, 28, 31, 36, 40)
# States of all kinds: moments, matrices, whole products, shadows, frames.
KINDS = ("altlora_plus", "polora", "lora_soap", "lora_pro", "oplora-1", "scaled_oplora", "sds_lora")


def run(
    folder: Path, names: Sequence[str], kill_at: int | None = None, touch: int | None = None
) -> list[str]:
    """Runs the worker; returns what it said.

    Args:
        folder: of the worker.
        names: of the methods that it trains.
        kill_at: after so many lines it is killed.
        touch: and not before it has touched files so many times after that.
    """
    command = [sys.executable, "-m", "tests.kill_worker", str(folder), ",".join(names)]
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


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(KINDS, id="kinds-of-state"),
        pytest.param([m.name for m in FIRST_FORMS], id="every-method", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_by_bit(names, tmp_path):
    """Every second kill is in a save. A method has 2 STEPS lines: no run gets past a whole one."""
    run(tmp_path / "whole", names)
    killed = []
    while True:
        count = len(killed)
        in_save = {"touch": TOUCHES[count // 2 % len(TOUCHES)]} if count % 2 else {}
        said = run(tmp_path / "killed", names, 2 * STEPS - 1 + count % 2, **in_save)
        if said[-1] == "done":
            break
        killed.append(said[-1].split())
        assert len(killed) < 2 * STEPS * len(names)
    assert {"step", "touch"} == {what for what, *_ in killed}
    assert {"open", "os.mkdir", "os.rename"} <= {how for _, how, _ in killed}
    assert set(names) == {name for *_, name in killed}
    for name in names:
        ours, whole = (
            checkpoints.read(tmp_path / end / name, STEPS) for end in ("killed", "whole")
        )
        assert ours.step == whole.step == STEPS
        jax.tree.map(np.testing.assert_array_equal, ours, whole)
