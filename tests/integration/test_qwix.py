"""qwix, on NNX and Linen."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from lowrank_optax import find_pairs, specs
from tests.integration.checks import (
    ALPHA,
    RANK,
    assert_read_rightly,
    assert_trains,
    normal,
    randomized,
)

pytestmark = pytest.mark.libraries("qwix")


class Attention(nnx.Module):
    """A dense layer, and two einsums as of attention: d → (n, h) and back."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)
        self.query = nnx.Einsum("btd,dnh->btnh", (16, 4, 6), rngs=rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (4, 6, 16), rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.query(jnp.tanh(self.dense(x)))))


X = normal(3, 2, 5, 16)


def test_qwix_nnx_dense_and_einsum():
    """As many heads as the rank, which is where shapes alone could mislead."""
    import qwix

    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(Attention(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))
    graph, factors, weights, rest = nnx.split(model, nnx.LoRAParam, nnx.Param, ...)
    factors = randomized(factors)
    target = normal(5, *X.shape)

    def loss(factors, weights):
        return jnp.mean((nnx.merge(graph, factors, weights, rest)(X) - target) ** 2)

    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    flat = {
        "/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(by_weights)
    }
    assert {pair.path for pair in find_pairs(factors).pairs} == {
        "dense/kernel",
        "query/kernel",
        "out/kernel",
    }
    assert_read_rightly(factors, by_factors, flat.get, ALPHA / RANK)
    assert_trains(lambda factors: loss(factors, weights), factors, ALPHA / RANK)


def test_qwix_says_the_layout_of_an_ambiguous_einsum():
    """Four by six axes in, four by eight out, at rank four: shapes alone have two readings."""
    import qwix

    model = nnx.Sequential(nnx.Einsum("btxy,xykl->btkl", (4, 6, 4, 8), rngs=nnx.Rngs(0)))
    x = normal(1, 2, 3, 4, 6)
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=ALPHA)
    model = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
    factors = nnx.state(model, nnx.LoRAParam)
    with pytest.raises(ValueError, match="in 2 ways"):
        find_pairs(factors)
    found = find_pairs(factors, specs.from_qwix(model))
    [pair] = found.take(factors)
    assert (pair.a.shape, pair.b.shape) == ((24, 4), (4, 32))


def test_qwix_linen_dense():
    import qwix

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(16, name="down")(jnp.tanh(linen.Dense(12, name="up")(x)))

    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(Model(), provider)
    params = model.init(jax.random.key(0), X)["params"]
    is_factor = lambda path: "lora" in path[-1].key
    factors, weights = (
        jax.tree_util.tree_map_with_path(
            lambda path, leaf, wanted=wanted: leaf if is_factor(path) is wanted else None, params
        )
        for wanted in (True, False)
    )
    factors, target = randomized(factors), normal(5, *X.shape)

    def loss(factors, weights):
        both = jax.tree.map(
            lambda x, y: y if x is None else x, factors, weights, is_leaf=lambda x: x is None
        )
        return jnp.mean((model.apply({"params": both}, X) - target) ** 2)

    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    of = lambda path: by_weights[path.split("/")[0]]["kernel"]
    assert_read_rightly(factors, by_factors, of, ALPHA / RANK)
    assert_trains(lambda factors: loss(factors, weights), factors, ALPHA / RANK)
