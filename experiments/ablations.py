"""PoLoRA with one of its parts left out, to see what each is good for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import LoRAPair, engine
from lowrank_optax.engine import (
    RANK_AXIS,
    Side,
    both,
    gram,
    largest,
    mix,
    pseudo_inverse_root,
    spectral_norm,
    weigh,
)

B2, DELTA = 0.99, 1e-4


class AblatedState(NamedTuple):
    """As that of `polora`."""

    mu: Any
    curvature: engine.Small


def ablated_polora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: Callable[[str], float] | float = 1.0,
    b1: float = 0.9,
    polar: bool = True,
    bounded: bool = True,
    diagonal: bool = True,
    nesterov: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Makes one-sided PoLoRA, less what is left out; with all of it this is `polora`.

    Args:
        learning_rate: η.
        scale: The forward scale.
        b1: β1.
        polar: Whether singular values are set to one.
        bounded: Whether η bounds the change of s·a·b; if not, each factor's.
        diagonal: Whether the curvature diagonals weigh the step.
        nesterov: Whether the gradient enters the momentum twice.
    """

    def rule(pairs: engine.Pairs, grads: Any, params: Any, state: AblatedState) -> Any:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        x = optax.tree.update_moment(grads, mu, b1, 1) if nesterov else mu

        relative = lambda side, d: d / largest(side, d)[..., None] + DELTA
        metric = pairs.each(lambda d: both(relative, d), state.curvature)
        whitener = jax.tree.map(jax.lax.rsqrt, metric)
        whiten = lambda x: pairs.each(lambda x, w: both(weigh, x, w), x, whitener)
        grams = lambda x: pairs.each(lambda x: both(gram, x), x)

        x = whiten(x) if diagonal else x
        if polar:
            roots = pairs.together(pseudo_inverse_root, grams(x))
            x = pairs.each(lambda x, root: both(mix, x, root), x, roots)
        x = whiten(x) if diagonal else x
        lengths = pairs.together(spectral_norm, grams(x))
        norms = pairs.together(spectral_norm, grams(params))

        def direction(x: LoRAPair, lengths: LoRAPair, norms: LoRAPair, scale: Any) -> LoRAPair:
            length, norm = pairs.rate / scale, norms.a + norms.b
            rho = 2 * length / (norm + jnp.sqrt(norm**2 + 4 * length))
            # The engine multiplies by the rate again.
            rho = rho / pairs.rate if bounded else jnp.ones_like(rho)

            def unit(side: Side, x: jax.Array, length: jax.Array) -> jax.Array:
                return x * (rho / jnp.where(length > 0, length, 1))[..., None, None]

            return both(unit, x, lengths)

        def curve(side: Side, d: jax.Array, g: jax.Array) -> jax.Array:
            return B2 * d + (1 - B2) * jnp.mean(g**2, axis=RANK_AXIS[side])

        directions = pairs.each(direction, x, lengths, norms, pairs.scales)
        curvature = pairs.each(lambda d, g: both(curve, d, g), state.curvature, grads)
        return pairs.descend(directions, params), AblatedState(mu, curvature)

    def init(pair: LoRAPair) -> AblatedState:
        zeros = jax.tree.map(jnp.zeros_like, pair)
        tiny = both(lambda side, x: jnp.sum(x, axis=RANK_AXIS[side]) + 1e-12, zeros)
        return AblatedState(zeros, tiny)

    return engine.lift(
        rule, AblatedState, learning_rate=learning_rate, scale=scale, init=init, name="ablated"
    )
