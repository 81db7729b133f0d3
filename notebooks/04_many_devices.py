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
# # Many devices: who holds what
#
# A factor is sharded like the kernel it belongs to, and the rank axis never is:
#
# $$K\colon P(i, o) \quad\Rightarrow\quad a\colon P(i, \cdot) \qquad b\colon P(\cdot, o) .$$
#
# So each device updates its own part of the factors. Only r×r matrices are summed over devices.
#
# This notebook puts one model on 8 devices by three recipes. It draws who holds what, counts the
# bytes of a device, and compares the losses with those of a single device.

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

# %% [markdown]
# The notebook uses eight devices: the cores of a TPU, or eight GPUs. Where there are fewer, the CPU
# is split into eight virtual devices, which run the same programs, only slower. This must be set
# before JAX starts.

# %%
if jax.config.jax_num_cpu_devices != 8:
    jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices() if jax.device_count() >= 8 else jax.devices("cpu")
devices = devices[:8]
jax.config.update("jax_default_device", devices[0])
print(f"JAX {jax.__version__}: {len(devices)} devices of the kind {devices[0].platform}")

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits
from tqdm import tqdm

from lowrank_optax import LoRAPair, nn, polora, sharding

plt.rcParams.update({"figure.dpi": 80, "figure.facecolor": "white", "grid.alpha": 0.3})

# %% [markdown]
# ## A model in plain trees
#
# Three residual blocks with kernels `up` and `down`, each with an adapter of rank 8. The kernels
# are frozen. The data are scikit-learn's digits.

# %%
WIDTH, HIDDEN, RANK, BLOCKS = 256, 1024, 8, 3
images, labels = load_digits(return_X_y=True)
images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
keys = iter(jax.random.split(jax.random.key(0), 100))


def normal(*shape):
    return jax.random.normal(next(keys), shape) / shape[0] ** 0.5


SHAPES = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
kernels = {"embed": {"kernel": normal(64, WIDTH)}, "head": {"kernel": normal(WIDTH, 10)}}
adapters = {}
for block in (f"block{i}" for i in range(BLOCKS)):
    kernels[block] = {name: {"kernel": normal(*shape)} for name, shape in SHAPES.items()}
    adapters[block] = {
        name: LoRAPair(normal(n_in, RANK), jnp.zeros((RANK, n_out)))
        for name, (n_in, n_out) in SHAPES.items()
    }


def loss_fn(adapters, kernels, batch):
    x, labels = batch
    x = x @ kernels["embed"]["kernel"]
    for block, pairs in adapters.items():
        layer = lambda name, x, of=kernels[block], pairs=pairs: (
            x @ of[name]["kernel"] + nn.lora_apply(x, pairs[name])
        )
        centred = x - x.mean(-1, keepdims=True)
        hidden = jax.nn.gelu(layer("up", centred / (centred.std(-1, keepdims=True) + 1e-6)))
        x = x + layer("down", hidden)
    logits = x @ kernels["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# %% [markdown]
# ## A mesh and three recipes
#
# The mesh has 4 slices of the batch ("data") and 2 parts of the model ("model").
#
# | recipe | how kernels are sharded |
# |---|---|
# | `data_parallel()` | not at all |
# | `fsdp()` | along one axis, over "data" |
# | `fsdp(within=tensor_parallel(...))` | along both axes, over "data" and "model" |

# %%
auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto, devices=devices)
RECIPES = {
    "data parallel": sharding.data_parallel(),
    "FSDP": sharding.fsdp(),
    "FSDP within tensor parallel": sharding.fsdp(
        within=sharding.tensor_parallel(columns=["up"], rows=["down"])
    ),
}
tx = polora(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 60))


def place(recipe):
    """Puts adapters, kernels and the optimizer's state on the mesh."""
    copies = jax.tree.map(jnp.copy, adapters)  # the train step below gives their memory away
    placed = sharding.shard_model(copies, mesh, recipe)
    return placed, sharding.shard_model(kernels, mesh, recipe), sharding.shard_state(tx, placed)


for name, recipe in RECIPES.items():
    placed, frozen, _ = place(recipe)
    pair = placed["block0"]["up"]
    specs = [x.sharding.spec for x in (frozen["block0"]["up"]["kernel"], pair.a, pair.b)]
    print(f"{name}: kernel {specs[0]}, a {specs[1]}, b {specs[2]}")

# %% [markdown]
# ## Who holds what
#
# Each picture is an array of `block0/up`. Parts of one colour lie on the devices that are written
# in them. The momentum of PoLoRA is sharded like the factor.

# %%
PALETTE = plt.get_cmap("tab10").colors


