r"""OPLoRA: a LoRA step as a small alternating-least-squares problem (arXiv 2509.19977).

With G the gradient in the product a b, s the forward scale and m_a m_b a low-rank momentum::

    S      = a b − (η / s²) ((1 − d) G + μ m_a m_b)      the step of the full matrix
    a, b   ← LoRSum(S), started from (a, b)               λ = η ℓ
    m_a, m_b ← LoRSum(μ m_a m_b + (1 − d) G), started from (m_a, m_b)

``oplora_proj`` steps by LoRSum on the gradient alone, (â, b̂) ≈ a b − (η / s²) G, and adds to each
factor its own momentum, transported from the last b̂° to the new b̂ as AltLoRA does::

    t_a = μ m_a (b̂° b̂ᵀ) P_b̂        a ← â − η t_a        m_a ← t_a + G b̂ᵀ P_b̂ / s²

``scaled_oplora`` steps in a diagonal metric (K-FAC's or Shampoo's, ``shadows.Metric``): LoRSum
measures with ``D_in`` and ``D_out``, and in place of G and m_a m_b stand ``D_in⁻¹ G D_out⁻¹`` and
``D_in⁻¹ m_a m_b D_out⁻¹``. Its momentum is an average, with (1 - β₁) G, and is not scaled.

G is never formed and no activations are kept: the products that LoRSum needs arrive as gradients of
the pair's shadows (``lowrank_optax.shadows``).

Deviations from the released code (zeligism/PSI-LoRA, 9cb3fa6), each held by a test:

- The code keeps every layer's input and output gradient until the step; here nothing is kept.
- ``iterations=0`` means both half-steps from the old factors; the code returns its input unchanged.
  Without momentum that is preconditioned LoRA.
- The scale s is applied; the code assumes 1.
- Scaled, the momentum moves for ``iterations=0`` too; in the code it then stays at its start.
- The code adds 1e-6 to λ inside inversions but not beside them, which shrinks the result: a to zero
  in one step where b = 0 and η = 0, as at the start of a warm-up. Here ``damping`` is 0 by default,
  and steps are computed as changes, which the floor of ``linalg.damped_inverse`` cannot shrink. The
  momentum needs the shrinking; its λ is at least ten times as large, so that it survives η = 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import factors, pairwise, shadows
from lowrank_optax.arguments import check, check_decay, check_integer, check_positive, is_zero
from lowrank_optax.batching import Batched
from lowrank_optax.factors import ShadowedPair
from lowrank_optax.linalg import (
    SIDES,
    Side,
    compute_dtype,
    cross,
    gram,
    mix,
    other,
    product,
)
from lowrank_optax.lorsum import combine, invert, iterate
from lowrank_optax.pairwise import RuleRun, Step


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
    damping: Any = 0.0,
    momentum_damping: Any = 1e-6,
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes shadowed LoRA pairs by OPLoRA, and all other leaves by a fallback.

    .. math:: a\,b \leftarrow \mathrm{LoRSum}\big(a\,b - \tfrac{\eta}{s^2}
              ((1 - d)\,G + \mu\, m_a m_b)\big)

    Args:
        learning_rate: η, positive, or a schedule of the update count; in units of SGD's.
        momentum: μ, in [0, 1); the momentum itself is the leaves ``m_a`` and ``m_b``. The
            released code has 0.9 or 0; 0, at ten times the learning rate, was better on both tasks
            of ``docs/results/defaults.md``.
        dampening: d, in [0, 1), as in SGD.
        iterations: k of LoRSum; 0 for Jacobi half-steps, which need no quadratic products.
        lmbd: ℓ; the ridge and proximal weight of LoRSum is λ = η ℓ. There 1e-4 was no different
            from the default, the released code's, and 1 worse.
        scale: the forward scale s, as alpha / r: a number, a callable from a pair's path, or a tree
            of numbers (``factors.scales``).
        damping: added to λ inside inversions only, not negative; it shrinks the factors.
        momentum_damping: the same for the momentum, positive: without it one of m_a and m_b grows
            and the other shrinks until the momentum no longer follows.
        fallback: transformation of unpaired leaves; AdamW at the same learning rate by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation, to be the last link of a chain. With ``iterations`` from 1 it needs the
        gradient of one backward pass. A pair whose quadratic products are not of its gradient is
        not moved and counted in ``state.skipped``: the mean over micro-batches
        (``optax.MultiSteps``; use ``iterations=0``), an adapter used twice in a forward pass,
        gradients rounded to bfloat16, or clipping other than by ``shadows.clip_by_global_norm``.
        State: none beside counters. Of the leaves among the parameters the momentum is one copy of
        the factors; the zeros that stand for further products are 4 k - 3 copies where in = out.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit or
            have no shadows for this momentum and these iterations.
        TypeError: iterations that are not an integer.

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
    check_positive("momentum_damping", momentum_damping)
    check("damping", damping, lambda v: v >= 0, "must not be negative")

    def rule(
        step: Step, grads: ShadowedPair, state: OPLoRAState, pair: ShadowedPair, scale: Any
    ) -> RuleRun:
        eta = _rate(learning_rate, step)
        step_size = eta / scale**2
        basis, _ = shadows.bases(pair, grads)
        trust = yield from _trust(grads, iterations)
        rank, width = pair.a.shape[-1], basis["a"][0].shape[-1]
        eye = jnp.eye(width, dtype=compute_dtype(*basis["a"]))
        is_factor, is_momentum = jnp.arange(width) < rank, jnp.arange(width) >= rank
        ridge = eta * lmbd

        core = eye * jnp.where(is_factor, 1, -step_size * momentum)
        new, _ = yield from iterate(
            basis,
            core,
            -step_size * (1 - dampening),
            eye[:, :rank],
            iterations=iterations,
            ridge=ridge,
            damping=damping,
        )
        updates = {"a": new.a - pair.a, "b": new.b - pair.b}
        if pair.m_a is not None:
            core = eye * jnp.where(is_momentum, momentum, 0)
            m, _ = yield from iterate(
                basis,
                core,
                1 - dampening,
                eye[:, rank:],
                iterations=iterations,
                ridge=jnp.maximum(ridge, 10 * momentum_damping),
                damping=momentum_damping,
            )
            updates |= {"m_a": m.a - pair.m_a, "m_b": m.b - pair.m_b}
        return _updates(pair, updates, trust), state

    return pairwise.lift(
        [rule],
        OPLoRAState,
        lambda pair: OPLoRAState(),
        node=ShadowedPair,
        lacks=_shadows_for(iterations, with_momentum=not is_zero(momentum)),
        fallback=fallback or optax.adamw(learning_rate),
        scale=scale,
        specs=specs,
        name="oplora",
    )


def scaled_oplora(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.99,
    damping: Any = 1e-3,
    *,
    power: Any = 0.5,
    iterations: int = 1,
    lmbd: Any = 1e-2,
    scale: Any = 1.0,
    solver_damping: Any = 0.0,
    momentum_damping: Any = 1e-6,
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes shadowed LoRA pairs by OPLoRA in a diagonal metric, other leaves by a fallback.

    .. math:: a\,b \leftarrow \mathrm{LoRSum}_D\big(a\,b - \tfrac{\eta}{s^2}
              D_{in}^{-1} ((1 - \beta_1)\,G + \beta_1 m_a m_b) D_{out}^{-1}\big)

    Args:
        learning_rate: η, positive, or a schedule of the update count. The paper uses 0.1 to 10.
        b1: β₁ of the momentum, in [0, 1).
        b2: β₂ of the metric's running averages, in [0, 1).
        damping: added to the averages, positive.
        power: exponent of the damped averages, positive; ½ with K-FAC's statistics resembles
            Shampoo, 1 is K-FAC.
        iterations: k of LoRSum; 0 for Jacobi half-steps.
        lmbd: ℓ; the ridge and proximal weight of LoRSum is max(η ℓ, 1e-5).
        scale: the forward scale s: a number, a callable from a pair's path, or a tree.
        solver_damping: added to λ inside inversions only, not negative; it shrinks the factors.
        momentum_damping: the same for the momentum, positive.
        fallback: transformation of unpaired leaves; AdamW at the same learning rate by default,
            which large rates do not suit.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation; see :func:`oplora`. Pairs need ``shadow(..., metric=Metric())``, which
        also says whether the statistics are K-FAC's or Shampoo's. The backward pass reads β₂,
        damping and power from a leaf: this optimizer writes its own there with each update, so a
        first step in other numbers is avoided by giving them to ``Metric`` too. State: none beside
        counters. Of the leaves among the parameters the momentum is one copy of the factors, the
        zeros that stand for products are 6 k - 1.5 where in = out, and the metric two diagonals.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit or
            have no metric or shadows for this momentum and these iterations.
        TypeError: iterations that are not an integer.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from lowrank_optax import LoRAPair, nn, scaled_oplora, shadow, shadows
        >>> pair = LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3)))
        >>> params = shadow(pair, jax.random.key(0), metric=shadows.Metric())
        >>> loss = lambda p: 0.5 * jnp.mean((nn.lora_apply(jnp.eye(4), p) - 1.0) ** 2)
        >>> tx = scaled_oplora(0.1)
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
        >>> bool(loss(optax.apply_updates(params, updates)) < loss(params))
        True

    Source: arXiv 2602.16456.
    """
    _check(learning_rate, b1, iterations, lmbd)
    check_decay("b2", b2)
    check_positive("damping", damping)
    check_positive("power", power)
    check("solver_damping", solver_damping, lambda v: v >= 0, "must not be negative")
    check_positive("momentum_damping", momentum_damping)

    def rule(
        step: Step, grads: ShadowedPair, state: OPLoRAState, pair: ShadowedPair, scale: Any
    ) -> RuleRun:
        eta = _rate(learning_rate, step)
        step_size, ridge = eta / scale**2, eta * lmbd
        basis, metric = shadows.bases(pair, grads)
        assert metric is not None  # see _shadows_for
        trust = yield from _trust(grads, iterations)
        blocks = {
            side: [shadows.split(side, x, metric.columns) for x in basis[side]] for side in SIDES
        }
        step_basis = {side: [x for x, _ in blocks[side]] for side in SIDES}
        rank = pair.a.shape[-1]
        eye = jnp.eye(metric.columns, dtype=compute_dtype(*basis["a"]))

        core = eye * jnp.where(jnp.arange(metric.columns) < rank, 1, -step_size * b1)
        new, _ = yield from iterate(
            step_basis,
            core,
            -step_size * (1 - b1),
            eye[:, :rank],
            iterations=iterations,
            ridge=jnp.maximum(ridge, 1e-5),
            damping=solver_damping,
            weights=metric.weights,
        )
        updates = {"a": new.a - pair.a, "b": new.b - pair.b}
        updates |= {"d_in": metric.averages["a"] - pair.d_in}
        updates |= {"d_out": metric.averages["b"] - pair.d_out}
        if pair.m_a is not None:
            momentum_basis = {side: [m for _, m in blocks[side]] for side in SIDES}
            eye = jnp.eye(pair.m_a.shape[-1], dtype=eye.dtype)
            m, _ = yield from iterate(
                momentum_basis,
                b1 * eye,
                1 - b1,
                eye,
                iterations=iterations,
                ridge=jnp.maximum(ridge, 10 * momentum_damping),
                damping=momentum_damping,
            )
            updates |= {"m_a": m.a - pair.m_a, "m_b": m.b - pair.m_b}
        moved = _updates(pair, updates, trust)
        kind, old = ("shampoo", pair.shampoo) if pair.kfac is None else ("kfac", pair.kfac)
        settings = jnp.stack([jnp.asarray(x, old.dtype) for x in (b2, damping, power)])
        return moved._replace(**{kind: settings - old}), state

    return pairwise.lift(
        [rule],
        OPLoRAState,
        lambda pair: OPLoRAState(),
        node=ShadowedPair,
        lacks=_shadows_for(iterations, with_momentum=not is_zero(b1), with_metric=True),
        fallback=fallback or optax.adamw(learning_rate),
        scale=scale,
        specs=specs,
        name="scaled_oplora",
    )


