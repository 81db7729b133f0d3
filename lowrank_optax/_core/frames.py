r"""Frames: orthonormal bases of the factors' spaces, through which SDS-LoRA's gradients flow.

A framed adapter is `ΔK = s (a F + E b − w E F)`. The frames E (`f_in`) and F (`f_out`) are
constants for differentiation, so its gradients are `s G Fᵀ` and `s Eᵀ G`. Ordinary LoRA is the case
in which the frames are the factors and w is 1.

Frames are made by Cholesky QR, which needs only r×r algebra beside products, so the long axis may
be sharded. Four shifted passes reach condition numbers up to one over
the rounding unit of the factor's dtype; a step of Newton-Schulz removes the bias of the shift.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.decompositions import svd
from lowrank_optax._core.linalg import (
    Side,
    compute_dtype,
    cross,
    dots,
    gram,
    identity,
    mix,
    orthonormalizer,
    product,
    transposed,
)
from lowrank_optax._core.nodes import AxisName, LongAxes, LoRAPair, both, matmul, register_node
from lowrank_optax._core.verbs import Verbs

_Two = tuple[jax.Array, jax.Array]


@register_node
class FramedPair(NamedTuple):
    r"""A pair whose gradients flow through frames, made by `frame`.

    $$\Delta K = s\,(a\,F + E\,b - w\,E\,F)$$

    The frames E and F and the number w are constants for differentiation. The optimizer moves them
    by ordinary updates.

    Args:
        a: the input-side factor, (..., in, r).
        b: the output-side factor, (..., r, out).
        f_in: E, the input-side frame, (..., in, r): orthonormal columns; `a` itself in the warm-up.
        f_out: F, the output-side frame, (..., r, out): orthonormal rows; `b` itself in the warm-up.
        warm: w, (...): 1 in the warm-up, which makes this ordinary LoRA, 0 after it. None for a
            pair without a warm-up.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import frame
        >>> node = frame(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))))
        >>> node.f_in.shape, node.f_out.shape, node.warm.item()
        ((6, 2), (2, 4), 1.0)

    Source: SDS-LoRA, arXiv 2606.16454.
    """

    a: Any
    b: Any
    f_in: Any
    f_out: Any
    warm: Any = None

    @staticmethod
    def long_axes() -> LongAxes:
        """Returns which axes of the frames are sharded like the kernel's."""
        return {"f_in": ("in", -2), "f_out": ("out", -1)}

    @staticmethod
    def made_by() -> str:
        """Returns how to get this kind of pair."""
        return (
            "give the pair frames: `nn.LoRAConfig(..., extra=nn.Frames())` in `nn.add_lora` or the"
            " Linen modules, `lowrank_optax.frame(pair)` in a plain tree"
        )

    def apply(self, x: jax.Array, scale: Any, axis_name: AxisName = None) -> jax.Array:
        """Applies the pair; gradients reach `a` and `b` through the frames alone."""
        constant = jax.lax.stop_gradient(self)
        a, b = constant._replace(a=self.a, b=self.b).plain()
        narrow = _into_framed(x, a.astype(x.dtype))
        return _out_of_framed((scale * narrow).astype(x.dtype), b.astype(x.dtype))

    def plain(self) -> LoRAPair:
        """Writes the pair as the ordinary pair of rank 2r that it is: `[a, E] · [F; b − w F]`."""
        b = self.b if self.warm is None else self.b - self.warm[..., None, None] * self.f_out
        dtype = compute_dtype(self.a, self.f_in)
        return LoRAPair(
            jnp.concatenate([self.a.astype(dtype), self.f_in], axis=-1),
            jnp.concatenate([self.f_out, b.astype(dtype)], axis=-2),
        )


# A framed layer is a pair of rank 2r, half of it constant. Its own derivatives form no gradients of
# frames, which data parallelism would otherwise sum over devices.


@jax.custom_jvp
def _into_framed(x: jax.Array, columns: jax.Array) -> jax.Array:
    """`x [a, E]`, where E is constant: only the gradient of a is formed."""
    return matmul(x, columns)


@_into_framed.defjvp
def _into_framed_jvp(primals: _Two, tangents: _Two) -> _Two:
    (x, columns), (dx, d_columns) = primals, tangents
    rank = columns.shape[-1] // 2
    from_a = matmul(x, d_columns[..., :rank])
    padding = [(0, 0)] * (from_a.ndim - 1) + [(0, rank)]
    return matmul(x, columns), matmul(dx, columns) + jnp.pad(from_a, padding)


