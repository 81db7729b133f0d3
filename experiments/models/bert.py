"""The encoder of BERT, RoBERTa and MiniLM in Flax NNX, with weights in the Hugging Face format.

Written here because the JAX libraries on PyPI do not serve: transformers 5 has no Flax models any
more, `jax-bonsai` 0.0.1 is an empty placeholder, `google-tunix` has decoders only.

There is no dropout: the trainer's runs are deterministic.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from experiments.models.attention import SelfAttention
from experiments.models.checkpoint import (
    Checkpoint,
    Shape,
    fill,
    layer_norm_names,
    linear_names,
    open_safetensors,
    read_shape,
)

PREFIXES = {"bert": "bert.", "roberta": "roberta."}
"""What stands before the encoder's tensors in files of a model with some head."""

OLD_NORM_NAMES = {"gamma": "weight", "beta": "bias"}
"""Names of a norm's parameters in files converted from TensorFlow, such as bert-base-uncased."""


class EncoderShape(Shape):
    """The sizes of an encoder."""

    model_types: ClassVar[tuple[str, ...]] = ("bert", "roberta")

    model_type: Literal["bert", "roberta"] = "bert"
    vocabulary: int = Field(validation_alias="vocab_size")
    positions: int = Field(validation_alias="max_position_embeddings")
    segments: int = Field(validation_alias="type_vocab_size")
    width: int = Field(validation_alias="hidden_size")
    depth: int = Field(validation_alias="num_hidden_layers")
    heads: int = Field(validation_alias="num_attention_heads")
    mlp_width: int = Field(validation_alias="intermediate_size")
    norm_eps: float = Field(validation_alias="layer_norm_eps")
    pad: int = Field(validation_alias="pad_token_id")
    hidden_act: Literal["gelu"] = "gelu"
    position_embedding_type: Literal["absolute"] = "absolute"

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token gets: RoBERTa's starts after its pad."""
        return self.pad + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self) -> int:
        """The longest text that there are positions for."""
        return self.positions - self.first_position


class EncoderLayer(nnx.Module):
    """One post-norm layer."""

    def __init__(self, shape: EncoderShape, *, rngs: nnx.Rngs) -> None:
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


class Encoder(nnx.Module):
    """Embeddings of words, positions and segments, and post-norm layers.

    Args:
        shape: Sizes of the model.
        rngs: Random streams for the initial weights.
    """

    def __init__(self, shape: EncoderShape, *, rngs: nnx.Rngs) -> None:
        self.shape = shape
        self.word = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        self.position = nnx.Embed(shape.positions, shape.width, rngs=rngs)
        self.segment = nnx.Embed(shape.segments, shape.width, rngs=rngs)
        self.norm = nnx.LayerNorm(shape.width, epsilon=shape.norm_eps, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(shape, rngs=rngs) for _ in range(shape.depth)])

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, segments: jax.Array | None = None
    ) -> jax.Array:
        """Encodes texts, padded on the right.

        Args:
            tokens: Token ids, shape (batch, length).
            mask: True for tokens, False for padding, shape (batch, length).
            segments: Which text of a pair a token is of, shape (batch, length); 0 by default.

        Returns:
            The encoded tokens, shape (batch, length, width).
        """
        segments = jnp.zeros_like(tokens) if segments is None else segments
        positions = self.shape.first_position + jnp.arange(tokens.shape[1])
        x = self.norm(self.word(tokens) + self.position(positions) + self.segment(segments))
        for layer in self.layers:
            x = layer(x, mask)
        return x


class MeanHead(nnx.Module):
    """A linear classifier of the mean over the tokens that count, as sentence encoders have it."""

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.classifier = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps encoded tokens (batch, length, width) to logits (batch, classes)."""
        return self.classifier(mean_over_tokens(x, mask))


class FirstTokenHead(nnx.Module):
    """Classifies by the first token, classifier(tanh(dense(x))), as BERT and RoBERTa do."""

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.classifier = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps encoded tokens (batch, length, width) to logits (batch, classes)."""
        return self.classifier(jnp.tanh(self.dense(x[:, 0])))


class TextClassifier(nnx.Module):
    """An encoder with a classification head."""

    def __init__(self, encoder: Encoder, head: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
        self.encoder = encoder
        self.head = nnx.data(head)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, segments: jax.Array | None = None
    ) -> jax.Array:
        """Maps token ids, their mask and their segments to logits (batch, classes)."""
        return self.head(self.encoder(tokens, mask, segments), mask)


def mean_over_tokens(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean (batch, width) of the tokens (batch, length, width) that `mask` keeps."""
    weight = mask[:, :, None].astype(x.dtype)
    return jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1)


def open_encoder(model_dir: Path, shape: EncoderShape) -> Checkpoint:
    """Opens an encoder's weights, whatever head they were saved with, under uniform names.

    Raises:
        ExperimentError: A file is missing or cannot be read.
    """

    def rule(name: str) -> str:
        stem, _, last = name.removeprefix(PREFIXES[shape.model_type]).rpartition(".")
        return f"{stem}.{OLD_NORM_NAMES.get(last, last)}"

    return open_safetensors(model_dir).rename(rule)


def load_encoder(model_dir: Path) -> Encoder:
    """Loads an encoder from a folder with `config.json` and (sharded) safetensors.

    Args:
        model_dir: The folder.

    Returns:
        The encoder, with the file's weights in float32.

    Raises:
        ExperimentError: A file is missing, damaged, or of another architecture.
    """
    shape = read_shape(model_dir, EncoderShape)
    names = dict(tensor_names(shape))
    return fill(lambda: Encoder(shape, rngs=nnx.Rngs(0)), open_encoder(model_dir, shape), names)


def load_pooler(model_dir: Path, shape: EncoderShape) -> nnx.Linear:
    """Loads BERT's pretrained pooler, the `dense` of its `FirstTokenHead`.

    Raises:
        ExperimentError: The file has none.
    """
    return fill(
        lambda: nnx.Linear(shape.width, shape.width, rngs=nnx.Rngs(0)),
        open_encoder(model_dir, shape),
        {"kernel": "pooler.dense.weight", "bias": "pooler.dense.bias"},
    )


def tensor_names(shape: EncoderShape) -> Iterator[tuple[str, str]]:
    """Yields (path in the module, Hugging Face tensor name) for every parameter."""
    yield "word/embedding", "embeddings.word_embeddings.weight"
    yield "position/embedding", "embeddings.position_embeddings.weight"
    yield "segment/embedding", "embeddings.token_type_embeddings.weight"
    yield from layer_norm_names("norm", "embeddings.LayerNorm")
    for i in range(shape.depth):
        ours, theirs = f"layers/{i}", f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            yield from linear_names(f"{ours}/attention/{name}", f"{theirs}.attention.self.{name}")
        yield from linear_names(f"{ours}/attention/out", f"{theirs}.attention.output.dense")
        yield from layer_norm_names(
            f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm"
        )
        yield from linear_names(f"{ours}/mlp_in", f"{theirs}.intermediate.dense")
        yield from linear_names(f"{ours}/mlp_out", f"{theirs}.output.dense")
        yield from layer_norm_names(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm")
