"""How SDS-LoRA moves frames: the rule whose schedule `sds_lora` gives.

Each pair's own `warm` says in which phase it is, so that a new state goes on with trained frames.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core import meshes
from lowrank_optax._core.frames import FramedPair, decompose, renewed, seen_from
from lowrank_optax._core.linalg import gram, identity, widened
from lowrank_optax._core.nodes import LoRAPair, both
from lowrank_optax._core.notices import warn_if
from lowrank_optax._core.verbs import Pairs, Verbs, update_dtype

FOLLOW, SWITCH, RENEW, STAY = range(4)

# The frames' own rounding is below 1e-5; what averages or decays them is far above.
_TOLERANCE = 1e-2
# `warm` is 0 or 1; half precision stores both exactly.
_ROUNDING = 1e-3

_CHANGED = (
    "sds_lora found frames that are not orthonormal, and made them anew from the factors, or a"
    " `warm` that is neither 0 nor 1: something else changed them, such as a clip or a weight decay"
    " after it, an average of parameters (`optax.lookahead`, EMA, schedule-free) or `apply_every`."
    " Let these act on the factors alone, or put sds_lora last. A pair whose `warm` is outside of 0"
    " to 1 is not moved: make it anew by `lowrank_optax.frame`. `lowrank_optax.skipped(state)`"
    " counts such pairs."
)


def any_warm(pairs: Verbs, params: list[FramedPair]) -> jax.Array:
    """Says whether a pair is still in its warm-up, on every device alike.

    Example:
        >>> node = FramedPair(*4 * [jnp.eye(2)], warm=jnp.array(1.0))
        >>> any_warm(Verbs([{}]), [node]).item()
        True
    """

    def of(pair: FramedPair) -> Any:
        is_warm = jnp.array(False) if pair.warm is None else jnp.any(pair.warm > 0.5)
        return meshes.max_over_shards("batch", is_warm.astype(jnp.int32))

    return jnp.max(jnp.stack(pairs.each(of, params))) > 0


def move_frames(
    turn: Callable[[jax.Array, jax.Array], jax.Array],
    preserving: bool,
    pairs: Pairs,
    steps: list[FramedPair],
    params: list[FramedPair],
    state: Any,
) -> tuple[Any, Any]:
    """Moves the frames of all pairs.

    Args:
        turn: from the count and whether a pair is warm, what is to be done.
        preserving: whether a refresh keeps ΔK.
        pairs: the verbs.
        steps: what the inner optimizer made of the gradients.
        params: the pairs.
        state: nothing.

    Returns:
        The updates, and the state.

    Example:
        See `lowrank_optax.sds_lora`.
    """

    def moved() -> list[LoRAPair]:
        return jax.tree.map(widened, pairs.moved(params, steps))

    def follow() -> list[FramedPair]:
        """Warm-up: the frames are the factors."""
        to = lambda pair, step, x: _updates(pair, step, f_in=x.a, f_out=x.b, warm=1.0)
        return unless_cold(pairs.each(to, params, steps, moved()))

    def switch() -> list[FramedPair]:
        """The end of the warm-up: each side takes half of ΔK, in its singular vectors."""
        vectors, values = decompose(pairs, moved(), pairs.scales)

        def to(pair: Any, step: Any, vector: LoRAPair, values: jax.Array, scale: Any) -> FramedPair:
            half = values / (2 * scale)
            a, b = vector.a * half[..., None, :], half[..., None] * vector.b
            return _updates(pair, step, a=a, b=b, f_in=vector.a, f_out=vector.b, warm=0.0)

        return unless_cold(pairs.each(to, params, steps, vectors, values, pairs.scales))

    def renew() -> list[FramedPair]:
        """A refresh: the frames become those of the factors, and ΔK stays if it is to."""
        factors = moved()

        def to(pair: FramedPair, step: FramedPair, x: LoRAPair, frame: LoRAPair) -> FramedPair:
            values = {"f_in": frame.a, "f_out": frame.b}
            if preserving:
                values["a"], values["b"] = seen_from(frame, pair._replace(a=x.a, b=x.b))
            return _updates(pair, step, **values, warm=0.0)

        return pairs.each(to, params, steps, factors, renewed(pairs, factors, params))

    def stay() -> list[FramedPair]:
        return pairs.each(lambda pair, step: _updates(pair, step, warm=0.0), params, steps)

    def unless_cold(updates: list[FramedPair]) -> list[FramedPair]:
        """Takes a refresh in place of the updates of pairs that are past their warm-up."""

        def choose(pair: FramedPair, own: FramedPair, cold: FramedPair) -> FramedPair:
            if pair.warm is None:
                return cold
            is_warm = lambda x: pair.warm.reshape(
                *pair.warm.shape, *[1] * (x.ndim - pair.warm.ndim)
            )
            return jax.tree.map(lambda x, y: jnp.where(is_warm(x) > 0.5, x, y), own, cold)

        return pairs.each(choose, params, updates, renew())

    before = pairs.failures
    index = turn(pairs.count, any_warm(pairs, params))
    frames = pairs.each(lambda pair: LoRAPair(pair.f_in, pair.f_out), params)
    pairs.switch(
        jnp.int32(index == RENEW),
        [lambda: None, lambda: _count_changed(pairs, frames)],
    )
    pairs.together(_one_where(_is_known), pairs.each(_warm_matrix, params))
    warn_if(pairs.failures > before, _CHANGED)
    updates = pairs.switch(index, [follow, switch, renew, stay])
    return pairs.each(_unless_lost, params, updates), state


def _warm_matrix(pair: FramedPair) -> jax.Array | None:
    """The pair's `warm` as a 1×1 matrix for each of a stack; None without."""
    return None if pair.warm is None else pair.warm[..., None, None]


