r"""LoRA-Pro: steps of a and b that change a b most like a step of the full kernel (2407.18242).

Steps δa and δb change s a b by E = s (δa b + a δb) to first order, the equivalent gradient. With
M = aᵀ a + δI, N = b bᵀ + δI, the E nearest to the full gradient G comes, at δ → 0, from

    δa = s⁻² (g_a N⁻¹ + a Y)
    δb = s⁻² (M⁻¹ g_b − (M⁻¹ g_b bᵀ N⁻¹ + Y) b)

for every r×r matrix Y, which cancels in E (the paper's X, transposed and times s²). The published Y
brings δa and δb nearest to g_a and g_b. It solves a Sylvester equation by two `eigh`:

    aᵀ a Y + Y b bᵀ = −aᵀ g_a N⁻¹

`lora_pro` is the paper's Adam. Its moments m, v are those of E, in×out matrices; its direction
D = m̂ / (√v̂ + ε) is brought back by the equations above, with s D bᵀ and s aᵀ D for g_a and g_b.
`lora_pro_efficient` is the released code's "efficient" mode: Adam on δa and δb themselves.

Nothing of the size of the factors holds m and v exactly: each E has rank 2 r in another column and
row space, and √v is taken of each entry. So the efficient form is another method, and how far it is
from the paper's is measured (`test_how_far_the_efficient_form_is_from_the_papers`).

On a mesh D has to be summed over both its axes, so `lora_pro` sends arrays of the factors' size.

Deviations from the released code (mrflogs/LoRA-Pro, 2d8f44a), with the tests in
`tests/test_lora_pro.py`:

- Weight decay shrinks each factor by η λ, as everywhere here. The released full mode shrinks a b by
  that, and the frozen kernel too.
- δ has a floor at rounding level. Sums of eigenvalues below δ count as δ in Y
  (`test_first_steps_from_zero_b_are_finite_and_move_b`).
- Moments are float32 or better; the released full mode keeps them in bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import engine
from lowrank_optax._core.equivalent import adjusted
from lowrank_optax.engine import LoRAPair, adam_direction, cross, dense


class LoRAProState(NamedTuple):
    """Adam's moments of the equivalent gradients, float32 or better.

    Args:
        mu: first moment, a list of (..., in, out).
        nu: second moment, likewise.
    """

    mu: engine.Small
    nu: engine.Small


class LoRAProEfficientState(NamedTuple):
    """Adam's moments of the adjusted gradients, float32 or better.

    Args:
        mu: first moment, a tree shaped like the parameters.
        nu: second moment, likewise shaped.
    """

    mu: Any
    nu: Any


def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps: Any = 1e-8,
    damping: Any = 1e-8,
    scale: Any = 1.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by LoRA-Pro with dense moments, other leaves by a fallback.

    $$\min_{\delta a,\,\delta b} \|s\,(\delta a\,b + a\,\delta b) - G\|_F$$

    for the full gradient, and again for Adam's direction made of the minimizers.

    Args:
        learning_rate: $\eta$, positive, or a schedule; it measures steps of s a b.
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: $\epsilon$, added to the root of the second moment, positive.
        damping: $\delta$, added to the Gram matrices, positive.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree. Under
            `optax.inject_hyperparams` wrap a callable by `scales_from`.
        weight_decay: $\lambda$, decoupled.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation. State: `LoRAProState`, two matrices of the kernel's size a pair, as much
        as full fine-tuning with Adam has.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, lora_pro
        >>> params = LoRAPair(jnp.eye(4, 2), jnp.ones((2, 3)))
        >>> tx = lora_pro(0.1)
        >>> tx.init(params).pairs.mu[0].shape
        (4, 3)

    Source: arXiv 2407.18242, its form with AdamW.
    """
    _check(b1, b2, eps, damping)

    def rule(
        pairs: engine.Pairs, grads: Any, params: Any, state: LoRAProState
    ) -> tuple[Any, LoRAProState]:
        def equivalent(d: LoRAPair, pair: LoRAPair, s: Any) -> jax.Array:
            return s * (dense(d.a, pair.b) + dense(pair.a, d.b))

        def gradients(full: jax.Array, pair: LoRAPair, s: Any) -> LoRAPair:
            return LoRAPair(s * cross("b", full, pair.b), s * cross("a", pair.a, full))

        nearest = adjusted(pairs, grads, params, damping, balanced=False)
        full = pairs.each(equivalent, nearest, params, pairs.scales)
        full, mu, nu = _adam(pairs, full, state, b1, b2, eps)
        projected = pairs.each(gradients, full, params, pairs.scales)
        directions = adjusted(pairs, projected, params, damping, balanced=True)
        return pairs.descend(directions, params), LoRAProState(mu, nu)

    def init(pair: LoRAPair) -> LoRAProState:
        like = dense(pair.a, pair.b)
        return LoRAProState(jnp.zeros_like(like), jnp.zeros_like(like))  # not one buffer

    return engine.lift(
        rule,
        LoRAProState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        scale=scale,
        fallback=fallback,
        adamw={"b1": b1, "b2": b2, "eps": eps},
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        init=init,
        name="lora_pro",
    )


