"""LoRA modules for Flax Linen.

A LoRA module is its plain counterpart, with `kernel` and `bias` at the same place in
`'params'`, and two factors in a collection of their own, `'lora'`. Kernels are therefore
neither differentiated nor touched by the optimizer when one trains the adapters:

    variables = model.init(key, x)
    params, lora = variables['params'], variables['lora']
    grads = jax.grad(lambda lora: loss(model.apply({'params': params, 'lora': lora}, x)))(lora)
    updates, state = tx.update(grads, tx.init(lora), lora)

Factors are drawn from the `'lora'` rng stream, or else from `'params'`, after the layer's own
parameters, which keep the values they have without LoRA. A module made with
`LoRAConfig(rank, extra=Shadows())` is ready for `oplora` as `tx`: what that needs stands
beside the factors. `nn.remat` needs nothing special; `nn.scan` and `nn.vmap` over layers need
`'lora': 0` in `variable_axes` next to `'params': 0`. To adapt models that exist already, see
`lora_interceptor`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lowrank_optax._core import meshes
from lowrank_optax._core.layouts import node_of, variables_of
from lowrank_optax._core.names import MAGNITUDE
from lowrank_optax.nn.calls import require_array
from lowrank_optax.nn.config import LoRAConfig, require_config
from lowrank_optax.nn.contraction import Contraction
from lowrank_optax.nn.convolution import Convolution
from lowrank_optax.nn.dora import (
    add_directional_adapter,
    initial_magnitudes,
    require_for_dora,
)
from lowrank_optax.nn.functional import add_adapter, apply_adapter
from lowrank_optax.nn.kernel_axes import KernelAxes
from lowrank_optax.nn.lookup import Lookup, attend, require_for_lookup

_KERNEL_NAMES: dict[type, str] = {
    nn.Dense: "kernel",
    nn.DenseGeneral: "kernel",
    nn.Einsum: "kernel",
    nn.Conv: "kernel",
    nn.Embed: "embedding",
}
LINEAR = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)  # x K + bias, and no more
SUPPORTED = (
    "nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.Embed and modules with an `einsum_str` and"
    " one kernel"
)

KernelUse = Contraction | Convolution | Lookup
COLLECTION = "lora"
_DEFAULT_CONFIG = LoRAConfig(rank=8)


class LinenAdapter(NamedTuple):
    """What the arrays of a Linen adapter do not say about it.

    Attributes:
        axes: the roles of the base kernel's axes.
        scale: the forward scale s.
        kernel: name of the base kernel among the layer's parameters.
    """

    axes: KernelAxes
    scale: float
    kernel: str = "kernel"


class LoRADense(nn.Dense):
    r"""`nn.Dense` with a LoRA adapter.

    $$y = x K + \mathrm{bias} + s\,(x\,a)\,b$$

    Attributes:
        lora: settings of the adapter.
        deterministic: if True, no dropout; else `lora.dropout` needs a `'dropout'` rng.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = LoRADense(6, lora=LoRAConfig(rank=2))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> jax.tree.map(jnp.shape, variables['lora'])
        {'lora_a': (4, 2), 'lora_b': (2, 6)}

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
    """

    lora: LoRAConfig = _DEFAULT_CONFIG
    deterministic: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: (..., in).

        Returns:
            (..., out), in the dtype `nn.Dense` returns.

        Raises:
            ValueError: if the rank exceeds min(in, out) or the variables hold no adapter.
        """
        y = super().__call__(inputs)
        use = layer_use(self, inputs)
        return adapted_output(self, self.lora, use, inputs, y, deterministic=self.deterministic)