@jax.custom_jvp
def _out_of_framed(narrow: jax.Array, rows: jax.Array) -> jax.Array:
    """`narrow [F; b]`, where F is constant: only the gradient of b is formed."""
    return matmul(narrow, rows)


@_out_of_framed.defjvp
def _out_of_framed_jvp(primals: _Two, tangents: _Two) -> _Two:
    (narrow, rows), (d_narrow, d_rows) = primals, tangents
    rank = rows.shape[-2] // 2
    from_b = matmul(narrow[..., rank:], d_rows[..., rank:, :])
    return matmul(narrow, rows), matmul(d_narrow, rows) + from_b


def frame(pair: LoRAPair, key: jax.Array | None = None) -> FramedPair:
    """Adds frames to a pair.

    Args:
        pair: the factors, (..., in, r) and (..., r, out).
        key: None for SDS-LoRA's warm-up, whose frames are the factors. A random key for a start
            without warm-up: random orthonormal frames and factors of zero, whatever they were.

    Returns:
        The node, to stand in the parameter tree where the pair stood; frames in float32 or better.

    Raises:
        ValueError: a start without warm-up with a rank above min(in, out).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> node = frame(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> jnp.allclose(node.f_in.T @ node.f_in, jnp.eye(2), atol=1e-5).item(), node.a.sum().item()
        (True, 0.0)

    Source: SDS-LoRA, arXiv 2606.16454, for the warm-up; the other start is ours.
    """
    dtype = compute_dtype(pair.a, pair.b)
    *batch, n_in, rank = pair.a.shape
    if key is None:
        # Copies, for a buffer that two leaves share cannot be donated.
        f_in, f_out = (jnp.copy(x).astype(dtype) for x in (pair.a, pair.b))
        return FramedPair(pair.a, pair.b, f_in, f_out, jnp.ones(batch, dtype))
    n_out = pair.b.shape[-1]
    if rank > min(n_in, n_out):
        raise ValueError(
            f"a pair of rank {rank} has no orthonormal frames of {n_in} and {n_out} entries; lower"
            " its rank."
        )
    key_in, key_out = jax.random.split(key)
    draws = LoRAPair(
        jax.random.normal(key_in, (*batch, n_in, rank), dtype),
        jax.random.normal(key_out, (*batch, rank, n_out), dtype),
    )
    [(f_in, f_out)] = orthonormalize(Verbs([{}]), [draws])
    return FramedPair(jnp.zeros_like(pair.a), jnp.zeros_like(pair.b), f_in, f_out)


def orthonormalize(pairs: Verbs, factors: Sequence[LoRAPair]) -> list[LoRAPair]:
    """Computes Q of the QR decompositions of factors along their long axes.

    Args:
        pairs: the verbs.
        factors: pairs, (..., in, r) and (..., r, out).

    Returns:
        Pairs of the same shapes with orthonormal rank components that span what each factor spans,
        the diagonal of R positive. Components of zeros stay zero.

    Example:
        >>> import jax.numpy as jnp
        >>> pair = LoRAPair(jnp.array([[3.0, 1.0], [4.0, 1.0]]), jnp.eye(2))
        >>> [q] = orthonormalize(Verbs([{}]), [pair])
        >>> jnp.allclose(q.a, jnp.array([[0.6, 0.8], [0.8, -0.6]]), atol=1e-5).item()
        True
    """
    return _orthonormalize(pairs, factors, rounds=4)


def _orthonormalize(pairs: Verbs, factors: Sequence[LoRAPair], rounds: int) -> list[LoRAPair]:
    grams = lambda factors: pairs.each(lambda pair: both(gram, pair), factors)
    mixed = lambda factors, by: pairs.each(lambda pair, m: both(mix, pair, m), factors, by)
    for _ in range(rounds):
        factors = mixed(factors, pairs.together(orthonormalizer, grams(factors)))
    newton_schulz = lambda m: 1.5 * identity(m) - 0.5 * m
    return mixed(factors, jax.tree.map(newton_schulz, grams(factors)))


