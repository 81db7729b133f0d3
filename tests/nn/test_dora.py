"""DoRA against its dense equation: outputs, gradients, merging, and what it cannot adapt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from lowrank_optax import altlora_plus, nn, oplora, polora, sds_lora
from lowrank_optax.nn.dora import column_norms
from tests.nn.training import train

NORMAL = jax.nn.initializers.normal(1.0)
CONFIG = nn.LoRAConfig(rank=2, alpha=3.0, dora=True, b_init=NORMAL)
BIAS: dict[str, Any] = {"bias_init": NORMAL}
CASES = {
    "linear": (lambda rngs: nnx.Linear(5, 4, rngs=rngs, **BIAS), (3, 5)),
    "no bias": (lambda rngs: nnx.Linear(5, 4, use_bias=False, rngs=rngs), (5,)),
    "general": (
        lambda rngs: nnx.LinearGeneral((2, 3), (4, 2), axis=(-2, -1), rngs=rngs, **BIAS),
        (3, 2, 3),
    ),
    "experts": (
        lambda rngs: nnx.LinearGeneral(5, (2, 3), batch_axis={0: 4}, rngs=rngs, **BIAS),
        (4, 3, 5),
    ),
    "einsum": (
        lambda rngs: nnx.Einsum("btd,ndh->bnth", (2, 5, 3), (2, 3), rngs=rngs, **BIAS),
        (2, 3, 5),
    ),
    "convolution": (
        lambda rngs: nnx.Conv(3, 6, (3, 2), strides=2, rngs=rngs, **BIAS),
        (2, 7, 6, 3),
    ),
}
each = pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)


def adapted(make, config=CONFIG):
    model = nnx.Sequential(make(nnx.Rngs(0)))
    assert nn.add_lora(model, "layers/0", config, rngs=nnx.Rngs(1)) == ["layers/0"]
    return model


def moved(model):
    """Other magnitudes than those of the start."""
    magnitude = model.layers[0].lora_magnitude
    magnitude[...] = magnitude[...] * jnp.linspace(0.5, 2.0, magnitude.size).reshape(
        magnitude.shape
    )
    return model


def dense(layer, factors, x):
    """The equation: the base layer with the kernel m / ‖V‖ ∘ V, where ‖V‖ is constant."""
    a, b, magnitude = factors
    matrix = layer.axes.to_matrix(layer.base.kernel[...]) + layer.scale * a @ b
    norms = jax.lax.stop_gradient(jnp.linalg.norm(matrix, axis=-2, keepdims=True))
    base = nnx.clone(layer.base)
    kernel = magnitude[..., None, :] / norms * matrix
    base.kernel = nnx.Param(layer.axes.from_matrix(kernel, base.kernel.shape))
    return base(x)


def factors_of(layer):
    return layer.lora_a[...], layer.lora_b[...], layer.lora_magnitude[...]


@each
def test_it_starts_as_the_base_model_bit_for_bit(make, shape):
    model, x = adapted(make, nn.LoRAConfig(rank=2, dora=True)), jnp.ones(shape)
    np.testing.assert_array_equal(model(x), model.layers[0].base(x))


@each
def test_outputs_and_gradients_are_those_of_the_equation(make, shape):
    model, x = moved(adapted(make)), jax.random.normal(jax.random.key(3), shape)
    layer = model.layers[0]
    expected = dense(layer, factors_of(layer), x)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(expected - layer.base(x)).max()) > 0.1
    loss = lambda y: jnp.sum(jnp.sin(y))
    both = (nnx.DiffState(0, nnx.LoRAParam), 1)
    found, found_x = nnx.jit(nnx.grad(lambda m, x: loss(m(x)), argnums=both))(model, x)
    of_dense = jax.grad(lambda f, x: loss(dense(layer, f, x)), argnums=(0, 1))
    wanted, wanted_x = jax.jit(of_dense)(factors_of(layer), x)
    for name, gradient in zip(("a", "b", "magnitude"), wanted, strict=True):
        got = found["layers"][0][f"lora_{name}"][...]
        np.testing.assert_allclose(got, gradient, rtol=1e-3, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(found_x, wanted_x, rtol=1e-3, atol=1e-3)


@each
def test_gradients_of_the_factors_are_those_of_a_pair_on_the_direction(make, shape):
    """s G bᵀ and s aᵀ G, G the gradient in V: so every method for pairs stays right."""
    model, x = moved(adapted(make)), jax.random.normal(jax.random.key(3), shape)
    layer = model.layers[0]
    loss = lambda y: jnp.sum(jnp.sin(y))
    found = nnx.grad(lambda m: loss(m(x)), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    a, b, magnitude = factors_of(layer)
    matrix = layer.axes.to_matrix(layer.base.kernel[...]) + layer.scale * a @ b
    ratio = magnitude[..., None, :] / jnp.linalg.norm(matrix, axis=-2, keepdims=True)
    nn.merge_lora(model)
    whole = nnx.grad(lambda m: loss(m(x)))(model)["layers"][0]["base"]["kernel"][...]
    gradient = layer.axes.to_matrix(whole) * ratio
    found, turned = found["layers"][0], lambda x: jnp.swapaxes(x, -1, -2)
    scale = layer.scale
    np.testing.assert_allclose(
        found["lora_a"][...], scale * gradient @ turned(b), rtol=2e-3, atol=2e-3
    )
    np.testing.assert_allclose(
        found["lora_b"][...], scale * turned(a) @ gradient, rtol=2e-3, atol=2e-3
    )


@each
def test_merging_gives_the_same_outputs(make, shape):
    model, x = moved(adapted(make)), jax.random.normal(jax.random.key(3), shape)
    y = model(x)
    merged = nnx.clone(model)
    nn.merge_lora(merged)
    with pytest.raises(ValueError, match=r"layers/0: DoRA scales.*nnx.clone"):
        nn.unmerge_lora(merged)
    assert nn.unload_lora(model) == ["layers/0"]
    np.testing.assert_allclose(model(x), y, rtol=1e-4, atol=1e-4)


LINEN = {
    "linear": linen.Dense(4),
    "no bias": linen.Dense(4, use_bias=False),
    "general": linen.DenseGeneral((4, 2), axis=(-2, -1)),
    "experts": linen.DenseGeneral((2, 3), batch_dims=(0,)),
    "einsum": linen.Einsum((2, 5, 3), "btd,ndh->bnth"),
    "convolution": linen.Conv(6, (3, 2), strides=2),
}


def linen_variables(layer):
    """What Linen has where NNX has this layer."""
    base = {"kernel": layer.base.kernel, "bias": layer.base.bias}
    lora = dict(zip(("lora_a", "lora_b", "lora_magnitude"), factors_of(layer), strict=True))
    return {"params": {name: x[...] for name, x in base.items() if x is not None}, "lora": lora}


@pytest.mark.parametrize("case", LINEN)
def test_linen_and_nnx_agree(case):
    make, shape = CASES[case]
    model, x = moved(adapted(make)), jax.random.normal(jax.random.key(3), shape)
    module, variables = LINEN[case], linen_variables(model.layers[0])
    with nn.lora_interceptor(".*", CONFIG) as adapters:
        fresh = module.init(jax.random.key(0), x)
        y = module.apply(variables, x)
    matrix = model.layers[0].axes.to_matrix(fresh["params"]["kernel"])
    norms = jnp.linalg.norm(matrix, axis=-2)
    np.testing.assert_allclose(fresh["lora"]["lora_magnitude"], norms, rtol=1e-6)
    np.testing.assert_allclose(y, model(x), atol=1e-5)
    merged = nn.merge_lora_variables(variables, adapters)
    np.testing.assert_allclose(module.apply({"params": merged}, x), y, atol=1e-4)
    with pytest.raises(ValueError, match="keep the parameters"):
        nn.unmerge_lora_variables(variables, adapters)


def test_the_linen_module_is_the_intercepted_layer():
    model, x = moved(adapted(CASES["linear"][0])), jax.random.normal(jax.random.key(3), (3, 5))
    variables = linen_variables(model.layers[0])
    y = nn.LoRADense(4, lora=CONFIG).apply(variables, x)
    np.testing.assert_allclose(y, model(x), atol=1e-5)


def test_linen_variables_without_magnitudes_are_refused():
    variables = linen_variables(adapted(CASES["linear"][0]).layers[0])
    del variables["lora"]["lora_magnitude"]
    with (
        nn.lora_interceptor(".*", CONFIG),
        pytest.raises(ValueError, match="no adapter for this layer, or not all"),
    ):
        linen.Dense(4).apply(variables, jnp.ones((3, 5)))


METHODS = {
    "polora": (None, lambda s: polora(0.3, scale=s, fallback=optax.adamw(1e-2))),
    "altlora_plus": (None, lambda s: altlora_plus(0.03, scale=s)),
    "oplora": (nn.Shadows(momentum_rank=0), lambda s: oplora(0.1, momentum=0.0, scale=s)),
    "sds_lora": (nn.Frames(), lambda s: sds_lora(0.01, total_steps=60, warmup_steps=5, scale=s)),
}


@pytest.mark.parametrize(("extra", "make"), METHODS.values(), ids=METHODS)
def test_methods_train_factors_and_magnitudes(extra, make):
    config = nn.LoRAConfig(rank=2, dora=True, extra=extra)
    model = adapted(CASES["linear"][0], config)
    layer, x = model.layers[0], jax.random.normal(jax.random.key(3), (40, 5))
    start = layer.lora_magnitude[...]
    target = 2.0 * nnx.Linear(5, 4, rngs=nnx.Rngs(5))(x)
    losses = train(model, make(nn.lora_scales(model)), x, target)
    assert losses[-1] < 0.7 * losses[0], losses
    assert float(jnp.abs(layer.lora_magnitude[...] - start).min()) > 1e-3


def test_norms_without_a_dense_sum_are_right_to_rounding():
    model = moved(adapted(CASES["linear"][0]))
    layer = model.layers[0]
    matrix = layer.base.kernel[...] + layer.scale * layer.lora_a[...] @ layer.lora_b[...]
    found = column_norms(layer.base.kernel[...], layer.pair, layer.scale, layer.axes)
    np.testing.assert_allclose(found, jnp.linalg.norm(matrix, axis=0), rtol=1e-5)


def test_norms_and_outputs_with_frames_are_those_of_the_dense_sum():
    config = nn.LoRAConfig(rank=2, alpha=3.0, dora=True, extra=nn.Frames(warmup=False))
    model = moved(adapted(CASES["linear"][0], config))
    layer, x = model.layers[0], jax.random.normal(jax.random.key(3), (3, 5))
    layer.lora_a[...], layer.lora_b[...] = NORMAL(jax.random.key(4), (5, 2)), jnp.ones((2, 4))
    a, b, frame_in, frame_out, _ = layer.pair
    update = a @ frame_out + frame_in @ b
    matrix = layer.base.kernel[...] + layer.scale * update
    norms = jnp.linalg.norm(matrix, axis=0)
    found = column_norms(layer.base.kernel[...], layer.pair, layer.scale, layer.axes)
    np.testing.assert_allclose(found, norms, rtol=1e-5)
    y = model(x)
    kernel = layer.lora_magnitude[...] / norms * matrix
    np.testing.assert_allclose(y, x @ kernel + layer.base.bias[...], atol=1e-4)
    nn.merge_lora(model)
    np.testing.assert_allclose(layer.base.kernel[...], kernel, atol=1e-5)


def test_dropout_reaches_the_update_alone_and_keeps_the_mean():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    model = moved(adapted(CASES["linear"][0], config))
    layer, row = model.layers[0], jnp.array([[1.0, -2.0, 0.5, 1.5, -1.0]])
    many = jnp.repeat(row, 4000, axis=0)
    model.eval()
    whole = model(row)[0]
    model.train()
    module, rng = nn.LoRADense(4, lora=config), {"dropout": jax.random.key(5)}
    of_linen = module.apply(linen_variables(layer), many, rngs=rng)
    a, b, magnitude = factors_of(layer)
    update = layer.scale * a @ b
    ratio = magnitude / jnp.linalg.norm(layer.base.kernel[...] + update, axis=0)
    deviation = jnp.linalg.norm(row.T * update * ratio, axis=0)  # half of the inputs, doubled
    for y in (model(many), of_linen):
        np.testing.assert_allclose(jnp.std(y, axis=0), deviation, rtol=0.05)
        assert jnp.all(jnp.abs(jnp.mean(y, axis=0) - whole) < 5 * deviation / np.sqrt(len(many)))


@pytest.mark.parametrize("left", [1e-2, 1e-4])
def test_merging_is_right_where_the_update_cancels_the_kernel(left):
    """There the sums of the norms that form no dense matrix hold nothing but rounding."""
    model = adapted(lambda rngs: nnx.Linear(64, 4, rngs=rngs), nn.LoRAConfig(rank=4, dora=True))
    layer = model.layers[0]
    kernel = np.array(layer.base.kernel[...], np.float64)
    layer.lora_a[...] = (left - 1) * kernel / layer.scale
    layer.lora_b[...] = jnp.eye(4)
    x = jax.random.normal(jax.random.key(0), (3, 64))
    unmerged = model(x)
    assert jnp.isfinite(unmerged).all()
    assert jnp.abs(unmerged).max() < 100 * jnp.abs(x @ layer.base.kernel[...]).max()
    nn.merge_lora(model)
    norms = jnp.linalg.norm(layer.base.kernel[...], axis=0)
    np.testing.assert_allclose(norms, layer.lora_magnitude[...], rtol=1e-6)


def test_bfloat16_layers_keep_their_dtype():
    make = lambda rngs: nnx.Linear(5, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
    model = moved(adapted(make))
    y = model(jnp.ones((3, 5)))
    assert y.dtype == jnp.bfloat16
    expected = dense(model.layers[0], factors_of(model.layers[0]), jnp.ones((3, 5)))
    np.testing.assert_allclose(y.astype(float), expected.astype(float), rtol=0.05, atol=0.1)


def test_what_dora_cannot_adapt():
    zeros = lambda rngs: nnx.Linear(5, 4, kernel_init=nnx.initializers.zeros, rngs=rngs)
    with pytest.raises(ValueError, match=r"layers/0: 4 of the 4 columns .* are zero"):
        adapted(zeros)
    with pytest.raises(ValueError, match=r"layers/0: DoRA adapts Linear.*this is a Embed"):
        adapted(lambda rngs: nnx.Embed(5, 4, rngs=rngs))
    integer = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    integer.kernel = nnx.Param(jnp.ones((5, 4), jnp.int8))
    with pytest.raises(ValueError, match=r"layers/0: .*the kernel is of int8"):
        adapted(lambda rngs: integer)
    with (
        nn.lora_interceptor(".*", CONFIG),
        pytest.raises(ValueError, match="columns of its kernel are zero"),
    ):
        linen.Dense(3, kernel_init=nnx.initializers.zeros).init(jax.random.key(0), jnp.ones((1, 3)))


def test_layers_that_are_made_together():
    """nnx.vmap makes them where values are traced; magnitudes are stacked like the factors."""
    make = nnx.vmap(lambda rngs: nn.LoRALinear(5, 4, lora=CONFIG, rngs=rngs))
    stacked = make(nnx.Rngs(0).split(3))
    assert stacked.lora_magnitude.shape == (3, 4)
    state = nnx.state(stacked, nnx.LoRAParam)
    polora(0.1).init(state)  # no warning that a magnitude looks like a factor


def test_a_gradient_start_starts_the_magnitudes_too():
    model, x = adapted(CASES["linear"][0]), jax.random.normal(jax.random.key(3), (9, 5))
    base, layer = model.layers[0].base, model.layers[0]
    layer.lora_magnitude[...] *= 1.5
    before = base(x)
    loss = lambda model, x: jnp.mean((model(x) - 1) ** 2)
    nn.gradient_start(model, loss, [x], keep_function=True, progress=False)
    np.testing.assert_allclose(model(x), before, rtol=1e-4, atol=1e-5)


def test_variables_with_magnitudes_need_a_config_with_dora():
    dense, x = linen.Dense(4), jnp.ones((1, 5))
    with nn.lora_interceptor(".*", CONFIG):
        variables = dense.init(jax.random.key(0), x)
    plain = nn.LoRAConfig(rank=2)
    with (
        nn.lora_interceptor(".*", plain),
        pytest.raises(ValueError, match="variables hold DoRA's magnitudes"),
    ):
        dense.apply(variables, x)


def test_zero_columns_that_nobody_could_see_stay_finite():
    zeros = nnx.initializers.zeros

    @nnx.jit
    def make():
        model = nnx.Sequential(nnx.Linear(3, 4, kernel_init=zeros, rngs=nnx.Rngs(0)))
        nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=2, dora=True), rngs=nnx.Rngs(1))
        return model

    np.testing.assert_array_equal(make()(jnp.ones((1, 3))), np.zeros((1, 4)))


def test_layers_with_a_call_of_their_own_are_refused():
    class Gained(nnx.Linear):
        def __call__(self, x):
            return 3.0 * super().__call__(x)

    with pytest.raises(ValueError, match=r"layers/0: .*this is a Gained, or has its own __call__"):
        adapted(lambda rngs: Gained(5, 4, rngs=rngs))


class GainedDense(linen.Dense):
    @linen.compact
    def __call__(self, x):
        return 3.0 * super().__call__(x)


@pytest.mark.parametrize(
    ("layer", "x"),
    [(GainedDense(4), jnp.ones((1, 5))), (linen.Embed(5, 4), jnp.ones((1, 5), int))],
    ids=["own call", "embedding"],
)
def test_linen_layers_that_dora_cannot_adapt_are_refused_by_name(layer, x):
    kind = type(layer).__name__
    with (
        nn.lora_interceptor("layers_0", CONFIG),
        pytest.raises(
            ValueError, match=f"layers_0: DoRA adapts Dense, .*this is a {kind}, or has its"
        ),
    ):
        linen.Sequential([layer]).init(jax.random.key(0), x)


def test_kernels_without_numbers_are_refused_by_name():
    model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"layers/0: .*restore the weights first"):
        nn.add_lora(model, "layers/0", CONFIG, rngs=nnx.Rngs(1))


def test_the_summary_counts_the_magnitudes():
    assert nn.lora_summary(adapted(CASES["linear"][0])).fallback == {"layers/0/lora_magnitude": 4}
