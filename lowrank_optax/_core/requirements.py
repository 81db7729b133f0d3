"""What a method requires of the trees that it is given, with the remedy where they do not fit."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lowrank_optax._core.layouts import PairMatcher
from lowrank_optax._core.names import in_words, listed
from lowrank_optax._core.nodes import is_masked
from lowrank_optax._core.pairing import Pairing, find_pairs


def find_nodes(
    params: Any,
    *,
    specs: Sequence[PairMatcher] | None,
    node: Any,
    why_unfit: Callable[[Any], str],
    name: str,
) -> Pairing:
    """Finds the pairs of a tree and raises unless a method can work on all of them.

    Args:
        params: the parameters.
        specs: layouts of the pairs.
        node: the kind of pair that the method understands.
        why_unfit: says why a pair does not fit the method, and the remedy; empty if it fits.
        name: the method's name.

    Returns:
        The pairing.

    Raises:
        ValueError: pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> pair = LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> keywords = {"specs": (), "node": LoRAPair, "why_unfit": lambda pair: "", "name": ""}
        >>> len(find_nodes({"q": pair}, **keywords).pairs)
        1
    """
    found = find_pairs(params, specs)
    needed = set(node._fields) - set(node._field_defaults)
    for pair in found.pairs:
        if not needed <= set(pair.leaves) <= set(node._fields):
            raise ValueError(
                f"{in_words(pair.path)}: {name} works on {node.__name__}, but this is a"
                f" {pair.kind.__name__}. Use the optimizer made for it, or {node.made_by()}."
            )
    for pair, value in zip(found.pairs, found.take(params, node), strict=True):
        if reason := why_unfit(value):
            raise ValueError(f"{in_words(pair.path)}: {name} {reason}")
    return found


def require_no_leaves(params: Any, found: Pairing, name: str) -> None:
    """Raises where there are no pairs, but there should be.

    optax itself calls `init` with placeholders and with trees in which everything is masked.

    Args:
        params: the parameters.
        found: their pairing, without pairs.
        name: the method's name.

    Raises:
        ValueError: there are leaves, or nothing at all.

    Example:
        >>> import optax
        >>> require_no_leaves({"w": optax.MaskedNode()}, find_pairs({}), "altlora")
    """
    remedy = (
        "Call `nn.add_lora` before you make the optimizer, or declare the layout of the factors"
        " with `specs`; `allow_no_pairs=True` leaves everything to the fallback."
    )
    if found.paths:
        shown = listed([path or "the parameter" for path in found.paths])
        raise ValueError(f"{name} finds no LoRA pairs among {shown}. {remedy}")
    everything = functools.partial(jax.tree.leaves, is_leaf=is_masked)
    if isinstance(params, Mapping | list) and not everything(params):
        raise ValueError(f"{name} is given no parameters at all. {remedy}")


def warn_of_rest(found: Pairing, name: str) -> None:
    """Warns of leaves beside the pairs that get AdamW at a rate of another size.

    Args:
        found: the pairing.
        name: the method's name.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> warn_of_rest(find_pairs(LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 3)))), "polora")
    """
    if found.unpaired:
        warnings.warn(
            f"{name} trains {listed(found.unpaired)} by AdamW at its own learning rate, which is"
            " not of the size of AdamW's. Give `fallback=optax.adamw(1e-3)`, say, or"
            " `fallback=optax.set_to_zero()` if they are to stay.",
            stacklevel=3,
        )


def require_same_tree(updates: Any, found: Pairing, name: str) -> None:
    """Raises unless gradients have the structure of the parameters, and both factors' of a pair.

    Args:
        updates: the gradients.
        found: the pairing of the parameters.
        name: the method's name.

    Raises:
        ValueError: another structure, or half a pair.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> pair = LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> require_same_tree(pair, find_pairs(pair), "altlora")
    """
    try:
        leaves = found.treedef.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(
            f"{name}: gradients and parameters differ in structure: {error}"
        ) from error
    for pair in found.pairs:
        for role, index in pair.leaves.items():
            if not hasattr(leaves[index], "shape"):
                raise ValueError(
                    f"{name}: {found.paths[index]} has no gradient ({leaves[index]!r}), so"
                    f" {in_words(pair.path)} is half a pair ({role!r} is missing). Take gradients"
                    " of both factors, or mask both in the parameters too."
                )
