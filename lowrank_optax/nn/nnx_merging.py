"""Folding the adapters of an NNX model into its kernels, and taking them out again."""

import warnings

from flax import nnx

from lowrank_optax._core.names import in_words
from lowrank_optax.nn.dora import merge_directional_kernel
from lowrank_optax.nn.flax_nnx import LoRALayer
from lowrank_optax.nn.functional import merge_kernel, why_not_mergeable
from lowrank_optax.nn.nnx_surgery import (
    children,
    edges,
    lora_layers,
    replace_lora,
    require_not_itself,
)

# Calls that are linear in the kernel, so that merging changes nothing.
_PLAIN_CALLS = tuple(
    layer.__call__ for layer in (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.Embed)
)


def merge_lora(model: nnx.Module) -> list[str]:
    """Folds s·a·b into the base kernels, in place; the adapters stay but are skipped.

    The sum is formed in at least float32 and rounded to the kernel's dtype. Gradients of merged
    adapters are zero: merge for inference. Layers that are merged already are left alone.

    Args:
        model: a model with LoRA layers, or a LoRA layer.

    Returns:
        The paths of the layers merged by this call, sorted.

    Raises:
        ValueError: if there is no LoRA layer; a kernel is shared with another layer, which would
            change too; or a kernel's dtype cannot hold the sum, as int8. Nothing is merged then.

    Example:
        >>> from flax import nnx
        >>> from lowrank_optax import nn
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = nn.add_lora(model, 'layers/0', nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> merge_lora(model)
        ['layers/0']
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if not layer.merged}
    refuse_shared_kernels(model, layers)
    for path, layer in layers.items():
        if reason := why_not_mergeable(layer.kernel[...].dtype):
            raise ValueError(f"{in_words(path, 'the layer')}: {reason}")
    for path, layer in layers.items():
        if type(layer.base).__call__ not in _PLAIN_CALLS:
            warnings.warn(
                f"{in_words(path, 'the layer')}: {type(layer.base).__name__} has its own __call__,"
                " and merging is exact only where that is linear in the kernel; compare outputs",
                stacklevel=2,
            )
    for layer in layers.values():
        _add_to_kernel(layer, 1)
    return sorted(layers)


def unmerge_lora(model: nnx.Module) -> list[str]:
    """Subtracts s·a·b from the base kernels that `merge_lora` added it to, in place.

    Both directions round to the kernel's dtype, so the kernel comes back to within its rounding
    (about one unit in the last place of the larger of kernel and merged kernel), not bit for bit;
    in bfloat16 that is a relative 2⁻⁸. Merge an `nnx.clone(model)` where exactness matters.
    The factors must not have changed since the merge.

    Args:
        model: a model with LoRA layers, or a LoRA layer.

    Returns:
        The paths of the layers unmerged by this call, sorted.

    Raises:
        ValueError: if there is no LoRA layer, or one with DoRA.

    Example:
        >>> from flax import nnx
        >>> from lowrank_optax import nn
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = nn.add_lora(model, 'layers/0', nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> merge_lora(model) == unmerge_lora(model)
        True
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if layer.merged}
    for path, layer in layers.items():
        if layer.lora.dora:
            raise ValueError(
                f"{in_words(path, 'the layer')}: DoRA scales the merged kernel's columns, and what"
                " they were is lost; merge an nnx.clone(model), and keep the model itself"
            )
    for layer in layers.values():
        _add_to_kernel(layer, -1)
    return sorted(layers)


def unload_lora(model: nnx.Module) -> list[str]:
    """Merges every adapter and puts the plain base layers back, in place.

    Args:
        model: a model with LoRA layers below its root.

    Returns:
        The paths of the layers that were put back, sorted.

    Raises:
        ValueError: as `merge_lora`, or if the model itself is the LoRA layer.

    Example:
        >>> from flax import nnx
        >>> from lowrank_optax import nn
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = nn.add_lora(model, 'layers/0', nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> unload_lora(model)
        ['layers/0']
        >>> type(model.layers[0]).__name__
        'Linear'
    """
    require_not_itself(model)
    merge_lora(model)
    return replace_lora(model, lambda path, layer: layer.base)


def _add_to_kernel(layer: LoRALayer, sign: int) -> None:
    kernel, pair = layer.kernel, layer.pair
    if layer.lora.dora:
        magnitude = layer.lora_magnitude[...]
        merged = merge_directional_kernel(kernel[...], pair, magnitude, layer.scale, layer.axes)
    else:
        merged = merge_kernel(kernel[...], pair, sign * layer.scale, layer.axes)
    kernel[...] = merged
    layer.merged = not layer.merged


def refuse_shared_kernels(model: nnx.Module, layers: dict[str, LoRALayer]) -> None:
    """Refuses layers whose kernel stands in another place too, where it would change.

    Raises:
        ValueError: there is one.

    Example:
        >>> from lowrank_optax import nn
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = nn.add_lora(model, 'layers/0', nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> refuse_shared_kernels(model, lora_layers(model))
    """
    holders_of: dict[int, list[str]] = {}
    places = [("the model", model), *((edge.path, edge.module) for edge in edges(model))]
    for path, module in places:  # a module that stands in two places holds its kernel twice
        for _, value in children(module):
            if isinstance(value, nnx.Variable):
                holders_of.setdefault(id(value), []).append(path)
    for path, layer in layers.items():
        holders = holders_of[id(layer.kernel)]
        if len(holders) > 1:
            raise ValueError(
                f"{in_words(path, 'the layer')}: its kernel is shared by {', '.join(holders)}; a"
                " change would change all"
            )
