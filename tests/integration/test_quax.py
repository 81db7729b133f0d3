"""quax on Equinox."""

import jax
import jax.numpy as jnp
import pytest

from lowrank_optax import find_pairs
from tests.integration.checks import RANK, assert_read_rightly, assert_trains, normal, randomized

pytestmark = pytest.mark.libraries("quax", "equinox")


def test_quax_on_an_equinox_model():
    """An MLP of Equinox by `loraify`, whose a makes the output."""
    import equinox
    import quax
    from quax.examples import lora

    model = equinox.nn.MLP(8, 8, 16, 1, key=jax.random.key(0))
    model = lora.loraify(model, rank=RANK, scale=0.3, stop_gradient=False, key=jax.random.key(1))
    factors, rest = equinox.partition(
        model,
        jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "name", "") in ("a", "b"), model
        ),
    )
    factors = randomized(factors)
    weights, rest = equinox.partition(rest, equinox.is_array)
    x, target = normal(3, 5, 8), normal(4, 5, 8)

    def loss(factors, weights):
        adapted = quax.quaxify(equinox.combine(factors, weights, rest))
        return jnp.mean((jax.vmap(adapted)(x) - target) ** 2)

    found = find_pairs(factors)
    assert [pair.path for pair in found.pairs] == ["layers/0/weight", "layers/1/weight"]
    for pair, layer in zip(found.take(factors), model.layers, strict=True):
        assert (pair.a.shape[0], pair.b.shape[1]) == (layer.in_features, layer.out_features)
        assert pair.a.shape[1] == RANK
    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    layer_of = lambda path: by_weights.layers[int(path.split("/")[1])]
    assert_read_rightly(factors, by_factors, lambda path: layer_of(path).weight._w.T, 1.0)
    assert_trains(lambda factors: loss(factors, weights), factors, 1.0)
