"""Partition specs of pairs, of what they carry, and of optimizer states."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from lowrank_optax._core.layouts import PairMatcher
from lowrank_optax._core.linalg import SIDES
from lowrank_optax._core.names import MAGNITUDE, join_keys
from lowrank_optax._core.pairing import PairLeaves, find_pairs
from lowrank_optax.sharding.placement import axis_size, mesh_of
from lowrank_optax.sharding.recipes import Recipe, entries


def partition_specs(
    params: Any, mesh: Mesh, recipe: Recipe, specs: Sequence[PairMatcher] | None = None
) -> Any:
    """Finds the partition spec of every leaf of a parameter tree.

    Args:
        params: arrays or shapes, pairs in any layout among them.
        mesh: the mesh.
        recipe: how base parameters are sharded.
        specs: layouts of the pairs (`PairSpec`).

    Returns:
        A tree of `PartitionSpec` shaped like the parameters.

    Raises:
        ValueError: a spec with axes that the mesh lacks, or that does not divide its leaf; pairs
            that do not fit (see `find_pairs`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> from lowrank_optax.sharding import tensor_parallel
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 8)))}
        >>> partition_specs(params, mesh, tensor_parallel(["up"]))
        {'up': LoRAPair(a=P(None, None), b=P(None, 'model'))}
    """
    pairing = find_pairs(params, specs)
    leaves = pairing.treedef.flatten_up_to(params)
    found: list[Any] = [None] * len(leaves)
    at = {path: index for index, path in enumerate(pairing.paths)}
    for pair in pairing.pairs:
        for role, spec in _pair_specs(pair, leaves, mesh, recipe).items():
            index = pair.leaves.get(role, at.get(join_keys(filter(None, [pair.path, role]))))
            if index is not None:
                found[index] = spec
    for index, (path, leaf) in enumerate(zip(pairing.paths, leaves, strict=True)):
        if found[index] is None:
            found[index] = recipe(path, tuple(leaf.shape), mesh)
        _check(path, tuple(leaf.shape), found[index], mesh)
    return jax.tree.unflatten(pairing.treedef, found)


def shard_model(
    params: Any, mesh: Mesh, recipe: Recipe, specs: Sequence[PairMatcher] | None = None
) -> Any:
    """Places the parameters of a model on a mesh.

    Args:
        params: a tree of arrays, or an NNX module, whose variables are arrays.
        mesh: the mesh, of Auto or Explicit axes, of one process or several.
        recipe: how base parameters are sharded.
        specs: layouts of the pairs (`PairSpec`).

    Returns:
        The tree, placed.

    Raises:
        ValueError: as `partition_specs`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> from lowrank_optax.sharding import tensor_parallel
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 8)))}
        >>> shard_model(params, mesh, tensor_parallel(["up"]))["up"].b.sharding.spec
        P(None, 'model')
    """
    found = partition_specs(params, mesh, recipe, specs)
    return jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), found))


def state_shardings(tx: optax.GradientTransformation, params: Any) -> Any:
    """Finds the sharding of every leaf of an optimizer's state from those of the parameters.

    Args:
        tx: any transformation whose `init` runs on an Explicit mesh.
        params: parameters on one mesh: arrays, or `ShapeDtypeStruct` with shardings.

    Returns:
        A tree of `NamedSharding` shaped like the state: for `jax.jit`, and for restoring a
        checkpoint in place.

    Raises:
        ValueError: parameters that are not on one mesh.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, altlora
        >>> from lowrank_optax.sharding import tensor_parallel
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 8)))}
        >>> params = shard_model(params, mesh, tensor_parallel(["up"]))
        >>> state_shardings(altlora(1e-3), params).pairs.mu["up"].b.spec
        P(None, 'model')
    """
    mesh = mesh_of(params)
    names = mesh.axis_names
    explicit = AbstractMesh(mesh.axis_sizes, names, axis_types=(AxisType.Explicit,) * len(names))

    def typed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(explicit, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(typed, params))
    spec = lambda leaf: jax.P() if leaf.sharding is None else leaf.sharding.spec
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), state)


def shard_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """Initializes an optimizer's state where it belongs; no device ever holds all of it.

    Args:
        tx: as in `state_shardings`.
        params: arrays on one mesh.

    Returns:
        The state.

    Raises:
        ValueError: parameters that are not on one mesh.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, altlora
        >>> from lowrank_optax.sharding import tensor_parallel
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 8)))}
        >>> params = shard_model(params, mesh, tensor_parallel(["up"]))
        >>> shard_state(altlora(1e-3), params).pairs.mu["up"].b.sharding.spec
        P(None, 'model')
    """
    with jax.set_mesh(mesh_of(params)):
        return jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)


def _pair_specs(
    pair: PairLeaves, leaves: Sequence[Any], mesh: Mesh, recipe: Recipe
) -> dict[str, jax.P]:
    """Shards a pair, and DoRA's magnitudes, like the kernel that the recipe is asked about."""
    shape_a, shape_b = pair.shapes(leaves)
    spec = recipe(pair.path, (*shape_a[:-1], shape_b[-1]), mesh)
    padded = (*spec, *[None] * (len(shape_a) - len(spec)))
    batch, sides = padded[:-2], {"in": padded[-2], "out": padded[-1]}
    result = {MAGNITUDE: jax.P(*batch, sides["out"])}
    for role, index in pair.leaves.items():
        ndim = len(leaves[index].shape)
        if role in SIDES:
            long = sides["in" if role == "a" else "out"]
            result[role] = pair.partition(role, ndim, batch, long)
        else:
            side, axis = pair.kind.long_axes().get(role, ("", 0))
            of_leaf = entries(ndim, {axis: sides[side]} if side else {})
            result[role] = jax.P(*batch, *of_leaf[len(batch) :])
    return result


def _check(path: str, shape: tuple[int, ...], spec: jax.P, mesh: Mesh) -> None:
    """Raises unless the spec fits leaf and mesh."""
    if len(spec) > len(shape):
        raise ValueError(f"{path}: {spec} has more entries than the shape {shape} has axes.")
    names = jax.tree.leaves(tuple(spec))
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: {spec} uses a mesh axis twice; use each once.")
    for size, entry in zip(shape, spec, strict=False):
        parts = math.prod(axis_size(path, name, mesh) for name in jax.tree.leaves(entry))
        if size % parts:
            raise ValueError(
                f"{path}: {parts} devices along {entry!r} do not divide an axis of {size} in"
                f" {shape}; pad the axis, replicate it (`P(None)`) or choose another mesh."
            )
