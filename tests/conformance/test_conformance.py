"""Every method against every property that users of optax rely on."""

import functools
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_optax import LoRAPair, checkpoints, engine, find_pairs, nn, notices, skipped
from lowrank_optax._core.layouts import variables_of
from tests.conformance.methods import FIRST_FORMS, METHODS, random_frames


def each_of(methods, group="", slow=()):
    """Every row in a test of its own; one worker runs all of a row, and compiles it once."""

    def row(method):
        together = pytest.mark.xdist_group(group + method.name)
        marks = [together, pytest.mark.slow] if method in slow else [together]
        return pytest.param(method, id=method.name, marks=marks)

    return pytest.mark.parametrize("method", [row(method) for method in methods])


# Numbers of other forms have tests beside their method; in most of these they are slow.
OTHER_FORMS = [method for method in METHODS if method.form_of]
each_method = each_of(METHODS, slow=OTHER_FORMS)
each_state = each_of(FIRST_FORMS)


def make_pair(key, n_in=6, rank=2, n_out=5, batch=(), dtype=jnp.float32):
    key_a, key_b = jax.random.split(key)
    a = 0.5 * jax.random.normal(key_a, (*batch, n_in, rank))
    b = 0.5 * jax.random.normal(key_b, (*batch, rank, n_out))
    return LoRAPair(a.astype(dtype), b.astype(dtype))


@functools.cache
def _jitted(function):
    return jax.jit(function)


def make_params(method, dtype=jnp.float32):
    """Two nodes, one as named leaves, one stacked node, and leaves that belong to no pair."""
    keys, node = jax.random.split(jax.random.key(0), 3), _jitted(method.node)
    q = node(make_pair(keys[0], dtype=dtype))
    return {
        "layers": [{"q": variables_of(q)}, {"q": node(make_pair(keys[1], dtype=dtype))}],
        "scanned": node(make_pair(keys[2], batch=(3,), dtype=dtype)),
        "head": {"bias": jnp.ones(4, dtype), "kernel": jnp.ones((5, 4), dtype)},
    }


def trained(params):
    """The leaves that the loss depends on."""
    pairing = find_pairs(params)
    return [(x.a, x.b) for x in pairing.take(params)], pairing.rest(params)


def product_of(node):
    """The adapter's matrix, through the layer's own forward and backward pass."""
    *batch, n_in, _ = node.a.shape
    return nn.lora_apply(jnp.broadcast_to(jnp.eye(n_in), (*batch, n_in, n_in)), node)


@jax.jit
def matrices(params):
    """What the adapters add, and the other leaves."""
    pairing = find_pairs(params)
    return [product_of(x) for x in pairing.take(params)], pairing.rest(params)


@jax.jit
def loss_of(params):
    """A smooth function of ΔK of every pair and of the other leaves."""
    products, rest = matrices(params)
    total = sum(jnp.sum((x - 1.0) ** 2) for x in products)
    others = sum(jnp.sum(x**2) for x in jax.tree.leaves(rest))
    return (total + others).astype(jnp.float32)


gradients = jax.jit(jax.grad(loss_of))


@functools.cache
def _by_name(name):
    tx = next(m for m in METHODS if m.name == name)()
    return tx, jax.jit(tx.init), jax.jit(tx.update)


def default(method):
    """The method at its default learning rate, compiled once for all tests."""
    return _by_name(method.name)


