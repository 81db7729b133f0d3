r"""LoRA-FA: a stays where it starts, and b is trained by projected gradients (arXiv 2308.03303).

    ĝ_b = s⁻² (aᵀ a + δI)⁻¹ g_b

then Adam on ĝ_b, with its moments m, v and decoupled weight decay:

    b ← b − η (√(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε) + λ b)

With a frozen the pair is linear in b. s a ĝ_b is the orthogonal projection of the full gradient on
a's column space, the nearest to it that a step of b can come. The paper trains b by its plain
gradient; the projection is that of Hugging Face PEFT (`create_lorafa_optimizer`, `lorafa.py` at
commit 01ee642), whose equations these are.

The state holds moments of b alone. a is handed back with an update of zero and without decay, so
the activations that its gradient needs are saved only by a model that does not ask for it.

Deviations from PEFT, with the tests in `tests/test_lora_fa.py`:

- Weight decay shrinks the old b, as AdamW in optax and torch does. PEFT shrinks the b that has
  moved, a difference of second order in η (`test_weight_decay_shrinks_b_before_the_move`).
- δ has a floor at the rounding of the Gram matrix, as in every method here, where PEFT takes a
  pseudo-inverse of the damped matrix, and ĝ_b is not rounded to bfloat16
  (`test_in_float32_components_of_a_that_are_equal_stay_finite`).
- Other leaves go to optax's AdamW, whose ε comes after the bias correction of v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import engine
from lowrank_optax.engine import (
    LoRAPair,
    adam_direction_epsilon_hat,
    both,
    damped_inverse,
    gram,
    mix,
    only,
    swap,
)


class LoRAFAState(NamedTuple):
    """Adam's moments of the projected gradients of b, float32 or better.

    Args:
        mu: first moment, a tree shaped like the parameters with `MaskedNode` in place of each a.
        nu: second moment, likewise shaped.
    """

    mu: Any
    nu: Any


def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps: Any = 1e-6,
    damping: Any = 1e-8,
    scale: Any = 1.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes b of LoRA pairs by Adam on projected gradients, other leaves by a fallback.

    $$\hat g_b = s^{-2} (a^\top a + \delta I)^{-1} g_b$$

    a does not move, so it must not be zero at the start.

    Args:
        learning_rate: $\eta$, positive, or a schedule; of the order of AdamW's.
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: $\epsilon$, added to the root of the second moment, positive; 1e-6 is PEFT's.
        damping: $\delta$, positive; 1e-8 is PEFT's.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree. Under
            `optax.inject_hyperparams` wrap a callable by `scales_from`.
        weight_decay: $\lambda$, decoupled, of b and the other leaves.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation. State: `LoRAFAState`, two copies of b.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, lora_fa
        >>> params = LoRAPair(2.0 * jnp.eye(4, 2), jnp.ones((2, 3)))
        >>> tx = lora_fa(0.1, b1=0.0)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> f"{updates.b[0, 0]:.2f} {state.pairs.mu.b[0, 0]:.2f}", updates.a.any().item()
        ('-0.10 0.25', False)

    Source: arXiv 2308.03303, and `create_lorafa_optimizer` of Hugging Face PEFT.
    """
    engine.check_decay("b1", b1)
    engine.check_decay("b2", b2)
    engine.check_positive("eps", eps)
    engine.check_positive("damping", damping)

    def rule(
        pairs: engine.Pairs, grads: Any, params: Any, state: LoRAFAState
    ) -> tuple[Any, LoRAFAState]:
        grams = pairs.each(lambda pair: both(gram, only("a", pair)), params)
        inverses = pairs.together(lambda matrix: damped_inverse(matrix, damping), grams)

        def project(g: LoRAPair, inverse: LoRAPair, scale: Any) -> LoRAPair:
            projected = both(mix, only("b", g), swap(inverse))
            return jax.tree.map(lambda x: x / scale**2, projected)

        projected = pairs.each(project, grads, inverses, pairs.scales)
        mu = optax.tree.update_moment(projected, state.mu, b1, 1)
        nu = optax.tree.update_moment(projected, state.nu, b2, 2)
        directions = adam_direction_epsilon_hat(mu, nu, pairs.count + 1, b1=b1, b2=b2, eps=eps)
        return pairs.descend(directions, params), LoRAFAState(mu, nu)

    def init(pair: LoRAPair) -> LoRAFAState:
        zero = lambda side, x: jnp.zeros_like(x, dtype=engine.compute_dtype(x))
        return LoRAFAState(*(both(zero, only("b", pair)) for _ in range(2)))  # not one buffer

    return engine.lift(
        rule,
        LoRAFAState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        scale=scale,
        fallback=fallback,
        adamw={"b1": b1, "b2": b2, "eps": eps},
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        init=init,
        name="lora_fa",
    )
