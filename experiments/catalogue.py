"""Which studies there are, found without importing one: that takes JAX's time and the extra."""

import ast
import pkgutil
from pathlib import Path

from experiments import studies


def study_names() -> list[str]:
    """Returns the names of all studies."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(studies.__path__))


def study_title(name: str) -> str:
    """Returns the first line of a study's docstring; empty if it has none."""
    path = Path(studies.__path__[0]) / f"{name.replace('-', '_')}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]
