"""The layers of Flax NNX that LoRA can adapt, and how each uses its kernel."""

from typing import Any

import jax
from flax import nnx

from lowrank_optax.nn.contraction import Contraction
from lowrank_optax.nn.convolution import Convolution
from lowrank_optax.nn.kernel_axes import KernelAxes
from lowrank_optax.nn.lookup import Lookup

# The layers whose output is x K + bias, and no more.
LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv)

KernelUse = Contraction | Convolution | Lookup

_KERNEL_NAMES: dict[type, str] = {
    nnx.Linear: "kernel",
    nnx.LinearGeneral: "kernel",
    nnx.Einsum: "kernel",
    nnx.Conv: "kernel",
    nnx.Embed: "embedding",
}
SUPPORTED = (
    "nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.Embed and modules with an"
    " `einsum_str` and one kernel"
)


def kernel_name(module: Any) -> str | None:
    """Names the attribute of a module that holds the kernel to adapt.

    Args:
        module: any module.

    Returns:
        That of Flax's layers. Of another module with a string `einsum_str`, the input first, the
        one parameter that can be its kernel: `Contraction.kernel_among`. Else None.

    Example:
        >>> kernel_name(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        'kernel'
    """
    for kind, name in _KERNEL_NAMES.items():
        if isinstance(module, kind):
            return name
    einsum_str = getattr(module, "einsum_str", None)
    if not (isinstance(module, nnx.Module) and isinstance(einsum_str, str)):
        return None
    try:
        contraction = Contraction.from_einsum(einsum_str)
    except ValueError:
        return None
    params = [(name, x) for name, x in vars(module).items() if isinstance(x, nnx.Param)]
    shapes = {name: x.shape for name, x in params if hasattr(x.get_value(), "shape")}
    found = contraction.kernel_among(shapes, stacked=True)
    return found[0] if len(found) == 1 else None


def kernel_of(base: Any) -> nnx.Variable[Any]:
    """Returns the variable that holds the kernel of a layer; see `kernel_name`.

    Example:
        >>> kernel_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).shape
        (2, 3)
    """
    return getattr(base, kernel_name(base) or "kernel")


def bias_of(base: Any) -> jax.Array | None:
    """Returns the bias of a layer of Flax, None if it has none.

    Example:
        >>> bias_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).shape
        (3,)
    """
    return None if base.bias is None else base.bias[...]


def kernel_axes_of(base: Any) -> KernelAxes:
    """Returns the roles of a layer's kernel axes.

    Example:
        >>> kernel_axes_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        KernelAxes(batch=(), contracted=(-2,), out=(-1,))
    """
    if isinstance(base, nnx.LinearGeneral):  # its axes depend on no input
        return KernelAxes.in_order(
            len(base.batch_axis), len(base.in_features), len(base.out_features)
        )
    return kernel_use(base, 1).kernel_axes


def kernel_use(base: Any, ndim: int, einsum_str: str | None = None) -> KernelUse:
    """Says how a layer uses its kernel.

    Args:
        base: the layer.
        ndim: number of axes of its input.
        einsum_str: the string that an einsum layer is called with, if any.

    Returns:
        The use.

    Raises:
        ValueError: it is none that LoRA can adapt.

    Example:
        >>> print(kernel_use(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ndim=2))
        'x0x1,x1o0->x0o0'
    """
    if isinstance(base, nnx.Conv):
        return Convolution.of(base)
    if isinstance(base, nnx.Embed):
        return Lookup()
    if isinstance(base, nnx.Linear):
        return Contraction.from_dense_general(ndim, (-1,), (), 1)
    if isinstance(base, nnx.LinearGeneral):
        return Contraction.from_dense_general(
            ndim, base.axis, tuple(base.batch_axis), len(base.out_features)
        )
    return Contraction.from_einsum(base.einsum_str if einsum_str is None else einsum_str)
