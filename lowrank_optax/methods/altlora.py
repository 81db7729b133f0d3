r"""AltLoRA and AltLoRA+: alternating projections of the full gradient (arXiv 2505.12455).

With x one factor of a pair and y the other, which has moved from y° since x's last step,
cross_y(p, q) the r×r product of two values of y, and mix(x, M) the product of x with M over the
rank axis (``lowrank_optax.linalg``), a step of x is::

    ĝ  = mix(∇x, P_y) / s²                P_y = (cross_y(y, y) + δ I)⁻¹
    m  ← mix(m, cross_y(y°, y) P_y)       transport: the momentum follows the move of y
    m  ← β1 m + (1 − β1) ĝ
    d  = m / (1 − β1ᵏ)                    AltLoRA
    d  = m / (1 − β1ᵏ) / (√(v / (1 − β2ᵏ)) + ε),  v ← β2 v + (1 − β2) ĝ²      AltLoRA+
    x⁺ = x − η (d + λ x)

s ĝ_a b is the orthogonal projection of the full gradient on the row space of b, and the transported
momentum is argmin_M ‖M b − m_a b°‖, so the low-rank full-weight momentum survives the move of b.

Deviations from the released code (LucasXinYu/AltLoRA, 94b2198), each held by a test:

- Of y° only the r×r matrix cross_y(y − y°, y) is kept: 1× and 2× the bytes of the factors where
  the released code needs 2× and 3×. ``scale_by_*`` cannot know the step that later links make of
  its output and does keep old factors.
- AltLoRA+ corrects the bias of v, and its stored momentum has been transported.
- 1/s² is applied, schedules are honoured, weight decay acts on the old value, bf16 works.
- The damping has a floor at rounding level, see ``linalg.damped_inverse``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import factors, projection
from lowrank_optax.arguments import check, check_decay, unpaired_mask


class AltLoRAState(NamedTuple):
    """Moments of AltLoRA, float32 or better.

    Args:
        mu: momentum, a tree shaped like the parameters. It is transported when it is next used.
        drift: how each factor last moved, ``cross(x⁺ − x, x⁺)``, (..., r, r), a list.
    """

    mu: Any
    drift: Any


class AltLoRAPlusState(NamedTuple):
    """Moments of AltLoRA+, float32 or better.

    Args:
        mu: momentum, a tree shaped like the parameters. It is transported when it is next used.
        nu: second moment of the projected gradient, likewise shaped; elementwise, not transported.
        drift: how each factor last moved, ``cross(x⁺ − x, x⁺)``, (..., r, r), a list.
    """

    mu: Any
    nu: Any
    drift: Any


class ScaleByAltLoRAState(NamedTuple):
    """State of :func:`scale_by_altlora`: AltLoRA's, and where the factors last moved from.

    Args:
        mu: momentum, transported when it is next used.
        previous: each factor before its last move, in its own dtype.
    """

    mu: Any
    previous: Any


class ScaleByAltLoRAPlusState(NamedTuple):
    """State of :func:`scale_by_altlora_plus`: AltLoRA+'s, and where the factors last moved from.

    Args:
        mu: momentum, transported when it is next used.
        nu: second moment of the projected gradient.
        previous: each factor before its last move, in its own dtype.
    """

    mu: Any
    nu: Any
    previous: Any


def altlora(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    damping: Any = 1e-6,
    *,
    order: str = "alternating",
    switch_every: Any = 1,
    first: str = "b",
    scale: Any = 1.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by AltLoRA, and all other leaves by a fallback.

    .. math:: x \leftarrow x - \eta\, (m_x / (1 - \beta_1^k) + \lambda x)

    with the momentum of the projected gradient, transported when the other factor moves. Steps are
    in units of the gradient, as in SGD: good learning rates are far from AdamW's.

    Args:
        learning_rate: η, positive, or a schedule of the update count.
        b1: decay of the momentum, in [0, 1). The default is the paper's and right where both
            factors move in every update; with ``order="alternating"`` 0 was better on both tasks of
            ``docs/results/defaults.md``.
        damping: δ, added to the Gram matrices, positive. The default leaves pairs of any scale
            alike; 1e-3 was better in the simultaneous order and worse in the alternating one on one
            of the two tasks, and no different on the other.
        order: ``"alternating"`` (one factor an update; the paper's, hence the default),
            ``"simultaneous"`` (both, each against the other's old value) or ``"sequential"``
            (``a``, then ``b`` against the new ``a``, the released code's). At equal updates the
            last two are ahead wherever they were compared, see ``docs/choosing.md``.
        switch_every: updates until the other factor's turn, when alternating.
        first: the factor that begins, when alternating. With the usual start ``b = 0`` an
            ``a``-step does nothing.
        scale: the forward scale s, as alpha / r: a number, a callable from a pair's path, or a tree
            of numbers (``factors.scales``).
        weight_decay: λ, decoupled, applied to a factor when it moves.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one.
        fallback: transformation of unpaired leaves; AdamW at the same learning rate by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation. It must be the last link of a chain, for it transports the momentum by
        the step it returns. As in AdamW, a gradient that is not finite spoils its own pair, and no
        other; ``optax.apply_if_finite`` skips such steps. State: one momentum per factor and r×r
        matrices, ``AltLoRAState``.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from lowrank_optax import LoRAPair, altlora
        >>> params = LoRAPair(a=jnp.eye(4, 2), b=jnp.zeros((2, 3)))
        >>> loss = lambda p: 0.5 * jnp.sum((2.0 * p.a @ p.b - 1.0) ** 2)
        >>> tx = altlora(0.1, scale=2.0)
        >>> def step(carry, _):
        ...     params, state = carry
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return (optax.apply_updates(params, updates), state), None
        >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
        >>> bool(loss(params) < 0.01)
        True

    Source: arXiv 2505.12455, Algorithm 1.
    """
    rest_mask = unpaired_mask(mask)
    default = optax.adamw(learning_rate, b1, weight_decay=weight_decay, mask=rest_mask)
    return projection.lift_projection(
        AltLoRAState,
        _Average(b1),
        projection.OwnSteps(learning_rate, weight_decay),
        damping=damping,
        schedule=projection.Schedule(order, switch_every, first),
        decay_mask=mask,
        fallback=fallback or default,
        scale=scale,
        specs=specs,
        name="altlora",
    )


