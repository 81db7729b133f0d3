"""Equinox: a module with factors of its own."""

import jax
import jax.numpy as jnp
import pytest

from lowrank_optax import LoRAPair, find_pairs
from tests.integration.checks import assert_read_rightly, assert_trains, normal

pytestmark = pytest.mark.libraries("equinox")
SCALE = 2.0


@pytest.mark.parametrize("named", [True, False])
def test_modules_with_factors_of_their_own(named):
    """A module with `lora_a` and `lora_b`, or with a `LoRAPair` as a field."""
    import equinox

    class Named(equinox.Module):
        weight: jax.Array
        lora_a: jax.Array
        lora_b: jax.Array

        def __call__(self, x):
            return x @ self.weight + SCALE * (x @ self.lora_a) @ self.lora_b

    class Paired(equinox.Module):
        weight: jax.Array
        adapter: LoRAPair

        def __call__(self, x):
            return x @ self.weight + self.adapter.apply(x, SCALE)

    factors = normal(0, 8, 2), normal(1, 2, 6)
    layer = (
        Named(normal(2, 8, 6), *factors) if named else Paired(normal(2, 8, 6), LoRAPair(*factors))
    )
    model = {"layers": [layer]}
    trained = jax.tree.map(lambda _: True, model)
    trained = equinox.tree_at(lambda tree: tree["layers"][0].weight, trained, False)
    factors, weights = equinox.partition(model, trained)
    x, target = normal(3, 5, 8), normal(4, 5, 6)

    def loss(factors, weights):
        [layer] = equinox.combine(factors, weights)["layers"]
        return jnp.mean((layer(x) - target) ** 2)

    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    [pair] = find_pairs(factors).pairs
    assert pair.path == ("layers/0" if named else "layers/0/adapter")
    full = by_weights["layers"][0].weight
    assert_read_rightly(factors, by_factors, lambda path: full, SCALE)
    assert_trains(lambda factors: loss(factors, weights), factors, SCALE)
