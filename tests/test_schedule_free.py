"""Where `optax.contrib.schedule_free` is right around the methods, and where it is not.

The wrapper gives gradients at y and calls the inner method with y as the parameters. The update
moves z, and y follows by a part of it. So whatever a method computes from the parameters is right,
and whatever it expects of its own update is not: that y moves by it, and how far.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import schedule_free, schedule_free_eval_params

from lowrank_optax import (
    LoRAPair,
    altlora_plus,
    lora_plus,
    lora_pro_efficient,
    lora_rite,
    lora_soap,
    polora,
    reflora,
    scaled_adamw,
)

pytestmark = pytest.mark.usefixtures("x64")

N_IN, RANK, N_OUT = 9, 3, 7
RATE, B1 = 0.02, 0.9


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))
BEST = normal(2, N_IN, RANK) @ normal(3, RANK, N_OUT)


def loss_of(pair):
    return 0.5 * jnp.sum((pair.a @ pair.b - BEST) ** 2)


def train(tx, steps=30, rate=RATE):
    """The y's and states of a run with the wrapper, the start included."""
    wrapped = schedule_free(tx, rate, b1=B1)
    pair, state = jax.tree.map(jnp.asarray, PAIR), wrapped.init(PAIR)
    update, trajectory = jax.jit(wrapped.update), [(pair, state)]
    for _ in range(steps):
        updates, state = update(jax.grad(loss_of)(pair), state, pair)
        pair = optax.apply_updates(pair, updates)
        trajectory.append((pair, state))
    return trajectory


def assert_close(x, y, atol=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), x, y)


def differs(x, y):
    return any(np.abs(x - y).max() > 1e-4 for x, y in zip(x, y, strict=True))


RIGHT = {
    "lora_plus": lora_plus(RATE, b1=0.0, ratio=4.0),
    "scaled_adamw": scaled_adamw(RATE, b1=0.0),
    "altlora_plus": altlora_plus(RATE, b1=0.0),
    "lora_soap": lora_soap(RATE, b1=0.0),
    "reflora": reflora(RATE, b1=0.0, warmup_steps=0),
    "lora_pro_efficient": lora_pro_efficient(RATE, b1=0.0),
    "polora": polora(RATE, b1=0.0),  # whose steps are bounded: it needs a larger rate
}


@pytest.mark.parametrize("name", RIGHT)
def test_the_averages_train(name):
    tx, rate = (polora(1.0, b1=0.0), 1.0) if name == "polora" else (RIGHT[name], RATE)
    trajectory = train(tx, 300, rate)
    losses = [loss_of(schedule_free_eval_params(state, pair)) for pair, state in trajectory]
    assert losses[-1] < 0.05 * losses[0]


def test_right_around_lora_plus():
    """It is schedule-free Adam on each factor, with the rate of b in the steps alone."""
    adam = lambda rate: optax.adam(rate, b1=0.0)
    parts = optax.partition({"a": adam(RATE), "b": adam(4 * RATE)}, LoRAPair("a", "b"))
    ours, expected = train(RIGHT["lora_plus"]), train(parts)
    for (pair, state), (other, other_state) in zip(ours, expected, strict=True):
        assert_close((pair, state.z), (other, other_state.z))


def by_hand(precondition):
    """Schedule-free Adam without momentum on gradients preconditioned at y, with optax alone."""

    def update(grads, state, params):
        return precondition(grads, params), state

    transform = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return train(optax.chain(transform, optax.adam(RATE, b1=0.0, eps=1e-30)))


def preconditioned(damping):
    damp = damping * jnp.eye(RANK)
    return lambda grads, pair: LoRAPair(
        grads.a @ jnp.linalg.inv(pair.b @ pair.b.T + damp),
        jnp.linalg.inv(pair.a.T @ pair.a + damp) @ grads.b,
    )


def test_right_around_scaled_adamw_in_simultaneous_order():
    ours = train(scaled_adamw(RATE, b1=0.0, eps=1e-30, damping=1e-2))
    for (pair, _), (other, _) in zip(ours, by_hand(preconditioned(1e-2)), strict=True):
        assert_close(pair, other, atol=1e-9)


