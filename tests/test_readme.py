"""The README's examples run as they stand: the first by itself, the others on small models."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

from lowrank_optax import ShadowedPair

ROOT = pathlib.Path(__file__).parent.parent
README, CHECKPOINTS = ROOT / "README.md", ROOT / "docs" / "checkpoints.md"


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(16, name="query")(x) * linen.Dense(16, name="value")(x)


def blocks(page=README):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def losses(scope, steps=20):
    """Those of the first example's training step, with the model and optimizer of another one."""
    optimizer = nnx.Optimizer(scope["model"], scope["tx"], wrt=nnx.LoRAParam)
    batch = scope["x"], scope["y"]
    return [scope["train_step"](scope["model"], optimizer, *batch) for _ in range(steps)]


def test_readme_examples_train(capsys):
    first, oplora, sds_lora, in_linen = blocks()
    scope = {}
    exec(first, scope)
    assert "2 adapters" in capsys.readouterr().out
    before = scope["loss_fn"](scope["Model"](nnx.Rngs(0)), (scope["x"], scope["y"]))
    assert scope["loss"] < 0.5 * before

    factors = {"a": jnp.ones((6, 2)), "b": jnp.zeros((2, 4)), "key": jax.random.key(0)}
    for block in (oplora, sds_lora):
        scope |= {"model": scope["Model"](nnx.Rngs(0)), **factors}
        exec(block, scope)
        first_loss, *_, last_loss = losses(scope)
        assert last_loss < first_loss
    assert isinstance(scope["pair"], ShadowedPair)

    scope |= {"model": LinenModel(), "key": jax.random.key(0), "x": jnp.ones((2, 16)) / 4}
    scope |= {"loss_fn": lambda y: jnp.mean((y - 1) ** 2)}
    exec(in_linen, scope)
    assert jax.tree.structure(scope["grads"]) == jax.tree.structure(scope["variables"]["lora"])
    lora, tx = scope["variables"]["lora"], scope["tx"]
    updates, _ = tx.update(scope["grads"], tx.init(lora), lora)
    after = scope["loss"](optax.apply_updates(lora, updates))
    assert after < scope["loss"](lora)


def test_the_page_of_checkpoints_runs(capsys):
    """One block after the other; the first compares a run that went on with a whole one."""
    scope = {}
    for block in blocks(CHECKPOINTS):
        exec(block, scope)
    assert scope["its_loss"] == scope["loss"]
    assert "layers_0" in capsys.readouterr().out
    lies = scope["lora"]["layers_0"]["lora_a"].sharding
    assert len(lies.device_set) == 8