class LoRADenseGeneral(nn.DenseGeneral):
    """`nn.DenseGeneral` with a LoRA adapter on the flattened kernel.

    Attributes:
        lora: settings of the adapter.
        deterministic: if True, no dropout; else `lora.dropout` needs a `'dropout'` rng.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = LoRADenseGeneral((2, 3), lora=LoRAConfig(rank=2))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> jax.tree.map(jnp.shape, variables['lora'])
        {'lora_a': (4, 2), 'lora_b': (2, 6)}
    """

    lora: LoRAConfig = _DEFAULT_CONFIG
    deterministic: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: what `nn.DenseGeneral` takes.

        Returns:
            What `nn.DenseGeneral` returns, in the same dtype.

        Raises:
            ValueError: if the rank exceeds min(in, out) or the variables hold no adapter.
        """
        y = super().__call__(inputs)
        use = layer_use(self, inputs)
        return adapted_output(self, self.lora, use, inputs, y, deterministic=self.deterministic)


class LoRAEinsumDense(nn.Einsum):
    """`nn.Einsum` with a LoRA adapter on the flattened kernel.

    Attributes:
        lora: settings of the adapter.
        deterministic: if True, no dropout; else `lora.dropout` needs a `'dropout'` rng.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = LoRAEinsumDense((2, 4, 3), 'BTD,NDH->BTNH', lora=LoRAConfig(rank=2))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 4)))
        >>> jax.tree.map(jnp.shape, variables['lora'])
        {'lora_a': (4, 2), 'lora_b': (2, 6)}
    """

    lora: LoRAConfig = _DEFAULT_CONFIG
    deterministic: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: what `nn.Einsum` takes.
            einsum_str: the contraction, if the module was made without one.

        Returns:
            What `nn.Einsum` returns, in the same dtype.

        Raises:
            ValueError: if the contraction is no linear layer, the rank exceeds min(in, out) or the
                variables hold no adapter.
        """
        y = super().__call__(inputs, einsum_str)
        use = layer_use(self, inputs, einsum_str)
        return adapted_output(self, self.lora, use, inputs, y, deterministic=self.deterministic)


LoRAModule = LoRADense | LoRADenseGeneral | LoRAEinsumDense
_OWN = (LoRADense, LoRADenseGeneral, LoRAEinsumDense)


def adapted_output(
    layer: nn.Module,
    config: LoRAConfig,
    use: KernelUse,
    inputs: jax.Array,
    y: jax.Array,
    *,
    deterministic: bool = False,
) -> jax.Array:
    """Adds what the adapter of a bound layer makes of its input to the layer's output.

    Args:
        layer: the layer, while it is being called, after its own parameters exist.
        config: settings of the adapter.
        use: how the layer uses its kernel.
        inputs: the layer's input.
        y: the layer's output.
        deterministic: if True, no dropout.

    Returns:
        The sum, in the shape and dtype of `y`, and sharded like it on an Explicit mesh.

    Raises:
        ValueError: if the rank exceeds min(in, out) or the variables hold no adapter.
    """
    path = "/".join(layer.path) or type(layer).__name__
    require_config(config)
    require_array(y, path)
    kernel_shape = nn.meta.unbox(layer.get_variable("params", kernel_name(layer))).shape
    if isinstance(layer, nn.Embed):
        require_for_lookup(config, path)
    pair = _factors(layer, config, *use.kernel_axes.sizes(kernel_shape))
    x = inputs
    if config.dropout and not deterministic:
        x = x.astype(y.dtype)
        keep = jax.random.bernoulli(layer.make_rng("dropout"), 1 - config.dropout, x.shape)
        keep = meshes.reshard_like(keep, x)
        x = jnp.where(keep, x / (1 - config.dropout), jnp.zeros_like(x))
    if not config.dora:
        if layer.has_variable(COLLECTION, MAGNITUDE):
            raise ValueError(
                f"{path}: the variables hold DoRA's magnitudes, but the config has none; use the"
                " config that the adapter was made with"
            )
        return add_adapter(y, x, pair, config, use, kernel_shape)
    require_for_dora(layer, (*LINEAR, *_OWN), path)
    kernel = nn.meta.unbox(layer.get_variable("params", kernel_name(layer)))
    bias = nn.meta.unbox(layer.get_variable("params", "bias"))
    if not layer.has_variable(COLLECTION, MAGNITUDE):
        _require_mutable(layer, path)
        start = initial_magnitudes(kernel, use.kernel_axes, path)
        layer.put_variable(COLLECTION, MAGNITUDE, start)
    magnitude = _variable(layer, MAGNITUDE)
    return add_directional_adapter(y, x, pair, magnitude, config, use, kernel, bias)


def attended_output(
    layer: nn.Embed, config: LoRAConfig, query: jax.Array, y: jax.Array
) -> jax.Array:
    """Adds what the adapter of a bound embedding makes of a query to `nn.Embed.attend`'s output.

    Args:
        layer: the layer, while its `attend` is being called.
        config: settings of the adapter.
        query: (..., features).
        y: the layer's output, (..., num_embeddings).

    Returns:
        The sum, in the shape and dtype of `y`.

    Raises:
        ValueError: if the rank exceeds min(in, out), the variables hold no adapter, or it has
            frames.
    """
    require_for_lookup(config, "/".join(layer.path))
    pair = _factors(layer, config, (), layer.num_embeddings, layer.features)
    delta = attend(apply_adapter(config), query.astype(y.dtype), pair)
    return y + meshes.reshard_like(delta, y)


