"""Multi-head self-attention with separate query, key, value and out projections."""

import jax
from flax import nnx


class SelfAttention(nnx.Module):
    """Bidirectional self-attention made of four `nnx.Linear`, which is what LoRA targets.

    Args:
        width: Size of the residual stream; must be divisible by `heads`.
        heads: Number of attention heads.
        rngs: Random streams for the initial weights.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Attends within each sequence.

        Args:
            x: Tokens, shape (batch, length, width).
            mask: True where a token may be attended to, shape (batch, length).

        Returns:
            The attended tokens, shape (batch, length, width).
        """
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        attended = jax.nn.dot_product_attention(
            self.query(x).reshape(split),
            self.key(x).reshape(split),
            self.value(x).reshape(split),
            mask=None if mask is None else mask[:, None, None, :],
        )
        return self.out(attended.reshape(x.shape))
