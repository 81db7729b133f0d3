"""Adapters of other libraries, as those libraries make them: their pairs are found, and are right.

That a layout and a scale are read as the library means them is seen in the gradients: with G the
gradient in the adapted weight, that of a is s G bᵀ and that of b is s aᵀ G.

It needs qwix, tunix, Keras, Equinox and quax: `make integration` runs it in an environment of its
own.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from lowrank_optax import adapters, describe, find_pairs, polora, scales_from, specs

os.environ["KERAS_BACKEND"] = "jax"
WHY = "needs this library: `make integration` installs it in an environment of its own"
RANK, ALPHA = 4, 6.0


def library(name):
    return pytest.importorskip(name, reason=WHY)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def randomized(tree):
    """Every leaf drawn anew, so that no b is zero."""
    leaves, treedef = jax.tree.flatten(tree)
    drawn = [normal(i, *leaf.shape).astype(leaf.dtype) / 4 for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, drawn)


def assert_read_rightly(factors, grads, weight_grads, scale):
    """Compares the gradients of all pairs with those of the weights they adapt.

    Args:
        factors: a tree with the pairs.
        grads: its gradients.
        weight_grads: from the path of a pair, the gradient of its weight as (in, out).
        scale: s.
    """
    found = find_pairs(factors)
    assert found.pairs
    for at, pair, grad in zip(found.pairs, found.take(factors), found.take(grads), strict=True):
        full = np.asarray(weight_grads(at.path), np.float64).reshape(
            pair.a.shape[-2], pair.b.shape[-1]
        )
        np.testing.assert_allclose(grad.a, scale * full @ pair.b.T, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(grad.b, scale * pair.a.T @ full, rtol=1e-3, atol=1e-4)


def assert_trains(loss, factors, scale, steps=30, to=0.9):
    """PoLoRA lowers the loss to this part of it, in one trace."""
    tx, traces = polora(0.1, scale=scale), []
    state = tx.init(factors)

    @jax.jit
    def step(factors, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(factors), state, factors)
        return optax.apply_updates(factors, updates), state

    before = loss(factors)
    for _ in range(steps):
        factors, state = step(factors, state)
    assert loss(factors) < to * before
    assert len(traces) == 1


class Attention(nnx.Module):
    """A dense layer, and two einsums as of attention: d → (n, h) and back."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(16, 16, rngs=rngs)
        self.query = nnx.Einsum("btd,dnh->btnh", (16, 4, 6), rngs=rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (4, 6, 16), rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.query(jnp.tanh(self.dense(x)))))


X = normal(3, 2, 5, 16)


def test_qwix_nnx_dense_and_einsum():
    """As many heads as the rank, which is where shapes alone could mislead."""
    qwix = library("qwix")
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(Attention(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))
    graph, factors, weights, rest = nnx.split(model, nnx.LoRAParam, nnx.Param, ...)
    factors = randomized(factors)
    target = normal(5, *X.shape)

    def loss(factors, weights):
        return jnp.mean((nnx.merge(graph, factors, weights, rest)(X) - target) ** 2)

    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    flat = {
        "/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(by_weights)
    }
    assert {pair.path for pair in find_pairs(factors).pairs} == {
        "dense/kernel",
        "query/kernel",
        "out/kernel",
    }
    assert_read_rightly(factors, by_factors, flat.get, ALPHA / RANK)
    assert_trains(lambda factors: loss(factors, weights), factors, ALPHA / RANK)


def test_qwix_says_the_layout_of_an_ambiguous_einsum():
    """Four by six axes in, four by eight out, at rank four: shapes alone have two readings."""
    qwix = library("qwix")
    model = nnx.Sequential(nnx.Einsum("btxy,xykl->btkl", (4, 6, 4, 8), rngs=nnx.Rngs(0)))
    x = normal(1, 2, 3, 4, 6)
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=ALPHA)
    model = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
    factors = nnx.state(model, nnx.LoRAParam)
    with pytest.raises(ValueError, match="in 2 ways"):
        find_pairs(factors)
    found = find_pairs(factors, specs.from_qwix(model))
    [pair] = found.take(factors)
    assert (pair.a.shape, pair.b.shape) == ((24, 4), (4, 32))


def test_qwix_linen_dense():
    qwix = library("qwix")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(16, name="down")(jnp.tanh(linen.Dense(12, name="up")(x)))

    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(Model(), provider)
    params = model.init(jax.random.key(0), X)["params"]
    is_factor = lambda path: "lora" in path[-1].key
    factors, weights = (
        jax.tree_util.tree_map_with_path(
            lambda path, leaf, wanted=wanted: leaf if is_factor(path) is wanted else None, params
        )
        for wanted in (True, False)
    )
    factors, target = randomized(factors), normal(5, *X.shape)

    def loss(factors, weights):
        both = jax.tree.map(
            lambda x, y: y if x is None else x, factors, weights, is_leaf=lambda x: x is None
        )
        return jnp.mean((model.apply({"params": both}, X) - target) ** 2)

    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    of = lambda path: by_weights[path.split("/")[0]]["kernel"]
    assert_read_rightly(factors, by_factors, of, ALPHA / RANK)
    assert_trains(lambda factors: loss(factors, weights), factors, ALPHA / RANK)


