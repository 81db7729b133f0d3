"""Keras on JAX."""

import os

import jax
import jax.numpy as jnp
import pytest

from tests.integration.checks import (
    ALPHA,
    RANK,
    assert_read_rightly,
    assert_trains,
    normal,
    randomized,
)

os.environ["KERAS_BACKEND"] = "jax"
pytestmark = pytest.mark.libraries("keras")


def test_keras_dense_einsum_and_embedding():
    """Keras hands an optimizer a list of arrays: its names come from the variables' paths."""
    import keras

    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(20, 16, name="embedding")(inputs)
    hidden = keras.layers.EinsumDense("btd,dnh->btnh", (None, 4, 6), name="query")(hidden)
    hidden = keras.layers.Reshape((5, 24))(keras.layers.Activation("tanh")(hidden))
    model = keras.Model(inputs, keras.layers.Dense(16, name="dense")(hidden))
    for layer in ("embedding", "query", "dense"):
        model.get_layer(layer).enable_lora(RANK, lora_alpha=ALPHA)
    kernels = {
        f"{name}/{kind}": model.get_layer(name)._kernel
        if kind == "kernel"
        else model.get_layer(name)._embeddings
        for name, kind in (("embedding", "embeddings"), ("query", "kernel"), ("dense", "kernel"))
    }
    names = [v.path for v in model.trainable_variables]
    values = dict(zip(names, (v.value for v in model.trainable_variables), strict=True))
    factors = randomized({name: x for name, x in values.items() if "lora" in name})
    others = {name: x for name, x in values.items() if "lora" not in name}
    frozen_names = [v.path for v in model.non_trainable_variables]
    frozen = dict(zip(frozen_names, (v.value for v in model.non_trainable_variables), strict=True))
    tokens, target = jnp.arange(10).reshape(2, 5), normal(5, 2, 5, 16)

    def loss(factors, frozen):
        all_values = {**others, **factors}
        y, _ = model.stateless_call(
            [all_values[name] for name in names], [frozen[name] for name in frozen_names], tokens
        )
        return jnp.mean((y - target) ** 2)

    by_factors, by_frozen = jax.grad(loss, argnums=(0, 1))(factors, frozen)
    paths = {v.path.rpartition("/")[0]: v.path for v in kernels.values()}
    of = lambda path: by_frozen[paths[path]]
    assert_read_rightly(factors, by_factors, of, ALPHA / RANK)
    assert_trains(lambda factors: loss(factors, frozen), factors, ALPHA / RANK)
