"""Adapters as ordinary LoRA pairs: what merging and exporting need of every kind of pair."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.arguments import check_integer
from lowrank_optax._core.decompositions import qr, svd
from lowrank_optax._core.linalg import compute_dtype, product, transposed
from lowrank_optax._core.nodes import LoRAPair


def plain_pair(node: Any) -> LoRAPair:
    """Writes any kind of pair as the ordinary pair with the same ΔK.

    Args:
        node: the pair, of rank r.

    Returns:
        The factors themselves; for a framed pair one of rank 2r, `[a, E] · [F; b − w F]`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import frame
        >>> plain_pair(frame(LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4))))).a.shape
        (6, 4)
    """
    return node.plain()


def compress(node: Any, rank: int) -> tuple[LoRAPair, jax.Array]:
    r"""Computes the ordinary pair of a rank whose product is nearest to that of a pair.

    With `a = Q_a R_a` and `bᵀ = Q_b R_b` only `R_a R_bᵀ` is decomposed; ΔK is never formed.

    Args:
        node: the pair; factors (..., in, r) and (..., r, out).
        rank: of the result, at least 1.

    Returns:
        The pair, whose factors have equal Gram matrices, in float32 or better, and the relative
        error `‖ΔK' - ΔK‖ / ‖ΔK‖` in the Frobenius norm, (...), 0 for ΔK = 0.

    Raises:
        TypeError: a rank that is no integer.
        ValueError: a rank above that of the pair or below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> pair, error = compress(LoRAPair(jnp.eye(4, 2), jnp.diag(jnp.array([4.0, 3.0]))), 1)
        >>> f"{(pair.a @ pair.b)[0, 0]:.3f}, {error:.3f}"
        '4.000, 0.600'

    Source: Eckart and Young, 1936.
    """
    check_integer("rank", rank, least=1)
    pair = plain_pair(node)
    dtype = compute_dtype(*pair)
    q_a, r_a = qr(pair.a.astype(dtype))
    q_b, r_b = qr(transposed(pair.b.astype(dtype)))
    left, values, right = svd(product(r_a, transposed(r_b)))
    if rank > values.shape[-1]:
        raise ValueError(
            f"a pair of rank {values.shape[-1]} has no nearest pair of rank {rank}; give a rank"
            " from 1 to that."
        )
    root = jnp.sqrt(values[..., :rank])
    nearest = LoRAPair(
        product(q_a, left[..., :rank] * root[..., None, :]),
        product(root[..., None] * right[..., :rank, :], transposed(q_b)),
    )
    norm: Any = lambda x: jnp.sqrt(jnp.sum(x**2, axis=-1))
    size = norm(values)
    return nearest, norm(values[..., rank:]) / jnp.where(size > 0, size, 1)


def combine(
    nodes: Sequence[Any], weights: Sequence[float], rank: int
) -> tuple[LoRAPair, jax.Array]:
    r"""Computes the pair of a rank whose product is nearest to a sum of products.

    $$a\,b \approx \sum_i w_i\, a_i\, b_i$$

    The factors side by side are a pair of the sum of the ranks, which `compress` cuts.

    Args:
        nodes: pairs of one layer, of any kind and rank.
        weights: w, one for each, forward scales included.
        rank: of the result, at most the sum of their ranks.

    Returns:
        As `compress`: the pair, of the scale 1, and the relative error.

    Raises:
        ValueError: pairs of other layers, a number of weights that is not theirs, a rank that is
            too large.

    Example:
        >>> import jax.numpy as jnp
        >>> one = LoRAPair(jnp.eye(4, 1), jnp.eye(1, 3))
        >>> pair, error = combine([one, one], [1.0, 2.0], rank=1)
        >>> f"{(pair.a @ pair.b)[0, 0]:.3f}, {error:.3f}"
        '3.000, 0.000'

    Source: Eckart and Young, 1936.
    """
    pairs = [plain_pair(node) for node in nodes]
    if len(pairs) != len(weights) or not pairs:
        raise ValueError(f"{len(pairs)} pairs need as many weights, got {len(weights)}")
    shapes = {(*pair.a.shape[:-1], pair.b.shape[-1]) for pair in pairs}
    if len(shapes) > 1:
        raise ValueError(f"pairs of one layer have the same in and out, got {sorted(shapes)}")
    weighted = [w * x.a.astype(compute_dtype(*x)) for w, x in zip(weights, pairs, strict=True)]
    a = jnp.concatenate(weighted, axis=-1)
    return compress(LoRAPair(a, jnp.concatenate([pair.b for pair in pairs], axis=-2)), rank)
