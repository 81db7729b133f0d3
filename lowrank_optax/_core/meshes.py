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


def inside_shard_map() -> bool:
    """Whether shapes may be those of one device's part of an array.

    Example:
        >>> inside_shard_map()
        False
    """
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


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
    if (mesh := _explicit_mesh(x, y)) is None:
        return None
    operands, _, result = subscripts.partition("->")
    labels = [part.removeprefix("...") for part in operands.split(",")]
    entries = _entries(x), _entries(y)
    leading = [entry[:-2] for entry in entries]
    batch = max(leading, key=lambda axes: (len(axes), sum(axis is not None for axis in axes)))
    named = dict(zip(labels[1], entries[1][-2:], strict=True))
    for label, axis in zip(labels[0], entries[0][-2:], strict=True):
        named[label] = axis or named.get(label)
    return NamedSharding(mesh, jax.P(*batch, *(named[label] for label in result[3:])))


def matmul(x: jax.Array, y: jax.Array, preferred_element_type: Any) -> jax.Array:
    """Multiplies an input by a weight; on an Explicit mesh, with the sharding that a layer means.

    The result keeps the input's leading axes and takes the weight's last one. A weight whose
    sharding does not fit its input, as under FSDP, is resharded for the product.

    Args:
        x: (..., k).
        y: (..., k, n); its leading axes broadcast as in `jnp.matmul`.
        preferred_element_type: dtype to accumulate in.

    Returns:
        (..., n).

    Example:
        >>> import jax.numpy as jnp
        >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.float32).tolist()
        [[3.0], [3.0]]
    """
    row = "t" if x.ndim > 1 else ""
    x, y, out_sharding = _fitted(x, y)
    return jnp.einsum(  # `jnp.matmul` gives `out_sharding` to axes that are not in order yet
        f"...{row}k,...kn->...{row}n",
        x,
        y,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def take_rows(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Takes rows as `jnp.take` does; on an Explicit mesh they lie as the indices do.

    Args:
        x: (n, k).
        indices: integers of any shape; NaN stands for one out of range.

    Returns:
        (*indices.shape, k).

    Example:
        >>> import jax.numpy as jnp
        >>> take_rows(jnp.eye(2), jnp.array([1, 0, 1])).tolist()
        [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    if (mesh := _explicit_mesh(x, indices)) is None:
        return jnp.take(x, indices, axis=0)
    whole = jax.sharding.reshard(x, NamedSharding(mesh, jax.P(None, None)))
    place = NamedSharding(mesh, jax.P(*_entries(indices), None))
    return whole.at[indices].get(mode="fill", fill_value=jnp.nan, out_sharding=place)


def sharding_like(like: jax.Array, *operands: jax.Array) -> NamedSharding | None:
    """Finds what to give a product as `out_sharding`, so that it is sharded like an array.

    Args:
        like: the array, of the product's shape or with its sharded axes in the same places.
        operands: of the product; they tell the mesh if the array is on none.

    Returns:
        The sharding, or None where no mesh has explicit axes.

    Example:
        >>> import jax.numpy as jnp
        >>> sharding_like(jnp.ones(2), jnp.ones(2)) is None
        True
    """
    mesh = _explicit_mesh(like, *operands)
    return None if mesh is None else NamedSharding(mesh, jax.P(*_entries(like)))


def whole(x: jax.Array) -> jax.Array:
    """Puts all of an array on every device of its mesh, as what needs a whole matrix wants it.

    Example:
        >>> import jax.numpy as jnp
        >>> whole(jnp.ones(2)).tolist()
        [1.0, 1.0]
    """
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding):
        return x
    return jax.device_put(x, NamedSharding(sharding.mesh, jax.P()))


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Lays a concrete array out as another one of its shape, if that lies on a mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> placed_like(jnp.ones(2), jnp.zeros(2)).tolist()
        [1.0, 1.0]
    """
    return jax.device_put(x, like.sharding) if isinstance(like.sharding, NamedSharding) else x


def reshard_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Gives an array the sharding of another one with as many axes on an Explicit mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> reshard_like(jnp.ones(2), jnp.zeros(2)).tolist()
        [1.0, 1.0]
    """
    sharding = sharding_like(like, x)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def varying(x: Any) -> frozenset[str]:
    """Returns the mesh axes along which `shard_map` knows a value to differ.

    Example:
        >>> import jax.numpy as jnp
        >>> varying(jnp.ones(2))
        frozenset()
    """
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _fitted(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, NamedSharding | None]:
    """Reshards the operands of `matmul`, and finds the sharding of its result.

    The input decides: the weight keeps what meets no mesh axis that the input is sharded over.
    """
    if (mesh := _explicit_mesh(x, y)) is None:
        return x, y, None
    spec_x, spec_y = _entries(x), _entries(y)
    taken = set(jax.tree.leaves(spec_x))
    spec_y = tuple(None if taken & set(jax.tree.leaves(entry)) else entry for entry in spec_y)
    width = max(x.ndim, y.ndim) - 2
    padded = lambda spec: (None,) * (width - len(spec)) + spec
    leading = zip(padded(spec_x[:-2]), padded(spec_y[:-2]), strict=True)
    batch = [of_x or of_y for of_x, of_y in leading]

    def laid(v: jax.Array, *matrix: Any) -> jax.Array:
        sizes = v.shape[:-2]  # an axis of size 1 is broadcast
        own = [
            None if size == 1 else axis
            for size, axis in zip(sizes, batch[width - len(sizes) :], strict=True)
        ]
        return jax.sharding.reshard(v, NamedSharding(mesh, jax.P(*own, *matrix)))

    out = NamedSharding(mesh, jax.P(*batch, *spec_x[-2:-1], spec_y[-1]))
    return laid(x, *spec_x[-2:]), laid(y, spec_x[-1], spec_y[-1]), out


def _explicit_mesh(*arrays: jax.Array) -> Any:
    """The mesh with explicit axes that arrays are on, or None."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def _entries(x: jax.Array) -> tuple[Any, ...]:
    """How each axis is sharded over explicit mesh axes; an array on no mesh is not sharded."""
    return (None,) * x.ndim if (spec := spec_of(x)) is None else tuple(spec)
