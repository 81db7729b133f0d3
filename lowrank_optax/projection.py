"""Projected gradients with momentum transport: the rule that AltLoRA-like methods share.

A step of one factor x against the other, y, which has moved from y° since x's last step, with x's
moments as the method has them::

    m   ← mix(m, cross_y(y°, y) P_y)       P_y = (cross_y(y, y) + δ I)⁻¹     transport
    ĝ   = mix(∇x, P_y) / s²
    m   ← take_in(m, ĝ)
    d   = direction(m)
    x⁺  = x − η (d + λ x)

The momentum is transported when it is next used, with the Gram matrix that the projection needs
anyway. How y° is remembered depends on who makes the step. :class:`OwnSteps` makes it here and
keeps ``cross_y(y − y°, y)``, an r×r matrix. :class:`ForeignSteps` leaves it to later links of a
chain and keeps y° itself.

Which factor moves when they alternate only the running program knows. So what one factor alone
needs is asked for as one of two things (``batching.Either``).
"""

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import pairwise
from lowrank_optax.arguments import check, check_choice, check_positive, is_zero
from lowrank_optax.batching import Batched, Either, Request
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
from lowrank_optax.pairwise import RuleRun, Step

Movers = Mapping[Side, jax.Array | None]
"""The factors of a stage: with None, one that moves; with a flag, one that moves if it is set."""

_Asking = Generator[Sequence[Request], list[Any], Any]


