"""Where arrays are on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from lowrank_optax._core.names import path_name


def mesh_of(params: Any) -> Any:
    """Returns the one mesh that all leaves are on.

    Raises:
        ValueError: a leaf that is on no mesh or on another one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> mesh_of({"w": jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, jax.P()))}) == mesh
        True
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    meshes = {path: sharding_of(path, leaf).mesh for path, leaf in leaves.items()}
    if not meshes:
        raise ValueError("no parameters: there is no leaf to read a mesh from.")
    first, mesh = next(iter(meshes.items()))
    for path, here in meshes.items():
        if here != mesh:
            raise ValueError(
                f"{path} is on {here}, {first} on {mesh}: place all parameters on one mesh"
                " (`shard_model`)."
            )
    return mesh


def sharding_of(path: str, leaf: Any) -> NamedSharding:
    """Returns the sharding of a leaf on a mesh.

    Raises:
        ValueError: it is on no mesh.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> place = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P())
        >>> sharding_of("w", jax.device_put(jnp.ones(2), place)).spec
        P()
    """
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"{path}: is on no mesh ({sharding}); place it first (`shard_model`).")
    return sharding


def axis_size(path: str, name: Any, mesh: Mesh) -> int:
    """Returns how many devices a mesh has along an axis.

    Raises:
        ValueError: it has no such axis.

    Example:
        >>> import jax
        >>> axis_size("w", "data", jax.make_mesh((1,), ("data",)))
        1
    """
    if name not in mesh.shape:
        raise ValueError(
            f"{path}: the mesh has no axis {name!r}; use one of {', '.join(map(repr, mesh.shape))}."
        )
    return mesh.shape[name]
