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
# # Linen: an interceptor, a frozen base, a TrainState
#
# Flax Linen models are not changed in place. An **interceptor** gives chosen layers an adapter
# while it is open:
#
# - the model's code and its parameters stay as they are;
# - the factors live in a collection of their own, `'lora'`;
# - only this collection goes into the `TrainState`, so the base is frozen by construction.
#
# We teach a small network the digits 0 to 4, freeze it, and let adapters learn the digits 5 to 9.

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
from flax import linen
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from tqdm import tqdm

from lowrank_optax import nn, polora

plt.rcParams.update(
    {"figure.dpi": 80, "figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3}
)
BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#777777"
print(f"JAX {jax.__version__} on {jax.device_count()} {jax.devices()[0].platform} device(s)")

# %% [markdown]
# ## Data and model
#
# scikit-learn carries 1,797 handwritten digits of 8×8 pixels.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
shuffled = np.random.default_rng(0).permutation(len(images))
images, labels = images[shuffled], labels[shuffled]


def examples_of(digits, first):
    chosen = np.isin(labels, digits)
    x, y = images[chosen], labels[chosen] - first
    cut = int(0.7 * len(x))
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


old_train, old_test = examples_of(range(5), 0)
new_train, new_test = examples_of(range(5, 10), 5)


class Network(linen.Module):
    """Three dense layers."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(256, name="first")(x))
        x = linen.relu(linen.Dense(256, name="second")(x))
        return linen.Dense(5, name="head")(x)


model = Network()


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(logits, y):
    return float((logits.argmax(-1) == y).mean())


def batches(data, size=64, seed=0):
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(0, len(data[0]), size)
        yield data[0][rows], data[1][rows]


# %% [markdown]
# ## Pretraining, as always in Linen


# %%
@jax.jit
def pretrain_step(state, x, y):
    loss_fn = lambda params: cross_entropy(state.apply_fn({"params": params}, x), y)
    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


params = model.init(jax.random.key(0), old_train[0][:1])["params"]
state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
for _, (x, y) in zip(tqdm(range(200), desc="digits 0-4"), batches(old_train), strict=False):
    state, _ = pretrain_step(state, x, y)
base = state.params
original = jax.tree.map(np.array, base)  # a copy, to see at the end that nothing has moved
pretrained = accuracy(model.apply({"params": base}, old_test[0]), old_test[1])
untrained = accuracy(model.apply({"params": base}, new_test[0]), new_test[1])
print(f"accuracy on 0-4: {pretrained:.1%};  on 5-9 before any training: {untrained:.1%}")

# %% [markdown]
# ## Adapters by the interceptor
#
# `init` inside the context makes the factors. The base parameters that we have are kept: we take
# the `'lora'` collection alone. `adapters` tells the scale of each adapter, which the optimizers
# want to know.

# %%
TARGETS, CONFIG = "first|second|head", nn.LoRAConfig(rank=4, alpha=8.0)

with nn.lora_interceptor(TARGETS, CONFIG) as adapters:
    _, created = model.apply(
        {"params": base}, new_train[0][:1], mutable=["lora"], rngs={"lora": jax.random.key(1)}
    )
fresh = created["lora"]
scales = {path: adapter.scale for path, adapter in adapters.items()}
nn.lora_summary(fresh, scale=scales)

# %% [markdown]
# The `with` belongs *inside* the function that JAX traces: the interceptor acts while JAX looks at
# the model.


# %%
def adapted_loss(lora, base, batch):
    x, y = batch
    with nn.lora_interceptor(TARGETS, CONFIG):
        return cross_entropy(model.apply({"params": base, "lora": lora}, x), y)


@jax.jit
def train_step(state, base, batch):
    """The state holds the adapters only; the base is an argument that gets no gradient."""
    loss, grads = jax.value_and_grad(adapted_loss)(state.params, base, batch)
    return state.apply_gradients(grads=grads), loss


evaluate = jax.jit(adapted_loss)

# %% [markdown]
# ## A start from the gradient
#
# In NNX this is `nn.gradient_start`. For Linen's plain trees it has two parts. `gradient_triplets`
# finds the leading singular vectors of the full gradients, without forming them: here from one
# batch, by two gradients. `start_pair` makes factors of them.

# %%
batch = next(iter(batches(new_train, seed=1)))
triplets = nn.gradient_triplets(
    lambda lora, batch: adapted_loss(lora, base, batch),
    fresh,
    [batch],
    scale=scales,
    iterations=0,
    progress=False,
)
started = {}
for path, found in triplets.items():
    pair = nn.start_pair(found, CONFIG.rank, "lora_one", gamma=1e6)
    started[path] = {"lora_a": pair.a, "lora_b": pair.b}

# %% [markdown]
# ## Training: AdamW, and PoLoRA from the gradient
#
# Both are ordinary optax transformations, so `TrainState` takes either. Each gets three rates.

# %%
STEPS, EVERY = 150, 5


def schedule(rate):
    return optax.warmup_cosine_decay_schedule(0.0, rate, STEPS // 10, STEPS)


def train(tx, lora):
    """Trains adapters; returns the last state and the losses on the held-out digits 5-9."""
    state, losses = TrainState.create(apply_fn=model.apply, params=lora, tx=tx), []
    for count, batch in zip(range(STEPS), batches(new_train), strict=False):
        if count % EVERY == 0:
            losses.append(float(evaluate(state.params, base, new_test)))
        state, _ = train_step(state, base, batch)
    return state, np.array([*losses, float(evaluate(state.params, base, new_test))])


settings = {
    ("AdamW", rate): (optax.adamw(schedule(rate)), fresh) for rate in (1e-2, 3e-2, 1e-1)
} | {("PoLoRA", rate): (polora(schedule(rate), scale=scales), started) for rate in (0.3, 1.0, 3.0)}
runs = {key: train(*setting) for key, setting in tqdm(settings.items(), desc="digits 5-9")}
best = {
    name: min((key for key in runs if key[0] == name), key=lambda key: runs[key][1][-1])
    for name in ("AdamW", "PoLoRA")
}
last = {name: float(runs[key][1][-1]) for name, key in best.items()}
print("best rates:", {name: key[1] for name, key in best.items()})

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for name, color in {"AdamW": GRAY, "PoLoRA": ORANGE}.items():
    for key in runs:
        if key[0] == name and key != best[name]:
            axes.semilogy(np.arange(0, STEPS + 1, EVERY), runs[key][1], color=color, alpha=0.3)
    label = f"{name}, rate {best[name][1]}"
    axes.semilogy(np.arange(0, STEPS + 1, EVERY), runs[best[name]][1], color=color, label=label)
axes.set(title="held-out loss on 5 to 9 (pale: other rates)", xlabel="step")
axes.legend()
plt.show()

# %% [markdown]
# ## What moved, and what did not
#
# We compare every leaf with what it was before, and look at the update $s\,a\,b$ beside the kernel
# it belongs to.

# %%
variables = {"params": base, "lora": runs[best["PoLoRA"]][0].params}
with nn.lora_interceptor(TARGETS, CONFIG):
    adapted_logits = model.apply(variables, new_test[0])
reached = accuracy(adapted_logits, new_test[1])
kept = accuracy(model.apply({"params": base}, old_test[0]), old_test[1])

moved = {}
for path, pair in variables["lora"].items():
    for name, leaf in pair.items():
        before = started[path][name]
        moved[f"{path}/{name}"] = float(jnp.linalg.norm(leaf - before))
for path, layer in base.items():
    for name, leaf in layer.items():
        moved[f"{path}/{name}"] = float(jnp.linalg.norm(leaf - original[path][name]))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
shades = [ORANGE if "lora" in name else BLUE for name in moved]
bars = left.barh(list(moved), list(moved.values()), color=shades)
left.bar_label(bars, fmt="%.2g", padding=3, fontsize=8)
left.invert_yaxis()
left.set(title="how far each leaf moved", xlim=(0, 1.2 * max(moved.values())))
left.tick_params(axis="y", labelsize=8)

kernel = np.linalg.svd(base["second"]["kernel"], compute_uv=False)
pair = variables["lora"]["second"]
update = scales["second"] * pair["lora_a"] @ pair["lora_b"]
right.semilogy(range(1, 41), kernel[:40], "o-", ms=3, color=BLUE, label="kernel, frozen")
values = np.linalg.svd(update, compute_uv=False)[: CONFIG.rank]
right.semilogy(range(1, CONFIG.rank + 1), values, "o-", ms=5, color=ORANGE, label="update s·a·b")
right.set(title="singular values of `second`", xlabel="index")
right.legend()
plt.show()
print(f"the base still knows 0 to 4: {kept:.1%};  with its adapters it knows 5 to 9: {reached:.1%}")

# %% [markdown]
# ## Merging for inference
#
# `nn.merge_lora_variables` adds $s\,a\,b$ to the kernels. The merged model needs no interceptor.

# %%
merged = nn.merge_lora_variables(variables, adapters)
difference = float(jnp.abs(model.apply({"params": merged}, new_test[0]) - adapted_logits).max())
relative = difference / float(jnp.abs(adapted_logits).max())
print(f"largest difference of the logits, relative to the largest logit: {relative:.1e}")

# %% [markdown]
# ## What we saw

# %%
numbers = {
    "pretrained": pretrained,
    "before": untrained,
    "reached": reached,
    "kept": kept,
    "last": last,
    "base_moved": max(value for name, value in moved.items() if "lora" not in name),
    "merged_difference": relative,
    "trained": nn.lora_summary(fresh).trained,
    "frozen": sum(leaf.size for leaf in jax.tree.leaves(base)),
}
print(f"""\
{numbers["trained"]:,} numbers were trained beside {numbers["frozen"]:,} frozen ones.
Accuracy on the digits 5 to 9: {untrained:.1%} before, {reached:.1%} with adapters.
The base moved by {numbers["base_moved"]:g} and still has {kept:.1%} on 0 to 4.
Held-out loss after {STEPS} steps, each optimizer at its best of 3 rates, one seed:
    AdamW  {last["AdamW"]:.4f}    PoLoRA from the gradient  {last["PoLoRA"]:.4f}
Merged and adapted model differ by {relative:.0e} of the largest logit.""")
