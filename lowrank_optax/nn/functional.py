"""The one place where an input meets LoRA factors, and the dense update that they stand for."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax._core import meshes
from lowrank_optax._core.nodes import AxisName
from lowrank_optax.nn.config import LoRAConfig
from lowrank_optax.nn.kernel_axes import KernelAxes


def lora_apply(
    x: jax.Array,
    pair: Any,
    scale: float = 1.0,
    dtype: DTypeLike | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    r"""Applies a LoRA pair to an input without forming the dense kernel.

    $$y = s \cdot (x\,a)\,b$$

    Both products accumulate in at least float32. The scale is applied to the narrow `x @ a`.
    Leading axes of the factors are batch axes and broadcast as in `jax.numpy.matmul`.

    Args:
        x: input, (..., in). Not a floating dtype: taken as the dtype of `pair.a`.
        pair: the factors, `a` (..., in, r) and `b` (..., r, out), of any floating dtype. With
            shadows, the backward pass also returns the products of the full gradient that OPLoRA
            needs. They are of degree 2 and more in the gradient, so they are right only if the
            pair is applied once in one backward pass. With
            frames, the gradients of the factors flow through these, as SDS-LoRA has it.
        scale: forward scale s.
        dtype: dtype of the two products' operands; None means the dtype of `x`.
        axis_name: for pairs with shadows inside `pmap`, or `shard_map` with `check_vma=False`: the
            axes over which the tokens are spread, each device's loss being the mean over its own.
            The gradients of the pair are then those of the mean loss on every device. Where
            `shard_map` checks, it is not needed. Other pairs ignore it: their gradients are linear
            and can be averaged afterwards.

    Returns:
        y, (..., out), in the dtype of `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> pair = LoRAPair(a=jnp.ones((3, 1)), b=jnp.ones((1, 2)))
        >>> lora_apply(jnp.ones((1, 3)), pair, scale=2.0)
        Array([[6., 6.]], dtype=float32)

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(pair.a.dtype)  # casting the factors to an integer dtype would zero them
    operand = x.dtype if dtype is None else jnp.dtype(dtype)
    return pair.apply(x.astype(operand), scale, axis_name).astype(x.dtype)


def apply_adapter(config: LoRAConfig) -> Callable[[jax.Array, Any], jax.Array]:
    """Returns `lora_apply` with the settings of an adapter: a function of an input and a pair.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> apply = apply_adapter(LoRAConfig(rank=1, alpha=3.0))
        >>> apply(jnp.ones(2), LoRAPair(jnp.ones((2, 1)), jnp.ones((1, 1)))).item()
        6.0
    """
    return lambda x, pair: lora_apply(x, pair, config.scale, config.dtype, config.axis_name)


def add_adapter(
    y: jax.Array,
    x: jax.Array,
    pair: Any,
    config: LoRAConfig,
    use: Any,
    kernel_shape: Sequence[int],
) -> jax.Array:
    """Adds what an adapter makes of a layer's input to the layer's output.

    Args:
        y: the layer's output.
        x: its input, after the adapter's dropout.
        pair: the flat factors.
        config: the adapter's settings.
        use: how the layer uses its kernel: a `Contraction`, a `Convolution` or a `Lookup`.
        kernel_shape: shape of the kernel.

    Returns:
        The sum, in the shape and dtype of `y`, and sharded like it on an Explicit mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> from lowrank_optax.nn import Contraction
        >>> pair = LoRAPair(jnp.ones((3, 1)), jnp.ones((1, 4)))
        >>> by_heads = Contraction.from_einsum("td,dnh->tnh")
        >>> x, y, config = jnp.ones((5, 3)), jnp.zeros((5, 2, 2)), LoRAConfig(rank=1, alpha=2.0)
        >>> add_adapter(y, x, pair, config, by_heads, (3, 2, 2))[0]
        Array([[6., 6.],
               [6., 6.]], dtype=float32)
    """
    delta = use.adapt(apply_adapter(config), x, pair, y.dtype, kernel_shape)
    return y + meshes.reshard_like(delta, y)


def lora_delta(pair: Any, scale: float = 1.0) -> jax.Array:
    r"""Forms the dense kernel update that a LoRA pair stands for.

    $$\Delta K = s \cdot a\,b$$

    Computed at the highest matmul precision, because the result is meant to be added to a kernel.

    Args:
        pair: any kind of pair, `a` (..., in, r) and `b` (..., r, out), of any floating dtype.
        scale: forward scale s.

    Returns:
        The update, (..., in, out), in at least float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> lora_delta(LoRAPair(a=jnp.ones((3, 1)), b=jnp.ones((1, 2))), scale=0.5)
        Array([[0.5, 0.5],
               [0.5, 0.5],
               [0.5, 0.5]], dtype=float32)

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
    """
    pair = pair.plain()
    dtype = jnp.promote_types(jnp.result_type(pair.a, pair.b), jnp.float32)
    product = jnp.matmul(
        pair.a.astype(dtype), pair.b.astype(dtype), precision=jax.lax.Precision.HIGHEST
    )
    return scale * product


def merge_kernel(
    kernel: jax.Array,
    pair: Any,
    scale: float,
    axes: KernelAxes,
) -> jax.Array:
    r"""Folds a LoRA pair into a kernel of any layout.

    $$K + s \cdot a\,b$$

    Args:
        kernel: base kernel, with the axes that `axes` describes last.
        pair: any kind of pair with the flat factors of that kernel.
        scale: forward scale s; its negative takes the update out again.
        axes: the roles of the kernel's axes.

    Returns:
        The sum, formed in at least float32 and rounded to the kernel's dtype.

    Raises:
        ValueError: if the factors do not fit the kernel, or its dtype cannot hold the sum.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> pair = LoRAPair(a=jnp.ones((3, 1)), b=jnp.ones((1, 4)))
        >>> kernel = jnp.zeros((3, 2, 2), jnp.bfloat16)
        >>> merge_kernel(kernel, pair, 0.5, KernelAxes.in_order(0, 1, 2))[0]
        Array([[0.5, 0.5],
               [0.5, 0.5]], dtype=bfloat16)
    """
    if reason := why_not_mergeable(kernel.dtype):
        raise ValueError(reason)
    delta = axes.from_matrix(lora_delta(pair, scale), kernel.shape)
    wide = jnp.promote_types(kernel.dtype, delta.dtype)
    return (kernel.astype(wide) + delta.astype(wide)).astype(kernel.dtype)


def why_not_mergeable(dtype: DTypeLike) -> str:
    """Says why an update cannot be added to a kernel of this dtype; empty if it can.

    Args:
        dtype: the kernel's.

    Returns:
        The reason with the remedy, as a sentence without the kernel's name.

    Example:
        >>> why_not_mergeable("bfloat16")
        ''
        >>> why_not_mergeable("int8")[:40]
        'a kernel of int8 cannot hold the sum wit'
    """
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16:
        return ""
    return (
        f"a kernel of {dtype} cannot hold the sum with its adapter: rounding to it would lose the"
        " adapter, and its scales belong to the layer. Dequantize the kernel to bfloat16 or float32"
        " first, or keep the adapter beside it, unmerged"
    )
