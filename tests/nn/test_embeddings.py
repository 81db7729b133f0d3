"""LoRA on embeddings: what the adapter adds is what its dense update would."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding

from lowrank_optax import altlora_plus, nn, polora, sds_lora
from tests.nn.training import train

P = jax.P
SIZE, FEATURES = 7, 4
TOKENS = jnp.array([[3, 0, 3], [6, 1, -1]])
NORMAL = jax.nn.initializers.normal(1.0)


class Tied(nnx.Module):
    """A language model whose head is its table."""

    def __init__(self, rngs, **options):
        self.embed = nnx.Embed(SIZE, FEATURES, rngs=rngs, **options)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.embed(tokens)))


def adapted(config=None, **options):
    model = Tied(nnx.Rngs(0), **options)
    config = config or nn.LoRAConfig(rank=2, b_init=NORMAL)
    assert nn.add_lora(model, "embed", config, rngs=nnx.Rngs(1)) == ["embed"]
    return model


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[0, 0], TOKENS[:, 0]], ids=str)
def test_the_adapter_adds_its_dense_update(tokens):
    model = adapted()
    looked_up, attended = model.embed(tokens), model(tokens)
    assert model.embed.lora_a.shape == (SIZE, 2)
    assert float(jnp.abs(looked_up - model.embed.base(tokens)).max()) > 0.1
    nn.merge_lora(model)
    np.testing.assert_allclose(model.embed(tokens), looked_up, atol=1e-5)
    np.testing.assert_allclose(model(tokens), attended, atol=1e-5)


def test_gradients_are_those_of_the_dense_table():
    """Of lookup and head together: g_a = s G bᵀ and g_b = s aᵀ G."""
    model = adapted()
    loss = lambda model: jnp.sum(jnp.sin(model(TOKENS)))
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)["embed"]
    nn.merge_lora(model)
    full = nnx.grad(loss)(model)["embed"]["base"]["embedding"][...]
    a, b = model.embed.pair
    scale = model.embed.scale
    np.testing.assert_allclose(grads["lora_a"][...], scale * full @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["lora_b"][...], scale * a.T @ full, rtol=1e-4, atol=1e-4)


def test_a_token_out_of_range_gives_nan_as_in_the_layer():
    model = adapted()
    y = model.embed(jnp.array([SIZE, 0]))
    assert jnp.isnan(y[0]).all()
    assert jnp.isfinite(y[1]).all()


def test_a_table_of_one_row_takes_every_token():
    model = nnx.Sequential(nnx.Embed(1, FEATURES, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=1, b_init=NORMAL), rngs=nnx.Rngs(1))
    assert jnp.isfinite(model(jnp.array([5, 0]))).all()


def test_bfloat16_tables_and_large_tokens():
    """Tokens are not rounded to the dtype of the output."""
    model = nnx.Sequential(nnx.Embed(1000, FEATURES, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=2, b_init=NORMAL), rngs=nnx.Rngs(1))
    y, tokens = model(jnp.array([997, 998])), jnp.array([997, 998])
    assert y.dtype == jnp.bfloat16
    nn.merge_lora(model)
    np.testing.assert_allclose(model(tokens).astype(float), y.astype(float), rtol=0.05, atol=0.5)


def test_linen_and_nnx_agree():
    class TiedLinen(linen.Module):
        def setup(self):
            self.embed = linen.Embed(SIZE, FEATURES)

        def __call__(self, tokens):
            return self.embed.attend(jnp.tanh(self.embed(tokens)))

    model, config = adapted(), nn.LoRAConfig(rank=2, b_init=NORMAL)
    layer = model.embed
    with nn.lora_interceptor("embed", config) as adapters:
        variables = TiedLinen().init(jax.random.key(0), TOKENS)
        assert jax.tree.map(jnp.shape, variables["lora"]["embed"]) == {
            "lora_a": (SIZE, 2),
            "lora_b": (2, FEATURES),
        }
        params = {"embed": {"embedding": layer.base.embedding[...]}}
        lora = {"embed": {"lora_a": layer.lora_a[...], "lora_b": layer.lora_b[...]}}
        y = TiedLinen().apply({"params": params, "lora": lora}, TOKENS)
    np.testing.assert_allclose(y, model(TOKENS), atol=1e-5)
    merged = nn.merge_lora_variables({"params": params, "lora": lora}, adapters)
    np.testing.assert_allclose(TiedLinen().apply({"params": merged}, TOKENS), y, atol=1e-5)


METHODS = {
    "polora": (None, lambda s: polora(2.0, scale=s)),
    "altlora_plus": (None, lambda s: altlora_plus(0.03, scale=s)),
    "sds_lora": (
        nn.Frames(),
        lambda s: sds_lora(0.01, total_steps=60, warmup_steps=5, scale=s),
    ),
}


@pytest.mark.parametrize(("extra", "make"), METHODS.values(), ids=METHODS)
def test_methods_train_it(extra, make):
    model = nnx.Sequential(nnx.Embed(SIZE, FEATURES, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=2, extra=extra), rngs=nnx.Rngs(1))
    target = jax.random.normal(jax.random.key(3), (*TOKENS.shape, FEATURES))
    losses = train(model, make(nn.lora_scales(model)), TOKENS, target)
    assert losses[-1] < 0.8 * losses[0], losses


def test_gradients_of_framed_embeddings_flow_through_the_frames():
    model = nnx.Sequential(nnx.Embed(SIZE, FEATURES, rngs=nnx.Rngs(0)))
    config = nn.LoRAConfig(rank=2, extra=nn.Frames(warmup=False))
    nn.add_lora(model, "layers/0", config, rngs=nnx.Rngs(1))
    layer = model.layers[0]
    loss = lambda model: jnp.sum(jnp.sin(model(TOKENS)))
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)["layers"][0]
    nn.merge_lora(model)
    full = nnx.grad(loss)(model)["layers"][0]["base"]["embedding"][...]
    pair = layer.pair
    np.testing.assert_allclose(
        grads["lora_a"][...], layer.scale * full @ pair.f_out.T, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        grads["lora_b"][...], layer.scale * pair.f_in.T @ full, rtol=1e-4, atol=1e-4
    )


def test_what_an_embedding_cannot_have():
    with pytest.raises(ValueError, match="embed: dropout acts on"):
        adapted(nn.LoRAConfig(rank=2, dropout=0.1))
    with pytest.raises(ValueError, match="embed: shadows need products"):
        adapted(nn.LoRAConfig(rank=2, extra=nn.Shadows(momentum_rank=0)))
    with pytest.raises(ValueError, match="attends needs a plain pair, and has a FramedPair"):
        adapted(nn.LoRAConfig(rank=2, extra=nn.Frames()))(TOKENS)
    with pytest.raises(AttributeError, match="attend"):
        nn.LoRALinear(3, 3, lora=nn.LoRAConfig(rank=1), rngs=nnx.Rngs(0)).attend(jnp.ones(3))
    with (
        nn.lora_interceptor(".*", nn.LoRAConfig(rank=1, dropout=0.5)),
        pytest.raises(ValueError, match="dropout acts on"),
    ):
        linen.Embed(3, 2).init(jax.random.key(0), jnp.array([0]))


def test_a_start_from_the_gradient():
    model = nnx.Sequential(nnx.Embed(SIZE, FEATURES, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    target = jax.random.normal(jax.random.key(3), (*TOKENS.shape, FEATURES))
    loss = lambda model, tokens: optax.l2_loss(model(tokens), target).mean()
    before = loss(model, TOKENS)
    nn.gradient_start(model, loss, [TOKENS], gamma=16.0, progress=False)
    assert loss(model, TOKENS) < before


def test_reading_the_table_of_an_adapted_embedding_warns():
    model = adapted()
    with pytest.warns(UserWarning, match="is the table without its adapter; use `attend`"):
        assert model.embed.embedding.shape == (SIZE, FEATURES)
    assert model.embed.features == FEATURES


def test_a_linen_head_that_only_attends_merges():
    class Head(linen.Module):
        def setup(self):
            self.embed, self.dense = linen.Embed(SIZE, FEATURES), linen.Dense(FEATURES)

        def __call__(self, x):
            return self.embed.attend(self.dense(x))

    x = jnp.ones((1, 3))
    with nn.lora_interceptor("embed", nn.LoRAConfig(rank=2, b_init=NORMAL)) as adapters:
        y, variables = Head().init_with_output(jax.random.key(0), x)
    merged = nn.merge_lora_variables(variables, adapters)
    np.testing.assert_allclose(Head().apply({"params": merged}, x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("table", [P(), P("model"), P(None, "model")], ids=str)
def test_on_an_explicit_mesh_the_output_lies_as_the_tokens(table):
    explicit = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=explicit, devices=jax.devices()[:4])
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 8)
    model = nnx.Sequential(nnx.Embed(8, FEATURES, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=2, b_init=NORMAL), rngs=nnx.Rngs(1))
    layer = model.layers[0]
    expected = layer(tokens)
    loss = lambda layer, tokens, place: jnp.sum(jnp.sin(layer(tokens, out_sharding=place)))
    grad = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
    wanted = nnx.grad(
        lambda layer: jnp.sum(jnp.sin(layer(tokens))), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )(layer)
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        layer.base.embedding = nnx.Param(put(layer.base.embedding[...], P()))
        layer.lora_a = nnx.LoRAParam(put(layer.lora_a[...], P(*table[:1])))
        layer.lora_b = nnx.LoRAParam(put(layer.lora_b[...], P(None, *table[1:])))
        spread = put(tokens, P("data"))
        y = layer(spread, out_sharding=P("data"))
        assert y.sharding.spec == P("data", None, None)
        found = grad(layer, spread, P("data"))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for name in ("lora_a", "lora_b"):
        np.testing.assert_allclose(found[name][...], wanted[name][...], rtol=1e-4, atol=1e-5)
