"""The rule of AltLoRA and AltLoRA+: projected gradients, transported momentum, three orders.

The equations are in `lowrank_optax.methods.altlora`. The momentum of a factor is transported when
it is next used, with the Gram matrix that the projection needs anyway.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.arguments import check, check_choice, check_positive, check_whole
from lowrank_optax._core.linalg import (
    SIDES,
    Side,
    apply_rounded,
    cross,
    damped_inverse,
    gram,
    identity,
    mix,
    other,
    product,
)
from lowrank_optax._core.nodes import LoRAPair, both
from lowrank_optax._core.verbs import Pairs

ORDERS = ("simultaneous", "sequential", "alternating")


def projection_rule(
    update_moments: Callable[[Any, list[jax.Array]], Any],
    direction: Callable[[Any, jax.Array], list[jax.Array]],
    damping: Any,
    order: str,
    switch_every: Any,
    first: Any,
) -> Callable[..., Any]:
    """Makes the rule of a method that steps along moments of projected gradients.

    Args:
        update_moments: takes the method's state for one side, its fields lists of arrays, and the
            projected gradients of that side; returns the new state.
        direction: takes that state and k; returns the directions of the k-th move.
        damping: δ, positive.
        order: one of `ORDERS`.
        switch_every: updates until the other factor's turn, when alternating.
        first: the factor that begins, when alternating.

    Returns:
        The rule, for a state with `mu`, which is transported, and `drift`.

    Raises:
        ValueError: an argument out of range.

    Example:
        See `lowrank_optax.altlora`.
    """
    check_positive("damping", damping)
    _check_order(order, switch_every, first)
    is_one = isinstance(switch_every, int) and switch_every == 1  # or traced
    repeats = order == "alternating" and not is_one

    def invert_and_transport(gram_y: jax.Array, drift_y: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = damped_inverse(gram_y, damping)
        return inverse, product(gram_y - drift_y, inverse)  # cross(y°, y) = cross(y, y) − drift

    def rule(pairs: Pairs, grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        def opposite(y: Side, values: Any, drifts: Any) -> tuple[Any, Any]:
            return pairs.each(functools.partial(gram, y), values), drifts

        def move(x: Side, matrices: Any, k: jax.Array, moves: Any = True) -> tuple[Any, Any]:
            """Moves the factors x of all pairs if `moves`; otherwise they rest."""
            inverses, transports = matrices
            own = type(state)(*(_of(x, field) for field in state))

            def followed() -> Any:
                return own._replace(mu=pairs.each(functools.partial(mix, x), own.mu, transports))

            def moved() -> Any:
                project = lambda g, inverse, s: mix(x, g, inverse / s**2)
                projected = pairs.each(project, _of(x, grads), inverses, pairs.scales)
                new = update_moments(followed(), projected)
                return jax.tree.map(lambda n, o: n.astype(o.dtype), new, own)

            def stepped() -> Any:
                step = pairs.descend([_on(x, d) for d in direction(new, k)], params)
                return _of(x, step)

            # `moves` may be a traced value, so each factor's update is under a conditional. There
            # are three: XLA changes moments in place only if nothing else is decided with them.
            new = pairs.switch(moves, [followed if repeats else lambda: own, moved])
            updates = pairs.switch(moves, [lambda: _of(x, pairs.stay(params)), stepped])
            after, changes = pairs.each(apply_rounded, _of(x, params), updates)
            drift = lambda: pairs.each(functools.partial(cross, x), changes, after)
            return updates, new._replace(drift=pairs.switch(moves, [lambda: own.drift, drift]))

        def joined(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
            fields = zip(a[1], b[1], strict=True)
            new = type(state)(*(pairs.each(LoRAPair, *sides) for sides in fields))
            return pairs.each(LoRAPair, a[0], b[0]), new

        k = pairs.count + 1
        if order == "sequential":
            seen = opposite("b", _of("b", params), _of("b", state.drift))
            a = updates, new = move("a", pairs.together(invert_and_transport, *seen), k)
            new_params = pairs.moved(params, [LoRAPair(u, None) for u in updates])
            seen = opposite("a", _of("a", new_params), new.drift)
            return joined(a, move("b", pairs.together(invert_and_transport, *seen), k))

        moves: dict[Side, Any] = {"a": True, "b": True}
        if order == "alternating":
            k, begins, is_second = _turn(pairs.count, switch_every)
            moves = {first: ~is_second, other(first): is_second}
        if order == "alternating" and not repeats:
            # The factor that rests serves the one that moves, whichever it is.
            seen_by = lambda y: lambda: opposite(y, _of(y, params), _of(y, state.drift))
            seen = pairs.switch(moves["a"], [seen_by("a"), seen_by("b")])
            matrices = pairs.together(invert_and_transport, *seen)
            return joined(move("a", matrices, k, moves["a"]), move("b", matrices, k, moves["b"]))

        grams = pairs.each(lambda pair: both(gram, pair), params)
        inverses, transports = pairs.together(invert_and_transport, grams, state.drift)
        if repeats:  # a momentum follows the other factor only if that moved in the last update
            follow = lambda y, t: jnp.where(moves[y] == begins, identity(t), t)
            transports = pairs.each(lambda t: both(follow, t), transports)
        a = move("a", (_of("b", inverses), _of("b", transports)), k, moves["a"])
        b = move("b", (_of("a", inverses), _of("a", transports)), k, moves["b"])
        return joined(a, b)

    return rule


def _check_order(order: str, switch_every: Any, first: Any) -> None:
    check_choice("order", order, ORDERS)
    check_choice("first", first, SIDES)
    check_whole("switch_every", switch_every, least=1)
    if order != "alternating":
        unused = "applies to order='alternating' only; leave it at 1"
        check("switch_every", switch_every, lambda n: n == 1, unused)


def _turn(count: jax.Array, switch_every: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whose turn it is: how often that factor will have moved, if it begins, if it is second."""
    every = jnp.asarray(switch_every, count.dtype)
    round_, rest = jax.lax.div(count, 2 * every), jax.lax.rem(count, 2 * every)
    done = jax.lax.rem(rest, every)
    return round_ * every + done + 1, done == 0, rest >= every


def _of(side: Side, pairs: Sequence[Any]) -> list[jax.Array]:
    return [getattr(pair, side) for pair in pairs]


def _on(side: Side, x: jax.Array) -> LoRAPair:
    return LoRAPair(x, None) if side == "a" else LoRAPair(None, x)
