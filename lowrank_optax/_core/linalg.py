"""Algebra over the rank axis of LoRA factors: everything here is r×r or r-wide.

A factor's *side* is `"a"` for (..., in, r) or `"b"` for (..., r, out). One notation serves
both: `cross` contracts the long axis, `mix` multiplies the rank axis, so an equation
for `a` reads the same for `b`. Inputs are brought to float32 or better, and matrix products run
at full precision, which TPUs and GPUs do not do by default.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import meshes
from lowrank_optax._core.decompositions import inverse_cholesky

Side = Literal["a", "b"]

SIDES: tuple[Side, Side] = ("a", "b")
RANK_AXIS = {"a": -1, "b": -2}
LONG_AXIS = {"a": -2, "b": -1}

_CROSS = {"a": "...ni,...nj->...ij", "b": "...in,...jn->...ij"}
_MIX = {"a": "...ni,...ij->...nj", "b": "...in,...ij->...jn"}


def other(side: Side) -> Side:
    """Returns the side across from `side`.

    Example:
        >>> other("a"), other("b")
        ('b', 'a')
    """
    return "b" if side == "a" else "a"


def compute_dtype(*arrays: Any) -> jnp.dtype:
    """Returns the dtype of small algebra on the arrays: float32, or float64 where one has it.

    Example:
        >>> import jax.numpy as jnp
        >>> compute_dtype(jnp.ones(2, jnp.bfloat16)).name
        'float32'
    """
    return jnp.result_type(jnp.float32, *arrays)


def widened(x: jax.Array) -> jax.Array:
    """Brings an array to `compute_dtype`.

    Example:
        >>> import jax.numpy as jnp
        >>> widened(jnp.ones(2, jnp.bfloat16)).dtype.name
        'float32'
    """
    return x.astype(compute_dtype(x))


def cross(side: Side, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes the r×r product of two factors of one side: `xᵀy` for a, `x yᵀ` for b.

    The factors may be sharded along their long axis: the product is that of the whole factors.

    Args:
        side: which factor `x` and `y` are.
        x: (..., in, r) or (..., r, out).
        y: as `x`.

    Returns:
        (..., r, r) in `compute_dtype`.

    Example:
        >>> import jax.numpy as jnp
        >>> cross("b", jnp.ones((2, 5)), jnp.ones((2, 5))).tolist()
        [[5.0, 5.0], [5.0, 5.0]]
    """
    return meshes.sum_over_shards(side, _einsum(_CROSS[side], x, y))


def gram(side: Side, x: jax.Array) -> jax.Array:
    """Computes the Gram matrix of a factor over its rank axis, `cross` of it with itself.

    Example:
        >>> import jax.numpy as jnp
        >>> gram("a", jnp.eye(3, 2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return cross(side, x, x)


def dots(side: Side, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes the diagonal of `cross`: inner products of the rank components.

    Args:
        side: which factor `x` and `y` are.
        x: (..., in, r) or (..., r, out).
        y: as `x`.

    Returns:
        (..., 1, r) or (..., r, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> dots("a", jnp.ones((3, 2)), jnp.ones((3, 2))).tolist()
        [[3.0, 3.0]]
    """
    dtype = compute_dtype(x, y)
    products = x.astype(dtype) * y.astype(dtype)
    return meshes.sum_over_shards(side, jnp.sum(products, axis=LONG_AXIS[side], keepdims=True))


def mix(side: Side, x: jax.Array, m: jax.Array) -> jax.Array:
    """Mixes a factor's rank components: `x m` for a, `mᵀ x` for b.

    Args:
        side: which factor `x` is.
        x: (..., in, r) or (..., r, out).
        m: (..., r, r).

    Returns:
        As `x`, in `compute_dtype`.

    Example:
        >>> import jax.numpy as jnp
        >>> mix("a", jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [[4.0, 6.0]]
    """
    return _einsum(_MIX[side], x, m)


