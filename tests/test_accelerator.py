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

# From factors of zero Adam's first step has rank one; rounding decides the rest of its frames.
COMPARED = [m for m in METHODS if m.node is not random_frames]
SDS_LORA = next(m for m in METHODS if m.name == "sds_lora")
TOLERANCE = 3e-3
"""Of how far ΔK moves: both compute in float32, in another order."""


def accelerators():
    """The GPUs or TPUs, none if JAX finds no such backend."""
    for platform in ("tpu", "gpu"):
        try:
            return jax.devices(platform)
        except RuntimeError:
            continue
    return []


@pytest.fixture(autouse=True)
def full_compilation():
    """Programs as users run them: other tests have theirs compiled without optimizations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.default_matmul_precision("highest"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def cpu():
    """Whatever the default device is, this is where the reference is computed."""
    device = jax.devices("cpu")[0]
    with jax.default_device(device):
        yield device


def start_of(method, n_in=16):
    """A pair with what the method needs beside it."""
    return {"q": method.node(make_pair(jax.random.key(0), n_in, 4, 24))}


def trained(tx, params, init=None, steps=3):
    """Three, for the switch of `sds_lora`, which has two steps of warm-up, is in the third."""

    @jax.jit
    def step(params, state):
        loss = lambda params: jnp.sum((product_of(params["q"]) - 1) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = (init or jax.jit(tx.init))(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def difference(found, expected, start):
    """The largest difference of ΔK, relative to how far it was to move; computed on the CPU.

    The factors are no measure: with singular vectors of other signs, which each library chooses,
    those of `sds_lora` differ, and are right.
    """
    found, expected, start = (product_of(jax.device_get(x["q"])) for x in (found, expected, start))
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected - start)))


@pytest.mark.accelerator
@pytest.mark.skipif(not accelerators(), reason="needs a GPU or TPU: JAX has none on this machine")
@pytest.mark.parametrize("method", COMPARED, ids=lambda m: m.name)
def test_steps_are_those_of_the_cpu(method, cpu):
    """Kernels sharded over all accelerators along in; in float32, so to its rounding."""
    devices = accelerators()
    tx, params = method(), start_of(method, 16 * len(devices))
    expected = trained(tx, params)
    mesh = jax.make_mesh((len(devices),), ("in",), axis_types=(AxisType.Auto,), devices=devices)
    with jax.default_device(devices[0]), jax.set_mesh(mesh):
        values = sharding.shard_model(params, mesh, sharding.fsdp("in", min_size=0))
        init = lambda values: sharding.shard_state(tx, values)
        found = trained(tx, values, init)
    assert all(x.devices() == set(devices) for x in jax.tree.leaves(found))
    assert difference(found, expected, params) < TOLERANCE


@pytest.mark.parametrize("method", [METHODS[0], SDS_LORA], ids=lambda m: m.name)
def test_steps_that_are_wrong_by_a_hundredth_are_seen(method, cpu):
    params = start_of(method)
    expected = trained(method(), params)
    wrong = trained(method(1.01 * method.learning_rate), params)
    assert difference(expected, expected, params) == 0
    assert difference(wrong, expected, params) > 1.5 * TOLERANCE


def test_singular_vectors_of_other_signs_are_not_wrong(cpu):
    params = start_of(SDS_LORA)
    expected = trained(SDS_LORA(), params)
    node, signs = expected["q"], jnp.array([1.0, -1.0, -1.0, 1.0])
    assert np.max(node.warm) == 0, "the switch is over"
    a, f_in, rows = node.a * signs, node.f_in * signs, signs[:, None]
    other = node._replace(a=a, f_in=f_in, b=node.b * rows, f_out=node.f_out * rows)
    assert np.max(np.abs(other.a - node.a)) > 0.1
    assert difference({"q": other}, expected, params) < 1e-6
