"""The factors alone, for an optimizer that knows nothing of pairs, and restarts of its moments."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core.nodes import LoRAPair, is_masked
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
    """Restarts what an optax state holds in the shape of the parameters.

    A count beside moments, as Adam's, is their age and restarts with them. No other count does: not
    a schedule's, nor those of a state that holds other states or accumulates gradients.

    Args:
        fresh: a state as `init` makes it.
        state: the state to restart.
        params: the parameters of both.
        now: whether to restart, a boolean scalar.

    Returns:
        The state, with the moments from `fresh` if `now`.

    Raises:
        TypeError: a part that is no NamedTuple, tuple, list or dictionary, or an array of numbers
            that is in no tree like the parameters, as in `optax.sm3`.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, params = optax.sgd(0.1, momentum=0.9), {"w": jnp.ones(2)}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> restart_moments(tx.init(params), state, params, jnp.array(True))[0].trace["w"].tolist()
        [0.0, 0.0]
    """
    return _restart(fresh, state, params, now)


def _is_like(params: Any, tree: Any) -> bool:
    """Whether a tree has the structure of the parameters, whatever parts are masked in it."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_masked)
    try:
        parts = treedef.flatten_up_to(params)
    except ValueError:
        return False
    is_leaf = lambda x: is_masked(x) or jax.tree_util.all_leaves([x])
    return all(is_masked(x) or is_leaf(part) for x, part in zip(leaves, parts, strict=True))


def _restart(fresh: Any, state: Any, params: Any, now: jax.Array) -> Any:
    chosen = lambda new, old: jax.tree.map(lambda n, o: jnp.where(now, n, o), new, old)
    if hasattr(state, "_fields"):
        is_moment = [_is_like(params, field) for field in state]
        is_simple = all(
            m or jax.tree_util.all_leaves([x]) for m, x in zip(is_moment, state, strict=True)
        )
        if any(is_moment) and is_simple and not isinstance(state, optax.ApplyEvery):
            return chosen(fresh, state)
        fields = zip(is_moment, fresh, state, strict=True)
        return type(state)(
            *(chosen(n, o) if m else _restart(n, o, params, now) for m, n, o in fields)
        )
    if isinstance(state, tuple | list):
        both = zip(fresh, state, strict=True)
        return type(state)(_restart(new, old, params, now) for new, old in both)
    if isinstance(state, dict):
        return {name: _restart(fresh[name], old, params, now) for name, old in state.items()}
    if not jax.tree_util.all_leaves([state]) and state is not None:
        raise TypeError(
            "sds_lora restarts moments at the end of its warm-up and cannot find them in a"
            f" {type(state).__name__}; give it an inner optimizer whose states are NamedTuples."
        )
    if jnp.ndim(state) and jnp.issubdtype(jnp.result_type(state), jnp.floating):
        raise TypeError(
            "sds_lora restarts moments at the end of its warm-up, and its inner optimizer holds an"
            f" array of shape {jnp.shape(state)} in no tree like the parameters, of which it cannot"
            " know what it is; give it another one."
        )
    return state
