"""What the AltLoRA paper claims, and what this library promises on top, one test each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, altlora, altlora_plus, engine
from tests.golden.trajectories import assert_trajectory, run

pytestmark = pytest.mark.usefixtures("x64")

N_IN, RANK, N_OUT = 9, 3, 7


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))
FULL_GRADIENT = normal(2, N_IN, N_OUT)


def factor_gradients(pair, full, scale=1.0):
    """What autodiff returns for the factors of K + s a b when the kernel's gradient is ``full``."""
    return LoRAPair(scale * full @ pair.b.T, scale * pair.a.T @ full)


def first_direction(pair, scale=1.0, damping=1e-12, **keywords):
    tx = altlora(1.0, 0.0, damping=damping, scale=scale, **keywords)
    grads = factor_gradients(pair, FULL_GRADIENT, scale)
    return jax.tree.map(jnp.negative, tx.update(grads, tx.init(pair), pair)[0])


def test_projected_gradient_is_the_best_approximation_in_the_row_space():
    """s ĝ_a b is the orthogonal projection of the full gradient on the row space of b."""
    scale = 1.5
    direction = first_direction(PAIR, scale)
    row_projector = jnp.linalg.pinv(PAIR.b) @ PAIR.b
    np.testing.assert_allclose(
        scale * direction.a @ PAIR.b, FULL_GRADIENT @ row_projector, atol=1e-9
    )
    column_projector = PAIR.a @ jnp.linalg.pinv(PAIR.a)
    np.testing.assert_allclose(
        scale * PAIR.a @ direction.b, column_projector @ FULL_GRADIENT, atol=1e-9
    )


def test_transformation_invariance():
    """(a T, T⁻¹ b) is the same adapter; the first move of a·b must be the same."""
    transform = normal(3, RANK, RANK) + 3 * jnp.eye(RANK)
    moved = LoRAPair(PAIR.a @ transform, jnp.linalg.solve(transform, PAIR.b))

    def first_order_move(pair):
        direction = first_direction(pair)
        return direction.a @ pair.b + pair.a @ direction.b

    np.testing.assert_allclose(first_order_move(moved), first_order_move(PAIR), atol=1e-8)
    plain = factor_gradients(PAIR, FULL_GRADIENT)
    skewed = factor_gradients(moved, FULL_GRADIENT)
    lora = plain.a @ PAIR.b + PAIR.a @ plain.b
    assert jnp.linalg.norm(skewed.a @ moved.b + moved.a @ skewed.b - lora) > 0.1


def test_one_over_scale_squared():
    """With ĝ / s², the move of ΔK = s a b does not depend on s when a·b carries 1/s."""
    moves = []
    for scale in (1.0, 4.0):
        pair = LoRAPair(PAIR.a, PAIR.b / scale)  # the same ΔK
        direction = first_direction(pair, scale)
        moves.append(scale * (direction.a @ pair.b + pair.a @ direction.b))
    np.testing.assert_allclose(moves[1], moves[0], rtol=1e-9)


@pytest.mark.parametrize("make", [altlora, altlora_plus])
@pytest.mark.parametrize("order", ["alternating", "simultaneous", "sequential"])
def test_first_step_from_b_zero_is_finite_and_moves_b(make, order):
    start = LoRAPair(PAIR.a, jnp.zeros_like(PAIR.b))
    tx = make(0.1, order=order)
    updates, state = tx.update(factor_gradients(start, FULL_GRADIENT), tx.init(start), start)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((updates, state)))
    assert jnp.linalg.norm(updates.b) > 1e-3
    assert not jnp.any(updates.a)


def test_momentum_transport_is_the_stated_least_squares_solution():
    """After b moves, a's next step begins from argmin_M ‖M b⁺ − m_a b‖."""
    tx = altlora(0.3, damping=1e-12, order="alternating", first="a")
    state, pair = tx.init(PAIR), PAIR
    updates, state = tx.update(factor_gradients(pair, FULL_GRADIENT), state, pair)
    pair = optax.apply_updates(pair, updates)
    before = state.pairs.mu.a
    updates, state = tx.update(factor_gradients(pair, FULL_GRADIENT), state, pair)
    moved = optax.apply_updates(pair, updates)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, pair), state, moved)
    wanted = np.linalg.lstsq(np.asarray(moved.b).T, np.asarray(before @ pair.b).T, rcond=None)[0].T
    np.testing.assert_allclose(state.pairs.mu.a, 0.9 * wanted, atol=1e-9)
    assert jnp.linalg.norm(wanted - before) > 0.01


def test_momentum_rests_while_the_other_factor_rests():
    """Damping must not shrink a momentum whose partner has not moved."""
    tx = altlora(0.3, damping=0.5, order="alternating", switch_every=3, first="b")
    state, pair = tx.init(PAIR), PAIR
    for _ in range(4):  # three moves of b and the first of a
        updates, state = tx.update(factor_gradients(pair, FULL_GRADIENT), state, pair)
        pair = optax.apply_updates(pair, updates)
    mu_a = state.pairs.mu.a
    zero = jax.tree.map(jnp.zeros_like, pair)
    updates, state = tx.update(zero, state, pair)  # a again: its own momentum only decays
    np.testing.assert_allclose(state.pairs.mu.a, 0.9 * mu_a, rtol=1e-12)