def lora_pro_efficient(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps: Any = 1e-8,
    damping: Any = 1e-8,
    scale: Any = 1.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by Adam on LoRA-Pro's adjusted gradients, other leaves by a fallback.

    $$\delta a = s^{-2} (g_a N^{-1} + a\,Y), \quad
      \delta b = s^{-2} (M^{-1} g_b - (M^{-1} g_b b^\top N^{-1} + Y)\,b)$$

    Args:
        learning_rate: $\eta$, positive, or a schedule; of the order of AdamW's.
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: $\epsilon$, added to the root of the second moment, positive.
        damping: $\delta$, added to the Gram matrices, positive.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree. Under
            `optax.inject_hyperparams` wrap a callable by `scales_from`.
        weight_decay: $\lambda$, decoupled.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation. State: `LoRAProEfficientState`, two copies of the factors.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, lora_pro_efficient
        >>> params = LoRAPair(jnp.eye(4, 2), jnp.eye(2, 3))
        >>> tx = lora_pro_efficient(0.1, b1=0.0)
        >>> state = tx.update(params, tx.init(params), params)[1]
        >>> f"{state.pairs.mu.a[0, 0]:.2f} {state.pairs.mu.b[0, 0]:.2f}"  # half of the change each
        '0.50 0.50'

    Source: arXiv 2407.18242; Adam on the factors is the released code's `mode="efficient"`.
    """
    _check(b1, b2, eps, damping)

    def rule(
        pairs: engine.Pairs, grads: Any, params: Any, state: LoRAProEfficientState
    ) -> tuple[Any, LoRAProEfficientState]:
        grads = adjusted(pairs, grads, params, damping, balanced=True)
        directions, mu, nu = _adam(pairs, grads, state, b1, b2, eps)
        return pairs.descend(directions, params), LoRAProEfficientState(mu, nu)

    return engine.lift(
        rule,
        LoRAProEfficientState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        scale=scale,
        fallback=fallback,
        adamw={"b1": b1, "b2": b2, "eps": eps},
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="lora_pro_efficient",
    )


def _check(b1: Any, b2: Any, eps: Any, damping: Any) -> None:
    engine.check_decay("b1", b1)
    engine.check_decay("b2", b2)
    engine.check_positive("eps", eps)
    engine.check_positive("damping", damping)


def _adam(
    pairs: engine.Pairs, grads: Any, state: Any, b1: Any, b2: Any, eps: Any
) -> tuple[Any, Any, Any]:
    """Returns Adam's direction and its new moments."""
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment(grads, state.nu, b2, 2)
    return adam_direction(mu, nu, pairs.count + 1, b1=b1, b2=b2, eps=eps), mu, nu
