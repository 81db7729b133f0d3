"""The update-step benchmark measures both orders, and its products alone are AltLoRA's."""

import json

import jax
import pytest
import typer
from jax.extend.core import jaxprs_in_params
from typer.testing import CliRunner

from benchmarks.update_step import METHODS, main, make_params

SMALL = {"rank": 2, "width": 1 / 64}
SHORTEST = 16  # the narrowest side of a map at this width


def large_products(name):
    """How many products with a factor an update has, those in all branches of a conditional."""
    params = make_params(**SMALL, stacked=True)
    tx = METHODS[name]()
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)

    def count(jaxpr):
        products = [each for each in jaxpr.eqns if each.primitive.name == "dot_general"]
        sizes = [max(max(x.aval.shape[-2:]) for x in each.invars) for each in products]
        inner = [count(each) for eqn in jaxpr.eqns for each in jaxprs_in_params(eqn.params)]
        return sum(size >= SHORTEST for size in sizes) + sum(inner)

    return count(jaxpr.jaxpr)


def test_products_alone_are_those_of_altlora():
    per_factor = 4 * 7  # of seven stacked pairs
    assert large_products("products alone") == large_products("altlora") == 2 * per_factor
    # One of two branches is taken: that of a, or that of b.
    assert large_products("altlora alternating") == 2 * per_factor
    assert large_products("products alone alternating") == per_factor


@pytest.mark.parametrize("name", ["products alone", "products alone alternating"])
def test_products_alone_move_what_they_say(name):
    params = make_params(**SMALL, stacked=True)
    tx = METHODS[name]()
    state = tx.init(params)
    _, state = tx.update(params, state, params)  # makes the first matrices
    updates, new = tx.update(params, state, params)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    assert all(pair.b.any() for pair in updates)
    assert all(pair.a.any() == (name == "products alone") for pair in updates)


def test_the_command_writes_a_row_for_each_method(tmp_path):
    app = typer.Typer()
    app.command()(main)
    sizes = ["--rank", "2", "--width", str(SMALL["width"]), "--layout", "stacked", "--steps", "1"]
    out = tmp_path / "record.json"
    result = CliRunner().invoke(app, [*sizes, "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(row["ratio"] > 0 for row in rows)
