"""Layers of others: a base is called with what the caller gave, nothing more."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_optax import nn
from lowrank_optax.nn.calls import read_call

ONES = jax.nn.initializers.ones
CONFIG = nn.LoRAConfig(rank=2, alpha=2.0, b_init=ONES)


class OnlyX(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x)


class WithKeywords(nnx.Linear):
    def __call__(self, x, gain=1.0, *, shift=0.0):
        return super().__call__(gain * x) + shift


class Anything(nnx.Linear):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        (OnlyX, ("x",), {}),
        (OnlyX, (), {"x": "x"}),
        (WithKeywords, ("x",), {"shift": 1.0}),
        (WithKeywords, ("x", 1.0), {}),
        (WithKeywords, (), {"shift": 1.0, "x": "x"}),
        (Anything, ("x",), {"out_sharding": None}),
        (nnx.Linear, (), {"inputs": "x"}),
    ],
)
def test_an_nnx_base_gets_what_the_caller_gave(kind, args, kwargs):
    layer = nn.LoRALayer(kind(4, 6, rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(2), (3, 4))
    fill = lambda value: x if isinstance(value, str) else value
    args, kwargs = [fill(v) for v in args], {k: fill(v) for k, v in kwargs.items()}
    expected = layer.base(*args, **kwargs) + nn.lora_apply(x, layer.pair, layer.scale)
    np.testing.assert_allclose(layer(*args, **kwargs), expected, rtol=1e-6)


def test_an_unknown_argument_is_the_bases_error():
    layer = nn.LoRALayer(OnlyX(4, 6, rngs=nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match=r"OnlyX.__call__\(\) got an unexpected keyword"):
        layer(jnp.ones((1, 4)), out_sharding=None)


def test_add_lora_adapts_a_subclass_and_einsum_strings_still_count():
    model = nnx.Dict(q=OnlyX(4, 6, rngs=nnx.Rngs(0)))
    assert nn.add_lora(model, "q", CONFIG, rngs=nnx.Rngs(1)) == ["q"]
    assert model["q"](jnp.ones((1, 4))).shape == (1, 6)
    einsum = nn.LoRAEinsum("bd,df->bf", (4, 6), lora=CONFIG, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(einsum(x, einsum_str="td,df->tf"), einsum(x))
    with pytest.raises(ValueError, match="other roles"):
        einsum(jnp.ones((2, 6)), einsum_str="bf,df->bd")


class LinenWithKeywords(flax.linen.Dense):
    @flax.linen.compact
    def __call__(self, x, train=False, *, shift=0.0):
        return super().__call__(x) + shift


class Inherited(flax.linen.Dense):
    """Without a `__call__` of its own."""


class LinenModel(flax.linen.Module):
    kind: type
    kwargs: dict

    @flax.linen.compact
    def __call__(self, x):
        kwargs = {k: x if isinstance(v, str) else v for k, v in self.kwargs.items()}
        args = () if "x" in kwargs or "inputs" in kwargs else (x,)
        return self.kind(6, name="q")(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (LinenWithKeywords, {}),
        (LinenWithKeywords, {"train": True, "shift": 1.0}),
        (LinenWithKeywords, {"shift": 1.0, "x": "x"}),
        (Inherited, {"inputs": "x"}),
        (flax.linen.Dense, {"inputs": "x"}),
    ],
)
def test_the_interceptor_adds_one_adapter_whatever_the_signature(kind, kwargs):
    model = LinenModel(kind, kwargs)
    x = jax.random.normal(jax.random.key(2), (3, 4))
    with nn.lora_interceptor("q", CONFIG) as adapters:
        y, variables = model.init_with_output(jax.random.key(0), x)
    plain = model.apply({"params": variables["params"]}, x)
    factors = variables["lora"]["q"]
    delta = CONFIG.scale * x @ factors["lora_a"] @ factors["lora_b"]
    np.testing.assert_allclose(y, plain + delta, rtol=1e-5, atol=1e-6)
    merged = nn.merge_lora_variables(variables, adapters)
    np.testing.assert_allclose(model.apply({"params": merged}, x), y, rtol=1e-5, atol=1e-5)


def test_a_call_without_an_input_says_so():
    with pytest.raises(TypeError, match="without an input"):
        read_call(lambda *args: None, (), {})
