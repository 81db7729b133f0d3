"""Recipes: how the base parameters of a model are sharded.

A recipe maps path, shape and mesh to a `PartitionSpec`. It is asked about a pair as about the
kernel (batch..., in, out) at the pair's path.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank_optax._core.names import path_name
from lowrank_optax.sharding.placement import axis_size, sharding_of

Recipe = Callable[[str, tuple[int, ...], Mesh], jax.P]


def data_parallel() -> Recipe:
    """Replicates every parameter: each device sees its own examples.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> data_parallel()("q/kernel", (6, 4), mesh)
        P()
    """
    return lambda path, shape, mesh: jax.P()


def fsdp(axis: str = "data", *, within: Recipe | None = None, min_size: int = 2**14) -> Recipe:
    """Shards every kernel along its in axis, or out axis where only that is free and divides.

    Args:
        axis: the mesh axis.
        within: a recipe for other mesh axes, as `tensor_parallel`, which has the first choice
            of each kernel's axes.
        min_size: what has fewer entries is left as `within` has it.

    Returns:
        The recipe. Pairs are sharded like their kernels: without `within` one of the two factors is
        sharded, with it often both.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> fsdp(min_size=0)("q/kernel", (6, 4), mesh)
        P('data', None)
        >>> fsdp(within=tensor_parallel(["up"], ["down"]), min_size=0)("down/kernel", (8, 6), mesh)
        P('model', 'data')
    """

    def recipe(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.P:
        spec = jax.P() if within is None else within(path, shape, mesh)
        if len(shape) < 2 or math.prod(shape) < min_size:
            return spec
        size = axis_size(path, axis, mesh)
        entries = [*spec, *[None] * (len(shape) - len(spec))]
        for position in (-2, -1):
            if entries[position] is None and shape[position] % size == 0:
                entries[position] = axis
                return jax.P(*entries)
        return spec

    return recipe


def tensor_parallel(
    columns: Sequence[str] = (), rows: Sequence[str] = (), *, axis: str = "model"
) -> Recipe:
    """Shards kernels of named layers along out (columns) or in (rows), as Megatron does.

    Args:
        columns: a list of regular expressions, searched in a parameter's path: layers that come
            first, as `["q_proj|up_proj"]`; their biases are sharded too.
        rows: layers whose input is the output of the first ones, as `["o_proj|down_proj"]`. Kernels
            with an axis of heads need `heads` around this.
        axis: the mesh axis.

    Returns:
        The recipe; parameters that no expression fits are replicated.

    Raises:
        TypeError: one expression in place of a list.
        ValueError: from the recipe, a path that fits both.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> recipe = tensor_parallel(["up"], ["down"])
        >>> recipe("mlp/up/kernel", (6, 8), mesh), recipe("mlp/down/kernel", (8, 6), mesh)
        (P(None, 'model'), P('model', None))
    """
    for name, patterns in (("columns", columns), ("rows", rows)):
        if isinstance(patterns, str):
            raise TypeError(f"`{name}` must be a list of expressions; write [{patterns!r}].")

    def recipe(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.P:
        is_column = any(re.search(pattern, path) for pattern in columns)
        is_row = any(re.search(pattern, path) for pattern in rows)
        if is_column and is_row:
            raise ValueError(f"{path}: fits both `columns` and `rows`; make one more specific.")
        if is_column and shape:
            return jax.P(*entries(len(shape), {-1: axis}))
        if is_row and len(shape) > 1:
            return jax.P(*entries(len(shape), {-2: axis}))
        return jax.P()

    return recipe


def heads(
    recipe: Recipe,
    columns: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    rows: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> Recipe:
    """Shards attention layers by whole heads: kernels of three axes, and their pairs likewise.

    The recipe is asked about a kernel that has one entry for each head, (..., in, heads) or
    (..., heads, out). What it says of these holds for the axis of heads, or for the in or out axis
    of a pair; head_dim is never sharded.

    Args:
        recipe: of kernels with an in and an out axis.
        columns: regular expressions as of `tensor_parallel`, with heads and head_dim of the layers:
            kernels (..., in, heads, head_dim), biases (..., heads, head_dim).
        rows: the same of layers with kernels (..., heads, head_dim, out).

    Returns:
        The recipe.

    Raises:
        ValueError: from the recipe, a kernel of other heads, or a path that fits twice.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> megatron = tensor_parallel(["query"], ["out"])
        >>> recipe = heads(megatron, {"query": (4, 2)}, {"out": (4, 2)})
        >>> recipe("query/kernel", (6, 4, 2), mesh), recipe("query", (6, 8), mesh)
        (P(None, 'model', None), P(None, 'model'))
        >>> recipe("out/kernel", (4, 2, 6), mesh), recipe("out", (8, 6), mesh)
        (P('model', None, None), P('model', None))
    """
    layers = [
        (*item, after) for after, named in enumerate((columns, rows)) for item in named.items()
    ]

    def sharded(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.P:
        fitting = [layer for layer in layers if re.search(layer[0], path)]
        if len(fitting) > 1:
            patterns = " and ".join(repr(pattern) for pattern, *_ in fitting)
            raise ValueError(f"{path}: fits {patterns} of `heads`; make one more specific.")
        for _, (number, size), after in fitting:
            until = shape[: len(shape) - after]  # the axes up to the heads
            own = 2 if until[-2:] == (number, size) else int(until[-1:] == (number * size,))
            if own:
                before = until[: len(until) - own]
                spec = recipe(path, (*before, number, *shape[len(until) :]), mesh)
                whole = [*spec, *[None] * (len(before) + 1 + after - len(spec))]
                whole[len(before) + 1 : len(before) + 1] = [None] * (own - 1)
                return jax.P(*whole)
            if len(shape) > 2:
                raise ValueError(
                    f"{path}: a shape of {shape} has no {number} heads of {size} at its"
                    f" {'in' if after else 'out'} axis; correct what `heads` was given."
                )
        return recipe(path, shape, mesh)

    return sharded


def stacked(recipe: Recipe, axis: str) -> Recipe:
    """Shards the leading axis of stacked layers, and the others by a recipe.

    Args:
        recipe: of a single layer's parameters.
        axis: the mesh axis of the layers. Parameters of two axes are taken for single layers.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1, 1), ("layer", "model"))
        >>> stacked(tensor_parallel(["up"]), "layer")("up/kernel", (12, 6, 8), mesh)
        P('layer', None, 'model')
    """

    def sharded(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.P:
        spec = recipe(path, shape, mesh)
        entries = [*spec, *[None] * (len(shape) - len(spec))]
        return jax.P(axis, *entries[1:]) if len(shape) > 2 else spec

    return sharded


def as_kernels(
    params: Any,
    kernel_of: Callable[[str], Sequence[str]] = lambda pair: (
        f"{pair}/kernel",
        f"{pair}/base/kernel",
        f"{pair}/weight",
        pair,
    ),
) -> Recipe:
    """Keeps the sharding of base parameters that are placed, and shards pairs like their kernels.

    Args:
        params: the parameters, base kernels among them: arrays or `ShapeDtypeStruct` on
            a mesh.
        kernel_of: the paths at which a pair's kernel may be, by the pair's path.

    Returns:
        The recipe.

    Raises:
        ValueError: from the recipe, a pair whose kernel is not found, or whose kernel's axes make
            no in and out axes of the pair's sizes that are sharded as a whole.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> place = jax.NamedSharding(mesh, jax.P(None, "model", None))
        >>> heads = {"q": {"kernel": jax.device_put(jnp.ones((6, 2, 4)), place)}}
        >>> as_kernels(heads)("q", (6, 8), mesh)
        P(None, 'model')
    """
    leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}

    def recipe(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.P:
        candidates = [name for name in (path, *kernel_of(path)) if name in leaves]
        if not candidates:
            raise ValueError(
                f"{path}: no kernel found at {', '.join(kernel_of(path))}; say where it is by"
                " `kernel_of`."
            )
        kernel = leaves[candidates[0]]
        spec = sharding_of(candidates[0], kernel).spec
        entries = [*spec, *[None] * (kernel.ndim - len(spec))]
        if tuple(kernel.shape) == shape:
            return jax.P(*entries)
        batch = len(shape) - 2
        for stop in range(batch + 1, kernel.ndim):
            groups = (batch, stop), (stop, kernel.ndim)
            sizes = tuple(math.prod(kernel.shape[i:j]) for i, j in groups)
            if (*kernel.shape[:batch], *sizes) == shape:
                flat = [_flattened(candidates[0], entries[i:j]) for i, j in groups]
                return jax.P(*entries[:batch], *flat)
        raise ValueError(
            f"{path}: a kernel of shape {tuple(kernel.shape)} does not make {shape}; say which"
            " kernel is meant by `kernel_of`."
        )

    return recipe


def entries(ndim: int, named: dict[int, Any]) -> list[Any]:
    """Returns the entries of a `PartitionSpec` that names some axes.

    Example:
        >>> entries(3, {-1: "model"})
        [None, None, 'model']
    """
    result: list[Any] = [None] * ndim
    for axis, name in named.items():
        result[axis] = name
    return result


def _flattened(path: str, entries: Sequence[Any]) -> Any:
    """The entry of several axes made one."""
    if any(entry is not None for entry in entries[1:]):
        raise ValueError(
            f"{path}: sharded as {jax.P(*entries)} over axes that a factor has as one; only the"
            " first of them can be sharded. Shard heads rather than what is in a head."
        )
    return entries[0]
