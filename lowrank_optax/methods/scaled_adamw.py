r"""ScaledAdamW: Adam on gradients in the Riemannian metric of the factors (arXiv 2402.02347).

Each factor's gradient is divided by the damped Gram matrix of the other factor:

    ĝ_a = g_a (b bᵀ + δI)⁻¹        ĝ_b = (aᵀ a + δI)⁻¹ g_b

then Adam on ĝ, with its moments m, v and decoupled weight decay:

    x ← x − η (√(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε) + λ x)

The forward scale s does not enter: it multiplies ĝ, and Adam divides it out but for ε.

Two orders: "simultaneous" divides both gradients by the Gram matrices of the factors as they are,
as Hugging Face PEFT does (`create_riemannian_optimizer`); "sequential" moves a first and divides
g_b, the gradient at the old a, by the Gram matrix of the new one, as the released code does
(pilancilab/Riemannian_Preconditioned_LoRA, commit c3a2c1b, `AdamWr` with `correct_bias`).

Deviations, with the tests in `tests/test_scaled_adamw.py`:

- ε is added to √v before its bias correction in both orders, as the released code does. The
  paper's Algorithm 1 and PEFT, which leaves Adam to torch, correct √v first; this is the same with
  ε / √(1 − β₂ᵗ) (`test_eps_apart_simultaneous_order_is_adamw_on_preconditioned_gradients`).
- Weight decay shrinks the old factor, as AdamW in optax and torch do; the released `AdamWr` shrinks
  the factor that has moved, a difference of second order in η
  (`test_weight_decay_shrinks_the_factors_before_the_move`).
- δ has a floor at the rounding of the Gram matrix, as in every method here, where PEFT takes a
  pseudo-inverse and the released code falls back to no preconditioner
  (`test_first_step_from_zero_b_is_finite_and_moves_b`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import optax

from lowrank_optax import engine
from lowrank_optax.engine import (
    adam_direction_epsilon_hat,
    both,
    damped_inverse,
    gram,
    join,
    mix,
    only,
    swap,
)

ORDERS = ("simultaneous", "sequential")


class ScaledAdamWState(NamedTuple):
    """Adam's moments of the preconditioned gradients, float32 or better.

    Args:
        mu: first moment, a tree shaped like the parameters.
        nu: second moment, likewise shaped.
    """

    mu: Any
    nu: Any


def scaled_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps: Any = 1e-6,
    damping: Any = 1e-2,
    order: str = "simultaneous",
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by Adam on preconditioned gradients, other leaves by a fallback.

    $$\hat g_a = g_a (b b^\top + \delta I)^{-1}, \quad \hat g_b = (a^\top a + \delta I)^{-1} g_b$$

    Args:
        learning_rate: $\eta$, positive, or a schedule; of the order of AdamW's.
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: $\epsilon$, added to the root of the second moment, positive; 1e-6 as released.
        damping: $\delta$, positive; 1e-2 is PEFT's, the released code has 1e-6.
        order: "simultaneous" (PEFT's), or "sequential": a, then b against the new a (released).
        weight_decay: $\lambda$, decoupled.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation. State: `ScaledAdamWState`, two copies of the factors.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, scaled_adamw
        >>> params = LoRAPair(jnp.eye(4, 2), 2.0 * jnp.eye(2, 3))
        >>> tx = scaled_adamw(0.1, b1=0.0, damping=1e-6)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> f"{updates.b[0, 0]:.2f} {state.pairs.mu.a[0, 0]:.2f} {state.pairs.mu.b[0, 0]:.2f}"
        '-0.10 0.25 2.00'

    Source: arXiv 2402.02347, Algorithm 1, and the released code.
    """
    engine.check_decay("b1", b1)
    engine.check_decay("b2", b2)
    engine.check_positive("eps", eps)
    engine.check_positive("damping", damping)
    engine.check_choice("order", order, ORDERS)

    def rule(
        pairs: engine.Pairs, grads: Any, params: Any, state: ScaledAdamWState
    ) -> tuple[Any, ScaledAdamWState]:
        direction = functools.partial(adam_direction_epsilon_hat, b1=b1, b2=b2, eps=eps)

        def move(sides: str, across: str, params: Any) -> tuple[Any, Any, Any]:
            """Returns updates and moments of these sides, None on the other one."""
            grams = pairs.each(lambda pair: both(gram, only(across, pair)), params)
            inverses = pairs.together(lambda matrix: damped_inverse(matrix, damping), grams)
            precondition = lambda g, inverse: both(mix, only(sides, g), swap(inverse))
            scaled = pairs.each(precondition, grads, inverses)
            mu = optax.tree.update_moment(scaled, state.mu, b1, 1)
            nu = optax.tree.update_moment(scaled, state.nu, b2, 2)
            return pairs.descend(direction(mu, nu, pairs.count + 1), params), mu, nu

        if order == "simultaneous":
            updates, mu, nu = move("ab", "ab", params)
            return updates, ScaledAdamWState(mu, nu)
        of_a = move("a", "b", params)
        of_b = move("b", "a", pairs.moved(params, of_a[0]))
        updates, mu, nu = (pairs.each(join, *halves) for halves in zip(of_a, of_b, strict=True))
        return updates, ScaledAdamWState(mu, nu)

    return engine.lift(
        rule,
        ScaledAdamWState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        fallback=fallback,
        adamw={"b1": b1, "b2": b2, "eps": eps},
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="scaled_adamw",
    )
