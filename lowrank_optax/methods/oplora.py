r"""OPLoRA: a LoRA step as a small alternating-least-squares problem (arXiv 2509.19977).

With G the gradient in the product a b, s the forward scale and m_a m_b a low-rank momentum:

    S        = a b − (η / s²) ((1 − d) G + μ m_a m_b)      the step of the full matrix
    a, b     ← LoRSum(S), started from (a, b)               λ = η ℓ
    m_a, m_b ← LoRSum(μ m_a m_b + (1 − d) G), started from (m_a, m_b)

G is never formed and no activations are kept: the products that LoRSum needs arrive as gradients of
the pair's shadows (`lowrank_optax.shadow`).

Deviations from the released code (zeligism/PSI-LoRA, 9cb3fa6), each held by a test:

- The code keeps every layer's input and output gradient until the step; here nothing is kept.
- `iterations=0` means both half-steps from the old factors; the code returns its input unchanged.
  Without momentum that is preconditioned LoRA.
- The scale s is applied; the code assumes 1.
- The code adds 1e-6 to λ inside inversions only, which shrinks the result. Where b = 0 and η = 0,
  as at the start of a warm-up, it takes a to zero in one step. Here `solver_damping` is 0 by
  default, and steps are computed as changes, which the floor of `engine.damped_inverse` cannot
  shrink. The momentum needs the shrinking. Its λ is at least ten times the damping, so it survives
  η = 0.
"""

from __future__ import annotations

from typing import Any

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


def oplora(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.9,
    *,
    dampening: Any = 0.0,
    iterations: int = 1,
    lmbd: Any = 1e-2,
    scale: Any = 1.0,
    solver_damping: Any = 0.0,
    momentum_damping: Any = 1e-6,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes shadowed LoRA pairs by OPLoRA, and all other leaves by a fallback.

    $$a\,b \leftarrow \mathrm{LoRSum}\big(a\,b
      - \tfrac{\eta}{s^2}((1 - d)\,G + \mu\, m_a m_b)\big)$$

    Args:
        learning_rate: $\eta$, positive, or a schedule; in units of SGD's.
        momentum: $\mu$, in [0, 1). The momentum itself is the leaves `m_a` and `m_b`.
        dampening: d, in [0, 1), as in SGD.
        iterations: k of LoRSum; 0 for Jacobi half-steps, which use linear products only.
        lmbd: $\ell$; the ridge and proximal weight of LoRSum is $\lambda = \eta \ell$.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree. Under
            `optax.inject_hyperparams` wrap a callable by `scales_from`.
        solver_damping: added to $\lambda$ inside inversions only, not negative; it shrinks the
            factors.
        momentum_damping: the same for the momentum, positive; without it the momentum degrades.
        fallback: transformation of unpaired leaves; AdamW at the same rate by default, with a
            warning, for it is too high.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation, to be the last link of a chain. With `iterations` from 1 it needs the
        gradient of a single backward pass: a pair whose products are a sum, as over micro-batches,
        or were rounded to bfloat16 or clipped (other than by `clip_by_global_norm` of this
        library) is not moved, and counted in `state.skipped`.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit or
            have no shadows for this momentum and these iterations.
        TypeError: iterations that are not an integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, nn, oplora, shadow
        >>> params = shadow(LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3))), jax.random.key(0))
        >>> loss = lambda p: jnp.sum((nn.lora_apply(jnp.eye(4), p) - 1.0) ** 2)
        >>> tx = oplora(0.1)
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)

    Source: arXiv 2509.19977.
    """
    check_settings(iterations, lmbd)
    engine.check_decay("momentum", momentum)
    engine.check("solver_damping", solver_damping, lambda v: v >= 0, "must not be negative")
    engine.check("dampening", dampening, lambda v: 0 <= v < 1, "must lie in [0, 1)")
    engine.check_positive("momentum_damping", momentum_damping)

    def rule(pairs: engine.Pairs, grads: Any, params: Any, state: SealedState) -> tuple[Any, Any]:
        ridge = pairs.rate * lmbd

        def step(pair: ShadowedPair, basis: krylov.Basis, scale: Any) -> Target:
            length = pairs.rate / scale**2
            return step_target(
                basis,
                pair.a.shape[-1],
                momentum=-length * momentum,
                gradient=-length * (1 - dampening),
                ridge=ridge,
                damping=solver_damping,
            )

        def new_momentum(pair: ShadowedPair, basis: krylov.Basis) -> Target | None:
            if pair.m_a is None:
                return None
            return momentum_target(
                basis,
                pair.a.shape[-1],
                momentum=momentum,
                gradient=1 - dampening,
                ridge=ridge,
                damping=momentum_damping,
            )

        bases = pairs.each(lambda pair, grad: krylov.unpack(pair, grad)[0], params, grads)
        trust = shadows.trusted(pairs, params, grads, iterations, state.seals)
        a, b = approximate(pairs, pairs.each(step, params, bases, pairs.scales), iterations)
        m_a, m_b = approximate(pairs, pairs.each(new_momentum, params, bases), iterations)
        updates = pairs.each(shadows.updates_to, params, trust, a, b, m_a, m_b)
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
        why_unfit=shadows.why_unfit(iterations, with_momentum=not engine.is_zero(momentum)),
        name="oplora",
    )
