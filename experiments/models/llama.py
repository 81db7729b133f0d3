"""The Llama decoder in Flax NNX, with weights in the Hugging Face format.

Written here because no library that is on PyPI serves: `google-tunix` 0.1.7 has such a model, but
brings tensorflow-datasets, numba, transformers and some twenty packages more, and wants
safetensors < 0.8; `jax-bonsai` 0.0.1 is an empty placeholder.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.models.checkpoint import Shape, fill, open_safetensors, read_shape, write_model


class RopeScaling(BaseModel):
    """How Llama 3.1 and later stretch the rotary wavelengths beyond the pretrained context."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def apply(self, frequencies: jax.Array) -> jax.Array:
        """Divides slow frequencies by `factor`, keeps fast ones, and blends those between."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequencies * (keep + (1.0 - keep) / self.factor)


class LlamaShape(Shape):
    """The sizes of a Llama decoder."""

    model_types: ClassVar[tuple[str, ...]] = ("llama",)

    vocabulary: int = Field(validation_alias="vocab_size")
    width: int = Field(validation_alias="hidden_size")
    depth: int = Field(validation_alias="num_hidden_layers")
    heads: int = Field(validation_alias="num_attention_heads")
    kv_heads: int = Field(validation_alias="num_key_value_heads")
    head_width: int = Field(validation_alias="head_dim")
    mlp_width: int = Field(validation_alias="intermediate_size")
    norm_eps: float = Field(validation_alias="rms_norm_eps")
    tied: bool = Field(default=False, validation_alias="tie_word_embeddings")
    eos: int | None = Field(default=None, validation_alias="eos_token_id")
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Fills in what older files leave out, and reads both ways to write the rotary settings."""
        config = dict(config)
        rope = config.pop("rope_parameters", None) or config.pop("rope_scaling", None)
        if rope:
            config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
            kind = rope.get("rope_type", rope.get("type"))
            if kind not in ("default", "llama3"):
                raise ValueError(f"rotary embeddings of type {kind!r} are not supported")
            config["rope_scaling"] = rope if kind == "llama3" else None
        # Where several tokens end a text, the first does so for a document.
        if isinstance(config.get("eos_token_id"), list):
            config["eos_token_id"] = config["eos_token_id"][0]
        if config.get("num_key_value_heads") is None and "num_attention_heads" in config:
            config["num_key_value_heads"] = config["num_attention_heads"]
        if config.get("head_dim") is None and {"hidden_size", "num_attention_heads"} <= set(config):
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        return config