def altlora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    damping: Any = 1e-6,
    *,
    order: str = "alternating",
    switch_every: Any = 1,
    first: str = "b",
    scale: Any = 1.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by AltLoRA+, and all other leaves by a fallback.

    AltLoRA with Adam's second moment of the projected gradient:

    .. math:: x \leftarrow x - \eta\, \Big(\frac{m_x / (1 - \beta_1^k)}
              {\sqrt{v_x / (1 - \beta_2^k)} + \epsilon} + \lambda x\Big)

    Args:
        learning_rate: η, positive, or a schedule of the update count; of the order of AdamW's.
        b1: decay of the momentum, in [0, 1). 0 was better on one of the two tasks of
            ``docs/results/defaults.md``, no different on the other, in both orders.
        b2: decay of the second moment, in [0, 1). Adam's; 0.99 made no difference.
        eps: ε, added to the root of the second moment.
        damping: δ, added to the Gram matrices, positive. The default leaves pairs of any scale
            alike; 1e-3 was better in the alternating order, no different in the simultaneous one.
        order: as in :func:`altlora`, and so are the arguments below.
        switch_every: updates until the other factor's turn, when alternating.
        first: the factor that begins, when alternating.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree.
        weight_decay: λ, decoupled, applied to a factor when it moves.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one.
        fallback: transformation of unpaired leaves; AdamW with the same arguments by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation; see :func:`altlora`. State: two moments per factor and r×r matrices,
        ``AltLoRAPlusState``, the bytes of Adam.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from lowrank_optax import altlora_plus
        >>> params = {"q": {"lora_a": jnp.eye(4, 2), "lora_b": jnp.zeros((2, 3))}}
        >>> tx = altlora_plus(optax.cosine_decay_schedule(1e-2, 100), scale=16 / 2)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> jax.tree.map(jnp.shape, updates)
        {'q': {'lora_a': (4, 2), 'lora_b': (2, 3)}}

    Source: arXiv 2505.12455, Algorithm 2.
    """
    rest_mask = unpaired_mask(mask)
    default = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=rest_mask)
    return projection.lift_projection(
        AltLoRAPlusState,
        _AdamAverage(b1, b2, eps),
        projection.OwnSteps(learning_rate, weight_decay),
        damping=damping,
        schedule=projection.Schedule(order, switch_every, first),
        decay_mask=mask,
        fallback=fallback or default,
        scale=scale,
        specs=specs,
        name="altlora_plus",
    )


def scale_by_altlora(
    b1: Any = 0.9,
    damping: Any = 1e-6,
    *,
    order: str = "alternating",
    switch_every: Any = 1,
    first: str = "b",
    scale: Any = 1.0,
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients of LoRA pairs by AltLoRA's direction; chainable, no learning rate.

    The same trajectory as :func:`altlora` when followed by ``optax.scale_by_learning_rate``. It
    sees the factors' moves only afterwards and keeps their last values: one P more of state.

    Args:
        b1: decay of the momentum, in [0, 1).
        damping: δ, added to the Gram matrices, positive.
        order: ``"alternating"`` or ``"simultaneous"``; ``"sequential"`` needs the step size inside
            and exists in :func:`altlora` only.
        switch_every: updates until the other factor's turn, when alternating.
        first: the factor that begins, when alternating.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree.
        fallback: transformation of unpaired leaves, ``optax.scale_by_adam`` by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation; the factor whose turn it is not gets a zero.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from lowrank_optax import LoRAPair, scale_by_altlora
        >>> tx = optax.chain(scale_by_altlora(), optax.scale_by_learning_rate(0.1))
        >>> params = LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3)))
        >>> grads = LoRAPair(jnp.zeros((4, 2)), jnp.ones((2, 3)))
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> jnp.allclose(updates.b, -0.1), jnp.allclose(updates.a, 0.0)
        (Array(True, dtype=bool), Array(True, dtype=bool))

    Source: arXiv 2505.12455, Algorithm 1.
    """
    return projection.lift_projection(
        ScaleByAltLoRAState,
        _Average(b1),
        projection.ForeignSteps(),
        damping=damping,
        schedule=projection.Schedule(order, switch_every, first),
        fallback=fallback or optax.scale_by_adam(b1=b1),
        scale=scale,
        specs=specs,
        name="scale_by_altlora",
    )