class Moments(Protocol):
    """What a method does with one factor's moments, a NamedTuple with ``mu`` in it."""

    def take_in(self, moments: Any, g: jax.Array) -> Any:
        """Returns the moments after a projected gradient."""
        ...

    def direction(self, moments: Any, k: jax.Array) -> jax.Array:
        """Returns the direction of the factor's k-th move."""
        ...


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
        >>> import jax.numpy as jnp
        >>> Schedule("sequential", 1, "b").turn(jnp.array(0)).stages
        [{'a': None}, {'b': None}]
    """

    order: str
    switch_every: Any
    first: Any

    def __post_init__(self) -> None:
        check_choice("order", self.order, ("alternating", "simultaneous", "sequential"))
        check_choice("first", self.first, SIDES)
        is_count = lambda n: n >= 1 and n == int(n)
        check("switch_every", self.switch_every, is_count, "must be a whole number, 1 or more")
        if not self.alternates:
            unused = "applies to order='alternating' only; leave it at 1"
            check("switch_every", self.switch_every, lambda n: n == 1, unused)

    @property
    def alternates(self) -> bool:
        """Whether one factor moves an update."""
        return self.order == "alternating"

    @property
    def repeats(self) -> bool:
        """Whether a factor may move twice before the other does."""
        return not (isinstance(self.switch_every, int) and self.switch_every == 1)

    def turn(self, count: jax.Array) -> "Turn":
        """Says who moves in the update after ``count`` updates."""
        if not self.alternates:
            together: Movers = {"a": None, "b": None}
            in_turn: list[Movers] = [{"a": None}, {"b": None}]
            stages = [together] if self.order == "simultaneous" else in_turn
            return Turn(stages, count + 1, jnp.array(True))
        every = jnp.asarray(self.switch_every, count.dtype)
        round_, rest = jax.lax.div(count, 2 * every), jax.lax.rem(count, 2 * every)
        is_first, done = rest < every, jax.lax.rem(rest, every)
        movers: Movers = {self.first: is_first, other(self.first): ~is_first}
        return Turn([movers], round_ * every + done + 1, done == 0)


class Turn(NamedTuple):
    """Who moves in an update.

    Args:
        stages: the factors of one stage move at once, one stage after the other.
        number: how often the factors that move will have moved.
        begins: whether it is the first update of the turn.
    """

    stages: list[Movers]
    number: jax.Array
    begins: jax.Array


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

    def update(self, step: Step, side: Side, x: jax.Array, direction: jax.Array) -> jax.Array:
        """Makes the update of a factor that moves."""
        rate = self.learning_rate
        eta = rate(step.count) if callable(rate) else rate
        if step.decay[side] and not is_zero(self.weight_decay):
            direction += self.weight_decay * x.astype(direction.dtype)
        return -eta * direction

    def remember(self, side: Side, x: jax.Array, update: jax.Array) -> Callable[[], jax.Array]:
        """Tells how a factor moved, when asked; its new value is made here, where it is stored."""
        new, change = moved(x, update)
        return lambda: cross(side, change, new)


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

    def update(self, step: Step, side: Side, x: jax.Array, direction: jax.Array) -> jax.Array:
        """Returns the direction, of which later links make an update."""
        return direction

    def remember(self, side: Side, x: jax.Array, update: jax.Array) -> Callable[[], jax.Array]:
        """Tells from where a factor moved, when asked."""
        return lambda: x


def lift_projection(
    state_type: Any,
    moments: Moments,
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
        moments: what the method does with one factor's moments.
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

    def rule(step: Step, grads: LoRAPair, state: Any, pair: LoRAPair, scale: Any) -> RuleRun:
        turn: Turn = step.turn
        x, g, memory = (_sides(node) for node in (pair, grads, getattr(state, steps.memory)))
        m = _by_side(state._replace(**{steps.memory: LoRAPair(None, None)}))
        updates: dict[Side, jax.Array] = {}

        def look_at(y: Side) -> tuple[jax.Array, jax.Array]:
            gram_y = gram(y, x[y])
            return gram_y, steps.old_cross(y, memory[y], x[y], gram_y)

        def preconditioners(movers: Movers, factor: Callable[[Side], Side]) -> _Asking:
            """Asks for inverse and transport of one factor a mover; alternating, only one moves."""
            looks = {side: functools.partial(look_at, factor(side)) for side in movers}
            if schedule.alternates:
                seen = [(yield from _decide(movers[schedule.first], *looks.values()))]
            else:
                seen = [look() for look in looks.values()]
            replies = yield [Batched(precondition, *matrices) for matrices in seen]
            return dict(zip(movers, replies * (len(movers) // len(seen)), strict=True))

        def follow(side: Side, transport: jax.Array, partner_moved_last: jax.Array) -> Any:
            mu = mix(side, m[side].mu, transport)
            if schedule.repeats:
                mu = jnp.where(partner_moved_last, mu, m[side].mu)
            return m[side]._replace(mu=mu)

        def move(side: Side, inverse: jax.Array, transport: jax.Array) -> Any:
            projected = mix(side, g[side], inverse / scale**2)
            after = moments.take_in(follow(side, transport, turn.begins), projected)
            return jax.tree.map(lambda new, old: new.astype(old.dtype), after, m[side])

        def update_of(side: Side, after: Any) -> jax.Array:
            direction = moments.direction(after, turn.number)
            return steps.update(step, side, x[side], direction).astype(g[side].dtype)

        for movers in turn.stages:
            partners = yield from preconditioners(movers, other)
            rest = {side: functools.partial(m.__getitem__, side) for side in movers}
            if schedule.repeats:  # a mover that moved last is to be followed by the one that rests
                own = yield from preconditioners(movers, lambda side: side)
                rest = {s: functools.partial(follow, s, own[s][1], ~turn.begins) for s in movers}
            for side, moves in movers.items():
                m[side] = yield from _decide(
                    moves, functools.partial(move, side, *partners[side]), rest[side]
                )
                updates[side] = yield from _decide(
                    moves,
                    functools.partial(update_of, side, m[side]),
                    functools.partial(jnp.zeros_like, g[side]),
                )
                memory[side] = yield from _decide(
                    moves,
                    steps.remember(side, x[side], updates[side]),
                    functools.partial(memory.__getitem__, side),
                )
                x[side], _ = moved(x[side], updates[side])
        return LoRAPair(**updates), _join(m)._replace(**{steps.memory: LoRAPair(**memory)})

    def init(pair: LoRAPair) -> Any:
        memory = LoRAPair(*(steps.start(side, x) for side, x in _sides(pair).items()))
        names = [name for name in state_type._fields if name != steps.memory]
        return state_type(**{name: _zeros(pair) for name in names}, **{steps.memory: memory})

    return pairwise.lift([rule], state_type, init, turn=schedule.turn, small=steps.small, **engine)


def _decide(
    flag: jax.Array | None, then: Callable[[], Any], otherwise: Callable[[], Any]
) -> _Asking:
    """Yields for one of two things; without a flag, it is the first."""
    if flag is None:
        return then()
    [reply] = yield [Either(flag, then, otherwise)]
    return reply


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
