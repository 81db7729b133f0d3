r"""SDS-LoRA: gradients through orthonormal frames instead of the factors (arXiv 2606.16454).

LoRA's gradients `s G bᵀ` and `s aᵀ G` are stretched by the singular values of the other factor.
With frames E and F, orthonormal bases of the factors' spaces, the adapter `ΔK = s (a F + E b)` has
the gradients `s G Fᵀ` and `s Eᵀ G`, which are not. Any optimizer moves the factors. The frames
follow this schedule:

    warm-up   ordinary LoRA: the frames are the factors (b = 0 has no row space)
    switch    s a b = U Σ Vᵀ       E, F = U, Vᵀ      a, b = U Σ / 2s, Σ Vᵀ / 2s      moments restart
    refresh   E, F = Q of a, Q of bᵀ, their signs as before

With T steps in all, W of them warm-up, and P phases, a refresh follows step t if `t − W` is a
multiple of `1 + (t − W − 1) P // (T − W)`: ever more rarely. A refresh changes ΔK, as in the paper,
by how much the factors left the spaces of the old frames.

Beyond the paper: a start without warm-up (`frame(pair, key)`, `warmup_steps=0`), and a refresh that
keeps ΔK (`refresh="preserving"`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import engine
from lowrank_optax._core.arguments import STATIC_HINT, check, check_choice, check_integer
from lowrank_optax._core.frames import FramedPair
from lowrank_optax._core.reframing import (
    FOLLOW,
    RENEW,
    STAY,
    SWITCH,
    any_warm,
    move_frames,
)
from lowrank_optax._core.restart import factors_only, restart_moments
from lowrank_optax._core.states import not_own
from lowrank_optax._core.verbs import Verbs
from lowrank_optax.engine import LoRAPair


class SDSLoRAState(NamedTuple):
    """State of `sds_lora`.

    Args:
        inner: state of the optimizer of the factors.
        frames: what the frames' schedule counts, and the state of the fallback.
        schedule: one entry whose name holds the schedule's numbers, so that neither a checkpoint
            nor an update can be used with others.
    """

    inner: optax.OptState
    frames: engine.PairwiseState
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
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes framed LoRA pairs by any optimizer, and moves their frames.

    $$\Delta K = s\,(a\,F + E\,b) \qquad g_a = s\,G\,F^\top \qquad g_b = s\,E^\top G$$

    Args:
        inner: the optimizer of the factors, or a learning rate or schedule for `optax.adamw`. It
            must not be one that works on pairs, nor one that keeps a copy of the parameters.
        total_steps: T, the number of updates the run will make.
        warmup_steps: W, below T; 0 for pairs made by `frame(pair, key)`. A pair that is past its
            warm-up, as one of an earlier run, has its frames refreshed in these steps.
        phases: P, at least 1: how many phases of ever rarer refreshes.
        scale: the forward scale s, in the paper alpha / sqrt(r): a number, a callable from a pair's
            path, or a tree. Only the switch reads it.
        refresh: `"frames"` changes ΔK, as in the paper; `"preserving"` rewrites the factors so that
            it stays.
        fallback: transformation of unpaired leaves; the inner one by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation, to be the last link of a chain. At the switch the inner moments restart;
        the counts of schedules go on. State: `SDSLoRAState`.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit,
            without frames, or of the other start; from `init`, an inner optimizer of pairs; from
            `update`, the state of another schedule.
        TypeError: numbers of the schedule that are not integers; an inner state whose
            moments cannot be found.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, frame, nn, sds_lora
        >>> params = frame(LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3))))
        >>> loss = lambda p: jnp.sum((nn.lora_apply(jnp.eye(4), p) - 1.0) ** 2)
        >>> tx = sds_lora(0.05, total_steps=100)
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)

    Source: arXiv 2606.16454.
    """
    schedule = {"warmup_steps": warmup_steps, "total_steps": total_steps, "phases": phases}
    for name, value in schedule.items():
        least = 1 if name == "phases" else 0
        check_integer(name, value, least=least, hint=STATIC_HINT)
    above = f"must be above warmup_steps = {warmup_steps}"
    check("total_steps", total_steps, lambda v: v > warmup_steps, above)
    check_choice("refresh", refresh, ("frames", "preserving"))
    key = ", ".join(f"{name}={value}" for name, value in schedule.items())
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        engine.check_rate("inner", inner)
        inner = optax.adamw(inner)
    inner = optax.with_extra_args_support(inner)

    def turn(count: jax.Array, is_warm: jax.Array) -> jax.Array:
        main = count + 1 - warmup_steps
        phase = 1 + jnp.maximum(main - 1, 0) * phases // (total_steps - warmup_steps)
        is_refresh = (main <= 0) | (main % jnp.minimum(phase, phases) == 0)
        cases = [is_warm & (main < 0), is_warm, is_refresh]
        return jnp.select(cases, [FOLLOW, SWITCH, RENEW], STAY)

    what: dict[str, Any] = {
        "node": FramedPair,
        "why_unfit": _why_unfit(warmup_steps),
        "specs": specs,
        "name": "sds_lora",
    }
    rule = functools.partial(move_frames, turn, refresh == "preserving")
    framing = engine.lift(
        rule,
        engine.NoState,
        fallback=fallback or inner,
        scale=scale,
        allow_no_pairs=allow_no_pairs,
        **what,
    )

    def init(params: Any) -> SDSLoRAState:
        frames = framing.init(params)
        found = engine.find_nodes(params, **what)
        inner_state = inner.init(factors_only(found, params))
        if found.pairs and _is_lifted(inner_state):
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
        if not isinstance(state, SDSLoRAState):
            raise not_own(state, "sds_lora")
        if set(state.schedule) != {key}:
            raise ValueError(
                f"this state belongs to a run with {', '.join(state.schedule)}, not {key}: a run"
                " is resumed with the numbers it was begun with."
            )
        found = engine.find_nodes(params, **what)
        factors = factors_only(found, params)
        _require_same_shapes(state.inner, inner.init(factors))
        moves, inner_state = inner.update(
            factors_only(found, updates), state.inner, factors, **extra_args
        )
        if found.pairs:
            axes = engine.axes_of(found, params, extra_args.get("param_specs"))
            is_warm = any_warm(Verbs(axes), found.take(params))
            is_switch = turn(state.frames.count, is_warm) == SWITCH
            inner_state = restart_moments(inner.init(factors), inner_state, factors, is_switch)
        steps = zip(found.take(updates), found.take(moves, LoRAPair), strict=True)
        nodes = [grads._replace(a=move.a, b=move.b) for grads, move in steps]
        updates = found.merge(found.put(nodes, updates), found.rest(updates))
        updates, frames = framing.update(updates, state.frames, params, **extra_args)
        return updates, SDSLoRAState(inner_state, frames, state.schedule)

    return optax.GradientTransformationExtraArgs(init, update)