def scale_by_altlora_plus(
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    damping: Any = 1e-6,
    *,
    order: str = "alternating",
    switch_every: Any = 1,
    first: str = "b",
    scale: Any = 1.0,
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients of LoRA pairs by AltLoRA+'s direction; chainable, no learning rate.

    Args:
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: ε, added to the root of the second moment.
        damping: δ, added to the Gram matrices, positive.
        order: ``"alternating"`` or ``"simultaneous"``.
        switch_every: updates until the other factor's turn, when alternating.
        first: the factor that begins, when alternating.
        scale: the forward scale s: a number, a callable from a pair's path, or a tree.
        fallback: transformation of unpaired leaves, ``optax.scale_by_adam`` by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation; see :func:`scale_by_altlora`.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from lowrank_optax import LoRAPair, scale_by_altlora_plus
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), scale_by_altlora_plus(),
        ...                  optax.scale_by_learning_rate(1e-3))
        >>> params = LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3)))
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates.b.shape
        (2, 3)

    Source: arXiv 2505.12455, Algorithm 2.
    """
    return projection.lift_projection(
        ScaleByAltLoRAPlusState,
        _AdamAverage(b1, b2, eps),
        projection.ForeignSteps(),
        damping=damping,
        schedule=projection.Schedule(order, switch_every, first),
        fallback=fallback or optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        scale=scale,
        specs=specs,
        name="scale_by_altlora_plus",
    )


class _Average:
    """AltLoRA's moments: a bias-corrected moving average."""

    def __init__(self, b1: Any) -> None:
        check_decay("b1", b1)
        self.b1 = b1

    def take_in(self, moments: Any, g: jax.Array) -> Any:
        return moments._replace(mu=self.b1 * moments.mu + (1 - self.b1) * g)

    def direction(self, moments: Any, k: jax.Array) -> jax.Array:
        return moments.mu / _bias_correction(self.b1, k, moments.mu.dtype)


class _AdamAverage(_Average):
    """AltLoRA+'s moments: AltLoRA's average over the root of the second moment."""

    def __init__(self, b1: Any, b2: Any, eps: Any) -> None:
        super().__init__(b1)
        check_decay("b2", b2)
        check("eps", eps, lambda v: v >= 0, "must not be negative")
        self.b2, self.eps = b2, eps

    def take_in(self, moments: Any, g: jax.Array) -> Any:
        nu = self.b2 * moments.nu + (1 - self.b2) * g**2
        return super().take_in(moments, g)._replace(nu=nu)

    def direction(self, moments: Any, k: jax.Array) -> jax.Array:
        nu_hat = moments.nu / _bias_correction(self.b2, k, moments.nu.dtype)
        return super().direction(moments, k) / (jnp.sqrt(nu_hat) + self.eps)


def _bias_correction(decay: Any, k: jax.Array, dtype: Any) -> jax.Array:
    return 1 - jnp.asarray(decay, dtype) ** k.astype(dtype)
