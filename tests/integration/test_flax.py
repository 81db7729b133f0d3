"""Flax's own ways to stack, box and freeze parameters."""

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lowrank_optax import DEFAULT_SPECS, PairSpec, describe, find_pairs, nn, polora
from tests.integration.checks import (
    ALPHA,
    RANK,
    assert_read_rightly,
    assert_trains,
    normal,
    randomized,
)

pytestmark = pytest.mark.libraries("flax")
LAYERS, WIDTH = 3, 16
X, TARGET = normal(3, 5, WIDTH), normal(4, 5, WIDTH)
CONFIG = nn.LoRAConfig(RANK, alpha=ALPHA)


def error(y):
    return jnp.mean((y - TARGET) ** 2)


class Layer(nnx.Module):
    """Flax's own LoRA beside a linear layer."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.adapter = nnx.LoRA(WIDTH, RANK, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x) + self.adapter(x))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("through", ["scan", "vmap"])
def test_nnx_layers_stacked_along_an_axis(axis, through):
    """NNX: Flax's `nnx.LoRA` in layers that `vmap` or `scan` has stacked along axis 0 or 1."""
    axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
    rngs = nnx.Rngs(0).split(LAYERS)
    stack = nnx.vmap(Layer, in_axes=(0,), out_axes=axes)(rngs)
    graph, factors, weights, rest = nnx.split(stack, nnx.LoRAParam, nnx.Param, ...)
    factors = randomized(factors)

    def loss(factors, weights):
        stack = nnx.merge(graph, factors, weights, rest, copy=True)
        if through == "scan":
            run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
            return error(run(X, stack))
        return error(nnx.vmap(lambda layer: layer(X), in_axes=(axes,))(stack).sum(0))

    specs = DEFAULT_SPECS
    if axis == 1:  # by their shapes they might be one layer of several axes
        with pytest.raises(ValueError, match="can be read in 2 ways"):
            find_pairs(factors)
        specs = [PairSpec("lora_a", "lora_b", a_in=(0,), a_rank=2, b_rank=0, b_out=(2,))]
    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    assert {row.path for row in describe(factors, specs).rows} == {"adapter"}
    full = jnp.moveaxis(by_weights["linear"]["kernel"][...], axis, 0)
    assert_read_rightly(factors, by_factors, lambda path: full, 1.0, specs)
    tx = polora(0.1, specs=specs)
    assert_trains(lambda factors: loss(factors, weights), factors, 1.0, tx=tx)


class Block(linen.Module):
    """One layer, whose kernel may be boxed with sharding names."""

    boxed: bool = False

    @linen.compact
    def __call__(self, x, _=None):
        init = linen.initializers.lecun_normal()
        init = linen.with_partitioning(init, (None, "model")) if self.boxed else init
        y = linen.Dense(WIDTH, kernel_init=init, name="dense")(x)
        return x + jnp.tanh(y), None


def linen_pairs(model, config, boxed=False):
    """The factors, drawn anew and boxed as they were, the weights, and the loss of both."""
    with nn.lora_interceptor(".*dense", config):
        variables = model.init(jax.random.key(0), X)
    lora, params = variables["lora"], variables["params"]

    def loss(lora, params):
        with nn.lora_interceptor(".*dense", config):
            return error(model.apply({"params": params, "lora": lora}, X)[0])

    return randomized(lora), params, loss


def test_linen_layers_stacked_by_scan():
    """Linen: our interceptor in layers stacked by `nn.scan`."""
    scanned = linen.scan(
        Block,
        length=LAYERS,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "lora": True},
    )
    lora, params, loss = linen_pairs(scanned(), CONFIG)
    by_lora, by_params = jax.grad(loss, argnums=(0, 1))(lora, params)
    full = by_params["dense"]["kernel"]
    assert full.shape == (LAYERS, WIDTH, WIDTH)
    assert_read_rightly(lora, by_lora, lambda path: full, CONFIG.scale)
    assert_trains(lambda lora: loss(lora, params), lora, CONFIG.scale)


def test_linen_kernels_boxed_with_sharding_names():
    """Linen: factors in `nn.Partitioned` boxes, as `nn.with_partitioning` makes them."""
    boxes = linen.with_partitioning(linen.initializers.normal(0.3), (None, None))
    config = nn.LoRAConfig(RANK, alpha=ALPHA, a_init=boxes, b_init=boxes)
    lora, params, loss = linen_pairs(Block(boxed=True), config)
    assert isinstance(lora["dense"]["lora_a"], linen.Partitioned)
    by_lora, by_params = jax.grad(loss, argnums=(0, 1))(lora, params)
    full = by_params["dense"]["kernel"].value
    assert_read_rightly(lora, by_lora, lambda path: full, CONFIG.scale)
    assert_trains(lambda lora: loss(lora, params), lora, CONFIG.scale)


def test_linen_variables_that_are_frozen():
    """Linen: a `FrozenDict` of variables."""
    lora, params, loss = linen_pairs(Block(), CONFIG)
    lora, params = flax.core.freeze(lora), flax.core.freeze(params)
    by_lora, by_params = jax.grad(loss, argnums=(0, 1))(lora, params)
    full = by_params["dense"]["kernel"]
    assert_read_rightly(lora, by_lora, lambda path: full, CONFIG.scale)
    assert_trains(lambda lora: loss(lora, params), lora, CONFIG.scale)
    np.testing.assert_array_equal(params["dense"]["bias"], 0.0)
