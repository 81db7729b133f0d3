"""A train step that keeps everything where it is."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax
from jax.sharding import NamedSharding

from lowrank_optax.sharding.placement import axis_size, mesh_of
from lowrank_optax.sharding.specs import state_shardings


class TrainStep(Protocol):
    """What `train_step` builds: `(params, state, *inputs) → (params, state, loss)`."""

    def __call__(self, params: Any, state: Any, *inputs: Any) -> tuple[Any, Any, jax.Array]:
        """Makes a step."""
        ...

    def lower(self, params: Any, state: Any, *inputs: Any) -> jax.stages.Lowered:
        """Lowers a step for shapes or arrays, as `jax.jit`'s method does."""
        ...


def train_step(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    params: Any,
    *,
    batch_spec: jax.P | None = None,
    donate: bool = True,
) -> TrainStep:
    """Builds a jitted train step that keeps parameters and state where they are.

    Args:
        loss: `loss(params, *inputs)`, a scalar; differentiated in `params`.
        tx: the optimizer.
        params: what is trained, placed: arrays or `ShapeDtypeStruct` on one mesh.
        batch_spec: how the last input, the batch, is sharded; its leading axis over the mesh's
            first axis by default. Other inputs, as frozen parameters, stay where they are.
        donate: whether the old parameters and state give their memory to the new ones.

    Returns:
        `step(params, state, *inputs) → (params, state, loss)`, with `jax.jit`'s `lower`.

    Raises:
        ValueError: parameters that are not on one mesh; a batch spec that does not fit it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, altlora, nn
        >>> from lowrank_optax.sharding import data_parallel, shard_model, shard_state
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> params = shard_model(LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3))), mesh, data_parallel())
        >>> tx = altlora(0.1)
        >>> step = train_step(lambda p, x: jnp.mean((nn.lora_apply(x, p) - 1) ** 2), tx, params)
        >>> params, state, first = step(params, shard_state(tx, params), jnp.eye(4))
        >>> params, state, second = step(params, state, jnp.eye(4))
        >>> bool(second < first)
        True
    """
    mesh = mesh_of(params)
    spec = jax.P(mesh.axis_names[0]) if batch_spec is None else batch_spec
    for name in jax.tree.leaves(tuple(spec)):
        axis_size("batch_spec", name, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    state_places = state_shardings(tx, params)

    def step(params: Any, state: Any, *inputs: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, *inputs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @functools.cache
    def jitted(inputs: int) -> Any:
        others = (None,) * (inputs - 1)
        return jax.jit(
            step,
            in_shardings=(places, state_places, *others, NamedSharding(mesh, spec)),
            out_shardings=(places, state_places, NamedSharding(mesh, jax.P())),
            donate_argnums=(0, 1) if donate else (),
        )

    def on_mesh(method: str) -> Callable[..., Any]:
        def call(params: Any, state: Any, *inputs: Any) -> Any:
            if not inputs:
                raise ValueError("the step needs a batch: call `step(params, state, batch)`.")
            with jax.set_mesh(mesh):
                return getattr(jitted(len(inputs)), method)(params, state, *inputs)

        return call

    run: Any = on_mesh("__call__")
    run.lower = on_mesh("lower")
    return run
