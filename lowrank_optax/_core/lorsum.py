r"""LoRSum: the best rank-r approximation of a sum of low-rank terms by alternating least squares.

For a target S and a start (a₀, b₀), one iteration is two half-steps. Each is the ridge regression
of one factor with the other one fixed, pulled towards its start:

    a⁺ = (λ a₀ + S bᵀ) (b bᵀ + λ I)⁻¹
    b⁺ = (a⁺ᵀ a⁺ + λ I)⁻¹ (λ b₀ + a⁺ᵀ S)

Many iterations with a small λ tend to the truncated singular value decomposition of S. A half-step
is computed as a change, `a⁺ = a₀ + (S − a₀ b) bᵀ (b bᵀ + λ I)⁻¹`. The change is exactly zero if
S = a₀ b, whatever damping the inversion adds.

S is never formed. It is `A₀ C B₀ + g G` with narrow A₀ (in, R) and B₀ (R, out), a small core C, and
maybe a full matrix G, of which only a block-Krylov basis is known (`krylov`). Every iterate is a
combination `a = Σ Aᵢ Xᵢ`, `b = Σ Yᵢᵀ Bᵢ`, and one product with G shifts it along the basis:
`G bᵀ = Σ Aᵢ₊₁ Yᵢ`, `aᵀ G = Σ Xᵢᵀ Bᵢ₊₁`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.arguments import STATIC_HINT, check, check_integer
from lowrank_optax._core.linalg import (
    Side,
    compute_dtype,
    cross,
    damped_inverse,
    identity,
    mix,
    other,
    product,
    weigh,
)
from lowrank_optax._core.nodes import LoRAPair
from lowrank_optax._core.verbs import Verbs

UNWEIGHTED: Mapping[Side, jax.Array | None] = {"a": None, "b": None}


class Target(NamedTuple):
    """What to approximate by one pair: `A₀ C B₀ + g G`.

    Args:
        basis: `{"a": [A₀, A₁, ...], "b": [B₀, B₁, ...]}`. With G, k iterations use 2k and 2k + 1
            elements.
        core: C, (R, R).
        gradient: g, a scalar, or None where there is no G.
        start: (R, r), columns of the identity: which part of A₀ and B₀ is the start.
        ridge: λ.
        damping: added to λ inside inversions only.
        weights: the diagonals D, (..., in) and (..., out), of a metric in which to approximate.
            Inner products are weighted by D, and G is `D⁻¹ G D⁻¹`.
    """

    basis: Mapping[Side, Sequence[jax.Array]]
    core: jax.Array
    gradient: Any
    start: jax.Array
    ridge: Any
    damping: Any = 0.0
    weights: Mapping[Side, jax.Array | None] = UNWEIGHTED


def step_target(
    basis: Mapping[Side, Sequence[jax.Array]],
    rank: int,
    *,
    momentum: Any,
    gradient: Any,
    ridge: Any,
    damping: Any,
    weights: Mapping[Side, jax.Array | None] = UNWEIGHTED,
) -> Target:
    """Returns the target `a b + momentum · m_a m_b + gradient · G`, with (a, b) as its start.

    Args:
        basis: as in `Target`; A₀ is [a, m_a], or a alone, and B₀ likewise.
        rank: r of (a, b).
        momentum: the coefficient of the momentum.
        gradient: that of G.
        ridge: λ.
        damping: added to λ inside inversions only.
        weights: as in `Target`.

    Example:
        >>> import jax.numpy as jnp
        >>> basis = {"a": [jnp.ones((4, 2))], "b": [jnp.ones((2, 3))]}
        >>> target = step_target(basis, 1, momentum=0.5, gradient=-1.0, ridge=0.1, damping=0.0)
        >>> target.core.tolist(), target.start.tolist()
        ([[1.0, 0.0], [0.0, 0.5]], [[1.0], [0.0]])
    """
    eye, is_pair = _columns(basis, rank)
    core = eye * jnp.where(is_pair, 1, momentum)
    return Target(basis, core, gradient, eye[:, :rank], ridge, damping, weights)


def momentum_target(
    basis: Mapping[Side, Sequence[jax.Array]],
    rank: int,
    *,
    momentum: Any,
    gradient: Any,
    ridge: Any,
    damping: Any,
) -> Target:
    """Returns the target `momentum · m_a m_b + gradient · G`, with (m_a, m_b) as its start.

    Args:
        basis: as in `Target`; A₀ is [a, m_a] with r columns of a, and B₀ likewise.
        rank: r, 0 where the basis is the momentum's alone.
        momentum: the coefficient of the momentum.
        gradient: that of G.
        ridge: λ of the step; with damping, at least ten times that is used.
        damping: added to λ inside inversions only.

    Example:
        >>> import jax.numpy as jnp
        >>> basis = {"a": [jnp.ones((4, 2))], "b": [jnp.ones((2, 3))]}
        >>> target = momentum_target(basis, 1, momentum=0.5, gradient=0.5, ridge=0.1, damping=0.0)
        >>> target.core.tolist(), target.start.tolist()
        ([[0.0, 0.0], [0.0, 0.5]], [[0.0], [1.0]])
    """
    eye, is_pair = _columns(basis, rank)
    core = eye * jnp.where(is_pair, 0, momentum)
    return Target(basis, core, gradient, eye[:, rank:], jnp.maximum(ridge, 10 * damping), damping)


def _columns(basis: Mapping[Side, Sequence[jax.Array]], rank: int) -> tuple[jax.Array, jax.Array]:
    """The identity of the size of a core, and which of its columns belong to (a, b)."""
    size = basis["a"][0].shape[-1]
    return jnp.eye(size, dtype=compute_dtype(*basis["a"])), jnp.arange(size)[None] < rank


class Factor(NamedTuple):
    """One factor of an iterate.

    Args:
        value: the factor.
        coordinates: `[X₀, X₁, ...]`, (R, r) each, in its basis.
    """

    value: jax.Array
    coordinates: list[jax.Array]


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

    $$a\,b \approx \sum_j c_j\, p_j\, q_j$$

    Args:
        terms: the products' factors, each (..., in, r_j) and (..., r_j, out), of any ranks.
        coefficients: a number for each term.
        start: the pair to begin with and, with weight `ridge`, to stay near. Its rank is the
            result's.
        iterations: full iterations; 0 for one pair of half-steps that both use the start's other
            factor (Jacobi).
        ridge: $\lambda$, not negative.
        damping: added to $\lambda$ inside inversions only, not negative; it shrinks the result.

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
    target = Target(basis, core, None, selected, ridge, damping)
    [a], [b] = approximate(Verbs([{}]), [target], iterations)
    return LoRAPair(a.value, b.value)


def check_settings(iterations: Any, lmbd: Any) -> None:
    """Raises unless the settings that OPLoRA and its variants share are in range.

    Example:
        >>> check_settings(iterations=1, lmbd=1e-2)
    """
    check_integer("iterations", iterations, least=0, hint=STATIC_HINT)
    check("lmbd", lmbd, lambda v: v >= 0, "must not be negative")


def approximate(
    pairs: Verbs, targets: Sequence[Target], iterations: int
) -> tuple[list[Factor], list[Factor]]:
    """Runs LoRSum for all pairs.

    Args:
        pairs: the verbs.
        targets: for each pair, what to approximate; None for nothing.
        iterations: k; 0 for Jacobi half-steps.

    Returns:
        The factors a and b of each pair.

    Example:
        See `lorsum`.
    """

    def start(side: Side) -> list[Factor]:
        of = lambda t: Factor(mix(side, t.basis[side][0], t.start), [t.start])
        return pairs.each(of, targets)

    a, b = start("a"), start("b")
    if iterations == 0:
        return half_step(pairs, "a", targets, b), half_step(pairs, "b", targets, a)
    for _ in range(iterations):
        a = half_step(pairs, "a", targets, b)
        b = half_step(pairs, "b", targets, a)
    return a, b


def half_step(
    pairs: Verbs, side: Side, targets: Sequence[Target], fixed: Sequence[Factor]
) -> list[Factor]:
    """Solves for the factors of one side, given the other ones.

    Args:
        pairs: the verbs.
        side: the side to solve for.
        targets: for each pair, what to approximate.
        fixed: for each pair, the factor across.

    Returns:
        The factors.

    Example:
        See `lorsum`.
    """
    y = other(side)

    def square(target: Target, x: Factor) -> jax.Array:
        return cross(y, weigh(y, x.value, target.weights[y]), x.value)

    def regularized(target: Target, gram: jax.Array) -> jax.Array:
        return gram + (target.ridge + target.damping) * identity(gram)

    def solve(target: Target, x: Factor, gram: jax.Array, inverse: jax.Array) -> Factor:
        core = target.core if side == "a" else target.core.T
        weighted = weigh(y, x.value, target.weights[y])
        damping = target.damping * identity(gram)
        narrow = product(core, cross(y, target.basis[y][0], weighted))
        narrow -= product(target.start, gram + damping)
        full = [] if target.gradient is None else [target.gradient * c for c in x.coordinates]
        change, *others = (product(m, inverse) for m in (narrow, *full))
        coordinates = [jnp.broadcast_to(target.start, change.shape) + change, *others]
        return Factor(combine(side, target.basis[side], coordinates), coordinates)

    grams = pairs.each(square, targets, fixed)
    inverses = pairs.together(invert, pairs.each(regularized, targets, grams))
    return pairs.each(solve, targets, fixed, grams, inverses)


def invert(matrix: jax.Array) -> jax.Array:
    """Inverts the Gram matrices of half-steps.

    Example:
        >>> import jax.numpy as jnp
        >>> invert(2.0 * jnp.eye(1)).round(3).tolist()
        [[0.5]]
    """
    return damped_inverse(matrix, 1e-20)  # for a factor of zeros with a ridge of zero


def combine(
    side: Side, elements: Sequence[jax.Array], coordinates: Sequence[jax.Array]
) -> jax.Array:
    """Forms `Σ Aᵢ Xᵢ` or `Σ Yᵢᵀ Bᵢ` from as many elements as there are coordinates.

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
