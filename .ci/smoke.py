"""Trains an adapter with the installed wheel, away from the source tree."""

import importlib.metadata
import pathlib

import jax
import optax
from flax import nnx

import lowrank_optax
from lowrank_optax import altlora_plus, nn

assert "site-packages" in str(pathlib.Path(lowrank_optax.__file__)), lowrank_optax.__file__
assert (pathlib.Path(lowrank_optax.__file__).parent / "py.typed").exists()

model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
model = nnx.Sequential(model)
x = jax.random.normal(jax.random.key(0), (16, 8))
y = model(x) + x[:, :1]  # a change of rank one
config = nn.LoRAConfig(rank=2, alpha=4.0)
paths = nn.add_lora(model, "layers/0", config, rngs=nnx.Rngs(1))
optimizer = nnx.Optimizer(model, altlora_plus(3e-2, scale=nn.lora_scales(model)), wrt=nnx.LoRAParam)


@nnx.jit
def step(model, optimizer):
    loss, grads = nnx.value_and_grad(
        lambda m: optax.l2_loss(m(x), y).mean(), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )(model)
    optimizer.update(model, grads)
    return loss


losses = [float(step(model, optimizer)) for _ in range(30)]
assert losses[-1] < 0.7 * losses[0], losses
print(
    f"lowrank_optax {importlib.metadata.version('lowrank-optax')}: adapted {paths},"
    f" loss {losses[0]:.3f} -> {losses[-1]:.3f}"
)
