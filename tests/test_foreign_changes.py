"""Leaves among the parameters: a new run goes on with them, foreign changes of them are told."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import (
    LoRAPair,
    Metric,
    frame,
    nn,
    notices,
    oplora,
    scaled_oplora,
    sds_lora,
    shadow,
    skipped,
)
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


def test_a_lost_warm_of_one_pair_changes_no_other_pair():
    """The other one's warm-up ends as it would have."""
    node = frame(random_pair())
    tx = sds_lora(0.1, scale=SCALE, total_steps=20, warmup_steps=2)

    def second_update(warm):
        params = {"lost": node, "sound": node}
        state = tx.init(params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        _, state = tx.update(zeros, state, params)
        params["lost"] = node._replace(warm=jnp.array(warm))
        updates, _ = tx.update(zeros, state, params)
        return optax.apply_updates(params, updates)["sound"]

    found, expected = (jax.jit(second_update)(warm) for warm in (jnp.nan, 1.0))
    assert expected.warm == 0
    np.testing.assert_allclose(delta(expected), delta(node), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


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
    if kind == "schedule_free":
        return optax.contrib.schedule_free(tx, 0.05)
    after = {
        "decay after it": optax.add_decayed_weights(-0.05),
        "scale after it": optax.scale(0.5),
        "apply_every": optax.apply_every(3),
    }
    return optax.chain(tx, after[kind])


@pytest.mark.parametrize(
    "kind", ["decay after it", "scale after it", "schedule_free", "apply_every"]
)
def test_frames_that_something_else_changed_are_counted_and_told(kind):
    tx, full, node = foreign(kind), normal(5, N_IN, N_OUT), frame(random_pair())
    state = tx.init(node)
    step = jax.jit(lambda node, state: advance(tx, node, state, full + delta(node)))
    with pytest.warns(UserWarning, match="sds_lora found frames"):
        node, state = repeat(step, 20, node, state)
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

    with pytest.warns(UserWarning, match="sds_lora found frames"):
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


def test_accumulated_updates_of_frames_are_refused_before_they_run_away():
    """The switch is made three times over; a pair is then left alone, and said to be."""
    tx = optax.chain(
        sds_lora(0.05, scale=SCALE, total_steps=200, warmup_steps=10), optax.apply_every(3)
    )
    full, node = normal(5, N_IN, N_OUT), frame(random_pair())
    state = tx.init(node)
    step = jax.jit(lambda node, state: advance(tx, node, state, full + delta(node)))
    with pytest.warns(UserWarning, match="is not moved: make it anew"):
        node, state = repeat(step, 60, node, state)
    before = node
    node, state = repeat(step, 3, node, state)
    jax.tree.map(np.testing.assert_array_equal, node, before)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(node))
    assert skipped(state) > 40


def test_a_clip_that_holds_the_switch_back_is_told_at_once():
    tx = optax.chain(sds_lora(0.05, scale=SCALE, total_steps=200, warmup_steps=5), optax.clip(0.01))
    full, node = normal(5, N_IN, N_OUT), frame(random_pair())
    state = tx.init(node)
    step = jax.jit(lambda node, state: advance(tx, node, state, full + delta(node)))
    node, state = repeat(step, 5, node, state)
    assert skipped(state) == 0
    assert 0.5 < node.warm < 1
    with pytest.warns(UserWarning, match="a `warm` that is neither 0 nor 1"):
        node, state = repeat(step, 1, node, state)
    assert skipped(state) == 1


# OPLoRA's momentum and metric between updates

OPLORA = {
    "oplora": (lambda: oplora(0.02), None),
    "scaled_oplora": (lambda: scaled_oplora(0.02), Metric()),
}


def fit(name, dtype=jnp.float32):
    """A regression and the node that begins it."""
    x, w = normal(1, 32, N_IN).astype(dtype), normal(2, N_IN, N_OUT).astype(dtype)
    pair = jax.tree.map(lambda leaf: leaf.astype(dtype) / 3, random_pair())
    node = shadow(pair, jax.random.key(0), metric=OPLORA[name][1])
    return node, lambda node: jnp.mean((nn.lora_apply(x, node) - x @ w) ** 2)


def run(tx, loss, node, state, steps=12):
    @jax.jit
    def step(node, state):
        updates, state = tx.update(jax.grad(loss)(node), state, node)
        return optax.apply_updates(node, updates), state

    return repeat(step, steps, node, state)


BETWEEN = {
    "decay": lambda tx: optax.chain(tx, optax.add_decayed_weights(-0.01)),
    "scale": lambda tx: optax.chain(tx, optax.scale(0.9)),
    "apply_every": lambda tx: optax.chain(tx, optax.apply_every(3)),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.02),
}


@pytest.mark.parametrize("kind", BETWEEN)
@pytest.mark.parametrize("name", OPLORA)
def test_a_momentum_that_something_else_moves_is_refused_counted_and_told(name, kind):
    node, loss = fit(name)
    tx = BETWEEN[kind](OPLORA[name][0]())
    with pytest.warns(UserWarning, match=r"moved no pair.*not as the last update left it"):
        after, state = run(tx, loss, node, tx.init(node))
    assert skipped(state) > 0
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(after))


LEAVES = [("oplora", "m_a"), ("oplora", "m_b")]
LEAVES += [("scaled_oplora", leaf) for leaf in ("m_a", "m_b", "d_in", "d_out")]


@pytest.mark.parametrize(("name", "leaf"), LEAVES)
def test_every_auxiliary_leaf_that_moves_is_sealed_and_one_change_costs_one_update(name, leaf):
    node, loss = fit(name)
    tx = OPLORA[name][0]()
    node, state = run(tx, loss, node, tx.init(node))
    assert skipped(state) == 0
    changed = node._replace(**{leaf: 1.001 * getattr(node, leaf)})
    with pytest.warns(UserWarning, match="moved no pair"):
        refused, state = run(tx, loss, changed, state, 1)
    assert skipped(state) == 1
    np.testing.assert_array_equal(refused.a, changed.a)
    after, state = run(tx, loss, refused, state)
    assert skipped(state) == 1
    assert loss(after) < loss(node)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPLORA)
def test_rounding_breaks_no_seal_whatever_the_momentum_begins_with(name, dtype):
    """The momentum begins at ordinary size and is then as small as the gradient."""
    node, loss = fit(name, dtype)
    tx = OPLORA[name][0]()
    small = lambda node: 1e-4 * loss(node).astype(jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = run(tx, small, node, tx.init(node), 40)
    assert skipped(state) == 0