class Cache(NamedTuple):
    """What a layer keeps of the tokens so far, so that the next one does not run them again.

    Attributes:
        keys: Rotated keys, (batch, room, kv_heads, head_width).
        values: Values, of the same shape.
    """

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, where several queries share a key and value."""

    def __init__(self, shape: LlamaShape, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        self.shape = shape
        queries, keys = (n * shape.head_width for n in (shape.heads, shape.kv_heads))
        self.query = _linear(shape.width, queries, dtype, rngs)
        self.key = _linear(shape.width, keys, dtype, rngs)
        self.value = _linear(shape.width, keys, dtype, rngs)
        self.out = _linear(queries, shape.width, dtype, rngs)

    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        """Maps tokens (batch, length, width), with their `angles`, to tokens of the same shape."""
        query, key, value = self._project(x, angles)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(attended.reshape(*x.shape[:2], -1))

    def extend(
        self, x: jax.Array, angles: jax.Array, cache: Cache, position: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Maps the token at a position, (batch, 1, width), and adds it to the cache."""
        query, key, value = self._project(x, angles)
        store = jax.lax.dynamic_update_slice_in_dim
        cache = Cache(
            store(cache.keys, key, position, axis=1), store(cache.values, value, position, axis=1)
        )
        seen = jnp.full(x.shape[0], position + 1, jnp.int32)
        attended = jax.nn.dot_product_attention(query, *cache, key_value_seq_lengths=seen)
        return self.out(attended.reshape(*x.shape[:2], -1)), cache

    def _project(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, key, value = (
            linear(x).reshape(*x.shape[:2], -1, self.shape.head_width)
            for linear in (self.query, self.key, self.value)
        )
        return rotate(query, angles), rotate(key, angles), value


class SwiGLU(nnx.Module):
    r"""The gated perceptron: down(silu(gate(x)) \* up(x))."""

    def __init__(self, shape: LlamaShape, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        self.gate = _linear(shape.width, shape.mlp_width, dtype, rngs)
        self.up = _linear(shape.width, shape.mlp_width, dtype, rngs)
        self.down = _linear(shape.mlp_width, shape.width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (batch, length, width) to tokens of the same shape."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, shape: LlamaShape, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(shape, dtype, rngs)
        self.attention = Attention(shape, dtype, rngs=rngs)
        self.mlp_norm = _norm(shape, dtype, rngs)
        self.mlp = SwiGLU(shape, dtype, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        """Maps tokens (batch, length, width), with their `angles`, to tokens of the same shape."""
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.mlp(self.mlp_norm(x))

    def extend(
        self, x: jax.Array, angles: jax.Array, cache: Cache, position: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Maps the token at a position, (batch, 1, width), and adds it to the cache."""
        attended, cache = self.attention.extend(self.attention_norm(x), angles, cache, position)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """The decoder: embedding, pre-norm layers and the next token's logits.

    Sequences are padded on the right: by causality what follows a token does not reach it.

    Args:
        shape: Sizes of the model.
        dtype: Of the weights and of the activations; norms, rotary angles and the softmax of the
            attention are in float32 all the same.
        rngs: Random streams for the initial weights.
    """

    def __init__(
        self, shape: LlamaShape, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs
    ) -> None:
        self.shape = shape
        self.embed = nnx.Embed(
            shape.vocabulary, shape.width, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List([DecoderLayer(shape, dtype, rngs=rngs) for _ in range(shape.depth)])
        self.norm = _norm(shape, dtype, rngs)
        if not shape.tied:
            self.unembed = _linear(shape.width, shape.vocabulary, dtype, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps token ids (batch, length) to logits of the next tokens (batch, length, vocabulary).

        The logits are float32.
        """
        angles = rotary_angles(self.shape, jnp.arange(tokens.shape[1]))
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angles)
        return self._logits(x)

    def caches(self, batch: int, room: int) -> list[Cache]:
        """Returns the empty cache of each layer, with room for so many tokens."""
        shape, dtype = self.shape, self.embed.dtype
        empty = jnp.zeros((batch, room, shape.kv_heads, shape.head_width), dtype)
        return [Cache(empty, empty) for _ in self.layers]

    def extend(
        self, tokens: jax.Array, caches: list[Cache], position: jax.Array
    ) -> tuple[jax.Array, list[Cache]]:
        """Reads one token of each text, after those that the caches hold.

        Args:
            tokens: Token ids, (batch,).
            caches: Of the tokens before, see `caches`.
            position: Where they stand, from 0; the same in all texts.

        Returns:
            The next tokens' logits (batch, vocabulary), float32, and the caches with these tokens.
        """
        angles = rotary_angles(self.shape, position[None])
        x, longer = self.embed(tokens[:, None]), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, with_token = layer.extend(x, angles, cache, position)
            longer.append(with_token)
        return self._logits(x)[:, 0], longer

    def _logits(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        logits = self.embed.attend(x) if self.shape.tied else self.unembed(x)
        return logits.astype(jnp.float32)


def rotary_angles(shape: LlamaShape, positions: jax.Array) -> jax.Array:
    """Returns position times frequency, (positions, head_width / 2), float32."""
    exponents = jnp.arange(0, shape.head_width, 2, dtype=jnp.float32) / shape.head_width
    frequencies = shape.rope_theta**-exponents
    if shape.rope_scaling is not None:
        frequencies = shape.rope_scaling.apply(frequencies)
    return positions.astype(jnp.float32)[:, None] * frequencies


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns each pair of features (i, i + half) by the angle i of its position.

    Args:
        x: Queries or keys, (batch, length, heads, head_width).
        angles: (length, head_width / 2).

    Returns:
        The rotated features, of `x`'s shape and dtype.
    """
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def load_llama(model_dir: Path, dtype: DTypeLike = jnp.float32) -> Llama:
    """Loads a decoder from a folder with `config.json` and (sharded) safetensors.

    Args:
        model_dir: The folder.
        dtype: Of the weights and the activations, whatever the file stores.

    Returns:
        The decoder.

    Raises:
        ExperimentError: A file is missing, damaged, or of another architecture.
    """
    shape = read_shape(model_dir, LlamaShape)
    names = dict(tensor_names(shape))
    return fill(lambda: Llama(shape, dtype, rngs=nnx.Rngs(0)), open_safetensors(model_dir), names)


def save_llama(model: Llama, folder: Path) -> None:
    """Writes a decoder without adapters as `config.json` and safetensors.

    Args:
        model: The decoder.
        folder: Where to write; it must exist.
    """
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= model.shape.config()
    write_model(model, folder, config, dict(tensor_names(model.shape)))


def tensor_names(shape: LlamaShape) -> Iterator[tuple[str, str]]:
    """Yields (path in the module, Hugging Face tensor name) for every parameter."""
    yield "embed/embedding", "model.embed_tokens.weight"
    yield "norm/scale", "model.norm.weight"
    if not shape.tied:
        yield "unembed/kernel", "lm_head.weight"
    for i in range(shape.depth):
        ours, theirs = f"layers/{i}", f"model.layers.{i}"
        yield f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"
        yield f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"
        for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            yield f"{ours}/attention/{name}/kernel", f"{theirs}.self_attn.{short}_proj.weight"
        for name in ("gate", "up", "down"):
            yield f"{ours}/mlp/{name}/kernel", f"{theirs}.mlp.{name}_proj.weight"


@nnx.jit(static_argnames=("length", "eos"))
def greedy_decode(
    model: Llama, prompts: jax.Array, sizes: jax.Array, length: int, eos: int | None = None
) -> jax.Array:
    """Continues prompts by the likeliest token each time.

    All texts go on in step, one token at a time with a cache of keys and values; where a prompt
    still goes on, its own token is taken. It ends when all texts have ended.

    Args:
        model: The decoder.
        prompts: Token ids, (batch, width); what stands behind a prompt does not count.
        sizes: Tokens of each prompt, (batch,), at least 1.
        length: Length to reach.
        eos: Token that ends a text; without one, all go on to `length`.

    Returns:
        Token ids, (batch, length), that begin with the prompts; `eos` fills what follows an end.
    """
    batch, width = prompts.shape
    fill = 0 if eos is None else eos
    prompts = jnp.where(jnp.arange(width) < sizes[:, None], prompts, fill)
    tokens = jnp.full((batch, length), fill, prompts.dtype).at[:, :width].set(prompts)

    def goes_on(state: tuple[Any, ...]) -> jax.Array:
        position, _, _, ended = state
        return (position + 1 < length) & ~ended.all()

    def extend(state: tuple[Any, ...]) -> tuple[Any, ...]:
        position, tokens, caches, ended = state
        logits, caches = model.extend(tokens[:, position], caches, position)
        likeliest = jnp.where(ended, fill, logits.argmax(axis=-1)).astype(tokens.dtype)
        is_prompt = position + 1 < sizes
        following = jnp.where(is_prompt, tokens[:, position + 1], likeliest)
        if eos is not None:
            ended |= ~is_prompt & (following == eos)
        return position + 1, tokens.at[:, position + 1].set(following), caches, ended

    start = (jnp.int32(0), tokens, model.caches(batch, length), jnp.zeros(batch, bool))
    return jax.lax.while_loop(goes_on, extend, start)[1]


def _linear(n_in: int, n_out: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(n_in, n_out, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _norm(shape: LlamaShape, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        shape.width, epsilon=shape.norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs
    )
