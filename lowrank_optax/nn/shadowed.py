"""The adapter whose backward pass returns products of the full gradient (see ``shadows``)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import shadows
from lowrank_optax.factors import ShadowedPair


def apply_shadowed(x: jax.Array, node: ShadowedPair, scale: Any) -> jax.Array:
    r"""Applies a shadowed pair: forward $y = s (x a) b$, backward the block-Krylov bases.

    Args:
      x: input: any leading axes if the factors have no batch axes, else (batch..., tokens, in).
      node: the pair with its shadows.
      scale: forward scale s.

    Returns:
      y, (..., out), in the dtype of ``x``.

    Raises:
      ValueError: if the input's leading axes do not fit the factors' batch axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lowrank_optax import LoRAPair, shadow
      >>> node = shadow(LoRAPair(jnp.ones((3, 1)), jnp.ones((1, 2))), jax.random.key(0))
      >>> grads = jax.grad(lambda node: apply_shadowed(jnp.eye(3), node, 2.0).sum())(node)
      >>> grads.krylov.tolist()  # G = 2 everywhere, so A₁ = [4, 0] and B₂ = A₁ᵀ G
      [[24.0, 24.0], [0.0, 0.0]]
    """
    batch = node.a.shape[:-2]
    leading = x.shape[:-1]
    if not batch:
        y = _apply(x.reshape(-1, x.shape[-1]), node, scale)
    elif leading[:-1] == batch:
        y = _apply(x, node, scale)
    else:
        raise ValueError(
            f"an input of shape {x.shape} does not fit factors with batch axes {batch}: give"
            f" (*{batch}, tokens, in), so that each batch entry sees its own tokens."
        )
    return y.reshape(*leading, y.shape[-1])


@jax.custom_vjp
def _apply(x: jax.Array, node: ShadowedPair, scale: Any) -> jax.Array:
    narrow = scale * _matmul(x, node.a, like=x)
    return _matmul(narrow, node.b, like=x).astype(x.dtype)


def _forward(x: jax.Array, node: ShadowedPair, scale: Any) -> tuple[jax.Array, Any]:
    return _apply(x, node, scale), (x, node, scale)


def _backward(residuals: Any, dy: jax.Array) -> tuple[jax.Array, ShadowedPair, jax.Array]:
    x, node, scale = residuals
    matmul = functools.partial(_matmul, like=x)
    transposed = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)

    def times_gradient(b: jax.Array) -> jax.Array:  # G bᵀ with G = s xᵀ dy
        return scale * matmul(transposed(x), matmul(dy, transposed(b)))

    def gradient_times(a: jax.Array) -> jax.Array:  # aᵀ G
        return scale * matmul(transposed(matmul(x, a)), dy)

    k, rank = shadows.iterations_of(node), node.a.shape[-1]
    a = [shadows.beside("a", node.a, node.m_a)]
    b = [shadows.beside("b", node.b, node.m_b)]
    for i in range(max(2 * k, 1)):
        b.append(gradient_times(a[i]))
        if len(a) < max(2 * k, 2):
            a.append(times_gradient(b[i]))
    dx = scale * matmul(matmul(dy, transposed(node.b)), transposed(node.a))
    narrow = scale * matmul(x, node.a)
    d_scale = jnp.sum(matmul(narrow, node.b) * dy) / scale
    has_momentum = node.m_a is not None
    grads = ShadowedPair(
        a=a[1][..., :rank],
        b=b[1][..., :rank, :],
        m_a=a[1][..., rank:] if has_momentum else None,
        m_b=b[1][..., rank:, :] if has_momentum else None,
        krylov=shadows.pack(a[2:], b[2:]),
    )
    grads = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), grads, node)
    return dx.astype(x.dtype), grads, d_scale


_apply.defvjp(_forward, _backward)


def _matmul(x: jax.Array, y: jax.Array, like: jax.Array) -> jax.Array:
    """Multiplies in the dtype of ``like``, accumulating in at least float32."""
    return jnp.matmul(
        x.astype(like.dtype),
        y.astype(like.dtype),
        preferred_element_type=jnp.promote_types(like.dtype, jnp.float32),
    )
