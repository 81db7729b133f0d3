"""Embeddings as LoRA sees them: a kernel that meets one-hot inputs.

The table of n embeddings is a kernel (n, d), and an adapter of it a pair like any other. A one-hot
input picks a row of the kernel, so it picks a row of a: the inputs are never formed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax._core import meshes
from lowrank_optax._core.nodes import LoRAPair
from lowrank_optax.nn.config import LoRAConfig, Shadows
from lowrank_optax.nn.kernel_axes import KernelAxes


@dataclasses.dataclass(frozen=True)
class Lookup:
    """How an embedding layer uses its table, (n, d).

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax.nn import lora_apply
        >>> pair = LoRAPair(jnp.arange(3.0)[:, None], jnp.ones((1, 2)))
        >>> Lookup().adapt(lora_apply, jnp.array([2, 0]), pair, jnp.float32, (3, 2)).tolist()
        [[2.0, 2.0], [0.0, 0.0]]
    """

    @property
    def kernel_axes(self) -> KernelAxes:
        """The roles of the table's axes."""
        return KernelAxes.in_order(0, 1, 1)

    def adapt(
        self,
        apply: Callable[[jax.Array, Any], jax.Array],
        x: jax.Array,
        pair: Any,
        dtype: DTypeLike,
        kernel_shape: Sequence[int],
    ) -> jax.Array:
        """Applies a pair of flat factors to the tokens x, integers; see `Contraction.adapt`.

        A token out of range gives NaN, as in the layer itself.
        """
        tokens = jnp.zeros_like(x) if kernel_shape[-2] == 1 else x
        by_token = {name for name, axis in pair.long_axes().items() if axis[0] == "in"} | {"a"}
        rows = {
            name: meshes.take_rows(getattr(pair, name), tokens)[..., None, :] for name in by_token
        }
        return apply(jnp.ones((*x.shape, 1, 1), dtype), pair._replace(**rows))[..., 0, :]


def attend(apply: Callable[[jax.Array, Any], jax.Array], query: jax.Array, pair: Any) -> jax.Array:
    """Applies a pair of flat factors where an embedding layer attends, x Eᵀ.

    Args:
        apply: what a pair makes of an input (..., d), (..., n).
        query: x, (..., d).
        pair: the flat factors of the table E, (n, r) and (r, d).

    Returns:
        What is to be added to the layer's output, (..., n).

    Raises:
        ValueError: the pair has more than its factors.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax.nn import lora_apply
        >>> pair = LoRAPair(jnp.arange(3.0)[:, None], jnp.ones((1, 2)))
        >>> attend(lora_apply, jnp.ones(2), pair).tolist()
        [0.0, 2.0, 4.0]
    """
    if not isinstance(pair, LoRAPair):
        raise ValueError(
            f"an embedding that attends needs a plain pair, and has a {type(pair).__name__}; leave"
            " `extra` out of its LoRAConfig"
        )
    return apply(query, LoRAPair(pair.b.T, pair.a.T))


def require_for_lookup(config: LoRAConfig, path: str) -> None:
    """Refuses settings that an embedding cannot have.

    Raises:
        ValueError: dropout, or shadows.

    Example:
        >>> require_for_lookup(LoRAConfig(rank=2), "embed")
    """
    if config.dropout:
        raise ValueError(
            f"{path}: dropout acts on an adapter's input, and the input of an embedding is tokens;"
            " give its adapter a LoRAConfig without dropout"
        )
    if isinstance(config.extra, Shadows):
        raise ValueError(
            f"{path}: shadows need products with the layer's input, which an embedding never forms;"
            " leave it out of the targets, or adapt it without shadows"
        )
