"""LoRA+ is two AdamWs, one for each factor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, lora_plus

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


PARAMS = {"q": LoRAPair(normal(0, 6, 2), jnp.zeros((2, 5))), "bias": normal(1, 5)}
TARGET = normal(2, 6, 5)


def loss(params):
    delta = params["q"].a @ params["q"].b + params["bias"]
    return jnp.sum((delta - TARGET) ** 2)


def run(tx, steps=25):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_adamw_with_a_higher_rate_for_b(weight_decay):
    schedule = optax.cosine_decay_schedule(0.02, 30)
    slow = optax.adamw(schedule, 0.8, 0.95, 1e-6, weight_decay=weight_decay)
    fast = optax.adamw(
        lambda count: 4 * schedule(count), 0.8, 0.95, 1e-6, weight_decay=weight_decay
    )
    labels = {"q": LoRAPair("slow", "fast"), "bias": "slow"}
    expected = run(optax.partition({"slow": slow, "fast": fast}, labels))
    ours = run(lora_plus(schedule, 0.8, 0.95, ratio=4.0, eps=1e-6, weight_decay=weight_decay))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


def test_a_ratio_of_one_is_adamw():
    ours, expected = run(lora_plus(0.02, ratio=1.0)), run(optax.adamw(0.02, weight_decay=0.0))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_a_ratio_that_is_not_positive_is_refused(ratio):
    with pytest.raises(ValueError, match="`ratio` must be positive"):
        lora_plus(0.1, ratio=ratio)
