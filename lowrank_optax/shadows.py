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

The elements with index i have degree i in the gradient. So a gradient that was scaled or clipped
must be scaled by :func:`scale_gradients`, and sums over micro-batches, or over several uses of one
adapter in a forward pass, are right for degree 1 only. Such elements break the identity
``B₂ B₀ᵀ = A₁ᵀ A₁``, by which :func:`consistency` finds them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.arguments import check, check_positive
from lowrank_optax.factors import (
    DEFAULT_SPECS,
    LoRAPair,
    PairMatcher,
    ShadowedPair,
    find_pairs,
)
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
    k, n_out = iterations_of(pair), pair.b.shape[-1]
    if k:
        split = (2 * k - 1) * n_out
        b += jnp.split(grads.krylov[..., :split], 2 * k - 1, axis=-1)
    if k > 1:
        blocks = jnp.split(grads.krylov[..., split:], 2 * k - 2, axis=-1)
        a += [jnp.swapaxes(x, -1, -2) for x in blocks]
    return {"a": a, "b": b}


def consistency(stack: jax.Array, square: jax.Array) -> jax.Array:
    """Says which Krylov products belong to one gradient, for use in a ``Batched`` request.

    Args:
        stack: ``B₂ B₀ᵀ``, (n, R, R).
        square: ``A₁ᵀ A₁``, (n, R, R), which it equals when all comes from one backward pass.

    Returns:
        (n, 1, 1), 1 where they agree to 30 %, which even bfloat16 activations do, else NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> consistency(jnp.ones((1, 2, 2)), jnp.full((1, 2, 2), 0.5)).tolist()
        [[[nan]]]
    """
    norm = lambda x: jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    agrees = norm(stack - square) <= 0.3 * norm(square)
    return jnp.where(agrees, 1, jnp.nan).astype(stack.dtype)


def scale_gradients(grads: Any, factor: Any, specs: Sequence[PairMatcher] = DEFAULT_SPECS) -> Any:
    """Scales gradients as if the loss had been scaled: Krylov products by the factor's powers.

    For loss scaling: multiply the loss, then scale the gradients by the reciprocal.

    Args:
        grads: gradients of a parameter tree.
        factor: a scalar.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The scaled tree.

    Raises:
        ValueError: pairs that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> grads = shadow(LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4))), jax.random.key(0))
        >>> grads = grads._replace(krylov=jnp.ones((4, 4)))
        >>> half = scale_gradients(grads, 0.5)
        >>> half.a[0, 0].item(), half.krylov[0, 0].item()
        (0.5, 0.25)
    """
    pairing = find_pairs(grads, specs)
    times = lambda tree: jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)

    def scale(pair: ShadowedPair) -> ShadowedPair:
        scaled = times(pair)
        if pair.krylov is not None:
            powers = factor ** _degrees(pair)
            scaled = scaled._replace(krylov=(powers * pair.krylov).astype(pair.krylov.dtype))
        return scaled

    pairs = [scale(pair) for pair in pairing.take(grads, ShadowedPair)]
    return pairing.merge(pairing.put(pairs, grads), times(pairing.rest(grads)))


def clip_by_global_norm(
    max_norm: Any, specs: Sequence[PairMatcher] = DEFAULT_SPECS
) -> optax.GradientTransformation:
    """Clips the global norm of the gradients of trained leaves, Krylov products consistently.

    ``optax.clip_by_global_norm`` counts the shadows into the norm and scales all products alike,
    which OPLoRA finds inconsistent; put this before it instead.

    Args:
        max_norm: the largest norm, positive.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation, stateless.

    Raises:
        ValueError: a norm that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx = clip_by_global_norm(1.0)
        >>> grads = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 2)))}
        >>> tx.update(grads, tx.init(grads))[0]["q"].a[0, 0].item()
        0.25
    """
    check_positive("max_norm", max_norm)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> Any:
        del params
        pairing = find_pairs(updates, specs)
        trained = [(pair.a, pair.b) for pair in pairing.take(updates, ShadowedPair)]
        norm = optax.tree.norm((trained, pairing.rest(updates)))
        factor = max_norm / jnp.maximum(norm, max_norm)
        return scale_gradients(updates, factor, specs), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _degrees(pair: ShadowedPair) -> jax.Array:
    """The degree in the gradient of each column of ``krylov``."""
    k, n_in, n_out = iterations_of(pair), pair.a.shape[-2], pair.b.shape[-1]
    b = [i for i in range(2, 2 * k + 1) for _ in range(n_out)]
    a = [i for i in range(2, 2 * k) for _ in range(n_in)]
    return jnp.array(b + a)
