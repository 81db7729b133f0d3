"""A kind of pair that only this file knows works wherever the library's own kinds do."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from lowrank_optax import LoRAPair, adapters, diagnostics, engine, find_pairs, nn, sharding

P = jax.P


@engine.register_node
class GatedPair(NamedTuple):
    """A pair whose output is multiplied by a gate for each output feature."""

    a: Any
    b: Any
    gate: Any

    @staticmethod
    def long_axes():
        return {"gate": ("out", -1)}

    def plain(self):
        return LoRAPair(self.a, self.b * jax.lax.stop_gradient(self.gate)[..., None, :])

    def apply(self, x, scale, axis_name=None):
        return self.plain().apply(x, scale)


@dataclasses.dataclass(frozen=True)
class Gate(nn.Extra):
    """Gates that start at a value."""

    value: float = 2.0

    def add_to(self, pair, key):
        gate = jnp.full((*pair.b.shape[:-2], pair.b.shape[-1]), self.value)
        return GatedPair(*pair, gate)


def gated_sgd(learning_rate):
    """A method of gated pairs: moves the factors down, and each gate by a tenth."""

    def rule(pairs, grads, params, state):
        steps = pairs.descend(grads, params)
        to = lambda step, pair: GatedPair(*step, jnp.full_like(pair.gate, -0.1))
        return pairs.each(to, steps, params), state

    return engine.lift(
        rule, engine.NoState, learning_rate=learning_rate, node=GatedPair, name="gated_sgd"
    )


CONFIG = nn.LoRAConfig(
    rank=2, alpha=4.0, b_init=jax.nn.initializers.normal(), extra=Gate(), param_dtype=jnp.float32
)
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6)), jnp.float32)
LEAVES = {"lora_a": (6, 2), "lora_b": (2, 5), "lora_gate": (5,)}


def dense_gated(kernel, leaves):
    """The kernel that a gated layer stands for, written out."""
    return kernel + CONFIG.scale * (leaves["lora_a"] @ leaves["lora_b"]) * leaves["lora_gate"]


def test_nnx_layers_surgery_and_merging():
    model = nnx.Sequential(nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", CONFIG, rngs=nnx.Rngs(1))
    layer = model.layers[0]
    leaves = nnx.to_pure_dict(nnx.state(layer, nnx.LoRAParam))
    assert jax.tree.map(jnp.shape, leaves) == LEAVES
    assert type(layer.pair) is GatedPair
    expected = X @ dense_gated(layer.base.kernel[...], leaves)
    np.testing.assert_allclose(model(X), expected, rtol=1e-5, atol=1e-6)
    [row] = nn.lora_summary(model).rows
    assert (row.kind, row.trained) == ("GatedPair", 22)
    nn.merge_lora(model)
    np.testing.assert_allclose(model(X), expected, rtol=1e-5, atol=1e-6)


def test_nnx_training_moves_factors_and_gate():
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", CONFIG, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, gated_sgd(0.1), wrt=nnx.LoRAParam)
    before = jax.tree.map(jnp.copy, model.layers[0].pair)
    loss = lambda m: jnp.mean(m(X) ** 2)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    after = model.layers[0].pair
    np.testing.assert_allclose(after.gate, before.gate - 0.1, rtol=1e-6)
    assert jnp.any(after.a != before.a)
    assert jnp.any(after.b != before.b)


def test_linen_modules_interceptor_and_merging():
    module = nn.LoRADense(5, use_bias=False, lora=CONFIG)
    variables = module.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables["lora"]) == LEAVES
    kernel = dense_gated(variables["params"]["kernel"], variables["lora"])
    np.testing.assert_allclose(module.apply(variables, X), X @ kernel, rtol=1e-5, atol=1e-6)
    model = linen.Sequential([linen.Dense(5)])
    with nn.lora_interceptor("layers_0", CONFIG) as described:
        y, variables = model.init_with_output(jax.random.key(0), X)
    merged = nn.merge_lora_variables(variables, described)
    np.testing.assert_allclose(model.apply({"params": merged}, X), y, rtol=1e-5, atol=1e-6)


def test_partition_specs_follow_its_long_axes():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    shapes = {"lora_a": (16, 2), "lora_b": (2, 8), "lora_gate": (8,)}
    tree = {"up": {name: jnp.ones(shape) for name, shape in shapes.items()}}
    recipe = sharding.fsdp(within=sharding.tensor_parallel(["up"]), min_size=0)
    specs = sharding.partition_specs(tree, mesh, recipe)["up"]
    assert specs == {
        "lora_a": P("data", None),
        "lora_b": P(None, "model"),
        "lora_gate": P("model"),
    }


def test_export_and_diagnostics():
    pair = GatedPair(X.T @ X[:, :2], jnp.ones((2, 5)), jnp.arange(5.0))
    plain = adapters.plain_pair(pair)
    np.testing.assert_allclose(plain.a @ plain.b, (pair.a @ pair.b) * pair.gate, rtol=1e-5)
    nearest, error = adapters.compress(pair, 1)
    assert nearest.a.shape == (6, 1)
    assert error < 1e-5  # rows of ones times a gate have rank 1
    full = jax.random.normal(jax.random.key(0), (6, 5))
    loss = lambda pair: jnp.sum(full * nn.lora_delta(pair))
    grads = jax.grad(loss)(pair)
    change = (grads.a @ pair.b + pair.a @ grads.b) * pair.gate
    expected = jnp.sum(change * full) / jnp.linalg.norm(change) / jnp.linalg.norm(full)
    np.testing.assert_allclose(diagnostics.alignment(pair, grads, full), expected, rtol=1e-5)


def test_it_is_found_beside_other_pairs_in_any_tree():
    pair = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 5)))
    tree = {"gated": GatedPair(*pair, jnp.ones(5)), "plain": pair, "bias": jnp.ones(3)}
    assert [p.kind for p in find_pairs(tree).pairs] == [GatedPair, LoRAPair]
    mixed = optax.partition(
        {"g": gated_sgd(0.1), "p": optax.sgd(0.1)}, {"gated": "g", "plain": "p", "bias": "p"}
    )
    updates, _ = mixed.update(tree, mixed.init(tree), tree)
    np.testing.assert_allclose(updates["gated"].gate, -0.1)
