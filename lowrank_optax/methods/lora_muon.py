r"""Muon on each LoRA factor: momentum whose nonzero singular values are all made equal.

For each factor x of a pair, with n the length of its long axis (in for a, out for b):

    m ← β m + (1 − β) ∇x        h = β m + (1 − β) ∇x        (Nesterov)
    x ← x − η (c msign(h) + λ x)        c = 0.2 √n

msign(h) = U Vᵀ of h = U Σ Vᵀ over the nonzero singular values, computed as h (hᵀ h)^(−½) for a and
(h hᵀ)^(−½) h for b: r×r algebra, so a long axis may be sharded. The forward scale s does not enter,
for msign divides the size of the gradient out.

Source: Muon (Keller Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/), applied to
LoRA factors. Neither factor's step sees the other factor. The LoRA-Muon of arXiv 2606.12921 is
another method: msign(h R) R with R the inverse root of the other factor's Gram matrix; that form is
near `polora(partner="gram")`.

The length c is that of Moonlight (arXiv 2502.16982, `consistent_rms=0.2` of `optax.contrib.muon`).
The entries of a step then have the root mean square 0.2 η at any n and r, about the same as
AdamW's, so one learning rate suits a, b and the other leaves, which AdamW trains. The alternatives
favor a side by its shape. With c = 1 the entries are 1/√n, smaller for the longer factor. Muon's
own √(max(1, cols/rows)), meant for maps between wide layers, is 1 for a and √(out/r) for b.

Deviations, with the tests in `tests/test_lora_muon.py`:

- msign is exact, where Muon takes five Newton–Schulz steps that leave singular values between 0.7
  and 1.2 (`test_updates_agree_with_optax_muon`). Singular values below the rounding level of the
  Gram matrix, √(10 ε) of the largest (1.1e-3 in float32), count as zero, so that rounding does not
  become a full step (`test_singular_values_of_zero_stay_zero`).
- The momentum is Muon's; optax also corrects the bias of m and ∇x in h, which changes only their
  ratio in early steps (same test as for msign).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from lowrank_optax import engine
from lowrank_optax.engine import Side, both, gram, long_axis_size, mix, pseudo_inverse_root


class LoRAMuonState(NamedTuple):
    """State of `lora_muon`.

    Args:
        mu: momentum, a tree shaped like the parameters, float32 or better.
    """

    mu: Any


def lora_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.95,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by Muon on each factor, and all other leaves by a fallback.

    $$a \leftarrow a - 0.2\,\eta\,\sqrt{\text{in}}\;\mathrm{msign}(h_a) \qquad
      b \leftarrow b - 0.2\,\eta\,\sqrt{\text{out}}\;\mathrm{msign}(h_b)$$

    with Nesterov momenta h and $\mathrm{msign}(U \Sigma V^\top) = U V^\top$. The entries of a step
    have the root mean square $0.2\,\eta$. Steps do not shrink near the optimum: use a schedule that
    decays.

    Args:
        learning_rate: $\eta$, positive, or a schedule; of the order of AdamW's.
        b1: $\beta$, decay of the momentum, in [0, 1); 0.95 is Muon's.
        weight_decay: $\lambda$, decoupled.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW at the same rate by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation. State: `LoRAMuonState`, one copy of the factors.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, lora_muon
        >>> params = LoRAPair(jnp.eye(4, 2), jnp.array([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> tx = lora_muon(0.5)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> [f"{value:.2f}" for value in jnp.linalg.svd(updates.a)[1]]  # 0.2 · 0.5 · √4
        ['0.20', '0.20']

    Source: Muon (Keller Jordan et al., 2024); the length is that of arXiv 2502.16982.
    """
    engine.check_decay("b1", b1)

    def rule(pairs: engine.Pairs, grads: Any, params: Any, state: LoRAMuonState) -> tuple[Any, Any]:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nesterov = optax.tree.update_moment(grads, mu, b1, 1)
        grams = pairs.each(lambda h: both(gram, h), nesterov)
        roots = pairs.together(pseudo_inverse_root, grams)
        directions = pairs.each(lambda h, root: both(_direction, h, root), nesterov, roots)
        return pairs.descend(directions, params), LoRAMuonState(mu)

    return engine.lift(
        rule,
        LoRAMuonState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        fallback=fallback,
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="lora_muon",
    )


def _direction(side: Side, h: jax.Array, root: jax.Array) -> jax.Array:
    """Computes 0.2 √n msign(h)."""
    return mix(side, h, 0.2 * long_axis_size(side, h) ** 0.5 * root)
