"""Shadow adapters: leaves beside a pair whose gradients are products of the full gradient.

What these products are, and why OPLoRA needs them, is in `krylov`; how a layer computes them in its
own backward pass, in `shadow_layer`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import krylov, seals
from lowrank_optax._core.arguments import (
    check,
    check_choice,
    check_decay,
    check_integer,
    check_positive,
)
from lowrank_optax._core.linalg import compute_dtype
from lowrank_optax._core.lorsum import Factor
from lowrank_optax._core.nodes import AxisName, LongAxes, LoRAPair, register_node
from lowrank_optax._core.notices import warn_if
from lowrank_optax._core.shadow_layer import apply_shadowed
from lowrank_optax._core.verbs import Pairs


@register_node
class ShadowedPair(NamedTuple):
    """A pair with the auxiliary leaves of OPLoRA, made by `shadow`.

    No gradient trains the auxiliary leaves. What a layer returns for them are products of the full
    gradient, and the optimizer moves them by ordinary updates.

    Args:
        a: the input-side factor, (..., in, r).
        b: the output-side factor, (..., r, out).
        m_a: input-side factor of the low-rank momentum, (..., in, q), or None.
        m_b: output-side factor of the low-rank momentum, (..., q, out), or None.
        krylov_a: zeros, (..., in, n R), or None; its gradient is n further products `G yᵀ` of
            R = r + q columns, with a metric R = r + 2q.
        krylov_b: zeros, (..., n R, out), or None; its gradient is n further products `xᵀ G`.
        checksum: zeros, (..., R, 3), where there is a momentum or a further product; its gradient
            tells whether they come from a single backward pass, as that made them.
        d_in: diagonal of the input-side metric, (..., in), or None.
        d_out: diagonal of the output-side metric, (..., out), or None.
        kfac: settings of the metric, (..., 3), if its statistics are K-FAC's, or None.
        shampoo: the same if they are Shampoo's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import shadow
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> node.m_a.shape, node.m_b.shape, node.krylov_b.shape
        ((6, 2), (2, 4), (4, 4))

    Source: OPLoRA, arXiv 2509.19977, whose released code keeps all activations instead.
    """

    a: Any
    b: Any
    m_a: Any = None
    m_b: Any = None
    krylov_a: Any = None
    krylov_b: Any = None
    checksum: Any = None
    d_in: Any = None
    d_out: Any = None
    kfac: Any = None
    shampoo: Any = None

    @staticmethod
    def long_axes() -> LongAxes:
        """Returns which axes of the shadows are sharded like the kernel's."""
        return {
            "m_a": ("in", -2),
            "m_b": ("out", -1),
            "krylov_a": ("in", -2),
            "krylov_b": ("out", -1),
            "d_in": ("in", -1),
            "d_out": ("out", -1),
        }

    @staticmethod
    def made_by() -> str:
        """Returns how to get this kind of pair."""
        return _made_by("")

    def apply(self, x: jax.Array, scale: Any, axis_name: AxisName = None) -> jax.Array:
        """Applies the factors; the backward pass returns the products of the full gradient."""
        return apply_shadowed(x, self, scale, axis_name)

    def plain(self) -> LoRAPair:
        """Returns the factors alone: the shadows do not change what the pair does."""
        return LoRAPair(self.a, self.b)


class Metric(NamedTuple):
    """A diagonal metric for `shadow`, with the numbers that are given to `scaled_oplora`.

    Args:
        kind: `"kfac"` for the statistics mean x² and N Σ dy² over N tokens, dy the gradient of a
            mean loss in the layer's output; `"shampoo"` for N times the squared row and column
            norms of the kernel's gradient, which cost as much as forming that gradient.
        b2: β₂ of the running averages, in [0, 1).
        damping: added to them, positive.
        power: exponent of the sum, positive.

    Example:
        >>> Metric(power=1.0)
        Metric(kind='kfac', b2=0.99, damping=0.001, power=1.0)

    Source: arXiv 2602.16456.
    """

    kind: Literal["kfac", "shampoo"] = "kfac"
    b2: float = 0.99
    damping: float = 1e-3
    power: float = 0.5


