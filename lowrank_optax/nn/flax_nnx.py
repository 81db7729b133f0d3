"""LoRA layers for Flax NNX.

`LoRALayer` wraps an `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`, `nnx.Conv`, `nnx.Embed`, or an
einsum layer of another library: a module with an attribute `einsum_str` and one kernel.
`LoRALinear`, `LoRALinearGeneral` and `LoRAEinsum` build the layer that they wrap. The base weights
stay frozen because one trains with respect to `nnx.LoRAParam` only:

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
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from lowrank_optax._core import meshes
from lowrank_optax._core.layouts import node_of, variables_of
from lowrank_optax.nn.calls import read_call, require_array
from lowrank_optax.nn.config import LoRAConfig, require_config
from lowrank_optax.nn.contraction import Contraction
from lowrank_optax.nn.dora import (
    add_directional_adapter,
    initial_magnitudes,
    require_for_dora,
)
from lowrank_optax.nn.functional import add_adapter, apply_adapter
from lowrank_optax.nn.lookup import attend, require_for_lookup
from lowrank_optax.nn.nnx_bases import (
    LINEAR,
    SUPPORTED,
    bias_of,
    kernel_axes_of,
    kernel_name,
    kernel_of,
    kernel_use,
)

# What a model finds in the place of a base layer's own, which stays as it is in `base`.
_FLAGS = ("corrected", "merged")
_FACTORS = ("lora_a", "lora_b", "lora_magnitude")
OWN_NAMES = ("axes", "base", *_FLAGS, "dropout", "lora", *_FACTORS, "pair", "scale")


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
        lora_magnitude: `nnx.LoRAParam`, (stacked..., batch..., out), with `lora.dora`.
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
        if isinstance(base, nnx.Embed):
            require_for_lookup(lora, path)
        self.axes = kernel_axes_of(base)
        shape = kernel_of(base).shape
        batch, n_in, n_out = self.axes.sizes(shape)
        lora.check_rank(n_in, n_out, path)
        pair = lora.init_pair(rngs.params(), batch, n_in, n_out)
        self.base = base
        self.lora = lora
        for name, leaf in variables_of(pair).items():
            setattr(self, name, nnx.LoRAParam(leaf))
        if lora.dora:
            require_for_dora(base, LINEAR, path)
            start = initial_magnitudes(self.kernel.get_value(), self.axes, path)
            self.lora_magnitude = nnx.LoRAParam(start)
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
        if isinstance(base, nnx.Embed) and name == "embedding" and not vars(self).get("merged"):
            warnings.warn(
                f"{type(base).__name__}.embedding is the table without its adapter; use `attend`,"
                " or merge the adapter first",
                stacklevel=2,
            )
        if inspect.ismethod(value):
            raise AttributeError(
                f"{type(base).__name__}.{name} would pass by the adapter; call the layer itself, or"
                " leave it out of the targets"
            )
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what the base layer has of that name, where this layer has none of its own."""
        base = vars(self).get("base")
        is_own = base is None or name.startswith("_") or name in (*OWN_NAMES, *vars(self))
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
        use = kernel_use(self.base, inputs.ndim, einsum_str)
        if use.kernel_axes != self.axes:
            raise ValueError(
                f"{use} gives the kernel axes other roles than the einsum string that the "
                "adapter was built for; adapt a layer of its own for this use"
            )
        if self.dropout is not None:
            inputs = self.dropout(inputs.astype(y.dtype))
        if self.lora.dora:
            layer = (use, self.kernel[...], bias_of(self.base))
            magnitude = self.lora_magnitude[...]
            return add_directional_adapter(y, inputs, self.pair, magnitude, self.lora, *layer)
        return add_adapter(y, inputs, self.pair, self.lora, use, self.kernel.shape)

    def attend(self, query: jax.Array, **kwargs: Any) -> jax.Array:
        """Applies the transposed table and its adapter, where the base layer is an `nnx.Embed`.

        Args:
            query: (..., features).
            **kwargs: what `nnx.Embed.attend` takes by name.

        Returns:
            What `nnx.Embed.attend` returns, (..., num_embeddings).

        Raises:
            AttributeError: the base layer has no such method.
            ValueError: the adapter has frames.
        """
        base: Any = self.base
        y = base.attend(query, **kwargs)
        if self.merged:
            return y
        delta = attend(apply_adapter(self.lora), query.astype(y.dtype), self.pair)
        return y + meshes.reshard_like(delta, y)


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
        ValueError: if it has an adapter already, no kernel that `kernel_name` knows, or one that
            is used in another way, as in a convolution with groups.
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
            f"{path} is a {type(module).__name__}; LoRA adapts {SUPPORTED}: narrow the targets"
        )
    try:
        kernel_axes_of(module)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return module


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
