"""NNX LoRA layers: values, gradients, dtypes, dropout, transforms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_optax.nn import (
    LoRAConfig,
    LoRAEinsum,
    LoRALayer,
    LoRALinear,
    LoRALinearGeneral,
    merge_lora,
)

RANK_2 = LoRAConfig(rank=2, alpha=3.0, b_init=jax.nn.initializers.normal(1.0))
LAYERS = {
    "linear": (lambda **kw: LoRALinear(4, 6, **kw), (3, 5, 4)),
    "linear, bias off": (lambda **kw: LoRALinear(4, 6, use_bias=False, **kw), (4,)),
    "general": (lambda **kw: LoRALinearGeneral(4, (2, 3), **kw), (3, 5, 4)),
    "general, two axes": (
        lambda **kw: LoRALinearGeneral((2, 4), 6, axis=(-2, -1), **kw),
        (5, 2, 4),
    ),
    "general, axes apart": (
        lambda **kw: LoRALinearGeneral((2, 4), 6, axis=(0, -1), **kw),
        (2, 5, 4),
    ),
    "general, batch": (lambda **kw: LoRALinearGeneral(4, 6, batch_axis={0: 3}, **kw), (3, 5, 4)),
    "einsum": (
        lambda **kw: LoRAEinsum("BTD,NDH->BTNH", (2, 4, 3), bias_shape=(2, 3), **kw),
        (3, 5, 4),
    ),
    "einsum, experts": (lambda **kw: LoRAEinsum("BTED,EDF->BTEF", (3, 4, 6), **kw), (2, 5, 3, 4)),
}


def normal(shape, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


@pytest.mark.parametrize(("make", "x_shape"), LAYERS.values(), ids=LAYERS)
def test_layer_equals_its_base_with_the_merged_kernel(make, x_shape):
    layer = nnx.jit(lambda: make(lora=RANK_2, rngs=nnx.Rngs(0)))()
    x = normal(x_shape)

    @nnx.jit  # one compilation instead of one for each operation
    def run(layer):
        before = layer(x), layer.base(x)
        merge_lora(layer)
        return *before, layer(x), layer.base(x)

    y, base, merged, merged_base = run(layer)
    assert np.abs(y - base).max() > 0.1
    np.testing.assert_allclose(merged, y, atol=1e-4)
    np.testing.assert_array_equal(merged, merged_base)
    assert layer.merged


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_is_alpha_over_rank_or_its_root(rslora):
    ones = jax.nn.initializers.ones
    lora = LoRAConfig(rank=4, alpha=8.0, rslora=rslora, a_init=ones, b_init=ones)
    layer = LoRALinear(4, 5, lora=lora, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 4))
    np.testing.assert_allclose(layer(x) - layer.base(x), (4.0 if rslora else 2.0) * 16, rtol=1e-6)


def test_a_new_layer_is_exactly_its_base():
    layer = LoRALinear(4, 6, lora=LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    x = normal((3, 4))
    np.testing.assert_array_equal(layer(x), layer.base(x))


def test_gradients_are_those_of_the_effective_kernel_and_reach_the_factors_only():
    layer = LoRALinearGeneral(4, (2, 3), lora=RANK_2, rngs=nnx.Rngs(0))
    x, dy = normal((5, 4)), normal((5, 2, 3), seed=2)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.jit(nnx.grad(lambda layer: jnp.vdot(layer(x), dy), argnums=wrt))(layer)
    assert set(grads) == {"lora_a", "lora_b"}
    full = np.asarray(x).T @ np.asarray(dy).reshape(5, 6)
    a, b = map(np.asarray, layer.pair)
    np.testing.assert_allclose(grads["lora_a"][...], 1.5 * full @ b.T, atol=1e-4)
    np.testing.assert_allclose(grads["lora_b"][...], 1.5 * a.T @ full, atol=1e-4)


@pytest.mark.parametrize(
    ("base_dtypes", "x_dtype", "y_dtype"),
    [
        ({"param_dtype": jnp.bfloat16}, jnp.bfloat16, jnp.bfloat16),
        ({"param_dtype": jnp.bfloat16}, jnp.float32, jnp.float32),
        ({"dtype": jnp.bfloat16}, jnp.float32, jnp.bfloat16),
        ({}, jnp.bfloat16, jnp.float32),
    ],
)
def test_the_output_keeps_the_dtype_of_the_base_and_factors_stay_float32(
    base_dtypes, x_dtype, y_dtype
):
    layer = LoRALinear(4, 6, lora=RANK_2, rngs=nnx.Rngs(0), **base_dtypes)
    x = normal((3, 4), x_dtype)
    assert layer(x).dtype == layer.base(x).dtype == y_dtype
    assert layer.lora_a.dtype == layer.lora_b.dtype == jnp.float32
    a, b = (np.asarray(leaf, np.float64) for leaf in layer.pair)
    expected = np.asarray(layer.base(x), np.float64) + 1.5 * np.asarray(x, np.float64) @ a @ b
    eps = float(jnp.finfo(y_dtype).eps)
    np.testing.assert_allclose(
        np.asarray(layer(x), np.float64), expected, atol=10 * eps * np.abs(expected).max()
    )


def test_adapter_dtype_can_be_set():
    lora = LoRAConfig(rank=2, b_init=RANK_2.b_init, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    layer = LoRALinear(4, 6, lora=lora, rngs=nnx.Rngs(0))
    assert layer.lora_a.dtype == jnp.bfloat16
    text = str(jax.make_jaxpr(layer)(normal((3, 4))))
    assert "bf16[3,4]" in text


def test_dropout_drops_inputs_in_train_and_none_in_eval():
    lora = LoRAConfig(rank=2, dropout=0.5, b_init=RANK_2.b_init)
    layer = LoRALinear(4, 6, lora=lora, rngs=nnx.Rngs(0))
    plain = LoRALayer(layer.base, RANK_2, rngs=nnx.Rngs(1))
    plain.lora_a[...], plain.lora_b[...] = layer.pair
    x = normal((64, 4))
    layer.train()
    first, second = layer(x), layer(x)
    assert not np.allclose(first, second)
    layer.eval()
    np.testing.assert_allclose(
        (layer(x) - layer.base(x)) / layer.scale,
        (plain(x) - plain.base(x)) / plain.scale,
        atol=1e-5,
    )

    # Only the adapter's part varies, and its mean over many masks stays.
    layer.train()
    rows = jnp.tile(x[:1], (4096, 1))
    parts = np.asarray(layer(rows)) - layer.base(rows)
    a, b = map(np.asarray, layer.pair)
    exact = layer.scale * np.asarray(x)[0] @ a @ b
    standard_error = parts.std(0) / 64
    assert np.all(standard_error > 0)
    assert np.all(np.abs(parts.mean(0) - exact) < 5 * standard_error)


def test_training_lowers_the_loss_and_leaves_the_base_bit_identical():
    layer = LoRALinear(4, 6, lora=LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    x, target = normal((32, 4)), normal((32, 6), seed=2)
    optimizer = nnx.Optimizer(layer, optax.adamw(0.05), wrt=nnx.LoRAParam)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(layer.base)))

    @nnx.jit
    def step(layer, optimizer):
        def loss(layer):
            return jnp.mean((layer(x) - target) ** 2)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
        optimizer.update(layer, grads)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    assert np.any(layer.lora_b[...])
    after = nnx.to_pure_dict(nnx.state(layer.base))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_split_and_merge_keep_the_layer():
    layer = LoRAEinsum("BTD,NDH->BTNH", (2, 4, 3), lora=RANK_2, rngs=nnx.Rngs(0))
    x = normal((2, 3, 4))
    graphdef, *states = nnx.split(layer, nnx.LoRAParam, ...)
    factors, rest = states
    assert set(factors) == {"lora_a", "lora_b"}
    again = nnx.merge(graphdef, factors, rest)
    np.testing.assert_array_equal(again(x), layer(x))
    jitted = jax.jit(lambda factors: nnx.merge(graphdef, factors, rest)(x))
    np.testing.assert_allclose(jitted(factors), layer(x), rtol=1e-5)


def test_equal_settings_give_equal_graphs_so_that_jit_does_not_retrace():
    defs = [
        nnx.graphdef(LoRALinear(4, 6, lora=LoRAConfig(rank=2), rngs=nnx.Rngs(seed)))
        for seed in (0, 1)
    ]
    assert defs[0] == defs[1]
    assert hash(defs[0]) == hash(defs[1])


def test_layers_built_inside_vmap_are_stacked():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return LoRALinear(4, 4, lora=RANK_2, rngs=rngs)

    layers = make(nnx.Rngs(0))
    assert layers.lora_a.shape == (3, 4, 2)
    assert layers.lora_b.shape == (3, 2, 4)
    assert not np.allclose(layers.lora_a[0], layers.lora_a[1])

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    x = expected = np.asarray(normal((2, 4)))
    kernels, a, b = (np.array(v[...]) for v in (layers.base.kernel, layers.lora_a, layers.lora_b))
    for i in range(3):
        expected = expected @ (kernels[i] + 1.5 * a[i] @ b[i])
    np.testing.assert_allclose(forward(x, layers), expected, rtol=1e-4, atol=1e-4)
    merge_lora(layers)
    np.testing.assert_allclose(forward(x, layers), expected, rtol=1e-4, atol=1e-4)


def test_output_sharding_is_that_of_the_base():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    layer = LoRALinear(4, 6, lora=RANK_2, rngs=nnx.Rngs(0))
    x = normal((2, 4))
    expected = layer(x)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: layer(x, out_sharding=jax.P(None, "d")))(x)
    assert out.sharding.spec == jax.P(None, "d")
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_einsum_string_of_the_call_must_keep_the_roles():
    layer: Any = LoRAEinsum("td,df->tf", (4, 4), lora=RANK_2, rngs=nnx.Rngs(0))
    x = normal((3, 4))
    layer.base.einsum_str = None  # flax then takes the string of the call
    np.testing.assert_allclose(
        layer(x, einsum_str="td,df->ft"),
        (layer.base(x, einsum_str="td,df->tf") + 1.5 * x @ layer.pair.a @ layer.pair.b).T,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="other roles"):
        layer(x, einsum_str="tf,df->td")


def test_errors_name_the_layer_and_the_remedy():
    rngs = nnx.Rngs(0)
    norm: Any = nnx.LayerNorm(4, rngs=rngs)
    with pytest.raises(ValueError, match=r"LoRALinear: rank 5 exceeds min\(in, out\) = 4 .*lower"):
        LoRALinear(4, 6, lora=LoRAConfig(rank=5), rngs=rngs)
    with pytest.raises(ValueError, match="is a LayerNorm; LoRA adapts"):
        LoRALayer(norm, RANK_2, rngs=rngs)
    layer: Any = LoRALinear(4, 6, lora=RANK_2, rngs=rngs)
    with pytest.raises(ValueError, match="encoder/q already has LoRA"):
        LoRALayer(layer, RANK_2, rngs=rngs, path="encoder/q")
    with pytest.raises(ValueError, match="kernel labels that are summed out"):
        LoRAEinsum("td,dfk->tf", (4, 6, 2), lora=RANK_2, rngs=rngs)
