"""The gradients of a and b that LoRA-Pro puts in place of those of autodiff."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.decompositions import eigh
from lowrank_optax._core.linalg import cross, damped_inverse, gram, mix, product, transposed
from lowrank_optax._core.nodes import LoRAPair, both
from lowrank_optax._core.verbs import Pairs


def adjusted(
    pairs: Pairs, grads: Sequence[Any], params: Sequence[Any], damping: Any, *, balanced: bool
) -> list[LoRAPair]:
    r"""Computes the steps of a and b whose change of s a b is nearest to the full gradient.

    $$\delta a = s^{-2} (g_a N^{-1} + a\,Y), \quad
      \delta b = s^{-2} (M^{-1} g_b - (M^{-1} g_b b^\top N^{-1} + Y)\,b)$$

    with $M = a^\top a + \delta I$ and $N = b b^\top + \delta I$. Y cancels in the change of a b,
    $\delta a\,b + a\,\delta b$.

    Args:
        pairs: what a rule works with.
        grads: what autodiff returns, $g_a = s G b^\top$ and $g_b = s a^\top G$.
        params: the pairs.
        damping: $\delta$, positive; rounding raises it as in `damped_inverse`.
        balanced: whether Y is that of the steps nearest to the gradients themselves; otherwise it
            is zero.

    Returns:
        The steps, pairs in float32 or better.

    Example:
        See `lowrank_optax.lora_pro_efficient`, which is Adam on them.

    Source: arXiv 2407.18242, its theorems on the closed-form solution and on the choice of X.
    """
    grams = pairs.each(lambda pair: tuple(both(gram, pair)), params)
    crossed = pairs.each(
        lambda g, pair: (cross("a", pair.a, g.a), cross("b", g.b, pair.b)), grads, params
    )
    solve = functools.partial(_solve, damping=damping, balanced=balanced)
    matrices = pairs.together(solve, *grams, *crossed)

    def adjust(g: LoRAPair, pair: LoRAPair, s: Any, *matrices: jax.Array) -> LoRAPair:
        of_g_a, of_a, of_g_b, of_b = matrices
        step = LoRAPair(
            mix("a", g.a, of_g_a) + mix("a", pair.a, of_a),
            mix("b", g.b, of_g_b) - mix("b", pair.b, of_b),
        )
        return jax.tree.map(lambda x: x / s**2, step)

    return pairs.each(adjust, grads, params, pairs.scales, *matrices)


def _solve(
    m: jax.Array, n: jax.Array, c_a: jax.Array, c_b: jax.Array, *, damping: Any, balanced: bool
) -> tuple[jax.Array, ...]:
    """Computes N⁻¹, Y, M⁻¹ and (M⁻¹ g_b bᵀ N⁻¹ + Y)ᵀ, the matrices by which factors are mixed."""
    inverse_m, inverse_n = (damped_inverse(matrix, damping) for matrix in (m, n))
    y = jnp.zeros_like(m)
    if balanced:
        y = -_sylvester(m, n, product(c_a, inverse_n), damping)
    of_b = product(product(inverse_m, c_b), inverse_n) + y
    return inverse_n, y, inverse_m, transposed(of_b)


def _sylvester(m: jax.Array, n: jax.Array, c: jax.Array, damping: Any) -> jax.Array:
    """Solves M Y + Y N = C for semi-definite M and N."""
    (of_m, u), (of_n, v) = eigh(m), eigh(n)
    sums = jnp.maximum(of_m, 0)[..., :, None] + jnp.maximum(of_n, 0)[..., None, :]
    floor = 4 * jnp.finfo(m.dtype).eps * jnp.max(sums, axis=(-1, -2), keepdims=True)
    sums = jnp.maximum(sums, jnp.maximum(jnp.asarray(damping, m.dtype), floor))
    inner = product(product(transposed(u), c), v) / sums
    return product(product(u, inner), transposed(v))
