"""LoRA layers for Flax NNX.

`LoRALayer` wraps an `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`, or an einsum layer of another
library: a module with an attribute `einsum_str` and one kernel. `LoRALinear`, `LoRALinearGeneral`
and `LoRAEinsum` build the layer that they wrap. The base weights stay frozen because one trains
with respect to `nnx.LoRAParam` only:

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
    optimizer.update(model, grads)

`nnx.LoRAParam` is a subclass of `nnx.Param`: `wrt=nnx.Param` selects factors *and* kernels.

A layer built with `LoRAConfig(rank, extra=Shadows())` is ready for `oplora` as `tx`.

Layers may be built inside `nnx.vmap` (factors then are (layers, in, r) and (layers, r, out)), and
a layer whose kernel is already stacked along leading axes may be wrapped: the factors get the same
leading axes. Stacks along other axes than the leading ones are not supported.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from lowrank_optax._core.layouts import node_of, variables_of
from lowrank_optax.nn.calls import read_call, require_array
from lowrank_optax.nn.config import LoRAConfig, require_config
from lowrank_optax.nn.contraction import Contraction, KernelAxes
from lowrank_optax.nn.functional import add_adapter

# What a model finds in the place of a base layer's own.
_FLAGS = ("corrected", "merged")
OWN_NAMES = ("axes", "base", *_FLAGS, "dropout", "lora", "lora_a", "lora_b", "pair", "scale")

_FlaxLayer = nnx.Linear | nnx.LinearGeneral | nnx.Einsum


class LoRALayer(nnx.Module):
    r"""A linear layer with a trainable low-rank adapter beside its frozen kernel.

    $$y = \mathrm{base}(x) + s\,(x\,a)\,b$$

    Args:
        base: the layer to adapt. It is kept, not copied, as attribute `base`.
        lora: settings of the adapter.
        rngs: the `params` stream draws the factors; the `dropout` stream is used if
            `lora.dropout` is positive.
        path: name of the layer in error messages.

    Attributes:
        base: the wrapped layer.
        lora: the settings.
        axes: roles of the base kernel's axes; *in* and *out* below are the flattened ones.
        lora_a: `nnx.LoRAParam`, (stacked..., batch..., in, r).
        lora_b: `nnx.LoRAParam`, (stacked..., batch..., r, out).
        lora_m_a, lora_f_in, …: `nnx.LoRAParam`, what `lora.extra` adds; a layer without it lacks
            the attributes.
        dropout: `nnx.Dropout` on the adapter's input, or None.
        merged: whether the kernel already contains the update; the adapter is then skipped.
        corrected: whether a start has subtracted s·a·b from the kernel.

    Raises:
        ValueError: if the base is not a supported layer, has an adapter already, or its kernel is
            too small for the rank.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> base = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
        >>> layer = LoRALayer(base, LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> layer.lora_a.shape, layer.lora_b.shape
        ((4, 2), (2, 6))
        >>> bool((layer(jnp.ones((1, 4))) == base(jnp.ones((1, 4)))).all())
        True

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
    """

    lora_a: nnx.LoRAParam
    lora_b: nnx.LoRAParam

    def __init__(
        self, base: nnx.Module, lora: LoRAConfig, *, rngs: nnx.Rngs, path: str = "LoRALayer"
    ):
        require_supported(base, path)
        require_config(lora)
        require_rngs(rngs)
        self.axes = _kernel_axes(base)
        shape = kernel_of(base).shape
        batch, n_in, n_out = self.axes.sizes(shape)
        lora.check_rank(n_in, n_out, path)
        pair = lora.init_pair(rngs.params(), batch, n_in, n_out)
        self.base = base
        self.lora = lora
        for name, leaf in variables_of(pair).items():
            setattr(self, name, nnx.LoRAParam(leaf))
        self.merged = self.corrected = False
        self.dropout: nnx.Dropout | None = nnx.data(None)
        if lora.dropout > 0:
            stack = self.axes.stack_shape(shape)
            stream = rngs.dropout.split(stack) if stack else rngs.dropout.fork()
            self.dropout = nnx.Dropout(lora.dropout)
            self.dropout.rngs = nnx.data(stream)

    @property
    def scale(self) -> float:
        """The forward scale s."""
        return self.lora.scale

    @property
    def kernel(self) -> nnx.Variable[Any]:
        """The variable that holds the base layer's kernel."""
        return kernel_of(self.base)

    @property
    def pair(self) -> Any:
        """The factors as a value, a node with what they carry."""
        return node_of(lambda name: getattr(self, name)[...] if hasattr(self, name) else None)

    def __getattr__(self, name: str) -> Any:
        """Returns what the base layer has of that name, such as `in_features`, for models that ask.

        Raises:
            AttributeError: it has none, or a method, which would pass by the adapter.
        """
        base = vars(self).get("base")
        if base is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(base, name)
        if inspect.ismethod(value):
            raise AttributeError(
                f"{type(base).__name__}.{name} would pass by the adapter; call the layer itself, or"
                " leave it out of the targets"
            )
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what the base layer has of that name, where this layer has none of its own."""
        base = vars(self).get("base")
        is_own = base is None or name.startswith("_") or name in vars(self)
        if name == "kernel":
            setattr(base, kernel_name(base) or name, value)
        elif is_own or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Applies the base layer and its adapter.

        Args:
            *args: what the base layer takes, its input first.
            **kwargs: what the base layer takes by name, such as `out_sharding`. The `einsum_str`
                of an `nnx.Einsum` must keep the roles of the kernel's axes.

        Returns:
            What the base layer returns, in the same dtype. The adapter works in that dtype unless
            `lora.dtype` says otherwise. On an Explicit mesh its output gets the sharding of the
            base layer's.

        Raises:
            ValueError: if `einsum_str` changes the role of a kernel axis.
        """
        y = self.base(*args, **kwargs)
        if self.merged:
            return y
        require_array(y, type(self.base).__name__)
        inputs, einsum_str = read_call(self.base.__call__, args, kwargs)
        contraction = _contraction(self.base, inputs.ndim, einsum_str)
        if contraction.kernel_axes != self.axes:
            raise ValueError(
                f"{contraction} gives the kernel axes other roles than the einsum string that the "
                "adapter was built for; adapt a layer of its own for this use"
            )
        x = inputs.astype(y.dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        return add_adapter(y, x, self.pair, self.lora, contraction, self.kernel.shape)


class LoRALinear(LoRALayer):
    """`nnx.Linear` with a LoRA adapter.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        lora: settings of the adapter.
        rngs: streams for kernel, factors and dropout.
        **base_options: further arguments of `nnx.Linear`.

    Raises:
        ValueError: if the rank exceeds min(in, out).

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> layer = LoRALinear(4, 6, lora=LoRAConfig(rank=2), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 4))).shape
        (1, 6)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora: LoRAConfig,
        rngs: nnx.Rngs,
        **base_options: Any,
    ):
        base = nnx.Linear(in_features, out_features, rngs=require_rngs(rngs), **base_options)
        super().__init__(base, lora, rngs=rngs, path="LoRALinear")


class LoRALinearGeneral(LoRALayer):
    """`nnx.LinearGeneral` with a LoRA adapter on the flattened kernel.

    Args:
        in_features: sizes of the contracted axes.
        out_features: sizes of the output axes.
        lora: settings of the adapter.
        rngs: streams for kernel, factors and dropout.
        **base_options: further arguments of `nnx.LinearGeneral`, such as `axis`.

    Raises:
        ValueError: if the rank exceeds min(in, out).

    Example:
        >>> from flax import nnx
        >>> layer = LoRALinearGeneral(4, (2, 3), lora=LoRAConfig(rank=2), rngs=nnx.Rngs(0))
        >>> layer.base.kernel.shape, layer.lora_b.shape
        ((4, 2, 3), (2, 6))
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        lora: LoRAConfig,
        rngs: nnx.Rngs,
        **base_options: Any,
    ):
        base = nnx.LinearGeneral(in_features, out_features, rngs=require_rngs(rngs), **base_options)
        super().__init__(base, lora, rngs=rngs, path="LoRALinearGeneral")


class LoRAEinsum(LoRALayer):
    """`nnx.Einsum` with a LoRA adapter on the flattened kernel.

    Args:
        einsum_str: contraction of input and kernel, such as `'BTD,NDH->BTNH'`.
        kernel_shape: shape of the kernel.
        lora: settings of the adapter.
        rngs: streams for kernel, factors and dropout.
        **base_options: further arguments of `nnx.Einsum`, such as `bias_shape`.

    Raises:
        ValueError: if the string does not describe a linear layer, or the rank exceeds
            min(in, out).

    Example:
        >>> from flax import nnx
        >>> config, rngs = LoRAConfig(rank=2), nnx.Rngs(0)
        >>> layer = LoRAEinsum('BTD,NDH->BTNH', (2, 4, 3), lora=config, rngs=rngs)
        >>> layer.lora_a.shape, layer.lora_b.shape
        ((4, 2), (2, 6))
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        *,
        lora: LoRAConfig,
        rngs: nnx.Rngs,
        **base_options: Any,
    ):
        base = nnx.Einsum(einsum_str, tuple(kernel_shape), rngs=require_rngs(rngs), **base_options)
        super().__init__(base, lora, rngs=rngs, path="LoRAEinsum")


def require_supported(module: Any, path: str) -> nnx.Module:
    """Refuses modules that cannot be given an adapter.

    Args:
        module: the candidate.
        path: its path, for the message.

    Returns:
        The module.

    Raises:
        ValueError: if it has an adapter already, or no kernel that `kernel_name` knows.
    """
    if isinstance(module, LoRALayer):
        raise ValueError(
            f"{path} already has LoRA; nn.remove_lora(model) takes all adapters off, or leave this"
            " layer out of the targets"
        )
    if isinstance(module, nnx.LoRA | nnx.LoRALinear):
        raise ValueError(
            f"{path} already has LoRA, Flax's own; put the plain layer in its place, or leave it"
            " out of the targets"
        )
    if kernel_name(module) is None:
        if isinstance(einsum_str := getattr(module, "einsum_str", None), str):
            Contraction.from_einsum(einsum_str)  # which says what LoRA cannot adapt
        raise ValueError(
            f"{path} is a {type(module).__name__}; LoRA adapts nnx.Linear, nnx.LinearGeneral,"
            " nnx.Einsum and modules with an `einsum_str` and one kernel: narrow the targets"
        )
    return module


def kernel_name(module: Any) -> str | None:
    """Names the attribute of a module that holds the kernel to adapt.

    Args:
        module: any module.

    Returns:
        `"kernel"` of Flax's linear layers. Of another module with a string `einsum_str`, the input
        first, the one parameter that can be its kernel: `Contraction.kernel_among`. Else None.

    Example:
        >>> kernel_name(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        'kernel'
    """
    if isinstance(module, _FlaxLayer):
        return "kernel"
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


def require_rngs(rngs: Any) -> nnx.Rngs:
    """Returns what it is given, and refuses what is not `nnx.Rngs`, such as a bare seed.

    Raises:
        TypeError: it is something else.

    Example:
        >>> type(require_rngs(nnx.Rngs(0))).__name__
        'Rngs'
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be nnx.Rngs, got {type(rngs).__name__}; write rngs=nnx.Rngs(0)")
    return rngs


def _kernel_axes(base: Any) -> KernelAxes:
    if isinstance(base, nnx.Linear):
        return KernelAxes.in_order(0, 1, 1)
    if isinstance(base, nnx.LinearGeneral):
        return KernelAxes.in_order(
            len(base.batch_axis), len(base.in_features), len(base.out_features)
        )
    return Contraction.from_einsum(base.einsum_str).kernel_axes


def _contraction(base: Any, ndim: int, einsum_str: str | None) -> Contraction:
    if isinstance(base, nnx.Linear):
        return Contraction.from_dense_general(ndim, (-1,), (), 1)
    if isinstance(base, nnx.LinearGeneral):
        return Contraction.from_dense_general(
            ndim, base.axis, tuple(base.batch_axis), len(base.out_features)
        )
    return Contraction.from_einsum(base.einsum_str if einsum_str is None else einsum_str)