def test_wrong_around_scaled_adamw_in_sequential_order():
    """g_b is divided by the Gram matrix of an a that y does not reach."""
    ours = train(scaled_adamw(RATE, b1=0.0, eps=1e-30, damping=1e-2, order="sequential"), steps=3)
    (before, _), (after, state) = ours[1], ours[2]
    grads = jax.grad(loss_of)(before)
    inverse = lambda a: jnp.linalg.inv(a.T @ a + 1e-2 * jnp.eye(RANK))
    seen = state.base_optimizer_state.pairs.mu.b
    assert np.abs(seen - inverse(after.a) @ grads.b).max() > 1e-3
    step = state.z.a - ours[1][1].z.a  # the whole update, of which y moves by a part
    np.testing.assert_allclose(seen, inverse(before.a + step) @ grads.b, atol=1e-10)


def test_right_around_altlora_plus_without_momentum():
    ours = train(altlora_plus(RATE, b1=0.0, eps=1e-30, damping=1e-6))
    for (pair, _), (other, _) in zip(ours, by_hand(preconditioned(1e-6)), strict=True):
        assert_close(pair, other, atol=1e-9)


def test_wrong_around_altlora_plus_with_momentum():
    """The momentum is carried along with the whole update, of which y moves by a part."""
    *_, (before, former), (after, state) = train(altlora_plus(RATE, b1=0.5), steps=3)
    lifted = state.base_optimizer_state
    expected = (after.a - before.a).T @ after.a  # cross(x⁺ − x, x⁺) of the y that is
    drift = lifted.pairs.drift[0].a
    assert np.abs(drift - expected).max() > 1e-3
    whole = state.z.a - former.z.a
    np.testing.assert_allclose(drift, whole.T @ (before.a + whole), atol=1e-12)


def test_wrong_around_lora_rite():
    """Its record of the last basis in the new one is that of the whole update.

    A record of orthonormal frames against the factors that y has would have frame's norms.
    """
    *_, (before, former), (after, state) = train(lora_rite(RATE, b1=0.0), steps=3)
    frame, _ = np.linalg.qr(before.a)
    overlap = state.base_optimizer_state.pairs.overlap[0].a
    gram = lambda x: x.T @ x
    whole = state.z.a - former.z.a
    np.testing.assert_allclose(gram(overlap), gram(frame.T @ (before.a + whole)), atol=1e-8)
    assert np.abs(gram(overlap) - gram(frame.T @ after.a)).max() > 1e-3


def test_polora_bounds_the_step_of_the_pair_that_has_the_norms_of_y():
    """The directions are right; the radius is that of y, so the change of z's product may be more.

    With z longer than y the change exceeds the learning rate, the bound of `polora` alone.
    """
    tx = polora(RATE, b1=0.0)
    wrapped = schedule_free(tx, RATE, b1=B1)
    state = wrapped.init(PAIR)
    longer = jax.tree.map(lambda x: 2 * x, PAIR)
    grads = jax.grad(loss_of)(PAIR)
    _, after = wrapped.update(grads, state._replace(z=longer), PAIR)
    product = lambda pair: pair.a @ pair.b
    change = np.linalg.norm(product(after.z) - product(longer), ord=2)
    plain, _ = tx.update(grads, tx.init(PAIR), PAIR)
    alone = np.linalg.norm(product(optax.apply_updates(PAIR, plain)) - product(PAIR), ord=2)
    assert alone <= RATE < change
    assert_close(plain, jax.tree.map(lambda x, y: x - y, after.z, longer))


def test_weight_decay_shrinks_by_y():
    """As in the paper's own AdamW: z moves by λ of the parameters, which are y."""
    grads = jax.grad(loss_of)(PAIR)
    moved = {}
    for decay in (0.0, 0.5):
        wrapped = schedule_free(lora_plus(RATE, b1=0.0, ratio=1.0, weight_decay=decay), RATE, b1=B1)
        state = wrapped.init(PAIR)._replace(z=jax.tree.map(lambda x: 3 * x, PAIR))
        moved[decay] = wrapped.update(grads, state, PAIR)[1].z
    change = jax.tree.map(lambda x, y: x - y, moved[0.5], moved[0.0])
    assert_close(change, jax.tree.map(lambda x: -RATE * 0.5 * x, PAIR))


def test_the_average_of_factors_is_no_average_of_products():
    """x averages a and b; x's product is not y's and z's averaged, as it is for dense weights."""
    pair, state = train(RIGHT["lora_plus"], steps=20)[-1]
    x = schedule_free_eval_params(state, pair)
    product = lambda pair: pair.a @ pair.b
    between = B1 * product(x) + (1 - B1) * product(state.z)
    assert differs([product(pair)], [between])
