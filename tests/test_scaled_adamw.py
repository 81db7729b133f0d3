"""ScaledAdamW against the released code, PEFT's form in NumPy, and the paper's claims."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, scaled_adamw
from tests.golden.trajectories import assert_trajectory, load, run

pytestmark = pytest.mark.usefixtures("x64")
each_order = pytest.mark.parametrize("order", ["simultaneous", "sequential"])

N_IN, RANK, N_OUT = 9, 3, 7


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))
ZERO_B = PAIR._replace(b=np.zeros_like(PAIR.b))
FULL_GRADIENT = normal(2, N_IN, N_OUT)


def gradients(pair, full=FULL_GRADIENT, scale=1.0):
    """What autodiff returns for the factors of K + s a b when the kernel's gradient is ``full``."""
    return LoRAPair(scale * full @ pair.b.T, scale * pair.a.T @ full)


def preconditioned(pair, grads, damping, new_a=None):
    """The preconditioned gradients by dense inverses; that of b with the new a, if there is one."""
    a = pair.a if new_a is None else new_a
    damp = damping * np.eye(RANK)
    of_a = grads.a @ np.linalg.inv(pair.b @ pair.b.T + damp)
    return LoRAPair(of_a, np.linalg.inv(a.T @ a + damp) @ grads.b)


def oracle(pair, target, steps, *, rate, b1, b2, eps, damping, decay, sequential=False):
    """The trajectory on ½‖a b − target‖², dense and in NumPy, one factor after the other."""
    moments = {"a": (0.0, 0.0), "b": (0.0, 0.0)}
    trajectory = [pair]

    def moved(side, x, gradient, t):
        m, v = moments[side]
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        moments[side] = m, v
        length = rate * np.sqrt(1 - b2**t) / (1 - b1**t)
        return x - length * m / (np.sqrt(v) + eps) - rate * decay * x

    for t in range(1, steps + 1):
        grads = gradients(pair, pair.a @ pair.b - target)
        a = moved("a", pair.a, preconditioned(pair, grads, damping).a, t)
        of_b = preconditioned(pair, grads, damping, a if sequential else None).b
        pair = LoRAPair(a, moved("b", pair.b, of_b, t))
        trajectory.append(pair)
    return trajectory


@pytest.mark.parametrize("start", ["randB", "zeroB"])
def test_sequential_order_equals_the_released_code(start):
    data, hp = load(f"scaled_adamw_released_{start}")
    b1, b2 = (float(b) for b in data["hp_betas"])
    tx = scaled_adamw(hp["lr"], b1, b2, eps=hp["eps"], damping=hp["reg"], order="sequential")
    assert_trajectory(run(tx, data, hp["scale"]), data)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("start", [PAIR, ZERO_B], ids=["random b", "b = 0"])
@each_order
def test_trajectory_equals_a_dense_one(order, start, decay):
    """With PEFT's order and δ, and with the released ones; the decayed a preconditions g_b."""
    sequential = order == "sequential"
    values = {"b1": 0.9, "b2": 0.99, "eps": 1e-6, "damping": 1e-6 if sequential else 1e-2}
    target, steps = normal(3, N_IN, N_OUT), 25
    tx = scaled_adamw(0.01, **values, order=order, weight_decay=decay)
    data = {"target": target.T, "A": [start.a.T] * (steps + 1), "B": [start.b.T]}
    expected = oracle(start, target, steps, rate=0.01, **values, decay=decay, sequential=sequential)
    assert_trajectory(
        run(tx, data, 1.0),
        {"A": [pair.a.T for pair in expected], "B": [pair.b.T for pair in expected]},
    )


def test_eps_apart_simultaneous_order_is_adamw_on_preconditioned_gradients():
    """PEFT wraps any optimizer of torch; the order of ε and bias correction is all that differs."""
    ours, adamw = (
        scaled_adamw(0.01, eps=1e-30, weight_decay=0.1),
        optax.adamw(0.01, eps=1e-30, weight_decay=0.1),
    )
    pair, state, expected_state = PAIR, ours.init(PAIR), adamw.init(PAIR)
    for seed in range(4):
        grads = gradients(pair, normal(10 + seed, N_IN, N_OUT))
        updates, state = ours.update(grads, state, pair)
        precise = preconditioned(pair, grads, 1e-2)
        expected, expected_state = adamw.update(precise, expected_state, pair)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), updates, expected)
        pair = optax.apply_updates(pair, updates)


