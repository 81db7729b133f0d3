r"""Scaled OPLoRA: OPLoRA in a diagonal metric, K-FAC's or Shampoo's (arXiv 2602.16456).

With the metric `D_in`, `D_out` of `lowrank_optax.Metric`, G the gradient in the product a b, s the
forward scale and m_a m_b a low-rank average of gradients:

    S        = a b − (η / s²) D_in⁻¹ ((1 − β₁) G + β₁ m_a m_b) D_out⁻¹
    a, b     ← LoRSum(S), measured with D_in and D_out         λ = max(η ℓ, 1e-5)
    m_a, m_b ← LoRSum(β₁ m_a m_b + (1 − β₁) G), not scaled
    D        = (d + damping)^power,  d ← β₂ d + (1 − β₂) statistic

The statistics of the metric arrive as gradients too, and the layer divides its products by the same
metric (`lowrank_optax.shadow`).

Deviations from the released code (zeligism/PSI-LoRA, 9cb3fa6), each held by a test: those of OPLoRA
(`methods/oplora.py`), and for `iterations=0` the momentum moves, where in the code it then stays at
its start.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from lowrank_optax import engine
from lowrank_optax._core import krylov, shadows
from lowrank_optax._core.lorsum import (
    Target,
    approximate,
    check_settings,
    momentum_target,
    step_target,
)
from lowrank_optax._core.seals import SealedState, seal, unsealed
from lowrank_optax._core.shadows import ShadowedPair


def scaled_oplora(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.99,
    *,
    damping: Any = 1e-3,
    power: Any = 0.5,
    iterations: int = 1,
    lmbd: Any = 1e-2,
    scale: Any = 1.0,
    solver_damping: Any = 0.0,
    momentum_damping: Any = 1e-6,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes shadowed LoRA pairs by OPLoRA in a diagonal metric, other leaves by a fallback.

    $$a\,b \leftarrow \mathrm{LoRSum}_D\big(a\,b - \tfrac{\eta}{s^2}
      D_{in}^{-1} ((1 - \beta_1)\,G + \beta_1 m_a m_b) D_{out}^{-1}\big)$$

    Args:
        learning_rate: $\eta$, positive, or a schedule. The paper uses 0.1 to 10. A step is as long
            as its gradient is, without a bound: the best rate of one seed may break down with
            another, so take a third of it.
        b1: $\beta_1$ of the momentum, in [0, 1).
        b2: $\beta_2$ of the metric's running averages, in [0, 1).
        damping: added to the averages, positive.
        power: exponent of the damped averages, positive; 1/2 with K-FAC's statistics resembles
            Shampoo, 1 is K-FAC.
        iterations: k of LoRSum; 0 for Jacobi half-steps.
        lmbd: $\ell$; the ridge and proximal weight of LoRSum is $\max(\eta \ell, 10^{-5})$.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree. Under
            `optax.inject_hyperparams` wrap a callable by `scales_from`.
        solver_damping: added to the ridge inside inversions only, not negative.
        momentum_damping: the same for the momentum, positive.
        fallback: transformation of unpaired leaves; AdamW at the same rate by default, with a
            warning, for it is too high.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation; see `oplora`. Pairs need `shadow(..., metric=Metric())`. The backward
        pass reads b2, damping and power from a leaf, where this optimizer writes its own with each
        update: give the same numbers to `Metric`, so that the first step has them too.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit or
            have no metric or shadows for this momentum and these iterations.
        TypeError: iterations that are not an integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, Metric, nn, scaled_oplora, shadow
        >>> pair = LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3)))
        >>> params = shadow(pair, jax.random.key(0), metric=Metric())
        >>> loss = lambda p: jnp.mean((nn.lora_apply(jnp.eye(4), p) - 1.0) ** 2)
        >>> tx = scaled_oplora(0.1)
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)

    Source: arXiv 2602.16456.
    """
    check_settings(iterations, lmbd)
    engine.check_decay("b1", b1)
    engine.check_decay("b2", b2)
    engine.check("solver_damping", solver_damping, lambda v: v >= 0, "must not be negative")
    engine.check_positive("damping", damping)
    engine.check_positive("power", power)
    engine.check_positive("momentum_damping", momentum_damping)

    def rule(pairs: engine.Pairs, grads: Any, params: Any, state: SealedState) -> tuple[Any, Any]:
        ridge = pairs.rate * lmbd

        def blocks(basis: krylov.Basis, metric: Any) -> tuple[krylov.Basis, krylov.Basis]:
            """The blocks of the bases that the step uses, and those of the momentum."""
            split = {
                side: [krylov.split_rank(side, x, metric.columns) for x in elements]
                for side, elements in basis.items()
            }
            of_step = {side: [step for step, _ in parts] for side, parts in split.items()}
            return of_step, {side: [m for _, m in parts] for side, parts in split.items()}

        def step(pair: ShadowedPair, basis: krylov.Basis, metric: Any, scale: Any) -> Target:
            length = pairs.rate / scale**2
            return step_target(
                basis,
                pair.a.shape[-1],
                momentum=-length * b1,
                gradient=-length * (1 - b1),
                ridge=jnp.maximum(ridge, 1e-5),
                damping=solver_damping,
                weights=metric.weights,
            )

        def new_momentum(pair: ShadowedPair, basis: krylov.Basis) -> Target | None:
            if pair.m_a is None:
                return None
            return momentum_target(
                basis, 0, momentum=b1, gradient=1 - b1, ridge=ridge, damping=momentum_damping
            )

        def moves(pair: ShadowedPair, metric: Any, *factors: Any) -> ShadowedPair:
            kind, old = ("shampoo", pair.shampoo) if pair.kfac is None else ("kfac", pair.kfac)
            settings = jnp.stack([jnp.asarray(x, old.dtype) for x in (b2, damping, power)])
            averages = {"d_in": metric.averages["a"], "d_out": metric.averages["b"]}
            own = shadows.updates_to(pair, *factors, **averages)
            return own._replace(
                **{kind: jnp.broadcast_to(settings, old.shape) - old}
            )  # whether the gradient is trusted or not

        bases, metrics = pairs.each(krylov.unpack, params, grads)
        trust = shadows.trusted(pairs, params, grads, iterations, state.seals)
        of_step, of_momentum = pairs.each(blocks, bases, metrics)
        targets = pairs.each(step, params, of_step, metrics, pairs.scales)
        a, b = approximate(pairs, targets, iterations)
        m_a, m_b = approximate(pairs, pairs.each(new_momentum, params, of_momentum), iterations)
        updates = pairs.each(moves, params, metrics, trust, a, b, m_a, m_b)
        return updates, seal(pairs, params, updates)

    return engine.lift(
        rule,
        SealedState,
        learning_rate=learning_rate,
        scale=scale,
        fallback=fallback,
        rate_suits_adamw=False,
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        init=unsealed,
        node=ShadowedPair,
        why_unfit=shadows.why_unfit(iterations, not engine.is_zero(b1), with_metric=True),
        name="scaled_oplora",
    )