@pytest.mark.parametrize(("make", "copies"), [(altlora, 1), (altlora_plus, 2)])
def test_state_is_one_and_two_copies_of_the_factors(make, copies):
    """Bytes of state; AdamW needs two copies, the released code two and three."""
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    counters = 3 * 4  # updates, failures, updates of the fallback
    drift = 2 * RANK**2 * 8
    assert size(make(0.1).init(PAIR)) == copies * size(PAIR) + counters + drift


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("rank", [2, 16, 64])
def test_damped_inverse_of_singular_grams_is_finite(dtype, rank):
    """Equal columns make a Gram matrix singular up to rounding, where plain damping is lost."""
    column = jnp.asarray(30 * normal(5, 512, 1), dtype)
    x = jnp.concatenate([column] * rank, axis=1)
    inverse = engine.damped_inverse(engine.gram("a", x), 1e-10)
    assert inverse.dtype == dtype
    assert jnp.all(jnp.isfinite(inverse))


def test_damped_inverse_is_the_inverse():
    gram = engine.gram("a", PAIR.a)
    inverse = engine.damped_inverse(gram, 0.1)
    np.testing.assert_allclose(inverse @ (gram + 0.1 * jnp.eye(RANK)), jnp.eye(RANK), atol=1e-12)


@pytest.mark.parametrize("make", [altlora, altlora_plus])
def test_weight_decay_is_decoupled_and_masked(make):
    """A factor that moves shrinks by lr·λ of its old value; the mask can exempt it."""
    pair, zero = PAIR, jax.tree.map(jnp.zeros_like, PAIR)
    tx = make(0.1, weight_decay=0.5, order="alternating")
    updates, _ = tx.update(zero, tx.init(pair), pair)
    np.testing.assert_allclose(updates.b, -0.1 * 0.5 * pair.b, rtol=1e-12)
    assert not jnp.any(updates.a)
    for mask in (LoRAPair(True, False), lambda p: LoRAPair(True, False)):
        masked = make(0.1, weight_decay=0.5, mask=mask, order="alternating")
        updates, _ = masked.update(zero, masked.init(pair), pair)
        assert not jnp.any(updates.b)


def oracle(pair, target, steps, *, rate, b1, b2=None, eps=0.0, damping, decay, order):
    """The trajectory on ½‖a b − target‖²; each momentum keeps the partner that it last met."""
    x = {"a": pair.a, "b": pair.b.T}  # rows × r
    m = {side: np.zeros_like(value) for side, value in x.items()}
    v, moves, met = dict(m), dict.fromkeys(x, 0), {"a": x["b"], "b": x["a"]}
    trajectory = [pair]
    for t in range(steps):
        full, old = x["a"] @ x["b"].T - target, dict(x)
        gradient = {"a": full @ x["b"], "b": full.T @ x["a"]}
        for side in "ba"[t % 2] if order == "alternating" else "ab":
            other = "b" if side == "a" else "a"
            partner = (x if order == "sequential" else old)[other]
            inverse = np.linalg.inv(partner.T @ partner + damping * np.eye(RANK))
            projected, followed = (
                gradient[side] @ inverse,
                m[side] @ met[side].T @ partner @ inverse,
            )
            m[side] = b1 * followed + (1 - b1) * projected
            met[side], moves[side] = partner, moves[side] + 1
            direction = m[side] / (1 - b1 ** moves[side])
            if b2 is not None:
                v[side] = b2 * v[side] + (1 - b2) * projected**2
                direction /= np.sqrt(v[side] / (1 - b2 ** moves[side])) + eps
            x[side] = x[side] - rate * (direction + decay * x[side])
        trajectory.append(LoRAPair(x["a"], x["b"].T))
    return trajectory


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("order", ["simultaneous", "sequential", "alternating"])
@pytest.mark.parametrize(
    ("make", "values"),
    [(altlora, {"b1": 0.9}), (altlora_plus, {"b1": 0.9, "b2": 0.99, "eps": 1e-6})],
)
def test_trajectory_equals_a_dense_one(make, values, order, decay):
    """The momentum follows the decayed partner, too."""
    rate, target, steps = 0.05, normal(3, N_IN, N_OUT), 20
    shared = {**values, "damping": 1e-2, "order": order}
    expected = oracle(PAIR, target, steps, rate=rate, **shared, decay=decay)
    data = {"target": target.T, "A": [PAIR.a.T] * (steps + 1), "B": [PAIR.b.T]}
    assert_trajectory(
        run(make(rate, **shared, weight_decay=decay), data, 1.0),
        {"A": [pair.a.T for pair in expected], "B": [pair.b.T for pair in expected]},
    )


def test_transport_sees_the_rounded_factor():
    """With bf16 factors b moves to a rounded value; the momentum follows that value exactly."""
    pair = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PAIR)
    mu = LoRAPair(
        jnp.asarray(normal(6, N_IN, RANK), jnp.float32), jnp.zeros((RANK, N_OUT), jnp.float32)
    )
    tx = altlora(0.05, damping=1e-9, order="alternating")
    state = tx.init(pair)
    state = state._replace(pairs=state.pairs._replace(mu=mu))
    grads = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16), factor_gradients(PAIR, FULL_GRADIENT)
    )
    update = jax.jit(tx.update)  # which may keep the sum of parameter and update unrounded
    updates, state = update(grads, state, pair)
    moved = optax.apply_updates(pair, updates)
    _, state = update(jax.tree.map(jnp.zeros_like, grads), state, moved)
    old, new = np.float64(pair.b), np.float64(moved.b)
    wanted = np.linalg.lstsq(new.T, (np.float64(mu.a) @ old).T, rcond=None)[0].T
    np.testing.assert_allclose(state.pairs.mu.a, 0.9 * wanted, rtol=1e-3, atol=1e-3)
