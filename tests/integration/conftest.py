"""Integration tests name the libraries they need; a run can write down what it found.

`pytest tests/integration --record FILE` writes, for each test, its first line of documentation,
the versions it ran with, and how it ended. `python -m tests.integration.table` makes the table of
docs/integrations.md from these files.
"""

import importlib.metadata
import json
import platform
from pathlib import Path

import pytest

OURS = ("jax", "flax", "optax")


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="file to write what each test found, as JSON")


def version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def needed(item) -> list[str]:
    return [name for marker in item.iter_markers("libraries") for name in marker.args]


def pytest_runtest_setup(item):
    missing = [name for name in needed(item) if version(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: `make integration` has environments with them")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    records = item.config.stash.setdefault(RECORDS, {})
    if report.when == "call" or not report.passed:
        records[f"{item.path.name}::{item.name}"] = {
            "test": item.originalname,
            "file": item.path.name,
            "what": (item.obj.__doc__ or "").strip().split("\n")[0],
            "libraries": {name: version(name) for name in needed(item)},
            "outcome": report.outcome,
            "why": report.longrepr[-1] if report.skipped else "",
        }
    return report


RECORDS = pytest.StashKey[dict]()


def pytest_sessionfinish(session):
    path = session.config.getoption("--record", default=None)
    if path is None:
        return
    record = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in OURS},
        "tests": session.config.stash.get(RECORDS, {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
