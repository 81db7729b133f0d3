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
# # How it works: frames, shadows, projections and polar steps
#
# LoRA adds $s\,a\,b$ to a frozen kernel $K$. The kernel's full gradient is $G$. LoRA's factors get
#
# $$g_a = s\,G\,b^\top \qquad g_b = s\,a^\top G .$$
#
# An ordinary optimizer takes these as the gradients of two unrelated matrices.
# The methods of this library ask another question: **how should the product $s\,a\,b$ move?**
#
# This notebook takes one layer of a small network and shows, with pictures, what each idea does.

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
from sklearn.datasets import load_digits
from tqdm import tqdm

import lowrank_optax as lo
from lowrank_optax import LoRAPair, diagnostics, nn, plots
from lowrank_optax.adapters import spectrum

plt.rcParams.update(
    {"figure.dpi": 80, "figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3}
)
COLORS = {
    "AdamW": "#777777",
    "SGD": "#b8860b",
    "AltLoRA": "#0072b2",
    "OPLoRA": "#009e73",
    "SDS-LoRA": "#cc6699",
    "PoLoRA": "#d55e00",
}
print(f"JAX {jax.__version__} on {jax.device_count()} {jax.devices()[0].platform} device(s)")

# %% [markdown]
# ## A layer to look at
#
# The data are scikit-learn's handwritten digits. A network of three layers learns the digits 0 to
# 4. Then an adapter on its middle kernel, 256×256, shall teach it the digits 5 to 9. Parameters
# are plain dicts here, as all optimizers of the library take any tree.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
old, new = labels < 5, labels >= 5
x_old, y_old, x_new, y_new = images[old], labels[old], images[new], labels[new] - 5

WIDTH, RANK, SCALE = 256, 8, 2.0


def dense(key, n_in, n_out):
    return jax.random.normal(key, (n_in, n_out)) / n_in**0.5


keys = jax.random.split(jax.random.key(0), 3)
sizes = [(64, WIDTH), (WIDTH, WIDTH), (WIDTH, 5)]
base = {f"K{i}": dense(key, *size) for i, (key, size) in enumerate(zip(keys, sizes, strict=True))}


def loss_fn(pair, base, x, y):
    """The cross entropy; the middle layer has an adapter if `pair` is one."""
    x = jax.nn.relu(x @ base["K0"])
    middle = x @ base["K1"]
    if pair is not None:
        middle += nn.lora_apply(x, pair, scale=SCALE)
    logits = jax.nn.relu(middle) @ base["K2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# %%
adam = optax.adam(1e-3)


@jax.jit
def pretrain_step(base, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn, argnums=1)(None, base, x, y)
    updates, state = adam.update(grads, state)
    return optax.apply_updates(base, updates), state, loss


trained, state, rng = base, adam.init(base), np.random.default_rng(0)
for _ in tqdm(range(200), desc="pretraining on 0-4"):
    rows = rng.integers(0, len(x_old), 64)
    trained, state, loss = pretrain_step(trained, state, x_old[rows], y_old[rows])
print(f"last loss {loss:.3f}")

# %% [markdown]
# ## 1. The full gradient has few directions
#
# A rank-8 adapter can follow $G$ only if $G$ is close to a matrix of low rank. We look at its
# singular values. The *effective rank* counts the directions that a matrix uses: it is the
# exponential of the entropy of the singular values.


# %%
@jax.jit
def full_gradient(pair, x, y):
    """G, the gradient of the kernel that the pair adapts."""
    return jax.grad(loss_fn, argnums=1)(pair, trained, x, y)["K1"]


G = full_gradient(None, x_new, y_new)
values = np.array(jnp.linalg.svdvals(G))
kept = np.cumsum(values**2) / np.sum(values**2)
effective = float(diagnostics.effective_rank(G))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.semilogy(values[:40] / values[0], "o-", ms=4, color=COLORS["AltLoRA"])
left.set(title="singular values of G, relative", xlabel="index")
left.axvline(RANK - 0.5, color=COLORS["PoLoRA"], ls="--", label=f"rank {RANK}")
left.legend()
right.plot(np.arange(1, 41), kept[:40], "o-", ms=4, color=COLORS["AltLoRA"])
right.axvline(RANK, color=COLORS["PoLoRA"], ls="--", label=f"rank {RANK}: {kept[RANK - 1]:.2%}")
right.set(title="share of ‖G‖² in the first directions", xlabel="directions", ylim=(0, 1.05))
right.legend(loc="lower right")
plt.show()
print(f"G is {WIDTH}×{WIDTH}; its effective rank is {effective:.1f}")

# %% [markdown]
# ## 2. Projections: AltLoRA
#
# A step of $a$ can change the product only within the rows that $b$ spans. AltLoRA takes the best
# such change, the projection of $G$ on that space:
#
# $$\delta a = -\eta\, G\, b^\top (b\,b^\top)^{-1} / s \quad\Rightarrow\quad
#   \delta a\; b \;\propto\; -G\,P_b .$$
#
# The result depends on the *space* of $b$, not on its size. To test it, we write one and the same
# product in many ways: $(c\,a)(b/c)$. An optimizer of the product should not care about $c$.

# %%
keys = jax.random.split(jax.random.key(1), 2)
balanced = LoRAPair(dense(keys[0], WIDTH, RANK), 0.05 * dense(keys[1], RANK, WIDTH))


def product(pair):
    plain = pair.plain()
    return SCALE * plain.a @ plain.b


def first_change(tx, pair):
    """How the first step of an optimizer changes s·a·b."""
    grads = jax.grad(loss_fn)(pair, trained, x_new, y_new)
    updates, _ = tx.update(grads, tx.init(pair), pair)
    return product(optax.apply_updates(pair, updates)) - product(pair)


optimizers = {
    "SGD": optax.sgd(1e-2),
    "AdamW": optax.adamw(1e-3, weight_decay=0.0),
    "PoLoRA": lo.polora(1e-1, scale=SCALE),
    "AltLoRA": lo.altlora(1e-1, scale=SCALE),
}
ratios = np.logspace(-1, 1, 10)
reference = {name: first_change(tx, balanced) for name, tx in optimizers.items()}
spread = {name: [] for name in optimizers}
for c in tqdm(ratios, desc="rescaled factors"):
    rescaled = LoRAPair(c * balanced.a, balanced.b / c)
    for name, tx in optimizers.items():
        change = first_change(tx, rescaled)
        error = jnp.linalg.norm(change - reference[name]) / jnp.linalg.norm(reference[name])
        spread[name].append(float(error))

# %%
plt.figure(figsize=(6, 3.4), layout="constrained")
for name, errors in spread.items():
    plt.loglog(ratios, errors, "o-", ms=4, color=COLORS[name], label=name)
plt.title("how far the step depends on how s·a·b is written")
plt.xlabel("c, in (c·a)(b/c)")
plt.ylabel("relative change of the step")
plt.legend()
plt.show()
worst = {name: max(errors) for name, errors in spread.items()}
print(*(f"{name}: {value:.1e}" for name, value in worst.items()), sep="   ")

# %% [markdown]
# The lowest line is the optimizer of the product. The small rest is rounding and AltLoRA's
# damping.
#
# ## 3. Frames: SDS-LoRA
#
# The *alignment* is the cosine between $G$ and the change of the product along the factors'
# gradients. Ordinary LoRA filters $G$ by $b^\top b$ and $a\,a^\top$, so large components of the
# factors drown the others. SDS-LoRA sends the gradient through frames $E$ and $F$ instead, whose
# singular values are all one:
#
# $$\Delta K = s\,(a\,F + E\,b) \qquad g_a = s\,G\,F^\top \qquad g_b = s\,E^\top G .$$
#
# `nn.start_pair` makes frames of the gradient's own singular vectors.

# %%
stretch = jnp.logspace(0, -1.5, RANK)  # components of very different sizes
stretched = LoRAPair(balanced.a * stretch, balanced.b * stretch[:, None])
pairing = nn.gradient_triplets(
    lambda pair, x: loss_fn(pair, trained, x, y_new),
    stretched,
    [x_new],
    scale=SCALE,
    progress=False,
)
[triplets] = pairing.values()
pairs = {
    "plain pair, b = 0": LoRAPair(balanced.a, 0 * balanced.b),
    "plain pair, stretched": stretched,
    "random frames": lo.frame(balanced, jax.random.key(2)),
    "frames of the gradient": nn.start_pair(triplets, RANK, "frames", 1.0),
}
aligned, singular = {}, {}
for name, pair in pairs.items():
    at_start = full_gradient(pair, x_new, y_new)
    grads = jax.grad(loss_fn)(pair, trained, x_new, y_new)
    aligned[name] = float(diagnostics.alignment(pair, grads, at_start))
    singular[name] = np.array(jnp.linalg.svdvals(getattr(pair, "f_in", pair.a)))

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
shades = [COLORS["AdamW"], COLORS["SGD"], COLORS["SDS-LoRA"], COLORS["PoLoRA"]]
bars = left.barh(list(aligned), list(aligned.values()), color=shades)
left.bar_label(bars, fmt="%.2f", padding=3)
left.invert_yaxis()
left.set(title="alignment with the full gradient", xlim=(0, 1.12))
for (name, sizes_of), shade in zip(list(singular.items())[1:], shades[1:], strict=True):
    wide = 7 if name == "random frames" else 2
    right.semilogy(range(1, RANK + 1), sizes_of, "o-", ms=4, lw=wide, color=shade, label=name)
right.set(title="singular values of what filters G", xlabel="component")
right.legend()
plt.show()

# %% [markdown]
# ## 4. Shadows: OPLoRA
#
# A full gradient step would lead to $s\,a\,b - \eta\,G$. OPLoRA goes to the *nearest matrix of
# rank r*, by a few rounds of power iteration. These need products of $G$ with narrow matrices, and
# $G$ itself is never formed. *Shadow* leaves beside the pair collect these products in the
# backward pass.
#
# The exact nearest matrix comes from a singular value decomposition of the dense kernel. We
# compare the distances.

# %%
rate = 0.3 * float(jnp.linalg.norm(product(balanced), 2) / jnp.linalg.norm(G, 2))
target = product(balanced) - rate * full_gradient(balanced, x_new, y_new)
nearest = SCALE * lo.pair_of_delta(target / SCALE, RANK).plain().a
nearest = nearest @ lo.pair_of_delta(target / SCALE, RANK).b
floor = float(jnp.linalg.norm(nearest - target))


def distance(tx, pair):
    """How far one step ends from the full step, over the least possible distance."""
    return float(jnp.linalg.norm(product(pair) + first_change(tx, pair) - target)) / floor


excess = {}
for iterations in tqdm([1, 2, 3, 4], desc="OPLoRA"):
    shadowed = lo.shadow(balanced, jax.random.key(3), iterations=iterations, momentum_rank=0)
    tx = lo.oplora(
        rate, momentum=0.0, iterations=iterations, lmbd=0.0, scale=SCALE, solver_damping=1e-9
    )
    excess[f"OPLoRA, k = {iterations}"] = distance(tx, shadowed)
excess = {"no step": float(jnp.linalg.norm(product(balanced) - target)) / floor, **excess}

# %%
plt.figure(figsize=(6.5, 3), layout="constrained")
shades = [COLORS["AdamW"], *[COLORS["OPLoRA"]] * 4]
bars = plt.barh(list(excess), [value - 1 for value in excess.values()], color=shades)
plt.bar_label(bars, [f"{100 * (value - 1):.2g} %" for value in excess.values()], padding=3)
plt.gca().invert_yaxis()
plt.xlim(0, 1.2 * (excess["no step"] - 1))
plt.xticks([])
plt.title("distance to the full step, beyond the best of rank 8")
plt.show()

# %% [markdown]
# ## 5. Polar steps: PoLoRA
#
# A gradient's singular values differ widely, so a step along it moves few directions. The *polar
# factor* of a matrix $U\,\Sigma\,V^\top$ is $U\,V^\top$: the same directions, each with the same
# weight. PoLoRA steps along it, and chooses the length so that the product changes by at most the
# learning rate $\eta$ in the spectral norm:
#
# $$\|\delta(s\,a\,b)\|_2 \le \eta .$$
#
# We train with AdamW and with PoLoRA, at one constant rate each, and look at every step.

# %%
STEPS, BATCH = 80, 64
POLORA_RATE = 0.5


def start_from_gradient():
    return nn.start_pair(triplets, RANK, "lora_one", 1e6)


def run(tx, pair, steps=STEPS):
    """Trains, and notes of each step the loss, the change of s·a·b and its alignment with -G."""

    @jax.jit
    def step(pair, state, x, y):
        grads = jax.grad(loss_fn)(pair, trained, x, y)
        updates, state = tx.update(grads, state, pair)
        moved = optax.apply_updates(pair, updates)
        change = product(moved) - product(pair)
        along = -jnp.sum(change * full_gradient(pair, x_new, y_new))
        norms = jnp.linalg.norm(change) * jnp.linalg.norm(full_gradient(pair, x_new, y_new))
        numbers = {"loss": loss_fn(pair, trained, x_new, y_new), "cosine": along / norms}
        return moved, state, numbers | {"norm": jnp.linalg.norm(change, 2), "step": updates.a}

    state, rng, history = tx.init(pair), np.random.default_rng(0), []
    for _ in range(steps):
        rows = rng.integers(0, len(x_new), BATCH)
        pair, state, numbers = step(pair, state, x_new[rows], y_new[rows])
        used = spectrum(pair.plain(), SCALE).effective_rank
        history.append(numbers | {"effective rank": used})
    return {key: np.array([numbers[key] for numbers in history]) for key in history[0]}


zero = LoRAPair(balanced.a, 0 * balanced.b)
settings = {
    "AdamW": (optax.adamw(1e-2), zero),
    "AltLoRA": (lo.altlora(3e-1, scale=SCALE), zero),
    "OPLoRA": (
        lo.oplora(3e-1, momentum=0.0, iterations=2, scale=SCALE),
        lo.shadow(zero, jax.random.key(3), iterations=2, momentum_rank=0),
    ),
    "SDS-LoRA": (
        lo.sds_lora(3e-3, total_steps=STEPS, warmup_steps=0, scale=SCALE),
        nn.start_pair(triplets, RANK, "frames", 1.0),
    ),
    "PoLoRA": (lo.polora(POLORA_RATE, scale=SCALE), start_from_gradient()),
}
runs = {name: run(*setting) for name, setting in tqdm(settings.items(), desc="training")}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
for name in ("AdamW", "PoLoRA"):
    sizes_of = np.linalg.svd(runs[name]["step"][20], compute_uv=False)
    left.semilogy(range(1, RANK + 1), sizes_of / sizes_of[0], "o-", color=COLORS[name], label=name)
    right.plot(runs[name]["norm"], color=COLORS[name], label=name)
left.set(title="step 20 of a: relative singular values", xlabel="component")
right.axhline(POLORA_RATE, color="black", ls=":", label="PoLoRA's bound")
right.set(title="‖change of s·a·b‖₂, step by step", xlabel="step", yscale="log", ylim=(0.03, 2))
left.legend()
right.legend(loc="lower left", ncols=2)
plt.show()
largest = float(runs["PoLoRA"]["norm"].max())
print(f"PoLoRA's largest change of s·a·b is {largest:.4f}; the bound is {POLORA_RATE}")

# %% [markdown]
# ## 6. All of them in training
#
# Left: the loss on the digits 5 to 9. Middle: the cosine between each step's change of the product
# and $-G$ of all images; a full gradient step would have one. Right: how many directions
# $s\,a\,b$ uses. The rates are from one guess each, so the left picture is no contest:
# `01_quickstart` has a fair one.

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
for name, record in runs.items():
    left.semilogy(record["loss"], color=COLORS[name], label=name)
    smooth = np.convolve(record["cosine"], np.ones(5) / 5, mode="valid")
    middle.plot(np.arange(2, len(smooth) + 2), smooth, color=COLORS[name], label=name)
used = {name: record["effective rank"] for name, record in runs.items()}
styles = {name: {"color": COLORS[name]} for name in runs}
plots.effective_ranks(range(1, STEPS + 1), used, axes=right, styles=styles)
left.set(title="loss on the digits 5 to 9", xlabel="step")
middle.set(title="cosine of the step with -G (mean of 5 steps)", xlabel="step")
right.set(title="effective rank of s·a·b")
left.legend(fontsize=9)
plt.show()
cosines = {name: float(record["cosine"][:20].mean()) for name, record in runs.items()}
print("first 20 steps:", *(f"{name} {value:.2f}" for name, value in cosines.items()), sep="   ")

# %% [markdown]
# ## 7. Memory
#
# What a method keeps beside the two factors: the optimizer's state, and leaves such as shadows and
# frames. We count bytes of shapes alone, nothing is allocated.


# %%
def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


factors = bytes_of(zero)
memory = {}
for name, (tx, pair) in settings.items():
    state = jax.eval_shape(tx.init, pair)
    memory[name] = (bytes_of(state) + bytes_of(pair) - factors) / factors
kernel_adam = bytes_of(jax.eval_shape(optax.adam(1e-3).init, trained["K1"])) / factors

plt.figure(figsize=(6.5, 3), layout="constrained")
names = [*memory, "Adam on the full kernel"]
amounts = [*memory.values(), kernel_adam]
shades = [*(COLORS[name] for name in memory), "#444444"]
bars = plt.barh(names, amounts, color=shades)
plt.bar_label(bars, fmt="%.1f", padding=3)
plt.gca().invert_yaxis()
plt.xlim(0, 1.15 * max(amounts))
plt.title("memory beside the factors, in copies of the factors")
plt.show()

# %% [markdown]
# ## What we saw

# %%
percent = {name: 100 * (value - 1) for name, value in excess.items()}
numbers = {
    "effective_rank": effective,
    "energy_of_rank": float(kept[RANK - 1]),
    "dependence": worst,
    "alignment": aligned,
    "excess": {name: value - 1 for name, value in excess.items()},
    "polora_bound": POLORA_RATE,
    "polora_largest": largest,
    "cosines": cosines,
    "memory": memory,
}
print(f"""\
1. The {WIDTH}x{WIDTH} gradient has an effective rank of {effective:.1f}.
   {kept[RANK - 1]:.2%} of its energy is in {RANK} directions.
2. Where the same product is written otherwise, a step changes by up to
   {worst["SGD"]:.0f} times its size with SGD, {worst["AdamW"]:.0f} with AdamW,
   {worst["PoLoRA"]:.1f} with PoLoRA, {worst["AltLoRA"]:.4f} with AltLoRA.
3. Frames of the gradient are aligned with it to {aligned["frames of the gradient"]:.2f}, an
   ordinary pair with b = 0 to {aligned["plain pair, b = 0"]:.2f}.
4. OPLoRA's step ends farther from the full step than the nearest matrix of rank {RANK}
   by {percent["OPLoRA, k = 1"]:.2g} % with one round, by {percent["OPLoRA, k = 2"]:.1g} % with two.
5. No step of PoLoRA changed the product by more than {largest:.4f}; its bound was {POLORA_RATE}.
6. In the first 20 steps OPLoRA's steps had a cosine of {cosines["OPLoRA"]:.2f} with -G, AltLoRA's
   {cosines["AltLoRA"]:.2f}, AdamW's {cosines["AdamW"]:.2f}, PoLoRA's {cosines["PoLoRA"]:.2f}.
7. PoLoRA keeps {memory["PoLoRA"]:.1f} copies of the factors, AdamW {memory["AdamW"]:.1f}.""")
