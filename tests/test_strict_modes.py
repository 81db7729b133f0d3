"""The strict modes of JAX: every method works where `optax.adamw` does, with the same numbers."""

import functools
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from lowrank_optax import (
    LoRAPair,
    altlora,
    altlora_plus,
    lora_fa,
    lora_plus,
    lora_pro,
    lora_pro_efficient,
    lora_rite,
    lora_soap,
    nn,
    reflora,
    scaled_adamw,
    sds_lora,
)
from tests.conformance.methods import METHODS
from tests.conformance.test_conformance import OTHER_FORMS, each_of

MODES = {
    "rank-promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug-nans": lambda: jax.debug_nans(True),
    "tracer-leaks": jax.checking_leaks,
    "x64": lambda: jax.enable_x64(True),
}


def make_params(method, size_of_b=0.0):
    """A pair, a stacked pair, and a leaf outside of pairs."""
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    pair = LoRAPair(normal(0, 6, 2), size_of_b * normal(3, 2, 5))
    stacked = LoRAPair(normal(1, 3, 6, 2), normal(2, 3, 2, 5))
    bias = jnp.ones(4, jnp.float32)
    return {"q": method.node(pair), "stack": method.node(stacked), "bias": bias}


def loss_of(params):
    """A loss without promotion of its own."""
    total = jnp.sum(params["bias"] ** 2)
    for name, batch in (("q", ()), ("stack", (3,))):
        x = jnp.broadcast_to(jnp.eye(6, dtype=jnp.float32), (*batch, 6, 6))
        total += jnp.sum((nn.lora_apply(x, params[name], 2.0) - jnp.float32(1)) ** 2)
    return total


def train(tx, params, steps=3):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


@functools.cache
def usual(name, size_of_b):
    """What a method reaches without a strict mode; once for all modes."""
    method = next(m for m in METHODS if m.name == name)
    return train(method(), make_params(method, size_of_b))


each_method = each_of(METHODS, group="strict-", slow=OTHER_FORMS)


@pytest.mark.parametrize("mode", MODES)
@each_method
def test_strict_mode_changes_nothing(method, mode):
    # At b = 0 the small damping magnifies what float64 constants change in the last digit.
    size_of_b = 1.0 if mode == "x64" else 0.0
    expected, params = usual(method.name, size_of_b), make_params(method, size_of_b)
    with MODES[mode]():
        moved = train(method(), params)
    for new, old in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-4)


def products_of(jaxpr):
    """All matrix products of a program, those of its branches and loops too."""
    yield from (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general")
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            yield from products_of(inner)


@each_method
def test_products_of_an_update_do_not_round_to_fewer_bits(method):
    """A GPU takes TF32 for float32 by default, a TPU bfloat16: a Gram matrix needs all bits."""
    tx, params = method(), make_params(method, size_of_b=1.0)
    program = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    highest = (jax.lax.Precision.HIGHEST,) * 2
    precisions = [eqn.params["precision"] for eqn in products_of(program)]
    assert set(precisions) <= {highest}
    assert precisions or method.name == "lora_plus"


WITH_BIAS_CORRECTION = (
    altlora,
    altlora_plus,
    lora_fa,
    lora_plus,
    lora_pro,
    lora_pro_efficient,
    lora_rite,
    lora_soap,
    reflora,
    scaled_adamw,
)


def is_bias_correction(error):
    """Whether a promotion is that of a bias correction, a float to the power of the count."""
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)]
    return any(line and re.search(r"\*\* ?\(?(count|t)\b", line) for line in lines)


def test_adamw_itself_promotes_its_count():
    params = {"w": jnp.ones(3)}
    with jax.numpy_dtype_promotion("strict"):
        tx = optax.adamw(0.1)
        with pytest.raises(ValueError, match="no available implicit dtype") as error:
            tx.update(params, tx.init(params), params)
    assert is_bias_correction(error.value)


@each_method
def test_strict_dtype_promotion_refuses_bias_corrections_alone(method):
    """Everything else of a method promotes explicitly, as `optax.sgd` does."""
    if method.make is sds_lora:
        tx = method(optax.sgd(0.05))
    else:
        tx = method(**({"fallback": optax.sgd(0.05)} if method.is_alias else {}))
    params = make_params(method)
    with jax.numpy_dtype_promotion("strict"):
        if method.make in WITH_BIAS_CORRECTION:
            with pytest.raises(ValueError, match="no available implicit dtype") as error:
                train(tx, params)
            assert is_bias_correction(error.value)
        else:
            moved = train(tx, params)
            assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(moved))
