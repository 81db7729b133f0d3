r"""LoRA-RITE: a matrix second moment of unmagnified gradients, the same for all bases (2410.20625).

For a factor x, seen as (rows, r), whose other factor is y = U R with orthonormal U, an update is

    ḡ = ∇x R⁺                         unmagnified gradient: the full gradient times U
    ḡ ← ḡ · min(1, c / ‖(ḡ_a, ḡ_b)‖)  the two of a pair are clipped together
    T = Uᵀ U°                          from the frame of the last update to this one
    V ← β̂₂ T V Tᵀ + (1 − β̂₂) ḡᵀ ḡ / rows
    M ← β̂₁ M Tᵀ + (1 − β̂₁) ḡ (√V + ε I)⁻¹
    x ← x − η (M R⁺ᵀ + λ x)            β̂ = β (1 − βᵗ⁻¹) / (1 − βᵗ)

A rotation of U cancels in x, so U need not be the Q of a QR decomposition. Here it is made from
Gram matrices alone, which are sums over shards: R⁺ = C⁻¹ (pᵀ p)^(−½), where p = y C⁻¹, and C is the
Cholesky factor of yᵀ y plus a shift at rounding level. The root removes the bias of the shift, and
leaves out what of y is below rounding level, as the pseudo-inverse does.

Deviations from the released code (gkevinyen5418/LoRA-RITE, c9bb451), whose trajectories this method
follows to 1e-10, with the tests in `tests/test_lora_rite.py`:

- Instead of U°, only the r×r matrix U°ᵀ y is kept, with y after the last update. The released code
  keeps U°, a copy of the factors (`test_trajectory_equals_one_that_keeps_the_frames`).
- A pair is clipped for itself, so that pairs stay independent; the released code clips all pairs of
  the model by one norm (`test_clipping_joins_the_factors_of_a_pair_and_nothing_else`).
- Eigenvalues of V below rounding level count as that level. There the released code takes the root
  of a negative number and drops the update (`test_an_indefinite_second_moment_does_not_freeze`), or
  divides noise by ε (`test_components_below_rounding_level_are_not_whitened`).
- No `update_skipping`, with which the released code takes no step from a large gradient
  (`test_a_large_gradient_does_not_freeze`); no capping, escape mass and balancing either, which it
  has and does not use by default.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import engine
from lowrank_optax.engine import LoRAPair, Side, both, cross, gram, mix, product, swap, transposed


class LoRARITEState(NamedTuple):
    """State of `lora_rite`, float32 or better. M and V are as of the last update.

    Args:
        mu: M, a tree shaped like the parameters.
        nu: V, a list of pairs of (..., r, r).
        overlap: `U°ᵀ y` of each factor y with the frame U° that it had before it moved, likewise.
    """

    mu: Any
    nu: engine.Small
    overlap: engine.Small


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps: Any = 1e-6,
    clip_unmagnified_grad: Any = 1.0,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by LoRA-RITE, and all other leaves by a fallback.

    $$x \leftarrow x - \eta\,(M R^{+\top} + \lambda x)$$

    with the momentum M of gradients whitened in the frame of the other factor, U R. Two pairs with
    the same product stay so. From b = 0 the second update moves a by a length that does not
    depend on $\eta$, but on how $\eta$ grew from the first update.

    Args:
        learning_rate: $\eta$, positive, or a schedule; it measures steps of a b, not of a and b.
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: $\epsilon$, added to the root of the second moment, positive.
        clip_unmagnified_grad: c, the largest norm of a pair's gradients in its frames; or None.
        weight_decay: $\lambda$, decoupled.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation, to be the last link of a chain. State: `LoRARITEState`, a copy of the
        factors and four r×r matrices a pair.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, lora_rite
        >>> params = LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3)))
        >>> tx = lora_rite(0.1)
        >>> grads = LoRAPair(jnp.zeros((4, 2)), jnp.eye(2, 3))
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> f"{updates.b[0, 0]:.3f}", updates.a.any().item()
        ('-0.173', False)

    Source: arXiv 2410.20625, Algorithm 1, and the released code.
    """
    engine.check_decay("b1", b1)
    engine.check_decay("b2", b2)
    engine.check_positive("eps", eps)
    if clip_unmagnified_grad is not None:
        engine.check_positive("clip_unmagnified_grad", clip_unmagnified_grad)

    def rule(
        pairs: engine.Pairs, grads: Any, params: Any, state: LoRARITEState
    ) -> tuple[Any, LoRARITEState]:
        decay1, decay2 = (_corrected(decay, pairs.count + 1) for decay in (b1, b2))
        mixed = functools.partial(pairs.each, functools.partial(both, mix))
        frames, own_inverses = _frames(pairs, params)
        inverses, overlaps = ([*map(swap, each)] for each in (own_inverses, state.overlap))

        clip = functools.partial(_clip, longest=clip_unmagnified_grad)
        unmagnified, squares = pairs.each(clip, mixed(grads, inverses))
        turns, nu = pairs.together(_turn, overlaps, inverses, state.nu)
        nu = optax.tree.update_moment(squares, nu, decay2, 1)
        roots = pairs.together(lambda matrix: _inverse_root(matrix, eps), nu)
        whitened = mixed(unmagnified, roots)
        mu = optax.tree.update_moment(whitened, mixed(state.mu, turns), decay1, 1)

        directions = mixed(mu, jax.tree.map(transposed, inverses))
        updates = pairs.descend(directions, params)
        moved = pairs.moved(params, updates)
        overlap = pairs.each(lambda u, x: both(cross, u, x), frames, moved)
        return updates, LoRARITEState(mu, nu, overlap)

    return engine.lift(
        rule,
        LoRARITEState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        fallback=fallback,
        adamw={"b1": b1, "b2": b2, "eps": eps},
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="lora_rite",
    )


