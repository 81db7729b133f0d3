"""SDS-LoRA's leaves among the parameters: a new run goes on with them, foreign changes are told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, frame, notices, sds_lora, skipped
from tests.test_claims_sds_lora import (
    N_IN,
    N_OUT,
    SCALE,
    advance,
    delta,
    gradients,
    normal,
    random_pair,
)


def trained_pair(steps=40):
    tx = sds_lora(0.05, scale=SCALE, total_steps=steps, warmup_steps=5)
    full, node = normal(5, N_IN, N_OUT), frame(random_pair())
    step = jax.jit(lambda node, state: advance(tx, node, state, full + delta(node)))
    state = tx.init(node)
    for _ in range(steps):
        node, state = step(node, state)
    return node, full


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_a_new_run_goes_on_from_trained_frames(warmup_steps):
    """A pair's own `warm` decides the phase: no warm-up, no switch, no restart of moments."""
    node, full = trained_pair()
    tx = sds_lora(0.01, scale=SCALE, total_steps=40, warmup_steps=warmup_steps)
    state, begin = tx.init(node), delta(node)
    step = jax.jit(lambda node, state: advance(tx, node, state, full + delta(node)))
    distance = lambda node: jnp.linalg.norm(delta(node) + full)
    losses = [distance(node)]
    for index in range(12):
        node, state = step(node, state)
        losses.append(distance(node))
        if index == 0:
            assert jnp.linalg.norm(delta(node) - begin) < 0.2 * jnp.linalg.norm(begin)
    assert max(losses) <= 1.02 * losses[0]
    assert node.warm == 0
    assert state.inner[0].count == 12
    assert_orthonormal(node)
    assert skipped(state) == 0


def assert_orthonormal(node, atol=1e-4):
    eye = np.eye(node.f_in.shape[-1])
    np.testing.assert_allclose(node.f_in.T @ node.f_in, eye, atol=atol)
    np.testing.assert_allclose(node.f_out @ node.f_out.T, eye, atol=atol)


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["warm-up", "no warm-up"])
def test_frames_of_factors_of_low_rank_are_orthonormal(key):
    """Adam's first step is ± one number everywhere: factors of rank one."""
    ones = LoRAPair(jnp.ones((N_IN, 3)), jnp.ones((3, N_OUT)))
    node = frame(ones, key)
    tx = sds_lora(optax.sgd(0.1), total_steps=9, warmup_steps=2 if key is None else 0)
    state = tx.init(node)
    grads = jax.tree.map(jnp.ones_like, node)
    for _ in range(4):
        updates, state = tx.update(grads, state, node)
        node = optax.apply_updates(node, updates)
    present = jnp.diagonal(node.f_in.T @ node.f_in) > 0.5
    gram = node.f_in.T @ node.f_in
    np.testing.assert_allclose(gram, jnp.diag(present.astype(gram.dtype)), atol=1e-3)


def repeat(step, number, *values):
    for _ in range(number):
        values = step(*values)
    jax.effects_barrier()
    return values


def foreign(kind):
    """What users put around or after sds_lora that changes frames behind its back."""
    tx = sds_lora(0.05, scale=SCALE, total_steps=60, warmup_steps=5)
    if kind == "decay after it":
        return optax.chain(tx, optax.add_decayed_weights(-0.05))
    return optax.chain(tx, optax.scale(0.5))


@pytest.mark.parametrize("kind", ["decay after it", "scale after it"])
def test_frames_that_something_else_changed_are_made_anew_counted_and_told(kind):
    tx, full, node = foreign(kind), normal(5, N_IN, N_OUT), frame(random_pair())
    state = tx.init(node)
    step = jax.jit(lambda node, state: advance(tx, node, state, full + delta(node)))
    with pytest.warns(UserWarning, match="frames that are not orthonormal"):
        node, state = repeat(step, 12, node, state)
    assert skipped(state) > 0
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(node))


def test_an_average_across_the_switch_is_told():
    full = normal(5, N_IN, N_OUT)
    fast = sds_lora(0.05, scale=SCALE, total_steps=60, warmup_steps=5)
    tx = optax.lookahead(fast, sync_period=6, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(frame(random_pair()))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = gradients(params.fast, full + delta(params.fast))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with pytest.warns(UserWarning, match="frames that are not orthonormal"):
        params, state = repeat(step, 20, params, state)
    assert skipped(state) > 0
    assert params.fast.warm in (0.0, 1.0)


def test_notices_can_be_switched_off():
    tx, full, node = foreign("scale after it"), normal(5, N_IN, N_OUT), frame(random_pair())
    state = tx.init(node)
    step = functools.partial(advance.__wrapped__, tx, full=full)
    lowered = lambda: jax.jit(functools.partial(step)).lower(node, state).as_text()
    assert "callback" in lowered()
    with notices(False):
        assert "callback" not in lowered()
