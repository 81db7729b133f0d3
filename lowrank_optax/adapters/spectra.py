"""What an adapter has learned, as numbers: spectra, conditions, angles."""

from typing import Any, NamedTuple

import numpy as np

from lowrank_optax.adapters.pairs import plain_pair


class Spectrum(NamedTuple):
    """The singular values of one pair's ΔK, and how well its factors are conditioned.

    Args:
        n_in: inputs of the layer.
        n_out: its outputs.
        rank: r.
        scale: the forward scale s.
        values: singular values of s a b, falling, (min(r, in, out),).
        condition_a: condition number of aᵀ a, infinite where it is singular.
        condition_b: the same of b bᵀ.
    """

    n_in: int
    n_out: int
    rank: int
    scale: float
    values: np.ndarray
    condition_a: float
    condition_b: float

    @property
    def norm(self) -> float:
        """The spectral norm of ΔK."""
        return float(self.values[0])

    @property
    def frobenius(self) -> float:
        """The Frobenius norm of ΔK."""
        return float(np.linalg.norm(self.values))

    @property
    def effective_rank(self) -> float:
        """The exponential of the values' entropy, as of `diagnostics.effective_rank`."""
        shares = self.values[self.values > 0] / max(self.values.sum(), np.finfo(float).tiny)
        return float(np.exp(-np.sum(shares * np.log(shares)))) if len(shares) else 0.0


def spectrum(node: Any, scale: float) -> Spectrum:
    """Computes the spectrum of a pair from its factors' Gram matrices, in float64.

    Singular values below 1e-8 of the first are rounding.

    Args:
        node: a pair of any kind, (in, r) and (r, out).
        scale: s.

    Returns:
        The spectrum of `plain_pair(node)`, of a framed pair the one of rank 2r.

    Raises:
        ValueError: a stack of pairs.

    Example:
        >>> from lowrank_optax import LoRAPair
        >>> found = spectrum(LoRAPair(np.eye(4, 2), np.diag([3.0, 1.0])), 2.0)
        >>> found.values.tolist(), found.condition_b
        ([6.0, 2.0], 9.0)
    """
    tall_a, tall_b = _tall(node)
    gram_a, gram_b = (x.T @ x for x in (tall_a, tall_b))
    of_a, turn = np.linalg.eigh(gram_a)
    root = np.sqrt(np.maximum(of_a, 0))[:, None] * turn.T
    squares = np.linalg.eigvalsh(root @ gram_b @ root.T)[::-1]
    of_b = np.linalg.eigvalsh(gram_b)
    (n_in, rank), n_out = tall_a.shape, len(tall_b)
    values = scale * np.sqrt(np.maximum(squares, 0))[: min(rank, n_in, n_out)]
    return Spectrum(n_in, n_out, rank, scale, values, _condition(of_a), _condition(of_b))


def principal_angles(one: Any, two: Any) -> tuple[np.ndarray, np.ndarray]:
    """Computes the principal angles between the spaces of two pairs of one layer.

    Args:
        one: a pair of any kind, (in, r) and (r, out).
        two: another, of any rank.

    Returns:
        The angles between the columns of their a, and between the rows of their b, in degrees,
        rising; as many as the smaller space has dimensions.

    Raises:
        ValueError: a stack of pairs.

    Example:
        >>> from lowrank_optax import LoRAPair
        >>> x, y = LoRAPair(np.eye(3, 1), np.eye(1, 2)), LoRAPair(np.ones((3, 1)), np.eye(1, 2))
        >>> of_a, of_b = principal_angles(x, y)
        >>> of_a.round(1).tolist(), of_b.tolist()
        ([54.7], [0.0])
    """

    def between(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        cosines = np.linalg.svd(_basis(x).T @ _basis(y), compute_uv=False)
        return np.asarray(np.degrees(np.arccos(np.clip(cosines, 0, 1))))

    of_a, of_b = (between(x, y) for x, y in zip(_tall(one), _tall(two), strict=True))
    return of_a, of_b


def _tall(node: Any) -> tuple[np.ndarray, np.ndarray]:
    """The factors of one pair with the rank last, in float64."""
    pair = plain_pair(node)
    if np.ndim(pair.a) != 2:
        raise ValueError(
            f"a pair of one layer has two axes, and a here is {tuple(pair.a.shape)}; take one entry"
            " of the stack"
        )
    return np.asarray(pair.a, np.float64), np.asarray(pair.b, np.float64).T


def _basis(x: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns."""
    left, values, _ = np.linalg.svd(x, full_matrices=False)
    floor = values.max(initial=0) * max(x.shape) * np.finfo(np.float32).eps
    return np.asarray(left[:, values > floor])


def _condition(values: np.ndarray) -> float:
    """The condition number of a Gram matrix from its eigenvalues, smallest first."""
    noise = values[-1] * len(values) * np.finfo(np.float64).eps
    return float(values[-1] / values[0]) if values[0] > noise else float("inf")
