"""Settings and fixtures of all tests and doctests."""

from collections.abc import Iterator

import jax
import pytest

# Before any backend starts, so that no test of several devices can be skipped.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="session")
def quick_compilation() -> Iterator[None]:
    """The tests compile many tiny programs: compiling them fast beats running them fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Forgets each module's programs: a process may hold only so many, then compiling aborts."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs a test in double precision."""
    with jax.enable_x64(True):
        yield
