"""Settings for the tests of this folder."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """These tests compile many tiny programs: compiling them fast beats running them fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