def weigh(side: Side, x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Multiplies a factor along its long axis: `D x` for a, `x D` for b.

    Args:
        side: which factor `x` is.
        x: (..., in, r) or (..., r, out).
        weights: the diagonal D, (..., in) or (..., out); None for the identity.

    Returns:
        As `x`, in `compute_dtype`.

    Example:
        >>> import jax.numpy as jnp
        >>> weigh("a", jnp.ones((2, 1)), jnp.array([3.0, 4.0])).tolist()
        [[3.0], [4.0]]
    """
    return widened(x) if weights is None else widened(x) * jnp.expand_dims(weights, RANK_AXIS[side])


def largest(side: Side, diagonal: jax.Array) -> jax.Array:
    """Finds the largest entry of a diagonal along a factor's long axis.

    Args:
        side: which factor the diagonal belongs to.
        diagonal: (..., in) or (..., out).

    Returns:
        (...).

    Example:
        >>> import jax.numpy as jnp
        >>> largest("a", jnp.array([1.0, 3.0])).item()
        3.0
    """
    return meshes.max_over_shards(side, jnp.max(diagonal, axis=-1))


def long_axis_size(side: Side, x: jax.Array) -> Any:
    """Counts the entries along a factor's long axis, those of other devices included.

    Example:
        >>> import jax.numpy as jnp
        >>> long_axis_size("b", jnp.ones((2, 5)))
        5
    """
    own: Any = x.shape[LONG_AXIS[side]]
    return meshes.sum_over_shards(side, own)


def apply_rounded(x: jax.Array, update: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes what `optax.apply_updates` makes of a parameter, rounding included.

    A compiler may keep the sum of two bfloat16 numbers in float32 where it is used at once; the
    stored parameter is rounded, and momentum must follow the stored one.

    Args:
        x: a parameter.
        update: its update.

    Returns:
        The new value, exactly representable in the dtype of `x`, and its difference to the old
        one in `compute_dtype`; in float32 or better the update itself, which rounding may differ
        from the difference.

    Example:
        >>> import jax.numpy as jnp
        >>> new, change = apply_rounded(jnp.ones(1, jnp.bfloat16), jnp.full(1, 1e-4, jnp.bfloat16))
        >>> new.tolist(), change.tolist()
        ([1.0], [0.0])
    """
    dtype = compute_dtype(x)
    new = optax.apply_updates(x, update)
    if x.dtype == dtype:
        return new, update.astype(dtype)  # not new - x, which would keep a copy of the old x
    info = jnp.finfo(x.dtype)
    new = jax.lax.reduce_precision(new, info.nexp, info.nmant)
    return new, new.astype(dtype) - x.astype(dtype)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes the matrix product `x y` of small matrices (..., r, r) at full precision.

    Example:
        >>> import jax.numpy as jnp
        >>> product(2.0 * jnp.eye(2), 3.0 * jnp.eye(2)).tolist()
        [[6.0, 0.0], [0.0, 6.0]]
    """
    return _einsum("...ik,...kj->...ij", x, y)


def dense(a: jax.Array, b: jax.Array) -> jax.Array:
    """Forms the matrix a b of the kernel's size, (..., in, out), at full precision.

    Raises:
        ValueError: inside `shard_map`, one mesh axis shards both factors. Devices would have the
            blocks of the diagonal alone.

    Example:
        >>> import jax.numpy as jnp
        >>> dense(jnp.ones((4, 1)), jnp.ones((1, 2))).shape
        (4, 2)
    """
    if both := set(meshes.sharded_axes_of("a")) & set(meshes.sharded_axes_of("b")):
        raise ValueError(
            f"the mesh axis {sorted(both)} shards the in axis of a and the out axis of b, and a"
            " method that forms a b cannot have both inside `shard_map`: shard one of them, use"
            " `jax.jit`, or a method that needs no dense matrices, such as `lora_pro_efficient`"
        )
    return product(a, b)


def transposed(matrix: jax.Array) -> jax.Array:
    """Exchanges the last two axes.

    Example:
        >>> transposed(jnp.ones((5, 2, 3))).shape
        (5, 3, 2)
    """
    return jnp.swapaxes(matrix, -1, -2)


def damped(matrix: jax.Array, damping: Any) -> jax.Array:
    """Adds damping to Gram matrices: `M + δ I`.

    Rounding makes a singular Gram matrix indefinite at the level of eps·trace. A δ below that level
    would be lost, and Cholesky would fail. So the damping is `max(δ, 4 eps trace(M))`: δ itself in
    float64 with any sensible value, and a floor in float32.

    Args:
        matrix: (..., r, r), symmetric positive semi-definite, float32 or float64.
        damping: δ, a positive scalar.

    Returns:
        (..., r, r).

    Example:
        >>> import jax.numpy as jnp
        >>> damped(jnp.zeros((2, 2)), 0.25).tolist()
        [[0.25, 0.0], [0.0, 0.25]]
    """
    floor = 4 * jnp.finfo(matrix.dtype).eps * trace(matrix)
    return matrix + jnp.maximum(jnp.asarray(damping, matrix.dtype), floor) * identity(matrix)


def damped_inverse(matrix: jax.Array, damping: Any) -> jax.Array:
    r"""Inverts damped Gram matrices by Cholesky: `(M + δ I)⁻¹`.

    Args:
        matrix: (..., r, r), symmetric positive semi-definite, float32 or float64.
        damping: δ, a positive scalar; rounding raises it as in `damped`.

    Returns:
        (..., r, r). Finite where the trace is, unless both δ and the matrix vanish; NaN for any
        other input.

    Example:
        >>> import jax.numpy as jnp
        >>> damped_inverse(jnp.zeros((2, 2)), 0.25).tolist()
        [[4.0, 0.0], [0.0, 4.0]]
    """
    root = inverse_cholesky(damped(matrix, damping))
    inverse = _einsum("...ki,...kj->...ij", root, root)
    return jnp.where(jnp.isfinite(trace(matrix)), inverse, jnp.nan)  # an infinite pivot gives 0


def orthonormalizer(matrix: jax.Array) -> jax.Array:
    r"""Computes the mixing that makes a factor orthonormal: `R⁻¹` of `x = Q R`, from its Gram.

    Args:
        matrix: `M = xᵀ x`, (..., r, r), float32 or float64.

    Returns:
        (..., r, r), upper triangular, so that `mix(side, x, R⁻¹)` has orthonormal rank components
        up to rounding of the size of the condition number of M. A component of zeros stays zero.

    Example:
        >>> import jax.numpy as jnp
        >>> orthonormalizer(4.0 * jnp.eye(2)).round(3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]

    Source: shifted Cholesky QR, arXiv 1809.11085.
    """
    info = jnp.finfo(matrix.dtype)
    floor = 4 * info.eps * trace(matrix) + info.tiny
    return transposed(inverse_cholesky(matrix + floor * identity(matrix)))


def trace(matrix: jax.Array) -> jax.Array:
    """Computes traces as matrices 1×1, which multiply a matrix each.

    Args:
        matrix: (..., r, r).

    Returns:
        (..., 1, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> trace(jnp.eye(3)).tolist()
        [[3.0]]
    """
    return jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None]


def identity(matrix: jax.Array) -> jax.Array:
    """Returns an identity matrix for each matrix (..., r, r), of its dtype.

    Example:
        >>> identity(jnp.ones((3, 2, 2))).shape
        (3, 2, 2)
    """
    return jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)


def _einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    dtype = compute_dtype(x, y)
    return jnp.einsum(
        subscripts,
        x.astype(dtype),
        y.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=meshes.contraction(subscripts, x, y),
    )
