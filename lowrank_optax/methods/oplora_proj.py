r"""OPLoRA-proj: LoRSum on the gradient alone, then each factor's own momentum (arXiv 2509.19977).

With G the gradient in the product a b and s the forward scale, LoRSum makes the step of the
gradient alone, and each factor adds its momentum, transported from the last b̂° to the new b̂ as in
AltLoRA:

    â, b̂ = LoRSum(a b − (η / s²) G), started from (a, b)        λ = η ℓ
    t_a  = μ m_a (b̂° b̂ᵀ) P        P = (b̂ b̂ᵀ + λ I)⁻¹
    a    ← â − η t_a
    m_a  ← t_a + G b̂ᵀ P / s²

and likewise for b. Deviations from the released code (zeligism/PSI-LoRA, 9cb3fa6): those of OPLoRA,
see `methods/oplora.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import engine
from lowrank_optax._core import krylov, shadows
from lowrank_optax._core.lorsum import (
    Factor,
    Target,
    approximate,
    check_settings,
    combine,
    invert,
    step_target,
)
from lowrank_optax._core.shadows import ShadowedPair
from lowrank_optax.engine import LoRAPair, both, cross, gram, identity, mix, product, swap


class OPLoRAProjState(NamedTuple):
    """State of `oplora_proj`: trees shaped like the parameters, float32 or better.

    Args:
        mu: momentum of each factor.
        previous: the last result of LoRSum, which the momentum belongs to.
    """

    mu: Any
    previous: Any


def oplora_proj(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.9,
    *,
    iterations: int = 1,
    lmbd: Any = 1e-2,
    scale: Any = 1.0,
    solver_damping: Any = 0.0,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes shadowed LoRA pairs by OPLoRA-proj, and all other leaves by a fallback.

    LoRSum on the gradient step alone, then each factor's own, transported momentum.

    Args:
        learning_rate: $\eta$, positive, or a schedule; in units of SGD's. A step is as long as its
            gradient is, without a bound: the best rate of one seed may break down with another, so
            take a third of it.
        momentum: $\mu$, in [0, 1).
        iterations: k of LoRSum, from 0. The new factors meet the gradient once more than in
            `oplora`, so pairs need `shadow(..., iterations=k + 1, momentum_rank=0)`, for k = 0 as
            many as for 1.
        lmbd: $\ell$; the ridge and proximal weight is $\lambda = \eta \ell$.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree. Under
            `optax.inject_hyperparams` wrap a callable by `scales_from`.
        solver_damping: added to $\lambda$ inside inversions only, not negative; it shrinks the
            factors.
        fallback: transformation of unpaired leaves; AdamW at the same rate by default, with a
            warning, for it is too high.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation; see `oplora`. State: `OPLoRAProjState`, two copies of the factors.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit or
            whose shadows do not suffice.
        TypeError: iterations that are not an integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, nn, oplora_proj, shadow
        >>> pair = LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3)))
        >>> params = shadow(pair, jax.random.key(0), iterations=2, momentum_rank=0)
        >>> tx = oplora_proj(0.1)
        >>> loss = lambda p: jnp.sum((nn.lora_apply(jnp.eye(4), p) - 1.0) ** 2)
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)

    Source: arXiv 2509.19977, the projected variant.
    """
    check_settings(iterations, lmbd)
    engine.check_decay("momentum", momentum)
    engine.check("solver_damping", solver_damping, lambda v: v >= 0, "must not be negative")
    products = max(iterations, 1) + 1  # the solved factors' Krylov coordinates, times G once more

    def rule(
        pairs: engine.Pairs, grads: Any, params: Any, state: OPLoRAProjState
    ) -> tuple[Any, Any]:
        eta, ridge = pairs.rate, pairs.rate * lmbd

        def step(pair: ShadowedPair, basis: krylov.Basis, scale: Any) -> Target:
            gradient = -eta / scale**2
            rank = pair.a.shape[-1]
            return step_target(
                basis, rank, momentum=0.0, gradient=gradient, ridge=ridge, damping=solver_damping
            )

        def regularized(x: LoRAPair) -> LoRAPair:
            damped = lambda gram: gram + (ridge + solver_damping) * identity(gram)
            return both(lambda side, x: damped(gram(side, x)), x)

        def carry(mu: LoRAPair, old: LoRAPair, new: LoRAPair, inverse: LoRAPair) -> LoRAPair:
            transport = both(lambda y, o, n, inv: product(cross(y, o, n), inv), old, new, inverse)
            return both(lambda x, m, t: momentum * mix(x, m, t), mu, swap(transport))

        def project(basis: Any, a: Factor, b: Factor, inverse: LoRAPair, scale: Any) -> LoRAPair:
            """The gradient in each factor, G b̂ᵀ and âᵀ G, projected."""
            across = LoRAPair(b.coordinates, a.coordinates)
            full = both(lambda side, c: combine(side, basis[side][1:], c), across)
            return both(lambda side, x, inv: mix(side, x, inv) / scale**2, full, swap(inverse))

        bases = pairs.each(lambda pair, grad: krylov.unpack(pair, grad)[0], params, grads)
        trust = shadows.trusted(pairs, params, grads, products)
        a, b = approximate(pairs, pairs.each(step, params, bases, pairs.scales), iterations)
        solved = pairs.each(lambda a, b: LoRAPair(a.value, b.value), a, b)
        inverses = pairs.together(invert, pairs.each(regularized, solved))
        carried = pairs.each(carry, state.mu, state.previous, solved, inverses)
        projected = pairs.each(project, bases, a, b, inverses, pairs.scales)
        a = pairs.each(lambda x, t: Factor(x.value - eta * t.a, []), a, carried)
        b = pairs.each(lambda x, t: Factor(x.value - eta * t.b, []), b, carried)
        mu = jax.tree.map(jnp.add, carried, projected)

        def if_trusted(trust: jax.Array, new: LoRAPair, old: LoRAPair) -> LoRAPair:
            return jax.tree.map(lambda n, o: jnp.where(trust > 0, n, o), new, old)

        new_state = OPLoRAProjState(
            pairs.each(if_trusted, trust, mu, state.mu),
            pairs.each(if_trusted, trust, solved, state.previous),
        )
        return pairs.each(shadows.updates_to, params, trust, a, b), new_state

    def init(pair: ShadowedPair) -> OPLoRAProjState:
        wide = both(lambda side, x: jnp.array(x, engine.compute_dtype(x)), pair)
        return OPLoRAProjState(jax.tree.map(jnp.zeros_like, wide), wide)

    return engine.lift(
        rule,
        OPLoRAProjState,
        learning_rate=learning_rate,
        scale=scale,
        fallback=fallback,
        rate_suits_adamw=False,
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        init=init,
        node=ShadowedPair,
        why_unfit=shadows.why_unfit(products, with_momentum=False),
        name="oplora_proj",
    )
