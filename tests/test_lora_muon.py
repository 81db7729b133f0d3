"""LoRA-Muon against NumPy and optax's Muon, and what it claims of its steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, lora_muon
from tests.golden.trajectories import assert_trajectory, run

N_IN, RANK, N_OUT = 9, 3, 7
LENGTHS = LoRAPair(0.2 * np.sqrt(N_IN), 0.2 * np.sqrt(N_OUT))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))
ZERO_B = PAIR._replace(b=np.zeros_like(PAIR.b))
FULL = normal(2, N_IN, N_OUT)


def factor_gradients(pair, full):
    """What autodiff returns for the factors of K + a b when the kernel's gradient is ``full``."""
    return LoRAPair(full @ pair.b.T, pair.a.T @ full)


def first_update(pair, grads, rate=0.1, **keywords):
    tx = lora_muon(rate, **keywords)
    return tx.update(grads, tx.init(pair), pair)[0]


def msign(h):
    """The polar factor over the nonzero singular values."""
    u, values, vt = np.linalg.svd(h, full_matrices=False)
    return u @ np.diag(values > 1e-9 * values.max(initial=1e-30)) @ vt


def oracle(pair, target, steps, rate, b1, decay):
    """The trajectory on ½‖a b − target‖² in NumPy."""
    momentum, trajectory = jax.tree.map(np.zeros_like, pair), [pair]
    for _ in range(steps):
        grads = factor_gradients(pair, pair.a @ pair.b - target)
        average = lambda m, g: b1 * m + (1 - b1) * g
        momentum = jax.tree.map(average, momentum, grads)
        nesterov = jax.tree.map(average, momentum, grads)
        move = lambda x, h, c: x - rate * (c * msign(h) + decay * x)
        pair = jax.tree.map(move, pair, nesterov, LENGTHS)
        trajectory.append(pair)
    return trajectory


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("start", [PAIR, ZERO_B], ids=["random b", "b = 0"])
def test_trajectory_equals_a_numpy_one(start, decay, x64):
    target, steps = normal(3, N_IN, N_OUT), 25
    data = {"target": target.T, "A": [start.a.T] * (steps + 1), "B": [start.b.T]}
    expected = oracle(start, target, steps, 0.05, 0.95, decay)
    assert_trajectory(
        run(lora_muon(0.05, weight_decay=decay), data, 1.0),
        {"A": [pair.a.T for pair in expected], "B": [pair.b.T for pair in expected]},
    )


def in_turn(tx, updates=40):
    """The first and the last update for one sequence of gradients."""
    state, update, results = tx.init(PAIR), jax.jit(tx.update), []
    for seed in range(updates):
        grads = factor_gradients(PAIR, normal(10 + seed, N_IN, N_OUT))
        updated, state = update(grads, state, PAIR)
        results.append(updated)
    return [results[0], results[-1]]


def test_updates_agree_with_optax_muon(x64):
    """By a Newton–Schulz iteration that converges; its five steps by default turn nothing.

    Optax corrects the bias of the momentum: nothing at first, and nothing after 40 updates at b1 =
    0.5, when the bias is 1e-12.
    """
    keywords = {"beta": 0.5, "consistent_rms": 0.2, "weight_decay": 0.1}
    ours = in_turn(lora_muon(0.1, 0.5, weight_decay=0.1))
    exact = optax.contrib.muon(0.1, (15 / 8, -10 / 8, 3 / 8), 25, eps=1e-15, **keywords)
    for update, expected in zip(ours, in_turn(exact), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), update, expected)

    ours = in_turn(lora_muon(0.1, 0.5))
    usual = in_turn(optax.contrib.muon(0.1, **{**keywords, "weight_decay": 0.0}))
    for update, expected in zip(ours, usual, strict=True):
        for x, y, length in zip(update, expected, LENGTHS, strict=True):
            short = min(x.shape)
            stretch = (x @ y.T if short == x.shape[0] else x.T @ y) / (0.1 * length) ** 2
            np.testing.assert_allclose(stretch, stretch.T, atol=1e-6)  # the same U and V
            values = np.linalg.eigvalsh(stretch)
            assert 0.65 < values.min() < values.max() < 1.25


