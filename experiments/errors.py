"""The one error that the command line shows without a traceback."""

from typing import Any

INSTALL = "pip install '.[experiments]'"

EXTRA = {
    "PIL": "pillow",
    "datasets": "datasets",
    "gguf": "gguf",
    "huggingface_hub": "huggingface-hub",
    "matplotlib": "matplotlib",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "tokenizers": "tokenizers",
}
"""What a plain install lacks: the names to install by, by the names to import by."""


def first_problem(error: Any) -> str:
    """Writes the first of pydantic's problems as `where: what`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


class ExperimentError(Exception):
    """A mistake in what was asked for: the message says what is wrong and what to do."""


def explain_missing(error: ModuleNotFoundError) -> ExperimentError:
    """Turns the lack of a package of the extra `experiments` into what to do about it.

    Args:
        error: What an import raised; raised again if it is about any other module.
    """
    package = EXTRA.get((error.name or "").partition(".")[0])
    if package is None:
        raise error
    return ExperimentError(
        f"{package} is not installed; this command, in the checkout, installs all that "
        f"experiments need: {INSTALL}"
    )
