"""Projected gradients with momentum transport: the rule that AltLoRA-like methods share.

A step of one factor x against the other, y, with its moments as the method has them::

    ĝ   = mix(∇x, P_y) / s²                P_y = (cross_y(y, y) + δ I)⁻¹
    d   = advance(moments, ĝ)
    x⁺  = x − η (d + λ x)
    m_y ← mix(m_y, cross_x(x, x⁺) P_x⁺)    the other factor's momentum follows the move

``lift_owning_step`` knows η and transports when a factor moves; ``lift_following_step`` leaves the
step to later links of a chain and transports at the next update. Both share everything else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import pairwise
from lowrank_optax.arguments import check, check_choice, check_positive
from lowrank_optax.factors import LoRAPair
from lowrank_optax.linalg import (
    Side,
    compute_dtype,
    cross,
    damped_inverse,
    gram,
    mix,
    moved,
    other,
    product,
)
from lowrank_optax.pairwise import Batched, Rule, RuleRun, Step

_SIDES: tuple[Side, Side] = ("a", "b")

# How one factor's moments take in a projected gradient: (moments, ĝ, k) → (moments, direction).
Advance = Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]]


@dataclass(frozen=True)
class Schedule:
    """The order in which factors move.

    Args:
        order: ``"alternating"``, ``"simultaneous"`` or ``"sequential"``.
        switch_every: updates until the other factor's turn, when alternating.
        first: the factor that begins, when alternating.

    Raises:
        ValueError: an unknown order or factor, or a switch that is not a whole number from 1.

    Example:
        >>> Schedule("alternating", 1, "b").turns
        [(('b',),), (('a',),)]
    """

    order: str
    switch_every: Any
    first: Any

    def __post_init__(self) -> None:
        check_choice("order", self.order, ("alternating", "simultaneous", "sequential"))
        check_choice("first", self.first, _SIDES)
        is_count = lambda n: n >= 1 and n == int(n)
        check("switch_every", self.switch_every, is_count, "must be a whole number, 1 or more")
        if self.order != "alternating":
            unused = "applies to order='alternating' only; leave it at 1"
            check("switch_every", self.switch_every, lambda n: n == 1, unused)

    @property
    def turns(self) -> list[tuple[tuple[Side, ...], ...]]:
        """The stages of each kind of update; the factors of one stage move at once."""
        if self.order == "alternating":
            return [((self.first,),), ((other(self.first),),)]
        return [(("a", "b"),) if self.order == "simultaneous" else (("a",), ("b",))]

    def turn(self, count: jax.Array) -> jax.Array:
        """Which of the turns the update after ``count`` updates takes."""
        return (count // self.switch_every) % len(self.turns)

    def moves_of_factor(self, count: jax.Array) -> jax.Array:
        """How often the factors that move now will have moved."""
        if self.order != "alternating":
            return count + 1
        rounds = count // (2 * self.switch_every)
        return rounds * self.switch_every + count % self.switch_every + 1


def lift_owning_step(
    state_type: Any,
    advance: Advance,
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: Any,
    schedule: Schedule,
    weight_decay: Any,
    **engine: Any,
) -> optax.GradientTransformationExtraArgs:
    """Lifts the form that knows the final step and transports momentum when a factor moves.

    Args:
        state_type: NamedTuple of the method's moments; the first, ``mu``, is transported.
        advance: takes a projected gradient into one factor's moments.
        learning_rate: η, positive, or a schedule of the update count.
        damping: δ, positive.
        schedule: the order in which factors move.
        weight_decay: λ.
        **engine: passed on to :func:`lowrank_optax.pairwise.lift`.

    Returns:
        The transformation.

    Raises:
        ValueError: an argument out of range.

    Example:
        See ``lowrank_optax.methods.altlora``.
    """
    check_positive("learning_rate", learning_rate)
    check("weight_decay", weight_decay, lambda v: v >= 0, "must not be negative")
    invert, transport = _small_algebra(damping)

    def moving(stages: Sequence[Sequence[Side]]) -> Rule:
        def rule(step: Step, grads: LoRAPair, state: Any, pair: LoRAPair, scale: Any) -> RuleRun:
            eta = learning_rate(step.count) if callable(learning_rate) else learning_rate
            k = schedule.moves_of_factor(step.count)
            x, g, moments = _sides(pair), _sides(grads), _by_side(state)
            updates = {side: jnp.zeros_like(g[side]) for side in _SIDES}
            for stage in stages:
                inverses = yield [
                    Batched(invert, gram(other(side), x[other(side)])) for side in stage
                ]
                new = {}
                for side, inverse in zip(stage, inverses, strict=True):
                    projected = mix(side, g[side], inverse) / scale**2
                    moments[side], direction = advance(moments[side], projected, k)
                    if step.decay[side]:
                        direction += weight_decay * x[side].astype(direction.dtype)
                    updates[side] = (-eta * direction).astype(g[side].dtype)
                    new[side] = moved(x[side], updates[side])
                carries = yield [
                    Batched(transport, gram(side, value), cross(side, x[side], value))
                    for side, value in new.items()
                ]
                for side, carry in zip(stage, carries, strict=True):
                    follower = moments[other(side)]
                    mu = mix(other(side), follower.mu, carry)
                    moments[other(side)] = follower._replace(mu=mu)
                x |= new
            return LoRAPair(**updates), _join(moments)

        return rule

    def init(pair: LoRAPair) -> Any:
        return state_type(*(_zeros(pair) for _ in state_type._fields))

    rules = [moving(stages) for stages in schedule.turns]
    return pairwise.lift(rules, state_type, init, turn=schedule.turn, **engine)


def lift_following_step(
    state_type: Any, advance: Advance, *, damping: Any, schedule: Schedule, **engine: Any
) -> optax.GradientTransformationExtraArgs:
    """Lifts the form that learns afterwards how the factors moved and transports momentum then.

    Args:
        state_type: NamedTuple of the method's moments, with ``previous``, the old factors, last.
        advance: takes a projected gradient into one factor's moments.
        damping: δ, positive.
        schedule: the order in which factors move; not ``"sequential"``.
        **engine: passed on to :func:`lowrank_optax.pairwise.lift`.

    Returns:
        The transformation; it returns directions, without learning rate or sign.

    Raises:
        ValueError: an argument out of range.

    Example:
        See ``lowrank_optax.methods.altlora``.
    """
    if schedule.order == "sequential":
        raise ValueError(
            "order='sequential' preconditions b by the new a and so needs the learning rate; use"
            " altlora(...) or altlora_plus(...), which have it, or another order."
        )
    invert, transport = _small_algebra(damping)

    def moving(stage: Sequence[Side]) -> Rule:
        def rule(step: Step, grads: LoRAPair, state: Any, pair: LoRAPair, scale: Any) -> RuleRun:
            k = schedule.moves_of_factor(step.count)
            x, g, moments = _sides(pair), _sides(grads), _by_side(state)
            inverse_a, inverse_b, *carries = yield [
                *(Batched(invert, gram(side, x[side])) for side in _SIDES),
                *(
                    Batched(transport, gram(s, x[s]), cross(s, moments[s].previous, x[s]))
                    for s in _SIDES
                ),
            ]
            inverses = {"a": inverse_a, "b": inverse_b}
            last_turn = schedule.turn(step.count - 1)
            for side, carry in zip(_SIDES, carries, strict=True):
                just_moved = [side in stages[0] for stages in schedule.turns]
                follower = moments[other(side)]
                mu = jnp.where(
                    jnp.array(just_moved)[last_turn],
                    mix(other(side), follower.mu, carry),
                    follower.mu,
                )
                moments[other(side)] = follower._replace(mu=mu)
            updates = {side: jnp.zeros_like(g[side]) for side in _SIDES}
            for side in stage:
                projected = mix(side, g[side], inverses[other(side)]) / scale**2
                moments[side], updates[side] = advance(moments[side], projected, k)
            moments = {side: m._replace(previous=x[side]) for side, m in moments.items()}
            return LoRAPair(**updates), _join(moments)

        return rule

    def init(pair: LoRAPair) -> Any:
        moments = [_zeros(pair) for _ in state_type._fields[:-1]]
        return state_type(*moments, previous=jax.tree.map(jnp.copy, pair))

    rules = [moving(stages[0]) for stages in schedule.turns]
    return pairwise.lift(rules, state_type, init, turn=schedule.turn, **engine)


def _small_algebra(damping: Any) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Returns the preconditioner ``P = (G + δ I)⁻¹`` and the transport ``C P``."""
    check_positive("damping", damping)

    def invert(gram_matrix: jax.Array) -> jax.Array:
        return damped_inverse(gram_matrix, damping)

    def transport(gram_matrix: jax.Array, cross_matrix: jax.Array) -> jax.Array:
        return product(cross_matrix, invert(gram_matrix))

    return invert, transport


def _zeros(pair: LoRAPair) -> LoRAPair:
    return LoRAPair(*(jnp.zeros_like(x, dtype=compute_dtype(x)) for x in pair))


def _sides(pair: LoRAPair) -> dict[Side, jax.Array]:
    return {"a": pair.a, "b": pair.b}


def _by_side(state: Any) -> dict[Side, Any]:
    """Splits a state of pairs into a state for each factor."""
    return {side: type(state)(*(getattr(f, side) for f in state)) for side in _SIDES}


def _join(moments: dict[Side, Any]) -> Any:
    """Undoes :func:`_by_side`."""
    fields = zip(moments["a"], moments["b"], strict=True)
    return type(moments["a"])(*(LoRAPair(a, b) for a, b in fields))
