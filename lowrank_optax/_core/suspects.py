"""Near misses: leaves whose names say LoRA and that belong to no pair."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lowrank_optax._core.names import MAGNITUDE, SAYS_LORA, listed

_PARTNERS = {"a": "b", "A": "B", "down": "up"}
_SHOWN = 4


def near_misses(paths: Sequence[str], leaves: Sequence[Any], paired: Collection[int]) -> str:
    """Writes which leaves look like factors but are in no pair, and how to declare them.

    Args:
        paths: name of every leaf.
        leaves: the leaves.
        paired: the indices of those that are in a pair, or declared to be in none.

    Returns:
        The message, empty if there are none.

    Example:
        >>> leaves = [jnp.ones((6, 2)), jnp.ones((2, 4))]
        >>> near_misses(["q/lora_down", "q/lora_up"], leaves, {}).partition("Declare")[2]
        " them, as specs=[*DEFAULT_SPECS, PairSpec('lora_down', 'lora_up')]."
    """
    shapes = {
        path: tuple(leaf.shape)
        for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
        if index not in paired
        and SAYS_LORA.search(path)
        and not path.endswith(MAGNITUDE)
        and _could_be_factor(leaf)
    }
    if not shapes:
        return ""
    shown = listed(shapes, _SHOWN)
    specs = dict.fromkeys(spec for path in shapes if (spec := _spec_for(path, shapes)))
    found = ", ".join(specs) or "PairSpec(a, b, ...)"
    return (
        "Leaves that look like LoRA factors belong to no pair, so they would be trained as"
        f" ordinary parameters: {shown}. Declare them, as specs=[*DEFAULT_SPECS, {found}]."
    )


def _could_be_factor(leaf: Any) -> bool:
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", ())
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and len(shape) >= 2


def _spec_for(path: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The `PairSpec` of which a leaf is the factor a, where its partner is there too."""
    start = path.rfind("/", 0, SAYS_LORA.search(path).end() - 1) + 1  # type: ignore[union-attr]
    prefix, tail = path[:start], path[start:]
    for own, partner in _PARTNERS.items():
        for found in re.finditer(rf"(?<![A-Za-z0-9]){own}(?![A-Za-z0-9])", tail):
            other = tail[: found.start()] + partner + tail[found.end() :]
            if prefix + other in shapes:
                axes = _axes(shapes[path], shapes[prefix + other])
                return f"PairSpec({tail!r}, {other!r}{axes})"
    return ""


def _axes(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """The arguments that say where the rank axis is, if the shapes tell."""
    if len(a) == len(b) == 2 and a[0] == b[1] and (a[1] != b[0] or a[0] < a[1]):
        return ", a_in=(-1,), a_rank=-2, b_rank=-1, b_out=(-2,)"
    return ""
