"""RefLoRA against NumPy forms that take roots or refactor, and what the splits promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, reflora
from tests.golden.trajectories import assert_trajectory, run

pytestmark = pytest.mark.usefixtures("x64")
each_form = pytest.mark.parametrize("form", ["full", "scalar"])

N_IN, RANK, N_OUT = 9, 3, 7


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), 3 * normal(1, RANK, N_OUT))
ZERO_B = PAIR._replace(b=np.zeros_like(PAIR.b))
FULL_GRADIENT = normal(2, N_IN, N_OUT)
TARGET = normal(3, N_IN, N_OUT)


def gradients(pair, full=FULL_GRADIENT):
    """What autodiff returns for the factors of K + a b when the kernel's gradient is ``full``."""
    return LoRAPair(full @ pair.b.T, pair.a.T @ full)


def power(matrix, exponent):
    """A power of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.maximum(values, 0) ** exponent @ vectors.T


def geometric_mean(pair, damping):
    """S = M⁻¹ # N by symmetric roots."""
    damp = damping * np.eye(RANK)
    m, n = pair.a.T @ pair.a + damp, pair.b @ pair.b.T + damp
    root, inverse_root = power(m, 0.5), power(m, -0.5)
    return inverse_root @ power(root @ n @ root, 0.5) @ inverse_root


def products(trajectory):
    return [pair.a @ pair.b for pair in trajectory]


def data_from(pair, steps):
    return {"target": TARGET.T, "A": [pair.a.T] * (steps + 1), "B": [pair.b.T]}


def adam(moments, grads, t, *, b1, b2, eps):
    """The directions of the two factors; the moments are replaced."""
    directions = []
    for i, g in enumerate(grads):
        m, v = moments[i]
        moments[i] = m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        directions.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return directions


BETAS = {"b1": 0.8, "b2": 0.9}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_full_form_equals_adamw_on_gradients_preconditioned_by_symmetric_roots(decay):
    pair, moments, steps = PAIR, [(0.0, 0.0)] * 2, 20
    tx = reflora(0.01, **BETAS, warmup_steps=3, damping=1e-6, weight_decay=decay)
    expected = [pair]
    for t in range(1, steps + 1):
        grads = gradients(pair, pair.a @ pair.b - TARGET)
        if t > 3:
            s = geometric_mean(pair, 1e-6)
            grads = LoRAPair(grads.a @ np.linalg.inv(s), s @ grads.b)
        directions = adam(moments, grads, t, **BETAS, eps=1e-8)
        moved = (x - 0.01 * (d + decay * x) for x, d in zip(pair, directions, strict=True))
        pair = LoRAPair(*moved)
        expected.append(pair)
    assert_trajectory(
        run(tx, data_from(PAIR, steps), 1.0),
        {"A": [pair.a.T for pair in expected], "B": [pair.b.T for pair in expected]},
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_scalar_form_has_the_products_of_factors_that_are_refactored(decay):
    """The released RefLoRA-S: factors and moments are rescaled before each step, then AdamW."""
    pair, moments, expected = PAIR, [(0.0, 0.0)] * 2, [PAIR.a @ PAIR.b]
    tx = reflora(
        0.01, **BETAS, refactoring="scalar", warmup_steps=0, eps=1e-300, damping=1e-30,
        weight_decay=decay,
    )  # fmt: skip
    for t in range(1, 21):
        root = np.sqrt(np.linalg.norm(pair.b) / np.linalg.norm(pair.a))
        pair = LoRAPair(pair.a * root, pair.b / root)
        (m_a, v_a), (m_b, v_b) = moments
        moments = [(m_a / root, v_a / root**2), (m_b * root, v_b * root**2)]
        grads = gradients(pair, pair.a @ pair.b - TARGET)
        directions = adam(moments, grads, t, **BETAS, eps=1e-300)
        moved = (x - 0.01 * (d + decay * x) for x, d in zip(pair, directions, strict=True))
        pair = LoRAPair(*moved)
        expected.append(pair.a @ pair.b)
    found = products(run(tx, data_from(PAIR, 20), 1.0))
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_the_norms_of_the_scalar_form_are_traces_of_damped_gram_matrices():
    """The squared norm of a factor of rank r grows by r times the damping."""
    pair, moments, damping = PAIR, [(0.0, 0.0)] * 2, 0.3
    tx = reflora(0.01, **BETAS, refactoring="scalar", warmup_steps=0, damping=damping)
    expected = [pair]
    for t in range(1, 6):
        grads = gradients(pair, pair.a @ pair.b - TARGET)
        of_a, of_b = adam(moments, grads, t, **BETAS, eps=1e-8)
        squares = [np.sum(x**2) + RANK * damping for x in pair]
        root = (squares[1] / squares[0]) ** 0.25
        pair = LoRAPair(pair.a - 0.01 / root * of_a, pair.b - 0.01 * root * of_b)
        expected.append(pair)
    assert_trajectory(
        run(tx, data_from(PAIR, 5), 1.0),
        {"A": [pair.a.T for pair in expected], "B": [pair.b.T for pair in expected]},
    )


def first_preconditioned(pair, grads=None):
    """The preconditioned gradients that the first update takes in: without b1, the momentum."""
    tx = reflora(1e-3, 0.0, warmup_steps=0, damping=1e-14)
    grads = gradients(pair) if grads is None else grads
    return tx.update(grads, tx.init(pair), pair)[1].pairs.mu


def first_order_change(pair):
    hat = first_preconditioned(pair)
    return hat.a @ pair.b + pair.a @ hat.b


def split_of(pair):
    """S⁻¹ and S, read from what they make of unit matrices."""
    units = LoRAPair(np.eye(N_IN, RANK), np.eye(RANK, N_OUT))
    hat = first_preconditioned(pair, units)
    return np.asarray(hat.a[:RANK]), np.asarray(hat.b[:, :RANK])


def test_the_split_makes_the_gram_matrices_of_the_factors_equal():
    inverse, s = split_of(PAIR)
    np.testing.assert_allclose(inverse @ s, np.eye(RANK), atol=1e-9)
    p = power(s, 0.5)
    a, b = PAIR.a @ p, np.linalg.solve(p, PAIR.b)
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-9)