def run(method_or_tx, params, steps=3):
    """Trains for some steps, with the update under jit."""
    if hasattr(method_or_tx, "keywords"):
        tx, init, update = default(method_or_tx)
    else:
        tx = method_or_tx
        init, update = jax.jit(tx.init), jax.jit(tx.update)
    state = init(params)
    for _ in range(steps):
        updates, state = update(gradients(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def step_of(tx):
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def lifted(state):
    """The engine's state, also inside a chain or a wrapper."""
    is_lifted = lambda x: isinstance(x, engine.PairwiseState)
    leaves = jax.tree.leaves(state, is_leaf=is_lifted)
    return next(leaf for leaf in leaves if is_lifted(leaf))


def is_declared_small(state, name):
    """Whether the state's type says that a field is not shaped like the factors."""
    return get_type_hints(type(state), include_extras=True)[name] is engine.Small


def assert_close(x, y, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for one, two in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(np.float64(one), np.float64(two), rtol=rtol, atol=atol)


def assert_equal(x, y):
    assert_close(x, y, rtol=0, atol=0)


@each_of(METHODS)
def test_loss_falls_and_every_leaf_moves(method):
    params = make_params(method)
    after, _ = run(method, params, steps=30)
    assert loss_of(after) < method.remains * loss_of(params)
    (pairs, rest), (pairs_after, rest_after) = trained(params), trained(after)
    for before, now in zip(pairs, pairs_after, strict=True):
        moved = [side for side, x, y in zip("ab", before, now, strict=True) if jnp.any(x != y)]
        assert "".join(moved) == method.moves
    leaves = jax.tree.leaves(rest), jax.tree.leaves(rest_after)
    assert all(jnp.any(before != now) for before, now in zip(*leaves, strict=True))


@each_state
def test_inject_hyperparams(method):
    params = make_params(method)

    def rated(learning_rate):
        return method(learning_rate)

    injected = optax.inject_hyperparams(rated)(learning_rate=method.learning_rate)
    update, state = jax.jit(injected.update), jax.jit(injected.init)(params)
    updates, _ = update(gradients(params), state, params)
    _, init, update_by_default = default(method)
    assert_close(updates, update_by_default(gradients(params), init(params), params)[0])
    state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
    updates, _ = update(gradients(params), state, params)
    assert_close(trained(optax.apply_updates(params, updates)), trained(params))
    warm_up = optax.linear_schedule(0.0, method.learning_rate, 2)
    state = optax.inject_hyperparams(rated)(learning_rate=warm_up).init(params)
    assert state.hyperparams["learning_rate"] == 0


@each_method
def test_schedules_are_applied_without_recompilation(method):
    params = make_params(method)
    tx = method(lambda count: jnp.where(count < 2, method.learning_rate, 0.0))
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    trajectory = [params]
    for _ in range(4):
        updates, state = update(gradients(trajectory[-1]), state, trajectory[-1])
        trajectory.append(optax.apply_updates(trajectory[-1], updates))
    assert_close(trajectory[2], run(method, params, steps=2)[0])
    assert_close(matrices(trajectory[4]), matrices(trajectory[2]), atol=1e-5)
    assert update._cache_size() == 1


@each_of([m for m in FIRST_FORMS if not m.single_pass])
def test_multi_steps_sees_the_mean_gradient(method):
    params = make_params(method)
    grads = [gradients(params), jax.tree.map(lambda x: 3 * x, gradients(params))]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *grads)
    tx, init, update = default(method)
    accumulated = optax.MultiSteps(tx, every_k_schedule=2)
    accumulate, state = jax.jit(accumulated.update), accumulated.init(params)
    nothing, state = accumulate(grads[0], state, params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(nothing))
    updates, _ = accumulate(grads[1], state, params)
    assert_close(updates, update(mean, init(params), params)[0])


@each_state
def test_scan_and_cond(method):
    tx, init, _ = default(method)
    params = make_params(method)

    def maybe_step(carry, index):
        return jax.lax.cond(index < 3, lambda c: step_of(tx)(*c), lambda c: c, carry), None

    (scanned, state), _ = jax.lax.scan(maybe_step, (params, init(params)), jnp.arange(4))
    assert_close(scanned, run(method, params, steps=3)[0])
    assert jax.tree.structure(state) == jax.tree.structure(init(params))


@each_method
def test_bfloat16_parameters_have_float32_state(method):
    params = make_params(method, jnp.bfloat16)
    after, state = run(method, params, steps=10)
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtypes(after) == dtypes(params)
    assert params["scanned"].a.dtype == jnp.bfloat16
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(after))
    assert loss_of(after) < loss_of(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(lifted(state).pairs))


@each_method
@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_float16_gradients_give_the_update_of_float32_gradients(method, size):
    """Squares of 1e-4 vanish in float16, squares of 300 are infinite."""
    if method.name.startswith("sds_lora"):
        pytest.skip("the inner optimizer, optax's, sees the gradients as they are")
    params = separate_pairs(method, "p")
    grads = jax.tree.map(lambda g: size * jnp.sign(g), _separable_gradients(params))
    narrow = jax.tree.map(lambda g: g.astype(jnp.float16), grads)
    _, init, update = default(method)
    expected, _ = update(
        jax.tree.map(lambda g: g.astype(jnp.float32), narrow), init(params), params
    )
    found, _ = update(narrow, init(params), params)
    assert_close(found, expected)


@each_method
def test_pairs_without_a_gradient_stay_finite(method):
    params = separate_pairs(method, "p")
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, init, update = default(method)
    state = init(params)
    for _ in range(3):
        updates, state = update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params))


