"""Weight decay, its schedule and its mask are what `optax.adamw` takes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import lowrank_optax
from lowrank_optax import LoRAPair, altlora_plus, lora_plus, polora
from tests.conformance.methods import METHODS

# In the alternating order a factor decays when it is its turn, and a frozen one never.
WITH_DECAY = [
    m
    for m in METHODS
    if "weight_decay" in inspect.signature(m.make).parameters
    and "alternating" not in m.name
    and m.moves == "ab"
]
each_method = pytest.mark.parametrize("method", WITH_DECAY, ids=lambda method: method.name)

PARAMS = {
    "q": {
        "kernel": jnp.ones((6, 5)),
        "bias": jnp.ones(5),
        "lora_a": jnp.ones((6, 2)),
        "lora_b": jnp.ones((2, 5)),
    }
}
DECAYED = {"q": {"kernel": True, "bias": False, "lora_a": True, "lora_b": False}}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def by_path(params):
    """A mask as users of Flax write it, which reads the arrays and their paths."""
    wanted = lambda path, x: x.ndim > 1 and path[-1] != "lora_b"
    return traverse_util.path_aware_map(wanted, params)


@jax.tree_util.register_pytree_node_class
class CallableModule:
    """A module as Equinox has them: a tree of its leaves that can also be called."""

    def __init__(self, leaf):
        self.leaf = leaf

    def __call__(self, x):
        raise AssertionError("a mask that is a module is a tree, not a function")

    def tree_flatten(self):
        return [self.leaf], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def update_of(tx, steps=1, params=PARAMS):
    """The last of some updates without a gradient: decay alone."""
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    return updates


@each_method
@pytest.mark.parametrize("mask", [by_path, DECAYED], ids=["callable", "tree"])
def test_a_mask_decays_what_it_names_as_adamw_does(method, mask):
    ours = update_of(method(0.1, weight_decay=0.5, mask=mask))
    expected = update_of(optax.adamw(0.1, weight_decay=0.5, mask=mask))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, expected)
    assert jnp.all(ours["q"]["kernel"] == -0.05)
    assert not jnp.any(ours["q"]["bias"])


def test_a_callable_mask_sees_the_whole_parameters():
    seen = []

    def mask(params):
        seen.append(jax.tree.structure(params))
        return jax.tree.map(lambda x: True, params)

    update_of(altlora_plus(0.1, weight_decay=0.5, mask=mask))
    assert set(seen) == {jax.tree.structure(PARAMS)}


def test_a_mask_that_is_a_callable_module_is_a_tree():
    pair = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 5)))
    params = {"q": pair, "head": CallableModule(jnp.ones(3))}
    mask = {"q": LoRAPair(False, False), "head": CallableModule(True)}
    updates = update_of(polora(0.1, weight_decay=0.5, mask=mask), params=params)
    np.testing.assert_allclose(updates["head"].leaf, -0.05, rtol=1e-6)
    assert not jnp.any(updates["q"].a)
    module = CallableModule(pair)
    whole = update_of(lora_plus(0.1, weight_decay=0.5, mask=CallableModule(True)), params=module)
    np.testing.assert_allclose(whole.leaf.a, -0.05, rtol=1e-6)


@each_method
def test_a_scheduled_weight_decay_is_adamws(method):
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    ours = update_of(method(0.1, weight_decay=schedule), steps=3)
    expected = update_of(optax.adamw(0.1, weight_decay=schedule), steps=3)
    np.testing.assert_allclose(ours["q"]["bias"], expected["q"]["bias"], rtol=1e-6)
    np.testing.assert_allclose(ours["q"]["lora_a"], -0.1 * 0.5, rtol=1e-6)


def test_numbers_after_the_betas_are_keywords():
    """So that `altlora(1e-3, 0.9, 0.99)` cannot take a b2 for a damping."""
    first = {"learning_rate", "inner", "b1", "b2", "momentum", "rank"}
    chosen = {"polora": {"delta"}, "scale_by_inverse_sqrt_gram": {"damping"}}
    for name in {m.make.__name__ for m in METHODS} - {"make"}:
        parameters = inspect.signature(getattr(lowrank_optax, name)).parameters.values()
        positional = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert positional <= first | chosen.get(name, set()), name
    with pytest.raises(TypeError, match="positional"):
        lowrank_optax.altlora(1e-3, 0.9, 0.99)
