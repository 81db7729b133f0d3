"""Every method against every property that users of optax rely on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from lowrank_optax import LoRAPair
from tests.conformance.methods import METHODS

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def make_pair(key, n_in=6, rank=2, n_out=5, batch=(), dtype=jnp.float32):
    key_a, key_b = jax.random.split(key)
    a = 0.5 * jax.random.normal(key_a, (*batch, n_in, rank))
    b = 0.5 * jax.random.normal(key_b, (*batch, rank, n_out))
    return LoRAPair(a.astype(dtype), b.astype(dtype))


def make_params(dtype=jnp.float32):
    """Two plain pairs, one stacked pair and leaves that belong to no pair."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = make_pair(keys[0], dtype=dtype)
    return {
        "layers": [{"q": {"lora_a": q.a, "lora_b": q.b}}, {"q": make_pair(keys[1], dtype=dtype)}],
        "scanned": make_pair(keys[2], batch=(3,), dtype=dtype),
        "head": {"bias": jnp.ones(4, dtype), "kernel": jnp.ones((5, 4), dtype)},
    }


def loss_of(params):
    """A smooth function of ΔK of every pair and of the other leaves."""
    first, second = params["layers"]
    pairs = [LoRAPair(first["q"]["lora_a"], first["q"]["lora_b"]), second["q"], params["scanned"]]
    total = sum(jnp.sum((p.a @ p.b - 1.0) ** 2) for p in pairs)
    return (total + sum(jnp.sum(x**2) for x in jax.tree.leaves(params["head"]))).astype(jnp.float32)


def gradients(params):
    return jax.grad(loss_of)(params)


def step_of(tx):
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, params, steps=3):
    step, state = jax.jit(step_of(tx)), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_close(x, y, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for one, two in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(np.float64(one), np.float64(two), rtol=rtol, atol=atol)


def assert_equal(x, y):
    assert_close(x, y, rtol=0, atol=0)


@each_method
def test_loss_falls_and_every_leaf_moves(method):
    params = make_params()
    after, _ = run(method(), params, steps=30)
    assert loss_of(after) < 0.5 * loss_of(params)
    for before, now in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        assert jnp.any(before != now)


@each_method
def test_jit_equals_eager(method):
    tx, params = method(), make_params()
    eager, jitted, state = params, params, tx.init(params)
    jit_state = state
    for _ in range(2):
        eager, state = step_of(tx)(eager, state)
        jitted, jit_state = jax.jit(step_of(tx))(jitted, jit_state)
    assert_close(eager, jitted)


@each_method
def test_no_recompilation_after_the_first_step(method):
    tx, params = method(optax.linear_schedule(0.1, 0.0, 10)), make_params()
    step, state = jax.jit(step_of(tx)), tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1


@each_method
def test_inject_hyperparams(method):
    params = make_params()
    injected = optax.inject_hyperparams(method)(learning_rate=0.05)
    assert_close(run(injected, params)[0], run(method(0.05), params)[0])
    state = injected.init(params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    updates, _ = injected.update(gradients(params), state, params)
    assert all(not jnp.any(u) for u in jax.tree.leaves(updates))


@each_method
def test_schedules_are_applied(method):
    params = make_params()
    scheduled, state = run(method(lambda count: jnp.where(count < 2, 0.05, 0.0)), params, steps=2)
    assert_close(scheduled, run(method(0.05), params, steps=2)[0])
    stopped, _ = run(method(lambda count: jnp.where(count < 2, 0.05, 0.0)), params, steps=4)
    assert_equal(stopped, scheduled)


@each_method
def test_multi_steps_sees_the_mean_gradient(method):
    params = make_params()
    grads = [gradients(params), jax.tree.map(jnp.ones_like, params)]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *grads)
    accumulated = optax.MultiSteps(method(), every_k_schedule=2)
    state, moved = accumulated.init(params), params
    for grad in grads:
        updates, state = accumulated.update(grad, state, moved)
        moved = optax.apply_updates(moved, updates)
    updates, _ = method().update(mean, method().init(params), params)
    assert_close(moved, optax.apply_updates(params, updates))


@each_method
def test_scan_and_cond(method):
    tx, params = method(), make_params()

    def maybe_step(carry, index):
        return jax.lax.cond(index < 3, lambda c: step_of(tx)(*c), lambda c: c, carry), None

    (scanned, state), _ = jax.lax.scan(maybe_step, (params, tx.init(params)), jnp.arange(4))
    assert_close(scanned, run(tx, params, steps=3)[0])
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


@each_method
def test_bfloat16_parameters_have_float32_state(method):
    params = make_params(jnp.bfloat16)
    after, state = run(method(), params, steps=10)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(after))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(after))
    assert loss_of(after) < loss_of(params)
    lifted = state if hasattr(state, "pairs") else state[0]
    moments = [value for name, value in lifted.pairs._asdict().items() if name != "previous"]
    assert moments
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(moments))