@each_method
def test_updates_have_the_dtype_of_gradients(method):
    params = make_params(method, jnp.bfloat16)
    grads = gradients(params)
    tx, init, _ = default(method)
    updates, _ = jax.eval_shape(tx.update, grads, jax.eval_shape(init, params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda g: g.dtype, grads)


@each_method
def test_float64_stays_float64(method):
    with jax.enable_x64(True):
        params = make_params(method, jnp.float64)
        after, state = run(method(), params)
        floats = [
            x for x in jax.tree.leaves((after, state)) if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        assert all(leaf.dtype == jnp.float64 for leaf in floats)


@functools.cache
def _odd_shapes(name):
    """Pairs of odd shapes before and after three steps, trained together."""
    tx, method = _by_name(name)[0], next(m for m in METHODS if m.name == name)
    pair, stacked = make_pair(jax.random.key(2)), make_pair(jax.random.key(3), batch=(2, 3))
    padded = LoRAPair(jnp.pad(pair.a, ((0, 0), (0, 2))), jnp.pad(pair.b, ((0, 2), (0, 0))))
    node = _jitted(method.node)
    before = {
        "live": node(pair),
        "padded": node(padded),
        "rank_one": node(make_pair(jax.random.key(1), rank=1)),
        "stacked": node(stacked),
    }
    before["alone"] = jax.tree.map(lambda x: x[1, 2], before["stacked"])

    def step(carry, _):
        after, state = carry
        grads = jax.grad(lambda p: sum(map(_pair_loss, p.values())))(after)
        updates, state = tx.update(grads, state, after)
        return (optax.apply_updates(after, updates), state), None

    train = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=3)[0][0])
    return before, train(before)


@jax.jit
def _pair_loss(node):
    return jnp.sum((product_of(node) - 1.0) ** 2)


@each_method
def test_rank_one(method):
    before, after = _odd_shapes(method.name)
    assert _pair_loss(after["rank_one"]) < _pair_loss(before["rank_one"])


@each_of([m for m in METHODS if m.node is not random_frames], slow=OTHER_FORMS)
def test_zero_padded_ranks_change_nothing(method):
    """Padded ranks make the Gram matrices singular; the live part must not notice."""
    _, after = _odd_shapes(method.name)
    full = after["padded"]
    live = after["live"]
    assert_close((full.a[:, :2], full.b[:2]), (live.a, live.b), rtol=1e-4, atol=1e-5)
    assert not jnp.any(full.a[:, 2:])
    assert not jnp.any(full.b[2:])


@each_method
def test_batch_axes_are_independent_pairs(method):
    """Batched products round otherwise than single ones, which OPLoRA's steps amplify."""
    _, after = _odd_shapes(method.name)
    stacked, alone = (jax.tree.leaves(after[name]) for name in ("stacked", "alone"))
    for x, y in zip(stacked, alone, strict=True):
        np.testing.assert_allclose(x[1, 2], y, rtol=0, atol=1e-4 * jnp.max(jnp.abs(y)))


