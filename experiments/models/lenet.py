"""LeNet-5 for 28x28 images, with rectifiers and max pooling."""

import jax
import jax.numpy as jnp
from flax import nnx


class LeNet5(nnx.Module):
    """Two convolutions, each with pooling, and three linear layers.

    Args:
        rngs: Random streams for the initial weights.
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.List(
            [
                nnx.Conv(1, 6, (5, 5), padding="SAME", rngs=rngs),
                nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs),
            ]
        )
        sizes = (400, 120, 84, 10)
        self.linear = nnx.List([nnx.Linear(sizes[i], sizes[i + 1], rngs=rngs) for i in range(3)])

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (batch, 28, 28) of uint8 to logits (batch, 10)."""
        x = images[..., None].astype(jnp.float32) / 255
        for conv in self.conv:
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for layer in self.linear[:-1]:
            x = nnx.relu(layer(x))
        return self.linear[-1](x)
