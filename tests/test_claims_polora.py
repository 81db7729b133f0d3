"""What PoLoRA's paper and this library claim of its steps, one test each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, polora

N_IN, RANK, N_OUT = 9, 3, 7
FORMS = list(itertools.product(["identity", "gram"], ["exact", "linear"]))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))
FULL = normal(2, N_IN, N_OUT)


def factor_gradients(pair, full, scale=1.0):
    return LoRAPair(scale * full @ pair.b.T, scale * pair.a.T @ full)


def change(tx, pair, grads, scale):
    """The spectral norm of what the first update does to s a b."""
    updates, _ = tx.update(grads, tx.init(pair), pair)
    moved = optax.apply_updates(pair, updates)
    return scale * jnp.linalg.norm(moved.a @ moved.b - pair.a @ pair.b, ord=2)


ZERO_B = PAIR._replace(b=np.zeros_like(PAIR.b))
FIRST = np.arange(RANK) == 0
STARTS = {
    "random": PAIR,
    "b = 0": ZERO_B,
    "both tiny": LoRAPair(1e-9 * PAIR.a, 1e-9 * PAIR.b),
    "unbalanced": LoRAPair(1e3 * PAIR.a, 1e-3 * PAIR.b),
    "large": LoRAPair(1e4 * PAIR.a, 1e4 * PAIR.b),
    "zero components": LoRAPair(PAIR.a * FIRST, PAIR.b * FIRST[:, None]),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("partner", ["identity", "gram"])
@pytest.mark.parametrize("rate", [1e-3, 0.3, 30.0])
def test_the_exact_radius_bounds_the_change_of_the_kernel(start, partner, rate, x64):
    """An update changes s a b by at most the learning rate in the spectral norm."""
    scale, pair = 2.0, jax.tree.map(jnp.asarray, STARTS[start])
    tx = polora(rate, partner=partner, scale=scale)
    moved = change(tx, pair, factor_gradients(pair, FULL, scale), scale)
    assert moved <= rate * (1 + 1e-9)
    assert moved > 0


@pytest.mark.parametrize("partner", ["identity", "gram"])
@pytest.mark.parametrize("b2", [0.0, 0.99])
def test_a_pair_that_gets_no_gradient_for_long_stays_where_it_is(partner, b2):
    """Its curvature decays to zero: an unused layer, or an expert that nothing is routed to."""
    pair = jax.tree.map(jnp.float32, ZERO_B)
    tx = polora(0.1, b2=b2, partner=partner)
    zeros = jax.tree.map(jnp.zeros_like, pair)

    def step(_, carry):
        pair, state = carry
        updates, state = tx.update(zeros, state, pair)
        return optax.apply_updates(pair, updates), state

    moved, state = jax.jit(lambda: jax.lax.fori_loop(0, 8000, step, (pair, tx.init(pair))))()
    assert jnp.array_equal(moved.a, pair.a)
    assert jnp.array_equal(moved.b, pair.b)
    grads = jax.tree.map(jnp.float32, factor_gradients(PAIR, FULL))
    updates, _ = tx.update(grads, state, moved)  # and it moves once there is a gradient
    assert all(jnp.all(jnp.isfinite(u)) and jnp.any(u) for u in updates)


@pytest.mark.parametrize("partner", ["identity", "gram"])
@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_bound_holds_up_to_rounding(partner, dtype, rounding, size):
    """At rates that are not below the rounding of the factors themselves."""
    pair = jax.tree.map(lambda x: jnp.asarray(size * x, dtype), PAIR)
    grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), factor_gradients(PAIR, FULL))
    rate = size**2
    tx = polora(rate, partner=partner)
    updates, _ = tx.update(grads, tx.init(pair), pair)
    wide = lambda tree: jax.tree.map(jnp.float32, tree)
    before, step = wide(pair), wide(updates)
    moved = jax.tree.map(jnp.add, before, step)
    change = jnp.linalg.norm(moved.a @ moved.b - before.a @ before.b, ord=2)
    assert 0 < change <= rate * (1 + rounding)


def test_the_bound_holds_in_every_update_of_a_run(x64):
    scale, pair = 1.5, ZERO_B
    schedule = optax.cosine_decay_schedule(0.5, 40)
    tx = polora(schedule, scale=scale)
    state = tx.init(pair)
    for count in range(40):
        full = scale * pair.a @ pair.b - 3 * FULL
        updates, state = tx.update(factor_gradients(pair, full, scale), state, pair)
        moved = optax.apply_updates(pair, updates)
        difference = scale * (moved.a @ moved.b - pair.a @ pair.b)
        assert jnp.linalg.norm(difference, ord=2) <= schedule(count) * (1 + 1e-9)
        pair = moved
    assert jnp.linalg.norm(scale * pair.a @ pair.b) > 1


def test_the_linear_radius_bounds_the_first_order_change_and_explodes_at_small_factors(x64):
    """Why the exact radius is the default: from tiny factors the linear step is not bounded."""
    tx = polora(0.3, radius="linear")
    grads = factor_gradients(PAIR, FULL)
    updates, _ = tx.update(grads, tx.init(PAIR), PAIR)
    first_order = updates.a @ PAIR.b + PAIR.a @ updates.b
    assert jnp.linalg.norm(first_order, ord=2) <= 0.3
    tiny = STARTS["both tiny"]
    assert change(tx, tiny, factor_gradients(tiny, FULL), 1.0) > 1e3


@pytest.mark.parametrize(("partner", "radius"), FORMS)
def test_a_first_step_does_not_depend_on_the_size_of_the_gradient(partner, radius, x64):
    """Polar steps: only the direction of the gradient matters."""
    tx = polora(0.1, partner=partner, radius=radius)
    one, other = (
        tx.update(factor_gradients(PAIR, size * FULL), tx.init(PAIR), PAIR)[0] for size in (1, 50)
    )
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)


@pytest.mark.parametrize(("partner", "radius"), FORMS)
def test_every_form_is_invariant_to_rotations_of_the_rank(partner, radius, x64):
    """(a T, Tᵀ b) is the same adapter; a b moves alike over a whole run."""
    turn, _ = jnp.linalg.qr(normal(3, RANK, RANK))

    def run(pair):
        tx = polora(0.1, partner=partner, radius=radius)
        state = tx.init(pair)
        for _ in range(5):
            grads = factor_gradients(pair, pair.a @ pair.b - FULL)
            updates, state = tx.update(grads, state, pair)
            pair = optax.apply_updates(pair, updates)
        return pair.a @ pair.b

    np.testing.assert_allclose(run(LoRAPair(PAIR.a @ turn, turn.T @ PAIR.b)), run(PAIR), atol=1e-9)


def first_order_moves(partner, pair):
    """What each factor's step does to a b, without its length."""
    tx = polora(0.1, delta=1e-12, partner=partner)
    updates, _ = tx.update(factor_gradients(pair, FULL), tx.init(pair), pair)
    moves = updates.a @ pair.b, pair.a @ updates.b
    return [move / jnp.linalg.norm(move) for move in moves]