@each_state
def test_donation(method):
    tx, params = method(), make_params(method)
    expected, _ = run(method, params)
    step = jax.jit(step_of(tx), donate_argnums=(0, 1), keep_unused=True)
    params, state = jax.tree.map(jnp.copy, params), tx.init(params)  # not under jit: no two
    for _ in range(3):  # leaves may be one buffer, which cannot be donated twice
        donated = jax.tree.leaves((params, state))
        params, state = step(params, state)
        assert all(leaf.is_deleted() for leaf in donated)
    assert_close(params, expected)


@each_state
def test_a_run_goes_on_from_a_checkpoint_bit_by_bit(method, tmp_path):
    _, init, update = default(method)
    params, state = run(method, make_params(method), steps=2)
    checkpoints.save(tmp_path, 2, params=params, opt_state=state)
    fresh = jax.tree.map(jnp.zeros_like, params)
    found = checkpoints.restore(tmp_path, params=fresh, opt_state=init(fresh))
    grads, grads_found = gradients(params), gradients(found.params)
    after, whole = update(grads_found, found.opt_state, found.params), update(grads, state, params)
    bits = lambda tree: jax.tree.map(lambda x: (x.dtype, np.asarray(x).tobytes()), tree)
    assert bits(after) == bits(whole)


@each_state
def test_abstract_init(method):
    tx, params = method(), make_params(method)
    abstract, concrete = jax.eval_shape(tx.init, params), default(method)[1](params)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(abstract) == shapes(concrete)


@each_state
def test_extra_arguments_are_accepted(method):
    tx, init, _ = default(method)
    params = make_params(method)
    grads, state = jax.eval_shape(gradients, params), jax.eval_shape(init, params)
    update = functools.partial(jax.eval_shape, optax.with_extra_args_support(tx).update)
    given = update(grads, state, params, value=1.0, nobody_knows=2)
    assert given == update(grads, state, params)


@each_state
def test_missing_params_are_named(method):
    params = make_params(method)
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        method().update(params, default(method)[1](params))


@each_state
def test_half_a_pair_is_an_error(method):
    params = make_params(method)
    del params["layers"][0]["q"]["lora_b"]
    with pytest.raises(ValueError, match=r"Half a pair at 'layers/0/q'.*lora_a"):
        method().init(params)


@each_state
def test_no_pairs_leaves_all_to_the_fallback(method):
    params = make_params(method)["head"]
    tx = method(fallback=optax.scale(-0.5), allow_no_pairs=True)
    updates, _ = tx.update(params, tx.init(params), params)
    sign_and_size = updates["bias"][0] / params["bias"][0]
    # A chain goes on to scale by the learning rate, and to change the sign.
    assert sign_and_size == pytest.approx(-0.5 if method.is_alias else 0.5 * method.learning_rate)


def separate_pairs(method, names):
    node = _jitted(method.node)
    return {name: node(make_pair(jax.random.key(i))) for i, name in enumerate(names)}


@jax.jit
@jax.grad
def _separable_gradients(params):
    """A loss in which no pair's gradient depends on another's value."""
    return sum(jnp.sum(jnp.sin(product_of(node) + 0.3)) for node in params.values())


@each_method
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_non_finite_gradient_spoils_its_own_pair_alone(method, bad):
    """As in AdamW the damage is loud; the small algebra shared by all pairs must not spread it."""
    _, init, update = default(method)
    params = separate_pairs(method, "pqr")
    spoiled = healthy = params
    spoiled_state = healthy_state = init(params)
    for step in range(4):
        grads = _separable_gradients(spoiled)
        if step == 1:
            grads["q"] = jax.tree.map(lambda x: x.at[..., :1].set(bad) if x.ndim else x, grads["q"])
        updates, spoiled_state = update(grads, spoiled_state, spoiled)
        spoiled = optax.apply_updates(spoiled, updates)
        updates, healthy_state = update(_separable_gradients(healthy), healthy_state, healthy)
        healthy = optax.apply_updates(healthy, updates)
    gone, kept = spoiled.pop("q"), healthy.pop("q")
    if getattr(gone, "checksum", None) is None:
        assert not all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(gone))
    else:  # the guard of OPLoRA's products leaves the pair where it was
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(gone))
        assert jnp.any(gone.a != kept.a)
        assert skipped(spoiled_state) > skipped(healthy_state) == 0
    assert_equal(spoiled, healthy)