def shadow(
    pair: LoRAPair,
    key: jax.Array,
    *,
    iterations: int = 1,
    momentum_rank: int | None = None,
    metric: Metric | None = None,
) -> ShadowedPair:
    """Adds to a pair the leaves that OPLoRA moves and reads.

    Args:
        pair: the factors, (..., in, r) and (..., r, out).
        key: random key. `m_a` starts standard normal, `m_b` at zero.
        iterations: k, how many LoRSum iterations the optimizer will make; 0 for Jacobi steps.
        momentum_rank: q, rank of the momentum, r by default; 0 for none.
        metric: the metric of `scaled_oplora`; its running averages start at 1.

    Returns:
        The node, to stand in the parameter tree where the pair stood; momentum and metric in
        float32 or better.

    Raises:
        ValueError: a number out of range.
        TypeError: iterations or a rank that is not an integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4)))
        >>> node = shadow(pair, jax.random.key(0), iterations=2, momentum_rank=1)
        >>> node.krylov_a.shape, node.krylov_b.shape  # A₂, A₃ and B₂, B₃, B₄ of r + q = 3
        ((6, 6), (9, 4))

    Source: OPLoRA, arXiv 2509.19977, for the start of the momentum.
    """
    *batch, n_in, rank = pair.a.shape
    n_out = pair.b.shape[-1]
    q = rank if momentum_rank is None else momentum_rank
    check_integer("iterations", iterations, least=0)
    check_integer("momentum_rank", q, least=0)
    fits = f"must lie between 0 and min(in, out) = {min(n_in, n_out)}"
    check("momentum_rank", q, lambda q: q <= min(n_in, n_out), fits)
    dtype = compute_dtype(pair.a, pair.b)
    node = ShadowedPair(pair.a, pair.b)
    if q:
        m_a = jax.random.normal(key, (*batch, n_in, q), dtype)
        node = node._replace(m_a=m_a, m_b=jnp.zeros((*batch, q, n_out), dtype))
    if metric is not None:
        check_choice("metric.kind", metric.kind, ("kfac", "shampoo"))
        check_decay("metric.b2", metric.b2)
        check_positive("metric.damping", metric.damping)
        check_positive("metric.power", metric.power)
        settings = jnp.broadcast_to(jnp.array(metric[1:], dtype), (*batch, 3))
        d_in, d_out = jnp.ones((*batch, n_in), dtype), jnp.ones((*batch, n_out), dtype)
        node = node._replace(d_in=d_in, d_out=d_out, **{metric.kind: settings})
    width, degrees = krylov.width(node), krylov.degrees(node, iterations)
    if degrees["a"]:
        krylov_a = jnp.zeros((*batch, n_in, width * len(degrees["a"])), dtype)
        node = node._replace(krylov_a=krylov_a)
    if degrees["b"]:
        krylov_b = jnp.zeros((*batch, width * len(degrees["b"]), n_out), dtype)
        node = node._replace(krylov_b=krylov_b)
    if q or degrees["b"]:
        node = node._replace(checksum=jnp.zeros((*batch, width, 3), dtype))
    return node


def why_unfit(
    iterations: int, with_momentum: bool, with_metric: bool = False
) -> Callable[[ShadowedPair], str]:
    """Makes the check that a pair has the shadows that so many iterations need.

    Args:
        iterations: k of LoRSum.
        with_momentum: whether the method has a low-rank momentum.
        with_metric: whether it steps in a metric.

    Returns:
        A function of a pair: what is missing, with the remedy; empty if nothing is.

    Example:
        >>> import jax.numpy as jnp
        >>> why_unfit(0, with_momentum=False)(ShadowedPair(jnp.ones((6, 2)), jnp.ones((2, 4))))
        ''
    """
    settings = f"iterations={iterations}" + ("" if with_momentum else ", momentum_rank=0")
    settings += ", metric=Metric()" if with_metric else ""

    def why(pair: ShadowedPair) -> str:
        if pair.checksum is not None and jnp.finfo(pair.checksum.dtype).bits < 32:
            return (
                f"finds shadows in {pair.checksum.dtype}, in which products cannot be told from"
                " sums: cast the factors alone, and keep their shadows in float32."
            )
        enough = krylov.iterations_of(pair) >= iterations
        has_all = enough and (pair.m_a is not None or not with_momentum)
        if has_all and krylov.has_metric(pair) == with_metric:
            return ""
        spare = krylov.has_metric(pair) and not with_metric
        return f"needs a pair with shadows: {_made_by(settings)}." + (
            " It has a metric, which is for `scaled_oplora`." if spare else ""
        )

    return why


