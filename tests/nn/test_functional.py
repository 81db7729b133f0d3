"""`lora_apply`, `lora_delta` and `merge_kernel` against dense float64 algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_optax import FramedPair, LoRAPair
from lowrank_optax.nn import (
    KernelAxes,
    LinenAdapter,
    LoRAConfig,
    add_lora,
    lora_apply,
    lora_delta,
    merge_lora,
    merge_lora_variables,
    unload_lora,
)
from lowrank_optax.nn.functional import merge_kernel


def normal(shape, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def random_pair(batch=(), n_in=7, n_out=5, dtype=jnp.float32):
    return LoRAPair(
        a=normal((*batch, n_in, 3), dtype, seed=4), b=normal((*batch, 3, n_out), dtype, seed=5)
    )


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_apply_and_delta_equal_the_dense_kernel():
    pair, x, kernel = random_pair(), normal((2, 4, 7)), normal((7, 5), seed=2)
    a, b = float64(pair)
    expected = float64(x) @ (float64(kernel) + 0.5 * a @ b)
    np.testing.assert_allclose(x @ kernel + lora_apply(x, pair, 0.5), expected, atol=1e-4)
    np.testing.assert_allclose(lora_delta(pair, 0.5), 0.5 * a @ b, atol=1e-5)


def test_leading_axes_of_the_pair_are_batch():
    pair, x = random_pair(batch=(4,)), normal((4, 6, 7))
    a, b = float64(pair)
    expected = np.einsum("eti,eir,ero->eto", float64(x), a, b)
    np.testing.assert_allclose(lora_apply(x, pair), expected, atol=1e-4)
    np.testing.assert_allclose(lora_delta(pair), np.einsum("eir,ero->eio", a, b), atol=1e-5)


def test_gradients_are_those_of_the_effective_kernel():
    pair, x, scale = random_pair(), normal((6, 7)), 0.25
    dy = normal((6, 5), seed=3)
    grads = jax.jit(jax.grad(lambda pair: jnp.vdot(lora_apply(x, pair, scale), dy)))(pair)
    full = float64(x).T @ float64(dy)
    a, b = float64(pair)
    np.testing.assert_allclose(grads.a, scale * full @ b.T, atol=1e-4)
    np.testing.assert_allclose(grads.b, scale * a.T @ full, atol=1e-4)


@pytest.mark.parametrize("warm", [None, 0.0, 1.0])
def test_the_input_gradient_of_a_framed_pair_is_that_of_its_kernel(warm):
    frames = normal((7, 3), seed=6), normal((3, 5), seed=7)
    pair = FramedPair(*random_pair(), *frames, warm if warm is None else jnp.array(warm))
    x, dy = normal((2, 4, 7)), normal((2, 4, 5), seed=3)
    found = jax.grad(lambda x: jnp.vdot(lora_apply(x, pair, 0.5), dy))(x)
    np.testing.assert_allclose(found, dy @ lora_delta(pair, 0.5).T, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_keeps_float32_factors_and_accumulation(dtype):
    n_in = 4096
    pair, x = random_pair(n_in=n_in), normal((8, n_in), dtype)
    y = jax.jit(lora_apply)(x, pair, 1 / n_in)
    assert y.dtype == dtype
    a, b = float64(pair)
    expected = float64(x) @ a @ b / n_in
    # A sum of 4096 terms accumulated in 8 bits would be off by far more than a few roundings.
    np.testing.assert_allclose(
        float64(y), expected, atol=4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    )
    grads = jax.eval_shape(jax.grad(lambda pair: lora_apply(x, pair).sum().astype(float)), pair)
    assert grads.a.dtype == grads.b.dtype == jnp.float32


def test_scale_does_not_overflow_float16_in_the_narrow_product():
    pair = LoRAPair(a=jnp.full((2000, 1), 50.0), b=jnp.full((1, 1), 1e-2))
    y = lora_apply(jnp.ones((1, 2000), jnp.float16), pair, 1e-2)
    np.testing.assert_allclose(y, [[10.0]], rtol=1e-2)


def test_dtype_sets_the_operands_and_the_result_keeps_the_dtype_of_x():
    pair, x = random_pair(), normal((2, 7))
    low = lora_apply(x, pair, dtype=jnp.bfloat16)
    high = lora_apply(x, pair)
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - high).max() < 0.1
    text = str(jax.make_jaxpr(lambda x: lora_apply(x, pair, dtype=jnp.bfloat16))(x))
    assert "bf16[2,7]" in text


def test_integer_input_is_not_allowed_to_zero_the_factors():
    pair = LoRAPair(a=jnp.full((2, 1), 0.5), b=jnp.full((1, 1), 0.5))
    np.testing.assert_allclose(lora_apply(jnp.array([[1, 1]]), pair), [[0.5]])


def test_delta_of_bfloat16_factors_is_float32():
    pair = random_pair(dtype=jnp.bfloat16)
    a, b = float64(pair)
    assert lora_delta(pair).dtype == jnp.float32
    np.testing.assert_allclose(lora_delta(pair), a @ b, atol=1e-5)


def test_merge_kernel_sums_in_float32_and_keeps_the_kernel_dtype():
    pair, axes = random_pair(n_out=6), KernelAxes.in_order(0, 1, 2)
    kernel = normal((7, 2, 3), jnp.bfloat16)
    merged = merge_kernel(kernel, pair, 0.5, axes)
    a, b = float64(pair)
    exact = float64(kernel) + (0.5 * a @ b).reshape(7, 2, 3)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(float64(merged), exact, rtol=2**-8, atol=3e-6)  # one rounding


def test_apply_is_the_same_under_jit():
    pair, x = random_pair(), normal((2, 7))
    np.testing.assert_allclose(jax.jit(lora_apply)(x, pair, 2.0), lora_apply(x, pair, 2.0))


NOT_MERGEABLE = [jnp.int8, jnp.uint8, jnp.int4, jnp.int32, jnp.bool_, jnp.float8_e4m3fn]


@pytest.mark.parametrize("dtype", NOT_MERGEABLE, ids=lambda dtype: jnp.dtype(dtype).name)
def test_a_kernel_that_cannot_hold_the_sum_is_refused(dtype):
    pair = LoRAPair(jnp.full((3, 1), 0.6), jnp.ones((1, 4)))
    with pytest.raises(ValueError, match=r"cannot hold the sum with its adapter.*Dequantize"):
        merge_kernel(jnp.ones((3, 4), dtype), pair, 1.0, KernelAxes.in_order(0, 1, 1))


def quantized(rngs):
    """A weight-only int8 layer: its kernel times a scale for each output."""

    class Int8Linear(nnx.Linear):
        def __init__(self, n_in, n_out, *, rngs):
            super().__init__(n_in, n_out, use_bias=False, rngs=rngs)
            kernel = self.kernel[...]
            scale = jnp.abs(kernel).max(0) / 127
            self.kernel = nnx.Param(jnp.round(kernel / scale).astype(jnp.int8))
            self.scale = nnx.Param(scale)

        def __call__(self, x):
            return x @ (self.kernel[...] * self.scale[...])

    return Int8Linear(8, 6, rngs=rngs)


def test_merging_into_a_quantized_model_names_the_layer_and_changes_nothing():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(first=nnx.Linear(8, 8, rngs=rngs), last=quantized(rngs))
    config = LoRAConfig(2, b_init=nnx.initializers.ones)
    add_lora(model, "first|last", config, rngs=rngs)
    kernel = model["first"].base.kernel[...]
    x = jnp.ones((1, 8))
    y = model["last"](x)
    for merge in (merge_lora, unload_lora):
        with pytest.raises(ValueError, match=r"^last: a kernel of int8"):
            merge(model)
    np.testing.assert_array_equal(model["first"].base.kernel[...], kernel)
    assert not model["first"].merged
    np.testing.assert_array_equal(model["last"](x), y)


def test_merging_linen_variables_names_the_layer():
    variables = {
        "params": {"q": {"kernel": jnp.ones((3, 4), jnp.int8)}},
        "lora": {"q": {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 4))}},
    }
    adapters = {"q": LinenAdapter(KernelAxes.in_order(0, 1, 1), 1.0)}
    with pytest.raises(ValueError, match=r"^q: a kernel of int8"):
        merge_lora_variables(variables, adapters)
