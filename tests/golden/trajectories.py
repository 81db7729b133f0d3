"""Reference trajectories of the matrix problem ½‖s·B·A − T‖²: reading, running, comparing."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax import LoRAPair

GOLDEN = pathlib.Path(__file__).parent


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        data = {key: file[key] for key in file.files}
    hp = {k[3:]: v.item() for k, v in data.items() if k.startswith("hp_") and v.ndim == 0}
    return data, hp


def run(tx, data, scale):
    """The trajectory of (lora_a, lora_b) on the golden problem, from the golden's start."""
    target = jnp.asarray(data["target"].T)

    def loss(pair):
        return 0.5 * jnp.sum((scale * pair.a @ pair.b - target) ** 2)

    @jax.jit
    def step(pair, state):
        updates, state = tx.update(jax.grad(loss)(pair), state, pair)
        return optax.apply_updates(pair, updates), state

    pair = LoRAPair(jnp.asarray(data["A"][0].T), jnp.asarray(data["B"][0].T))
    state = tx.init(pair)
    trajectory = [pair]
    for _ in range(len(data["A"]) - 1):
        pair, state = step(pair, state)
        trajectory.append(pair)
    return trajectory


def assert_trajectory(trajectory, data, atol=1e-10):
    for t, pair in enumerate(trajectory):
        for factor, value in (("A", pair.a.T), ("B", pair.b.T)):
            message = f"{factor} at step {t}"
            np.testing.assert_allclose(value, data[factor][t], 0, atol, err_msg=message)