_STANDS_STILL = (
    "OPLoRA moved no pair in this update. Either the products in the gradients are not as a"
    " backward pass made them. Likely causes: `optax.clip_by_global_norm` (use"
    " `lowrank_optax.clip_by_global_norm`), a scaled loss (use `lowrank_optax.scale_gradients`),"
    " gradients accumulated over micro-batches or examples (use iterations=0), weight decay, an L2"
    " term or noise on all leaves (leave the shadows out), an adapter used twice. Or the momentum"
    " among the parameters is not as the last update left it: a link after oplora, an average of"
    " parameters (`optax.lookahead`, schedule-free), `optax.apply_every`, or other parameters"
    " (begin with `tx.init(params)`). `lowrank_optax.skipped(state)` counts the pairs."
)


def _made_by(settings: str) -> str:
    return (
        f"give the pair `nn.LoRAConfig(..., extra=nn.Shadows({settings}))` in `nn.add_lora` or the"
        f" Linen modules, in a plain tree `lowrank_optax.shadow(pair, key, {settings})` applied by"
        " `nn.lora_apply`"
    ).replace("key, )", "key)")


def trusted(
    pairs: Pairs,
    params: Sequence[ShadowedPair],
    grads: Sequence[ShadowedPair],
    iterations: int,
    sealed: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Checks which pairs have their leaves and products as updates and a backward pass made them.

    Args:
        pairs: the verbs. The pairs that fail are counted.
        params: the parameters.
        grads: the gradients.
        iterations: k of LoRSum; 0 uses products of degree 1 only, which may be sums.
        sealed: the seals of the auxiliary leaves, of a method that moves some.

    Returns:
        For each pair, (..., 1, 1): 1 or 0.

    Example:
        See `lowrank_optax.oplora`.
    """
    if all(pair.checksum is None for pair in params):  # nothing to compare, and so no callback
        return pairs.each(lambda grad: jnp.ones([*grad.a.shape[:-2], 1, 1]), grads)
    before = pairs.failures
    compare = functools.partial(krylov.deviations, single_pass=iterations > 0)
    found = pairs.each(compare, params, grads)
    if sealed is not None:
        broken = functools.partial(seals.is_broken, is_first=pairs.count == 0)
        found = pairs.each(krylov.marked, found, pairs.each(broken, params, sealed))
    trust = pairs.together(krylov.is_untouched, found)
    moved = [jnp.any(t > 0) for t in trust]  # of a stack, some entries may fail
    warn_if((pairs.failures > before) & ~jnp.any(jnp.stack(moved)), _STANDS_STILL)
    return trust


def updates_to(
    pair: ShadowedPair,
    trust: jax.Array,
    a: Factor,
    b: Factor,
    m_a: Factor | None = None,
    m_b: Factor | None = None,
    **values: jax.Array,
) -> ShadowedPair:
    """Makes the updates of a node that take its leaves to new values.

    Args:
        pair: the parameters.
        trust: (..., 1, 1), 1, or 0 to leave everything as it is.
        a: the new input-side factor.
        b: the new output-side factor.
        m_a: the new input-side factor of the momentum, if it has one.
        m_b: the new output-side factor of the momentum.
        values: other leaves that move, by name.

    Returns:
        The updates; those of other leaves are zero.

    Example:
        >>> import jax.numpy as jnp
        >>> pair = ShadowedPair(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> new = Factor(jnp.zeros((6, 2)), []), Factor(jnp.zeros((2, 4)), [])
        >>> updates_to(pair, jnp.zeros((1, 1)), *new).a.sum().item()
        0.0
    """
    factors = {"a": a, "b": b, "m_a": m_a, "m_b": m_b}
    values |= {name: factor.value for name, factor in factors.items() if factor is not None}

    def update(name: str, new: jax.Array) -> jax.Array:
        old = getattr(pair, name)
        believed = trust.reshape(*trust.shape[:-2], *[1] * (old.ndim - trust.ndim + 2))
        return jnp.where(believed > 0, new - old, 0)

    zeros = jax.tree.map(jnp.zeros_like, pair)
    return zeros._replace(**{name: update(name, new) for name, new in values.items()})
