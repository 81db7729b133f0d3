"""Projected gradients with momentum transport: the rule that AltLoRA-like methods share.

A step of one factor x against the other, y, which has moved from y° since x's last step, with x's
moments as the method has them::

    m   ← mix(m, cross_y(y°, y) P_y)       P_y = (cross_y(y, y) + δ I)⁻¹     transport
    ĝ   = mix(∇x, P_y) / s²
    d   = advance(m, ĝ)
    x⁺  = x − η (d + λ x)

The momentum is transported when it is next used, with the Gram matrix that the projection needs
anyway. How y° is remembered depends on who makes the step. :class:`OwnSteps` makes it here and
keeps ``cross_y(y − y°, y)``, an r×r matrix. :class:`ForeignSteps` leaves it to later links of a
chain and keeps y° itself.
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
    SIDES,
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
        check_choice("first", self.first, SIDES)
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

    @property
    def repeats(self) -> bool:
        """Whether a factor may move twice before the other does."""
        return not (isinstance(self.switch_every, int) and self.switch_every == 1)

    def begins_turn(self, count: jax.Array) -> jax.Array:
        """Whether the update after ``count`` updates is the first of its turn."""
        return count % self.switch_every == 0

    def moves_of_factor(self, count: jax.Array) -> jax.Array:
        """How often the factors that move now will have moved."""
        if self.order != "alternating":
            return count + 1
        rounds = count // (2 * self.switch_every)
        return rounds * self.switch_every + count % self.switch_every + 1


@dataclass(frozen=True)
class OwnSteps:
    """Steps made by the transformation: ``x⁺ = x − η (d + λ x)``; ``drift`` tells how x moved.

    Args:
        learning_rate: η, positive, or a schedule of the update count.
        weight_decay: λ, not negative.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> OwnSteps(0.1, 0.0).memory
        'drift'
    """

    learning_rate: optax.ScalarOrSchedule
    weight_decay: Any
    memory = "drift"
    small = ("drift",)

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check("weight_decay", self.weight_decay, lambda v: v >= 0, "must not be negative")

    def start(self, side: Side, x: jax.Array) -> jax.Array:
        """The memory of a factor that has not moved."""
        return jnp.zeros_like(gram(side, x))

    def old_cross(self, side: Side, drift: jax.Array, x: jax.Array, gram_x: jax.Array) -> jax.Array:
        """Computes ``cross(x°, x) = cross(x, x) − cross(x − x°, x)``."""
        return gram_x - drift

    def rest(self, drift: jax.Array, x: jax.Array) -> jax.Array:
        """The memory of a factor whose last move has been followed."""
        return drift

    def move(self, step: Step, side: Side, x: jax.Array, direction: jax.Array, like: Any) -> Any:
        """Moves a factor; returns its update, its new value and its memory."""
        rate = self.learning_rate
        eta = rate(step.count) if callable(rate) else rate
        if step.decay[side]:
            direction += self.weight_decay * x.astype(direction.dtype)
        update = (-eta * direction).astype(like.dtype)
        new, change = moved(x, update)
        return update, new, cross(side, change, new)


@dataclass(frozen=True)
class ForeignSteps:
    """Steps made by later links from the direction returned here; ``previous`` is the old factor.

    Example:
        >>> ForeignSteps().memory
        'previous'
    """

    memory = "previous"
    small = ()

    def start(self, side: Side, x: jax.Array) -> jax.Array:
        """The memory of a factor that has not moved."""
        return jnp.copy(x)

    def old_cross(self, side: Side, old: jax.Array, x: jax.Array, gram_x: jax.Array) -> jax.Array:
        """Computes ``cross(x°, x)``."""
        return cross(side, old, x)

    def rest(self, old: jax.Array, x: jax.Array) -> jax.Array:
        """The memory of a factor whose last move has been followed."""
        return x

    def move(self, step: Step, side: Side, x: jax.Array, direction: jax.Array, like: Any) -> Any:
        """Returns the direction, the value before the move, and the memory of it."""
        return direction, x, x


def lift_projection(
    state_type: Any,
    advance: Advance,
    steps: OwnSteps | ForeignSteps,
    *,
    damping: Any,
    schedule: Schedule,
    **engine: Any,
) -> optax.GradientTransformationExtraArgs:
    """Lifts a method that takes projected gradients into its moments.

    Args:
        state_type: NamedTuple of the method's moments, ``mu`` among them, which is transported;
            then the memory of ``steps``.
        advance: takes a projected gradient into one factor's moments.
        steps: who makes the step.
        damping: δ, positive.
        schedule: the order in which factors move.
        **engine: passed on to :func:`lowrank_optax.pairwise.lift`.

    Returns:
        The transformation.

    Raises:
        ValueError: an argument out of range, or a sequential order of foreign steps.

    Example:
        See ``lowrank_optax.methods.altlora``.
    """
    check_positive("damping", damping)
    if schedule.order == "sequential" and isinstance(steps, ForeignSteps):
        raise ValueError(
            "order='sequential' preconditions b by the new a and so needs the learning rate; use"
            " altlora(...) or altlora_plus(...), which have it, or another order."
        )

    def precondition(gram_y: jax.Array, old_cross: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = damped_inverse(gram_y, damping)
        return inverse, product(old_cross, inverse)

    def moving(stages: Sequence[Sequence[Side]]) -> Rule:
        def rule(step: Step, grads: LoRAPair, state: Any, pair: LoRAPair, scale: Any) -> RuleRun:
            k = schedule.moves_of_factor(step.count)
            x, g, moments = _sides(pair), _sides(grads), _by_side(state)
            memory = {side: getattr(moments[side], steps.memory) for side in SIDES}
            updates = {side: jnp.zeros_like(g[side]) for side in SIDES}
            for stage in stages:
                # A factor that moves again was the last to move itself: the other must follow it.
                seen = [other(side) for side in stage] + [*stage] * schedule.repeats
                grams = {y: gram(y, x[y]) for y in seen}
                replies = yield [
                    Batched(precondition, grams[y], steps.old_cross(y, memory[y], x[y], grams[y]))
                    for y in seen
                ]
                inverses: dict[Side, jax.Array] = {}
                for y, (inverses[y], transport) in zip(seen, replies, strict=True):
                    follower = moments[other(y)]
                    mu = mix(other(y), follower.mu, transport)
                    if schedule.repeats:
                        moved_last = schedule.begins_turn(step.count) != (y in stage)
                        mu = jnp.where(moved_last, mu, follower.mu)
                    moments[other(y)] = follower._replace(mu=mu)
                    memory[y] = steps.rest(memory[y], x[y])
                for side in stage:
                    projected = mix(side, g[side], inverses[other(side)] / scale**2)
                    moments[side], direction = advance(moments[side], projected, k)
                    updates[side], x[side], memory[side] = steps.move(
                        step, side, x[side], direction, g[side]
                    )
            moments = {s: m._replace(**{steps.memory: memory[s]}) for s, m in moments.items()}
            return LoRAPair(**updates), _join(moments)

        return rule

    def init(pair: LoRAPair) -> Any:
        memory = LoRAPair(*(steps.start(side, x) for side, x in _sides(pair).items()))
        names = [name for name in state_type._fields if name != steps.memory]
        return state_type(**{name: _zeros(pair) for name in names}, **{steps.memory: memory})

    rules = [moving(stages) for stages in schedule.turns]
    return pairwise.lift(rules, state_type, init, turn=schedule.turn, small=steps.small, **engine)


def _zeros(pair: LoRAPair) -> LoRAPair:
    return LoRAPair(*(jnp.zeros_like(x, dtype=compute_dtype(x)) for x in pair))


def _sides(pair: LoRAPair) -> dict[Side, jax.Array]:
    return {"a": pair.a, "b": pair.b}


def _by_side(state: Any) -> dict[Side, Any]:
    """Splits a state of pairs into a state for each factor."""
    return {side: type(state)(*(getattr(f, side) for f in state)) for side in SIDES}


def _join(moments: dict[Side, Any]) -> Any:
    """Undoes :func:`_by_side`."""
    fields = zip(moments["a"], moments["b"], strict=True)
    return type(moments["a"])(*(LoRAPair(a, b) for a, b in fields))
