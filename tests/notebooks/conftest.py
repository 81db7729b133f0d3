"""Running the notebooks takes minutes: `pytest -m notebooks` or `-m slow`, nothing else."""

import importlib.util

import pytest

# Their own lane has what they need; the library's tests elsewhere need none of it.
needed = ("jupytext", "nbclient", "nbformat")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, needed)) else ["*.py"]


def pytest_collection_modifyitems(config, items):
    if any(marker in config.option.markexpr for marker in ("notebooks", "slow")):
        return
    skip = pytest.mark.skip(reason="`make notebooks-check` runs the notebooks")
    for item in items:
        if item.get_closest_marker("notebooks"):
            item.add_marker(skip)