@each_method
def test_updates_have_the_dtype_of_gradients(method):
    params = make_params(jnp.bfloat16)
    grads = gradients(params)
    updates, _ = method().update(grads, method().init(params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda g: g.dtype, grads)


@each_method
def test_float64_stays_float64(method):
    with jax.enable_x64(True):
        params = make_params(jnp.float64)
        after, state = run(method(), params)
        floats = [x for x in jax.tree.leaves((after, state)) if jnp.issubdtype(x, jnp.floating)]
        assert all(leaf.dtype == jnp.float64 for leaf in floats)


@each_method
def test_rank_one(method):
    pair = make_pair(jax.random.key(1), rank=1)
    loss = lambda p: jnp.sum((p.a @ p.b - 1.0) ** 2)
    tx, state, start = method(), None, loss(pair)
    state = tx.init(pair)
    for _ in range(8):
        updates, state = tx.update(jax.grad(loss)(pair), state, pair)
        pair = optax.apply_updates(pair, updates)
    assert loss(pair) < start


@each_method
def test_zero_padded_ranks_change_nothing(method):
    """SkyRL pads ranks: the Gram matrices are singular, the live part must not notice."""
    pair = make_pair(jax.random.key(2))
    padded = LoRAPair(jnp.pad(pair.a, ((0, 0), (0, 2))), jnp.pad(pair.b, ((0, 2), (0, 0))))
    loss = lambda p: jnp.sum((p.a @ p.b - 1.0) ** 2)

    def train(p):
        tx = method()
        state = tx.init(p)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            p = optax.apply_updates(p, updates)
        return p

    live, full = train(pair), train(padded)
    assert_close(LoRAPair(full.a[:, :2], full.b[:2]), live, rtol=1e-4)
    assert not jnp.any(full.a[:, 2:])
    assert not jnp.any(full.b[2:])


@each_method
def test_batch_axes_are_independent_pairs(method):
    stacked = make_pair(jax.random.key(3), batch=(2, 3))
    loss = lambda p: jnp.sum((p.a @ p.b - 1.0) ** 2)

    def train(p):
        tx = method()
        state = tx.init(p)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            p = optax.apply_updates(p, updates)
        return p

    together = train(stacked)
    alone = train(jax.tree.map(lambda x: x[1, 2], stacked))
    assert_close(jax.tree.map(lambda x: x[1, 2], together), alone)


@each_method
def test_donation(method):
    tx, params = method(), make_params()
    expected, _ = run(tx, params)
    step = jax.jit(step_of(tx), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for _ in range(3):
        donated = jax.tree.leaves((params, state))
        params, state = step(params, state)
        assert all(leaf.is_deleted() for leaf in donated)
    assert_close(params, expected)


@each_method
def test_checkpoint_round_trip(method, tmp_path):
    tx, params = method(), make_params()
    params, state = run(tx, params, steps=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        template = jax.eval_shape(lambda: (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "state", template)
    step = jax.jit(step_of(tx))
    assert_equal(step(*restored), step(params, state))


@each_method
def test_abstract_init(method):
    tx, params = method(), make_params()
    abstract, concrete = jax.eval_shape(tx.init, params), tx.init(params)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(abstract) == shapes(concrete)


@each_method
def test_extra_arguments_are_accepted(method):
    tx, params = method(), make_params()
    updates, _ = optax.with_extra_args_support(tx).update(
        gradients(params), tx.init(params), params, value=1.0, nobody_knows=2
    )
    plain, _ = tx.update(gradients(params), tx.init(params), params)
    assert_equal(updates, plain)


@each_method
def test_missing_params_are_named(method):
    params = make_params()
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        method().update(params, method().init(params))


@each_method
def test_half_a_pair_is_an_error(method):
    params = make_params()
    del params["layers"][0]["q"]["lora_b"]
    with pytest.raises(ValueError, match="Half a pair at 'layers/0/q'.*lora_a"):
        method().init(params)


@each_method
def test_no_pairs_leaves_all_to_the_fallback(method):
    params = make_params()["head"]
    tx = method(fallback=optax.scale(-0.5))
    updates, state = tx.update(params, tx.init(params), params)
    unscaled = optax.tree.norm(updates) / optax.tree.norm(params)
    assert unscaled == pytest.approx(0.5 if hasattr(state, "pairs") else 0.5 * 0.05)


@each_method
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_gradient_stops_one_pair_for_one_step(method, bad):
    tx, params = method(), make_params()
    params, state = run(tx, params, steps=2)
    good = gradients(params)
    spoiled = jax.tree.map(lambda x: x, good)
    spoiled["layers"][1]["q"] = jax.tree.map(lambda x: x.at[0, 0].set(bad), spoiled["layers"][1]["q"])
    updates, new_state = jax.jit(tx.update)(spoiled, state, params)
    expected, expected_state = jax.jit(tx.update)(good, state, params)

    assert not any(jnp.any(u) for u in updates["layers"][1]["q"])
    updates["layers"][1] = expected["layers"][1]
    assert_equal(updates, expected)

    lifted, healthy, before = (
        s if hasattr(s, "pairs") else s[0] for s in (new_state, expected_state, state)
    )
    assert int(lifted.skipped) == 1
    assert int(healthy.skipped) == 0
    for field, old in zip(lifted.pairs, before.pairs, strict=True):
        assert_equal(field["layers"][1]["q"], old["layers"][1]["q"])
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(field))
    after, _ = jax.jit(step_of(tx))(optax.apply_updates(params, updates), new_state)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(after))


@each_method
def test_masked_none_and_empty_trees_pass_through(method):
    tx = method()
    for empty in ({}, None, optax.MaskedNode()):
        assert tx.update(empty, tx.init(empty), {} if empty is None else empty)[0] == empty
    params = {**make_params(), "nothing": None, "masked": optax.MaskedNode()}
    params.pop("layers")
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@each_method
def test_frozen_leaves_with_partition(method):
    params = make_params()
    labels = {"layers": "train", "scanned": "train", "head": "freeze"}
    tx = optax.partition({"train": method(), "freeze": optax.set_to_zero()}, labels)
    updates, _ = tx.update(gradients(params), tx.init(params), params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates["head"]))
    alone, _ = method().update(gradients(params), method().init(params), params)
    assert_close(updates["scanned"], alone["scanned"])


@each_method
def test_map_params_reaches_the_moments(method):
    tx, params = method(), make_params()
    state = tx.init(params)
    ones = optax.tree.map_params(
        tx, jnp.ones_like, state, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    ) if False else optax.tree.map_params(tx, jnp.ones_like, state)
    lifted = ones if hasattr(ones, "pairs") else ones[0]
    assert all(jnp.all(leaf == 1) for leaf in jax.tree.leaves(lifted.pairs))
    assert int(lifted.count) == 0


@each_method
def test_nnx_optimizer(method):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(jnp.ones((6, 5)))
            self.lora_a = nnx.LoRAParam(jax.random.normal(rngs.params(), (6, 2)))
            self.lora_b = nnx.LoRAParam(jnp.zeros((2, 5)))

        def __call__(self):
            return self.kernel + self.lora_a @ self.lora_b

    model = Layer(nnx.Rngs(0))
    kernel = jnp.copy(model.kernel[...])
    optimizer = nnx.Optimizer(model, method(), wrt=nnx.LoRAParam)
    loss = lambda m: jnp.sum((m() - 2.0) ** 2)
    start = loss(model)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    for _ in range(20):
        step(model, optimizer)
    assert loss(model) < start
    assert jnp.array_equal(model.kernel[...], kernel)


@each_method
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_export(method, platform):
    tx, params = method(), make_params()
    exported = jax.export.export(jax.jit(step_of(tx)), platforms=[platform])
    assert exported(params, tx.init(params)).platforms == (platform,)


@each_method
def test_state_bytes(method):
    """State in units of the factors' bytes: the promise about memory."""
    pair = make_pair(jax.random.key(4), n_in=64, rank=4, n_out=32)
    state = jax.eval_shape(functools.partial(method().init), pair)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert size(state) - method.state_copies * size(pair) <= 16  # the counters
    assert size(state) >= method.state_copies * size(pair)
