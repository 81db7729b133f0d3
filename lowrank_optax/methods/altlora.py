r"""AltLoRA and AltLoRA+: alternating projections of the full gradient (arXiv 2505.12455).

With x one factor of a pair, y the other one, which has moved from y° since x last followed it,
cross(p, q) the r×r product of two values of y, and mix(x, M) the product of x with M over the rank
axis, a step of x is

    P  = (cross(y, y) + δ I)⁻¹
    ĝ  = mix(∇x, P) / s²                  projection
    m  ← mix(m, cross(y°, y) P)           transport: the momentum follows the move of y
    m  ← β1 m + (1 − β1) ĝ
    d  = m / (1 − β1ᵏ)                    AltLoRA
    d  = m / (1 − β1ᵏ) / (√(v / (1 − β2ᵏ)) + ε),  v ← β2 v + (1 − β2) ĝ²      AltLoRA+
    x  ← x − η (d + λ x)

s ĝ_a b is the orthogonal projection of the full gradient on the row space of b. The transported
momentum is argmin_M ‖M b − m_a b°‖, so the full-weight momentum survives the move of b.

Deviations from the paper and the released code (LucasXinYu/AltLoRA, 94b2198), each held by a test:

- Both factors move in every update by default. The paper alternates; in every study here that
  compares the orders, moving both is ahead at equal updates.
- Of y° only the r×r matrix cross(y − y°, y) is kept: the state has 1× and 2× the bytes of the
  factors, where the released code needs 2× and 3×.
- AltLoRA+ corrects the bias of v, and its stored momentum has been transported.
- 1/s² is applied, schedules are honored, weight decay acts on the old value, bf16 works.
- The damping has a floor at rounding level, see `engine.damped_inverse`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from lowrank_optax import engine
from lowrank_optax._core.projection import projection_rule
from lowrank_optax.engine import adam_direction


class AltLoRAState(NamedTuple):
    """Moments of AltLoRA, float32 or better.

    Args:
        mu: momentum, a tree shaped like the parameters. It is transported when it is next used.
        drift: how each factor x last moved, `cross(x⁺ − x, x⁺)`, (..., r, r).
    """

    mu: Any
    drift: engine.Small


class AltLoRAPlusState(NamedTuple):
    """Moments of AltLoRA+, float32 or better.

    Args:
        mu: momentum, a tree shaped like the parameters. It is transported when it is next used.
        nu: second moment of the projected gradient, likewise shaped. It is not transported.
        drift: how each factor x last moved, `cross(x⁺ − x, x⁺)`, (..., r, r).
    """

    mu: Any
    nu: Any
    drift: engine.Small


def altlora(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    *,
    damping: Any = 1e-6,
    order: str = "simultaneous",
    switch_every: Any = 1,
    first: str = "b",
    scale: Any = 1.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by AltLoRA, and all other leaves by a fallback.

    $$x \leftarrow x - \eta\,(m_x / (1 - \beta_1^k) + \lambda x)$$

    with the momentum of the projected gradient, transported when the other factor moves.

    Args:
        learning_rate: $\eta$, positive, or a schedule; in units of SGD's, far from AdamW's.
        b1: decay of the momentum, in [0, 1).
        damping: $\delta$, added to the Gram matrices, positive.
        order: `"simultaneous"`, `"sequential"` (`a`, then `b` against the new `a`, as the released
            code) or `"alternating"` (one factor an update, as the paper).
        switch_every: updates until the other factor's turn, when alternating.
        first: the factor that begins, when alternating. With `b = 0` an `a`-step does nothing.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree. Under
            `optax.inject_hyperparams` wrap a callable by `scales_from`.
        weight_decay: $\lambda$, decoupled, applied to a factor when it moves.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW at the same rate by default, with a
            warning, for it is too high.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation, to be the last link of a chain. State: `AltLoRAState`.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, altlora
        >>> params = LoRAPair(a=jnp.eye(4, 2), b=jnp.zeros((2, 3)))
        >>> tx = altlora(0.1, scale=2.0)
        >>> updates, state = tx.update(params, tx.init(params), params)

    Source: arXiv 2505.12455, Algorithm 1.
    """
    engine.check_decay("b1", b1)

    def update_moments(state: AltLoRAState, projected: list[Any]) -> AltLoRAState:
        return state._replace(mu=optax.tree.update_moment(projected, state.mu, b1, 1))

    def direction(state: AltLoRAState, k: jax.Array) -> list[Any]:
        return optax.tree.bias_correction(state.mu, b1, k)

    return engine.lift(
        projection_rule(update_moments, direction, damping, order, switch_every, first),
        AltLoRAState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        scale=scale,
        fallback=fallback,
        adamw={"b1": b1},
        rate_suits_adamw=False,
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="altlora",
    )


def altlora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps: Any = 1e-8,
    damping: Any = 1e-6,
    order: str = "simultaneous",
    switch_every: Any = 1,
    first: str = "b",
    scale: Any = 1.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by AltLoRA+, and all other leaves by a fallback.

    $$x \leftarrow x - \eta\,\Big(\frac{m_x / (1 - \beta_1^k)}
      {\sqrt{v_x / (1 - \beta_2^k)} + \epsilon} + \lambda x\Big)$$

    AltLoRA with Adam's second moment of the projected gradient.

    Args:
        learning_rate: $\eta$, positive, or a schedule; of the order of AdamW's.
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: $\epsilon$, added to the root of the second moment, positive.
        damping: $\delta$, added to the Gram matrices, positive.
        order: `"simultaneous"`, `"sequential"` or `"alternating"`, as in `altlora`.
        switch_every: updates until the other factor's turn, when alternating.
        first: the factor that begins, when alternating.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree. Under
            `optax.inject_hyperparams` wrap a callable by `scales_from`.
        weight_decay: $\lambda$, decoupled, applied to a factor when it moves.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW with the same arguments by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation, to be the last link of a chain. State: `AltLoRAPlusState`.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import altlora_plus
        >>> params = {"q": {"lora_a": jnp.eye(4, 2), "lora_b": jnp.zeros((2, 3))}}
        >>> tx = altlora_plus(1e-2, scale=16 / 2)
        >>> updates, state = tx.update(params, tx.init(params), params)

    Source: arXiv 2505.12455, Algorithm 2.
    """
    engine.check_decay("b1", b1)
    engine.check_decay("b2", b2)
    engine.check_positive("eps", eps)

    def update_moments(state: AltLoRAPlusState, projected: list[Any]) -> AltLoRAPlusState:
        mu = optax.tree.update_moment(projected, state.mu, b1, 1)
        nu = optax.tree.update_moment(projected, state.nu, b2, 2)
        return state._replace(mu=mu, nu=nu)

    def direction(state: AltLoRAPlusState, k: jax.Array) -> list[Any]:
        return adam_direction(state.mu, state.nu, k, b1=b1, b2=b2, eps=eps)

    return engine.lift(
        projection_rule(update_moments, direction, damping, order, switch_every, first),
        AltLoRAPlusState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        scale=scale,
        fallback=fallback,
        adamw={"b1": b1, "b2": b2, "eps": eps},
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="altlora_plus",
    )
