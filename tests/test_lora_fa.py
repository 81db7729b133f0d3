"""LoRA-FA against the equations of Hugging Face PEFT in NumPy, and what it promises about a."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, lora_fa
from tests.golden.trajectories import assert_trajectory, run

pytestmark = pytest.mark.usefixtures("x64")

N_IN, RANK, N_OUT, SCALE = 9, 3, 7, 1.5


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))
ZERO_B = PAIR._replace(b=np.zeros_like(PAIR.b))
FULL_GRADIENT = normal(2, N_IN, N_OUT)


def gradients(pair, full=FULL_GRADIENT, scale=SCALE):
    """What autodiff returns for the factors of K + s a b when the kernel's gradient is ``full``."""
    return LoRAPair(scale * full @ pair.b.T, scale * pair.a.T @ full)


def oracle(pair, target, steps, *, rate, b1, b2, eps, damping, decay):
    """The b's of the trajectory on ½‖s a b − target‖², with decay of the old b."""
    m = v = 0.0
    b, trajectory = pair.b, [pair]
    for t in range(1, steps + 1):
        g = SCALE * pair.a.T @ (SCALE * pair.a @ b - target)
        g = np.linalg.pinv(pair.a.T @ pair.a + damping * np.eye(RANK)) @ g / SCALE**2
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        length = rate * np.sqrt(1 - b2**t) / (1 - b1**t)
        b = b - length * m / (np.sqrt(v) + eps) - rate * decay * b
        trajectory.append(LoRAPair(pair.a, b))
    return trajectory


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("start", [PAIR, ZERO_B], ids=["random b", "b = 0"])
def test_trajectory_equals_pefts_equations(start, decay):
    values = {"b1": 0.9, "b2": 0.99, "eps": 1e-6, "damping": 1e-8}
    target, steps = normal(3, N_IN, N_OUT), 25
    tx = lora_fa(0.01, **values, scale=SCALE, weight_decay=decay)
    data = {"target": target.T, "A": [start.a.T] * (steps + 1), "B": [start.b.T]}
    expected = oracle(start, target, steps, rate=0.01, **values, decay=decay)
    assert_trajectory(
        run(tx, data, SCALE),
        {"A": [pair.a.T for pair in expected], "B": [pair.b.T for pair in expected]},
    )


def test_a_rests_and_is_not_decayed():
    params = {"q": PAIR, "bias": np.ones(3)}
    tx = lora_fa(0.1, weight_decay=0.5, mask={"q": LoRAPair(True, True), "bias": True})
    grads = {"q": gradients(PAIR), "bias": np.zeros(3)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert not updates["q"].a.any()
    assert updates["q"].b.all()
    np.testing.assert_allclose(updates["bias"], -0.05, rtol=1e-12)


def test_the_state_holds_nothing_of_a():
    state = lora_fa(0.1).init({"q": PAIR}).pairs
    for moment in (state.mu["q"], state.nu["q"]):
        assert isinstance(moment.a, optax.MaskedNode)
        assert moment.b.shape == PAIR.b.shape


def test_a_state_of_another_rank_is_refused():
    tx, narrow = lora_fa(0.1), LoRAPair(PAIR.a[:, :2], PAIR.b[:2])
    with pytest.raises(ValueError, match="another rank or model"):
        tx.update(gradients(PAIR), tx.init(narrow), PAIR)


def test_the_state_keeps_the_layout_of_the_parameters():
    """Factors of two heads, whose b has three axes in the tree and two in the algebra."""
    heads = {"lora_a": normal(4, 8, 2), "lora_b": normal(5, 2, 3, 4)}
    tx = lora_fa(0.1)
    updates, state = jax.jit(tx.update)(heads, tx.init(heads), heads)
    assert state.pairs.mu["lora_b"].shape == updates["lora_b"].shape == (2, 3, 4)
    assert not updates["lora_a"].any()


def first_projected(pair, scale=SCALE):
    """The projected gradient that the first update takes in: without b1, the momentum."""
    tx = lora_fa(1e-3, 0.0, damping=1e-13, scale=scale)
    return tx.update(gradients(pair, scale=scale), tx.init(pair), pair)[1].pairs.mu.b


def test_the_change_is_the_full_gradient_projected_on_the_columns_of_a():
    columns = PAIR.a @ np.linalg.pinv(PAIR.a)
    change = SCALE * PAIR.a @ first_projected(PAIR)
    np.testing.assert_allclose(change, columns @ FULL_GRADIENT, atol=1e-9)


def test_the_change_is_invariant_under_a_change_of_basis():
    transform = normal(3, RANK, RANK) + 3 * np.eye(RANK)
    moved = LoRAPair(PAIR.a @ transform, np.linalg.solve(transform, PAIR.b))
    changes = [pair.a @ first_projected(pair) for pair in (PAIR, moved)]
    np.testing.assert_allclose(*changes, atol=1e-9)
    plain = [pair.a @ gradients(pair).b for pair in (PAIR, moved)]
    assert np.abs(plain[0] - plain[1]).max() > 1


def test_projected_gradients_are_in_units_of_one_over_the_scale():
    ones, twos = (first_projected(PAIR, scale=s) for s in (1.0, 2.0))
    np.testing.assert_allclose(ones, 2 * twos, rtol=1e-12)


def test_weight_decay_shrinks_b_before_the_move():
    first = lambda tx: tx.update(gradients(PAIR), tx.init(PAIR), PAIR)[0].b
    plain, decayed = first(lora_fa(0.1)), first(lora_fa(0.1, weight_decay=0.5))
    np.testing.assert_allclose(decayed - plain, -0.05 * PAIR.b, atol=1e-12)


@pytest.mark.parametrize("damping", [1e-8, 1e-30])
def test_in_float32_components_of_a_that_are_equal_stay_finite(damping):
    a = np.repeat(PAIR.a[:, :1], RANK, axis=1)
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), LoRAPair(a, PAIR.b))
    tx = lora_fa(0.01, damping=damping)
    updates, state = tx.update(gradients(pair, np.float32(FULL_GRADIENT)), tx.init(pair), pair)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))
    assert state.skipped == 0
    # Adam's first step has the rate's length, but for an ε that is small beside √v.
    np.testing.assert_allclose(np.abs(updates.b), 0.01, rtol=1e-2)
