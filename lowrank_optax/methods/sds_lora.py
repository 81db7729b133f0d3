r"""SDS-LoRA: gradients through orthonormal frames instead of the factors (arXiv 2606.16454).

LoRA's gradients ``s G bᵀ`` and ``s aᵀ G`` are stretched by the singular values of the other factor.
With frames E and F, orthonormal bases of the factors' spaces, the adapter
``ΔK = s (a F + E b)`` has the gradients ``s G Fᵀ`` and ``s Eᵀ G``, which are not. Any optimizer
moves the factors; the frames are moved by this schedule::

    warm-up   ordinary LoRA: the frames are the factors (b = 0 has no row space)
    switch    s a b = U Σ Vᵀ       E, F = U, Vᵀ      a, b = U Σ / 2s, Σ Vᵀ / 2s      moments restart
    refresh   E, F = Q of a, Q of bᵀ, their signs as before

after step t of T, with W steps of warm-up and P phases: refresh if ``t - W`` is a multiple of
``1 + (t - W - 1) P // (T - W)``, so more and more rarely.

A refresh changes ΔK, as in the paper: by how much the factors left the spaces of the old frames.

Beyond the paper: a start without warm-up (``frame(pair, key)``, ``warmup_steps=0``), and a refresh
that keeps ΔK. For the latter, with new frames E, F and D the ΔK/s before::

    a = (1 - E Eᵀ) D Fᵀ + ½ E (Eᵀ D Fᵀ)        b = Eᵀ D (1 - Fᵀ F) + ½ (Eᵀ D Fᵀ) F

which is exact, because E spans the old a and F the old b.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import factors, pairwise
from lowrank_optax.arguments import check, check_choice, check_integer, check_positive
from lowrank_optax.batching import Batched
from lowrank_optax.factors import FramedPair, LoRAPair
from lowrank_optax.frames import decompose, orthonormalize
from lowrank_optax.linalg import (
    Side,
    compute_dtype,
    cross,
    dots,
    gram,
    inverse_square_root,
    mix,
    moved,
    product,
)
from lowrank_optax.pairwise import PairwiseState, RuleRun, Step


class NoState(NamedTuple):
    """Neither frames nor the preconditioner keep anything beside the parameters."""


class SDSLoRAState(NamedTuple):
    """State of :func:`sds_lora`.

    Args:
        inner: state of the optimizer of the factors.
        frames: what the frames' schedule counts, and the state of the fallback.
        schedule: one entry whose name holds the schedule's numbers, so that neither a checkpoint
            nor an update can be used with others.
    """

    inner: optax.OptState
    frames: PairwiseState
    schedule: dict[str, jax.Array]


def sds_lora(
    inner: optax.GradientTransformation | optax.ScalarOrSchedule,
    *,
    total_steps: int,
    warmup_steps: int = 10,
    phases: int = 5,
    scale: Any = 1.0,
    refresh: Literal["frames", "preserving"] = "frames",
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes framed LoRA pairs by any optimizer, and moves their frames.

    .. math:: \Delta K = s\,(a\,F + E\,b) \qquad g_a = s\,G\,F^\top \qquad g_b = s\,E^\top G

    Args:
        inner: the optimizer of the factors, or a learning rate or schedule for ``optax.adamw``. It
            must not be one that works on pairs, such as ``altlora``.
        total_steps: T, the number of updates the run will make.
        warmup_steps: W, below T; 0 for pairs made by ``frame(pair, key)``.
        phases: P, at least 1. The default is the paper's; 1 made no difference on the task of
            ``docs/results/defaults.md``, and 20 was worse.
        scale: the forward scale s, in the paper alpha / sqrt(r): a number, a callable from a pair's
            path, or a tree of numbers (``factors.scales``). Only the switch reads it.
        refresh: ``"frames"`` changes ΔK as the paper's does; ``"preserving"`` rewrites the factors
            so that it stays.
        fallback: transformation of unpaired leaves; the inner one by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation, to be the last link of a chain. At the switch those parts of the inner
        state restart that hold moments; the counts of schedules go on. An inner optimizer that
        keeps a copy of the parameters, as ``optax.contrib.schedule_free``, does not suit: the
        switch rewrites the factors. State: the inner one's, for
        the factors only; the frames are one copy of the factors among the parameters.

    Raises:
        ValueError: an argument out of range; from ``init`` and ``update``, pairs that do not fit,
            without frames, or of the other start; from ``init``, an inner optimizer of pairs; from
            ``update``, the state of another schedule.
        TypeError: numbers of the schedule that are not integers; an inner state whose
            moments cannot be found.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from lowrank_optax import LoRAPair, frame, nn, sds_lora
        >>> params = frame(LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3))))
        >>> loss = lambda p: 0.5 * jnp.sum((nn.lora_apply(jnp.eye(4), p) - 1.0) ** 2)
        >>> tx = sds_lora(0.05, total_steps=100)
        >>> def step(carry, _):
        ...     params, state = carry
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return (optax.apply_updates(params, updates), state), None
        >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
        >>> bool(loss(params) < 0.01)
        True

    Source: arXiv 2606.16454.
    """
    schedule = {"warmup_steps": warmup_steps, "total_steps": total_steps, "phases": phases}
    for name, value in schedule.items():
        check_integer(name, value, least=1 if name == "phases" else 0)
    above = f"must be above warmup_steps = {warmup_steps}"
    check("total_steps", total_steps, lambda v: v > warmup_steps, above)
    check_choice("refresh", refresh, ("frames", "preserving"))
    key = ", ".join(f"{name}={value}" for name, value in schedule.items())
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        inner = optax.adamw(inner)
    inner = optax.with_extra_args_support(inner)

    def turn(count: jax.Array) -> jax.Array:
        main = count + 1 - warmup_steps
        phase = 1 + jnp.maximum(main - 1, 0) * phases // (total_steps - warmup_steps)
        is_refresh = main % jnp.minimum(phase, phases) == 0
        return jnp.select([main < 0, (main == 0) & (warmup_steps > 0), is_refresh], [0, 1, 2], 3)

    what = {
        "node": FramedPair,
        "lacks": _frames_for(warmup_steps),
        "specs": specs,
        "name": "sds_lora",
    }
    framing = pairwise.lift(
        [_follow, _switch, _refresh if refresh == "frames" else _preserving_refresh, _stay],
        NoState,
        lambda pair: NoState(),
        turn=turn,
        fallback=fallback or inner,
        scale=scale,
        **what,
    )

    def init(params: Any) -> SDSLoRAState:
        frames = framing.init(params)
        pairing = pairwise.find_nodes(params, **what)
        inner_state = inner.init(_factors_only(pairing, params))
        if pairing.pairs and _knows_pairs(inner_state):
            raise ValueError(
                "the inner optimizer of sds_lora works on LoRA pairs itself, but gradients through"
                " frames are not those of a pair; give one that does not, such as `optax.adamw`."
            )
        return SDSLoRAState(inner_state, frames, {key: jnp.zeros([], jnp.int32)})

    def update(
        updates: Any, state: SDSLoRAState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SDSLoRAState]:
        if params is None:
            raise ValueError("sds_lora needs the parameters: call `update(grads, state, params)`.")
        if set(state.schedule) != {key}:
            raise ValueError(
                f"this state belongs to a run with {', '.join(state.schedule)}, not {key}: a run"
                " is resumed with the numbers it was begun with."
            )
        pairing = pairwise.find_nodes(params, **what)
        factor_params = _factors_only(pairing, params)
        moves, inner_state = inner.update(
            _factors_only(pairing, updates), state.inner, factor_params, **extra_args
        )
        if warmup_steps:
            is_switch = state.frames.count + 1 == warmup_steps
            inner_state = _restart(
                inner.init(factor_params), inner_state, _layout(factor_params), is_switch
            )
        both = zip(pairing.take(updates), pairing.take(moves), strict=True)
        nodes = [grads._replace(a=move.a, b=move.b) for grads, move in both]
        updates = pairing.merge(pairing.put(nodes, updates), pairing.rest(updates))
        updates, frames = framing.update(updates, state.frames, params, **extra_args)
        return updates, SDSLoRAState(inner_state, frames, state.schedule)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_inverse_sqrt_gram(
    damping: Any = 1e-6,
    *,
    fallback: optax.GradientTransformation | None = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradients of ordinary LoRA pairs as if they flowed through frames.

    .. math:: \hat g_a = g_a\,(b\,b^\top)^{-1/2} \qquad \hat g_b = (a^\top a)^{-1/2}\,g_b

    ``(b bᵀ)^(-1/2) b`` is a frame of b, so these are SDS-LoRA's gradients without its
    parameterization: the step that they make is still multiplied by the other factor.

    Args:
        damping: added to the Gram matrices, positive.
        fallback: transformation of unpaired leaves; none by default.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation, without a learning rate; it is stateless.

    Raises:
        ValueError: damping out of range; from ``init`` and ``update``, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, scale_by_inverse_sqrt_gram
        >>> params = LoRAPair(jnp.eye(4, 2), 10.0 * jnp.eye(2, 3))
        >>> tx = scale_by_inverse_sqrt_gram()
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> f"{updates.a[0, 0]:.3f}"
        '0.100'

    Source: arXiv 2606.16454, the preconditioner it compares with.
    """
    check_positive("damping", damping)

    def root(matrix: jax.Array) -> jax.Array:
        return inverse_square_root(matrix, damping)

    def rule(step: Step, grads: LoRAPair, state: NoState, pair: LoRAPair, scale: Any) -> RuleRun:
        root_a, root_b = yield [Batched(root, gram("a", pair.a)), Batched(root, gram("b", pair.b))]
        return LoRAPair(mix("a", grads.a, root_b), mix("b", grads.b, root_a)), state

    return pairwise.lift(
        [rule],
        NoState,
        lambda pair: NoState(),
        fallback=fallback or optax.identity(),
        specs=specs,
        name="scale_by_inverse_sqrt_gram",
    )


# Rules of the frames. What they get as gradients is what the inner optimizer made of them: the
# updates of the factors.


def _follow(step: Step, grads: FramedPair, state: NoState, pair: FramedPair, scale: Any) -> RuleRun:
    """Warm-up: the frames are the factors."""
    yield []
    a, b = _moved_factors(pair, grads)
    return _moves(pair, grads, f_in=a, f_out=b), state


def _switch(step: Step, grads: FramedPair, state: NoState, pair: FramedPair, scale: Any) -> RuleRun:
    """The end of the warm-up: each side takes half of ΔK, in its singular vectors."""
    left, values, right = yield from decompose(_moved_factors(pair, grads), scale)
    half = values / (2 * scale)
    a, b = left * half[..., None, :], half[..., None] * right
    return _moves(pair, grads, a=a, b=b, f_in=left, f_out=right, warm=0.0), state


def _stay(step: Step, grads: FramedPair, state: NoState, pair: FramedPair, scale: Any) -> RuleRun:
    """The factors move, the frames stay."""
    yield []
    return _moves(pair, grads), state


def _refresh(
    step: Step, grads: FramedPair, state: NoState, pair: FramedPair, scale: Any
) -> RuleRun:
    """The frames become those of the factors, which stay what they are."""
    a, b = _moved_factors(pair, grads)
    f_in = yield from _new_frame("a", a, pair.f_in)
    f_out = yield from _new_frame("b", b, pair.f_out)
    return _moves(pair, grads, f_in=f_in, f_out=f_out), state


def _preserving_refresh(
    step: Step, grads: FramedPair, state: NoState, pair: FramedPair, scale: Any
) -> RuleRun:
    """The frames become those of the factors, and the factors such that ΔK stays."""
    a, b = _moved_factors(pair, grads)
    f_in = yield from _new_frame("a", a, pair.f_in)
    f_out = yield from _new_frame("b", b, pair.f_out)
    # D = a F₀ + E₀ b, with the old frames E₀, F₀, seen from the new ones E, F
    in_a, in_e = cross("a", f_in, a), cross("a", f_in, pair.f_in)  # Eᵀ a, Eᵀ E₀
    f_out_old, b_out = cross("b", pair.f_out, f_out), cross("b", b, f_out)  # F₀ Fᵀ, b Fᵀ
    core = product(in_a, f_out_old) + product(in_e, b_out)  # Eᵀ D Fᵀ
    columns = mix("a", a, f_out_old) + mix("a", pair.f_in, b_out)  # D Fᵀ
    transposed = lambda m: jnp.swapaxes(m, -1, -2)
    rows = mix("b", pair.f_out, transposed(in_a)) + mix("b", b, transposed(in_e))  # Eᵀ D
    new_a = columns - mix("a", f_in, core / 2)
    new_b = rows - mix("b", f_out, transposed(core) / 2)
    return _moves(pair, grads, a=new_a, b=new_b, f_in=f_in, f_out=f_out), state


def _moved_factors(pair: FramedPair, moves: FramedPair) -> LoRAPair:
    """The factors after the inner optimizer's step, in float32 or better."""
    wide = lambda x, move: moved(x, move)[0].astype(compute_dtype(x))
    return LoRAPair(wide(pair.a, moves.a), wide(pair.b, moves.b))


def _new_frame(side: Side, x: jax.Array, old: jax.Array) -> Any:
    """Yields the frame of a factor, signs as in the old one."""
    new = yield from orthonormalize(side, x)
    same_sign = dots(side, new, old) >= 0
    is_empty = dots(side, new, new) < 0.5  # of a component of zeros
    return jnp.where(is_empty, old, jnp.where(same_sign, new, -new))


def _moves(pair: FramedPair, moves: FramedPair, **values: Any) -> FramedPair:
    """The node's updates: those of the inner optimizer, but to the given values where given."""
    zeros = jax.tree.map(jnp.zeros_like, pair)
    changes = {
        name: value - getattr(pair, name)
        for name, value in values.items()
        if getattr(pair, name) is not None
    }
    return zeros._replace(**{"a": moves.a, "b": moves.b, **changes})


def _factors_only(pairing: factors.Pairing, tree: Any) -> Any:
    """The tree with ``MaskedNode`` in place of everything but the factors."""
    masked = {name: optax.MaskedNode() for name in FramedPair._fields if name not in ("a", "b")}
    nodes = [FramedPair(pair.a, pair.b, **masked) for pair in pairing.take(tree)]
    return pairing.put(nodes, tree)


def _knows_pairs(state: Any) -> bool:
    """Whether a state is, or holds, that of a method of this library."""
    is_lifted = lambda x: isinstance(x, PairwiseState)
    return any(is_lifted(x) for x in jax.tree.leaves(state, is_leaf=is_lifted))


def _layout(tree: Any) -> Any:
    """The structure of a tree, whatever is masked in it."""
    return jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def _restart(fresh: Any, state: Any, layout: Any, now: jax.Array) -> Any:
    """Restarts every part of a state that holds something shaped like the parameters."""
    if hasattr(state, "_fields"):
        if any(_layout(field) == layout for field in state):
            return jax.tree.map(lambda new, old: jnp.where(now, new, old), fresh, state)
        parts = (_restart(new, old, layout, now) for new, old in zip(fresh, state, strict=True))
        return type(state)(*parts)
    if isinstance(state, tuple | list):
        pairs = zip(fresh, state, strict=True)
        return type(state)(_restart(new, old, layout, now) for new, old in pairs)
    if isinstance(state, dict):
        return {name: _restart(fresh[name], old, layout, now) for name, old in state.items()}
    if not jax.tree_util.all_leaves([state]) and state is not None:
        raise TypeError(
            f"sds_lora restarts moments at the end of its warm-up and cannot find them in a"
            f" {type(state).__name__}; give it an inner optimizer whose states are NamedTuples."
        )
    return state


def _frames_for(warmup_steps: int) -> Any:
    """Says what a pair lacks for such a warm-up, with the remedy."""

    def lacks(pair: FramedPair) -> str:
        if (pair.warm is not None) == (warmup_steps > 0):
            return ""
        if warmup_steps > 0:
            return (
                f"with warmup_steps={warmup_steps} needs `lowrank_optax.frame(pair)`, but this pair"
                " starts without a warm-up; give warmup_steps=0."
            )
        return "with warmup_steps=0 needs `lowrank_optax.frame(pair, key)`: random frames."

    return lacks
