r"""LoRSum: the best rank-r approximation of a sum of low-rank terms by alternating least squares.

For a target S and a start (a₀, b₀), one iteration is two half-steps, each the ridge regression of
one factor with the other fixed, pulled towards its start::

    a⁺ = (λ a₀ + S bᵀ) (b bᵀ + λ I)⁻¹
    b⁺ = (a⁺ᵀ a⁺ + λ I)⁻¹ (λ b₀ + a⁺ᵀ S)

Many iterations with a small λ tend to the truncated singular value decomposition of S. A half-step
is computed as its change, ``a⁺ = a₀ + (S - a₀ b) bᵀ (b bᵀ + λ I)⁻¹``, so that nothing moves where S
is a₀ b, whatever the inversion does to keep finite.

S is never formed. It is ``A₀ C B₀ + g G`` with narrow A₀ (in, R) and B₀ (R, out), a small core C,
and optionally a full matrix G, of which only a block-Krylov basis is known (``shadows``). Every
iterate is then a combination ``a = Σ Aᵢ Xᵢ``, ``b = Σ Yᵢᵀ Bᵢ``, and one product with G shifts it
along the basis: ``G bᵀ = Σ Aᵢ₊₁ Yᵢ``, ``aᵀ G = Σ Xᵢᵀ Bᵢ₊₁``.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.arguments import check, check_integer
from lowrank_optax.batching import Batched, lockstep
from lowrank_optax.factors import LoRAPair
from lowrank_optax.linalg import (
    SIDES,
    Side,
    compute_dtype,
    cross,
    damped_inverse,
    mix,
    other,
    product,
    weigh,
)

UNWEIGHTED: Mapping[Side, jax.Array | None] = {"a": None, "b": None}

Combination = list[jax.Array]


def lorsum(
    terms: Sequence[LoRAPair],
    coefficients: Sequence[Any],
    start: LoRAPair,
    *,
    iterations: int,
    ridge: Any,
    damping: Any = 0.0,
) -> LoRAPair:
    r"""Approximates a weighted sum of low-rank products by one pair.

    .. math:: a\,b \approx \sum_j c_j\, p_j\, q_j

    Args:
        terms: the products' factors, each (..., in, r_j) and (..., r_j, out), of any ranks.
        coefficients: a number for each term.
        start: the pair to begin with and, with weight ``ridge``, to stay near; its rank is the
            result's.
        iterations: full iterations; 0 for one pair of half-steps that both use the start's other
            factor (Jacobi).
        ridge: λ, not negative.
        damping: added to λ inside inversions only, not negative; it shrinks the result.

    Returns:
        The pair, in float32 or better.

    Raises:
        ValueError: shapes that do not fit, a rank of 0, a number out of range.
        TypeError: iterations that are not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> term = LoRAPair(jnp.eye(4, 2), jnp.eye(2, 3))
        >>> near = LoRAPair(jnp.eye(4, 1) + 0.1, jnp.eye(1, 3) + 0.1)
        >>> best = lorsum([term], [2.0], near, iterations=8, ridge=0.0)
        >>> jnp.linalg.norm(best.a @ best.b).round(3).item()
        2.0

    Source: OPLoRA, arXiv 2509.19977, LoRSum.
    """
    check("ridge", ridge, lambda v: v >= 0, "must not be negative")
    check("damping", damping, lambda v: v >= 0, "must not be negative")
    check_integer("iterations", iterations, least=0)
    if len(terms) != len(coefficients):
        raise ValueError(f"{len(terms)} terms but {len(coefficients)} coefficients; give as many.")
    for name, pair in [("start", start), *((f"terms[{i}]", t) for i, t in enumerate(terms))]:
        _check_term(name, pair, start)
    dtype = compute_dtype(*jax.tree.leaves((tuple(terms), start)))
    basis: dict[Side, Sequence[jax.Array]] = {
        "a": [jnp.concatenate([pair.a.astype(dtype) for pair in (start, *terms)], axis=-1)],
        "b": [jnp.concatenate([pair.b.astype(dtype) for pair in (start, *terms)], axis=-2)],
    }
    rank = start.a.shape[-1]
    weights = [jnp.full(t.a.shape[-1], c, dtype) for t, c in zip(terms, coefficients, strict=True)]
    core = jnp.diag(jnp.concatenate([jnp.zeros(rank, dtype), *weights]))
    selected = jnp.eye(len(core), rank, dtype=dtype)
    keywords = {"iterations": iterations, "ridge": ridge, "damping": damping}
    run = iterate(basis, core, None, selected, **keywords)
    [(combination, _)], _ = lockstep([run])
    return combination


def iterate(
    basis: Mapping[Side, Sequence[jax.Array]],
    core: jax.Array,
    gradient: Any,
    selected: jax.Array,
    *,
    iterations: int,
    ridge: Any,
    damping: Any = 0.0,
    weights: Mapping[Side, jax.Array | None] = UNWEIGHTED,
) -> Generator[list[Batched], list[Any], tuple[LoRAPair, dict[Side, Combination]]]:
    """Runs LoRSum on ``A₀ C B₀ + g G``, as a rule that yields its inversions.

    Args:
        basis: ``{"a": [A₀, A₁, ...], "b": [B₀, B₁, ...]}``; with G, k iterations use 2k and 2k + 1
            elements.
        core: C, (R, R).
        gradient: g, a scalar, or None where there is no G.
        selected: (R, r) columns of the identity: which part of A₀ and B₀ is the start.
        iterations: k; 0 for Jacobi half-steps.
        ridge: λ.
        damping: added to λ inside inversions only.
        weights: the diagonals D, (..., in) and (..., out), of a metric in which to approximate:
            inner products are weighted by D, and G is ``D⁻¹ G D⁻¹``.

    Returns:
        The new factors, and each one's coordinates ``[X₀, X₁, ...]`` in its basis.

    Example:
        See :func:`lorsum`.
    """
    eye = jnp.eye(selected.shape[-1], dtype=selected.dtype)
    cores: dict[Side, jax.Array] = {"a": core, "b": core.T}
    coordinates: dict[Side, Combination] = {"a": [selected], "b": [selected]}
    value: dict[Side, jax.Array] = {side: mix(side, basis[side][0], selected) for side in SIDES}

    def half_step(
        side: Side, x: jax.Array, x_coordinates: Combination
    ) -> Generator[list[Batched], list[Any], tuple[jax.Array, Combination]]:
        """Solves for one factor given the other, x."""
        y = other(side)
        weighted = weigh(y, x, weights[y])
        square = cross(y, weighted, x)
        [inverse] = yield [Batched(invert, square + (ridge + damping) * eye)]
        narrow = product(cores[side], cross(y, basis[y][0], weighted))
        narrow -= product(selected, square + damping * eye)
        full = [] if gradient is None else [gradient * c for c in x_coordinates]
        change, *others = (product(m, inverse) for m in (narrow, *full))
        solution = [selected + change, *others]
        return combine(side, basis[side], solution), solution

    for _ in range(max(iterations, 1)):
        old_a, old_coordinates = value["a"], coordinates["a"]
        value["a"], coordinates["a"] = yield from half_step("a", value["b"], coordinates["b"])
        fixed = (old_a, old_coordinates) if iterations == 0 else (value["a"], coordinates["a"])
        value["b"], coordinates["b"] = yield from half_step("b", *fixed)
    return LoRAPair(value["a"], value["b"]), coordinates


def invert(matrix: jax.Array) -> jax.Array:
    """Inverts the Gram matrices of half-steps, for ``Batched`` requests.

    Example:
        >>> import jax.numpy as jnp
        >>> invert(2.0 * jnp.eye(1)).round(3).tolist()
        [[0.5]]
    """
    return damped_inverse(matrix, 1e-20)  # for a factor of zeros with a ridge of zero


def combine(side: Side, elements: Sequence[jax.Array], coordinates: Combination) -> jax.Array:
    """Forms ``Σ Aᵢ Xᵢ`` or ``Σ Yᵢᵀ Bᵢ`` from as many elements as there are coordinates.

    Example:
        >>> import jax.numpy as jnp
        >>> combine("a", [jnp.ones((3, 2)), jnp.ones((3, 2))], [jnp.ones((2, 1))]).shape
        (3, 1)
    """
    needed = elements[: len(coordinates)]
    parts = [mix(side, e, m) for e, m in zip(needed, coordinates, strict=True)]
    return sum(parts[1:], parts[0])


def _check_term(name: str, pair: LoRAPair, start: LoRAPair) -> None:
    shapes = f"{name} has shapes {tuple(pair.a.shape)} and {tuple(pair.b.shape)}"
    if pair.a.ndim < 2 or pair.b.ndim < 2 or pair.a.shape[-1] != pair.b.shape[-2]:
        raise ValueError(f"{shapes}, which do not multiply; give a (..., in, r), b (..., r, out).")
    if pair.a.shape[-1] == 0:
        raise ValueError(f"{shapes}: a rank of 0; leave the term out.")
    size = lambda p: (*p.a.shape[:-2], p.a.shape[-2], p.b.shape[-1])
    if size(pair) != size(start) or pair.a.shape[:-2] != pair.b.shape[:-2]:
        raise ValueError(
            f"{shapes}, the start {tuple(start.a.shape)} and {tuple(start.b.shape)}; batch axes, in"
            " and out must agree."
        )
