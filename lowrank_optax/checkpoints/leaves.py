"""Leaves of trees as a checkpoint sees them: by path, of a kind, and where they belong."""

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lowrank_optax._core.names import path_name

Number = np.ndarray | np.generic | bool | int | float | complex


class Kind(NamedTuple):
    """What a checkpoint says of a leaf, and compares with the target.

    Args:
        dtype: its dtype, of a typed key such as `key<fry>`.
        shape: its shape, of a typed key that of its words.
        impl: the implementation of a typed key, if it is known; empty for all else.

    Example:
        >>> str(Kind("float32", (6, 2)))
        'float32[6, 2]'
    """

    dtype: str
    shape: tuple[int, ...]
    impl: str = ""

    @classmethod
    def of(cls, name: str, leaf: Any, arrays: Any) -> "Kind":
        """Describes a leaf.

        Args:
            name: its path, for messages.
            leaf: the leaf.
            arrays: what types it may have besides those of numbers.

        Returns:
            Its kind.

        Raises:
            TypeError: it is of another type, or traced.
        """
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, arrays | Number):
            raise TypeError(
                f"{name} is a {type(leaf).__name__}; checkpoints hold arrays and numbers, outside"
                " of compiled functions. Leave it out of the tree."
            )
        if isinstance(leaf, Number):
            leaf = np.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return cls(str(leaf.dtype), tuple(leaf.shape))
        words = jax.eval_shape(jax.random.key_data, leaf)
        impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else ""
        return cls(str(leaf.dtype), tuple(words.shape), impl)

    @property
    def is_key(self) -> bool:
        """Whether it is a typed key."""
        return self.dtype.startswith("key<")

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def named(trees: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all leaves by path, in the order in which JAX flattens the trees.

    Raises:
        ValueError: two have the same path.

    Example:
        >>> named({"params": {"q.bias": 1.0}, "rngs": 2})
        {'params/q/bias': 1.0, 'rngs': 2}
    """
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        name = path_name(path)
        if name in found:
            raise ValueError(
                f"two leaves have the path {name}, in which keys are joined by `/` and dots count"
                " as `/`; rename one of them."
            )
        found[name] = leaf
    return found


def stored_form(leaf: Any) -> Any:
    """Makes of a leaf an array that orbax takes; orbax writes process 0's arrays of NumPy.

    Example:
        >>> import jax
        >>> stored_form(jax.random.key(7)).tolist()
        [0, 7]
    """
    if isinstance(leaf, Number):
        return np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jax.process_count() > 1 and leaf.is_fully_addressable:
        return np.asarray(leaf)
    return leaf


def require_equal_in_all_processes(stored: Mapping[str, Any]) -> None:
    """Raises, in all processes, if an array that each of them has for itself differs.

    Args:
        stored: arrays by path, of `stored_form`.

    Raises:
        ValueError: so it is; the message names the paths.
    """
    own = {name: leaf for name, leaf in stored.items() if isinstance(leaf, np.ndarray)}
    if jax.process_count() == 1 or not own:
        return
    sums = np.array([zlib.crc32(leaf.tobytes()) for leaf in own.values()], np.uint32)
    of_all = multihost_utils.process_allgather(sums)
    differ = [name for name, column in zip(own, of_all.T, strict=True) if len(set(column)) > 1]
    if differ:
        raise ValueError(
            f"{', '.join(differ)}: each process has another value, of which a checkpoint would keep"
            " one; make a global array of them (`jax.make_array_from_process_local_data`)."
        )


def loaded_form(kind: Kind, stored: Any) -> Any:
    """Undoes `stored_form`; empty arrays, which orbax does not take, are made.

    Example:
        >>> loaded_form(Kind("float32", (0, 2)), None).shape
        (0, 2)
    """
    if not kind.size:
        stored = np.zeros(kind.shape, np.uint32 if kind.is_key else jnp.dtype(kind.dtype))
    return jax.random.wrap_key_data(jnp.asarray(stored), impl=kind.impl) if kind.is_key else stored


def sharding_of(target: Any) -> Any:
    """Returns where a result belongs; None where JAX decides, or for what is not of JAX.

    Example:
        >>> import jax.numpy as jnp
        >>> sharding_of(jnp.ones(2)) is None  # it may go to any device
        True
    """
    if isinstance(target, jax.Array) and not target.committed:
        return None
    return getattr(target, "sharding", None)


def place(value: Any, target: Any, sharding: Any) -> Any:
    """Makes a leaf like its target of what was read.

    Args:
        value: an array.
        target: the target, of the same shape and dtype.
        sharding: of the target, from `sharding_of`.

    Returns:
        The leaf.

    Example:
        >>> import numpy as np
        >>> place(np.array(3), 1, None)
        3
    """
    if isinstance(target, np.ndarray):
        return value
    if isinstance(target, Number):
        return type(target)(value.item())
    if getattr(target, "weak_type", False):  # else sums with bfloat16 would have another dtype
        zero = value.dtype.type(0).item()
        weaken = lambda x: jnp.full(x.shape, zero).at[...].set(x)
        return jax.jit(weaken, out_shardings=sharding)(value)
    if sharding is None:
        return jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):  # which `device_put` keeps in a process
        wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(value))
        return jax.jit(wrap, out_shardings=sharding)(np.asarray(jax.random.key_data(value)))
    return jax.device_put(value, sharding)
