"""A small pre-norm vision transformer, and the block that all vision transformers here share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.attention import SelfAttention


class Block(nnx.Module):
    """One pre-norm transformer block.

    Args:
        width: Size of the residual stream; must be divisible by `heads`.
        heads: Number of attention heads.
        mlp_width: Hidden size of the perceptron.
        norm_eps: Added to the variance by the norms.
        activation: Of the perceptron.
        rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        norm_eps: float = 1e-6,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention_norm = nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)
        self.attention = SelfAttention(width, heads, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, epsilon=norm_eps, rngs=rngs)
        self.mlp_in = nnx.Linear(width, mlp_width, rngs=rngs)
        self.mlp_out = nnx.Linear(mlp_width, width, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (batch, length, width) to tokens of the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(x))))


class ViT(nnx.Module):
    """Patches, learned positions, pre-norm blocks, mean over tokens and a linear head.

    Args:
        image_size: Height and width of the (one-channel) image.
        patch_size: Height and width of a patch; must divide `image_size`.
        width: Size of the residual stream.
        depth: Number of blocks.
        heads: Number of attention heads.
        classes: Number of output classes.
        rngs: Random streams for the initial weights.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.patch_size = patch_size
        tokens = (image_size // patch_size) ** 2
        self.embed = nnx.Linear(patch_size**2, width, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, width)))
        self.blocks = nnx.List([Block(width, heads, 4 * width, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, height, width) to logits (batch, classes)."""
        patches = patches_of(images[..., None], self.patch_size)
        x = self.embed(patches) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))


def patches_of(images: jax.Array, size: int) -> jax.Array:
    """Cuts images (batch, height, width, channels) into flattened patches.

    Returns:
        (batch, patches, channels * size * size), patches row by row, each ordered as torch's
        convolution kernels.
    """
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, channels * size * size)
