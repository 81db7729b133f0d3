"""The rule that AltLoRA and AltLoRA+ share: projected gradients, transported momentum, three orders.

The equations are in `lowrank_optax.methods.altlora`. The momentum of a factor is transported when
it is next used, with the Gram matrix that the projection needs anyway.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.arguments import check, check_choice, check_positive
from lowrank_optax._core.linalg import (
    SIDES,
    Side,
    apply_rounded,
    cross,
    damped_inverse,
    gram,
    mix,
    other,
    product,
)
from lowrank_optax._core.nodes import LoRAPair, both, swap
from lowrank_optax._core.verbs import Pairs

ORDERS = ("simultaneous", "sequential", "alternating")


def projection_rule(
    update_moments: Callable[[Any, list[LoRAPair]], Any],
    direction: Callable[[Any, jax.Array], list[LoRAPair]],
    damping: Any,
    order: str,
    switch_every: Any,
    first: str,
) -> Callable[..., Any]:
    """Makes the rule of a method that steps along moments of projected gradients.

    Args:
        update_moments: the method's state after the projected gradients, from both. Here and below
            pairs hold the factors that move, None for one that rests.
        direction: the direction of the k-th move of the factors, from state and k.
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
    check_choice("order", order, ORDERS)
    check_choice("first", first, SIDES)
    is_count = lambda n: n >= 1 and n == int(n)
    check("switch_every", switch_every, is_count, "must be a whole number, 1 or more")
    if order != "alternating":
        unused = "applies to order='alternating' only; leave it at 1"
        check("switch_every", switch_every, lambda n: n == 1, unused)
    repeats = not (isinstance(switch_every, int) and switch_every == 1)

    def invert_and_transport(gram_y: jax.Array, drift_y: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = damped_inverse(gram_y, damping)
        return inverse, product(gram_y - drift_y, inverse)  # cross(y°, y) = cross(y, y) − drift

    def rule(pairs: Pairs, grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        def opposite(sides: Sequence[Side], x: Any, state: Any) -> tuple[Any, Any]:
            """Gram matrix and drift of the factors across from these sides."""
            across = [other(side) for side in sides]
            grams = pairs.each(lambda y: swap(both(gram, _only(across, y))), x)
            return grams, pairs.each(lambda drift: swap(_only(across, drift)), state.drift)

        def move(
            sides: Sequence[Side],
            matrices: Any,
            x: Any,
            state: Any,
            k: jax.Array,
            moves: Any = True,
        ) -> tuple[Any, Any]:
            """Moves the factors on these sides if `moves`, which may be traced; else they rest."""
            inverses, transports = matrices
            own = type(state)(*([_only(sides, pair) for pair in field] for field in state))

            def followed() -> Any:
                return own._replace(mu=pairs.each(lambda m, t: both(mix, m, t), own.mu, transports))

            def moved() -> Any:
                project = lambda s: lambda side, g, inverse: mix(side, g, inverse / s**2)
                of_pair = lambda g, inverse, s: both(project(s), _only(sides, g), inverse)
                projected = pairs.each(of_pair, grads, inverses, pairs.scales)
                return _cast(update_moments(followed(), projected), own)

            def zeros() -> Any:
                return [_only(sides, jax.tree.map(jnp.zeros_like, g)) for g in grads]

            # Three conditionals: XLA changes a moment in place if nothing else is decided with it.
            new = pairs.switch(moves, [followed if repeats else lambda: own, moved])
            updates = pairs.switch(moves, [zeros, lambda: pairs.descend(direction(new, k), x)])
            after = pairs.each(lambda u, x: both(_apply, u, x), updates, x)
            drift = lambda: pairs.each(lambda pair: both(_drift, pair), after)
            return updates, new._replace(drift=pairs.switch(moves, [lambda: own.drift, drift]))

        k = pairs.count + 1
        if order == "simultaneous":
            matrices = pairs.together(invert_and_transport, *opposite(SIDES, params, state))
            return move(SIDES, matrices, params, state, k)

        if order == "sequential":
            matrices = pairs.together(invert_and_transport, *opposite("a", params, state))
            updates_a, state_a = move("a", matrices, params, state, k)
            x = pairs.each(lambda u, p: p._replace(a=apply_rounded(p.a, u.a)[0]), updates_a, params)
            state = _merge(state_a, state)
            matrices = pairs.together(invert_and_transport, *opposite("b", x, state))
            updates_b, state_b = move("b", matrices, x, state, k)
            return _merge(updates_a, updates_b), _merge(state_b, state)

        every = jnp.asarray(switch_every, k.dtype)
        round_, rest = jax.lax.div(pairs.count, 2 * every), jax.lax.rem(pairs.count, 2 * every)
        done = jax.lax.rem(rest, every)
        k, begins = round_ * every + done + 1, done == 0
        moves = {first: rest < every, other(first): rest >= every}
        if repeats:
            inverses, transports = pairs.together(
                invert_and_transport, *opposite(SIDES, params, state)
            )
            # A momentum follows the factor across from it only if that moved in the last update.
            follow = lambda side, t: jnp.where(moves[side] == begins, t, jnp.eye(t.shape[-1]))
            transports = pairs.each(lambda t: both(follow, t), transports)
        else:  # the factor that rests serves the one that moves, whichever it is
            inverses, transports = pairs.together(
                invert_and_transport,
                *pairs.switch(
                    moves["a"],
                    [
                        lambda side=side: _on_any_side(opposite(side, params, state))
                        for side in "ba"
                    ],
                ),
            )
        of_a = move("a", (_on("a", inverses), _on("a", transports)), params, state, k, moves["a"])
        of_b = move("b", (_on("b", inverses), _on("b", transports)), params, state, k, moves["b"])
        return _merge(of_a, of_b)

    return rule


def _only(sides: Sequence[Side], pair: Any) -> LoRAPair:
    """The pair with None on the other sides."""
    return LoRAPair(*(getattr(pair, side) if side in sides else None for side in SIDES))


def _is_pair(x: Any) -> bool:
    return isinstance(x, LoRAPair)


def _merge(new: Any, old: Any) -> Any:
    """Trees of new pairs, with the old values where they have None."""
    one = lambda n, o: LoRAPair(*(y if x is None else x for x, y in zip(n, o, strict=True)))
    return jax.tree.map(one, new, old, is_leaf=_is_pair)


def _on_any_side(matrices: Any) -> Any:
    """Trees of matrices in place of pairs that have one side."""
    return jax.tree.map(
        lambda pair: pair.b if pair.a is None else pair.a, matrices, is_leaf=_is_pair
    )


def _on(side: Side, matrices: Any) -> Any:
    """Undoes `_on_any_side`, and takes that side of whole pairs."""
    one = lambda m: _only(side, m if _is_pair(m) else LoRAPair(m, m))
    return jax.tree.map(one, matrices, is_leaf=_is_pair)


def _cast(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


def _apply(side: Side, update: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return apply_rounded(x, update)


def _drift(side: Side, applied: tuple[jax.Array, jax.Array]) -> jax.Array:
    new, change = applied
    return cross(side, change, new)