def test_directions_of_the_two_sided_form_are_invariant_to_any_transformation(x64):
    """(a T, T⁻¹ b) with δ → 0: each factor moves a b in the same direction; one-sided does not."""
    transform = normal(4, RANK, RANK) + 3 * jnp.eye(RANK)
    other = LoRAPair(PAIR.a @ transform, jnp.linalg.solve(transform, PAIR.b))
    for x, y in zip(first_order_moves("gram", other), first_order_moves("gram", PAIR), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    differences = [
        jnp.max(jnp.abs(x - y))
        for x, y in zip(
            first_order_moves("identity", other), first_order_moves("identity", PAIR), strict=True
        )
    ]
    assert max(differences) > 0.01


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("partner", "radius"), FORMS)
@pytest.mark.parametrize(
    ("pair", "full"),
    [
        (ZERO_B, FULL),
        (PAIR, np.zeros_like(FULL)),  # nothing to do
        (jax.tree.map(np.zeros_like, PAIR), FULL),  # both factors 0: the gradients are 0 too
        (LoRAPair(PAIR.a[:3], PAIR.b[:, :3]), FULL[:3, :3]),  # a square layer of the rank's size
        (LoRAPair(PAIR.a[:, [0, 0, 0]], PAIR.b), FULL),  # equal components
    ],
    ids=["b = 0", "no gradient", "both 0", "rank as large as the layer", "equal components"],
)
def test_updates_are_finite(pair, full, partner, radius, dtype):
    pair, grads = (
        jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
        for tree in (pair, factor_gradients(pair, full))
    )
    tx = polora(0.1, partner=partner, radius=radius)
    state = tx.init(pair)
    for _ in range(3):
        updates, state = tx.update(grads, state, pair)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((updates, state)))
        assert jnp.any(updates.b) == jnp.any(grads.b)
        assert jnp.any(updates.a) == jnp.any(grads.a)
    assert int(state.skipped) == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"delta": 0.0}, r"`delta` must lie in \(0, 1\], got 0.0"),
        ({"delta": 2.0}, r"`delta` must lie in \(0, 1\], got 2.0"),
        ({"partner": "none"}, "`partner` must be one of identity, gram, got 'none'"),
        ({"radius": "small"}, "`radius` must be one of exact, linear, got 'small'"),
        ({"b1": 1.0}, "`b1` must lie in"),
        ({"b2": -0.1}, "`b2` must lie in"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        polora(**{"learning_rate": 0.1, **keywords})


def test_a_rate_of_zero_moves_nothing():
    tx = polora(lambda count: jnp.where(count == 0, 0.0, 0.1))
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ZERO_B)
    grads = factor_gradients(pair, jnp.asarray(FULL, jnp.float32))
    updates, state = tx.update(grads, tx.init(pair), pair)
    assert not any(jnp.any(x) for x in updates)
    updates, _ = tx.update(grads, state, pair)
    assert jnp.any(updates.b)