def test_keras_dense_einsum_and_embedding():
    """Keras hands an optimizer a list of arrays: its names come from the variables' paths."""
    keras = library("keras")
    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(20, 16, name="embedding")(inputs)
    hidden = keras.layers.EinsumDense("btd,dnh->btnh", (None, 4, 6), name="query")(hidden)
    hidden = keras.layers.Reshape((5, 24))(keras.layers.Activation("tanh")(hidden))
    model = keras.Model(inputs, keras.layers.Dense(16, name="dense")(hidden))
    for layer in ("embedding", "query", "dense"):
        model.get_layer(layer).enable_lora(RANK, lora_alpha=ALPHA)
    kernels = {
        f"{name}/{kind}": model.get_layer(name)._kernel
        if kind == "kernel"
        else model.get_layer(name)._embeddings
        for name, kind in (("embedding", "embeddings"), ("query", "kernel"), ("dense", "kernel"))
    }
    names = [v.path for v in model.trainable_variables]
    values = dict(zip(names, (v.value for v in model.trainable_variables), strict=True))
    factors = randomized({name: x for name, x in values.items() if "lora" in name})
    others = {name: x for name, x in values.items() if "lora" not in name}
    frozen_names = [v.path for v in model.non_trainable_variables]
    frozen = dict(zip(frozen_names, (v.value for v in model.non_trainable_variables), strict=True))
    tokens, target = jnp.arange(10).reshape(2, 5), normal(5, 2, 5, 16)

    def loss(factors, frozen):
        all_values = {**others, **factors}
        y, _ = model.stateless_call(
            [all_values[name] for name in names], [frozen[name] for name in frozen_names], tokens
        )
        return jnp.mean((y - target) ** 2)

    by_factors, by_frozen = jax.grad(loss, argnums=(0, 1))(factors, frozen)
    paths = {v.path.rpartition("/")[0]: v.path for v in kernels.values()}
    of = lambda path: by_frozen[paths[path]]
    assert_read_rightly(factors, by_factors, of, ALPHA / RANK)
    assert_trains(lambda factors: loss(factors, frozen), factors, ALPHA / RANK)


def test_quax_on_an_equinox_model():
    """Its a makes the output: the kernel of an Equinox layer is (out, in)."""
    equinox, quax = library("equinox"), library("quax")
    lora = pytest.importorskip("quax.examples.lora", reason=WHY)
    model = equinox.nn.MLP(8, 8, 16, 1, key=jax.random.key(0))
    model = lora.loraify(model, rank=RANK, scale=0.3, key=jax.random.key(1))
    factors, rest = equinox.partition(
        model,
        jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "name", "") in ("a", "b"), model
        ),
    )
    factors = randomized(factors)
    x, target = normal(3, 5, 8), normal(4, 5, 8)

    def loss(factors):
        adapted = quax.quaxify(equinox.combine(factors, rest))
        return jnp.mean((jax.vmap(adapted)(x) - target) ** 2)

    found = find_pairs(factors)
    assert [pair.path for pair in found.pairs] == ["layers/0/weight", "layers/1/weight"]
    for pair, layer in zip(found.take(factors), model.layers, strict=True):
        assert (pair.a.shape[0], pair.b.shape[1]) == (layer.in_features, layer.out_features)
        assert pair.a.shape[1] == RANK
    assert_trains(loss, factors, 1.0)


def test_tunix_llama_attention(tmp_path):
    """The tiny Llama 3 of tunix, all of whose projections are einsums."""
    qwix = library("qwix")
    llama = pytest.importorskip("tunix.models.llama3.model", reason=WHY)
    config = llama.ModelConfig(
        num_layers=2,
        vocab_size=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    tokens, positions = jnp.arange(6)[None], jnp.arange(6)[None]
    mask = jnp.tril(jnp.ones((1, 6, 6), bool))
    inputs = (tokens, positions, None, mask)
    provider = qwix.LoraProvider(
        module_path=r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|down_proj|up_proj)",
        rank=RANK,
        alpha=ALPHA,
    )
    model = qwix.apply_lora_to_model(model, provider, *inputs, rngs=nnx.Rngs(1))
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors):
        logits, _ = nnx.merge(graph, factors, rest)(*inputs)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
        ).mean()

    factors = randomized(factors)
    summary = describe(factors, scale=scales_from({"*": ALPHA / RANK}))
    assert len(summary.rows) == 2 * 7
    assert not summary.fallback
    widths = {row.path.split("/")[-2]: (row.a[-2], row.b[-1]) for row in summary.rows}
    assert widths["q_proj"] == (16, 32)
    assert widths["o_proj"] == (32, 16)
    assert widths["k_proj"] == widths["v_proj"] == (16, 16)
    assert_trains(loss, factors, ALPHA / RANK, to=0.98)
    scale, names = ALPHA / RANK, adapters.name_maps.TUNIX_LLAMA3
    adapters.save_peft(tmp_path / "out", factors, scale=scale, names=names)
    found = adapters.read_peft(tmp_path / "out").pairs
    assert {name.split(".")[-1] for name in found} == set(widths)
    assert {name.split(".")[2] for name in found} == {"0", "1"}
    loaded = adapters.load_peft(tmp_path / "out", factors, scale=scale, names=names)
    jax.tree.map(np.testing.assert_array_equal, loaded, factors)
