"""LoRA on convolutions: what the adapter adds is what its dense update would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lowrank_optax import altlora_plus, nn, oplora, polora, sds_lora
from tests.nn.training import train

SETTINGS = [
    {"kernel_size": (3, 3)},
    {"kernel_size": (3, 2), "strides": 2, "padding": "VALID"},
    {"kernel_size": (4, 3), "strides": (1, 2), "padding": ((1, 2), (0, 1))},
    {"kernel_size": (3, 3), "kernel_dilation": 2, "padding": "CIRCULAR"},
    {"kernel_size": (3, 3), "padding": "REFLECT", "use_bias": False},
    {"kernel_size": (2, 3), "strides": 2, "padding": "SAME_LOWER"},
    {"kernel_size": (2, 2), "input_dilation": (2, 1), "padding": 1},
    {"kernel_size": (1, 1)},
    {"kernel_size": (3,), "kernel_dilation": (2,), "padding": "CAUSAL"},
    {"kernel_size": 3, "strides": 2},
    {"kernel_size": (2, 2, 2), "padding": "SAME"},
]
each = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
C_IN, C_OUT = 3, 5


def image(settings, batch=(2,)):
    size = settings["kernel_size"]
    axes = (7, 6, 5)[: 1 if isinstance(size, int) else len(size)]
    return jax.random.normal(jax.random.key(0), (*batch, *axes, C_IN))


def adapted(settings, config=None):
    model = nnx.Sequential(nnx.Conv(C_IN, C_OUT, rngs=nnx.Rngs(0), **settings))
    config = config or nn.LoRAConfig(rank=2, b_init=jax.nn.initializers.normal(1.0))
    nn.add_lora(model, "layers/0", config, rngs=nnx.Rngs(1))
    return model


@each
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=["one", "batch", "batches"])
def test_the_adapter_adds_its_dense_update(settings, batch):
    model, x = adapted(settings), image(settings, batch)
    y = model(x)
    assert nn.merge_lora(model) == ["layers/0"]
    np.testing.assert_allclose(y, model(x), atol=1e-4)
    nn.unmerge_lora(model)
    assert float(jnp.abs(y - model.layers[0].base(x)).max()) > 0.1


@each
def test_gradients_are_those_of_the_dense_kernel(settings):
    """g_a = s G bᵀ and g_b = s aᵀ G, with G the gradient of the kernel as a matrix."""
    model, x = adapted(settings), image(settings)
    layer = model.layers[0]
    target = jax.random.normal(jax.random.key(1), model(x).shape)
    loss = lambda model: jnp.sum((model(x) - target) ** 2)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)["layers"][0]
    nn.merge_lora(model)
    full = nnx.grad(loss)(model)["layers"][0]["base"]["kernel"][...]
    gradient = layer.axes.to_matrix(full)
    a, b = layer.pair
    np.testing.assert_allclose(
        grads["lora_a"][...], layer.scale * gradient @ b.T, rtol=2e-4, atol=2e-3
    )
    np.testing.assert_allclose(
        grads["lora_b"][...], layer.scale * a.T @ gradient, rtol=2e-4, atol=2e-3
    )


@each
def test_linen_and_nnx_agree(settings):
    model, x = adapted(settings), image(settings)
    layer = model.layers[0]
    conv = linen.Conv(C_OUT, **{"kernel_size": (3,), **settings})
    config = layer.lora
    with nn.lora_interceptor(".*", config) as adapters:
        variables = conv.init(jax.random.key(0), x)
        params = {"kernel": layer.base.kernel[...]}
        if settings.get("use_bias", True):
            params["bias"] = layer.base.bias[...]
        lora = {"lora_a": layer.lora_a[...], "lora_b": layer.lora_b[...]}
        assert jax.tree.map(jnp.shape, variables["lora"]) == jax.tree.map(jnp.shape, lora)
        y = conv.apply({"params": params, "lora": lora}, x)
    np.testing.assert_allclose(y, model(x), atol=1e-5)
    merged = nn.merge_lora_variables({"params": params, "lora": lora}, adapters)
    np.testing.assert_allclose(conv.apply({"params": merged}, x), y, atol=1e-4)


METHODS = {
    "polora": (None, lambda s: polora(0.3, scale=s)),
    "altlora_plus": (None, lambda s: altlora_plus(0.03, scale=s)),
    "oplora": (nn.Shadows(momentum_rank=0), lambda s: oplora(0.1, momentum=0.0, scale=s)),
    "sds_lora": (
        nn.Frames(),
        lambda s: sds_lora(0.01, total_steps=60, warmup_steps=5, scale=s),
    ),
}


@pytest.mark.parametrize(("extra", "make"), METHODS.values(), ids=METHODS)
def test_methods_train_it(extra, make):
    settings = {"kernel_size": (3, 3)}
    model = adapted(settings, nn.LoRAConfig(rank=3, extra=extra))
    x = image(settings, (8,))
    target = nnx.Conv(C_IN, C_OUT, (3, 3), rngs=nnx.Rngs(5))(x)
    losses = train(model, make(nn.lora_scales(model)), x, target)
    assert losses[-1] < 0.7 * losses[0], losses


def test_oplora_moves_it_as_it_moves_the_matrix():
    """The shadows' products are those with the gradient of the whole kernel, over all patches."""
    settings, shadows = {"kernel_size": (2, 3)}, nn.Shadows(iterations=2, momentum_rank=0)
    model = adapted(settings, nn.LoRAConfig(rank=2, extra=shadows))
    layer, x = model.layers[0], image(settings)
    loss = lambda model: jnp.sum(jnp.sin(model(x)))
    full = nnx.grad(loss)(adapted(settings, nn.LoRAConfig(rank=2)))["layers"][0]["base"]["kernel"]
    gradient = layer.axes.to_matrix(full[...])
    tx = oplora(1e-2, momentum=0.0, iterations=2, scale=layer.scale)
    linear = lambda pair: jnp.sum(
        gradient * nn.lora_apply(jnp.eye(len(gradient)), pair, layer.scale)
    )
    expected, _ = tx.update(jax.grad(linear)(layer.pair), tx.init(layer.pair), layer.pair)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    before = layer.pair
    optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
    for side in "ab":
        moved = getattr(layer.pair, side) - getattr(before, side)
        np.testing.assert_allclose(moved, getattr(expected, side), rtol=1e-3, atol=1e-5)
    assert float(jnp.abs(expected.b).max()) > 1e-3


