r"""Leading singular triplets of full gradients that are never formed.

With ΔK = a b, the gradient of a at a = 0 is `G bᵀ`, and that of b at b = 0 is `aᵀ G`. So the
gradients of an adapter are products of the full gradient with whatever the adapter holds, and block
power iteration needs nothing else: no array larger than a factor exists.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.frames import decompose, orthonormalize
from lowrank_optax._core.linalg import Side, compute_dtype, other, product, transposed
from lowrank_optax._core.nodes import LoRAPair, only
from lowrank_optax._core.verbs import Verbs

ROUNDING = 1e-6
"""Below this ratio to the first, a singular value in float32 is rounding."""

Gradients = Callable[[list[LoRAPair]], list[LoRAPair]]


class Triplets(NamedTuple):
    """Leading singular triplets of a gradient, largest values first.

    Args:
        left: U, (..., in, k), orthonormal columns.
        values: Σ, (..., k).
        right: Vᵀ, (..., k, out), orthonormal rows.
    """

    left: jax.Array
    values: jax.Array
    right: jax.Array


def leading_triplets(
    gradients: Gradients,
    pairs: Sequence[LoRAPair],
    key: jax.Array,
    *,
    blocks: int = 1,
    iterations: int = 2,
) -> list[Triplets]:
    """Computes leading singular triplets of the full gradients G behind adapters.

    Args:
        gradients: the gradients of factors, `(G bᵀ, aᵀ G)`, for factors with a b = 0. It is called
            2 + 2 `iterations` times for each block.
        pairs: factors whose shapes and dtypes are those that `gradients` takes.
        key: of the random start.
        blocks: how many blocks of r triplets; each further one is orthogonal to those before.
        iterations: rounds of power iteration. The error of a triplet falls with the power
            2 `iterations` + 1 of the ratio of singular values beyond the block to its own.

    Returns:
        For each pair, `blocks` r triplets, in float32 or better.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> full = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> of_pair = lambda pair: LoRAPair(full @ pair.b.T, pair.a.T @ full)
        >>> pair = LoRAPair(jnp.zeros((3, 1)), jnp.zeros((1, 3)))
        >>> gradients = lambda pairs: [of_pair(pair) for pair in pairs]
        >>> [found] = leading_triplets(gradients, [pair], jax.random.key(0), blocks=2, iterations=9)
        >>> [f"{value:.3f}" for value in found.values]
        ['3.000', '2.000']

    Source: subspace iteration, arXiv 0909.4061, section 4.5.
    """
    found: list[list[Triplets]] = [[] for _ in pairs]
    zeros = [jax.tree.map(lambda x: jnp.zeros_like(x, compute_dtype(x)), pair) for pair in pairs]

    def orthogonal(side: Side, factors: Sequence[jax.Array]) -> list[jax.Array]:
        """Removes what earlier blocks have found."""
        return [_deflated(side, x, before) for x, before in zip(factors, found, strict=True)]

    def products(side: Side, probes: Sequence[jax.Array]) -> list[jax.Array]:
        """G probeᵀ for probes of the side b, probeᵀ G for those of the side a."""
        at = [_with(pair, side, x) for pair, x in zip(zeros, probes, strict=True)]
        cast = jax.tree.map(lambda x, like: x.astype(like.dtype), at, list(pairs))
        across = other(side)
        wide = [
            getattr(g, across).astype(x.dtype) for g, x in zip(gradients(cast), probes, strict=True)
        ]
        return orthogonal(across, wide)

    def orthonormal(side: Side, factors: Sequence[jax.Array]) -> list[jax.Array]:
        return [_orthonormal(side, x) for x in factors]

    for block in range(blocks):
        keys = jax.random.split(jax.random.fold_in(key, block), len(pairs))
        draw = lambda key, pair: jax.random.normal(key, pair.b.shape, pair.b.dtype)
        right = orthogonal("b", [draw(k, pair) for k, pair in zip(keys, zeros, strict=True)])
        left = orthonormal("a", products("b", right))
        for _ in range(iterations):
            right = orthonormal("b", products("a", left))
            left = orthonormal("a", products("b", right))
        low_rank = [LoRAPair(q, x) for q, x in zip(left, products("a", left), strict=True)]
        vectors, values = decompose(Verbs([{}] * len(pairs)), low_rank, [1.0] * len(pairs))
        for before, pair, value in zip(found, vectors, values, strict=True):
            before.append(Triplets(pair.a, value, pair.b))
    return [_concatenated(triplets) for triplets in found]


@functools.partial(jax.jit, static_argnames="side")
def _orthonormal(side: Side, factor: jax.Array) -> jax.Array:
    """Orthonormalizes a factor in one program: outside of jit its many small steps are slow."""
    [found] = orthonormalize(Verbs([{}]), [only(side, LoRAPair(factor, factor))])
    return getattr(found, side)


def _concatenated(blocks: Sequence[Triplets]) -> Triplets:
    left, values, right = zip(*blocks, strict=True)
    return Triplets(
        jnp.concatenate(left, axis=-1),
        jnp.concatenate(values, axis=-1),
        jnp.concatenate(right, axis=-2),
    )


def _with(pair: LoRAPair, side: Side, x: jax.Array) -> LoRAPair:
    return pair._replace(a=x) if side == "a" else pair._replace(b=x)


def _deflated(side: Side, x: jax.Array, found: Sequence[Triplets]) -> jax.Array:
    """Projects a factor off the singular vectors that were found."""
    for triplets in found:
        if side == "a":
            x -= product(triplets.left, product(transposed(triplets.left), x))
        else:
            x -= product(product(x, transposed(triplets.right)), triplets.right)
    return x