def decompose(
    pairs: Verbs, factors: Sequence[LoRAPair], scales: Sequence[Any]
) -> tuple[list[LoRAPair], list[jax.Array]]:
    """Computes the singular value decompositions of `s a b` without forming them.

    Args:
        pairs: the verbs.
        factors: pairs, (..., in, r) and (..., r, out).
        scales: s of each.

    Returns:
        The singular vectors as pairs (U, Vᵀ), and the singular values Σ, (..., r).

    Example:
        >>> import jax.numpy as jnp
        >>> _, [values] = decompose(Verbs([{}]), [LoRAPair(jnp.eye(3, 2), jnp.eye(2))], [5.0])
        >>> values.round(3).tolist()
        [5.0, 5.0]
    """

    def core(q: LoRAPair, pair: LoRAPair, scale: Any) -> jax.Array:
        return scale * product(cross("a", q.a, pair.a), cross("b", pair.b, q.b))

    frames = orthonormalize(pairs, factors)
    left, values, right = pairs.together(svd, pairs.each(core, frames, factors, scales))
    turned = lambda q, u, v: both(mix, q, LoRAPair(u, transposed(v)))
    return pairs.each(turned, frames, left, right), values


def renewed(pairs: Verbs, factors: Sequence[LoRAPair], old: Sequence[FramedPair]) -> list[LoRAPair]:
    """Computes the frames of factors, each component with the sign that it has in the old frames.

    Where a factor has a component of zeros, or one in the space of those before it, the old frame's
    takes its place, orthogonal to the others as far as it is not in their space.

    Args:
        pairs: the verbs.
        factors: pairs, (..., in, r) and (..., r, out).
        old: framed pairs.

    Returns:
        The frames as pairs (E, F).

    Example:
        >>> import jax.numpy as jnp
        >>> pair = LoRAPair(-2.0 * jnp.eye(3, 2), jnp.eye(2))
        >>> [new] = renewed(Verbs([{}]), [pair], [FramedPair(*pair, jnp.eye(3, 2), jnp.eye(2))])
        >>> jnp.allclose(new.a, jnp.eye(3, 2), atol=1e-5).item()
        True
    """

    def signed(side: Side, new: jax.Array, old: jax.Array) -> jax.Array:
        same_sign = dots(side, new, old) >= 0
        is_empty = dots(side, new, new) < 0.5  # of a component of zeros
        return jnp.where(is_empty, old, jnp.where(same_sign, new, -new))

    old_frames = pairs.each(lambda pair: LoRAPair(pair.f_in, pair.f_out), old)
    new_frames = orthonormalize(pairs, factors)
    frames = pairs.each(lambda new, old: both(signed, new, old), new_frames, old_frames)
    return _orthonormalize(pairs, frames, rounds=1)


def seen_from(frame: LoRAPair, pair: FramedPair) -> LoRAPair:
    r"""Rewrites the factors of a framed pair for new frames such that ΔK stays.

    With new frames E, F and D = ΔK / s before,

    $$a = (1 - E E^\top) D F^\top + \tfrac12 E (E^\top D F^\top) \qquad
      b = E^\top D (1 - F^\top F) + \tfrac12 (E^\top D F^\top) F$$

    which is exact, because E spans the old a and F the old b.

    Args:
        frame: the new frames (E, F), of the pair's factors.
        pair: the pair with its old frames.

    Returns:
        The new factors.

    Example:
        >>> import jax.numpy as jnp
        >>> pair = FramedPair(jnp.eye(3, 2), jnp.eye(2), jnp.eye(3, 2), jnp.eye(2))
        >>> seen_from(LoRAPair(jnp.eye(3, 2), jnp.eye(2)), pair).a.tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    in_a, in_e = cross("a", frame.a, pair.a), cross("a", frame.a, pair.f_in)  # Eᵀ a, Eᵀ E₀
    out_f, out_b = cross("b", pair.f_out, frame.b), cross("b", pair.b, frame.b)  # F₀ Fᵀ, b Fᵀ
    core = product(in_a, out_f) + product(in_e, out_b)  # Eᵀ D Fᵀ
    columns = mix("a", pair.a, out_f) + mix("a", pair.f_in, out_b)  # D Fᵀ
    rows = mix("b", pair.f_out, transposed(in_a)) + mix("b", pair.b, transposed(in_e))  # Eᵀ D
    return LoRAPair(
        columns - mix("a", frame.a, core / 2), rows - mix("b", frame.b, transposed(core) / 2)
    )
