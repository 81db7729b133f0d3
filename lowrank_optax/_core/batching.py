"""Batched small algebra: one call of a function serves the small matrices of all pairs."""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import meshes

Function = Callable[..., Any]


class _Item(NamedTuple):
    """The matrices of one call, (..., r, r) each, and the mesh axes that shard their batch axes."""

    matrices: tuple[jax.Array, ...]
    batch_axes: tuple[str, ...]


def together(
    function: Function, *lists: Sequence[Any], batch_axes: Sequence[tuple[str, ...]] = ()
) -> tuple[Any, jax.Array]:
    """Maps a function of small matrices over lists of pytrees, in as few calls as possible.

    Leaves of the same shape are stacked, so one factorization serves all layers and both sides. A
    result that is not finite is replaced by zeros and counted.

    Args:
        function: maps stacks (n, r, r) to one array (n, ...) or a tuple of such.
        lists: its arguments: lists of one length whose entries have one structure, of matrices
            (..., r, r).
        batch_axes: for each entry, the mesh axes that shard the batch axes inside `shard_map`.

    Returns:
        A list like the first one of the results, or a tuple of lists; and how many failed.

    Example:
        >>> import jax.numpy as jnp
        >>> [half, nan], failures = together(jnp.linalg.inv, [2.0 * jnp.eye(2), jnp.zeros((2, 2))])
        >>> half.tolist(), nan.tolist(), int(failures)
        ([[0.5, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]], 1)
    """
    first, *others = lists
    treedef: Any
    leaves, treedef = jax.tree.flatten(list(first))
    columns = [leaves, *(treedef.flatten_up_to(list(o)) for o in others)]
    owners = [i for i, entry in enumerate(first) for _ in jax.tree.leaves(entry)]
    axes = [batch_axes[owner] if batch_axes else () for owner in owners]
    items = [_Item(*item) for item in zip(zip(*columns, strict=True), axes, strict=True)]
    results, failures = _call_all(function, items)
    if results and isinstance(results[0], tuple):
        parts = zip(*results, strict=True)
        return tuple(jax.tree.unflatten(treedef, part) for part in parts), failures
    return jax.tree.unflatten(treedef, results), failures


def _call_all(function: Function, items: Sequence[_Item]) -> tuple[list[Any], jax.Array]:
    """Calls a function for all items; those of one shape are stacked."""
    groups: dict[Any, list[int]] = defaultdict(list)
    results: list[Any] = [None] * len(items)
    failures = jnp.zeros([], jnp.int32)
    for index, item in enumerate(items):
        spec = meshes.spec_of(item.matrices[0])
        if spec is not None and any(spec):
            results[index], failed = _call_on_shards(function, item.matrices, spec)
            failures += failed
        else:
            shapes = tuple((m.shape[-2:], m.dtype) for m in item.matrices)
            groups[shapes, item.batch_axes].append(index)
    for (_, batch_axes), indices in groups.items():
        # A stack of n results is taken apart by n slices at n offsets, each a program of its own
        # for the compiler. Stacks of √n repeat the same √n offsets, which it compiles once.
        size = math.isqrt(len(indices) - 1) + 1
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            answers, failed = _call(function, [items[index].matrices for index in chunk])
            for index, answer in zip(chunk, answers, strict=True):
                results[index] = answer
            failures += jax.lax.psum(failed, batch_axes) if batch_axes else failed
    return results, failures


def _call(
    function: Function, items: Sequence[tuple[jax.Array, ...]]
) -> tuple[list[Any], jax.Array]:
    """Calls a function once on the stacked matrices of several items."""
    stacks = [
        jnp.concatenate([m.reshape(-1, *m.shape[-2:]) for m in column])
        for column in zip(*items, strict=True)
    ]
    guarded, finite = _guarded(function, stacks)
    batches = [matrices[0].shape[:-2] for matrices in items]
    stops = list(itertools.accumulate(math.prod(batch) for batch in batches))

    def part(x: jax.Array, stop: int, batch: tuple[int, ...]) -> jax.Array:
        return x[stop - math.prod(batch) : stop].reshape(*batch, *x.shape[1:])

    results = [
        jax.tree.map(functools.partial(part, stop=stop, batch=batch), guarded)
        for stop, batch in zip(stops, batches, strict=True)
    ]
    return results, jnp.sum(~finite, dtype=jnp.int32)


def _call_on_shards(
    function: Function, matrices: Sequence[jax.Array], spec: jax.P
) -> tuple[Any, jax.Array]:
    """Calls a function for matrices whose batch axes are sharded on an Explicit mesh."""
    batch = jax.P(*spec[:-2])

    def on_shard(*matrices: jax.Array) -> Any:
        shape = matrices[0].shape[:-2]
        stacks = [m.reshape(-1, *m.shape[-2:]) for m in matrices]
        guarded = _guarded(function, stacks)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), guarded)

    run = jax.shard_map(on_shard, in_specs=batch, out_specs=batch, check_vma=False)
    result, finite = run(*matrices)
    return result, jnp.sum(~finite, dtype=jnp.int32)


def _guarded(function: Function, stacks: Sequence[jax.Array]) -> tuple[Any, jax.Array]:
    """Calls a function on stacks. Returns zeros where a result is not finite, and where it is."""
    result = function(*stacks)
    flat = [x.reshape(len(x), -1) for x in jax.tree.leaves(result)]
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(x).all(axis=1) for x in flat])
    keep = lambda x: jnp.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    return jax.tree.map(keep, result), finite