def _require_same_shapes(state: Any, fresh: Any) -> None:
    """Raises unless the inner state is that of factors of these shapes."""
    shapes = [jax.tree.map(jnp.shape, each) for each in (state, fresh)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "the inner state of sds_lora is for factors of other shapes: it belongs to adapters of"
            " another rank or model, or to another inner optimizer. Begin with `tx.init(params)`."
        )


def _is_lifted(state: Any) -> bool:
    """Whether a state is, or holds, that of a method of this library."""
    is_lifted = lambda x: isinstance(x, engine.PairwiseState)
    return any(is_lifted(x) for x in jax.tree.leaves(state, is_leaf=is_lifted))


def _why_unfit(warmup_steps: int) -> Callable[[FramedPair], str]:
    """Makes the check that a pair has the frames for such a warm-up."""

    def why(pair: FramedPair) -> str:
        is_known = isinstance(pair.warm, jax.Array) and not isinstance(pair.warm, jax.core.Tracer)
        if warmup_steps == 0 and is_known and jnp.any(pair.warm > 0.5):
            return (
                "with warmup_steps=0 needs `lowrank_optax.frame(pair, key)`, random frames; this"
                " pair begins with a warm-up."
            )
        if pair.warm is not None or warmup_steps == 0:
            return ""
        return (
            f"with warmup_steps={warmup_steps} needs `lowrank_optax.frame(pair)`, but this pair"
            " starts without a warm-up; give warmup_steps=0."
        )

    return why
