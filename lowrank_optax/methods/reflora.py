r"""RefLoRA: the steps of the best split of a b into factors, without splitting anew (2505.18877).

The pairs (a P, P⁻¹ b) are one adapter. A gradient step of the split by P, written for a and b, is

    a ← a − η g_a S⁻¹        b ← b − η S g_b        S = P Pᵀ

It changes a b by −η s (G bᵀ S⁻¹ b + a S aᵀ G) to first order, at most by η s ‖G‖ times
tr(M S) + tr(N S⁻¹), with M = aᵀ a and N = b bᵀ. This is ‖a P‖² + ‖P⁻¹ b‖². It is least where
S M S = N, the geometric mean of M⁻¹ and N, which makes the Gram matrices of the two factors equal:

    S = M⁻¹ # N = R K^½ Rᵀ        S⁻¹ = L K^(−½) Lᵀ        M = L Lᵀ, R = L⁻ᵀ, K = Lᵀ N L

Then a S aᵀ = (ΔΔᵀ)^½ and bᵀ S⁻¹ b = (ΔᵀΔ)^½ with Δ = a b: the step depends on the product alone.
Of the multiples of the identity, σ = ‖b‖ / ‖a‖ is best. Adam of a gradient g is called A(g):

    full      x ← x − η (A(ĝ) + λ x)            ĝ_a = g_a S⁻¹, ĝ_b = S g_b
    scalar    x ← x − η (c A(g) + λ x)          c_a = σ^(−½), c_b = σ^½

Adam would divide a scalar out of ĝ, so the scalar form (RefLoRA-S) takes Adam's steps in the
coordinates a √σ and b / √σ, and c brings them back. Its changes of a b are the same for all splits
(t a, b / t). Those of the full form are only before Adam, which sees entries of ĝ.

The first `warmup_steps` updates are AdamW's, for S has no meaning at b = 0.

Written from these equations and read beside the released code (zhangyilang/RefLoRA, 2248a26).
Deviations, with the tests in `tests/test_reflora.py`:

- The scalar form leaves the factors as they are. The released code multiplies them by √σ and 1/√σ
  after each step and Adam's moments by the inverse; the products are equal
  (`test_scalar_form_has_the_products_of_factors_that_are_refactored`).
- M and N are damped, with a floor at rounding level; the released code adds the dtype's ε to roots.
- K is made from a Cholesky factor of M in place of its symmetric root; S is the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import engine
from lowrank_optax.engine import LoRAPair, adam_direction, both, gram, mix, product, transposed

FORMS = ("full", "scalar")


class RefLoRAState(NamedTuple):
    """Adam's moments, of preconditioned gradients in the full form, float32 or better.

    Args:
        mu: first moment, a tree shaped like the parameters.
        nu: second moment, likewise shaped.
    """

    mu: Any
    nu: Any


def reflora(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    refactoring: str = "full",
    warmup_steps: Any = 100,
    eps: Any = 1e-8,
    damping: Any = 1e-6,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by Adam on balanced factors, and all other leaves by a fallback.

    $$\hat g_a = g_a S^{-1}, \quad \hat g_b = S\,g_b, \quad S\,(a^\top a)\,S = b\,b^\top$$

    Args:
        learning_rate: $\eta$, positive, or a schedule; of the order of AdamW's.
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        refactoring: `"full"`, or `"scalar"`: Adam at the rates $\eta\,\sigma^{-1/2}$ of a and
            $\eta\,\sigma^{1/2}$ of b, $\sigma = \|b\| / \|a\|$.
        warmup_steps: how many updates are AdamW's at first; 100 is the released scripts'.
        eps: $\epsilon$, added to the root of the second moment, positive.
        damping: added to the Gram matrices, positive. The squared norms of the scalar form are
            their traces, so they grow by the rank times it.
        weight_decay: $\lambda$, decoupled.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation. State: `RefLoRAState`, two copies of the factors.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, reflora
        >>> params = LoRAPair(jnp.eye(4, 2), 4.0 * jnp.eye(2, 3))
        >>> tx = reflora(0.1, b1=0.0, warmup_steps=0)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> f"{state.pairs.mu.a[0, 0]:.2f} {state.pairs.mu.b[0, 0]:.2f}"  # S = 4
        '0.25 16.00'

    Source: arXiv 2505.18877, RefLoRA and RefLoRA-S.
    """
    engine.check_decay("b1", b1)
    engine.check_decay("b2", b2)
    engine.check_choice("refactoring", refactoring, FORMS)
    engine.check_whole("warmup_steps", warmup_steps, least=0)
    engine.check_positive("eps", eps)
    engine.check_positive("damping", damping)

    def refactored(pairs: engine.Pairs, split: Any, operate: Any, plain: Any, params: Any) -> Any:
        """What the best split makes of gradients or directions, but in the first updates."""
        grams = pairs.each(lambda pair: tuple(both(gram, pair)), params)
        damped = lambda m, n: split(engine.damped(m, damping), engine.damped(n, damping))
        splits = pairs.each(LoRAPair, *pairs.together(damped, *grams))
        new = pairs.each(lambda x, m: both(operate, x, m), plain, splits)
        is_early = pairs.count < warmup_steps
        return jax.tree.map(lambda x, y: jnp.where(is_early, x.astype(y.dtype), y), plain, new)

    def adam(count: jax.Array, grads: Any, state: RefLoRAState) -> tuple[Any, RefLoRAState]:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)
        directions = adam_direction(mu, nu, count + 1, b1=b1, b2=b2, eps=eps)
        return directions, RefLoRAState(mu, nu)

    def full(pairs: engine.Pairs, grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        scaled = refactored(pairs, _geometric_mean, mix, grads, params)
        directions, state = adam(pairs.count, scaled, state)
        return pairs.descend(directions, params), state

    def scalar(pairs: engine.Pairs, grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        directions, state = adam(pairs.count, grads, state)
        times = lambda side, x, c: c * x
        directions = refactored(pairs, _ratio_of_norms, times, directions, params)
        return pairs.descend(directions, params), state

    return engine.lift(
        {"full": full, "scalar": scalar}[refactoring],
        RefLoRAState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        fallback=fallback,
        adamw={"b1": b1, "b2": b2, "eps": eps},
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="reflora",
    )


def _geometric_mean(m: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes S⁻¹ and S = M⁻¹ # N of positive definite M and N."""
    right = engine.orthonormalizer(m)  # L⁻ᵀ
    left = product(m, right)  # L
    values, vectors = engine.eigh(product(transposed(left), product(n, left)))
    floor = 4 * jnp.finfo(m.dtype).eps * jnp.sum(jnp.abs(values), axis=-1, keepdims=True)
    roots = jnp.sqrt(jnp.maximum(values, floor))[..., None, :]

    def congruent(x: jax.Array, roots: jax.Array) -> jax.Array:
        x = product(x, vectors)
        return product(x * roots, transposed(x))

    return congruent(left, 1 / roots), congruent(right, roots)


def _ratio_of_norms(m: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes σ^(−½) and σ^½ with σ = √(tr N / tr M)."""
    root = (engine.trace(n) / engine.trace(m)) ** 0.25
    return 1 / root, root
