"""Settings and fixtures of all tests and doctests."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# All before a backend starts. Eight devices, so that no test of several can be skipped. To compile
# programs in one part saves a tenth of the processor's time, and without the fusion emitters the
# tests take two thirds of it (JAX 0.11 has no such flag).
jax.config.update("jax_num_cpu_devices", 8)
flags = ["--xla_cpu_parallel_codegen_split_count=1"]
flags += ["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

# Before Keras is imported, which otherwise runs on TensorFlow. Each module of `integrations` bears
# the name of the library that it imports, so its examples run where that library is installed.
os.environ.setdefault("KERAS_BACKEND", "jax")
collect_ignore = [
    str(file)
    for file in Path(__file__).parent.glob("lowrank_optax/integrations/[!_]*.py")
    if importlib.util.find_spec(file.stem) is None
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips slow tests, unless `make test-slow` asks for them."""
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="`make test-slow` runs it; a shorter form ran"))


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
