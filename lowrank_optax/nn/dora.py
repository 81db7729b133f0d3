r"""DoRA: the columns of a kernel as magnitudes and directions (arXiv 2402.09353).

$$y = x \left( \frac{m}{\|V\|} \circ V \right) + \mathrm{bias}, \qquad V = K + s\,a\,b$$

$\|V\|$ are the norms of the columns of V, one for each output. The magnitudes m are trained. They
start as the norms of K, so that an adapted model starts as the base model.

The norms are constants of the backward pass, as in the paper (section 4.3) and in PEFT. Let G be
the gradient in V: that of the whole kernel, its columns times m / ‖V‖. Then the gradients of the
factors are s G bᵀ and s aᵀ G, as for a kernel without magnitudes: every method for pairs moves the
direction V as it would move K + s a b. The magnitudes are no pair, so an optimizer's fallback
trains them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core import meshes
from lowrank_optax._core.linalg import compute_dtype, gram, mix, transposed, widened
from lowrank_optax.nn.config import LoRAConfig
from lowrank_optax.nn.functional import apply_adapter, merge_kernel, why_not_mergeable
from lowrank_optax.nn.kernel_axes import KernelAxes


def column_norms(kernel: jax.Array, pair: Any, scale: float, axes: KernelAxes) -> jax.Array:
    """Computes the norms of the columns of K + s a b, without forming it.

    Args:
        kernel: K, of any layout.
        pair: any kind of pair with the flat factors.
        scale: s.
        axes: the roles of the kernel's axes.

    Returns:
        (batch..., out), in at least float32; exactly the norms of K where a b is zero, and at least
        √ε of them, with the rounding unit ε, where s a b cancels K.

    Example:
        >>> from lowrank_optax import LoRAPair
        >>> pair = LoRAPair(jnp.ones((2, 1)), jnp.array([[0.0, 1.0]]))
        >>> column_norms(jnp.eye(2), pair, 2.0, KernelAxes.in_order(0, 1, 1)).tolist()
        [1.0, 3.605551242828369]
    """
    a, b = pair.plain()
    dtype = compute_dtype(a, b, kernel)
    k, a, b = (x.astype(dtype) for x in (axes.to_matrix(kernel), a, b))
    of_kernel = jnp.sum(k * k, axis=-2)
    with jax.default_matmul_precision("highest"):
        rows = meshes.matmul(transposed(a), k, dtype)
    b = meshes.reshard_like(b, rows)
    across = jnp.sum(rows * b, axis=-2)
    of_update = jnp.sum(b * mix("b", b, gram("a", a)), axis=-2)
    squares = of_kernel + scale * (2 * across + scale * of_update)
    # Where s a b cancels K, what is left of these sums is their rounding.
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(dtype).eps * of_kernel))


def _norms(matrix: jax.Array) -> jax.Array:
    """The norms of the columns of matrices (..., in, out)."""
    return jnp.sqrt(jnp.sum(matrix * matrix, axis=-2))


def require_for_dora(layer: Any, linear: tuple[type, ...], path: str) -> None:
    """Refuses a layer that is not known to be linear in its kernel, but for its bias.

    Args:
        layer: the layer.
        linear: the kinds that are, and subclasses of them with the same `__call__`.
        path: its path, for the message.

    Raises:
        ValueError: it is of another kind.

    Example:
        >>> from flax import nnx
        >>> require_for_dora(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), (nnx.Linear,), "q")
    """
    if not any(type(layer).__call__ is kind.__call__ for kind in linear):
        names = ", ".join(kind.__name__ for kind in linear if kind.__module__.startswith("flax"))
        raise ValueError(
            f"{path}: DoRA adapts {names} of Flax, and this is a {type(layer).__name__}, or has its"
            " own __call__; adapt it without `dora`"
        )


def initial_magnitudes(kernel: jax.Array, axes: KernelAxes, path: str) -> jax.Array:
    """Computes the norms of a kernel's columns, from which the magnitudes start.

    Raises:
        ValueError: a kernel that is not floating, or has no numbers yet, or a column of zeros,
            which has no direction. Where it is traced, a column of zeros is not seen.

    Example:
        >>> initial_magnitudes(2 * jnp.eye(2), KernelAxes.in_order(0, 1, 1), "q").tolist()
        [2.0, 2.0]
    """
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{path}: DoRA needs the norms of the kernel's columns, and the kernel has no numbers"
            " yet; restore the weights first"
        )
    if why_not_mergeable(kernel.dtype):
        raise ValueError(
            f"{path}: DoRA needs the norms of the kernel's columns, and the kernel is of"
            f" {kernel.dtype}; adapt it without `dora`"
        )
    norms = _norms(widened(axes.to_matrix(kernel)))
    if not isinstance(norms, jax.core.Tracer) and (zeros := int(jnp.sum(norms == 0))):
        raise ValueError(
            f"{path}: {zeros} of the {norms.size} columns of its kernel are zero, and a zero column"
            " has no direction; adapt it without `dora`"
        )
    return norms


def merge_directional_kernel(
    kernel: jax.Array, pair: Any, magnitude: jax.Array, scale: float, axes: KernelAxes
) -> jax.Array:
    r"""Forms the kernel that a layer with DoRA stands for, m / ‖V‖ ∘ V.

    Args:
        kernel: K, of any layout.
        pair: any kind of pair with the flat factors.
        magnitude: m, (batch..., out).
        scale: s.
        axes: the roles of the kernel's axes.

    Returns:
        The kernel, formed in at least float32 and rounded to the dtype of K.

    Raises:
        ValueError: if the factors do not fit the kernel, or its dtype cannot hold the sum.

    Example:
        >>> from lowrank_optax import LoRAPair
        >>> pair = LoRAPair(jnp.zeros((2, 1)), jnp.zeros((1, 2)))
        >>> axes = KernelAxes.in_order(0, 1, 1)
        >>> merge_directional_kernel(jnp.eye(2), pair, jnp.array([1.0, 3.0]), 2.0, axes).tolist()
        [[1.0, 0.0], [0.0, 3.0]]
    """
    wide = widened(kernel) if not why_not_mergeable(kernel.dtype) else kernel
    columns = axes.to_matrix(merge_kernel(wide, pair, scale, axes))
    columns *= (magnitude / _norms(columns))[..., None, :]
    return axes.from_matrix(columns, kernel.shape).astype(kernel.dtype)


def add_directional_adapter(
    y: jax.Array,
    x: jax.Array,
    pair: Any,
    magnitude: jax.Array,
    config: LoRAConfig,
    use: Any,
    kernel: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """Makes the output of a layer with DoRA of that of its base layer.

    Args:
        y: the base layer's output.
        x: its input, after the adapter's dropout.
        pair: the flat factors.
        magnitude: m, (batch..., out).
        config: the adapter's settings.
        use: how the layer uses its kernel.
        kernel: K.
        bias: the layer's bias, which is not scaled.

    Returns:
        The output, in the shape and dtype of `y`; `y` itself where m = ‖V‖ and b = 0, up to how a
        compiled program rounds the norms.

    Example:
        >>> from lowrank_optax import LoRAPair
        >>> from lowrank_optax.nn import Contraction
        >>> x, kernel = jnp.ones((1, 2)), jnp.eye(2)
        >>> pair = LoRAPair(jnp.ones((2, 1)), jnp.zeros((1, 2)))
        >>> use = Contraction.from_einsum("bi,io->bo")
        >>> args = pair, jnp.array([1.0, 3.0]), LoRAConfig(rank=1), use, kernel, None
        >>> add_directional_adapter(x @ kernel, x, *args).tolist()
        [[1.0, 3.0]]
    """
    norms = jax.lax.stop_gradient(column_norms(kernel, pair, config.scale, use.kernel_axes))
    wide = jnp.promote_types(y.dtype, norms.dtype)

    def spread(columns: jax.Array) -> jax.Array:
        """Lays (batch..., out) out as the layer's output."""

        def over_tokens(flat: jax.Array, _: Any) -> jax.Array:
            rows = columns[..., None, :] if columns.ndim > 1 else columns
            return jnp.broadcast_to(rows, (*flat.shape[:-1], columns.shape[-1]))

        return meshes.reshard_like(use.adapt(over_tokens, x, pair, y.dtype, kernel.shape), y)

    # A column of zeros that was not seen when it was made stays finite.
    ratio = jnp.where(norms > 0, magnitude / jnp.where(norms > 0, norms, 1), 1)
    ratio = spread(ratio.astype(wide))
    linear = y.astype(wide)
    if bias is not None:
        linear -= spread(use.flatten_bias(bias, kernel.shape).astype(wide))
    delta = use.adapt(apply_adapter(config), x, pair, y.dtype, kernel.shape)
    delta = meshes.reshard_like(delta, y).astype(wide)
    return (y + (ratio - 1) * linear + ratio * delta).astype(y.dtype)
