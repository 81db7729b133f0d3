"""The train-step benchmark's other ways to OPLoRA's step make the same step."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.train_step import (
    LAYOUTS,
    METHODS,
    disagreement,
    main,
    make_problem,
    make_runner,
    relative_difference,
)

ALTERNATIVES = [name for name in METHODS if "," in name]


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_alternative_makes_the_same_step(name):
    reference = name.partition(",")[0]
    assert disagreement(name, reference, steps=3) < 1e-3


def test_a_leaf_that_is_not_a_number_does_not_agree():
    start, want = [np.zeros(2)] * 3, [np.ones(2)] * 3
    assert relative_difference([np.full(2, 1.5), *want[1:]], want, start) == 0.5
    assert np.isnan(relative_difference([want[0], np.full(2, np.nan), want[2]], want, start))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_oplora_keeps_no_more_than_adamw_until_the_step(dtype):
    """Temporary memory by the compiler's own analysis; one activation is an eighth of it here."""
    problem = make_problem(8, 64, 2048, 1, jnp.dtype(dtype))
    temporary = lambda name: make_runner(name, *problem, "separate").memory.temp_size_in_bytes
    base = temporary("adamw")
    for name in ("oplora k=1", "oplora k=2", "oplora_proj k=1"):
        assert temporary(name) < 1.05 * base, name
    assert temporary("oplora k=1, kept") > 1.4 * base


def test_the_command_writes_a_row_for_each_method(tmp_path):
    app = typer.Typer()
    app.command()(main)
    sizes = ["--layers", "2", "--width", "16", "--tokens", "32", "--rank", "2", "--steps", "1"]
    out = tmp_path / "record.json"
    result = CliRunner().invoke(app, [*sizes, "--method", "oplora k=1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    names = [(row["layout"], row["method"]) for row in rows]
    assert names == [(kind, name) for kind in LAYOUTS for name in ("adamw", "oplora k=1")]
    for row in rows:
        assert row["ratio"] > 0
        assert row["temporary_ratio"] > 0
    assert rows[1]["state_mb"] < 1e-4  # counters only: its momentum are leaves