def draw(ax, array, title, shape):
    """Draws the parts of an array, `shape` (height, width) on the paper."""
    parts = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        edges = tuple(s.indices(n)[:2] for s, n in zip(index, array.shape, strict=True))
        parts.setdefault(edges, []).append(devices.index(device))
    for number, (((top, bottom), (left, right)), holders) in enumerate(parts.items()):
        y, x = top / array.shape[0] * shape[0], left / array.shape[1] * shape[1]
        height = (bottom - top) / array.shape[0] * shape[0]
        width = (right - left) / array.shape[1] * shape[1]
        color = PALETTE[number % 10] if len(parts) > 1 else "#bbbbbb"
        ax.add_patch(Rectangle((x, y), width, height, fc=color, ec="white", lw=1.5, alpha=0.75))
        text = "all" if len(holders) == 8 else ",".join(map(str, holders))
        center = x + width / 2, y + height / 2
        turn = 90 if width < 0.35 else 0
        ax.text(*center, text, ha="center", va="center", fontsize=8, rotation=turn)
    ax.set(xlim=(-0.05, shape[1] + 0.05), ylim=(shape[0] + 0.05, -0.05), aspect="equal")
    ax.set_title(title, fontsize=9)
    ax.axis("off")


figure, axes = plt.subplots(
    3, 4, figsize=(9.5, 6), layout="constrained", gridspec_kw={"width_ratios": [3, 1, 3, 1]}
)
for row, (name, recipe) in zip(axes, RECIPES.items(), strict=True):
    placed, frozen, state = place(recipe)
    pair, momentum = placed["block0"]["up"], state.pairs.mu["block0"]["up"]
    n_in, n_out = SHAPES["up"]
    draw(row[0], frozen["block0"]["up"]["kernel"], f"{name}: kernel {n_in}×{n_out}", (1.5, 3))
    draw(row[1], pair.a, f"a {n_in}×{RANK}", (1.5, 0.6))
    draw(row[2], pair.b, f"b {RANK}×{n_out}", (0.5, 3))
    draw(row[3], momentum.a, "momentum of a", (1.5, 0.6))
plt.show()

# %% [markdown]
# ## What one device holds

# %%
PARTS = ("adapters", "frozen kernels", "optimizer state")


def bytes_on(device, tree):
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


held = {
    name: {
        part: max(bytes_on(device, tree) for device in devices)
        for part, tree in zip(PARTS, place(recipe), strict=True)
    }
    for name, recipe in RECIPES.items()
}
figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.6), layout="constrained")
for ax, part, color in zip(axes, PARTS, ("#d55e00", "#0072b2", "#009e73"), strict=True):
    amounts = [held[name][part] / 2**10 for name in RECIPES]
    bars = ax.bar(["data\nparallel", "FSDP", "FSDP\nwithin TP"], amounts, color=color)
    ax.bar_label(bars, fmt="%.0f", padding=2)
    ax.set(title=f"{part}, KiB a device", ylim=(0, 1.2 * max(amounts)))
plt.show()

# %% [markdown]
# ## Training, compared with one device
#
# `sharding.train_step` makes one jitted step of loss, gradient and update that keeps everything
# where it is. The batch is spread over "data". The single device runs the same steps by plain JAX.

# %%
STEPS, BATCH = 60, 128
rng = np.random.default_rng(0)
plan = [rng.integers(0, len(images), BATCH) for _ in range(STEPS)]


@jax.jit
def single_step(adapters, state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(adapters, kernels, batch)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss


def run(name):
    """Trains by one recipe, or on one device; returns the losses."""
    if name == "one device":
        trained, state = adapters, tx.init(adapters)
        advance = single_step
    else:
        trained, frozen, state = place(RECIPES[name])
        step = sharding.train_step(loss_fn, tx, trained)
        advance = lambda trained, state, batch: step(trained, state, frozen, batch)
    losses = []
    for rows in tqdm(plan, desc=name):
        trained, state, loss = advance(trained, state, (images[rows], labels[rows]))
        losses.append(float(loss))
    return np.array(losses)


curves = {name: run(name) for name in ("one device", *RECIPES)}
apart = {name: np.abs(curves[name] / curves["one device"] - 1) for name in RECIPES}
worst = {name: float(gaps.max()) for name, gaps in apart.items()}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
styles = {"one device": ("#777777", "-"), "data parallel": ("#009e73", "--")}
styles |= {"FSDP": ("#0072b2", "-."), "FSDP within tensor parallel": ("#d55e00", ":")}
for name, losses in curves.items():
    color, style = styles[name]
    left.plot(losses, style, color=color, lw=2, label=name)
    if name in apart:
        right.semilogy(np.maximum(apart[name], 1e-9), color=color, label=name)
left.set(title="training loss", xlabel="step")
right.set(title="relative difference to one device", xlabel="step")
for ax in (left, right):
    ax.grid(True)
left.legend()
plt.show()

# %% [markdown]
# ## What we saw

# %%
total = {name: sum(parts.values()) for name, parts in held.items()}
losses = curves["one device"]
numbers = {
    "devices": len(devices),
    "held": held,
    "total": total,
    "worst": worst,
    "first_loss": float(losses[0]),
    "last_loss": float(losses[-1]),
}
print(f"{len(devices)} devices of the kind {devices[0].platform}. One of them holds, in KiB:")
for name, parts in held.items():
    listed = ",  ".join(f"{part} {amount / 2**10:.0f}" for part, amount in parts.items())
    print(f"    {name:28} {total[name] / 2**10:6.0f}  ({listed})")
print(f"""\
In {STEPS} steps the loss fell from {losses[0]:.2f} to {losses[-1]:.2f}.
No recipe was farther from one device than {max(worst.values()):.0e}, relative.""")
