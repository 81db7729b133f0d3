"""Adding LoRA to an existing NNX model, and taking it off again."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flax import nnx

from lowrank_optax._core.names import in_words, join_keys
from lowrank_optax.nn.config import LoRAConfig, require_config
from lowrank_optax.nn.flax_nnx import (
    OWN_NAMES,
    LoRALayer,
    require_rngs,
    require_supported,
)
from lowrank_optax.nn.nnx_bases import kernel_name
from lowrank_optax.nn.targets import TargetMatcher, Targets


class Edge(NamedTuple):
    """A place in the model that holds a module: `parent.key` or `parent[key]` is `module`."""

    path: str
    parent: Any
    key: Any
    module: nnx.Module


def add_lora(
    model: nnx.Module, targets: Targets, config: LoRAConfig, *, rngs: nnx.Rngs
) -> list[str]:
    """Replaces the targeted layers of a model, in place, by `LoRALayer` around them.

    A kernel at `layers/0/query/kernel` moves to `layers/0/query/base/kernel`: restore a
    checkpoint of the plain model before the call. A module that several places share is adapted
    once for all of them. Nothing is changed if an error is raised.

    Args:
        model: any NNX module; the targets are among its descendants, also in `nnx.List`,
            `nnx.Dict`, lists and dicts. Layers stacked along leading axes get stacked factors.
        targets: a regular expression, a sequence of them, or `(path, module) -> bool`. An
            expression matches the whole '/'-joined path or its last component (`re.fullmatch`).
        config: settings of the adapters.
        rngs: `params` draws the factors, `dropout` feeds the dropout, which `model.train()` and
            `model.eval()` switch.

    Returns:
        The paths of the adapted layers, sorted.

    Raises:
        TypeError: if `config` is not a `LoRAConfig`, or `rngs` not `nnx.Rngs`.
        ValueError: if a target matches nothing, or matches a module that `LoRALayer` cannot wrap
            or that has LoRA already; if the rank exceeds min(in, out) of a targeted kernel.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu,
        ...                        nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> add_lora(model, 'layers/0', LoRAConfig(rank=2, alpha=4.0), rngs=nnx.Rngs(2))
        ['layers/0']
        >>> model.layers[0].lora_a.shape
        (4, 2)

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685.
    """
    require_config(config)
    require_rngs(rngs)
    matcher = TargetMatcher(targets)
    places = list(edges(model))
    names = _names(model)
    matched: dict[int, tuple[str, nnx.Module]] = {}
    for edge in places:
        spellings = {edge.path, join_keys([edge.path])}  # keys with dots, as in the model or a name
        if any(matcher(path, edge.module) for path in sorted(spellings)):
            # The base inside a LoRA layer is refused by the name of that layer.
            adapted = isinstance(edge.parent, LoRALayer | nnx.LoRA)
            layer = require_supported(edge.parent if adapted else edge.module, edge.path)
            matched.setdefault(id(layer), (names[id(layer)], layer))
    matcher.require_all_used(edge.path for edge in places if kernel_name(edge.module))
    # Every wrapper is built before the first one is installed: an error leaves the model alone.
    wrappers = {
        key: LoRALayer(layer, config, rngs=rngs, path=path)
        for key, (path, layer) in matched.items()
    }
    _warn_of_taken_names(dict(matched.values()))
    places = [edge for edge in places if id(edge.module) in wrappers]
    for edge in places:
        if isinstance(edge.parent, tuple):
            raise ValueError(f"{edge.path} is inside a tuple: use nnx.List to hold layers")
    for edge in places:
        _replace(edge, wrappers[id(edge.module)])
    return sorted(path for path, _ in matched.values())


def _warn_of_taken_names(layers: dict[str, nnx.Module]) -> None:
    taken = [
        f"{path}.{name}"
        for path, layer in layers.items()
        for name in OWN_NAMES
        if hasattr(layer, name)
    ]
    if taken:
        warnings.warn(
            f"the LoRA layers have attributes of these names too: {', '.join(taken)}. A model that"
            " reads them from outside gets those of the adapter; read them from `base`",
            stacklevel=3,
        )


def remove_lora(model: nnx.Module) -> list[str]:
    """Drops every adapter and puts the plain base layers back, in place.

    Args:
        model: a model with LoRA layers below its root.

    Returns:
        The paths of the layers that were put back, sorted.

    Raises:
        ValueError: if there is no LoRA layer, one is merged or started so that its kernel changed,
            or the model itself is the LoRA layer.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = add_lora(model, 'layers/0', LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> remove_lora(model)
        ['layers/0']
    """
    for path, layer in lora_layers(model).items():
        if layer.merged:
            raise ValueError(
                f"{in_words(path, 'the model')} is merged: call unmerge_lora first to drop the "
                "adapter, or unload_lora to keep it in the kernel"
            )
        if layer.corrected:
            raise ValueError(
                f"{in_words(path, 'the model')}: a start has changed its kernel, which without the"
                " adapter is not what it was; unload_lora keeps what the model computes"
            )
    return replace_lora(model, lambda path, layer: layer.base)


def replace_lora(model: nnx.Module, make: Callable[[str, LoRALayer], nnx.Module]) -> list[str]:
    """Puts other modules in the places of a model's LoRA layers, in place.

    Args:
        model: a model with LoRA layers below its root.
        make: returns the module for the path and the layer that was there; called once a layer.

    Returns:
        The paths of the layers that were replaced, sorted.

    Raises:
        ValueError: if there is no LoRA layer, or the model itself is the LoRA layer.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = add_lora(model, 'layers/0', LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> replace_lora(model, lambda path, layer: layer.base)
        ['layers/0']
    """
    require_not_itself(model)
    layers = lora_layers(model)
    made = {id(layer): make(path, layer) for path, layer in layers.items()}
    for edge in list(edges(model)):
        if id(edge.module) in made:
            _replace(edge, made[id(edge.module)])
    return sorted(layers)


def lora_scales(model: nnx.Module) -> dict[str, float]:
    """Returns the forward scale of every adapter.

    Args:
        model: a model with LoRA layers.

    Returns:
        Scale by '/'-joined path of the module that holds `lora_a` and `lora_b`; empty if none.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = add_lora(model, 'layers/0', LoRAConfig(rank=2, alpha=4.0), rngs=nnx.Rngs(1))
        >>> lora_scales(model)
        {'layers/0': 2.0}
    """
    return {path: layer.scale for path, layer in find_lora_layers(model)}


def require_not_itself(model: nnx.Module) -> None:
    """Raises if the model is the LoRA layer, which nothing holds that could hold another module.

    Example:
        >>> require_not_itself(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
    """
    if isinstance(model, LoRALayer):
        raise ValueError("a LoRA layer cannot replace itself in place: use its attribute 'base'")


def edges(root: nnx.Module) -> Iterator[Edge]:
    """Yields every place that holds a module; a shared module is entered once.

    Example:
        >>> [edge.path for edge in edges(nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0))))]
        ['layers', 'layers/0']
    """
    entered = {id(root)}

    def walk(parent: Any, prefix: str) -> Iterator[Edge]:
        for key, child in children(parent):
            path = f"{prefix}/{key}" if prefix else str(key)
            if isinstance(child, nnx.Module):
                yield Edge(path, parent, key, child)
            if id(child) not in entered:
                entered.add(id(child))
                yield from walk(child, path)

    yield from walk(root, "")


def children(node: Any) -> list[tuple[Any, Any]]:
    """Lists keys and values of what a module, dict, list or tuple holds.

    Example:
        >>> children({"a": 1})
        [('a', 1)]
    """
    if isinstance(node, nnx.Pytree):
        return [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree__")]
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, list | tuple):
        return list(enumerate(node))
    return []


def _replace(edge: Edge, module: nnx.Module) -> None:
    if isinstance(edge.parent, nnx.Pytree):
        setattr(edge.parent, edge.key, module)
    else:
        edge.parent[edge.key] = module


def find_lora_layers(model: nnx.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Yields path and layer of every LoRA layer of a model; a shared one comes once.

    Example:
        >>> from flax import nnx
        >>> list(find_lora_layers(nnx.Linear(4, 8, rngs=nnx.Rngs(0))))
        []
    """
    for path, node in nnx.iter_graph(model):
        if isinstance(node, LoRALayer):
            yield join_keys(path), node


def _names(model: nnx.Module) -> dict[int, str]:
    """The name of every node by its id: that of a shared one is the name `nnx.state` gives it."""
    return {id(node): join_keys(path) for path, node in nnx.iter_graph(model)}


def lora_layers(model: nnx.Module) -> dict[str, LoRALayer]:
    """Returns the LoRA layers of a model by path.

    Raises:
        ValueError: if there is none.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = add_lora(model, 'layers/0', LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> list(lora_layers(model))
        ['layers/0']
    """
    layers = dict(find_lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layer: call add_lora first")
    return layers
