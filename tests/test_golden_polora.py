"""PoLoRA against reference trajectories in float64, curvature included."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, polora

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("polora_*.npz"))
pytestmark = pytest.mark.usefixtures("x64")


def test_golden_files_are_all_there():
    assert len(NAMES) == 8


@pytest.mark.parametrize("name", NAMES)
def test_it_follows_the_equations(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        data = {key: file[key] for key in file.files}
    hp = {key[3:]: value.item() for key, value in data.items() if key.startswith("hp_")}
    tx = polora(
        hp["lr"],
        hp["b1"],
        hp["b2"],
        hp["delta"],
        partner="identity" if "one_sided" in name else "gram",
        radius="exact" if "exact" in name else "linear",
        scale=hp["scale"],
    )
    target = jnp.asarray(data["target"].T)

    @jax.jit
    def step(pair, state):
        loss = lambda pair: 0.5 * jnp.sum((hp["scale"] * pair.a @ pair.b - target) ** 2)
        updates, state = tx.update(jax.grad(loss)(pair), state, pair)
        return optax.apply_updates(pair, updates), state

    pair = LoRAPair(jnp.asarray(data["A"][0].T), jnp.asarray(data["B"][0].T))
    state = tx.init(pair)
    for t in range(len(data["A"])):
        [curvature] = state.pairs.curvature
        found = {"A": pair.a.T, "B": pair.b.T, "q": curvature.a, "p": curvature.b}
        for key, value in found.items():
            np.testing.assert_allclose(value, data[key][t], 0, 1e-10, err_msg=f"{key} at {t}")
        pair, state = step(pair, state)