@each_state
def test_apply_if_finite_skips_a_spoiled_step(method):
    params = separate_pairs(method, "pq")
    tx = optax.apply_if_finite(method(), max_consecutive_errors=3)
    grads = _separable_gradients(params)
    update = jax.jit(tx.update)
    _, state = update(grads, jax.jit(tx.init)(params), params)
    spoiled = {**grads, "q": jax.tree.map(lambda x: x * jnp.nan, grads["q"])}
    updates, after = update(spoiled, state, params)
    assert not any(jnp.any(x) for x in jax.tree.leaves(updates))
    assert_equal(after.inner_state, state.inner_state)


@each_state
def test_masked_none_and_empty_trees_pass_through(method):
    tx = method(allow_no_pairs=True)
    for empty in ({}, {"nothing": None}, optax.MaskedNode()):
        assert tx.update(empty, tx.init(empty), empty)[0] == empty
    params = {**make_params(method), "nothing": None, "masked": optax.MaskedNode()}
    params.pop("layers")
    updates, _ = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@each_state
def test_frozen_leaves_with_partition(method):
    params = make_params(method)
    labels = {"layers": "train", "scanned": "train", "head": "freeze"}
    tx = optax.partition({"train": method(), "freeze": optax.set_to_zero()}, labels)
    updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(gradients(params), params)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates["head"]))
    _, init, update = default(method)
    alone, _ = update(gradients(params), init(params), params)
    assert_close(updates["scanned"], alone["scanned"])


@each_state
def test_map_params_reaches_the_moments(method):
    params = make_params(method)
    tx, init, _ = default(method)
    state = init(params)
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    names = jax.tree.map(lambda _: "spec", params)
    mapped = optax.tree.map_params(
        tx, lambda leaf, name: leaf if is_masked(leaf) else name, state, names, is_leaf=is_masked
    )
    large, small = (lifted(tree).pairs for tree in (mapped, state))
    for name, tree in large._asdict().items():
        if is_declared_small(small, name):  # no parameters
            assert_equal(tree, getattr(small, name))
        else:
            assert set(jax.tree.leaves(tree)) == {"spec"}
    assert int(lifted(mapped).count) == 0


@each_state
def test_nnx_optimizer(method):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(jnp.ones((6, 5)))
            pair = LoRAPair(jax.random.normal(rngs.params(), (6, 2)), jnp.zeros((2, 5)))
            for name, leaf in variables_of(method.node(pair)).items():
                setattr(self, name, nnx.LoRAParam(leaf))

        def __call__(self):
            leaves = nnx.to_pure_dict(nnx.state(self, nnx.LoRAParam))
            return self.kernel + product_of(find_pairs(leaves).take(leaves)[0])

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
def test_export_for_accelerators(method):
    tx, init, _ = default(method)
    params = make_params(method)
    exported = jax.export.export(jax.jit(step_of(tx)), platforms=["tpu", "cuda"])
    with notices(False):  # an export cannot carry the callbacks of warnings
        assert exported(params, init(params)).platforms == ("tpu", "cuda")


@each_method
def test_state_bytes(method):
    """State in units of the factors' bytes: the promise about memory."""
    pair = make_pair(jax.random.key(4), n_in=64, rank=4, n_out=32)
    state = jax.eval_shape(functools.partial(method().init), method.node(pair))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    counters, small = 16, method.matrices * 2 * pair.a.shape[-1] ** 2 * 4
    vectors = (method.vectors * (64 + 32) + method.dense * 64 * 32) * 4
    copies = method.state_copies * size(engine.only(method.moves, pair))
    assert copies <= size(state) <= copies + counters + small + vectors


@each_of(OTHER_FORMS)
def test_other_forms_of_a_method_have_its_state(method):
    [first] = [m for m in METHODS if m.name == method.form_of]
    shapes = lambda m: jax.tree.leaves(jax.eval_shape(m().init, make_params(m)))
    assert shapes(method) == shapes(first)