def oplora_proj(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.9,
    *,
    iterations: int = 1,
    lmbd: Any = 1e-2,
    scale: Any = 1.0,
    damping: Any = 0.0,
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
        damping: added to λ inside inversions only, not negative; it shrinks the factors.
        fallback: transformation of unpaired leaves; AdamW at the same learning rate by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation; see :func:`oplora`. State: two copies of the factors.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit or
            whose shadows do not suffice.
        TypeError: iterations that are not an integer.

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
    check("damping", damping, lambda v: v >= 0, "must not be negative")

    def rule(
        step: Step, grads: ShadowedPair, state: OPLoRAProjState, pair: ShadowedPair, scale: Any
    ) -> RuleRun:
        eta = _rate(learning_rate, step)
        ridge = eta * lmbd
        basis, _ = shadows.bases(pair, grads)
        trust = yield from _trust(grads, iterations + 1)
        rank, width = pair.a.shape[-1], basis["a"][0].shape[-1]
        eye = jnp.eye(width, dtype=compute_dtype(*basis["a"]))
        new, coordinates = yield from iterate(
            basis,
            eye * (jnp.arange(width) < rank),
            -eta / scale**2,
            eye[:, :rank],
            iterations=iterations,
            ridge=ridge,
            damping=damping,
        )
        x: dict[Side, jax.Array] = {"a": new.a, "b": new.b}
        inverses = yield [
            Batched(
                invert, gram(other(side), x[other(side)]) + (ridge + damping) * eye[:rank, :rank]
            )
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
        new_state = OPLoRAProjState(ShadowedPair(**momenta), ShadowedPair(**x))
        new_state = jax.tree.map(lambda n, o: jnp.where(trust > 0, n, o), new_state, state)
        return _updates(pair, moves, trust), new_state

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
    check_integer("iterations", iterations, least=0)
    check("lmbd", lmbd, lambda v: v >= 0, "must not be negative")


def _rate(learning_rate: optax.ScalarOrSchedule, step: Step) -> Any:
    return learning_rate(step.count) if callable(learning_rate) else learning_rate


def _trust(grads: ShadowedPair, iterations: int) -> Any:
    """Yields the check that the products are of one backward pass; 1 or 0."""
    if iterations == 0:  # Jacobi steps use linear products only
        return jnp.ones([*grads.a.shape[:-2], 1, 1])
    [trust] = yield [Batched(shadows.whole, grads.seal)]
    return trust


def _updates(pair: ShadowedPair, moves: Mapping[Any, jax.Array], trust: jax.Array) -> ShadowedPair:
    """Makes updates of a whole node: zero where nothing moves, and all zero without trust."""
    batch = trust.shape[:-2]
    updates = {
        name: jnp.where(trust.reshape(*batch, *[1] * (move.ndim - len(batch))) > 0, move, 0)
        for name, move in moves.items()
    }
    return jax.tree.map(jnp.zeros_like, pair)._replace(**updates)


def _shadows_for(
    iterations: int, with_momentum: bool, with_metric: bool = False
) -> Callable[[ShadowedPair], str]:
    """Says what a pair lacks for so many iterations, with the remedy."""
    settings = f"iterations={iterations}" + ("" if with_momentum else ", momentum_rank=0")
    settings += ", metric=shadows.Metric()" if with_metric else ""

    def lacks(pair: ShadowedPair) -> str:
        if pair.seal is not None and jnp.finfo(pair.seal.dtype).bits < 32:
            return (
                f"finds shadows in {pair.seal.dtype}, in which products cannot be told from sums:"
                " cast the factors alone, and keep their shadows in float32."
            )
        enough = shadows.iterations_of(pair) >= iterations
        has_all = enough and (pair.m_a is not None or not with_momentum)
        if has_all and shadows.has_metric(pair) == with_metric:
            return ""
        other = " It has a metric, which is for `scaled_oplora`." if not with_metric else ""
        return (
            "needs a pair with shadows: replace the pair by"
            f" `lowrank_optax.shadow(pair, key, {settings})`, and apply it with `nn.lora_apply`."
            + (other if shadows.has_metric(pair) else "")
        )

    return lacks
