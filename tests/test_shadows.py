"""The backward pass of shadowed pairs against explicit gradients, and what may be done with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import (
    LoRAPair,
    Metric,
    clip_by_global_norm,
    frame,
    lorsum,
    nn,
    oplora,
    oplora_proj,
    scale_gradients,
    scaled_oplora,
    shadow,
)
from lowrank_optax._core import krylov

TOKENS, N_IN, RANK, N_OUT, SCALE = 20, 7, 2, 150, 1.5
KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def make_pair(seed=0, batch=()):
    return LoRAPair(normal(seed, *batch, N_IN, RANK), normal(seed + 1, *batch, RANK, N_OUT))


def make_node(seed=0, batch=(), **keywords):
    """A shadowed pair whose momentum is not zero."""
    node = shadow(make_pair(seed, batch), jax.random.key(seed + 2), **keywords)
    return node if node.m_b is None else node._replace(m_b=normal(seed + 3, *node.m_b.shape))


def loss_of_output(y):
    return jnp.mean(jnp.sum(jnp.sin(y) + 0.1 * y**2, axis=-1))


def loss(node, x):
    return loss_of_output(nn.lora_apply(x, node, SCALE))


gradient = jax.jit(jax.grad(loss))


def plain(node):
    return LoRAPair(node.a, node.b)


def dense_statistics(kind, x, pair):
    """The metric's statistics from every token's input and output gradient."""
    dy = jax.grad(loss_of_output)(SCALE * x @ pair.a @ pair.b)
    if kind == "kfac":
        return jnp.mean(x**2, axis=0), TOKENS * jnp.sum(dy**2, axis=0)
    kernel_gradient = x.T @ dy
    squares = TOKENS * kernel_gradient**2
    return jnp.sum(squares, axis=1), jnp.sum(squares, axis=0)


def dense_bases(node, x, metric):
    """The bases by explicit products with the gradient in a b."""
    pair = plain(node)
    product = pair.a @ pair.b
    g = jax.grad(lambda p: loss_of_output(SCALE * x @ p))(product)
    d_in, d_out = jnp.ones(N_IN), jnp.ones(N_OUT)
    if metric is not None:
        new_in, new_out = dense_statistics(metric.kind, x, pair)
        damped = lambda new: metric.b2 * 1.0 + (1 - metric.b2) * new + metric.damping
        d_in, d_out = damped(new_in) ** metric.power, damped(new_out) ** metric.power
    has_momentum = node.m_a is not None
    a, b = [pair.a], [pair.b]
    if has_momentum:
        a, b = [pair.a, node.m_a / d_in[:, None]], [pair.b, node.m_b / d_out]
    step = [(jnp.hstack(a), jnp.vstack(b))]
    momentum = [(node.m_a, node.m_b)] if has_momentum else []
    for _ in range(2 * krylov.iterations_of(node)):
        a, b = step[-1]
        step.append((g @ b.T / d_in[:, None], a.T @ g / d_out))
        if has_momentum:
            a, b = momentum[-1]
            momentum.append((g @ b.T, a.T @ g))
    if metric is None:
        return step
    if not has_momentum:
        return step
    pairs = zip(step, momentum, strict=True)
    return [(jnp.hstack([s[0], m[0]]), jnp.vstack([s[1], m[1]])) for s, m in pairs]


METRICS = [None, Metric("kfac", b2=0.7), Metric("shampoo", b2=0.7, power=0.25)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.kind if m else "plain")
@pytest.mark.parametrize("momentum_rank", [0, 1, RANK])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_the_backward_pass_returns_products_of_the_dense_gradient(
    iterations, momentum_rank, metric
):
    keywords = {"iterations": iterations, "momentum_rank": momentum_rank, "metric": metric}
    node, x = make_node(**keywords), normal(9, TOKENS, N_IN)
    assert krylov.iterations_of(node) == iterations
    basis, _ = krylov.unpack(node, gradient(node, x))
    expected = dense_bases(node, x, metric)
    assert len(basis["a"]) == 2 * iterations
    assert len(basis["b"]) == 2 * iterations + 1
    for side, of in (("a", 0), ("b", 1)):
        for i, element in enumerate(basis[side]):
            want = expected[i][of]
            np.testing.assert_allclose(element, want, rtol=0, atol=1e-12 * jnp.max(abs(want)))


@pytest.mark.parametrize("n_out", [5, 128, 129])
def test_shampoos_statistics_of_layers_of_any_width(n_out):
    """They are summed over blocks of 128 output features."""
    pair = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, n_out))
    node, x = shadow(pair, KEY, metric=METRICS[2]), normal(9, TOKENS, N_IN)
    grads = gradient(node, x)
    assert_close((grads.d_in, grads.d_out), dense_statistics("shampoo", x, pair), rtol=1e-4)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.kind if m else "plain")
def test_shadows_change_neither_output_nor_ordinary_gradients(metric):
    node, x = make_node(iterations=2, metric=metric), normal(9, TOKENS, N_IN)
    assert jnp.array_equal(nn.lora_apply(x, node, SCALE), nn.lora_apply(x, plain(node), SCALE))

    def of_all(node, x, scale):
        return loss_of_output(nn.lora_apply(x, node, scale))

    found = jax.grad(of_all, argnums=(0, 1, 2))(node, x, SCALE)
    expected = jax.grad(of_all, argnums=(0, 1, 2))(plain(node), x, SCALE)
    assert_close((plain(found[0]), *found[1:]), expected, rtol=1e-4)


def assert_close(x, y, rtol=1e-5, atol=0.0):
    """Equality relative to the largest entry of each leaf."""
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for one, two in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        bound = rtol * float(jnp.max(jnp.abs(two))) + atol
        np.testing.assert_allclose(np.float64(one), np.float64(two), rtol=0, atol=bound)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.kind if m else "plain")
def test_batch_axes_are_separate_layers(metric):
    node = make_node(batch=(3,), iterations=2, metric=metric)
    x = normal(9, 3, TOKENS, N_IN)
    sum_of_losses = lambda node, x: sum(loss_of_output(y) for y in nn.lora_apply(x, node, SCALE))
    together = jax.grad(sum_of_losses)(node, x)
    alone = [gradient(jax.tree.map(lambda v: v[i], node), x[i]) for i in range(3)]  # noqa: B023
    assert_close(together, jax.tree.map(lambda *v: jnp.stack(v), *alone), rtol=1e-4)
    basis, _ = krylov.unpack(node, together)
    assert basis["b"][4].shape[:2] == (3, basis["a"][0].shape[-1])


def test_an_input_that_mixes_batch_entries_is_an_error():
    with pytest.raises(ValueError, match=r"\(\*\(3,\), tokens, in\)"):
        nn.lora_apply(normal(9, TOKENS, N_IN), make_node(batch=(3,)), SCALE)


SQUARE = 6
"""Width of the layers of a stack."""


def make_stack():
    key = jax.random.key(5)
    pairs = [LoRAPair(normal(i, SQUARE, RANK), normal(i + 10, RANK, SQUARE)) for i in range(2)]
    nodes = [shadow(p, jax.random.fold_in(key, i), iterations=2) for i, p in enumerate(pairs)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *nodes)


def layer(x, node):
    return jnp.tanh(x + nn.lora_apply(x, node, SCALE))


def unrolled(stack, x):
    for i in range(2):
        x = layer(x, jax.tree.map(lambda leaf: leaf[i], stack))  # noqa: B023
    return jnp.mean(x**2)


def test_scan_over_layers_equals_a_loop():
    stack, x = make_stack(), normal(9, TOKENS, SQUARE)
    scanned = lambda stack, x: jnp.mean(
        jax.lax.scan(lambda x, node: (layer(x, node), None), x, stack)[0] ** 2
    )
    assert_close(jax.jit(jax.grad(scanned))(stack, x), jax.grad(unrolled)(stack, x))


def test_remat_changes_nothing():
    stack, x = make_stack(), normal(9, TOKENS, SQUARE)
    remat = jax.checkpoint(layer)
    scanned = lambda stack, x: jnp.mean(
        jax.lax.scan(lambda x, node: (remat(x, node), None), x, stack)[0] ** 2
    )
    assert_close(jax.jit(jax.grad(scanned))(stack, x), jax.grad(unrolled)(stack, x))


def test_vmap_over_layers_equals_a_loop():
    stack, x = make_stack(), normal(9, 2, TOKENS, SQUARE)
    vmapped = lambda stack, x: jnp.sum(jax.vmap(layer)(x, stack) ** 2)
    one = lambda node, x: jnp.sum(layer(x, node) ** 2)
    alone = [jax.grad(one)(jax.tree.map(lambda v: v[i], stack), x[i]) for i in range(2)]  # noqa: B023
    assert_close(
        jax.grad(vmapped)(stack, x), jax.tree.map(lambda *v: jnp.stack(v), *alone), rtol=1e-4
    )


def test_bfloat16_activations_accumulate_in_float32():
    node = make_node(iterations=2, metric=METRICS[1])
    x = normal(9, 512, N_IN).astype(jnp.bfloat16)
    grads = gradient(node, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}
    assert nn.lora_apply(x, node, SCALE).dtype == jnp.bfloat16
    exact = gradient(node, x.astype(jnp.float32))
    assert_close(grads, exact, rtol=0.1)
    deviations = krylov.deviations(node, grads, single_pass=True)[None]
    assert krylov.is_untouched(deviations).item() == 1


def test_eight_devices_with_the_batch_sharded_equal_one():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    for metric in METRICS:
        node, x = make_node(iterations=2, metric=metric), normal(9, 8 * TOKENS, N_IN)
        sharded = jax.jit(jax.grad(loss), in_shardings=(everywhere, rows), out_shardings=everywhere)
        grads = sharded(jax.device_put(node, everywhere), jax.device_put(x, rows))
        assert_close(grads, gradient(node, x), rtol=1e-4)


# What may be done with the products


def update(tx, node, grads):
    @jax.jit
    def first_step(node, grads):
        updates, state = tx.update(grads, tx.init(node), node)
        return optax.apply_updates(node, updates), state

    return first_step(node, grads)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("tx", "metric"),
    [(oplora(0.1, iterations=0), None), (scaled_oplora(0.1, iterations=0), METRICS[1])],
)
def test_without_iterations_micro_batches_add_up(tx, metric):
    """Jacobi half-steps read only what is linear: MultiSteps equals one large batch."""
    node = make_node(iterations=0, metric=metric)
    x = normal(9, 2 * TOKENS, N_IN)
    accumulated = optax.MultiSteps(tx, every_k_schedule=2)
    state, params = accumulated.init(node), node
    for micro_batch in (x[:TOKENS], x[TOKENS:]):
        updates, state = jax.jit(accumulated.update)(gradient(node, micro_batch), state, params)
        params = optax.apply_updates(params, updates)
    whole, _ = update(tx, node, gradient(node, x))
    assert_close(params, whole, rtol=1e-6)  # MultiSteps accumulates in float32
    assert jnp.any(whole.a != node.a)


PROJ = {"iterations": 2, "momentum_rank": 0}


def assert_same(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize(
    ("method", "keywords"),
    [(oplora, {}), (scaled_oplora, {"metric": Metric()}), (oplora_proj, PROJ)],
)
def test_sums_of_quadratic_products_are_found_and_not_used(method, keywords):
    """The mean over micro-batches is no product of the mean gradient: nothing moves, it counts."""
    node = make_node(**keywords)
    tx = optax.MultiSteps(method(0.1), every_k_schedule=2)
    state, params = tx.init(node), node
    for micro_batch in (normal(9, TOKENS, N_IN), normal(10, TOKENS, N_IN)):
        updates, state = jax.jit(tx.update)(gradient(node, micro_batch), state, params)
        params = optax.apply_updates(params, updates)
    assert_same(params, node)
    assert int(state.inner_opt_state.skipped) == 1


def test_weights_used_twice_in_a_forward_pass_are_found_and_not_moved():
    node, x = make_node(iterations=1), normal(9, TOKENS, N_IN)
    twice = lambda nodes, x: loss(nodes["shared"], x) + loss(nodes["shared"], jnp.sin(3 * x))
    params = {"shared": node, "alone": make_node(20)}
    total = lambda p, x: twice(p, x) + loss(p["alone"], x)
    after, state = update(oplora(0.1), params, jax.grad(total)(params, x))
    assert jnp.array_equal(after["shared"].a, node.a)
    assert jnp.any(after["alone"].a != params["alone"].a)
    assert int(state.skipped) == 1


def test_nan_in_one_layer_leaves_it_and_the_others_unharmed():
    params = {"bad": make_node(), "good": make_node(20)}
    x = normal(9, TOKENS, N_IN)
    grads = jax.grad(lambda p: loss(p["bad"], x) + loss(p["good"], x))(params)
    expected, _ = update(oplora(0.1), params, grads)
    x = x.at[0, 0].set(jnp.nan)
    grads["bad"] = gradient(params["bad"], x)
    assert not jnp.any(jnp.isfinite(grads["bad"].b))
    after, state = update(oplora(0.1), params, grads)
    assert_close(after["good"], expected["good"], rtol=0)
    assert_close(after["bad"], params["bad"], rtol=0)
    assert int(state.skipped) >= 1


@pytest.mark.parametrize("spoil", [lambda g: g * jnp.nan, lambda g: 0.1 * g], ids=["nan", "scaled"])
def test_a_refused_update_of_oplora_proj_leaves_its_momentum_and_last_result(spoil):
    tx, node = oplora_proj(0.1), make_node(**PROJ)
    grads = gradient(node, normal(9, TOKENS, N_IN))
    _, state = update(tx, node, grads)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(state.pairs.mu))
    updates, after = jax.jit(tx.update)(jax.tree.map(spoil, grads), state, node)
    assert_same(updates, jax.tree.map(jnp.zeros_like, node))
    assert_same(after.pairs, state.pairs)
    assert after.skipped > state.skipped == 0


@pytest.mark.usefixtures("x64")
def test_scaled_gradients_are_the_gradients_of_the_scaled_loss():
    params = {"q": make_node(iterations=2), "bias": jnp.ones(3)}
    x = normal(9, TOKENS, N_IN)
    of = lambda factor: jax.grad(
        lambda p: factor * (loss(p["q"], x) + jnp.sum(jnp.exp(p["bias"])))
    )(params)
    assert_close(scale_gradients(of(8.0), 1 / 8), of(1.0), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("metric", METRICS[1:], ids=lambda m: m.kind)
def test_scaled_gradients_with_a_metric(metric):
    node, x = make_node(iterations=0, metric=metric), normal(9, TOKENS, N_IN)
    of = lambda factor: jax.grad(lambda node: factor * loss(node, x))(node)
    scaled, expected = scale_gradients(of(8.0), 1 / 8), of(1.0)
    for name in ("a", "b", "m_a", "m_b", "d_in", "d_out"):
        assert_close(getattr(scaled, name), getattr(expected, name), rtol=1e-12)
    with pytest.raises(ValueError, match="Scale the loss instead"):
        scale_gradients({"q": make_node(iterations=1, metric=metric)}, 0.5)


@pytest.mark.usefixtures("x64")
def test_clipping_is_the_gradient_of_a_smaller_loss():
    params = {"q": make_node(iterations=2), "bias": jnp.ones(3)}
    x = normal(9, TOKENS, N_IN)
    of = lambda factor: jax.grad(lambda p: factor * (loss(p["q"], x) + jnp.sum(p["bias"] ** 2)))(
        params
    )
    grads = of(1.0)
    norm = optax.tree.norm((grads["q"].a, grads["q"].b, grads["bias"]))
    clip = clip_by_global_norm(0.25 * norm)
    assert_close(clip.update(grads, clip.init(params))[0], of(0.25), rtol=1e-12)
    loose = clip_by_global_norm(4 * norm)
    assert_close(loose.update(grads, loose.init(params))[0], grads, rtol=1e-15)
    chained = optax.chain(clip, oplora(0.1, iterations=2))
    after, state = update(chained, params, grads)
    assert int(state[1].skipped) == 0
    assert_close(after["q"], update(oplora(0.1, iterations=2), params, of(0.25))[0]["q"], 1e-10)


@pytest.mark.usefixtures("x64")
def test_pairs_with_and_without_products_are_updated_together():
    """Only `iterations=0` takes a pair without a checksum, and a pair may have one to spare."""
    nodes = {n: make_node(iterations=n, momentum_rank=0) for n in (0, 1)}
    grads = {n: gradient(node, normal(5, TOKENS, N_IN)) for n, node in nodes.items()}
    tx = oplora(0.1, 0.0, iterations=0)
    updates, state = tx.update(grads, tx.init(nodes), nodes)
    assert state.skipped == 0
    np.testing.assert_allclose(updates[0].a, updates[1].a, rtol=1e-5)
    assert jnp.any(updates[0].b != 0)


def test_clipping_takes_every_kind_of_pair():
    """Frames are constants, whose gradients are zero; the factors are clipped with the others."""
    params = {"shadowed": make_node(), "plain": make_pair(20), "framed": frame(make_pair(30), KEY)}
    x = normal(9, TOKENS, N_IN)
    of = lambda factor: jax.grad(lambda p: factor * sum(loss(n, x) for n in p.values()))(params)
    grads = of(1.0)
    norm = optax.tree.norm([(g.a, g.b) for g in grads.values()])
    clip = clip_by_global_norm(0.25 * norm)
    assert_close(clip.update(grads, clip.init(params))[0], of(0.25), rtol=1e-12)


def test_clipping_by_optax_is_found():
    node, x = make_node(iterations=1), normal(9, TOKENS, N_IN)
    tx = optax.chain(optax.clip_by_global_norm(1e-3), oplora(0.1))
    after, state = update(tx, node, gradient(node, x))
    assert jnp.array_equal(after.a, node.a)
    assert int(state[1].skipped) == 1


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_a_rate_of_zero_moves_no_factor(iterations):
    """The first step of a warm-up, where b = 0, must not shrink a."""
    pair = make_pair()._replace(b=jnp.zeros((RANK, N_OUT)))
    node = shadow(pair, KEY, iterations=iterations)
    tx = oplora(lambda count: 0.0 * count, iterations=iterations)
    after, _ = update(tx, node, gradient(node, normal(9, TOKENS, N_IN)))
    assert_close(plain(after), pair, rtol=1e-6)


# Bad input


def test_errors_of_shadow():
    pair = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"momentum_rank.*between 0 and min\(in, out\) = 4"):
        shadow(pair, KEY, momentum_rank=5)
    with pytest.raises(ValueError, match="`iterations` must be at least 0, got -1"):
        shadow(pair, KEY, iterations=-1)
    with pytest.raises(TypeError, match=r"`momentum_rank` must be an integer, got 1\.0"):
        shadow(pair, KEY, momentum_rank=1.0)
    with pytest.raises(ValueError, match=r"metric\.kind"):
        shadow(pair, KEY, metric=Metric("newton"))
    with pytest.raises(ValueError, match=r"metric\.damping"):
        shadow(pair, KEY, metric=Metric(damping=0.0))


def test_errors_of_lorsum():
    start = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))
    run = lambda *terms, **more: lorsum(
        terms, [1.0] * len(terms), start, **{"iterations": 1, "ridge": 0.1, **more}
    )
    with pytest.raises(ValueError, match=r"terms\[0\].*in and out must agree"):
        run(LoRAPair(jnp.ones((5, 2)), jnp.ones((2, 4))))
    with pytest.raises(ValueError, match=r"terms\[1\].*do not multiply"):
        run(start, LoRAPair(jnp.ones((6, 3)), jnp.ones((2, 4))))
    with pytest.raises(ValueError, match="a rank of 0"):
        run(LoRAPair(jnp.ones((6, 0)), jnp.ones((0, 4))))
    with pytest.raises(ValueError, match="`ridge` must not be negative"):
        run(start, ridge=-1.0)
    with pytest.raises(TypeError, match=r"`iterations` must be an integer, got 1\.0"):
        run(start, iterations=1.0)
    with pytest.raises(ValueError, match="1 terms but 2 coefficients"):
        lorsum([start], [1.0, 2.0], start, iterations=1, ridge=0.1)


@pytest.mark.parametrize(
    ("tx", "node", "remedy"),
    [
        (oplora(0.1), make_pair(), r"shadow\(pair, key, iterations=1\)"),
        (oplora(0.1, 0.0), make_pair(), r"iterations=1, momentum_rank=0\)"),
        (oplora(0.1, iterations=2), make_node(), r"shadow\(pair, key, iterations=2\)"),
        (oplora(0.1), make_node(momentum_rank=0), r"shadow\(pair, key, iterations=1\)"),
        (oplora(0.1), make_node(metric=Metric()), "It has a metric"),
        (oplora_proj(0.1), make_node(), r"iterations=2, momentum_rank=0\)"),
        (scaled_oplora(0.1), make_node(), r"metric=Metric\(\)\)"),
        (oplora(0.1), jax.tree.map(jnp.bfloat16, make_node()), "in bfloat16.*cast the factors al"),
    ],
)
def test_pairs_without_the_right_shadows_are_named_with_the_remedy(tx, node, remedy):
    with pytest.raises(ValueError, match=f"layers/q: .*{remedy}"):
        tx.init({"layers": {"q": node}})


def test_a_node_without_momentum_leaves_is_an_error():
    node = make_node()
    with pytest.raises(ValueError, match=r"q: .*shadow"):
        oplora(0.1).init({"q": node._replace(m_a=None, m_b=None)})


@pytest.mark.parametrize("method", [oplora, oplora_proj, scaled_oplora])
def test_injected_iterations_must_be_static(method):
    """Shapes depend on them; as traced numbers they would fail somewhere inside."""
    metric = METRICS[1] if method is scaled_oplora else None
    params = {"q": make_node(iterations=2, metric=metric)}
    with pytest.raises(TypeError, match=r"`iterations` must be an integer.*`static_args`"):
        optax.inject_hyperparams(method)(0.1).init(params)
    tx = optax.inject_hyperparams(method, static_args=("iterations",))(0.1)
    grads = {"q": gradient(params["q"], normal(9, TOKENS, N_IN))}
    after, _ = update(tx, params, grads)
    assert_close(after, update(method(0.1), params, grads)[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "keywords", "message"),
    [
        (oplora, {"learning_rate": -0.1}, "`learning_rate` must be positive"),
        (oplora, {"momentum": 1.0}, r"`momentum` must lie in \[0, 1\)"),
        (oplora, {"dampening": 1.0}, r"`dampening` must lie in \[0, 1\)"),
        (oplora, {"iterations": -1}, "`iterations` must be at least 0"),
        (oplora, {"lmbd": -1.0}, "`lmbd` must not be negative"),
        (oplora, {"solver_damping": -1.0}, "`solver_damping` must not be negative"),
        (oplora, {"momentum_damping": 0.0}, "`momentum_damping` must be positive"),
        (oplora_proj, {"momentum": -0.5}, r"`momentum` must lie in \[0, 1\)"),
        (oplora_proj, {"solver_damping": -1.0}, "`solver_damping` must not be negative"),
        (scaled_oplora, {"b2": 1.0}, r"`b2` must lie in \[0, 1\)"),
        (scaled_oplora, {"damping": 0.0}, "`damping` must be positive"),
        (scaled_oplora, {"power": 0.0}, "`power` must be positive"),
        (scaled_oplora, {"momentum_damping": 0.0}, "`momentum_damping` must be positive"),
    ],
)
def test_hyperparameters_out_of_range(method, keywords, message):
    with pytest.raises(ValueError, match=message):
        method(**{"learning_rate": 0.1, **keywords})
