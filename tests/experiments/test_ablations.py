"""PoLoRA less one of its parts: with all of them it is PoLoRA, and each makes a difference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.ablations import ablated_polora
from lowrank_optax import LoRAPair, polora

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"q": LoRAPair(jax.random.normal(KEYS[0], (6, 2)), jax.random.normal(KEYS[1], (2, 5)))}
TARGET = jax.random.normal(KEYS[2], (6, 5))


def train(tx, steps=5):
    loss = lambda params: jnp.mean((2.0 * params["q"].a @ params["q"].b - TARGET) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params["q"]


def test_with_all_its_parts_it_is_polora():
    ours, theirs = train(ablated_polora(0.3, scale=2.0)), train(polora(0.3, scale=2.0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), ours, theirs)


@pytest.mark.parametrize("part", ["polar", "bounded", "diagonal", "nesterov"])
def test_each_part_makes_a_difference(part):
    whole = train(ablated_polora(0.3, scale=2.0), steps=20)
    less = train(ablated_polora(0.3, scale=2.0, **{part: False}), steps=20)
    assert max(np.abs(x - y).max() for x, y in zip(whole, less, strict=True)) > 1e-3
    assert all(np.isfinite(x).all() for x in less)


def test_without_the_radius_each_factor_moves_by_the_learning_rate():
    moved = train(ablated_polora(0.3, scale=2.0, bounded=False), steps=1)
    for before, after in zip(PARAMS["q"], moved, strict=True):
        assert np.linalg.norm(after - before, 2) == pytest.approx(0.3, rel=1e-5)