def first_preconditioned(pair, scale=1.0, **keywords):
    """The preconditioned gradients that the first update takes in: without b1, the momentum."""
    tx = scaled_adamw(1e-3, 0.0, damping=1e-13, **keywords)
    return tx.update(gradients(pair, scale=scale), tx.init(pair), pair)[1].pairs.mu


def first_order_change(pair):
    """The change of a b to first order, for a step along the preconditioned gradients."""
    hat = first_preconditioned(pair)
    return hat.a @ pair.b + pair.a @ hat.b


def test_first_order_change_is_the_projected_full_gradient():
    """Section 3: the full gradient on b's row space and on a's column space."""
    rows = np.linalg.pinv(PAIR.b) @ PAIR.b
    columns = PAIR.a @ np.linalg.pinv(PAIR.a)
    expected = FULL_GRADIENT @ rows + columns @ FULL_GRADIENT
    np.testing.assert_allclose(first_order_change(PAIR), expected, atol=1e-9)


def test_first_order_change_is_invariant_under_a_change_of_basis():
    """(a T, T⁻¹ b) is the same adapter, so it must move alike."""
    transform = normal(3, RANK, RANK) + 3 * np.eye(RANK)
    moved = LoRAPair(PAIR.a @ transform, np.linalg.solve(transform, PAIR.b))
    np.testing.assert_allclose(first_order_change(moved), first_order_change(PAIR), atol=1e-9)
    plain, skewed = gradients(PAIR), gradients(moved)
    change = lambda grads, pair: grads.a @ pair.b + pair.a @ grads.b
    assert np.abs(change(plain, PAIR) - change(skewed, moved)).max() > 1


def test_forward_scale_enters_the_moments_once_and_the_updates_not_at_all():
    """There is no 1/s²: with s the gradients grow by s, and so do the preconditioned ones."""
    once, twice = first_preconditioned(PAIR), first_preconditioned(PAIR, scale=2.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(2 * x, y, rtol=1e-12), once, twice)
    tx = scaled_adamw(0.01, eps=1e-300)
    steps = [tx.update(gradients(PAIR, scale=s), tx.init(PAIR), PAIR)[0] for s in (1.0, 2.0)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), *steps)


@each_order
@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-30])
def test_first_step_from_zero_b_is_finite_and_moves_b(order, damping):
    """In float32, where a Gram matrix of zeros has no inverse at all but for the damping."""
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ZERO_B)
    tx = scaled_adamw(0.01, damping=damping, order=order)
    updates, state = tx.update(gradients(pair, np.float32(FULL_GRADIENT)), tx.init(pair), pair)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
    assert not updates.a.any()
    # Adam's first step has the rate's length, but for an ε that is small beside √v.
    np.testing.assert_allclose(np.abs(updates.b), 0.01, rtol=1e-2)


@each_order
def test_weight_decay_shrinks_the_factors_before_the_move(order):
    make = lambda **keywords: scaled_adamw(0.1, order=order, **keywords)

    def first(tx):
        return tx.update(gradients(PAIR), tx.init(PAIR), PAIR)[0]

    mask = LoRAPair(True, False)
    plain, decayed = first(make()), first(make(weight_decay=0.5, mask=mask))
    np.testing.assert_allclose(decayed.a - plain.a, -0.05 * PAIR.a, atol=1e-12)
    # In its first step Adam has the length of the rate, whatever the preconditioner.
    np.testing.assert_allclose(np.abs(decayed.b), np.abs(plain.b), rtol=1e-3)


def test_sequential_order_sees_the_new_a_as_it_is_stored():
    """In bfloat16 the new a is rounded; b's gradient meets the Gram matrix of the rounded one."""
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PAIR)
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), gradients(PAIR))
    tx = scaled_adamw(0.003, 0.0, order="sequential")
    updates, state = jax.jit(tx.update)(grads, tx.init(pair), pair)
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    stored = wide(optax.apply_updates(pair, updates))
    expected = preconditioned(wide(pair), wide(grads), 1e-2, stored.a).b
    np.testing.assert_allclose(state.pairs.mu.b, expected, rtol=2e-5, atol=2e-5)
    unrounded = wide(pair).a + wide(updates).a
    other = preconditioned(wide(pair), wide(grads), 1e-2, unrounded).b
    assert np.abs(expected - other).max() > 1e-3
