"""Sharding as the r×r algebra sees it: Explicit meshes, and long axes sharded by `shard_map`.

There are three ways to use many devices. On an Auto mesh the compiler shards everything, and the
algebra does nothing. On an Explicit mesh shardings are part of the types, and a product that
contracts a sharded axis must name the sharding of its result. Inside `shard_map` a product over a
sharded long axis is one device's part of a sum; `sharded_axes` tells the code under it which axes
to sum over.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

_SHARDED: ContextVar[Mapping[str, tuple[str, ...]] | None] = ContextVar("sharded", default=None)


@contextlib.contextmanager
def sharded_axes(axes: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Declares over which mesh axes the factors of a pair are sharded inside `shard_map`.

    Args:
        axes: names of mesh axes: of the long axis by side, and of the batch axes as `"batch"`, as
            in `{"a": ("model",), "b": (), "batch": ()}`.

    Example:
        >>> with sharded_axes({"a": ("model",), "b": ()}):
        ...     sharded_axes_of("a")
        ('model',)
    """
    token = _SHARDED.set(axes)
    try:
        yield
    finally:
        _SHARDED.reset(token)


def sharded_axes_of(what: str) -> tuple[str, ...]:
    """Returns the axes that `sharded_axes` declares for a side or the batch, none outside of it.

    Example:
        >>> sharded_axes_of("b")
        ()
    """
    return (_SHARDED.get() or {}).get(what, ())


def sum_over_shards(side: str, part: jax.Array) -> jax.Array:
    """Adds up the parts of a long-axis sum that are on different devices.

    Example:
        >>> import jax.numpy as jnp
        >>> sum_over_shards("a", jnp.ones(2)).tolist()
        [1.0, 1.0]
    """
    axes = sharded_axes_of(side)
    return jax.lax.psum(part, axes) if axes else part


def max_over_shards(side: str, part: jax.Array) -> jax.Array:
    """Takes the maximum over the devices that share a factor's long axis.

    Example:
        >>> import jax.numpy as jnp
        >>> max_over_shards("a", jnp.ones(2)).tolist()
        [1.0, 1.0]
    """
    axes = sharded_axes_of(side)
    return jax.lax.pmax(part, axes) if axes else part


def spec_of(x: Any) -> jax.P | None:
    """Reads how an array is sharded over the explicit axes of its mesh.

    Args:
        x: an array, concrete or traced.

    Returns:
        One entry for each axis, or None where no mesh has explicit axes.

    Example:
        >>> import jax.numpy as jnp
        >>> spec_of(jnp.ones(2)) is None
        True
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return jax.P(*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))


def contraction(subscripts: str, x: jax.Array, y: jax.Array) -> NamedSharding | None:
    """Finds the sharding of a product on an Explicit mesh: each axis is sharded like the operand's.

    Args:
        subscripts: of `jnp.einsum`, for two operands that begin with `...`.
        x: first operand.
        y: second operand.

    Returns:
        The sharding to give to `jnp.einsum` as `out_sharding`.

    Example:
        >>> import jax.numpy as jnp
        >>> contraction("...ni,...nj->...ij", jnp.ones((4, 2)), jnp.ones((4, 2))) is None
        True
    """
    specs = spec_of(x), spec_of(y)
    if specs == (None, None):
        return None
    operands, _, result = subscripts.partition("->")
    labels = [part.removeprefix("...") for part in operands.split(",")]
    entries = [
        (None,) * operand.ndim if spec is None else tuple(spec)
        for operand, spec in zip((x, y), specs, strict=True)
    ]
    leading = [entry[:-2] for entry in entries]
    batch = max(leading, key=lambda axes: (len(axes), sum(axis is not None for axis in axes)))
    named = dict(zip(labels[1], entries[1][-2:], strict=True))
    for label, axis in zip(labels[0], entries[0][-2:], strict=True):
        named[label] = axis or named.get(label)
    mesh = jax.typeof(y if specs[0] is None else x).sharding.mesh
    return NamedSharding(mesh, jax.P(*batch, *(named[label] for label in result[3:])))


def matmul(x: jax.Array, y: jax.Array, preferred_element_type: Any) -> jax.Array:
    """Multiplies an input by a weight; on an Explicit mesh, with the sharding that a layer means.

    The result keeps the input's leading axes and takes the weight's last one. A weight whose
    sharding does not fit its input, as under FSDP, is resharded for the product.

    Args:
        x: (..., k).
        y: (..., k, n).
        preferred_element_type: dtype to accumulate in.

    Returns:
        (..., n).

    Example:
        >>> import jax.numpy as jnp
        >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.float32).tolist()
        [[3.0], [3.0]]
    """
    specs = spec_of(x), spec_of(y)
    out_sharding = None
    if specs != (None, None):
        mesh = jax.typeof(y if specs[0] is None else x).sharding.mesh
        spec_x, spec_y = (
            (None,) * v.ndim if s is None else s for v, s in zip((x, y), specs, strict=True)
        )
        taken = set(jax.tree.leaves(tuple(spec_x)))
        last = None if taken & set(jax.tree.leaves(spec_y[-1])) else spec_y[-1]
        y = jax.sharding.reshard(y, NamedSharding(mesh, jax.P(*spec_y[:-2], spec_x[-1], last)))
        out_sharding = NamedSharding(mesh, jax.P(*spec_x[:-1], last))
    return jnp.matmul(
        x, y, preferred_element_type=preferred_element_type, out_sharding=out_sharding
    )


def reshard_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Gives an array the sharding of another one of its shape on an Explicit mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> reshard_like(jnp.ones(2), jnp.zeros(2)).tolist()
        [1.0, 1.0]
    """
    return x if spec_of(like) is None else jax.sharding.reshard(x, jax.typeof(like).sharding)


def varying(x: Any) -> frozenset[str]:
    """Returns the mesh axes along which `shard_map` knows a value to differ.

    Example:
        >>> import jax.numpy as jnp
        >>> varying(jnp.ones(2))
        frozenset()
    """
    return frozenset(jax.typeof(x).manual_axis_type.varying)