def _frames(pairs: engine.Pairs, params: Any) -> tuple[Any, Any]:
    """Computes the frames U of all factors x, and R⁺, with which U = x R⁺."""
    mixed = functools.partial(pairs.each, functools.partial(both, mix))
    grams = functools.partial(pairs.each, functools.partial(both, gram))
    first = pairs.together(engine.orthonormalizer, grams(params))  # C⁻¹
    almost = mixed(params, first)
    second = pairs.together(engine.pseudo_inverse_root, grams(almost))
    return mixed(almost, second), pairs.together(product, first, second)


def _clip(g: LoRAPair, longest: Any) -> tuple[LoRAPair, LoRAPair]:
    """Returns the clipped gradients of a pair, and their ḡᵀ ḡ / rows."""
    factor: Any = 1.0
    grams = both(gram, g)
    if longest is not None:
        traces = both(lambda side, m: engine.trace(m), grams)
        factor = longest / jnp.maximum(jnp.sqrt(traces.a + traces.b), longest)

    def mean(side: Side, m: jax.Array, x: jax.Array) -> jax.Array:
        return factor**2 * m / engine.long_axis_size(side, x)

    return both(lambda side, x: factor * x, g), both(mean, grams, g)


def _turn(overlap: jax.Array, inverse: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Tᵀ from the other factor's matrices, and T V Tᵀ."""
    turn = product(overlap, inverse)
    return turn, product(product(transposed(turn), nu), turn)


def _inverse_root(matrix: jax.Array, eps: Any) -> jax.Array:
    rounding = matrix.shape[-1] * jnp.finfo(matrix.dtype).eps
    floored = lambda values: jnp.maximum(values, rounding * jnp.maximum(values[..., -1:], 0))
    return engine.of_eigenvalues(lambda values: 1 / (jnp.sqrt(floored(values)) + eps), matrix)


def _corrected(decay: Any, t: jax.Array) -> Any:
    return decay * (1 - decay ** (t - 1)) / (1 - decay**t)
