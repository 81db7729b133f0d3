"""The benchmark of inverse square roots."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.inverse_roots import (
    SPECTRA,
    WAYS,
    exact_root,
    gram_matrices,
    largest_error,
    measure,
)
from benchmarks.record import QUIET


@pytest.mark.parametrize("kind", ["partner", "polar"])
@pytest.mark.parametrize("way", WAYS)
def test_both_ways_find_the_root_of_well_conditioned_matrices(way, kind):
    gram = gram_matrices(SPECTRA["even"](8), 3)
    root = exact_root(gram, kind)
    squared = root @ root @ (gram + (kind == "partner") * 1e-4 * np.eye(8))
    assert np.allclose(squared, np.eye(8), atol=1e-10)
    assert largest_error(WAYS[way](jnp.float32(gram), kind), root) < 1e-5


def test_products_do_not_find_the_polar_root_of_a_singular_matrix_and_eigenvalues_do():
    row = measure("polar", 4, 1, QUIET)
    assert row["eigh"]["error"]["singular"] < 1e-5
    assert row["Newton–Schulz"]["error"]["singular"] > 1
    assert row["eigh"]["ratio"] == 1