def test_the_split_has_the_smallest_factors_of_all():
    m, n = PAIR.a.T @ PAIR.a, PAIR.b @ PAIR.b.T
    bound = lambda s: np.trace(m @ s) + np.trace(n @ np.linalg.inv(s))
    _, s = split_of(PAIR)
    assert bound(s) < bound(np.linalg.norm(PAIR.b) / np.linalg.norm(PAIR.a) * np.eye(RANK))
    for seed in range(5):
        turn = normal(10 + seed, RANK, RANK)
        other = s + 0.01 * (turn + turn.T)
        assert bound(s) < bound(other)


def test_first_order_change_depends_on_the_product_alone():
    """(ΔΔᵀ)^½ G + G (ΔᵀΔ)^½, whatever the basis of the factors."""
    delta = PAIR.a @ PAIR.b
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    expected = left * values @ left.T @ FULL_GRADIENT + FULL_GRADIENT @ (right.T * values @ right)
    np.testing.assert_allclose(first_order_change(PAIR), expected, atol=1e-6)
    transform = normal(4, RANK, RANK) + 3 * np.eye(RANK)
    moved = LoRAPair(PAIR.a @ transform, np.linalg.solve(transform, PAIR.b))
    np.testing.assert_allclose(first_order_change(moved), expected, atol=1e-6)
    plain = lambda pair: gradients(pair).a @ pair.b + pair.a @ gradients(pair).b
    assert np.abs(plain(moved) - plain(PAIR)).max() > 1


def test_scalar_form_has_the_same_products_for_all_scalings_of_the_factors():
    def of(form, factor):
        pair = LoRAPair(factor * PAIR.a, PAIR.b / factor)
        tx = reflora(0.02, refactoring=form, warmup_steps=0, eps=1e-300, damping=1e-30)
        return products(run(tx, data_from(pair, 15), 1.0))

    np.testing.assert_allclose(of("scalar", 7.0), of("scalar", 1.0), atol=1e-10)
    assert np.abs(of("full", 7.0)[-1] - of("full", 1.0)[-1]).max() > 0.1  # Adam undoes it


@each_form
def test_warm_up_is_adamw(form):
    adamw = optax.adamw(0.01, weight_decay=0.1)
    tx = reflora(0.01, refactoring=form, warmup_steps=4, weight_decay=0.1)
    ours, expected = (run(each, data_from(ZERO_B, 5), 1.0) for each in (tx, adamw))
    for pair, other in zip(ours[:5], expected[:5], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), pair, other)
    assert np.abs(ours[5].b - expected[5].b).max() > 1e-3


@pytest.mark.parametrize("damping", [1e-6, 1e-30])
@each_form
def test_from_zero_b_without_warm_up_all_is_finite_and_b_moves(form, damping):
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ZERO_B)
    tx = reflora(0.01, refactoring=form, warmup_steps=0, damping=damping, eps=1e-30)
    state = tx.init(pair)
    for _ in range(3):
        full = pair.a @ pair.b - np.float32(FULL_GRADIENT)
        updates, state = tx.update(gradients(pair, full), state, pair)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
        assert bool(updates.b.any())
        pair = optax.apply_updates(pair, updates)
    assert state.skipped == 0
