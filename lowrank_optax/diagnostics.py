"""What to watch in a training run to see how a low-rank adapter treats the full gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.decompositions import svd
from lowrank_optax._core.linalg import product, widened

__all__ = ["alignment", "effective_rank"]


def effective_rank(matrix: jax.Array) -> jax.Array:
    r"""Computes how many directions a matrix uses, by the entropy of its singular values.

    $$\exp\Big(-\sum_i p_i \log p_i\Big) \qquad p_i = \sigma_i / \sum_j \sigma_j$$

    The singular values are of the matrix itself. From its Gram matrix they would come with a floor,
    the root of the dtype's epsilon, and the floors of many small ones add up in the sum.

    Args:
        matrix: (..., m, n), floating.

    Returns:
        (...), from 1 to min(m, n); 0 for a matrix of zeros. In float32 or better.

    Example:
        >>> import jax.numpy as jnp
        >>> effective_rank(jnp.diag(jnp.array([1.0, 1.0, 0.0]))).round(3).item()
        2.0

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    values = svd(_unit(matrix))[1]
    total = jnp.sum(values, axis=-1, keepdims=True)
    shares = values / jnp.where(total > 0, total, 1)
    entropy = jnp.sum(jax.scipy.special.entr(shares), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


def alignment(pair: Any, grads: Any, full_gradient: jax.Array) -> jax.Array:
    r"""Computes the cosine between the full gradient and the change of ΔK along factor gradients.

    To first order such a step changes ΔK by a multiple of

    $$g_a\,b + a\,g_b \qquad\text{or, with frames,}\qquad g_a\,F + E\,g_b.$$

    Args:
        pair: the factors, (..., in, r) and (..., r, out), and their frames if they have some.
        grads: what autodiff returns for them; of frames it is not used.
        full_gradient: G, the gradient of the kernel that the pair adapts, (..., in, out).

    Returns:
        (...), at most 1, and not negative for true gradients; 0 where either is zero. In float32 or
        better.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> full = jnp.ones((4, 3))
        >>> pair = LoRAPair(jnp.eye(4, 1), jnp.zeros((1, 3)))
        >>> alignment(pair, LoRAPair(full @ pair.b.T, pair.a.T @ full), full).round(3).item()
        0.5

    Source: arXiv 2606.16454, which compares LoRA with SDS-LoRA by it.
    """
    wide = jax.tree.map(widened, (pair, grads))

    def delta(a: jax.Array, b: jax.Array) -> jax.Array:
        plain = wide[0]._replace(a=a, b=b).plain()
        return product(plain.a, plain.b)

    factors, steps = ((node.a, node.b) for node in wide)
    _, change = jax.jvp(delta, factors, steps)
    return jnp.sum(_unit(change) * _unit(full_gradient), axis=(-2, -1))


def _unit(matrix: jax.Array) -> jax.Array:
    """Scales matrices (..., m, n) to the norm 1; zeros stay zeros."""
    matrix = widened(matrix)
    norm = jnp.linalg.norm(matrix, axis=(-2, -1), keepdims=True)
    return matrix / jnp.where(norm > 0, norm, 1)
