r"""LoRA-SOAP: Adam in the eigenbasis of each factor's own second moment over the rank axis.

SOAP (arXiv 2409.11321) runs Adam in the eigenbases of Shampoo's two matrices. A LoRA factor has one
short axis, the rank, and SOAP is brought to it on that side alone. Nobody has published this for
LoRA, as far as we know. With g the gradient of one factor, seen as (rows, r):

    L ← β₂ L + (1 − β₂) gᵀ g                   r×r
    Q = the eigenvectors of L                   r×r, orthogonal
    m ← β₁ m + (1 − β₁) g
    v ← β₂ v + (1 − β₂) (g Q)²
    x ← x − η ((m̂ Q) / (√v̂ + ε) Qᵀ + λ x)        m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ)

Neither factor sees the other one, and the forward scale s does not enter, but for ε. As in SOAP,
m is kept in the original basis, where it needs no transport, and v in the basis of its time: where
Q turns, v is not turned with it.

Q is computed by `eigh` in the first three updates: where b starts at zero, a has no gradient before
b has moved, which it does in the second one if a warm-up starts at the rate 0. After that Q follows
L by one step of a power iteration, the Q of a QR decomposition of L Q. A sign of a column of Q
cancels in x.

Properties, tested in `tests/test_lora_soap.py`: with r = 1 it is AdamW; a rotation of the rank
axis, (x Q₀) for an orthogonal Q₀, rotates every step alike, which Adam's does not.

Deviations from SOAP's paper and released code (nikhilvyas/SOAP), besides that there is no Q on
the long axis:

- Q comes before the step that it is used in, so that the first step is one; the released code only
  makes Q in the first update, and uses a new Q from the next step on
  (`test_trajectory_equals_a_dense_one`).
- ε comes after the bias correction of v, and decay shrinks the old x, as in optax's AdamW
  (`test_of_rank_one_it_is_adamw`). In the released code ε comes before, and decay after the move.
- Columns are not sorted again; the power iteration keeps the largest eigenvalues in front.
- `every` is 1, where the released code has 10 for its large matrices; the betas are Adam's, where
  it has 0.95 for both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import engine
from lowrank_optax._core.decompositions import qr
from lowrank_optax.engine import adam_direction, both, gram, mix, product, transposed

_EXACT = 3  # how many updates compute the basis by `eigh`


class LoRASOAPState(NamedTuple):
    """State of `lora_soap`, float32 or better.

    Args:
        mu: first moment, a tree shaped like the parameters, in their own basis.
        nu: second moment of the rotated gradients, likewise shaped.
        gram: L, a list of pairs of (..., r, r).
        basis: Q, likewise.
    """

    mu: Any
    nu: Any
    gram: engine.Small
    basis: engine.Small


def lora_soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps: Any = 1e-8,
    every: Any = 1,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    specs: Any = None,
    allow_no_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Optimizes LoRA pairs by SOAP on the rank axis, and all other leaves by a fallback.

    $$x \leftarrow x - \eta\,\Big(\frac{\hat m\,Q}{\sqrt{\hat v} + \epsilon}\,Q^\top
      + \lambda x\Big)$$

    with Adam's second moment v in the basis Q of eigenvectors of the averaged $g^\top g$.

    Args:
        learning_rate: $\eta$, positive, or a schedule; of the order of AdamW's.
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moments, in [0, 1).
        eps: $\epsilon$, added to the root of the second moment, positive.
        every: updates from one basis to the next, SOAP's `precondition_frequency`.
        weight_decay: $\lambda$, decoupled.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one. Under
            `optax.inject_hyperparams` name it in `static_args`.
        fallback: transformation of unpaired leaves; AdamW by default.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        allow_no_pairs: whether parameters without pairs are taken; an error by default.

    Returns:
        The transformation. State: `LoRASOAPState`, two copies of the factors and four r×r matrices
        a pair.

    Raises:
        ValueError: an argument out of range; from `init` and `update`, pairs that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, lora_soap
        >>> params = LoRAPair(jnp.array([[3.0, 3.0], [1.0, -1.0]]), jnp.eye(2, 3))
        >>> tx = lora_soap(0.1)
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> [f"{value:.2f}" for value in updates.a.ravel()]  # a step along each eigenvector
        ['-0.07', '-0.07', '-0.07', '0.07']

    Source: SOAP, arXiv 2409.11321; that it is applied to LoRA's rank axis is ours.
    """
    engine.check_decay("b1", b1)
    engine.check_decay("b2", b2)
    engine.check_positive("eps", eps)
    engine.check_whole("every", every, least=1)

    def rule(
        pairs: engine.Pairs, grads: Any, params: Any, state: LoRASOAPState
    ) -> tuple[Any, LoRASOAPState]:
        grams = pairs.each(lambda g: both(gram, g), grads)
        grams = optax.tree.update_moment(grams, state.gram, b2, 1)
        followed = lambda: pairs.together(_power_step, grams, state.basis)
        branches = [lambda: pairs.together(_eigenvectors, grams), followed, lambda: state.basis]
        is_due = pairs.count % jnp.asarray(every, pairs.count.dtype) == 0
        new, follow, keep = range(3)
        turn = jnp.where(pairs.count < _EXACT, new, jnp.where(is_due, follow, keep))
        basis = pairs.switch(turn, branches)

        turned = lambda x: pairs.each(lambda x, q: both(mix, x, q), x, basis)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(turned(grads), state.nu, b2, 2)
        directions = adam_direction(turned(mu), nu, pairs.count + 1, b1=b1, b2=b2, eps=eps)
        back = jax.tree.map(transposed, basis)
        directions = pairs.each(lambda d, q: both(mix, d, q), directions, back)
        return pairs.descend(directions, params), LoRASOAPState(mu, nu, grams, basis)

    return engine.lift(
        rule,
        LoRASOAPState,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        fallback=fallback,
        adamw={"b1": b1, "b2": b2, "eps": eps},
        specs=specs,
        allow_no_pairs=allow_no_pairs,
        name="lora_soap",
    )


def _eigenvectors(matrix: jax.Array) -> jax.Array:
    """Returns the eigenvectors as columns, largest values first."""
    return engine.eigh(matrix)[1][..., ::-1]


def _power_step(matrix: jax.Array, basis: jax.Array) -> jax.Array:
    return qr(product(matrix, basis))[0]
