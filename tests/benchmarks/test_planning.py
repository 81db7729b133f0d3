"""Steps planned from shapes, checked on a model small enough to count by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from benchmarks import planning

TINY = planning.Model(layers=2, width=256, hidden=512, kv_heads=2, vocabulary=1024)
RANK, LENGTH = 4, 16


def test_the_shapes_are_those_of_llama_3():
    def size(model):
        make = functools.partial(planning.make_params, model, RANK, planning.METHODS["adamw"])
        _, frozen = jax.eval_shape(make)
        return sum(x.size for x in jax.tree.leaves(frozen))

    sizes = {name: size(model) for name, model in planning.MODELS.items()}
    assert sizes == {"llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496}


def test_the_loss_of_an_untrained_model_is_that_of_chance():
    trained, frozen = planning.make_params(TINY, RANK, planning.METHODS["adamw"])
    keys = iter(jax.random.split(jax.random.key(0), 99))
    frozen = jax.tree.map(lambda x: 0.02 * jax.random.normal(next(keys), x.shape), frozen)
    frozen["norm"] = jnp.ones_like(frozen["norm"])
    tokens = jax.random.randint(next(keys), (1, LENGTH + 1), 0, TINY.vocabulary)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
        value = jax.jit(planning.loss)(trained, frozen, tokens)
    assert value == pytest.approx(math.log(TINY.vocabulary), rel=0.02)


def test_what_a_device_holds():
    """Counted by hand; the model is too small for FSDP, so all is whole or over "model"."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    compiled = planning.compile_step(TINY, planning.METHODS["adamw"], mesh, RANK, LENGTH)
    kernels = TINY.kernels
    of_kernels = TINY.layers * sum(n_in * n_out for n_in, n_out in kernels.values()) // 2
    ends = TINY.vocabulary * TINY.width * 3 // 2  # the embedding whole, half of the head
    norms = (2 * TINY.layers + 1) * TINY.width
    rows = [kernels.pop("o"), kernels.pop("down")]
    factors = sum(n_in + n_out / 2 for n_in, n_out in kernels.values())
    factors += sum(n_in / 2 + n_out for n_in, n_out in rows)
    trained = 3 * 4 * TINY.layers * RANK * factors  # and two moments, float32
    tokens = 4 * (LENGTH + 1)
    memory = compiled.memory_analysis()
    held = 2 * (of_kernels + ends + norms) + trained + tokens
    counters = 16
    assert 0 <= memory.argument_size_in_bytes - held <= counters
    assert 0 <= memory.alias_size_in_bytes - trained <= counters  # what is donated
    assert memory.temp_size_in_bytes > 0
