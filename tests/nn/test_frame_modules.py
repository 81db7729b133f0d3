"""Flax modules with frames, as SDS-LoRA trains them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from lowrank_optax import FramedPair, frame, nn, sds_lora

X = jax.random.normal(jax.random.key(1), (16, 6))
TARGET = jax.random.normal(jax.random.key(2), (16, 5))
CONFIG = nn.LoRAConfig(rank=2, alpha=4.0, extra=nn.Frames())
SCALE = 4.0 / np.sqrt(2)
STEPS = 12


def make_tx():
    return sds_lora(0.05, total_steps=STEPS, warmup_steps=3, phases=2, scale=SCALE)


def functional_run(kernel, bias, node):
    """The same training by hand."""
    loss = lambda node: jnp.mean((X @ kernel + bias + nn.lora_apply(X, node, SCALE) - TARGET) ** 2)
    return trained(loss, node)


def trained(loss, lora):
    """What a loss's adapters become, and the losses on the way."""
    tx = make_tx()

    def step(carry, _):
        lora, state = carry
        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = tx.update(grads, state, lora)
        return (optax.apply_updates(lora, updates), state), value

    (lora, _), losses = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=STEPS))(lora)
    return lora, losses


def test_an_nnx_layer_is_built_with_one_argument_and_trained():
    layer = nn.LoRALinear(6, 5, lora=CONFIG, rngs=nnx.Rngs(0))
    assert isinstance(layer.pair, FramedPair)
    assert layer.scale == pytest.approx(SCALE)
    plain = nn.LoRALinear(6, 5, lora=nn.LoRAConfig(rank=2, alpha=4.0), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(X), plain(X))
    kernel, bias = jnp.copy(layer.base.kernel[...]), jnp.copy(layer.base.bias[...])
    expected, losses = functional_run(kernel, bias, layer.pair)
    optimizer = nnx.Optimizer(layer, make_tx(), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(layer, optimizer):
        loss = lambda layer: jnp.mean((layer(X) - TARGET) ** 2)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
        optimizer.update(layer, grads)

    for _ in range(STEPS):
        step(layer, optimizer)
    for one, two in zip(layer.pair, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert layer.pair.warm == 0
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_array_equal(layer.base.kernel[...], kernel)


def test_surgery_merges_and_unmerges_a_framed_adapter():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, x):
            return self.dense(x)

    model = Model(nnx.Rngs(0))
    base = model(X)
    config = nn.LoRAConfig(rank=2, extra=nn.Frames(warmup=False))
    nn.add_lora(model, "dense", config, rngs=nnx.Rngs(1))
    assert model.dense.pair.warm is None
    np.testing.assert_array_equal(model(X), base)
    model.dense.lora_a[...] = jnp.ones((6, 2))
    changed = model(X)
    assert jnp.max(jnp.abs(changed - base)) > 0.1
    nn.merge_lora(model)
    np.testing.assert_allclose(model(X), changed, atol=1e-5)
    nn.unmerge_lora(model)
    np.testing.assert_allclose(model(X), changed, atol=1e-5)


def test_linen_layers_and_the_interceptor():
    module = nn.LoRADense(5, lora=CONFIG)
    variables = module.init(jax.random.key(0), X)
    names = {"lora_a", "lora_b", "lora_f_in", "lora_f_out", "lora_warm"}
    assert set(variables["lora"]) == names
    node = FramedPair(**{name[5:]: leaf for name, leaf in variables["lora"].items()})
    params = variables["params"]
    expected, losses = functional_run(params["kernel"], params["bias"], node)
    loss = lambda lora: jnp.mean((module.apply({**variables, "lora": lora}, X) - TARGET) ** 2)
    lora, _ = trained(loss, variables["lora"])
    for name, leaf in expected._asdict().items():
        np.testing.assert_allclose(lora[f"lora_{name}"], leaf, rtol=1e-4, atol=1e-5)
    assert losses[-1] < 0.8 * losses[0]


def test_the_linen_interceptor_and_merging():
    model = linen.Sequential([linen.Dense(5)])
    config = nn.LoRAConfig(rank=2, extra=nn.Frames(warmup=False))
    with nn.lora_interceptor("layers_0", config) as adapters:
        adapted = model.init({"params": jax.random.key(0), "lora": jax.random.key(1)}, X)
        leaves = dict(adapted["lora"]["layers_0"])
        assert set(leaves) == {"lora_a", "lora_b", "lora_f_in", "lora_f_out"}
        lora = {"layers_0": {**leaves, "lora_a": jnp.ones((6, 2))}}
        adapted = {"params": adapted["params"], "lora": lora}
        changed = model.apply(adapted, X)
    assert jnp.max(jnp.abs(changed - model.apply({"params": adapted["params"]}, X))) > 0.1
    merged = nn.merge_lora_variables(adapted, adapters)
    np.testing.assert_allclose(model.apply({"params": merged}, X), changed, atol=1e-5)


def test_stacked_kernels_have_stacked_frames():
    pair = nn.LoRAConfig(rank=2, extra=nn.Frames()).init_pair(jax.random.key(0), (3,), 6, 5)
    assert pair.f_in.shape == (3, 6, 2)
    assert pair.warm.shape == (3,)
    alone = frame(type(pair)(*(leaf[1] for leaf in pair)))
    np.testing.assert_array_equal(alone.f_in, pair.f_in[1])
