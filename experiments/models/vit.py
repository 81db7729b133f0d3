"""A small pre-norm vision transformer."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.attention import SelfAttention


class Block(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = SelfAttention(width, heads, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (batch, length, width) to tokens of the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


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
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, height, width) to logits (batch, classes)."""
        batch, height, width = images.shape
        p = self.patch_size
        patches = images.reshape(batch, height // p, p, width // p, p)
        patches = patches.transpose(0, 1, 3, 2, 4).reshape(batch, -1, p * p)
        x = self.embed(patches) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(self.norm(x), axis=1))
