"""What the OPLoRA methods promise where the released trajectories, all with s = 1, say nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, Metric, nn, oplora, oplora_proj, scaled_oplora, shadow

pytestmark = pytest.mark.usefixtures("x64")

TOKENS, N_IN, RANK, N_OUT = 20, 9, 3, 7
RATE = 0.1
KEY = jax.random.key(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


X, TARGET = normal(2, TOKENS, N_IN), normal(3, TOKENS, N_OUT)
PAIR = LoRAPair(normal(0, N_IN, RANK), normal(1, RANK, N_OUT))


def train(tx, node, scale=1.0, steps=3):
    """The nodes after each step, by gradients of the layer's own backward pass."""

    def loss(node):
        return jnp.mean((nn.lora_apply(X, node, scale) - TARGET) ** 2)

    @jax.jit
    def step(node, state):
        updates, state = tx.update(jax.grad(loss)(node), state, node)
        return optax.apply_updates(node, updates), state

    state, nodes = tx.init(node), []
    for _ in range(steps):
        node, state = step(node, state)
        nodes.append(node)
    return nodes


TINY: dict[str, Any] = {"lmbd": 0.0, "momentum_damping": 1e-14}
METRIC = Metric()
METHODS = {
    "preconditioned": (lambda s: oplora(RATE, 0.0, iterations=0, lmbd=1e-14, scale=s), None),
    "oplora": (lambda s: oplora(RATE, scale=s, **TINY), {}),
    "oplora_proj": (
        lambda s: oplora_proj(RATE, lmbd=0.0, scale=s),
        {"iterations": 2, "momentum_rank": 0},
    ),
    "scaled_oplora": (lambda s: scaled_oplora(RATE, scale=s, **TINY), {"metric": METRIC}),
}


@pytest.mark.parametrize(("make", "shadowed"), METHODS.values(), ids=METHODS)
def test_the_scale_is_that_of_the_forward_pass(make, shadowed):
    """s a b and (√s a)(√s b) are one adapter, and without a ridge they are moved as one."""
    scale = 4.0
    deltas = {}
    for s in (1.0, scale):
        pair = jax.tree.map(lambda x: np.sqrt(scale / s) * x, PAIR)  # noqa: B023
        node = pair if shadowed is None else shadow(pair, KEY, **shadowed)
        deltas[s] = [s * n.a @ n.b for n in train(make(s), node, s)]
    for one, other in zip(deltas[1.0], deltas[scale], strict=True):
        # The metric's λ has a floor of 1e-5.
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-4 if shadowed else 1e-9)
    assert jnp.max(jnp.abs(deltas[1.0][-1] - scale * PAIR.a @ PAIR.b)) > 0.05


def test_dampening_shortens_what_the_gradient_adds():
    """Of the first step, whose momentum is zero, and of the momentum that it leaves."""
    node = shadow(PAIR, KEY)
    [damped] = train(oplora(RATE, dampening=0.75, **TINY), node, steps=1)
    [shorter] = train(oplora(RATE / 4, **TINY), node, steps=1)
    np.testing.assert_allclose(damped.a @ damped.b, shorter.a @ shorter.b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(damped.m_b, shorter.m_b / 4, rtol=1e-9)
    assert jnp.linalg.norm(damped.m_b) > 1e-3


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("method", [oplora, scaled_oplora])
def test_momentum_lives_through_a_rate_of_zero(method, iterations):
    """Without a ridge its damping would take m_a to zero where m_b still is, and for ever."""
    node = shadow(
        PAIR, KEY, iterations=iterations, metric=METRIC if method is scaled_oplora else None
    )
    after = train(method(lambda count: 0.0 * count, iterations=iterations), node)[-1]
    assert jnp.linalg.norm(after.m_a) > 0.5 * jnp.linalg.norm(node.m_a)
    assert jnp.linalg.norm(after.m_b) > 1e-3


@pytest.mark.parametrize("kind", ["kfac", "shampoo"])
def test_the_optimizer_hands_its_own_numbers_to_the_backward_pass(kind):
    """Only the first step is made in the numbers that the node was given."""
    node = shadow(PAIR, KEY, metric=Metric(kind, b2=0.5, damping=1.0, power=1.0))
    tx = scaled_oplora(RATE, b2=0.9, damping=0.01, power=0.25)
    after = train(tx, node, steps=1)[0]
    np.testing.assert_allclose(getattr(after, kind), [0.9, 0.01, 0.25], rtol=1e-12)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_the_projected_momentum_is_that_of_the_dense_gradient(iterations):
    """The first momentum is the gradient, at the factors that LoRSum gives, over their Grams."""
    tx = oplora_proj(RATE, iterations=iterations, lmbd=0.0, solver_damping=1e-14)
    node = shadow(PAIR, KEY, iterations=max(iterations, 1) + 1, momentum_rank=0)
    loss = lambda node: jnp.mean((nn.lora_apply(X, node) - TARGET) ** 2)
    updates, state = tx.update(jax.grad(loss)(node), tx.init(node), node)
    new = optax.apply_updates(node, updates)
    full = 2 * X.T @ (X @ PAIR.a @ PAIR.b - TARGET) / TARGET.size
    mu = state.pairs.mu
    np.testing.assert_allclose(mu.a, full @ new.b.T @ np.linalg.inv(new.b @ new.b.T), atol=1e-9)
    np.testing.assert_allclose(mu.b, np.linalg.inv(new.a.T @ new.a) @ new.a.T @ full, atol=1e-9)
