"""Looks at how adapters treat the full gradient, which the training itself never forms."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.errors import ExperimentError
from lowrank_optax import diagnostics, nn

Probe = Callable[[Any, Any, Any, Any], dict[str, jax.Array]]


def make_probe(
    loss: Callable[[Any, Any, Any], jax.Array], merge: Callable[[Any, Any], nnx.Module]
) -> Probe:
    """Makes the compiled function that measures a `ProbePoint`'s values.

    A frozen kernel K enters as K + s a b, so its gradient is the full gradient.

    Args:
        loss: Of trained leaves, frozen leaves and a batch.
        merge: Puts trained and frozen leaves together to a model.

    Returns:
        A function of the trained leaves before and after a step, the frozen ones, and the batch.
    """

    @jax.jit
    def probe(before: Any, after: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        grads, full = jax.grad(loss, (0, 1), allow_int=True)(before, frozen, batch)
        models = (merge(before, frozen), merge(after, frozen), merge(grads, full))
        found = [_look_at(*layers) for layers in zip(*map(_lora_layers, models), strict=True)]
        if not found:
            raise ExperimentError("probe_every needs methods that train pairs of factors")
        return jax.tree.map(lambda *values: jnp.mean(jnp.stack(values)), *found)

    return probe


def _lora_layers(model: nnx.Module) -> Iterator[nn.LoRALayer]:
    return (module for _, module in nnx.iter_modules(model) if isinstance(module, nn.LoRALayer))


def _look_at(
    before: nn.LoRALayer, after: nn.LoRALayer, grads: nn.LoRALayer
) -> dict[str, jax.Array]:
    # Only a and b of these are read, which every kind of pair has.
    pair: Any = grads.pair
    start: Any = before.pair
    full = grads.kernel[...]
    delta = nn.lora_delta(after.pair, after.scale)
    moved = delta - nn.lora_delta(before.pair, before.scale)
    return {
        "rank_a": diagnostics.effective_rank(pair.a),
        "rank_b": diagnostics.effective_rank(pair.b),
        "gradient_alignment": diagnostics.alignment(start, pair, full),
        "step_alignment": -_cosine(moved, full),
        "step_rank": diagnostics.effective_rank(moved),
        "delta_rank": diagnostics.effective_rank(delta),
        "step_norm": jnp.linalg.norm(moved, 2),
    }


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(x) * jnp.linalg.norm(y)
    return jnp.sum(x * y) / jnp.where(norms > 0, norms, 1)
