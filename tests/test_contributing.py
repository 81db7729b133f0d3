"""The skeleton of a method in CONTRIBUTING.md is a method."""

import pathlib
import re
import sys
import types

import pytest

import tests.conformance.test_conformance as conformance
from tests.conformance.methods import Method
from tests.test_house import CORE

GUIDE = pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md"
CHECKS = [
    conformance.test_loss_falls_and_every_leaf_moves,
    conformance.test_schedules_are_applied_without_recompilation,
    conformance.test_bfloat16_parameters_have_float32_state,
    conformance.test_float64_stays_float64,
    conformance.test_state_bytes,
    conformance.test_export_for_accelerators,
]


@pytest.fixture
def skeleton(monkeypatch):
    """The row of the skeleton, in the table of methods for as long as a test runs."""
    [source] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    module = types.ModuleType("column_scaled")
    monkeypatch.setitem(sys.modules, "column_scaled", module)
    exec(compile(source, GUIDE, "exec"), module.__dict__)
    row = Method("column_scaled", module.column_scaled, {}, 2)
    monkeypatch.setattr(conformance, "METHODS", [row])
    conformance._by_name.cache_clear()
    return row


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_skeleton_passes(check, skeleton):
    check(skeleton)


def test_every_place_that_the_guide_names_exists():
    guide = GUIDE.read_text()
    for name in re.findall(
        r"`((?:lowrank_optax|tests|experiments|benchmarks|docs)/[\w./]*)`", guide
    ):
        if "NAME" not in name:
            assert (GUIDE.parent / name).exists(), name


def test_the_guide_lists_the_files_of_the_core_from_the_bottom_to_the_top():
    [table] = re.findall(r"Inside `_core`.*?\n\n(.*?)\n\n", GUIDE.read_text(), re.DOTALL)
    named = re.findall(r"`(\w+)\.py`", "\n".join(row.split("|")[1] for row in table.splitlines()))
    assert tuple(named) == CORE
