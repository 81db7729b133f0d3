"""Hyperparameters out of range are refused where they are plain numbers, with the remedy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import (
    LoRAPair,
    altlora,
    altlora_plus,
    clip_by_global_norm,
    lora_fa,
    lora_muon,
    lora_plus,
    lora_pro,
    lora_pro_efficient,
    lora_rite,
    lora_soap,
    oplora,
    oplora_proj,
    polora,
    reflora,
    scaled_adamw,
    scaled_oplora,
    sds_lora,
)

PARAMS = {"q": LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3))), "bias": jnp.ones(3)}
IDENTITY = optax.identity()


@pytest.mark.parametrize("make", [altlora, altlora_plus])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0.0"),
        ({"learning_rate": -1}, "`learning_rate` must be positive, got -1"),
        ({"learning_rate": np.float32(0)}, "`learning_rate` must be positive, got 0.0"),
        ({"damping": 0.0}, "`damping` must be positive"),
        ({"damping": -1e-6}, "`damping` must be positive"),
        ({"b1": 1.0}, r"`b1` must lie in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "`weight_decay` must not be negative"),
        ({"order": "random"}, "`order` must be one of simultaneous, sequential, alternating"),
        ({"first": "c"}, "`first` must be one of a, b, got 'c'"),
        (
            {"switch_every": 0, "order": "alternating"},
            "`switch_every` must be a whole number, 1 or more, got 0",
        ),
        ({"switch_every": 1.5, "order": "alternating"}, "`switch_every` must be a whole number"),
        ({"switch_every": 2, "order": "sequential"}, "`switch_every` applies to order='alter"),
        ({"scale": 0.0}, "q: `scale` must be positive, got 0.0"),
        ({"scale": {"p": 1.0}}, "`scale` has no number for 'q'; it names 'p'"),
        ({"mask": {"p": True}}, "`mask` does not fit the parameter tree"),
    ],
)
def test_nonsense_is_refused(make, keywords, message):
    def use():
        tx = make(**{"learning_rate": 0.1, "fallback": IDENTITY, **keywords})
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    with pytest.raises(ValueError, match=message):
        use()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"b2": -0.1}, r"`b2` must lie in \[0, 1\)"),
        ({"eps": -1.0}, "`eps` must be positive, got -1"),
        ({"eps": 0.0}, "`eps` must be positive, got 0"),
    ],
)
def test_second_moment_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        altlora_plus(0.1, **keywords)


@pytest.mark.parametrize("max_norm", [0.0, -1.0])
def test_clipping_to_no_length_is_refused(max_norm):
    with pytest.raises(ValueError, match=f"`max_norm` must be positive, got {max_norm}"):
        clip_by_global_norm(max_norm)


def test_infinite_numbers_are_refused():
    with pytest.raises(ValueError, match="`learning_rate` must be finite, got inf"):
        altlora(float("inf"))
    with pytest.raises(ValueError, match="`every` must be finite, got inf"):
        lora_soap(0.1, every=float("inf"))
    with pytest.raises(ValueError, match="`weight_decay` must be finite"):
        altlora(0.1, weight_decay=float("inf"))
    with pytest.raises(ValueError, match="`ratio` must be finite"):
        lora_plus(0.1, ratio=float("inf"))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"b1": 1.5}, "`b1` must lie in"),
        ({"solver_damping": -1.0}, "`solver_damping` must not be negative"),
    ],
)
def test_scaled_oplora_names_its_own_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        scaled_oplora(0.1, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"b1": 1.0}, r"`b1` must lie in \[0, 1\)"),
        ({"b2": -0.1}, r"`b2` must lie in \[0, 1\)"),
        ({"eps": -1.0}, "`eps` must be positive"),
        ({"damping": 0.0}, "`damping` must be positive"),
        ({"order": "alternating"}, "`order` must be one of simultaneous, sequential, got 'alter"),
        ({"weight_decay": -0.1}, "`weight_decay` must not be negative"),
    ],
)
def test_scaled_adamw_refuses_nonsense(keywords, message):
    with pytest.raises(ValueError, match=message):
        scaled_adamw(**{"learning_rate": 0.1, **keywords})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"b1": 1.0}, r"`b1` must lie in \[0, 1\)"),
        ({"b2": -0.1}, r"`b2` must lie in \[0, 1\)"),
        ({"eps": 0.0}, "`eps` must be positive"),
        ({"clip_unmagnified_grad": 0.0}, "`clip_unmagnified_grad` must be positive"),
        ({"weight_decay": -0.1}, "`weight_decay` must not be negative"),
    ],
)
def test_lora_rite_refuses_nonsense(keywords, message):
    with pytest.raises(ValueError, match=message):
        lora_rite(**{"learning_rate": 0.1, **keywords})


ADAM_NUMBERS = [
    ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
    ({"b1": 1.0}, r"`b1` must lie in \[0, 1\)"),
    ({"b2": -0.1}, r"`b2` must lie in \[0, 1\)"),
    ({"eps": -1.0}, "`eps` must be positive"),
    ({"weight_decay": -0.1}, "`weight_decay` must not be negative"),
]
DAMPING = ({"damping": 0.0}, "`damping` must be positive")


@pytest.mark.parametrize(
    ("make", "keywords", "message"),
    [
        *(
            (make, *numbers)
            for make in (lora_fa, lora_pro, lora_pro_efficient, lora_soap, reflora)
            for numbers in ADAM_NUMBERS
        ),
        *((make, *DAMPING) for make in (lora_fa, lora_pro, lora_pro_efficient, reflora)),
        (lora_soap, {"every": 0}, "`every` must be a whole number, 1 or more, got 0"),
        (lora_soap, {"every": 1.5}, "`every` must be a whole number"),
        (reflora, {"warmup_steps": -1}, "`warmup_steps` must be a whole number, 0 or more"),
        (reflora, {"warmup_steps": 2.5}, "`warmup_steps` must be a whole number, 0 or more"),
        (reflora, {"refactoring": "half"}, "`refactoring` must be one of full, scalar, got 'half'"),
    ],
)
def test_adams_relatives_refuse_nonsense(make, keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**{"learning_rate": 0.1, **keywords})


def test_update_with_other_gradients_than_parameters():
    tx = altlora(0.1)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="gradients and parameters differ in structure"):
        tx.update({"q": PARAMS["q"]}, state, PARAMS)
    without_b = {"q": LoRAPair(jnp.ones((4, 2)), None), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"q/b has no gradient.*half a pair"):
        tx.update(without_b, state, PARAMS)


def test_mask_tree_covers_pairs_and_the_fallback():
    tx = altlora(0.1, weight_decay=0.5, mask={"q": LoRAPair(True, True), "bias": False})
    zero = {"q": LoRAPair(jnp.zeros((4, 2)), jnp.zeros((2, 3))), "bias": jnp.zeros(3)}
    params = {"q": LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 3))), "bias": jnp.ones(3)}
    updates, _ = tx.update(zero, tx.init(params), params)
    assert jnp.allclose(updates["q"].b, -0.05)
    assert not jnp.any(updates["bias"])


BETAS = optax.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.0)


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (partial(altlora, 0.1, 0.8), optax.adamw(0.1, 0.8, weight_decay=0.0)),
        (
            partial(altlora_plus, 0.1, 0.8, 0.9, eps=1e-3),
            optax.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.0),
        ),
        (partial(lora_muon, 0.1, 0.8), optax.adamw(0.1, weight_decay=0.0)),
        (partial(polora, 0.1, 0.8, 0.9), optax.adamw(0.1, weight_decay=0.0)),
        (
            partial(lora_plus, 0.1, 0.8, 0.9, eps=1e-3),
            optax.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.0),
        ),
        (
            partial(scaled_adamw, 0.1, 0.8, 0.9, eps=1e-3),
            optax.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.0),
        ),
        (
            partial(lora_rite, 0.1, 0.8, 0.9, eps=1e-3),
            optax.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.0),
        ),
        *(
            (partial(make, 0.1, 0.8, 0.9, eps=1e-3), BETAS)
            for make in (lora_fa, lora_pro, lora_pro_efficient, lora_soap, reflora)
        ),
        (partial(oplora, 0.1, 0.8), optax.adamw(0.1)),
        (partial(oplora_proj, 0.1, 0.8), optax.adamw(0.1)),
        (partial(scaled_oplora, 0.1, 0.8, 0.9), optax.adamw(0.1)),
        (partial(sds_lora, 0.1, total_steps=20), optax.adamw(0.1)),
    ],
)
def test_other_leaves_go_to_adam_by_default(tx, expected):
    params, tx = {"bias": jnp.array([1.0, -2.0, 3.0])}, tx(allow_no_pairs=True)
    state, expected_state = tx.init(params), expected.init(params)
    for factor in (1.0, -3.0):
        grads = jax.tree.map(lambda x: factor * x, params)  # noqa: B023
        updates, state = tx.update(grads, state, params)
        wanted, expected_state = expected.update(grads, expected_state, params)
        np.testing.assert_allclose(updates["bias"], wanted["bias"], rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "altlora",
        "altlora_plus",
        "lora_fa",
        "lora_muon",
        "lora_plus",
        "lora_pro",
        "lora_pro_efficient",
        "lora_rite",
        "lora_soap",
        "polora",
        "reflora",
        "scaled_adamw",
    ],
)
def test_every_number_of_an_optimizer_can_be_injected(name):
    """`optax.inject_hyperparams` traces the defaults too."""
    keys = jax.random.split(jax.random.key(0), 4)
    normal = jax.random.normal
    params = LoRAPair(normal(keys[0], (6, 2)), normal(keys[1], (2, 5)))
    grads = LoRAPair(normal(keys[2], (6, 2)), normal(keys[3], (2, 5)))
    make = getattr(lowrank_optax, name)
    tx, injected = make(0.1), optax.inject_hyperparams(make)(0.1)
    state, injected_state = tx.init(params), injected.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        same, injected_state = jax.jit(injected.update)(grads, injected_state, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), updates, same)


def test_an_array_as_a_rate_may_be_zero_but_not_negative():
    """A wrapper may have computed it from a schedule."""
    altlora(jnp.zeros([]))
    with pytest.raises(ValueError, match="`learning_rate` must not be negative, got -1"):
        altlora(jnp.array(-1.0))
    with pytest.raises(ValueError, match=r"`learning_rate` must be positive, got 0\.0"):
        altlora(0.0)
