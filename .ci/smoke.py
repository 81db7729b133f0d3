"""Trains with the installed wheel, away from the source tree: a Flax model, and every method."""

import importlib.metadata
import pathlib

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lowrank_optax as lo
from lowrank_optax import altlora_plus, nn

assert "site-packages" in str(pathlib.Path(lo.__file__)), lo.__file__
assert (pathlib.Path(lo.__file__).parent / "py.typed").exists()

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

plain = lo.LoRAPair(0.5 * jax.random.normal(jax.random.key(1), (8, 3)), jnp.zeros((3, 4)))
fitting = lo.LoRAPair(jnp.eye(8, 3), jnp.zeros((3, 4)))  # for LoRA-FA, which does not move a
shadowed = lo.shadow(plain, jax.random.key(2), iterations=2, momentum_rank=0)
metric = lo.shadow(plain, jax.random.key(2), metric=lo.Metric())
framed = lo.frame(plain, jax.random.key(3))
# SVDLoRA is left out: it moves a dense change.
methods = {
    "polora": (lo.polora(0.1), plain),
    "altlora": (lo.altlora(0.3), plain),
    "altlora_plus": (lo.altlora_plus(0.1), plain),
    "lora_plus": (lo.lora_plus(0.01), plain),
    "lora_fa": (lo.lora_fa(0.1), fitting),
    "lora_pro": (lo.lora_pro(0.1), plain),
    "lora_pro_efficient": (lo.lora_pro_efficient(0.1), plain),
    "lora_soap": (lo.lora_soap(0.1), plain),
    "reflora": (lo.reflora(0.1, warmup_steps=0), plain),
    "lora_rite": (lo.lora_rite(0.1), plain),
    "lora_muon": (lo.lora_muon(0.1), plain),
    "scaled_adamw": (lo.scaled_adamw(0.1), plain),
    "oplora": (lo.oplora(0.3, momentum=0.0), shadowed),
    "oplora_proj": (lo.oplora_proj(0.3, momentum=0.0), shadowed),
    "scaled_oplora": (lo.scaled_oplora(0.1), metric),
    "sds_lora": (lo.sds_lora(0.03, total_steps=60, warmup_steps=0), framed),
}


def fit(pair):
    return optax.l2_loss(nn.lora_apply(x, pair), x[:, :1] @ jnp.ones((1, 4))).mean()


def train(tx, pair, steps=60):
    state = tx.init(pair)
    update = jax.jit(lambda pair, state: tx.update(jax.grad(fit)(pair), state, pair))
    for _ in range(steps):
        updates, state = update(pair, state)
        pair = optax.apply_updates(pair, updates)
    return pair


for name, (tx, pair) in methods.items():
    before, after = fit(pair), fit(train(tx, pair))
    assert after < 0.7 * before, (name, before, after)
versions = f"JAX {jax.__version__}, Flax {flax.__version__}, optax {optax.__version__}"
print(f"{len(methods)} methods train with {versions}")