def test_all_singular_values_of_a_step_are_equal(x64):
    """Their size makes the entries' root mean square 0.2 η for a and for b."""
    updates = first_update(PAIR, factor_gradients(PAIR, FULL), 0.1)
    for update, length in zip(updates, LENGTHS, strict=True):
        values = np.linalg.svd(update, compute_uv=False)
        np.testing.assert_allclose(values, 0.1 * length, rtol=1e-12)
        assert np.sqrt(np.mean(update**2)) == pytest.approx(0.2 * 0.1)


def test_singular_values_of_zero_stay_zero(x64):
    """A gradient of rank 1 moves each factor by one of rank 1."""
    full = np.outer(normal(4, N_IN), normal(5, N_OUT))
    updates = first_update(PAIR, factor_gradients(PAIR, full), 0.1)
    for update, length in zip(updates, LENGTHS, strict=True):
        values = np.linalg.svd(update, compute_uv=False)
        np.testing.assert_allclose(values, [0.1 * length, 0, 0], atol=1e-9)


def product_after(pair, size=1.0, steps=5):
    tx = lora_muon(0.1, weight_decay=0.1)
    state = tx.init(pair)
    for _ in range(steps):
        grads = factor_gradients(pair, size * (pair.a @ pair.b - FULL))
        updates, state = tx.update(grads, state, pair)
        pair = optax.apply_updates(pair, updates)
    return pair.a @ pair.b


def test_the_product_is_invariant_to_rotations_of_the_rank(x64):
    """(a T, Tᵀ b) with an orthogonal T is the same adapter; another T is another one."""
    turn, _ = np.linalg.qr(normal(6, RANK, RANK))
    turned, stretched = LoRAPair(PAIR.a @ turn, turn.T @ PAIR.b), LoRAPair(2 * PAIR.a, PAIR.b / 2)
    np.testing.assert_allclose(product_after(turned), product_after(PAIR), atol=1e-10)
    assert np.abs(product_after(stretched) - product_after(PAIR)).max() > 0.1


@pytest.mark.parametrize("size", [1e-6, 50.0])
def test_steps_do_not_depend_on_the_size_of_the_gradient(size, x64):
    np.testing.assert_allclose(product_after(PAIR, size), product_after(PAIR), atol=1e-10)


def test_from_zero_b_the_first_step_moves_b_alone():
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ZERO_B)
    updates = first_update(pair, factor_gradients(pair, jnp.asarray(FULL, jnp.float32)), 0.1)
    assert not jnp.any(updates.a)
    values = jnp.linalg.svd(updates.b, compute_uv=False)
    np.testing.assert_allclose(values, 0.1 * LENGTHS.b, rtol=1e-5)


def test_components_of_zeros_stay_zero():
    """And the others move as if there were none."""
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PAIR)
    full = jnp.asarray(FULL, jnp.float32)
    padded = LoRAPair(jnp.pad(pair.a, ((0, 0), (0, 2))), jnp.pad(pair.b, ((0, 2), (0, 0))))
    updates = first_update(padded, factor_gradients(padded, full))
    expected = first_update(pair, factor_gradients(pair, full))
    assert not jnp.any(updates.a[:, RANK:])
    assert not jnp.any(updates.b[RANK:])
    np.testing.assert_allclose(updates.a[:, :RANK], expected.a, atol=1e-6)
    np.testing.assert_allclose(updates.b[:RANK], expected.b, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
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
def test_updates_are_finite(pair, full, dtype):
    pair, grads = (
        jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
        for tree in (pair, factor_gradients(pair, full))
    )
    tx = lora_muon(0.1)
    state = tx.init(pair)
    for _ in range(3):
        updates, state = tx.update(grads, state, pair)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((updates, state)))
        for update, grad in zip(updates, grads, strict=True):
            assert jnp.any(update) == jnp.any(grad)
            assert jnp.max(jnp.abs(update)) < 0.1
    assert int(state.skipped) == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"b1": 1.0}, r"`b1` must lie in \[0, 1\)"),
        ({"b1": -0.1}, r"`b1` must lie in \[0, 1\)"),
        ({"weight_decay": -0.1}, "`weight_decay` must not be negative"),
    ],
)
def test_arguments_out_of_range_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        lora_muon(**{"learning_rate": 0.1, **keywords})
