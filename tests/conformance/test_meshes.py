"""Every method on many devices takes the steps that it takes on one."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from lowrank_optax import sharding
from tests import collectives
from tests.conformance.methods import METHODS
from tests.conformance.test_conformance import each_method, make_pair, product_of

P = jax.P

# How a kernel lies on a mesh of 2 × 2 × 2 devices, by name: its batch axes and its partition. Each
# long axis lies over none, one or two mesh axes, with and without layers that lie over another.
AXES = ("x", "y", "z")
PLACEMENTS = {
    "replicated": ((), P()),
    "in_and_out": ((), P(("x", "y"), "z")),
    "layers_and_out": ((4,), P("x", None, ("y", "z"))),
}
N_IN, N_OUT = 40, 56  # every part of them is longer than the widest basis
WIDEST = 6  # of two factors' and twice the momentum's rank; there are fewer layers
STEPS = 4


def recipe(path, shape, mesh):
    """Each pair as its placement says, the one unpaired leaf over all devices."""
    return PLACEMENTS[path][1] if path in PLACEMENTS else P(AXES)


@functools.cache
def mesh_of(kind):
    assert jax.device_count() == 8, "the devices are made by conftest.py"
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(kind,) * 3)


@functools.cache
def _jitted(function):
    return jax.jit(function)


def make_params(method):
    node = _jitted(method.node)
    params = {
        name: node(make_pair(jax.random.key(i), N_IN, 2, N_OUT, batch, jnp.float64))
        for i, (name, (batch, _)) in enumerate(PLACEMENTS.items())
    }
    return {**params, "bias": jnp.arange(1.0, 9.0)}


@jax.jit
@jax.grad
def gradients(params):
    bias = params["bias"]
    pairs = [node for name, node in params.items() if name != "bias"]
    return sum(jnp.mean((product_of(node) - 1) ** 2) for node in pairs) * 400 + jnp.sum(bias**2)


class Trajectory(NamedTuple):
    """What one device computes without a mesh, on the host.

    Args:
        start: the parameters at the beginning.
        grads: the gradients of each step.
        end: parameters and state after the last.
    """

    start: Any
    grads: list[Any]
    end: Any


@functools.cache
def on_one_device(name):
    tx = next(m for m in METHODS if m.name == name)()
    params = start = make_params(next(m for m in METHODS if m.name == name))
    state, grads = jax.jit(tx.init)(params), [gradients(params)]
    step = compiled(step_of(tx.update), grads[0], state, params)
    for _ in range(STEPS):
        params, state = step(grads[-1], state, params)
        grads.append(gradients(params))
    return jax.device_get(Trajectory(start, grads[:STEPS], (params, state)))


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def step_of(update):
    def step(grads, state, params):
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def assert_equal(result, expected):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(result), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-10, atol=1e-10)


def assert_lies_as(tree, like):
    """The types are equal, and leaves lie alike however that is written."""
    assert jax.tree.map(jax.typeof, tree) == jax.tree.map(jax.typeof, like)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)


def assert_sends_small_matrices_alone(step):
    """No factor is sent, nor a part of one: no array has an axis longer than a basis is wide."""
    for each in collectives.collectives(step):
        assert all(size <= WIDEST for shape in each.shapes for size in shape.dims), each


def assert_steps_are_those_of_one_device(name, tx, mesh, make_step):
    """Takes the steps on a mesh, where the layers also compute the gradients."""
    expected = on_one_device(name)
    place = lambda tree: sharding.shard_model(tree, mesh, recipe)
    with jax.set_mesh(mesh):
        params = start = place(expected.start)
        state = begin = sharding.shard_state(tx, params)
        step = make_step(place(expected.grads[0]), state, params)
        for alone in expected.grads:
            grads = gradients(params)
            assert jax.tree.map(jax.typeof, grads) == jax.tree.map(jax.typeof, params)
            assert_equal(jax.device_get(grads), alone)
            params, state = step(place(grads), state, params)  # an Auto mesh may lay them anyhow
    if not next(m for m in METHODS if m.name == name).dense:
        assert_sends_small_matrices_alone(step)
    assert_lies_as((params, state), (start, begin))
    assert_equal(jax.device_get((params, state)), expected.end)


@each_method
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(method, kind, x64):
    tx = method()

    def make_step(*arguments):
        return compiled(step_of(tx.update), *arguments)

    assert_steps_are_those_of_one_device(method.name, tx, mesh_of(kind), make_step)


@each_method
@pytest.mark.parametrize("checked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_in_shard_map(method, checked, x64):
    tx, mesh = method(), mesh_of(AxisType.Auto)

    def make_step(grads, state, params):
        specs = sharding.partition_specs(params, mesh, recipe)
        state_specs = jax.tree.map(lambda x: x.spec, sharding.state_shardings(tx, params))
        step = jax.shard_map(
            step_of(functools.partial(tx.update, param_specs=specs)),
            in_specs=(specs, state_specs, specs),
            out_specs=(specs, state_specs),
            check_vma=checked,
        )
        return compiled(step, grads, state, params)

    assert_steps_are_those_of_one_device(method.name, tx, mesh, make_step)


@each_method
def test_under_pmap(method, x64):
    """Two devices with copies of all that they step take the step of one."""
    expected, names = on_one_device(method.name), ["replicated", "bias"]
    part = lambda tree: {name: tree[name] for name in names}
    copies = lambda tree: jax.tree.map(lambda x: np.stack([x, x]), part(tree))
    tx = method()
    init, step = jax.pmap(tx.init), jax.pmap(step_of(tx.update), axis_name="data")
    params = copies(expected.start)
    state = init(params)
    for grads in expected.grads:
        params, state = step(copies(grads), state, params)
    for device in range(2):
        own = jax.tree.map(lambda x, device=device: np.asarray(x)[device], params)
        assert_equal(own, part(expected.end[0]))
