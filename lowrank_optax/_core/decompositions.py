"""Decompositions of small matrices, safe where several run at once.

On TPUs a singular value decomposition or eigenvalues are slow: methods do without where they can.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _one_at_a_time_on_cpu(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Makes a batched decomposition safe where several of them run at once.

    On CPU a batched LAPACK call splits its batch over the thread pool and waits there: as many
    calls at once as there are threads wait for each other for ever (jaxlib 0.10). Single matrices
    never wait.
    """

    def one_at_a_time(matrix: jax.Array) -> Any:
        results = jax.lax.map(function, matrix.reshape(-1, *matrix.shape[-2:]))
        return jax.tree.map(lambda x: x.reshape(*matrix.shape[:-2], *x.shape[1:]), results)

    @jax.jit
    @functools.wraps(function)
    def everywhere(matrix: jax.Array) -> Any:
        return jax.lax.platform_dependent(matrix, cpu=one_at_a_time, default=function)

    return everywhere


def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes singular value decompositions `U Σ Vᵀ`.

    Args:
        matrix: (..., m, n), float32 or float64.

    Returns:
        U (..., m, k), Σ (..., k) and Vᵀ (..., k, n) with k = min(m, n), largest values first.

    Example:
        >>> import jax.numpy as jnp
        >>> svd(jnp.diag(jnp.array([1.0, 3.0])))[1].tolist()
        [3.0, 1.0]
    """
    return _svd(matrix)


def qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes reduced QR decompositions by reflections, for matrices of any rank.

    Args:
        matrix: (..., m, n), float32 or float64.

    Returns:
        Q (..., m, k) and R (..., k, n) with k = min(m, n).

    Example:
        >>> import jax.numpy as jnp
        >>> [part.shape for part in qr(jnp.ones((5, 2)))]
        [(5, 2), (2, 2)]
    """
    return _qr(matrix)


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes eigenvalues and eigenvectors of symmetric matrices.

    Args:
        matrix: (..., r, r), float32 or float64.

    Returns:
        The values (..., r), smallest first, and the vectors (..., r, r), as columns.

    Example:
        >>> import jax.numpy as jnp
        >>> eigh(jnp.diag(jnp.array([3.0, 1.0])))[0].tolist()
        [1.0, 3.0]
    """
    return _eigh(matrix)


def inverse_cholesky(matrix: jax.Array) -> jax.Array:
    """Inverts the Cholesky factor of positive definite matrices.

    Args:
        matrix: (..., r, r), symmetric, float32 or float64.

    Returns:
        (..., r, r), lower triangular; NaN where a matrix is not positive definite.

    Example:
        >>> inverse_cholesky(4.0 * jnp.eye(1)).tolist()
        [[0.5]]
    """
    return _inverse_cholesky(matrix)


@_one_at_a_time_on_cpu
def _svd(matrix: jax.Array) -> Any:
    return tuple(jnp.linalg.svd(matrix, full_matrices=False))


@_one_at_a_time_on_cpu
def _qr(matrix: jax.Array) -> Any:
    return tuple(jnp.linalg.qr(matrix))


@_one_at_a_time_on_cpu
def _eigh(matrix: jax.Array) -> Any:
    return tuple(jnp.linalg.eigh(matrix))


@_one_at_a_time_on_cpu
def _inverse_cholesky(matrix: jax.Array) -> jax.Array:
    factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    return jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
