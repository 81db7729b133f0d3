r"""OPLoRA: a LoRA step as a small alternating-least-squares problem (arXiv 2509.19977).

With G the gradient in the product a b, s the forward scale and m_a m_b a low-rank momentum::

    S      = a b − (η / s²) ((1 − d) G + μ m_a m_b)      the step of the full matrix
    a, b   ← LoRSum(S), started from (a, b)               λ = η ℓ
    m_a, m_b ← LoRSum(μ m_a m_b + (1 − d) G), started from (m_a, m_b)

``oplora_proj`` steps by LoRSum on the gradient alone, (â, b̂) ≈ a b − (η / s²) G, and adds to each
factor its own momentum, transported from the last b̂° to the new b̂ as AltLoRA does::

    t_a = μ m_a (b̂° b̂ᵀ) P_b̂        a ← â − η t_a        m_a ← t_a + G b̂ᵀ P_b̂ / s²

G is never formed and no activations are kept: the products that LoRSum needs arrive as gradients of
the pair's shadows (``lowrank_optax.shadows``).

Deviations from the released code (zeligism/PSI-LoRA, 9cb3fa6), each held by a test:

- The code keeps every layer's input and output gradient until the step; here nothing is kept.
- ``iterations=0`` means both half-steps from the old factors; the code returns its input unchanged.
  Without momentum that is preconditioned LoRA.
- The scale s is applied; the code assumes 1.
- Small inverses have the damping floor of ``linalg.damped_inverse``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import factors, pairwise, shadows
from lowrank_optax.arguments import check, check_positive
from lowrank_optax.factors import ShadowedPair
from lowrank_optax.linalg import (
    SIDES,
    Side,
    compute_dtype,
    cross,
    damped_inverse,
    gram,
    mix,
    other,
    product,
)
from lowrank_optax.lorsum import SOLVER_DAMPING, combine, iterate
from lowrank_optax.pairwise import Batched, RuleRun, Step


class OPLoRAState(NamedTuple):
    """OPLoRA keeps nothing: its momentum are leaves of the parameter tree."""


class OPLoRAProjState(NamedTuple):
    """State of :func:`oplora_proj`: trees shaped like the parameters, float32 or better.

    Args:
        mu: momentum of each factor.
        previous: the last result of LoRSum, which the momentum belongs to.
    """

    mu: Any
    previous: Any


def oplora(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.9,
    *,
    dampening: Any = 0.0,
    iterations: int = 1,
    lmbd: Any = 1e-2,
    scale: Any = 1.0,
    damping: Any = SOLVER_DAMPING,
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes shadowed LoRA pairs by OPLoRA, and all other leaves by a fallback.

    .. math:: a\,b \leftarrow \mathrm{LoRSum}\big(a\,b - \tfrac{\eta}{s^2}
              ((1 - d)\,G + \mu\, m_a m_b)\big)

    Args:
        learning_rate: η, positive, or a schedule of the update count; in units of SGD's.
        momentum: μ, in [0, 1); the momentum itself is the leaves ``m_a`` and ``m_b``.
        dampening: d, in [0, 1), as in SGD.
        iterations: k of LoRSum; 0 for Jacobi half-steps, which need no quadratic products.
        lmbd: ℓ; the ridge and proximal weight of LoRSum is λ = η ℓ.
        scale: the forward scale s, as alpha / r: a number, a callable from a pair's path, or a tree
            of numbers (``factors.scales``).
        damping: added to λ inside inversions, positive.
        fallback: transformation of unpaired leaves; AdamW at the same learning rate by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation, to be the last link of a chain. With ``iterations`` from 1 it needs the
        gradient of one backward pass. A pair whose quadratic products are not of its gradient is
        not moved and counted in ``state.skipped``: the mean over micro-batches
        (``optax.MultiSteps``; use ``iterations=0``), an adapter used twice in a forward pass, or
        clipping other than by ``shadows.clip_by_global_norm``. State: none beside counters; the
        shadows are one copy of the factors.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit or
            have no shadows for this momentum and these iterations.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from lowrank_optax import LoRAPair, nn, oplora, shadow
        >>> params = shadow(LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3))), jax.random.key(0))
        >>> loss = lambda p: 0.5 * jnp.sum((nn.lora_apply(jnp.eye(4), p) - 1.0) ** 2)
        >>> tx = oplora(0.1)
        >>> def step(carry, _):
        ...     params, state = carry
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return (optax.apply_updates(params, updates), state), None
        >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
        >>> bool(loss(params) < 0.01)
        True

    Source: arXiv 2509.19977.
    """
    _check(learning_rate, momentum, iterations, lmbd)
    check("dampening", dampening, lambda v: 0 <= v < 1, "must lie in [0, 1)")
    with_momentum = not (isinstance(momentum, int | float) and momentum == 0)
    invert = _solver(damping)

    def rule(
        step: Step, grads: ShadowedPair, state: OPLoRAState, pair: ShadowedPair, scale: Any
    ) -> RuleRun:
        eta = _rate(learning_rate, step)
        basis = shadows.bases(pair, grads)
        trust = yield from _trust(basis, iterations)
        rank, width = pair.a.shape[-1], basis["a"][0].shape[-1]
        eye = jnp.eye(width, dtype=compute_dtype(*basis["a"]))
        is_factor, is_momentum = jnp.arange(width) < rank, jnp.arange(width) >= rank
        keywords = {"iterations": iterations, "ridge": eta * lmbd}

        core = eye * jnp.where(is_factor, 1, -eta / scale**2 * momentum)
        new, _ = yield from iterate(
            basis, core, -eta / scale**2 * (1 - dampening), eye[:, :rank], invert, **keywords
        )
        updates = ShadowedPair(
            new.a - pair.a, new.b - pair.b, krylov=jax.tree.map(jnp.zeros_like, pair.krylov)
        )
        if pair.m_a is not None:
            core = eye * jnp.where(is_momentum, momentum, 0)
            m, _ = yield from iterate(basis, core, 1 - dampening, eye[:, rank:], invert, **keywords)
            updates = updates._replace(m_a=m.a - pair.m_a, m_b=m.b - pair.m_b)
        return jax.tree.map(lambda u: jnp.where(trust > 0, u, 0), updates), state

    return pairwise.lift(
        [rule],
        OPLoRAState,
        lambda pair: OPLoRAState(),
        node=ShadowedPair,
        lacks=_shadows_for(iterations, with_momentum),
        fallback=fallback or optax.adamw(learning_rate),
        scale=scale,
        specs=specs,
        name="oplora",
    )


