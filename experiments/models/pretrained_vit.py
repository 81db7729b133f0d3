"""Pretrained vision transformers in Flax NNX, with weights in the Hugging Face format.

There is no dropout: the trainer's runs are deterministic.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experiments.errors import ExperimentError
from experiments.models.checkpoint import (
    Shape,
    fill,
    layer_norm_names,
    linear_names,
    open_safetensors,
    read_json,
    read_shape,
)
from experiments.models.vit import Block, patches_of

PREFIX = "vit."
PREPROCESSOR_FILE = "preprocessor_config.json"

exact_gelu = functools.partial(jax.nn.gelu, approximate=False)


class ViTShape(Shape):
    """The sizes of a vision transformer."""

    model_types: ClassVar[tuple[str, ...]] = ("vit",)

    image_size: int
    patch_size: int
    channels: int = Field(default=3, validation_alias="num_channels")
    width: int = Field(validation_alias="hidden_size")
    depth: int = Field(validation_alias="num_hidden_layers")
    heads: int = Field(validation_alias="num_attention_heads")
    mlp_width: int = Field(validation_alias="intermediate_size")
    norm_eps: float = Field(validation_alias="layer_norm_eps")
    hidden_act: Literal["gelu"] = "gelu"
    qkv_bias: Literal[True] = True


class Normalization(BaseModel):
    """How a model wants its pixels, as `preprocessor_config.json` says: (x / 255 - mean) / std."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


class ImageEncoder(nnx.Module):
    """Patches behind a class token, learned positions and pre-norm blocks.

    Args:
        shape: Sizes of the model.
        rngs: Random streams for the initial weights.
    """

    def __init__(self, shape: ViTShape, *, rngs: nnx.Rngs) -> None:
        self.shape = shape
        patches = (shape.image_size // shape.patch_size) ** 2
        self.embed = nnx.Linear(shape.channels * shape.patch_size**2, shape.width, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, shape.width)))
        self.position = nnx.Param(jnp.zeros((1, patches + 1, shape.width)))
        self.blocks = nnx.List(
            [
                Block(
                    shape.width,
                    shape.heads,
                    shape.mlp_width,
                    norm_eps=shape.norm_eps,
                    activation=exact_gelu,
                    rngs=rngs,
                )
                for _ in range(shape.depth)
            ]
        )
        self.norm = nnx.LayerNorm(shape.width, epsilon=shape.norm_eps, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalized images (batch, height, width, channels) to features (batch, width)."""
        patches = self.embed(patches_of(images, self.shape.patch_size))
        first = jnp.broadcast_to(self.class_token[...], (len(patches), 1, self.shape.width))
        x = jnp.concatenate([first, patches], axis=1) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


class ImageClassifier(nnx.Module):
    """An image encoder with a linear head, for images of any size and 8 bits a channel.

    Args:
        encoder: The encoder.
        normalization: How it wants its pixels.
        head: Maps features (batch, width) to logits (batch, classes).
    """

    def __init__(
        self, encoder: ImageEncoder, normalization: Normalization, head: nnx.Linear
    ) -> None:
        self.encoder = encoder
        self.normalization = normalization
        self.head = head

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, channels) of 0 ... 255 to logits (batch, classes)."""
        mean, std = (
            jnp.array(values)
            for values in (self.normalization.image_mean, self.normalization.image_std)
        )
        size = self.encoder.shape.image_size
        pixels = (images.astype(jnp.float32) / 255.0 - mean) / std
        shape = (len(images), size, size, images.shape[-1])
        return self.head(self.encoder(jax.image.resize(pixels, shape, "bilinear")))


def load_image_encoder(model_dir: Path) -> ImageEncoder:
    """Loads an encoder from a folder with `config.json` and (sharded) safetensors.

    Args:
        model_dir: The folder.

    Returns:
        The encoder, with the file's weights in float32.

    Raises:
        ExperimentError: A file is missing, damaged, or of another architecture.
    """
    shape = read_shape(model_dir, ViTShape)
    checkpoint = open_safetensors(model_dir).rename(lambda name: name.removeprefix(PREFIX))
    names = dict(tensor_names(shape))
    return fill(lambda: ImageEncoder(shape, rngs=nnx.Rngs(0)), checkpoint, names)


def load_normalization(model_dir: Path) -> Normalization:
    """Reads how a model wants its pixels from its `preprocessor_config.json`.

    Raises:
        ExperimentError: The file is missing or damaged.
    """
    path = model_dir / PREPROCESSOR_FILE
    try:
        return Normalization.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ExperimentError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error


def tensor_names(shape: ViTShape) -> Iterator[tuple[str, str]]:
    """Yields (path in the module, Hugging Face tensor name) for every parameter."""
    yield "class_token", "embeddings.cls_token"
    yield "position", "embeddings.position_embeddings"
    yield from linear_names("embed", "embeddings.patch_embeddings.projection")
    yield from layer_norm_names("norm", "layernorm")
    for i in range(shape.depth):
        ours, theirs = f"blocks/{i}", f"encoder.layer.{i}"
        yield from layer_norm_names(f"{ours}/attention_norm", f"{theirs}.layernorm_before")
        for name in ("query", "key", "value"):
            yield from linear_names(
                f"{ours}/attention/{name}", f"{theirs}.attention.attention.{name}"
            )
        yield from linear_names(f"{ours}/attention/out", f"{theirs}.attention.output.dense")
        yield from layer_norm_names(f"{ours}/mlp_norm", f"{theirs}.layernorm_after")
        yield from linear_names(f"{ours}/mlp_in", f"{theirs}.intermediate.dense")
        yield from linear_names(f"{ours}/mlp_out", f"{theirs}.output.dense")
