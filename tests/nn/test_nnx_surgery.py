"""`add_lora` and its inverses on whole NNX models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_optax import nn

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32))
QUERY_VALUE = [f"layers/{i}/attention/{name}" for i in (0, 1) for name in ("query", "value")]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.relu)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.layers = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def encoder():
    """A model that tests clone instead of building it anew."""
    return Encoder(nnx.Rngs(0))


forward = nnx.jit(lambda model, x: model(x))


def randomize_b(model, seed=0):
    rng = np.random.default_rng(seed)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nn.LoRALayer):
            layer.lora_b[...] = rng.normal(size=layer.lora_b.shape).astype(np.float32)


def adapted(encoder, targets="query|value", **settings):
    model = nnx.clone(encoder)
    paths = nn.add_lora(model, targets, nn.LoRAConfig(**{"rank": 2, **settings}), rngs=nnx.Rngs(1))
    return model, paths


def pure(state):
    return jax.tree.map(np.array, nnx.to_pure_dict(state))


def test_attention_is_adapted_and_starts_as_the_base_model(encoder):
    model, paths = adapted(encoder)
    assert paths == QUERY_VALUE
    assert isinstance(model.layers[1].attention.value, nn.LoRALayer)
    assert isinstance(model.layers[1].attention.key, nnx.LinearGeneral)
    assert model.layers[0].attention.query.lora_a.shape == (8, 2)
    assert model.layers[0].attention.query.lora_b.shape == (2, 8)
    np.testing.assert_array_equal(forward(model, X), forward(encoder, X))
    randomize_b(model)
    assert np.abs(forward(model, X) - forward(encoder, X)).max() > 0.01


def test_settings_reach_the_layers(encoder):
    settings = {
        "alpha": 6.0,
        "rslora": True,
        "dropout": 0.25,
        "a_init": jax.nn.initializers.ones,
        "b_init": jax.nn.initializers.ones,
        "param_dtype": jnp.bfloat16,
        "dtype": jnp.float32,
    }
    model, _ = adapted(encoder, "layers/0/mlp/layers/0", **settings)
    assert model.layers[0].mlp.layers[0].lora == nn.LoRAConfig(rank=2, **settings)


def test_layers_are_found_in_every_container():
    def layer():
        return nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self):
            self.plain = layer()
            self.in_list = nnx.List([layer(), nnx.relu])
            self.in_dict = nnx.Dict(q=layer(), k=layer())
            self.in_sequential = nnx.Sequential(layer(), nnx.relu)
            self.in_python = nnx.data({"x": [layer()]})

    model = Model()
    expected = [
        "in_dict/k",
        "in_dict/q",
        "in_list/0",
        "in_python/x/0",
        "in_sequential/layers/0",
        "plain",
    ]
    is_linear = lambda path, module: isinstance(module, nnx.Linear)
    assert nn.add_lora(model, is_linear, nn.LoRAConfig(rank=1), rngs=nnx.Rngs(0)) == expected
    found = [model.plain, model.in_list[0], model.in_dict["q"], model.in_dict["k"]]
    found += [model.in_sequential.layers[0], model.in_python["x"][0]]
    assert all(isinstance(module, nn.LoRALayer) for module in found)
    assert nn.remove_lora(model) == expected
    assert isinstance(model.in_python["x"][0], nnx.Linear)


def test_a_shared_layer_is_adapted_once_for_all_its_places():
    class Model(nnx.Module):
        def __init__(self):
            self.encoder = nnx.Dict(proj=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
            self.decoder = nnx.Dict(proj=self.encoder.proj)

    model = Model()
    assert nn.add_lora(model, "decoder/proj", nn.LoRAConfig(rank=1), rngs=nnx.Rngs(0)) == [
        "decoder/proj"
    ]
    assert model.encoder.proj is model.decoder.proj
    assert len(nn.lora_scales(model)) == 1
    nn.merge_lora(model)  # one owner of the kernel: allowed


def test_training_moves_factors_only_and_the_loss_falls(encoder):
    model, _ = adapted(encoder, alpha=4.0)
    optimizer = nnx.Optimizer(model, optax.adamw(0.02), wrt=nnx.LoRAParam)
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    before, target = pure(nnx.state(model, frozen)), jnp.sin(X)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - target) ** 2)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, pure(nnx.state(model, frozen)), before)
    assert len(jax.tree.leaves(before)) == len(jax.tree.leaves(pure(nnx.state(encoder))))


def test_merge_and_unmerge_round_trip(encoder):
    model, paths = adapted(encoder)
    randomize_b(model)
    kernel = np.array(model.layers[0].attention.query.base.kernel[...])
    y = forward(model, X)
    assert nn.merge_lora(model) == paths
    assert nn.merge_lora(model) == []  # merged layers are not merged again
    assert np.abs(model.layers[0].attention.query.base.kernel[...] - kernel).max() > 0.1
    np.testing.assert_allclose(forward(model, X), y, atol=1e-4)
    assert nn.unmerge_lora(model) == paths
    assert nn.unmerge_lora(model) == []
    np.testing.assert_allclose(model.layers[0].attention.query.base.kernel[...], kernel, atol=1e-5)
    np.testing.assert_allclose(forward(model, X), y, atol=1e-4)


def test_unload_returns_a_plain_model_with_the_adapters_in_its_kernels(encoder):
    model, paths = adapted(encoder)
    randomize_b(model)
    y = forward(model, X)
    assert nn.unload_lora(model) == paths
    assert nnx.graphdef(model) == nnx.graphdef(nnx.clone(encoder))
    np.testing.assert_allclose(forward(model, X), y, atol=1e-4)


def test_remove_restores_the_base_model_exactly(encoder):
    model, paths = adapted(encoder)
    randomize_b(model)
    assert nn.remove_lora(model) == paths
    jax.tree.map(np.testing.assert_array_equal, pure(nnx.state(model)), pure(nnx.state(encoder)))


def test_bfloat16_kernels_keep_their_dtype_and_come_back_within_their_rounding():
    model = nnx.Sequential(nnx.Linear(8, 8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=2, alpha=2.0), rngs=nnx.Rngs(1))
    randomize_b(model)
    layer: Any = model.layers[0]
    base = layer.base
    kernel = np.array(base.kernel[...], np.float32)
    nn.merge_lora(model)
    merged = np.array(base.kernel[...], np.float32)
    nn.unmerge_lora(model)
    assert base.kernel.dtype == jnp.bfloat16
    restored = np.array(base.kernel[...], np.float32)
    larger = np.maximum(np.abs(kernel), np.abs(merged))
    assert np.all(np.abs(restored - kernel) <= 2.0**-8 * larger)


def test_scales(encoder):
    model, paths = adapted(encoder, rank=4, alpha=8.0, rslora=True)
    assert nn.lora_scales(model) == dict.fromkeys(paths, 4.0)
    assert nn.lora_scales(encoder) == {}


def test_dropout_follows_train_and_eval(encoder):
    model, _ = adapted(encoder, dropout=0.5)
    randomize_b(model)
    query = model.layers[1].attention.query
    model.train()
    assert not np.allclose(query(X), query(X))
    model.eval()
    np.testing.assert_array_equal(query(X), query(X))


def test_stacked_layers_get_stacked_factors():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.split = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
            self.join = nnx.Einsum("btnh,dnh->btd", (8, 2, 4), rngs=rngs)

        def __call__(self, x):
            return x + self.join(self.split(x))

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return Layer(rngs)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x)

    layers = make(nnx.Rngs(0))
    y = run(X, layers)
    config = nn.LoRAConfig(rank=2, dropout=0.5)
    assert nn.add_lora(layers, "split|join", config, rngs=nnx.Rngs(1)) == ["join", "split"]
    for layer in (layers.split, layers.join):
        assert layer.lora_a.shape == (3, 8, 2)
        assert layer.lora_b.shape == (3, 2, 8)
    layers.eval()
    np.testing.assert_array_equal(run(X, layers), y)
    randomize_b(layers)
    y = run(X, layers)
    layers.train()  # the dropout streams are stacked, so that scan can slice them
    assert not np.allclose(run(X, layers), y)
    nn.unload_lora(layers)
    np.testing.assert_allclose(run(X, layers), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        ("quary", {}, "match no module: quary.*layers/0/attention/key"),
        (["query", "valeu"], {}, r"match no module: valeu\."),
        ([], {}, "targets is empty"),
        ("norm", {}, "layers/0/norm is a LayerNorm"),
        ("attention", {}, "layers/0/attention is a MultiHeadAttention"),
        (lambda path, module: False, {}, "the predicate"),
        ("query", {"rank": 0}, "`rank` must be at least 1"),
        ("query", {"rank": 9}, "layers/0/attention/query: rank 9 exceeds"),
        ("query", {"dropout": 1.0}, "`dropout` must lie in"),
        ("query", {"alpha": -1.0}, "`alpha` must be positive"),
    ],
)
def test_refusals_leave_the_model_alone(encoder, targets, settings, message):
    model = nnx.clone(encoder)
    with pytest.raises(ValueError, match=message):
        nn.add_lora(model, targets, nn.LoRAConfig(**{"rank": 2, **settings}), rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) == nnx.graphdef(nnx.clone(encoder))


def test_a_second_adapter_is_refused_and_others_can_be_added(encoder):
    model, _ = adapted(encoder, "query")
    with pytest.raises(ValueError, match="layers/0/attention/query already has LoRA"):
        nn.add_lora(model, "query|key", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layers/0/attention/query/base already has LoRA"):
        nn.add_lora(model, "base", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    assert len(nn.add_lora(model, "key", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(0))) == 2
    assert len(nn.lora_scales(model)) == 4


def test_the_error_of_a_second_adapter_names_what_takes_the_first_off(encoder):
    model, paths = adapted(encoder, "query")
    with pytest.raises(ValueError, match=r"query already has LoRA; nn\.remove_lora\(model\) takes"):
        nn.add_lora(model, "query", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    nn.remove_lora(model)
    assert nn.add_lora(model, "query", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(0)) == paths


def test_flax_lora_layers_are_refused():
    model = nnx.Dict(q=nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="q already has LoRA, Flax's own; put the plain layer"):
        nn.add_lora(model, "q", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(0))


def test_a_layer_in_a_tuple_cannot_be_replaced():
    model = nnx.Dict(pair=nnx.data((nnx.Linear(2, 2, rngs=nnx.Rngs(0)),)))
    with pytest.raises(ValueError, match=r"pair/0 is inside a tuple: use nnx\.List"):
        nn.add_lora(model, "pair/0", nn.LoRAConfig(rank=1), rngs=nnx.Rngs(0))


def test_a_bare_layer_has_to_be_wrapped_by_hand():
    with pytest.raises(ValueError, match=r"none \(wrap a bare layer by hand"):
        nn.add_lora(
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "kernel", nn.LoRAConfig(rank=1), rngs=nnx.Rngs(0)
        )
    layer = nn.LoRALinear(2, 2, lora=nn.LoRAConfig(rank=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot replace itself"):
        nn.unload_lora(layer)


def test_models_without_lora_and_merged_adapters_are_refused(encoder):
    for function in (nn.merge_lora, nn.unmerge_lora, nn.unload_lora, nn.remove_lora):
        with pytest.raises(ValueError, match="no LoRA layer: call add_lora"):
            function(encoder)
    model, _ = adapted(encoder, "layers/1/attention/query")
    nn.merge_lora(model)
    with pytest.raises(ValueError, match="layers/1/attention/query is merged: call unmerge_lora"):
        nn.remove_lora(model)


def test_a_kernel_shared_with_another_layer_is_not_merged():
    model = nnx.Dict(a=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), b=nnx.Linear(2, 2, rngs=nnx.Rngs(1)))
    model.b.kernel = model.a.kernel
    nn.add_lora(model, "a", nn.LoRAConfig(rank=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a: its kernel is shared by a/base, b"):
        nn.merge_lora(model)


@pytest.mark.parametrize("merge", [nn.merge_lora, nn.unload_lora, nn.weight_start])
@pytest.mark.parametrize("other", ["adapted", "plain"])
def test_a_kernel_of_a_layer_in_two_places_is_not_changed(merge, other):
    base, config = nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nn.LoRAConfig(rank=2)
    wrapped = lambda seed: nn.LoRALayer(base, config, rngs=nnx.Rngs(seed))
    model = nnx.Dict(a=wrapped(1), b=base if other == "plain" else wrapped(2))
    before = np.array(base.kernel[...])
    with pytest.raises(ValueError, match="a: its kernel is shared by a/base, b"):
        merge(model)
    np.testing.assert_array_equal(base.kernel[...], before)


class Gated(nnx.Linear):
    """A layer with attributes of names that an adapter has too."""

    def __init__(self, rngs):
        super().__init__(4, 6, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.merged, self.lora = True, 3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_base_keeps_attributes_that_an_adapter_has_too(dropout):
    model = nnx.Dict(q=Gated(nnx.Rngs(0)))
    with pytest.warns(UserWarning, match=r"q\.merged, q\.dropout, q\.lora.*read them from `base`"):
        nn.add_lora(model, "q", nn.LoRAConfig(rank=2, dropout=dropout), rngs=nnx.Rngs(1))
    assert (model.q.base.dropout.rate, model.q.base.merged, model.q.base.lora) == (0.1, True, 3)
    assert (model.q.dropout.rate if dropout else model.q.dropout) == (dropout or None)
    nn.remove_lora(model)
    assert (model.q.dropout.rate, model.q.merged, model.q.lora) == (0.1, True, 3)


def test_what_cannot_be_unloaded_stays_unmerged():
    layer = nn.LoRALayer(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1)
    )
    with pytest.raises(ValueError, match="use its attribute 'base'"):
        nn.unload_lora(layer)
    assert not layer.merged


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_all_layers_unmerged():
    class Own(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x)

    model = nnx.Dict(a=nnx.Linear(4, 6, rngs=nnx.Rngs(0)), b=Own(4, 6, rngs=nnx.Rngs(1)))
    nn.add_lora(model, "a|b", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(2))
    with pytest.raises(UserWarning, match="b: Own has its own __call__"):
        nn.merge_lora(model)
    assert not model.a.merged
    assert not model.b.merged
