"""LoRA-SOAP against a dense form in NumPy, and what the eigenbasis promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, lora_soap
from tests.golden.trajectories import assert_trajectory, run

pytestmark = pytest.mark.usefixtures("x64")

N_IN, RANK, N_OUT = 9, 3, 7


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))
ZERO_B = PAIR._replace(b=np.zeros_like(PAIR.b))
TARGET = 3 * normal(3, N_IN, N_OUT)
starts = pytest.mark.parametrize("start", [PAIR, ZERO_B], ids=["random b", "b = 0"])


def gradients(pair, full):
    """What autodiff returns for the factors of K + a b when the kernel's gradient is ``full``."""
    return LoRAPair(full @ pair.b.T, pair.a.T @ full)


def data_from(pair, steps):
    return {"target": TARGET.T, "A": [pair.a.T] * (steps + 1), "B": [pair.b.T]}


def oracle(pair, steps, *, rate, b1, b2, eps, every, decay):
    """The trajectory on ½‖a b − target‖², each factor as (rows, r)."""
    x = [pair.a, pair.b.T]
    m, v, gram, basis = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [None, None]
    trajectory = [pair]
    for t in range(1, steps + 1):
        full = x[0] @ x[1].T - TARGET
        new = []
        for i, g in enumerate((full @ x[1], full.T @ x[0])):
            gram[i] = b2 * gram[i] + (1 - b2) * g.T @ g
            if t <= 3:
                basis[i] = np.linalg.eigh(gram[i])[1][:, ::-1]
            elif (t - 1) % every == 0:
                basis[i] = np.linalg.qr(gram[i] @ basis[i])[0]
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * (g @ basis[i]) ** 2
            turned = m[i] @ basis[i] / (1 - b1**t)
            direction = turned / (np.sqrt(v[i] / (1 - b2**t)) + eps) @ basis[i].T
            new.append(x[i] - rate * (direction + decay * x[i]))
        x = new
        trajectory.append(LoRAPair(x[0], x[1].T))
    return trajectory


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("every", [1, 3])
@starts
def test_trajectory_equals_a_dense_one(start, every, decay):
    values = {"b1": 0.8, "b2": 0.9, "eps": 1e-8, "every": every}
    tx = lora_soap(0.02, **values, weight_decay=decay)
    expected = oracle(start, 20, rate=0.02, **values, decay=decay)
    assert_trajectory(
        run(tx, data_from(start, 20), 1.0),
        {"A": [pair.a.T for pair in expected], "B": [pair.b.T for pair in expected]},
    )


def test_of_rank_one_it_is_adamw():
    pair = LoRAPair(PAIR.a[:, :1], PAIR.b[:1])
    ours, adamw = (
        run(make(0.03, weight_decay=0.1), data_from(pair, 15), 1.0)
        for make in (lora_soap, optax.adamw)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), ours, adamw)


@pytest.mark.parametrize("every", [1, 4])
@starts
def test_a_rotation_of_the_rank_axis_rotates_every_step(start, every):
    """(a Q, Qᵀ b) is the same adapter; its products stay the same, those of Adam do not."""
    rotation = np.linalg.qr(normal(4, RANK, RANK))[0]
    turned = LoRAPair(start.a @ rotation, rotation.T @ start.b)
    of = lambda tx, pair: run(tx, data_from(pair, 15), 1.0)
    tx = lora_soap(0.03, every=every, weight_decay=0.1)
    for pair, other in zip(of(tx, start), of(tx, turned), strict=True):
        np.testing.assert_allclose(pair.a @ rotation, other.a, atol=1e-7)
        np.testing.assert_allclose(rotation.T @ pair.b, other.b, atol=1e-7)
    adamw = optax.adamw(0.03, weight_decay=0.1)
    plain = [of(adamw, pair)[-1] for pair in (start, turned)]
    assert np.abs(plain[0].a @ plain[0].b - plain[1].a @ plain[1].b).max() > 0.1


def test_the_basis_follows_the_eigenvectors_by_power_steps():
    """The first basis is theirs, and steps of the power iteration follow where L turns to."""
    tx, pair = lora_soap(1e-3, b2=0.9), PAIR
    state = tx.init(pair)

    def off_diagonal():
        """How much of Qᵀ L Q is off its diagonal."""
        basis, matrix = (np.asarray(field[0].a) for field in (state.pairs.basis, state.pairs.gram))
        np.testing.assert_allclose(basis.T @ basis, np.eye(RANK), atol=1e-12)
        inner = basis.T @ matrix @ basis
        return np.linalg.norm(inner - np.diag(np.diag(inner))) / np.linalg.norm(inner)

    update = jax.jit(tx.update)
    grads = [LoRAPair(normal(5, N_IN, RANK), PAIR.b), LoRAPair(normal(6, N_IN, RANK), PAIR.b)]
    _, state = update(grads[0], state, pair)
    assert off_diagonal() < 1e-12
    for _ in range(2):
        _, state = update(grads[0], state, pair)
    distances = []
    for _ in range(100):
        _, state = update(grads[1], state, pair)
        distances.append(off_diagonal())
    assert max(distances[:10]) > 1e-3
    assert distances[-1] < 1e-6


def test_the_basis_is_found_though_a_warm_up_starts_at_zero():
    """With b = 0 and a first rate of 0, the first gradient of a is that of the third update."""
    tx = lora_soap(optax.linear_schedule(0.0, 0.01, 4), b2=0.9)
    pair, state = ZERO_B, tx.init(ZERO_B)
    for _ in range(3):
        updates, state = tx.update(gradients(pair, pair.a @ pair.b - TARGET), state, pair)
        pair = optax.apply_updates(pair, updates)
    basis, matrix = (np.asarray(field[0].a) for field in (state.pairs.basis, state.pairs.gram))
    inner = basis.T @ matrix @ basis
    assert np.trace(inner) > 0
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-10 * np.trace(inner))


def test_first_step_has_the_length_of_the_rate_in_the_eigenbasis():
    """Adam's first step is the rate times a sign in the basis that it works in."""
    grads = gradients(PAIR, normal(2, N_IN, N_OUT))
    tx = lora_soap(0.01, eps=1e-30)
    updates, state = tx.update(grads, tx.init(PAIR), PAIR)
    [basis] = state.pairs.basis
    np.testing.assert_allclose(np.abs(updates.a @ basis.a), 0.01, rtol=1e-9)
    np.testing.assert_allclose(np.abs(basis.b.T @ updates.b), 0.01, rtol=1e-9)


def test_first_steps_from_zero_b_are_finite():
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ZERO_B)
    tx = lora_soap(0.01)
    state = tx.init(pair)
    for step in range(4):
        full = pair.a @ pair.b - np.float32(TARGET)
        updates, state = tx.update(gradients(pair, full), state, pair)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
        assert bool(updates.a.any()) == (step > 0)
        assert bool(updates.b.any())
        pair = optax.apply_updates(pair, updates)
    assert state.skipped == 0


def test_gradients_of_any_size_take_the_same_steps():
    grads = gradients(PAIR, normal(2, N_IN, N_OUT))
    tx = lora_soap(0.01, eps=1e-300)
    of = lambda factor: tx.update(jax.tree.map(lambda g: factor * g, grads), tx.init(PAIR), PAIR)[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), of(1.0), of(1e6))