def _is_known(warm: jax.Array) -> jax.Array:
    return jnp.minimum(jnp.abs(warm), jnp.abs(1 - warm)) <= _ROUNDING


def _one_where(holds: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda matrix: jnp.where(holds(matrix), 1, jnp.nan)


def _unless_lost(pair: FramedPair, update: FramedPair) -> FramedPair:
    """No update of a pair whose `warm` has overshot: its frames have too."""
    if pair.warm is None:
        return update
    is_lost = ~((pair.warm >= -_ROUNDING) & (pair.warm <= 1 + _ROUNDING))
    along = lambda u: is_lost.reshape(*is_lost.shape, *[1] * (u.ndim - is_lost.ndim))
    return jax.tree.map(lambda u: jnp.where(along(u), 0, u), update)


def _count_changed(pairs: Pairs, frames: list[LoRAPair]) -> None:
    """Counts frames whose components are not orthonormal, components of zeros excepted."""

    def sound(matrix: jax.Array) -> jax.Array:
        is_there = jnp.diagonal(matrix, axis1=-2, axis2=-1) > 0.5
        ideal = jnp.where(is_there[..., None, :], identity(matrix), 0)
        error = jnp.max(jnp.abs(matrix - ideal), axis=(-1, -2), keepdims=True)
        return jnp.where(error <= _TOLERANCE, 1, jnp.nan)

    pairs.together(sound, pairs.each(lambda frame: both(gram, frame), frames))


def _updates(pair: FramedPair, step: FramedPair, **values: Any) -> FramedPair:
    """The node's updates: the inner optimizer's steps, but to the given values where given."""
    wide = jax.tree.map(lambda s, p: s.astype(update_dtype(s, p)), step, pair)
    zeros = jax.tree.map(jnp.zeros_like, wide)
    changes = {
        name: (value - getattr(pair, name)).astype(getattr(zeros, name).dtype)
        for name, value in values.items()
        if getattr(pair, name) is not None
    }
    return zeros._replace(**{"a": wide.a, "b": wide.b, **changes})
