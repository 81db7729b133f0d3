"""LoRA-Pro against its equations' trajectory, a dense form in NumPy, and the paper's claims."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, lora_pro, lora_pro_efficient
from tests.golden.trajectories import assert_trajectory, load, run

pytestmark = pytest.mark.usefixtures("x64")
each_form = pytest.mark.parametrize("make", [lora_pro, lora_pro_efficient])

N_IN, RANK, N_OUT, SCALE = 9, 3, 7, 1.5


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))
ZERO_B = PAIR._replace(b=np.zeros_like(PAIR.b))
FULL_GRADIENT = normal(2, N_IN, N_OUT)


def gradients(pair, full=FULL_GRADIENT, scale=SCALE):
    """What autodiff returns for the factors of K + s a b when the kernel's gradient is ``full``."""
    return LoRAPair(scale * full @ pair.b.T, scale * pair.a.T @ full)


def sylvester(m, n, c):
    """Solves m y + y n = c as one linear system."""
    r = len(m)
    system = np.kron(m, np.eye(r)) + np.kron(np.eye(r), n.T)
    return np.linalg.lstsq(system, c.ravel(), rcond=None)[0].reshape(r, r)


def adjusted(pair, grads, damping):
    """The adjusted gradients, in the letters of the paper."""
    lora_a, lora_b, grad_a, grad_b = pair.a.T, pair.b.T, grads.a.T, grads.b.T
    damp = damping * np.eye(RANK)
    of_a = np.linalg.inv(lora_a @ lora_a.T + damp)
    of_b = np.linalg.inv(lora_b.T @ lora_b + damp)
    c = -of_b @ grad_a @ lora_a.T / SCALE**2
    x = sylvester(lora_b.T @ lora_b, lora_a @ lora_a.T, c)
    rest = np.eye(len(lora_b)) - lora_b @ of_b @ lora_b.T
    new_a = of_b @ grad_a / SCALE**2 + x @ lora_a
    new_b = rest @ grad_b @ of_a / SCALE**2 - lora_b @ x
    return LoRAPair(new_a.T, new_b.T)


def equivalent(pair, step):
    """The change of s a b to first order, of a step of the factors."""
    return SCALE * (step.a @ pair.b + pair.a @ step.b)


def oracle(pair, target, steps, *, rate, b1, b2, eps, damping, decay, efficient):
    """The trajectory on ½‖s a b − target‖²."""
    m, v, trajectory = [0.0, 0.0], [0.0, 0.0], [pair]

    def adam(parts, t):
        for i, part in enumerate(parts):
            m[i] = b1 * m[i] + (1 - b1) * part
            v[i] = b2 * v[i] + (1 - b2) * part**2
        hat = lambda i: (m[i] / (1 - b1**t)) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
        return [hat(i) for i in range(len(parts))]

    for t in range(1, steps + 1):
        step = adjusted(pair, gradients(pair, SCALE * pair.a @ pair.b - target), damping)
        if efficient:
            step = LoRAPair(*adam(step, t))
        else:
            [direction] = adam([equivalent(pair, step)], t)
            step = adjusted(pair, gradients(pair, direction), damping)
        pair = LoRAPair(*(x - rate * (d + decay * x) for x, d in zip(pair, step, strict=True)))
        trajectory.append(pair)
    return trajectory


def test_trajectory_equals_the_equations():
    data, hp = load("lora_pro_equations_randB")
    b1, b2 = (float(b) for b in data["hp_betas"])
    tx = lora_pro(hp["lr"], b1, b2, eps=hp["eps"], damping=hp["delta"], scale=hp["scale"])
    assert_trajectory(run(tx, data, hp["scale"]), data)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@each_form
def test_trajectory_equals_a_dense_one(make, decay):
    values = {"b1": 0.8, "b2": 0.9, "eps": 1e-8, "damping": 1e-8}
    target, steps = normal(3, N_IN, N_OUT), 25
    tx = make(0.01, **values, scale=SCALE, weight_decay=decay)
    data = {"target": target.T, "A": [PAIR.a.T] * (steps + 1), "B": [PAIR.b.T]}
    efficient = make is lora_pro_efficient
    expected = oracle(PAIR, target, steps, rate=0.01, **values, decay=decay, efficient=efficient)
    assert_trajectory(
        run(tx, data, SCALE),
        {"A": [pair.a.T for pair in expected], "B": [pair.b.T for pair in expected]},
    )


def first_moment(make, pair, grads=None):
    """What the first update takes the moments of: without b1, the first moment."""
    tx = make(1e-3, 0.0, damping=1e-13, scale=SCALE)
    grads = gradients(pair) if grads is None else grads
    return tx.update(grads, tx.init(pair), pair)[1].pairs.mu


def nearest(pair, full):
    """The matrix s (δa b + a δb) that is nearest to a full gradient, by least squares."""
    unit = lambda i, x: np.eye(x.size)[i].reshape(x.shape)
    columns = [equivalent(pair, LoRAPair(unit(i, pair.a), 0 * pair.b)) for i in range(pair.a.size)]
    columns += [equivalent(pair, LoRAPair(0 * pair.a, unit(i, pair.b))) for i in range(pair.b.size)]
    system = np.stack([column.ravel() for column in columns], axis=1)
    return (system @ np.linalg.lstsq(system, full.ravel(), rcond=None)[0]).reshape(full.shape)


def test_the_adjusted_gradients_have_the_equivalent_gradient_nearest_to_the_full_one():
    expected = nearest(PAIR, FULL_GRADIENT)
    step = first_moment(lora_pro_efficient, PAIR)
    np.testing.assert_allclose(equivalent(PAIR, step), expected, atol=1e-9)
    [dense] = first_moment(lora_pro, PAIR)
    np.testing.assert_allclose(dense, expected, atol=1e-9)
    plain = equivalent(PAIR, gradients(PAIR))
    assert np.linalg.norm(plain - FULL_GRADIENT) > np.linalg.norm(expected - FULL_GRADIENT) + 1


