# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: from AdamW to PoLoRA by one line
#
# A small network has learned one photograph. LoRA adapters shall teach it another one.
#
# 1. We add adapters to a Flax NNX model and train them with `optax.adamw`.
# 2. We change the optimizer to `polora`, and start the adapters from the gradient.
# 3. We compare the curves, each optimizer at its own best rate, and look at the adapters.

# %%
import importlib.util
import subprocess
import sys


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *arguments]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(
            "pip failed, for the reason above. lowrank-optax is not on PyPI yet: install it from a"
            " checkout, by pip install '.[notebooks]'. For the rest pip needs a network. Then run"
            f" this cell again. The command was: pip {' '.join(map(str, arguments))}"
        )


# Installs the package, unless a checkout or a wheel is there. An accelerator keeps its JAX plugin.
if importlib.util.find_spec("lowrank_optax") is None:
    plugins = {"tpu": "libtpu", "cuda12": "jax_cuda12_plugin", "cuda13": "jax_cuda13_plugin"}
    found = [f"jax[{key}]" for key, name in plugins.items() if importlib.util.find_spec(name)]
    pip("install", "-q", "lowrank-optax[notebooks]", *found)

import jax

if jax.__version_info__ < (0, 10, 1):
    raise SystemExit(
        f"This needs JAX 0.10.1 or newer, and here is {jax.__version__}. "
        "Run `pip install -U jax`, and restart the kernel."
    )

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_sample_image
from tqdm import tqdm

from lowrank_optax import nn, plots, polora
from lowrank_optax.adapters import spectrum

plt.rcParams.update({"figure.dpi": 80, "figure.facecolor": "white", "grid.alpha": 0.3})
COLORS = {"AdamW": "#777777", "PoLoRA": "#d55e00"}
print(f"JAX {jax.__version__} on {jax.device_count()} {jax.devices()[0].platform} device(s)")

# %% [markdown]
# ## Two photographs and a model
#
# The model maps a pixel's place to its colour. The place is given by sines and cosines of random
# frequencies. 15 % of the pixels are held out: all losses below are of these.

# %%
HEIGHT, WIDTH = 53, 80
rng = np.random.default_rng(0)
places = np.stack(np.meshgrid(np.linspace(-1, 1, HEIGHT), np.linspace(-1, 1, WIDTH), indexing="ij"))
angles = np.pi * places.reshape(2, -1).T @ rng.normal(0, 2.0, (2, 128))
inputs = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

order = rng.permutation(len(inputs))
train_pixels, test_pixels = np.split(order, [int(0.85 * len(order))])


def photograph(name):
    pixels = load_sample_image(name)[: 8 * HEIGHT, : 8 * WIDTH].astype(np.float32) / 255
    return pixels.reshape(HEIGHT, 8, WIDTH, 8, 3).mean((1, 3))


flower, china = photograph("flower.jpg"), photograph("china.jpg")


class Painter(nnx.Module):
    """Maps places to colours."""

    def __init__(self, rngs):
        self.first = nnx.Linear(256, 256, rngs=rngs)
        self.second = nnx.Linear(256, 256, rngs=rngs)
        self.third = nnx.Linear(256, 256, rngs=rngs)
        self.last = nnx.Linear(256, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.gelu(self.first(x))
        x = nnx.gelu(self.second(x))
        return self.last(nnx.gelu(self.third(x)))


def loss_fn(model, batch):
    x, colors = batch
    return jnp.mean((model(x) - colors) ** 2)


# %% [markdown]
# ## One training loop for everything
#
# `wrt` says what is trained: all weights (`nnx.Param`) or the adapters alone (`nnx.LoRAParam`).

# %%
STEPS, BATCH, EVERY = 200, 256, 5
evaluate = nnx.jit(loss_fn)


def train(model, tx, picture, wrt, steps=STEPS, seed=0):
    """Trains a model in place, and returns its losses on the held-out pixels."""
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer, x, colors):
        gradient = nnx.grad(loss_fn, argnums=nnx.DiffState(0, wrt))
        optimizer.update(model, gradient(model, (x, colors)))

    colors, rng, losses = picture.reshape(-1, 3), np.random.default_rng(seed), []
    test = inputs[test_pixels], colors[test_pixels]
    for count in range(steps):
        if count % EVERY == 0:
            losses.append(float(evaluate(model, test)))
        rows = rng.choice(train_pixels, BATCH)
        step(model, optimizer, inputs[rows], colors[rows])
    return np.array([*losses, float(evaluate(model, test))])


