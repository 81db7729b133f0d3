r"""Shadow adapters: how an optimizer gets products of the full gradient that it never sees.

With G the gradient of the loss in the product a b (s times the gradient in the kernel), the
backward pass of a layer can form ``G Lᵀ`` and ``Rᵀ G`` for any narrow L and R from what it has at
hand, its input x and the gradient of its output. Starting from the factors of the adapter and of
the optimizer's momentum, it builds the two block-Krylov bases::

    A₀ = [a, m_a]      Aᵢ₊₁ = G Bᵢᵀ         (in, r + q)
    B₀ = [b; m_b]      Bᵢ₊₁ = Aᵢᵀ G         (r + q, out)

A₁ and B₁ are the gradients of the four factors. The further elements that ``iterations`` k of
LoRSum need, B₂ … B₂ₖ and A₂ … A₂ₖ₋₁, arrive as the gradient of one leaf of zeros, ``krylov``. This
module says how they lie in it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.arguments import check
from lowrank_optax.factors import LoRAPair, ShadowedPair
from lowrank_optax.linalg import compute_dtype


def shadow(
    pair: LoRAPair, key: jax.Array, *, iterations: int = 1, momentum_rank: int | None = None
) -> ShadowedPair:
    """Adds to a pair the leaves that OPLoRA moves and reads.

    Args:
        pair: the factors, (..., in, r) and (..., r, out).
        key: of the input-side momentum factor, which starts standard normal; its partner starts 0.
        iterations: k, how many LoRSum iterations the optimizer will make; 0 for Jacobi steps.
        momentum_rank: q, rank of the momentum, r by default; 0 for none.

    Returns:
        The node, to stand in the parameter tree where the pair stood; momentum in float32 or
        better.

    Raises:
        ValueError: a negative number, or a momentum rank above min(in, out).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4)))
        >>> shadow(pair, jax.random.key(0), iterations=2, momentum_rank=1).krylov.shape
        (3, 24)

    Source: OPLoRA, arXiv 2509.19977, for the start of the momentum.
    """
    *batch, n_in, rank = pair.a.shape
    n_out = pair.b.shape[-1]
    q = rank if momentum_rank is None else momentum_rank
    check("iterations", iterations, lambda k: k >= 0 and k == int(k), "must be a whole number")
    fits = f"must lie between 0 and min(in, out) = {min(n_in, n_out)}"
    check("momentum_rank", q, lambda q: 0 <= q <= min(n_in, n_out), fits)
    dtype = compute_dtype(pair.a, pair.b)
    length = max(2 * iterations - 1, 0) * n_out + max(2 * iterations - 2, 0) * n_in
    return ShadowedPair(
        pair.a,
        pair.b,
        m_a=jax.random.normal(key, (*batch, n_in, q), dtype) if q else None,
        m_b=jnp.zeros((*batch, q, n_out), dtype) if q else None,
        krylov=jnp.zeros((*batch, rank + q, length), dtype) if length else None,
    )


def iterations_of(pair: ShadowedPair) -> int:
    """Reads from the shapes for how many iterations a node is made.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4)))
        >>> iterations_of(shadow(pair, jax.random.key(0), iterations=3))
        3
    """
    if pair.krylov is None:
        return 0
    n_in, n_out = pair.a.shape[-2], pair.b.shape[-1]
    return (pair.krylov.shape[-1] + n_out + 2 * n_in) // (2 * (n_in + n_out))


def beside(side: str, x: Any, m: Any) -> jax.Array:
    """Puts an adapter's factor and its momentum beside each other along the rank axis.

    Example:
        >>> import jax.numpy as jnp
        >>> beside("b", jnp.ones((2, 5)), jnp.ones((1, 5))).shape
        (3, 5)
    """
    return x if m is None else jnp.concatenate([x, m], axis=-1 if side == "a" else -2)


def pack(a_basis: Sequence[jax.Array], b_basis: Sequence[jax.Array]) -> jax.Array | None:
    """Lays A₂ … A₂ₖ₋₁ and B₂ … B₂ₖ out as one leaf, (..., r + q, n); None if there are none.

    Example:
        >>> import jax.numpy as jnp
        >>> pack([], [jnp.ones((2, 4))]).shape
        (2, 4)
    """
    blocks = [*b_basis, *(jnp.swapaxes(x, -1, -2) for x in a_basis)]
    return jnp.concatenate(blocks, axis=-1) if blocks else None


def bases(pair: ShadowedPair, grads: ShadowedPair) -> dict[str, list[jax.Array]]:
    """Reads the block-Krylov bases from a node and its gradient.

    Args:
        pair: the parameters.
        grads: what the backward pass returned for them.

    Returns:
        ``{"a": [A₀, A₁, ...], "b": [B₀, B₁, ...]}``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> {side: [x.shape for x in basis] for side, basis in bases(node, node).items()}
        {'a': [(6, 4), (6, 4)], 'b': [(4, 4), (4, 4), (4, 4)]}
    """
    a = [beside("a", node.a, node.m_a) for node in (pair, grads)]
    b = [beside("b", node.b, node.m_b) for node in (pair, grads)]
    k, n_in, n_out = iterations_of(pair), pair.a.shape[-2], pair.b.shape[-1]
    if k:
        split = (2 * k - 1) * n_out
        b += jnp.split(grads.krylov[..., :split], 2 * k - 1, axis=-1)
    if k > 1:
        blocks = jnp.split(grads.krylov[..., split:], 2 * k - 2, axis=-1)
        a += [jnp.swapaxes(x, -1, -2) for x in blocks]
    assert all(x.shape[-2] == n_in for x in a)
    return {"a": a, "b": b}