def test_the_dense_form_steps_along_the_nearest_to_adams_direction():
    """Without momentum the first direction of Adam is the sign of the equivalent gradient."""
    tx = lora_pro(1.0, 0.0, eps=1e-30, damping=1e-13, scale=SCALE)
    updates, _ = tx.update(gradients(PAIR), tx.init(PAIR), PAIR)
    expected = nearest(PAIR, np.sign(nearest(PAIR, FULL_GRADIENT)))
    np.testing.assert_allclose(-equivalent(PAIR, updates), expected, atol=1e-8)


def test_the_loss_falls_to_first_order_by_the_squared_equivalent_gradient():
    """The paper's theorem that dL ≤ 0."""
    grads, step = gradients(PAIR), first_moment(lora_pro_efficient, PAIR)
    fall = sum(np.vdot(g, d) for g, d in zip(grads, step, strict=True))
    np.testing.assert_allclose(fall, np.sum(equivalent(PAIR, step) ** 2), rtol=1e-9)


def test_the_choice_of_x_is_nearest_to_the_gradients_and_cancels():
    grads, step = gradients(PAIR), first_moment(lora_pro_efficient, PAIR)
    distance = lambda step: sum(np.sum((d - g) ** 2) for d, g in zip(step, grads, strict=True))
    for seed in range(5):
        y = 0.01 * normal(10 + seed, RANK, RANK)
        other = LoRAPair(step.a + PAIR.a @ y, step.b - y @ PAIR.b)
        np.testing.assert_allclose(equivalent(PAIR, other), equivalent(PAIR, step), atol=1e-12)
        assert distance(other) > distance(step)


def test_first_order_change_of_the_dense_form_is_invariant_under_a_change_of_basis():
    """(a T, T⁻¹ b) is the same adapter; Adam on the factors does not see that."""
    transform = normal(3, RANK, RANK) + 3 * np.eye(RANK)
    moved = LoRAPair(PAIR.a @ transform, np.linalg.solve(transform, PAIR.b))

    def change(make, pair):
        tx = make(1.0, damping=1e-13, scale=SCALE)
        state = tx.init(pair)
        for seed in range(3):
            updates, state = tx.update(gradients(pair, normal(20 + seed, N_IN, N_OUT)), state, pair)
        return equivalent(pair, updates)

    np.testing.assert_allclose(change(lora_pro, moved), change(lora_pro, PAIR), atol=1e-8)
    changes = [change(lora_pro_efficient, pair) for pair in (moved, PAIR)]
    assert np.abs(changes[0] - changes[1]).max() > 0.1


@pytest.mark.parametrize("damping", [1e-6, 1e-8, 1e-30])
@each_form
def test_first_steps_from_zero_b_are_finite_and_move_b(make, damping):
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ZERO_B)
    tx = make(0.01, damping=damping, scale=SCALE)
    state = tx.init(pair)
    for step in range(3):
        full = SCALE * pair.a @ pair.b - np.float32(FULL_GRADIENT)
        updates, state = tx.update(gradients(pair, full), state, pair)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
        assert bool(updates.b.any())
        assert bool(updates.a.any()) == (step > 0)
        pair = optax.apply_updates(pair, updates)
    assert state.skipped == 0


def test_dense_moments_are_two_kernels_and_the_efficient_ones_two_copies():
    shapes = lambda make: jax.tree.map(jnp.shape, make(0.1).init({"q": PAIR}).pairs)
    assert shapes(lora_pro) == ([(N_IN, N_OUT)], [(N_IN, N_OUT)])
    copy = {"q": LoRAPair((N_IN, RANK), (RANK, N_OUT))}
    assert shapes(lora_pro_efficient) == (copy, copy)


def test_how_far_the_efficient_form_is_from_the_papers():
    """Cosines of the first-order changes of s a b, step by step from the same pairs and gradients.

    They lie between 0.73 and 0.75 here. Two steps that have nothing in common would have zero.
    """
    dense, efficient = lora_pro(0.01, scale=SCALE), lora_pro_efficient(0.01, scale=SCALE)
    pair, states = PAIR, (dense.init(PAIR), efficient.init(PAIR))
    target, cosines = normal(3, N_IN, N_OUT), []
    for _ in range(20):
        grads = gradients(pair, SCALE * pair.a @ pair.b - target)
        (updates, first), (others, second) = (
            tx.update(grads, state, pair)
            for tx, state in zip((dense, efficient), states, strict=True)
        )
        states = first, second
        x, y = equivalent(pair, updates), equivalent(pair, others)
        cosines.append(np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))
        pair = optax.apply_updates(pair, updates)
    assert 0.72 < min(cosines) <= max(cosines) < 0.76


@each_form
def test_components_of_zeros_change_nothing(make):
    """There both Gram matrices are singular, and the sums of eigenvalues in Y are zero."""
    padded = LoRAPair(np.pad(PAIR.a, ((0, 0), (0, 2))), np.pad(PAIR.b, ((0, 2), (0, 0))))
    tx = make(0.01, scale=SCALE)
    (live, _), (whole, state) = (
        tx.update(gradients(pair), tx.init(pair), pair) for pair in (PAIR, padded)
    )
    assert state.skipped == 0
    np.testing.assert_allclose(whole.a[:, :RANK], live.a, atol=1e-9)
    np.testing.assert_allclose(whole.b[:RANK], live.b, atol=1e-9)
    assert not whole.a[:, RANK:].any()
    assert not whole.b[RANK:].any()