def test_what_cannot_be_adapted_is_refused_by_name():
    rngs = nnx.Rngs(0)
    grouped = nnx.Sequential(nnx.Conv(4, 8, (3,), feature_group_count=2, rngs=rngs))
    with pytest.raises(ValueError, match=r"layers/0: .*feature_group_count=2.*leave it out"):
        nn.add_lora(grouped, "layers/0", nn.LoRAConfig(rank=1), rngs=rngs)
    masked = nnx.Sequential(nnx.Conv(4, 8, (3,), mask=jnp.ones((3, 4, 8)), rngs=rngs))
    with pytest.raises(ValueError, match=r"layers/0: .*mask"):
        nn.add_lora(masked, "layers/0", nn.LoRAConfig(rank=1), rngs=rngs)
    transposed = nnx.Sequential(nnx.ConvTranspose(4, 8, (3,), rngs=rngs))
    with pytest.raises(ValueError, match=r"layers/0 is a ConvTranspose"):
        nn.add_lora(transposed, "layers/0", nn.LoRAConfig(rank=1), rngs=rngs)
    with pytest.raises(ValueError, match="exceeds min"):
        adapted({"kernel_size": (1,)}, nn.LoRAConfig(rank=4))
    conv = linen.Conv(8, (3,), feature_group_count=2)
    with (
        nn.lora_interceptor(".*", nn.LoRAConfig(rank=1)),
        pytest.raises(ValueError, match=r"the model: .*feature_group_count=2"),
    ):
        conv.init(jax.random.key(0), jnp.ones((1, 5, 4)))


def test_a_dense_stack_of_convolutions():
    """Layers made by nnx.vmap have a pair for each."""
    make = nnx.vmap(lambda rngs: nnx.Conv(3, 3, (3,), rngs=rngs), in_axes=0, out_axes=0)
    model = nnx.Sequential(make(nnx.Rngs(0).split(4)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    assert model.layers[0].lora_a.shape == (4, 9, 2)
    x = jnp.ones((2, 5, 3))
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    model.layers[0].lora_b[...] = jnp.ones_like(model.layers[0].lora_b[...])
    y = run(x, model.layers[0])
    nn.merge_lora(model)
    np.testing.assert_allclose(run(x, model.layers[0]), y, rtol=1e-4, atol=1e-4)


def test_a_window_that_fits_nowhere_gives_what_the_layer_gives():
    model = adapted({"kernel_size": (5,), "padding": "VALID"})
    assert model(jnp.ones((2, 2, C_IN))).shape == (2, 0, C_OUT)