base = Painter(nnx.Rngs(0))
pretraining = train(base, optax.adam(2e-3), flower, nnx.Param, steps=300)
print(f"the flower: loss {pretraining[0]:.3f} before, {pretraining[-1]:.4f} after")

# %% [markdown]
# ## Adapters
#
# `nn.add_lora` puts an adapter of rank 8 beside three kernels, in place. We keep the base and
# adapt clones of it. (A second `add_lora` on one model is an error. `nn.remove_lora(model)` takes
# the adapters off.)


# %%
CONFIG = nn.LoRAConfig(rank=8, alpha=16.0)


def adapted(seed=0):
    model = nnx.clone(base)
    nn.add_lora(model, "first|second|third", CONFIG, rngs=nnx.Rngs(seed))
    return model


nn.lora_summary(adapted())

# %% [markdown]
# ## AdamW, then PoLoRA
#
# The change is one line: `optax.adamw(schedule)` becomes `polora(schedule, scale=...)`.
#
# PoLoRA's learning rate bounds how far one step changes $s\,a\,b$, so it is larger than AdamW's.
# Beside it, we start the adapters from the gradient of one batch: `nn.gradient_start` aligns
# the factors with the leading singular vectors of the full gradient. PoLoRA does not need a large
# start, hence the large `gamma`. It costs two gradients, which we count as two steps.


