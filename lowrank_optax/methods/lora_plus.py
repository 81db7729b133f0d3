r"""LoRA+: Adam with a higher learning rate for b (arXiv 2402.12354).

With AdamW's direction d of each factor:

    a ← a − η (d_a + λ a)        b ← b − ρ η (d_b + λ b)

b starts at zero and has to grow. With one rate for both factors it grows too slowly in wide
models. The paper suggests ρ = 16.

Deviations: none from the equations; weight decay is AdamW's at each factor's own rate, as in the
released code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import optax

from lowrank_optax import engine
from lowrank_optax.engine import adam_direction


class LoRAPlusState(NamedTuple):
    """Adam's moments of the factors, float32 or better.

    Args:
        mu: first moment, a tree shaped like the parameters.
        nu: second moment, likewise shaped.
    """

    mu: Any
    nu: Any


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    ratio: Any = 16.0,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by AdamW with a higher rate for b, and all other leaves by a fallback.

    $$b \leftarrow b - \rho\,\eta\,\Big(\frac{m_b / (1 - \beta_1^t)}
      {\sqrt{v_b / (1 - \beta_2^t)} + \epsilon} + \lambda b\Big)$$

    and the same for a without $\rho$.

    Args:
        learning_rate: $\eta$, the rate of `a`, positive, or a schedule; of the order of AdamW's.
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        ratio: $\rho$, the rate of `b` over that of `a`, positive.
        eps: $\epsilon$, added to the root of the second moment, positive.
        weight_decay: $\lambda$, decoupled.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW at the rate of `a` by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation. State: `LoRAPlusState`, two copies of the factors.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, lora_plus
        >>> params = LoRAPair(jnp.eye(4, 2), jnp.ones((2, 3)))
        >>> tx = lora_plus(0.1, ratio=4.0)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> f"{updates.a[0, 0]:.2f} {updates.b[0, 0]:.2f}"
        '-0.10 -0.40'

    Source: arXiv 2402.12354, section 4.
    """
    engine.check_positive("ratio", ratio)
    engine.check_decay("b1", b1)
    engine.check_decay("b2", b2)
    engine.check_positive("eps", eps)

    def rule(
        pairs: engine.Pairs, grads: Any, params: Any, state: LoRAPlusState
    ) -> tuple[Any, LoRAPlusState]:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)
        directions = adam_direction(mu, nu, pairs.count + 1, b1=b1, b2=b2, eps=eps)
        steps = pairs.descend(directions, params)
        updates = pairs.each(lambda step: step._replace(b=ratio * step.b), steps)
        return updates, LoRAPlusState(mu, nu)

    return engine.lift(
        rule,
        LoRAPlusState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        fallback=fallback,
        adamw={"b1": b1, "b2": b2, "eps": eps},
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="lora_plus",
    )
