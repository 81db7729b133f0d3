r"""Frames: orthonormal bases of the factors' spaces, through which SDS-LoRA's gradients flow.

A framed adapter is ``ΔK = s (a F + E b - w E F)`` with the frames E (``f_in``) and F (``f_out``)
constant for differentiation, so its gradients are ``s G Fᵀ`` and ``s Eᵀ G``. Ordinary LoRA is the
case in which the frames are the factors and w is 1.

Frames are made by Cholesky QR, which needs only r×r algebra beside products: the long axis may be
sharded. Three shifted passes reach any condition number that the factor's dtype can hold; a step of
Newton-Schulz takes the shift's bias out.
"""

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.batching import Batched, lockstep
from lowrank_optax.factors import FramedPair, LoRAPair
from lowrank_optax.linalg import (
    SIDES,
    Side,
    compute_dtype,
    cross,
    gram,
    mix,
    orthonormalizer,
    product,
    svd,
)


def frame(pair: LoRAPair, key: jax.Array | None = None) -> FramedPair:
    """Adds frames to a pair.

    Args:
        pair: the factors, (..., in, r) and (..., r, out).
        key: None for SDS-LoRA's warm-up, whose frames are the factors. A random key for a start
            without warm-up: random orthonormal frames and factors of zero, whatever they were.

    Returns:
        The node, to stand in the parameter tree where the pair stood; frames in float32 or better.

    Raises:
        ValueError: a start without warm-up with a rank above min(in, out).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> node = frame(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> jnp.allclose(node.f_in.T @ node.f_in, jnp.eye(2), atol=1e-5).item(), node.a.sum().item()
        (True, 0.0)

    Source: SDS-LoRA, arXiv 2606.16454, for the warm-up; the other start is ours.
    """
    dtype = compute_dtype(pair.a, pair.b)
    *batch, n_in, rank = pair.a.shape
    if key is None:
        # Copies, for a buffer that two leaves share cannot be donated.
        f_in, f_out = (jnp.copy(x).astype(dtype) for x in (pair.a, pair.b))
        return FramedPair(pair.a, pair.b, f_in, f_out, jnp.ones(batch, dtype))
    n_out = pair.b.shape[-1]
    if rank > min(n_in, n_out):
        raise ValueError(
            f"a pair of rank {rank} has no orthonormal frames of {n_in} and {n_out} entries; lower"
            " its rank."
        )
    key_in, key_out = jax.random.split(key)
    draws: dict[Side, jax.Array] = {
        "a": jax.random.normal(key_in, (*batch, n_in, rank), dtype),
        "b": jax.random.normal(key_out, (*batch, rank, n_out), dtype),
    }
    frames, _ = lockstep([orthonormalize(side, draws[side]) for side in SIDES])
    return FramedPair(jnp.zeros_like(pair.a), jnp.zeros_like(pair.b), *frames)


def orthonormalize(side: Side, x: jax.Array) -> Generator[list[Batched], list[Any], jax.Array]:
    """Computes Q of the QR decomposition of a factor along its long axis.

    Args:
        side: which factor ``x`` is.
        x: (..., in, r) or (..., r, out).

    Returns:
        As ``x``, with orthonormal rank components that span what x spans, the diagonal of R
        positive. Components of zeros stay zero.

    Example:
        >>> import jax.numpy as jnp
        >>> [q], _ = lockstep([orthonormalize("a", jnp.array([[3.0, 1.0], [4.0, 1.0]]))])
        >>> jnp.allclose(q, jnp.array([[0.6, 0.8], [0.8, -0.6]]), atol=1e-5).item()
        True
    """
    for _ in range(3):
        [inverse] = yield [Batched(orthonormalizer, gram(side, x))]
        x = mix(side, x, inverse)
    square = gram(side, x)
    return mix(side, x, 1.5 * jnp.eye(square.shape[-1], dtype=square.dtype) - 0.5 * square)


def decompose(
    pair: LoRAPair, scale: Any
) -> Generator[list[Batched], list[Any], tuple[jax.Array, jax.Array, jax.Array]]:
    """Computes the singular value decomposition of ``s a b`` without forming it.

    Args:
        pair: the factors, (..., in, r) and (..., r, out).
        scale: s.

    Returns:
        U (..., in, r), Σ (..., r) and Vᵀ (..., r, out).

    Example:
        >>> import jax.numpy as jnp
        >>> [(_, values, _)], _ = lockstep([decompose(LoRAPair(jnp.eye(3, 2), jnp.eye(2)), 5.0)])
        >>> values.round(3).tolist()
        [5.0, 5.0]
    """
    q_a = yield from orthonormalize("a", pair.a)
    q_b = yield from orthonormalize("b", pair.b)
    core = scale * product(cross("a", q_a, pair.a), cross("b", pair.b, q_b))
    [(left, values, right)] = yield [Batched(svd, core)]
    return mix("a", q_a, left), values, mix("b", q_b, jnp.swapaxes(right, -1, -2))


def plain(node: FramedPair) -> LoRAPair:
    """Writes a framed pair as the ordinary pair of rank 2r that it is: ``[a, E] · [F; b - w F]``.

    Args:
        node: the framed pair.

    Returns:
        The pair, (..., in, 2r) and (..., 2r, out).

    Example:
        >>> import jax.numpy as jnp
        >>> node = frame(LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4))))
        >>> pair = plain(node)
        >>> pair.a.shape, (pair.a @ pair.b)[0, 0].item()
        ((6, 4), 2.0)
    """
    b = node.b if node.warm is None else node.b - node.warm[..., None, None] * node.f_out
    dtype = compute_dtype(node.a, node.f_in)
    return LoRAPair(
        jnp.concatenate([node.a.astype(dtype), node.f_in], axis=-1),
        jnp.concatenate([node.f_out, b.astype(dtype)], axis=-2),
    )
