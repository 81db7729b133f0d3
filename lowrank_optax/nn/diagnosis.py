"""What is wrong with a training setup that no single part of it can notice."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_optax._core.names import join_keys, listed
from lowrank_optax._core.nodes import LoRAPair
from lowrank_optax._core.pairing import find_pairs
from lowrank_optax._core.states import PairwiseState, skipped
from lowrank_optax.nn.nnx_surgery import find_lora_layers


def check_training_setup(
    model: nnx.Module, optimizer: nnx.Optimizer[Any], grads: Any = None
) -> list[str]:
    """Lists what is wrong with the training of a model's adapters, each with its remedy.

    Call it before the training, and again with the gradients of a step if the loss stands still.
    It computes on the values, so call it outside of `jit`.

    Args:
        model: the model with LoRA layers.
        optimizer: its `nnx.Optimizer`.
        grads: the gradients of a step, as `nnx.grad` returns them; not looked at by default.

    Returns:
        One sentence or two for each problem; empty if none is seen.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> from lowrank_optax import altlora, nn
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = nn.add_lora(model, 'layers/0', nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> nn.check_training_setup(model, nnx.Optimizer(model, altlora(0.1), wrt=nnx.LoRAParam))
        []
        >>> _ = nn.merge_lora(model)
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
        >>> nn.check_training_setup(model, optimizer)[0][:26]
        'layers/0 is merged, so its'
    """
    layers = dict(find_lora_layers(model))
    if not layers:
        return ["The model has no LoRA layer. Call nn.add_lora before you make the optimizer."]
    problems = [
        f"{path} is merged, so its adapter gets no gradient. Call nn.unmerge_lora to train it."
        for path, layer in layers.items()
        if layer.merged
    ]
    problems += _about_what_moves(model, layers, optimizer)
    problems += _about_age(model, optimizer)
    problems += _about_kinds(layers, optimizer)
    problems += [] if grads is None else _about_gradients(grads)
    return problems


def _about_what_moves(
    model: nnx.Module, layers: dict[str, Any], optimizer: nnx.Optimizer[Any]
) -> list[str]:
    moved = _paths(model, optimizer.wrt)
    factors = _paths(model, nnx.LoRAParam)
    problems = []
    if missing := sorted(factors - moved):
        problems.append(
            f"The optimizer does not move {listed(missing)}. Give it wrt=nnx.LoRAParam."
        )
    bases = tuple(f"{path}/base/".lstrip("/") for path in layers)
    base = sorted(path for path in moved - factors if path.startswith(bases))
    if base:
        problems.append(
            f"The optimizer moves frozen weights: {listed(base)}. Give it and the gradient"
            " wrt=nnx.LoRAParam."
        )
    return problems


def _about_age(model: nnx.Module, optimizer: nnx.Optimizer[Any]) -> list[str]:
    """An optimizer that was made before the adapters has the state of other parameters."""
    try:
        fresh = jax.eval_shape(optimizer.tx.init, nnx.state(model, optimizer.wrt))
    except (TypeError, ValueError) as error:
        return [f"The optimizer cannot work on these adapters: {error}"]
    shapes = [sorted(map(jnp.shape, jax.tree.leaves(x))) for x in (fresh, optimizer.opt_state)]
    if shapes[0] == shapes[1]:
        return []
    return [
        "The optimizer's state is that of other parameters: it was made before adapters were added"
        " or changed. Make the nnx.Optimizer again."
    ]


def _paths(model: nnx.Module, wanted: nnx.filterlib.Filter) -> set[str]:
    return {join_keys(keys) for keys, _ in nnx.to_flat_state(nnx.state(model, wanted))}


def _about_kinds(layers: dict[str, Any], optimizer: nnx.Optimizer[Any]) -> list[str]:
    """Adapters with more than factors need the optimizer that moves what is beside them."""
    is_ours = lambda x: isinstance(x, PairwiseState)
    states = jax.tree.leaves(optimizer.opt_state, is_leaf=is_ours)
    if any(is_ours(state) for state in states):
        count = int(skipped(optimizer.opt_state))
        told = f"The optimizer has skipped {count} results or pairs; see lowrank_optax.skipped."
        return [told] if count else []
    kinds = {type(layer.pair) for layer in layers.values()} - {LoRAPair}
    return [
        f"The adapters are {kind.__name__}, but the optimizer is none of this library, so it would"
        " train what is beside the factors too. Take the optimizer made for them, or leave out"
        " `extra`."
        for kind in sorted(kinds, key=lambda kind: kind.__name__)
    ]


def _about_gradients(grads: Any) -> list[str]:
    found = find_pairs(grads)
    pairs = list(zip(found.pairs, found.take(grads, LoRAPair), strict=True))
    bad = [at.path for at, pair in pairs if not _all(jnp.isfinite, pair)]
    still = [at.path for at, pair in pairs if _all(lambda x: x == 0, pair)]
    problems = []
    if bad:
        problems.append(f"The gradient is not finite at {listed(bad)}. Check loss and batch.")
    if still:
        problems.append(
            f"No gradient reaches {listed(still)}. Is the layer used in the loss, with its"
            " adapter, and not merged?"
        )
    return problems


def _all(holds: Any, pair: LoRAPair) -> bool:
    return all(bool(jnp.all(holds(leaf))) for leaf in pair)
