"""Ways to train in other libraries, one module a library, imported when it is first named."""

import importlib
import importlib.util
from typing import Any


def __getattr__(name: str) -> Any:
    """Imports a module of this package, so that `import lowrank_optax` imports no other library."""
    module = f"{__name__}.{name}"
    if importlib.util.find_spec(module) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(module)
