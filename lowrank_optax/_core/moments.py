"""Adam's direction from its moments, for the methods that have an Adam inside."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def adam_direction(mu: Any, nu: Any, count: Any, *, b1: Any, b2: Any, eps: Any) -> Any:
    r"""Computes Adam's direction of descent.

    $$\frac{m / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}$$

    Args:
        mu: m, the first moments, any tree.
        nu: v, the second moments, likewise shaped.
        count: k, how many gradients are in them, from 1.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: $\epsilon$, positive.

    Returns:
        The directions, a tree shaped like the moments.

    Example:
        >>> import jax.numpy as jnp
        >>> mu, nu = jnp.array([0.2, 0.0]), jnp.array([0.004, 0.0])
        >>> adam_direction(mu, nu, 1, b1=0.9, b2=0.999, eps=1e-8).round(3).tolist()
        [1.0, 0.0]

    Source: arXiv 1412.6980, Algorithm 1.
    """
    m = optax.tree.bias_correction(mu, b1, count)
    v = optax.tree.bias_correction(nu, b2, count)
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m, v)


def adam_direction_epsilon_hat(mu: Any, nu: Any, count: Any, *, b1: Any, b2: Any, eps: Any) -> Any:
    r"""Computes Adam's direction with $\hat\epsilon$, which is added before the bias correction.

    $$\frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k}\,\frac{m}{\sqrt v + \hat\epsilon}$$

    Args:
        mu: m, the first moments, any tree.
        nu: v, the second moments, likewise shaped.
        count: k, how many gradients are in them, from 1.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: $\hat\epsilon$, positive.

    Returns:
        The directions, a tree shaped like the moments.

    Example:
        >>> import jax.numpy as jnp
        >>> mu, nu = jnp.array([0.2, 0.0]), jnp.array([0.004, 0.0])
        >>> directions = adam_direction_epsilon_hat(mu, nu, 1, b1=0.9, b2=0.999, eps=1e-8)
        >>> directions.round(3).tolist()
        [1.0, 0.0]

    Source: arXiv 1412.6980, the end of section 2.
    """
    correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    return jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
