"""What every integration test asks of a library's pairs.

That a layout and a scale are read as the library means them is seen in the gradients: with G the
gradient in the adapted weight, that of a is s G bᵀ and that of b is s aᵀ G.
"""

import jax
import numpy as np
import optax

from lowrank_optax import altlora, find_pairs, polora

RANK, ALPHA = 4, 6.0


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def randomized(tree):
    """Every leaf drawn anew, so that no b is zero."""
    leaves, treedef = jax.tree.flatten(tree)
    drawn = [normal(i, *leaf.shape).astype(leaf.dtype) / 4 for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, drawn)


def assert_read_rightly(factors, grads, weight_grads, scale):
    """Compares the gradients of all pairs, and a first step, with those of the weights they adapt.

    AltLoRA's step is -η/s G b⁺ for a and -η/s a⁺ G for b, here in NumPy.

    Args:
        factors: a tree with the pairs.
        grads: its gradients.
        weight_grads: from the path of a pair, the gradient of its weight as (in, out).
        scale: s.
    """
    found = find_pairs(factors)
    assert found.pairs
    for at, pair, grad in zip(found.pairs, found.take(factors), found.take(grads), strict=True):
        full = np.asarray(weight_grads(at.path), np.float64).reshape(
            pair.a.shape[-2], pair.b.shape[-1]
        )
        np.testing.assert_allclose(grad.a, scale * full @ pair.b.T, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(grad.b, scale * pair.a.T @ full, rtol=1e-3, atol=1e-4)
    tx = altlora(scale, b1=0.0, scale=scale)
    updates, _ = tx.update(grads, tx.init(factors), factors)
    for at, pair, update in zip(found.pairs, found.take(factors), found.take(updates), strict=True):
        full = np.asarray(weight_grads(at.path), np.float64).reshape(
            pair.a.shape[-2], pair.b.shape[-1]
        )
        inverse = {side: np.linalg.pinv(getattr(pair, side)) for side in ("a", "b")}
        for ours, dense in ((update.a, -full @ inverse["b"]), (update.b, -inverse["a"] @ full)):
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
