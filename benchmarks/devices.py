"""The devices of a benchmark: which ones JAX is to use, and where their programs are kept."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def jax_option(name: str) -> Any:
    """Returns one of JAX's options, by the environment or by what was set since."""
    return getattr(jax.config, name)


def use_accelerator() -> str:
    """Asks JAX for the accelerator and the CPU, unless the user has said what to ask for.

    Returns:
        What to do if either is missing; JAX takes the CPU for an accelerator without a word.
    """
    if not jax_option("jax_platforms") and importlib.util.find_spec("libtpu") is None:
        jax.config.update("jax_platforms", "cuda,cpu")
    try:
        if jax.devices()[0].platform != jax.devices("cpu")[0].platform:
            return ""
        found = "it finds the CPU alone"
    except RuntimeError as error:
        found = str(error)
    return (
        f"JAX must have an accelerator, and the CPU to compare with: {found}. Its plugin for NVIDIA"
        " is pip install 'jax[cuda13]', or 'jax[cuda12]' for older drivers. If JAX_PLATFORMS is"
        " set, then to cuda,cpu. --quick tries all on a CPU."
    )


@contextlib.contextmanager
def programs_kept(keep: bool) -> Iterator[None]:
    """Keeps compiled programs on the disk, if so wanted and the user does not keep them anyway."""
    if not keep or jax_option("jax_compilation_cache_dir"):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # JAX looks for the folder once
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()
