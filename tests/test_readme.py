"""The README's examples run as they stand, on small models."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

from lowrank_optax import ShadowedPair

README = pathlib.Path(__file__).parent.parent / "README.md"


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.Linear(16, 16, rngs=rngs)
        self.value = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return self.query(x) * self.value(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.attention = Attention(rngs)

    def __call__(self, x):
        return self.attention(x)


class LinenAttention(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(16, name="query")(x) * linen.Dense(16, name="value")(x)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return LinenAttention(name="attention")(x)


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def train(scope, model, tx, steps):
    """Losses of the first example's training step."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    return [scope["train_step"](model, optimizer, X) for _ in range(steps)]


X = jnp.ones((2, 16)) / 4  # of norm 1, which suits a rate of 0.1


def test_readme_examples_train():
    first, oplora, sds_lora, in_linen = blocks()
    scope = {"MyModel": NnxModel, "loss_fn": lambda model, batch: jnp.mean((model(batch) - 1) ** 2)}
    exec(first, scope)
    losses = [scope["train_step"](scope["model"], scope["optimizer"], X) for _ in range(20)]
    assert losses[-1] < losses[0]

    factors = {"a": jnp.ones((6, 2)), "b": jnp.zeros((2, 4)), "key": jax.random.key(0)}
    for block in (oplora, sds_lora):
        scope |= {"model": NnxModel(nnx.Rngs(0)), **factors}
        exec(block, scope)
        losses = train(scope, scope["model"], scope["tx"], 20)
        assert losses[-1] < losses[0]
    assert isinstance(scope["pair"], ShadowedPair)

    scope |= {"model": LinenModel(), "key": jax.random.key(0), "x": X}
    scope |= {"loss_fn": lambda y: jnp.mean((y - 1) ** 2)}
    exec(in_linen, scope)
    assert jax.tree.structure(scope["grads"]) == jax.tree.structure(scope["variables"]["lora"])
    lora, tx = scope["variables"]["lora"], scope["tx"]
    updates, _ = tx.update(scope["grads"], tx.init(lora), lora)
    after = scope["loss"](optax.apply_updates(lora, updates))
    assert after < scope["loss"](lora)
