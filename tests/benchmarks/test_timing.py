"""Steps in a loop on the device are the steps that calls make, one by one."""

import jax
import numpy as np
import pytest

from benchmarks import update_step
from benchmarks.timing import megabytes

PARAMS = {"rank": 2, "width": 1 / 64, "stacked": True}


@pytest.mark.parametrize("name", ["adamw", "polora"])
def test_a_loop_makes_the_updates_of_so_many_calls(name):
    make = lambda **options: update_step.make_runner(
        update_step.METHODS[name](), update_step.make_params(**PARAMS), **options
    )
    one, loop = make(), make(updates=3)
    for _ in range(3):
        one.run()
    loop.run()
    for x, y in zip(jax.tree.leaves(one.carry), jax.tree.leaves(loop.carry), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert len(loop.times) == 1


def test_nothing_is_made_of_the_gradients_once_for_all_updates():
    """AdamW's share of the gradient would be kept in memory then, in which the update has none."""
    params = update_step.make_params(**PARAMS)
    runner = update_step.make_runner(update_step.METHODS["adamw"](), params, updates=3)
    assert runner.memory.temp_size_in_bytes / 1e6 < 0.1 * megabytes(params)


@pytest.mark.parametrize("name", update_step.METHODS)
def test_every_update_fits_in_a_loop(name):
    """Its carry has the same types after an update as before it."""
    params, tx = update_step.make_params(**PARAMS), update_step.METHODS[name]()
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
