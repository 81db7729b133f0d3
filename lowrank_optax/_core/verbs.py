"""The verbs in which rules are written; see `lowrank_optax.engine`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core import batching, meshes
from lowrank_optax._core.arguments import is_zero
from lowrank_optax._core.linalg import Side, apply_rounded
from lowrank_optax._core.nodes import LoRAPair, both, join

ShardedAxes = Mapping[str, tuple[str, ...]]


class Verbs:
    """What is done pair by pair, what for all pairs together, and what under a condition.

    Args:
        sharded_axes: for each pair, the mesh axes that shard it inside `shard_map`, by `"a"`, `"b"`
            and `"batch"`.

    Attributes:
        failures: how many results of `together` were not finite, int32 scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> two = Verbs([{}, {}])
        >>> two.each(lambda x, y: x + y, [1, 2], [10, 20])
        [11, 22]
        >>> [x.item() for x in two.together(jnp.linalg.inv, [2 * jnp.eye(1), 4 * jnp.eye(1)])]
        [0.5, 0.25]
    """

    def __init__(self, sharded_axes: Sequence[ShardedAxes]) -> None:
        self.failures = jnp.zeros([], jnp.int32)
        self._sharded_axes = sharded_axes

    def each(self, function: Callable[..., Any], *lists: Sequence[Any]) -> Any:
        """Maps a function over lists, pair by pair.

        Args:
            function: of one entry of each list.
            lists: one entry a pair. Where the first list has None, nothing is done.

        Returns:
            The list of results; a tuple of lists if the function returns tuples.
        """
        results = []
        for axes, first, *others in zip(self._sharded_axes, *lists, strict=True):
            with meshes.sharded_axes(axes):
                results.append(None if first is None else function(first, *others))
        width = next((len(result) for result in results if type(result) is tuple), 0)
        if width:
            return tuple([r if r is None else r[i] for r in results] for i in range(width))
        return results

    def together(self, function: Callable[..., Any], *lists: Sequence[Any]) -> Any:
        """Maps a function of r×r matrices over all pairs, in one call for all matrices of a shape.

        Args:
            function: of stacks (n, r, r), to one array (n, ...) or a tuple of such.
            lists: one entry a pair: a matrix (..., r, r), or a pytree of them, as a pair with one
                for each side. None stays None.

        Returns:
            The list of results; a tuple of lists if the function returns a tuple. A result that is
            not finite is replaced by zeros and counted in `failures`.
        """
        batch_axes = [axes.get("batch", ()) for axes in self._sharded_axes]
        results, failures = batching.together(function, *lists, batch_axes=batch_axes)
        self.failures += failures
        return results

    def switch(self, index: Any, branches: Sequence[Callable[[], Any]]) -> Any:
        """Runs one of several functions without arguments.

        Args:
            index: which one: a number or boolean, known when tracing or not.
            branches: the functions. They return the same structure, shapes and dtypes.

        Returns:
            What the function returns.
        """
        if isinstance(index, int):
            return branches[index]()
        before = self.failures

        def counted(branch: Callable[[], Any]) -> Any:
            self.failures = jnp.zeros([], jnp.int32)
            result = branch()
            failures, self.failures = self.failures, before  # no tracer may outlive its branch
            return result, failures

        result, failures = jax.lax.switch(
            jnp.int32(index), [functools.partial(counted, branch) for branch in branches]
        )
        self.failures = before + failures
        return result


class Pairs(Verbs):
    """What a rule works with in one update: the verbs, and the numbers of this update.

    Attributes:
        count: updates done before this one, int32 scalar.
        rate: the learning rate of this update, or None if the method has none.
        scales: the forward scale s of every pair.
    """

    def __init__(
        self,
        *,
        count: jax.Array,
        rate: Any,
        scales: Sequence[Any],
        grads: Sequence[Any],
        decays: Sequence[Mapping[str, Any]],
        sharded_axes: Sequence[ShardedAxes],
    ) -> None:
        super().__init__(sharded_axes)
        self.count = count
        self.rate = rate
        self.scales = scales
        self._grads = grads
        self._decays = decays

    def moved(self, params: Sequence[Any], updates: Sequence[Any]) -> Any:
        """Computes the factors after updates as they will be stored, rounded to their dtype.

        Use these values wherever a moved factor is needed, such as in a second half-step or to
        transport a momentum.

        Args:
            params: the pairs.
            updates: of their factors; None on a side that does not move.

        Returns:
            The list of pairs.
        """
        rounded = lambda side, u, x: apply_rounded(x, u)[0]
        return self.each(lambda p, u: join(both(rounded, u, p), p), params, updates)

    def descend(self, directions: Sequence[Any], params: Sequence[Any]) -> Any:
        r"""Makes the updates of the factors from the directions of descent.

        $$u = -\eta\,(d + \lambda x)$$

        Args:
            directions: d, pairs; None on a side that does not move.
            params: x, the pairs that move.

        Returns:
            The list of updates as pairs, in the wider dtype of gradient and parameter.
        """

        def update(direction: Any, pair: Any, grad: Any, decay: Mapping[str, Any]) -> LoRAPair:
            def of(side: Side, d: jax.Array, x: jax.Array, g: jax.Array) -> jax.Array:
                if decay[side] is not None and not is_zero(decay[side]):
                    d += decay[side] * x.astype(d.dtype)
                return (-self.rate * d).astype(update_dtype(g, x))

            return both(of, direction, pair, grad)

        return self.each(update, directions, params, self._grads, self._decays)

    def stay(self, params: Sequence[Any]) -> Any:
        """Makes updates of zeros, as `descend` would give them.

        Args:
            params: the pairs that do not move.

        Returns:
            The list of updates as pairs, in the wider dtype of gradient and parameter.
        """
        zeros = lambda side, x, g: jnp.zeros_like(x, update_dtype(g, x))
        return self.each(lambda pair, grad: both(zeros, pair, grad), params, self._grads)


def update_dtype(grad: jax.Array, param: jax.Array) -> jnp.dtype:
    """Returns the dtype of an update: a float16 gradient must not round that of a float32 leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> update_dtype(jnp.ones(2, jnp.float16), jnp.ones(2)).name
        'float32'
    """
    return jnp.promote_types(grad.dtype, param.dtype)


def checked(result: Any, grads: Any, params: Any, state: Any, name: str) -> tuple[Any, Any]:
    """Checks what a rule returned, adds zero updates for missing leaves, and casts.

    Args:
        result: what the rule returned.
        grads: the gradients, nodes.
        params: the parameters, nodes.
        state: the state that the rule was given.
        name: the method's name, for messages.

    Returns:
        Updates in the wider dtype of gradient and parameter, zero where the rule gave none; the
        state in its dtypes.

    Raises:
        TypeError: the rule is a generator.
        ValueError: another structure or other shapes than they must be.

    Example:
        >>> import jax.numpy as jnp
        >>> pair = LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> checked(([LoRAPair(pair.a, None)], ()), [pair], [pair], (), "mine")[0][0].b.sum().item()
        0.0
    """
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if hasattr(result, "send"):
        raise TypeError(f"the rule of {name} is a generator; return the updates and the state.")
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"the rule of {name} must return (updates, state), got {shapes(result)}.")
    updates, new = result
    if shapes(new) != shapes(state):
        raise ValueError(
            f"the rule of {name} must return a state of the structure and shapes that it was given,"
            f" {shapes(state)}; got {shapes(new)}."
        )
    if not isinstance(updates, list) or len(updates) != len(params):
        raise ValueError(
            f"the rule of {name} must return a list of updates, one for each of {len(params)}"
            f" pairs; got {shapes(updates)}."
        )

    def whole(update: Any, pair: Any, grad: Any) -> Any:
        values: dict[str, Any] = dict.fromkeys(pair._fields)
        for field, g in grad._asdict().items():
            u = getattr(update, field, None)
            if u is not None and jnp.shape(u) != jnp.shape(g):
                raise ValueError(
                    f"the rule of {name} must return updates shaped as the parameters; for"
                    f" {field!r} of shape {jnp.shape(g)} it gave {jnp.shape(u)}."
                )
            if g is not None:
                dtype = update_dtype(g, getattr(pair, field))
                values[field] = jnp.zeros_like(g, dtype) if u is None else u.astype(dtype)
        return type(pair)(**values)

    updates = [whole(*each) for each in zip(updates, params, grads, strict=True)]
    return updates, jax.tree.map(lambda n, o: n.astype(o.dtype), new, state)
