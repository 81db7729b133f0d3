"""AltLoRA and AltLoRA+ against reference trajectories in float64."""

import numpy as np
import pytest

from lowrank_optax import altlora, altlora_plus
from tests.golden.trajectories import GOLDEN, assert_trajectory, load, run

EQUATIONS = sorted(p.stem for p in GOLDEN.glob("altlora*_equations_*.npz"))
pytestmark = pytest.mark.usefixtures("x64")


def order_of(name):
    return next(o for o in ("alternating", "simultaneous", "sequential") if o in name)


def test_golden_files_are_all_there():
    assert len(EQUATIONS) == 16


@pytest.mark.parametrize("name", EQUATIONS)
def test_alias_follows_the_equations(name):
    data, hp = load(name)
    shared = {
        "damping": hp["damping"],
        "order": order_of(name),
        "switch_every": hp["switch_every"],
        "first": "a",
        "scale": hp["scale"],
    }
    if "plus" in name:
        tx = altlora_plus(hp["lr"], hp["b1"], hp["b2"], eps=hp["eps"], **shared)
    else:
        tx = altlora(hp["lr"], hp["b1"], **shared)
    assert_trajectory(run(tx, data, hp["scale"]), data)


@pytest.mark.parametrize("start", ["randB", "zeroB"])
def test_sequential_altlora_equals_the_released_code(start):
    data, hp = load(f"altlora_released_{start}")
    tx = altlora(
        hp["lr"],
        float(data["hp_betas"][0]),
        damping=hp["reg"],
        order="sequential",
        scale=hp["scale"],
    )
    assert_trajectory(run(tx, data, hp["scale"]), data)


@pytest.mark.parametrize("start", ["randB", "zeroB"])
def test_altlora_plus_differs_from_the_released_code_where_documented(start):
    """Without bias correction of v the released first step is 1/sqrt(1 − β2) times longer."""
    data, hp = load(f"altlora_plus_released_{start}")
    b1, b2 = (float(b) for b in data["hp_betas"])
    tx = altlora_plus(
        hp["lr"], b1, b2, eps=1e-12, damping=hp["reg"], order="sequential", scale=hp["scale"]
    )
    ours = run(tx, data, hp["scale"])
    step, released = ours[1].b.T - data["B"][0], data["B"][1] - data["B"][0]
    np.testing.assert_allclose(np.abs(step), hp["lr"], rtol=1e-6)
    assert np.median(np.abs(released)) > 5 * hp["lr"]
