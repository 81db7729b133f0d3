"""What every integration test asks of a library's pairs.

That a layout and a scale are read as the library means them is seen in the gradients: with G the
gradient in the adapted weight, that of a is s G bᵀ and that of b is s aᵀ G.
"""

import jax
import numpy as np
import optax

from lowrank_optax import DEFAULT_SPECS, altlora, find_pairs, polora

RANK, ALPHA = 4, 6.0


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def randomized(tree):
    """Every leaf drawn anew, so that no b is zero."""
    leaves, treedef = jax.tree.flatten(tree)
    drawn = [normal(i, *leaf.shape).astype(leaf.dtype) / 4 for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, drawn)


def assert_read_rightly(factors, grads, weight_grads, scale, specs=DEFAULT_SPECS):
    """Compares the gradients of all pairs, and a first step, with those of the weights they adapt.

    AltLoRA's step is -η/s G b⁺ for a and -η/s a⁺ G for b, here in NumPy.

    Args:
        factors: a tree with the pairs.
        grads: its gradients.
        weight_grads: from the path of a pair, the gradient of its weight as (batch, in, out).
        scale: s.
        specs: layouts that are declared.
    """
    found = find_pairs(factors, specs)
    assert found.pairs
    tx = altlora(scale, b1=0.0, scale=scale, specs=specs)
    updates, _ = tx.update(grads, tx.init(factors), factors)
    for at, pair, grad, update in zip(
        found.pairs, *map(found.take, (factors, grads, updates)), strict=True
    ):
        a, b = (np.asarray(x, np.float64) for x in pair)
        full = np.asarray(weight_grads(at.path), np.float64)
        full = full.reshape(*a.shape[:-1], b.shape[-1])
        assert_near(grad.a, scale * full @ b.mT)
        assert_near(grad.b, scale * a.mT @ full)
        assert_near(update.a, -full @ np.linalg.pinv(b))
        assert_near(update.b, -np.linalg.pinv(a) @ full)


def assert_near(ours, dense):
    """Within 0.1 % in norm, for float32 through a whole model."""
    assert np.linalg.norm(ours - dense) < 1e-3 * np.linalg.norm(dense)


def assert_trains(loss, factors, scale, steps=30, to=0.9, tx=None):
    """PoLoRA, or another transformation, lowers the loss to this part of it, in one trace."""
    tx, traces = tx or polora(0.1, scale=scale), []
    state = tx.init(factors)

    @jax.jit
    def step(factors, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(factors), state, factors)
        return optax.apply_updates(factors, updates), state

    before = loss(factors)
    for _ in range(steps):
        factors, state = step(factors, state)
    assert loss(factors) < to * before
    assert len(traces) == 1
