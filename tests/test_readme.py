"""The README's examples run as they stand, on small models."""

import pathlib
import re

import jax
import jax.numpy as jnp
from flax import linen, nnx

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


def test_readme_examples_train():
    x = jnp.ones((2, 16))
    nnx_block, linen_block = blocks()
    scope = {"MyModel": NnxModel, "loss_fn": lambda model, batch: jnp.mean((model(batch) - 1) ** 2)}
    exec(nnx_block, scope)
    losses = [scope["train_step"](scope["model"], scope["optimizer"], x) for _ in range(20)]
    assert losses[-1] < losses[0]

    scope |= {"model": LinenModel(), "key": jax.random.key(0), "x": x}
    scope |= {"loss_fn": lambda y: jnp.mean((y - 1) ** 2)}
    exec(linen_block, scope)
    assert jax.tree.structure(scope["grads"]) == jax.tree.structure(scope["variables"]["lora"])
    assert any(jnp.any(g) for g in jax.tree.leaves(scope["grads"]))
