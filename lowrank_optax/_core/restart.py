"""The factors alone, for an optimizer that knows nothing of pairs, and restarts of its moments."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core.nodes import LoRAPair
from lowrank_optax._core.pairing import Pairing


def factors_only(found: Pairing, tree: Any) -> Any:
    """Returns the tree with `MaskedNode` in place of everything but the factors.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import find_pairs
        >>> tree = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4))), "bias": jnp.ones(4)}
        >>> factors_only(find_pairs(tree), tree)["bias"]
        MaskedNode()
    """
    return found.put(found.take(tree, LoRAPair), tree)


def restart_moments(fresh: Any, state: Any, params: Any, now: jax.Array) -> Any:
    """Restarts every part of an optax state that holds something shaped like the parameters.

    Args:
        fresh: a state as `init` makes it.
        state: the state to restart.
        params: the parameters of both.
        now: whether to restart, a boolean scalar.

    Returns:
        The state, with the parts that hold moments from `fresh` if `now`; counts that stand apart
        from moments go on.

    Raises:
        TypeError: a part that is no NamedTuple, tuple, list or dictionary.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, params = optax.sgd(0.1, momentum=0.9), {"w": jnp.ones(2)}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> restart_moments(tx.init(params), state, params, jnp.array(True))[0].trace["w"].tolist()
        [0.0, 0.0]
    """
    return _restart(fresh, state, _layout(params), now)


def _layout(tree: Any) -> Any:
    """The structure of a tree, whatever is masked in it."""
    return jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def _restart(fresh: Any, state: Any, layout: Any, now: jax.Array) -> Any:
    if hasattr(state, "_fields"):
        if any(_layout(field) == layout for field in state):
            return jax.tree.map(lambda new, old: jnp.where(now, new, old), fresh, state)
        parts = (_restart(new, old, layout, now) for new, old in zip(fresh, state, strict=True))
        return type(state)(*parts)
    if isinstance(state, tuple | list):
        both = zip(fresh, state, strict=True)
        return type(state)(_restart(new, old, layout, now) for new, old in both)
    if isinstance(state, dict):
        return {name: _restart(fresh[name], old, layout, now) for name, old in state.items()}
    if not jax.tree_util.all_leaves([state]) and state is not None:
        raise TypeError(
            "sds_lora restarts moments at the end of its warm-up and cannot find them in a"
            f" {type(state).__name__}; give it an inner optimizer whose states are NamedTuples."
        )
    return state
