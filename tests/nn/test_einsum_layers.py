"""Einsum layers of other libraries: an `einsum_str` and one kernel are all that LoRA needs."""

import pickle
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_optax import nn
from lowrank_optax.adapters import read_peft, save_peft

CONFIG = nn.LoRAConfig(rank=2, alpha=6.0, b_init=jax.nn.initializers.normal(0.5))
STRINGS = {  # as of attention: a projection to heads, back, and keys and values in one kernel
    "btd,dnh->btnh": (4, 3, 2),
    "btnh,nhd->btd": (3, 2, 4),
    "btd,ckdh->cbtkh": (2, 3, 4, 2),
}


class Einsum(nnx.Module):
    """A layer with names of its own, a bias among them."""

    def __init__(self, einsum_str, shape, rngs):
        self.einsum_str, self.shape = einsum_str, shape
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.offset = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...]) + self.offset[...]


class Model(nnx.Module):
    def __init__(self, einsum_str, shape):
        self.layer = Einsum(einsum_str, shape, nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


class LinenEinsum(flax.linen.Module):
    einsum_str: str
    shape: Any

    @flax.linen.compact
    def __call__(self, x):
        w = self.param("w", flax.linen.initializers.normal(), self.shape)
        offset = self.param("offset", flax.linen.initializers.ones, ())
        return jnp.einsum(self.einsum_str, x, w) + offset


def input_of(einsum_str, shape):
    x, kernel = einsum_str.split("->")[0].split(",")
    sizes = {"b": 2, "t": 5, **dict(zip(kernel, shape, strict=True))}
    return jax.random.normal(jax.random.key(1), [sizes[label] for label in x])


each_string = pytest.mark.parametrize(("einsum_str", "shape"), STRINGS.items())


@each_string
def test_nnx_layers_are_adapted_merged_and_removed(einsum_str, shape):
    model, x = Model(einsum_str, shape), input_of(einsum_str, shape)
    plain = model(x)
    assert nn.add_lora(model, "layer", CONFIG, rngs=nnx.Rngs(2)) == ["layer"]
    layer: Any = model.layer
    delta = layer.axes.from_matrix(nn.lora_delta(layer.pair, layer.scale), shape)
    adapted = model(x)
    np.testing.assert_allclose(adapted, plain + jnp.einsum(einsum_str, x, delta), rtol=1e-4)
    with pytest.warns(UserWarning, match="Einsum has its own __call__"):
        assert nn.merge_lora(model) == ["layer"]
    np.testing.assert_allclose(model(x), adapted, rtol=1e-4, atol=1e-5)
    nn.unmerge_lora(model)
    assert nn.remove_lora(model) == ["layer"]
    np.testing.assert_allclose(model(x), plain, rtol=1e-4, atol=1e-5)


@each_string
def test_linen_layers_are_adapted_and_merged(einsum_str, shape):
    model, x = LinenEinsum(einsum_str, shape), input_of(einsum_str, shape)
    with nn.lora_interceptor(".*", CONFIG) as adapters:
        adapted, variables = model.init_with_output(jax.random.key(0), x)
    assert adapters[""].kernel == "w"
    assert not np.allclose(adapted, model.apply({"params": variables["params"]}, x))
    merged = nn.merge_lora_variables(variables, adapters)
    np.testing.assert_allclose(model.apply({"params": merged}, x), adapted, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_kernel_projected():
    """Of s aᵀ G and s G bᵀ, with G the gradient in the kernel."""
    einsum_str, shape = "btd,dnh->btnh", (4, 3, 2)
    model, x = Model(einsum_str, shape), input_of(einsum_str, shape)
    nn.add_lora(model, "layer", CONFIG, rngs=nnx.Rngs(2))
    grads: Any = nnx.grad(lambda model: jnp.sum(model(x) ** 3))(model)
    full, layer = grads["layer"]["base"]["w"][...].reshape(4, 6), model.layer
    a, b = layer.lora_a[...], layer.lora_b[...]
    np.testing.assert_allclose(grads["layer"]["lora_a"][...], 3.0 * full @ b.T, rtol=1e-4)
    np.testing.assert_allclose(grads["layer"]["lora_b"][...], 3.0 * a.T @ full, rtol=1e-4)


def test_a_model_may_ask_its_layers_for_what_they_are():
    """As tunix's attention does, which reads its head size from the shape of a layer."""
    model = Model("btd,dnh->btnh", (4, 3, 2))
    nn.add_lora(model, "layer", CONFIG, rngs=nnx.Rngs(2))
    layer: Any = model.layer
    assert layer.shape == (4, 3, 2)
    assert layer.w is layer.base.w
    with pytest.raises(AttributeError, match="'Einsum' object has no attribute 'head_dim'"):
        _ = layer.head_dim
    with pytest.raises(AttributeError, match="'LoRALayer' object has no attribute '_private'"):
        _ = layer._private
    assert not hasattr(nnx.clone(model).layer, "lora_m_a")


def test_gradient_starts_and_exports_of_changed_kernels(tmp_path):
    """What starts and PEFT files ask of a kernel they ask of one by another name too."""
    model, x = Model("btd,dnh->btnh", (4, 3, 2)), input_of("btd,dnh->btnh", (4, 3, 2))
    nn.add_lora(model, "layer", CONFIG, rngs=nnx.Rngs(2))
    original, before = nnx.clone(model), model.layer.base.w[...]
    loss = lambda model, x: jnp.sum(model(x) ** 2)
    nn.gradient_start(model, loss, [x], method="lora_one", keep_function=True)
    changed = model.layer.base.w[...] - before
    assert jnp.max(jnp.abs(changed)) > 0
    save_peft(tmp_path / "out", model, original=original)
    pair = read_peft(tmp_path / "out").pairs["layer"]
    # The kernel gave up what the pair stands for: together they are nothing.
    np.testing.assert_allclose(pair.a @ pair.b, np.zeros((4, 6)), atol=1e-5)


def test_kernels_that_cannot_be_told_are_refused():
    class TwoKernels(Einsum):
        def __init__(self, *args):
            super().__init__(*args)
            self.other = nnx.Param(self.w[...])

    model = nnx.List([TwoKernels("btd,dnh->btnh", (4, 3, 2), nnx.Rngs(0))])
    with pytest.raises(ValueError, match="0 is a TwoKernels; LoRA adapts"):
        nn.add_lora(model, "0", CONFIG, rngs=nnx.Rngs(1))

    class TwoLinenKernels(LinenEinsum):
        @flax.linen.compact
        def __call__(self, x):
            other = self.param("other", flax.linen.initializers.normal(), self.shape)
            w = self.param("w", flax.linen.initializers.normal(), self.shape)
            return jnp.einsum(self.einsum_str, x, w + other)

    linen_model = TwoLinenKernels("btd,dnh->btnh", (4, 3, 2))
    with (
        pytest.raises(ValueError, match=r"cannot tell it among the parameters \(other, w\)"),
        nn.lora_interceptor(".*", CONFIG),
    ):
        linen_model.init(jax.random.key(0), jnp.ones((2, 5, 4)))


def test_a_bias_beside_the_kernel_is_not_taken_for_one():
    """Of as many axes as the kernel, or stacked by `nnx.vmap`; nor is what is no array."""
    model = Model("btd,df->btf", (4, 5))
    model.layer.bias = nnx.Param(jnp.ones((1, 1, 5)))
    model.layer.nothing = nnx.Param(None)
    nn.add_lora(model, "layer", CONFIG, rngs=nnx.Rngs(1))
    assert model.layer.kernel is model.layer.w

    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stacked(rngs):
        layer = Einsum("btd,df->btf", (4, 5), rngs)
        layer.bias = nnx.Param(jnp.ones(5))
        return layer

    model = nnx.List([stacked(nnx.Rngs(0).split(3))])
    nn.add_lora(model, "0", CONFIG, rngs=nnx.Rngs(1))
    assert model[0].lora_a.shape == (3, 4, 2)


def test_methods_of_the_base_do_not_pass_by_the_adapter():
    class WithMethod(Einsum):
        def project(self, x):
            return self(x)

    model = nnx.List([WithMethod("btd,df->btf", (4, 5), nnx.Rngs(0))])
    nn.add_lora(model, "0", CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(AttributeError, match=r"WithMethod.project would pass by the adapter"):
        model[0].project(jnp.ones((1, 2, 4)))


def test_what_is_set_on_the_layer_is_set_on_its_base():
    model = Model("btd,df->btf", (4, 5))
    nn.add_lora(model, "layer", CONFIG, rngs=nnx.Rngs(1))
    layer: Any = model.layer
    layer.offset = nnx.Param(jnp.full((), 7.0))
    layer.kernel = nnx.Param(jnp.zeros((4, 5)))
    layer.lora_b[...] = jnp.zeros_like(layer.lora_b[...])
    np.testing.assert_allclose(model(jnp.ones((1, 2, 4))), 7.0)
    assert "offset" not in vars(layer)
    assert layer.base.w is layer.kernel


def test_names_that_base_and_adapter_have_are_told():
    model = Model("btd,df->btf", (4, 5))
    model.layer.scale = 7.0
    with pytest.warns(UserWarning, match=r"names too: layer\.scale\. A model that reads them"):
        nn.add_lora(model, "layer", CONFIG, rngs=nnx.Rngs(1))


def test_a_string_with_the_kernel_first_is_refused_where_sizes_tell():
    class KernelFirst(Einsum):
        def __call__(self, x):
            return jnp.einsum(self.einsum_str, self.w[...], x)

    model = nnx.List([KernelFirst("df,bd->bf", (4, 5), nnx.Rngs(0))])
    nn.add_lora(model, "0", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="the string must have the input first and the kernel"):
        model[0](jnp.ones((3, 4)))


def test_other_einsum_strings_are_named_only_where_they_are_targets():
    model = Model("btd,df->btf", (4, 5))
    model.other = Einsum("ab,bc,cd->ad", (2, 2), nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"no module: lyer\. Layers that can be adapted: layer"):
        nn.add_lora(model, "lyer", CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="'ab,bc,cd->ad' is not of the form"):
        nn.add_lora(model, "other", CONFIG, rngs=nnx.Rngs(1))


def test_linen_layers_with_parameters_made_in_setup():
    class InSetup(flax.linen.Module):
        def setup(self):
            self.einsum_str = "btd,df->btf"
            self.w = self.param("w", flax.linen.initializers.normal(), (4, 5))

        def __call__(self, x):
            return jnp.einsum(self.einsum_str, x, self.w)

    model, x = InSetup(), jnp.ones((1, 2, 4))
    with nn.lora_interceptor(".*", CONFIG) as adapters:
        adapted, variables = model.init_with_output(jax.random.key(0), x)
        again = model.apply(variables, x)
    np.testing.assert_array_equal(adapted, again)
    merged = nn.merge_lora_variables(variables, adapters)
    np.testing.assert_allclose(model.apply({"params": merged}, x), adapted, rtol=1e-4)


def test_a_misspelt_target_on_pretrained_parameters_is_an_error():
    model = flax.linen.Sequential([flax.linen.Dense(5), flax.linen.Dense(5)])
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
    with (
        pytest.raises(ValueError, match="match no module: layer_1"),
        nn.lora_interceptor(["layers_0", "layer_1"], CONFIG),
    ):
        model.apply(variables, jnp.ones((2, 4)), mutable=["lora"], rngs={"lora": jax.random.key(1)})


def test_settings_and_layers_can_be_pickled():
    config = nn.LoRAConfig(rank=2)
    assert pickle.loads(pickle.dumps(config)) == config
