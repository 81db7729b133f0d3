"""The diagnostics against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import LoRAPair, frame, nn
from lowrank_optax.diagnostics import alignment, effective_rank

N_IN, RANK, N_OUT = 9, 3, 7


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def random_pair(seed=0, *batch):
    return LoRAPair(normal(seed, *batch, N_IN, RANK), normal(seed + 1, *batch, RANK, N_OUT))


def dense_effective_rank(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum()
    return np.exp(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("shape", [(N_IN, RANK), (RANK, N_OUT), (N_IN, N_OUT), (5, 1)])
def test_effective_rank_is_the_entropy_of_the_singular_values(x64, shape):
    matrix = normal(0, *shape)
    expected = dense_effective_rank(matrix)
    np.testing.assert_allclose(effective_rank(matrix), expected, rtol=1e-12)
    assert 1 <= expected <= min(shape)


def test_effective_rank_of_extremes():
    assert effective_rank(jnp.eye(6, 4)) == pytest.approx(4)
    assert effective_rank(jnp.ones((6, 4))) == pytest.approx(1, abs=1e-4)
    assert effective_rank(jnp.zeros((6, 4))) == 0


def test_zero_directions_of_a_large_matrix_do_not_add_up():
    one, other = (normal(seed, 512, 1).astype(jnp.float32) for seed in (0, 1))
    assert effective_rank(one @ other.T) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_effective_rank_does_not_depend_on_the_size(size):
    matrix = normal(0, N_IN, RANK).astype(jnp.float32)
    np.testing.assert_allclose(effective_rank(size * matrix), effective_rank(matrix), rtol=1e-5)


def test_batch_axes(x64):
    stack = random_pair(0, 2, 3)
    full = normal(5, 2, 3, N_IN, N_OUT)
    grads = LoRAPair(full @ stack.b.mT, stack.a.mT @ full)
    ranks, cosines = effective_rank(grads.a), alignment(stack, grads, full)
    assert ranks.shape == cosines.shape == (2, 3)
    one = lambda x: x[1, 2]
    alone = LoRAPair(one(stack.a), one(stack.b)), LoRAPair(one(grads.a), one(grads.b))
    np.testing.assert_allclose(one(ranks), effective_rank(one(grads.a)), rtol=1e-12)
    np.testing.assert_allclose(one(cosines), alignment(*alone, one(full)), rtol=1e-12)


@pytest.mark.parametrize("make", [lambda pair: pair, frame, lambda p: frame(p, jax.random.key(0))])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_alignment_is_that_of_a_small_step(x64, make, scale):
    """Against a finite difference through the layer's own forward and backward pass."""
    node, full, eps = make(random_pair()), normal(5, N_IN, N_OUT), 1e-6
    delta = lambda node: nn.lora_apply(jnp.eye(N_IN), node, scale)
    grads = jax.grad(lambda node: jnp.sum(full * delta(node)))(node)
    moved = node._replace(a=node.a + eps * grads.a, b=node.b + eps * grads.b)
    if hasattr(node, "warm") and node.warm is not None:  # in the warm-up frames follow the factors
        moved = moved._replace(f_in=moved.a, f_out=moved.b)
    change = (delta(moved) - delta(node)) / eps
    expected = jnp.sum(change * full) / jnp.linalg.norm(change) / jnp.linalg.norm(full)
    np.testing.assert_allclose(alignment(node, grads, full), expected, rtol=1e-4)
    assert 0 < expected < 1


def test_a_gradient_within_the_frames_is_fully_aligned(x64):
    node = frame(random_pair(), jax.random.key(0))
    full = node.f_in @ normal(5, RANK, RANK) @ node.f_out
    grads = node._replace(a=full @ node.f_out.T, b=node.f_in.T @ full)
    assert alignment(node, grads, full) == pytest.approx(1)


def test_alignment_without_gradient_is_zero():
    pair = random_pair()
    nothing = jax.tree.map(jnp.zeros_like, pair)
    assert alignment(pair, nothing, jnp.ones((N_IN, N_OUT))) == 0
    assert alignment(pair, pair, jnp.zeros((N_IN, N_OUT))) == 0


def test_low_precision_is_measured_in_float32():
    pair = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_pair())
    full = jnp.ones((N_IN, N_OUT), jnp.bfloat16)
    assert effective_rank(pair.a).dtype == jnp.float32
    assert alignment(pair, pair, full).dtype == jnp.float32
