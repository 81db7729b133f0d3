"""Setups that train nothing, or too much, and that only a look at all parts can tell."""

import flax.linen
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from lowrank_optax import altlora, nn, oplora, sds_lora

X = jnp.ones((2, 6))


class Model(nnx.Module):
    def __init__(self, extra=None):
        self.up = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(6, 5, rngs=nnx.Rngs(1))
        nn.add_lora(self, "up|down", nn.LoRAConfig(2, extra=extra), rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def optimizer_of(model, tx=None, wrt=nnx.LoRAParam):
    return nnx.Optimizer(model, tx or altlora(0.1), wrt=wrt)


def gradients(model, loss=lambda model: jnp.sum((model(X) - 1) ** 2)):
    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)


@pytest.mark.parametrize(
    ("extra", "tx"),
    [
        (None, altlora(0.1)),
        (None, optax.adamw(0.1)),
        (nn.Frames(), sds_lora(0.1, total_steps=20)),
        (nn.Shadows(), optax.chain(oplora(0.1))),
    ],
)
def test_a_right_setup_has_no_problems(extra, tx):
    model = Model(extra)
    assert nn.check_training_setup(model, optimizer_of(model, tx), gradients(model)) == []


def test_a_merged_model_gets_no_gradients():
    model = Model()
    optimizer = optimizer_of(model)
    nn.merge_lora(model)
    merged, other, still = nn.check_training_setup(model, optimizer, gradients(model))
    assert "down is merged" in merged
    assert "up is merged" in other
    assert "No gradient reaches down, up" in still


def test_a_forgotten_add_lora_is_told():
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    (told,) = nn.check_training_setup(model, optimizer_of(model, optax.sgd(0.1), wrt=nnx.Param))
    assert "no LoRA layer" in told


def test_an_optimizer_that_moves_the_base_is_told():
    model = Model()
    (told,) = nn.check_training_setup(model, optimizer_of(model, optax.adamw(0.1), wrt=nnx.Param))
    assert "moves frozen weights: down/base/bias, down/base/kernel" in told
    only = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    missing, _ = nn.check_training_setup(model, optimizer_of(model, optax.sgd(0.1), wrt=only))
    assert "does not move down/lora_a, down/lora_b" in missing


def test_a_part_of_the_model_that_is_called_base_may_train():
    model = Model()
    model.base = nnx.Linear(2, 2, rngs=nnx.Rngs(3))
    wanted = nnx.Any(nnx.LoRAParam, lambda path, _: path[0] == "base")
    optimizer = optimizer_of(model, optax.sgd(0.1), wrt=wanted)
    assert nn.check_training_setup(model, optimizer) == []


@pytest.mark.parametrize(
    ("extra", "kind"), [(nn.Frames(), "FramedPair"), (nn.Shadows(), "ShadowedPair")]
)
def test_adamw_on_what_is_beside_the_factors_is_told(extra, kind):
    model = Model(extra)
    (told,) = nn.check_training_setup(model, optimizer_of(model, optax.adamw(0.1)))
    assert f"The adapters are {kind}, but the optimizer is none of this library" in told


def test_gradients_that_are_not_finite_and_skipped_pairs_are_told():
    model = Model(nn.Shadows())
    optimizer = optimizer_of(model, oplora(0.1))
    grads = gradients(model)
    scaled = jax.tree.map(lambda x: 3.0 * x, grads)
    with pytest.warns(UserWarning, match="moved no pair"):
        jax.block_until_ready(optimizer.update(model, scaled))
    bad = jax.tree.map(lambda x: x * jnp.nan, grads)
    counted, told = nn.check_training_setup(model, optimizer, bad)
    assert "has skipped 2" in counted
    assert "not finite at down, up" in told


class LinenModel(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(5, name="down")(flax.linen.Dense(6, name="up")(x))


def test_linen_adapters_that_an_interceptor_would_ignore_are_an_error():
    model, config = LinenModel(), nn.LoRAConfig(2)
    with nn.lora_interceptor("up|down", config):
        variables = model.init(jax.random.key(0), X)
    match = "up: the variables hold an adapter"
    with nn.lora_interceptor("down", config), pytest.raises(ValueError, match=match):
        model.apply(variables, X)
    with nn.lora_interceptor("up|down", config):
        model.apply(variables, X)
