"""Seals: whether the auxiliary leaves of a pair are as the last update left them.

OPLoRA keeps its momentum and its metric among the parameters, where a weight decay or an average of
parameters may reach them between updates. The state keeps the sums of their squares.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import meshes
from lowrank_optax._core.linalg import Side, apply_rounded
from lowrank_optax._core.states import Small
from lowrank_optax._core.verbs import Pairs

# A change of a sum of squares by less is not told from rounding: relative to the sum, and to the
# sum before the update, whose rounding the new leaf has.
_OF_NEW, _OF_OLD = 1e-4, 1e-6

_LEAVES: tuple[tuple[str, Side, tuple[int, ...]], ...] = (
    ("m_a", "a", (-2, -1)),
    ("m_b", "b", (-2, -1)),
    ("d_in", "a", (-1,)),
    ("d_out", "b", (-1,)),
)


class Seal(NamedTuple):
    """What is known of one leaf.

    Args:
        size: the sum of its squares as the last update left it, (...).
        allowed: how far off a later one may be, (...).
    """

    size: jax.Array
    allowed: jax.Array


class SealedState(NamedTuple):
    """State of a method that keeps all it needs among the parameters.

    Args:
        seals: for each pair, the `Seal` of each auxiliary leaf that moves, by name.
    """

    seals: Small


def unsealed(pair: Any) -> SealedState:
    """Makes the state before the first update, for `lift`.

    Example:
        >>> from lowrank_optax import LoRAPair, shadow
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> unsealed(node).seals["m_a"].size.item()
        0.0
    """
    return SealedState(
        {
            name: Seal(jnp.zeros_like(size), jnp.zeros_like(size))
            for name, size in _sizes(pair).items()
        }
    )


def seal(pairs: Pairs, params: Sequence[Any], updates: Sequence[Any]) -> SealedState:
    """Seals the auxiliary leaves as these updates leave them.

    Args:
        pairs: the verbs.
        params: the parameters.
        updates: their updates.

    Returns:
        The new state.

    Example:
        See `lowrank_optax.oplora`.
    """

    def of(pair: Any, update: Any) -> dict[str, Seal]:
        moved = jax.tree.map(lambda x, u: apply_rounded(x, u)[0], pair, update)
        old, new = _sizes(pair), _sizes(moved)
        allowed = {name: _OF_NEW * new[name] + _OF_OLD * old[name] for name in new}
        return {name: Seal(new[name], allowed[name]) for name in new}

    return SealedState(pairs.each(of, params, updates))


def is_broken(pair: Any, seals: Mapping[str, Seal], is_first: jax.Array) -> jax.Array:
    """Says whether a leaf is not as it was sealed.

    Args:
        pair: the parameters.
        seals: those of the state.
        is_first: whether this is the first update, before which nothing was sealed.

    Returns:
        Booleans (...), one for each pair of a stack.

    Example:
        >>> from lowrank_optax import ShadowedPair
        >>> pair = ShadowedPair(*2 * [jnp.ones((1, 1))], m_b=jnp.full((1, 1), 2.0))
        >>> is_broken(pair, {"m_b": Seal(1.0, 1.0)}, jnp.array(False)).item()
        True
    """
    sizes = _sizes(pair)
    intact = [
        jnp.abs(size - seals[name].size) <= seals[name].allowed for name, size in sizes.items()
    ]
    return ~functools.reduce(jnp.logical_and, intact, jnp.array(True)) & ~is_first


def _sizes(pair: Any) -> dict[str, jax.Array]:
    """The sums of squares of the leaves that are there, (...)."""
    return {
        name: meshes.sum_over_shards(side, jnp.sum(jnp.square(getattr(pair, name)), axis=axes))
        for name, side, axes in _LEAVES
        if getattr(pair, name) is not None
    }