def is_adaptable(module: nn.Module) -> bool:
    """Says whether LoRA can adapt a module: a layer of Flax, or one with an `einsum_str`.

    Example:
        >>> is_adaptable(nn.Dense(3)), is_adaptable(nn.LayerNorm())
        (True, False)
    """
    is_flax = isinstance(module, tuple(_KERNEL_NAMES))
    return is_flax or isinstance(getattr(module, "einsum_str", None), str)


def kernel_name(layer: Any) -> str:
    """Names the parameter of a bound layer that is its kernel.

    Args:
        layer: one that `is_adaptable`, after its own parameters exist.

    Returns:
        That of Flax's layers; of others the one parameter that can be the kernel of `einsum_str`:
        `Contraction.kernel_among`.

    Raises:
        ValueError: it has none, or several.
    """
    params = nn.meta.unbox(layer.variables.get("params", {}))
    of_flax = [name for kind, name in _KERNEL_NAMES.items() if isinstance(layer, kind)]
    if of_flax:
        names = [name for name in of_flax[:1] if name in params]
    else:
        shapes = {name: x.shape for name, x in params.items() if hasattr(x, "shape")}
        contraction = Contraction.from_einsum(layer.einsum_str)
        names = contraction.kernel_among(shapes, stacked=False)
    if len(names) != 1:
        path = "/".join(layer.path) or type(layer).__name__
        raise ValueError(
            f"{path}: LoRA adapts one kernel, and cannot tell it among the parameters"
            f" ({', '.join(params) or 'none'}); leave it out of the targets"
        )
    return names[0]


def layer_use(layer: Any, inputs: jax.Array, einsum_str: str | None = None) -> KernelUse:
    """Describes how a layer uses its kernel.

    Args:
        layer: the layer.
        inputs: the layer's input.
        einsum_str: the contraction that an `nn.Einsum` was called with.

    Returns:
        The use.

    Raises:
        ValueError: if an einsum string is no linear layer, or a convolution has groups or a mask.
    """
    if isinstance(layer, nn.Conv):
        return Convolution.of(layer)
    if isinstance(layer, nn.Embed):
        return Lookup()
    if isinstance(layer, nn.Dense):
        return Contraction.from_dense_general(inputs.ndim, (-1,), (), 1)
    if isinstance(layer, nn.DenseGeneral):
        return Contraction.from_dense_general(
            inputs.ndim,
            _as_tuple(layer.axis),
            _as_tuple(layer.batch_dims),
            len(_as_tuple(layer.features)),
        )
    return Contraction.from_einsum(nn.merge_param("einsum_str", layer.einsum_str, einsum_str))


def _factors(
    layer: nn.Module, config: LoRAConfig, batch: tuple[int, ...], n_in: int, n_out: int
) -> Any:
    """Reads the node of a layer, creating it first where the collection may be written."""
    path = "/".join(layer.path) or type(layer).__name__
    if not layer.has_variable(COLLECTION, "lora_a"):
        _require_mutable(layer, path)
        config.check_rank(n_in, n_out, path)
        new = config.init_pair(layer.make_rng(COLLECTION), batch, n_in, n_out)
        for name, leaf in variables_of(new).items():
            layer.put_variable(COLLECTION, name, leaf)
    # The variables decide, not the settings: leaves that exist must get their gradients.
    node = node_of(lambda name: _variable(layer, name))
    if node.a.shape[-1] != config.rank:
        raise ValueError(
            f"{path}: the variables hold an adapter of rank {node.a.shape[-1]}, but the config has "
            f"rank {config.rank}; use the config that the adapter was made with"
        )
    return node


def _require_mutable(layer: nn.Module, path: str) -> None:
    if not layer.is_mutable_collection(COLLECTION):
        raise ValueError(
            f"{path}: the variables hold no adapter for this layer, or not all of it. Pass the"
            " 'lora' collection that init made; under nn.scan or nn.vmap add 'lora': 0 to"
            " variable_axes"
        )


def _variable(layer: nn.Module, name: str) -> Any:
    return nn.meta.unbox(layer.get_variable(COLLECTION, name))


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