def oplora_proj(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.9,
    *,
    iterations: int = 1,
    lmbd: Any = 1e-2,
    scale: Any = 1.0,
    damping: Any = SOLVER_DAMPING,
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes shadowed LoRA pairs by OPLoRA-proj, and all other leaves by a fallback.

    LoRSum on the gradient step alone, then each factor's own, transported momentum.

    Args:
        learning_rate: η, positive, or a schedule of the update count; in units of SGD's.
        momentum: μ, in [0, 1).
        iterations: k of LoRSum, from 0. The new factors meet the gradient once more than in
            :func:`oplora`, so pairs need ``shadow(..., iterations=k + 1, momentum_rank=0)``.
        lmbd: ℓ; the ridge and proximal weight is λ = η ℓ.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree.
        damping: added to λ inside inversions, positive.
        fallback: transformation of unpaired leaves; AdamW at the same learning rate by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation; see :func:`oplora`. State: two copies of the factors.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit or
            whose shadows do not suffice.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, oplora_proj, shadow
        >>> pair = LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3)))
        >>> params = shadow(pair, jax.random.key(0), iterations=2, momentum_rank=0)
        >>> tx = oplora_proj(0.1)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates.a.shape
        (4, 2)

    Source: arXiv 2509.19977, the projected variant.
    """
    _check(learning_rate, momentum, iterations, lmbd)
    invert = _solver(damping)

    def rule(
        step: Step, grads: ShadowedPair, state: OPLoRAProjState, pair: ShadowedPair, scale: Any
    ) -> RuleRun:
        eta = _rate(learning_rate, step)
        ridge = eta * lmbd
        basis = shadows.bases(pair, grads)
        trust = yield from _trust(basis, iterations + 1)
        rank, width = pair.a.shape[-1], basis["a"][0].shape[-1]
        eye = jnp.eye(width, dtype=compute_dtype(*basis["a"]))
        new, coordinates = yield from iterate(
            basis,
            eye * (jnp.arange(width) < rank),
            -eta / scale**2,
            eye[:, :rank],
            invert,
            iterations=iterations,
            ridge=ridge,
        )
        x: dict[Side, jax.Array] = {"a": new.a, "b": new.b}
        inverses = yield [
            Batched(invert, gram(other(side), x[other(side)]) + ridge * eye[:rank, :rank])
            for side in SIDES
        ]
        moves, momenta = {}, {}
        for side, inverse in zip(SIDES, inverses, strict=True):
            y = other(side)
            transport = product(cross(y, getattr(state.previous, y), x[y]), inverse)
            carried = momentum * mix(side, getattr(state.mu, side), transport)
            full = combine(side, basis[side][1:], coordinates[y])  # G in x[y]
            projected = mix(side, full, inverse) / scale**2
            moves[side] = x[side] - eta * carried - getattr(pair, side)
            momenta[side] = carried + projected
        updates = ShadowedPair(
            **moves,
            m_a=jax.tree.map(jnp.zeros_like, pair.m_a),
            m_b=jax.tree.map(jnp.zeros_like, pair.m_b),
            krylov=jax.tree.map(jnp.zeros_like, pair.krylov),
        )
        new_state = OPLoRAProjState(ShadowedPair(**momenta), ShadowedPair(**x))
        updates = jax.tree.map(lambda u: jnp.where(trust > 0, u, 0), updates)
        return updates, jax.tree.map(lambda n, o: jnp.where(trust > 0, n, o), new_state, state)

    def init(pair: ShadowedPair) -> OPLoRAProjState:
        factors_of = lambda convert: ShadowedPair(convert(pair.a), convert(pair.b))
        return OPLoRAProjState(
            factors_of(lambda x: jnp.zeros_like(x, compute_dtype(x))),
            factors_of(lambda x: jnp.array(x, compute_dtype(x))),
        )

    return pairwise.lift(
        [rule],
        OPLoRAProjState,
        init,
        node=ShadowedPair,
        lacks=_shadows_for(iterations + 1, with_momentum=False),
        fallback=fallback or optax.adamw(learning_rate),
        scale=scale,
        specs=specs,
        name="oplora_proj",
    )


def _check(learning_rate: Any, momentum: Any, iterations: Any, lmbd: Any) -> None:
    check_positive("learning_rate", learning_rate)
    check("momentum", momentum, lambda v: 0 <= v < 1, "must lie in [0, 1)")
    check("iterations", iterations, lambda k: k >= 0 and k == int(k), "must be a whole number")
    check("lmbd", lmbd, lambda v: v >= 0, "must not be negative")


def _rate(learning_rate: optax.ScalarOrSchedule, step: Step) -> Any:
    return learning_rate(step.count) if callable(learning_rate) else learning_rate


def _trust(basis: dict[str, list[jax.Array]], iterations: int) -> Any:
    """Yields the check that the quadratic products are of the linear ones' gradient; 1 or 0."""
    if iterations == 0:
        return jnp.ones([1, 1])
    stack = cross("b", basis["b"][2], basis["b"][0])
    [trust] = yield [Batched(shadows.consistency, stack, gram("a", basis["a"][1]))]
    return trust


def _solver(damping: Any) -> Callable[[jax.Array], jax.Array]:
    check_positive("damping", damping)

    def invert(matrix: jax.Array) -> jax.Array:
        return damped_inverse(matrix, damping)

    return invert


def _shadows_for(iterations: int, with_momentum: bool) -> Callable[[ShadowedPair], str]:
    """Says what a pair lacks for so many iterations, with the remedy."""

    def lacks(pair: ShadowedPair) -> str:
        enough = shadows.iterations_of(pair) >= iterations
        if enough and not (with_momentum and pair.m_a is None):
            return ""
        rank = "" if with_momentum else ", momentum_rank=0"
        return (
            "needs a pair with shadows: replace the pair by"
            f" `lowrank_optax.shadow(pair, key, iterations={iterations}{rank})`, and apply it with"
            " `nn.lora_apply`."
        )

    return lacks
