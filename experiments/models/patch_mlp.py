"""PatchMLP: an image as a bag of placed patches, each through the same residual layers."""

import jax
import jax.numpy as jnp
from flax import nnx


class PatchMLP(nnx.Module):
    """Patches, learned positions, residual linear layers, mean over patches and a linear head.

    Args:
        image_size: Height and width of the three-channel image.
        patch_size: Height and width of a patch; must divide `image_size`.
        width: Size of the residual stream.
        depth: Number of residual layers.
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
        classes: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.patch_size = patch_size
        patches = (image_size // patch_size) ** 2
        self.embed = nnx.Linear(3 * patch_size**2, width, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (patches, width)))
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(depth)])
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, height, width, 3) of uint8 to logits (batch, classes)."""
        batch, height, width, channels = images.shape
        p = self.patch_size
        x = images.astype(jnp.float32) / 127.5 - 1
        x = x.reshape(batch, height // p, p, width // p, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)
        x = self.embed(x) + self.position[...]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + nnx.gelu(layer(norm(x)))
        return self.head(jnp.mean(x, axis=1))
