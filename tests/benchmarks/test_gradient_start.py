"""The memory benchmark of a gradient start."""

from benchmarks.gradient_start import measure


def test_a_start_takes_less_memory_than_the_dense_gradients():
    """The dense gradients are as large as the kernels; those of the factors are not."""
    found = measure(layers=3, width=256, rank=4, tokens=16)
    assert found["kernels"] == 4 * 3 * 256**2
    assert found["dense"] >= found["kernels"]
    assert found["start"] < found["kernels"] / 2
