"""Every method's update on the accelerators of this machine, if it has any."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from lowrank_optax import sharding
from tests.conformance.methods import METHODS, random_frames
from tests.conformance.test_conformance import make_pair, product_of


def accelerators():
    """The GPUs or TPUs, none if JAX finds no such backend."""
    for platform in ("tpu", "gpu"):
        try:
            return jax.devices(platform)
        except RuntimeError:
            continue
    return []


@pytest.mark.accelerator
@pytest.mark.skipif(not accelerators(), reason="needs a GPU or TPU: JAX has none on this machine")
@pytest.mark.parametrize(
    # From factors of zero Adam's first step has rank one; rounding decides the rest of its frames.
    "method",
    [m for m in METHODS if m.node is not random_frames],
    ids=lambda m: m.name,
)
def test_updates_are_those_of_the_cpu(method):
    """Kernels sharded over all accelerators along in; in float32, so to its rounding."""
    devices = accelerators()
    cpu = jax.devices("cpu")[0]
    tx, n_in = method(), 16 * len(devices)
    with jax.default_device(cpu):
        params = {"q": method.node(make_pair(jax.random.key(0), n_in, 4, 24))}
        loss = lambda params: jnp.mean((product_of(params["q"]) - 1) ** 2)
        grads = jax.jit(jax.grad(loss))(params)
    mesh = jax.make_mesh((len(devices),), ("in",), axis_types=(AxisType.Auto,), devices=devices)
    recipe = sharding.fsdp("in", min_size=0)

    def run(place, init):
        values, moves = place(params), place(grads)
        state, update = init(values), jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(moves, state, values)
            values = jax.jit(optax.apply_updates)(values, updates)
        return values

    with jax.default_device(cpu):
        expected = run(lambda tree: jax.device_put(tree, cpu), jax.jit(tx.init))
    with jax.set_mesh(mesh):
        found = run(
            lambda tree: sharding.shard_model(tree, mesh, recipe),
            lambda values: sharding.shard_state(tx, values),
        )
    assert all(x.devices() == set(devices) for x in jax.tree.leaves(found))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4)
    assert np.any(jax.device_get(found["q"].b) != jax.device_get(params["q"].b))
