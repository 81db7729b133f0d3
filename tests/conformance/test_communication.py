"""What a train step sends, read from the compiled program, beside what LoRA with AdamW sends."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from lowrank_optax import (
    LoRAPair,
    altlora_plus,
    frame,
    nn,
    oplora,
    sds_lora,
    shadow,
    sharding,
)
from tests import collectives
from tests.conformance.test_conformance import assert_close

P = jax.P
N_IN, N_HIDDEN, TOKENS, RANK = 80, 96, 64, 4
KERNELS = {"up": (N_IN, N_HIDDEN), "down": (N_HIDDEN, N_IN)}
LONG = sum(sum(shape) for shape in KERNELS.values())  # in + out of all pairs

TENSOR_PARALLEL = sharding.tensor_parallel(["up"], ["down"])
RECIPES = {
    "data_parallel": sharding.data_parallel(),
    "fsdp": sharding.fsdp(min_size=0),
    "tensor_parallel": TENSOR_PARALLEL,
    "fsdp within tensor_parallel": sharding.fsdp(within=TENSOR_PARALLEL, min_size=0),
}

METHODS = {
    "adamw": (optax.adamw(0.01), lambda pair: pair),
    "altlora_plus": (altlora_plus(0.01), lambda pair: pair),
    "oplora": (oplora(0.1), functools.partial(shadow, key=jax.random.key(1))),
    "sds_lora": (sds_lora(0.01, total_steps=9, warmup_steps=1), frame),
}


def loss(nodes, kernels, x):
    layer = lambda name, x: x @ kernels[name] + nn.lora_apply(x, nodes[name])
    return jnp.mean(jnp.square(layer("down", jnp.tanh(layer("up", x))) - 1))


def make_model(method):
    keys = iter(jax.random.split(jax.random.key(0), 7))
    normal = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[0])
    pairs = {n: LoRAPair(normal(i, RANK), normal(RANK, o)) for n, (i, o) in KERNELS.items()}
    kernels = {name: normal(*shape) for name, shape in KERNELS.items()}
    nodes = {name: METHODS[method][1](pair) for name, pair in pairs.items()}
    return jax.tree.map(jnp.copy, nodes), kernels, normal(TOKENS, N_IN)


def placed(method, recipe):
    """The arguments of a step, where they belong."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    nodes, kernels, x = make_model(method)
    nodes, kernels = (sharding.shard_model(t, mesh, RECIPES[recipe]) for t in (nodes, kernels))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    return nodes, sharding.shard_state(METHODS[method][0], nodes), kernels, x


@functools.cache
def compiled(method, recipe):
    nodes, *others = placed(method, recipe)
    step = sharding.train_step(loss, METHODS[method][0], nodes)
    return step.lower(nodes, *others).compile()


def sent(method, recipe):
    """Counts each array that a step sends, by kind and shape."""
    counts = collections.Counter()
    for each in collectives.collectives(compiled(method, recipe)):
        for shape in each.shapes:
            counts[each.kind, shape.dims] += each.times
    return counts


def bytes_beyond_adamw(method, recipe):
    total = lambda method: sum(collectives.traffic(compiled(method, recipe)).values())
    return total(method) - total("adamw")


each_recipe = pytest.mark.parametrize("recipe", RECIPES)


@each_recipe
def test_altlora_sends_small_matrices_beside_what_adamw_sends(recipe):
    extra = sent("altlora_plus", recipe) - sent("adamw", recipe)
    assert not sent("adamw", recipe) - sent("altlora_plus", recipe)
    assert set(extra) <= {("all-reduce", (RANK, RANK))}
    assert sum(extra.values()) <= 4 * len(KERNELS)
    assert bool(extra) == (recipe != "data_parallel")  # where all factors are whole there is none


@each_recipe
@pytest.mark.parametrize("method", ["oplora", "sds_lora"])
def test_other_methods_send_narrow_products_beside_what_adamw_sends(method, recipe):
    """No kernel, no gradient of one: one axis of each further array is no longer than 2 r."""
    extra = sent(method, recipe) - sent("adamw", recipe)
    is_scalar = lambda dims: not dims
    assert all(is_scalar(dims) or min(dims) <= 2 * RANK for _, dims in extra), extra


def test_oplora_sends_the_products_of_its_basis_and_no_more():
    """Data parallel: A₁, B₁ and B₂ of 2 r columns where AdamW has gradients of r."""
    out = sum(shape[1] for shape in KERNELS.values())
    numbers = 2 * RANK * (LONG + out) - RANK * LONG
    assert bytes_beyond_adamw("oplora", "data_parallel") == 4 * numbers


def test_sds_lora_sends_what_adamw_sends():
    """Data parallel: the gradients of a and b are summed, of the frames none are formed."""
    assert bytes_beyond_adamw("sds_lora", "data_parallel") == 0


@functools.cache
def on_one_device(method):
    tx, _ = METHODS[method]
    nodes, kernels, x = make_model(method)
    value, grads = jax.value_and_grad(loss)(nodes, kernels, x)
    updates, _ = jax.jit(tx.update)(grads, tx.init(nodes), nodes)
    return jax.device_get((optax.apply_updates(nodes, updates), value))


@each_recipe
@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_that_of_one_device(method, recipe):
    nodes, state, kernels, x = placed(method, recipe)
    nodes, _, value = compiled(method, recipe)(nodes, state, kernels, x)
    # Adam's first step is 0.01 for gradients of any size, so it shows the rounding of small ones.
    assert_close((nodes, value), on_one_device(method), rtol=1e-4, atol=1e-4)