# %%
def schedule(rate):
    return optax.warmup_cosine_decay_schedule(0.0, rate, STEPS // 10, STEPS)


def with_adamw(rate, seed=0):
    model = adapted(seed)
    tx = optax.adamw(schedule(rate))
    return model, train(model, tx, china, nnx.LoRAParam, seed=seed)


colors = china.reshape(-1, 3)
batch = inputs[train_pixels[:BATCH]], colors[train_pixels[:BATCH]]


def with_polora(rate, seed=0):
    model = adapted(seed)
    nn.gradient_start(model, loss_fn, [batch], gamma=1e6, iterations=0, progress=False)
    tx = polora(schedule(rate), scale=nn.lora_scales(model))
    return model, train(model, tx, china, nnx.LoRAParam, seed=seed)


# %% [markdown]
# Each optimizer gets four rates with three seeds each. Its best rate is that with the lowest mean
# loss.

# %%
RATES = {"AdamW": [3e-3, 1e-2, 3e-2, 1e-1], "PoLoRA": [0.1, 0.3, 1.0, 3.0]}
RUN = {"AdamW": with_adamw, "PoLoRA": with_polora}
SEEDS = range(3)

plan = [(name, rate, seed) for name in RUN for rate in RATES[name] for seed in SEEDS]
runs = {}
for name, rate, seed in tqdm(plan, desc="rates and seeds"):
    runs[name, rate, seed] = RUN[name](rate, seed)

# %%
curves = {
    name: {rate: np.array([runs[name, rate, seed][1] for seed in SEEDS]) for rate in RATES[name]}
    for name in RUN
}
sweep = {name: {rate: c[:, -1].mean() for rate, c in of.items()} for name, of in curves.items()}
best = {name: min(losses, key=losses.get) for name, losses in sweep.items()}
models = {name: runs[name, best[name], 0][0] for name in RUN}

goal = sweep["AdamW"][best["AdamW"]]
below = curves["PoLoRA"][best["PoLoRA"]].mean(0) <= goal
reached = int(np.argmax(below)) * EVERY + 2 if below.any() else None
print(f"best rates: {best}")
print(f"PoLoRA reaches AdamW's last loss after {reached} of {STEPS} steps, its start included")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
steps = np.arange(0, STEPS + 1, EVERY)
for name, rate in best.items():
    curve = curves[name][rate]
    left.semilogy(steps, curve.mean(0), color=COLORS[name], label=f"{name}, rate {rate}")
    left.fill_between(steps, curve.min(0), curve.max(0), color=COLORS[name], alpha=0.25)
styles = {name: {"color": color, "marker": "."} for name, color in COLORS.items()}
plots.sweeps(sweep, baseline="AdamW", axes=right, styles=styles)
left.axhline(goal, color="black", ls=":", lw=1, label="AdamW's last loss")
left.set(title="held-out loss; band: three seeds", xlabel="step", ylim=(goal / 2, 0.2))
right.set(title="last loss by learning rate", yscale="log", ylim=(goal / 2, 0.2))
for axes in (left, right):
    axes.grid(True)
    axes.legend()
plt.show()

# %% [markdown]
# What the first seed's adapters have painted:

# %%
pictures = {
    "base: the flower": base,
    "AdamW": models["AdamW"],
    "PoLoRA": models["PoLoRA"],
}
painted = {name: model(inputs).reshape(china.shape) for name, model in pictures.items()}
figure, axes = plt.subplots(1, 4, figsize=(8.5, 1.8), layout="constrained")
for ax, (name, image) in zip(axes, {**painted, "the photograph": china}.items(), strict=True):
    ax.imshow(np.clip(image, 0, 1), interpolation="nearest")
    ax.set_title(name, fontsize=10)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## What changed in the adapters
#
# All kernels are as they were; the adapters hold $\Delta K = s\,a\,b$. Its singular values show
# how it uses its eight directions. The *effective rank* is the exponential of their entropy. The
# condition numbers say how evenly each factor uses its rank.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
ranks = {}
for ax, (name, model) in zip(axes[1:], models.items(), strict=True):
    found = {
        path: spectrum(getattr(model, path).pair, scale)
        for path, scale in nn.lora_scales(model).items()
    }
    look = {"color": COLORS[name], "label": name, "marker": ".", "alpha": 0.8}
    plots.spectra(found, axes[0], **look)
    plots.conditions(found, ax).set(title=name, xlim=(1, 1e3))
    ax.legend()
    ranks[name] = sum(each.effective_rank for each in found.values()) / len(found)
axes[0].legend()
plt.show()

# %% [markdown]
# ## What we saw

# %%
kernels = nnx.state(base, nnx.Param)
frozen = all(
    bool(jnp.array_equal(getattr(model, name).base.kernel[...], getattr(base, name).kernel[...]))
    for model in models.values()
    for name in ("first", "second", "third")
)
numbers = {
    "steps": STEPS,
    "reached": reached,
    "last": {name: float(sweep[name][rate]) for name, rate in best.items()},
    "inside": {name: best[name] not in (RATES[name][0], RATES[name][-1]) for name in best},
    "best_rates": best,
    "effective_rank": ranks,
    "frozen": frozen,
}
print(f"""\
Held-out loss after {STEPS} steps, mean of 3 seeds, each optimizer at its best of 4 rates:
    AdamW   {numbers["last"]["AdamW"]:.5f}   (rate {best["AdamW"]})
    PoLoRA  {numbers["last"]["PoLoRA"]:.5f}   (rate {best["PoLoRA"]})
PoLoRA had AdamW's last loss after {reached} steps, its start included; AdamW needed {STEPS}.
Mean effective rank of s·a·b, of 8: AdamW {ranks["AdamW"]:.1f}, PoLoRA {ranks["PoLoRA"]:.1f}.
The kernels are {"unchanged, to the last bit" if frozen else "changed"}.""")
