r"""The preconditioner that SDS-LoRA is compared with: inverse square roots of Gram matrices.

    ĝ_a = g_a (b bᵀ)^(−1/2)        ĝ_b = (aᵀ a)^(−1/2) g_b

`(b bᵀ)^(−1/2) b` is a frame of b, so these are SDS-LoRA's gradients without its parameterization.
The step that they make is still multiplied by the other factor.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import engine
from lowrank_optax.engine import both, gram, inverse_root, mix, swap


def scale_by_inverse_sqrt_gram(
    damping: Any = 1e-6,
    *,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradients of ordinary LoRA pairs as if they flowed through frames.

    $$\hat g_a = g_a\,(b\,b^\top)^{-1/2} \qquad \hat g_b = (a^\top a)^{-1/2}\,g_b$$

    Args:
        damping: added to the Gram matrices, positive.
        fallback: transformation of unpaired leaves; none by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation, without a learning rate; it is stateless.

    Raises:
        ValueError: damping out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, scale_by_inverse_sqrt_gram
        >>> params = LoRAPair(jnp.eye(4, 2), 10.0 * jnp.eye(2, 3))
        >>> tx = scale_by_inverse_sqrt_gram()
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> f"{updates.a[0, 0]:.3f}"
        '0.100'

    Source: arXiv 2606.16454, the preconditioner it compares with.
    """
    engine.check_positive("damping", damping)

    def root(matrix: jax.Array) -> jax.Array:
        return inverse_root(matrix, 4 * jnp.finfo(matrix.dtype).eps, damping)

    def rule(pairs: engine.Pairs, grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        roots = pairs.together(root, pairs.each(lambda pair: both(gram, pair), params))
        return pairs.each(lambda g, m: both(mix, g, swap(m)), grads, roots), state

    return engine.lift(
        rule,
        engine.NoState,
        fallback=fallback,
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="scale_by_inverse_sqrt_gram",
    )
