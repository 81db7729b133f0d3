"""qwix, on NNX and Linen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lowrank_optax import (
    altlora_plus,
    describe,
    find_pairs,
    integrations,
    nn,
    oplora,
    polora,
    sds_lora,
    specs,
)
from tests.integration.checks import (
    ALPHA,
    RANK,
    assert_read_rightly,
    assert_trains,
    normal,
    randomized,
)

pytestmark = pytest.mark.libraries("qwix")


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
    """NNX: dense and einsum layers, with as many heads as the rank."""
    import qwix

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
    """An einsum whose shapes have two readings: an error, and `specs.from_qwix`."""
    import qwix

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
    """Linen: dense layers."""
    import qwix

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


EXTRAS = {"plain": None, "shadows": nn.Shadows(), "frames": nn.Frames(warmup=False)}


def with_our_provider(extra, **rule):
    config = nn.LoRAConfig(RANK, alpha=ALPHA, extra=extra)
    provider = integrations.qwix.LoRAProvider([integrations.qwix.LoRARule(config=config, **rule)])
    import qwix

    model = qwix.apply_lora_to_model(Attention(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))
    return model, provider


@pytest.mark.parametrize("extra", EXTRAS)
def test_our_provider_for_qwix_is_our_layers(extra):
    """Our provider for qwix: plain pairs, shadows and frames, as those of this library's layers."""
    model, _ = with_our_provider(EXTRAS[extra])
    ours = Attention(nnx.Rngs(0))
    nn.add_lora(ours, ".*", nn.LoRAConfig(RANK, alpha=ALPHA, extra=EXTRAS[extra]), rngs=nnx.Rngs(1))
    for path in ("dense", "query", "out"):
        layer, theirs = getattr(ours, path), getattr(model, path)
        for name, variable in nnx.to_pure_dict(nnx.state(layer, nnx.LoRAParam)).items():
            value = normal(len(name), *variable.shape) / 4
            getattr(layer, name)[...] = value
            getattr(theirs, f"kernel_{name}")[...] = value

    def loss(model):
        return jnp.sum(model(X) ** 2)

    wanted: dict = nnx.to_pure_dict(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(ours))
    found: dict = nnx.to_pure_dict(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
    np.testing.assert_allclose(model(X), ours(X), rtol=1e-4, atol=1e-4)
    assert set(wanted) == set(found)
    for path, leaves in wanted.items():
        assert {f"kernel_{name}" for name in leaves} == set(found[path])
        for name, leaf in leaves.items():
            size = 1e-4 * np.abs(leaf).max() + 1e-6
            np.testing.assert_allclose(found[path][f"kernel_{name}"], leaf, atol=size)


METHODS = {
    "polora": (polora, None, 0.1),
    "altlora_plus": (altlora_plus, None, 0.03),
    "oplora": (oplora, nn.Shadows(), 0.3),
    "sds_lora": (
        functools.partial(sds_lora, total_steps=40, warmup_steps=0),
        nn.Frames(warmup=False),
        0.03,
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantized", [False, True])
def test_our_provider_for_qwix_trains(method, quantized):
    """Our provider for qwix: training by four methods, on float32 and on int8 weights."""
    make, extra, rate = METHODS[method]
    rule = {"weight_qtype": "int8"} if quantized else {}
    model, provider = with_our_provider(extra, **rule)
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    target = normal(5, *X.shape)
    loss = lambda factors: jnp.mean((nnx.merge(graph, factors, rest)(X) - target) ** 2)
    scale = integrations.qwix.scales_of(provider)
    summary = describe(factors, scale=scale)
    own = nn.LoRAConfig(RANK, alpha=ALPHA, extra=extra).scale
    assert {row.path: row.scale for row in summary.rows} == dict.fromkeys(
        ("dense/kernel", "query/kernel", "out/kernel"), own
    )
    assert not summary.fallback
    assert_trains(loss, factors, scale, tx=make(rate, scale=scale))


def test_our_provider_for_qwix_on_linen():
    """Our provider for qwix on Linen: shadows beside the factors, in the collection `params`."""
    import qwix

    config = nn.LoRAConfig(RANK, alpha=ALPHA, extra=nn.Shadows())
    rules = [
        qwix.QuantizationRule(module_path="down"),
        integrations.qwix.LoRARule(config=config),
    ]
    provider = integrations.qwix.LoRAProvider(rules)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(16, name="down")(jnp.tanh(linen.Dense(12, name="up")(x)))

    model = qwix.apply_lora_to_model(Model(), provider)
    params = model.init(jax.random.key(0), X)["params"]
    factors = {"up": {name: x for name, x in params["up"].items() if "lora" in name}}
    others = {"up": {name: x for name, x in params["up"].items() if "lora" not in name}}
    [pair] = find_pairs(factors).take(factors)
    assert type(pair).__name__ == "ShadowedPair"
    assert set(params["down"]) == {"kernel", "bias"}  # the first rule that fits has no adapter

    def loss(factors):
        both = {"up": {**others["up"], **factors["up"]}, "down": params["down"]}
        return jnp.mean((model.apply({"params": both}, X) - normal(5, *X.shape)) ** 2)

    scale = integrations.qwix.scales_of(provider)
    assert_trains(loss, factors, scale, tx=oplora(0.3, scale=scale), to=0.98)


def test_mistakes_with_our_provider_for_qwix():
    """Our provider for qwix: a rank that is too large, scales of another provider."""
    import qwix

    config = nn.LoRAConfig(rank=17)
    provider = integrations.qwix.LoRAProvider([integrations.qwix.LoRARule(config=config)])
    with pytest.raises(ValueError, match="dense/kernel: rank 17 exceeds min"):
        qwix.apply_lora_to_model(Attention(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match="settings of adapters are a LoRAConfig"):
        integrations.qwix.LoRARule(config=8)
    with pytest.raises(TypeError, match="takes a LoRAProvider"):
        integrations.qwix.scales_of(qwix.PtqProvider([qwix.QuantizationRule()]))
    only = qwix.LoraProvider(module_path="attn/.*", rank=4, alpha=8.0)
    scale = integrations.qwix.scales_of(only)
    assert scale.of("attn/q/w") == 2.0
    with pytest.raises(ValueError, match="mlp/up/kernel: no rule"):
        scale.of("mlp/up/kernel")


class Product(nnx.Module):
    """A weight `w` and what is computed of it."""

    def __init__(self, compute, *shape):
        self.w, self.compute = nnx.Param(normal(7, *shape)), compute

    def __call__(self, x):
        return self.compute(x, self.w[...])


def dot(x, w, axis=0):
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())))


def adapted(modules, x, rules=None, **config):
    """Modules one after the other, adapted by our provider, and the provider."""
    import qwix

    config = nn.LoRAConfig(**{"rank": 2, "b_init": jax.nn.initializers.normal(1.0), **config})
    rule = integrations.qwix.LoRARule(config=config)
    provider = integrations.qwix.LoRAProvider(rules or [rule])
    model = nnx.Sequential(*modules)
    return qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1)), provider


def test_scales_that_differ_by_operation_are_refused():
    """Scales of rules that tell operations apart: an error, for the path tells none."""
    import qwix

    rule = integrations.qwix.LoRARule
    of = lambda alpha: nn.LoRAConfig(rank=2, alpha=alpha)
    rules = [rule(module_path=".*", op_names=("einsum",), config=of(2.0)), rule(config=of(20.0))]
    einsum = Product(lambda x, w: jnp.einsum("bd,df->bf", x, w), 6, 6)
    model, provider = adapted([einsum, Product(dot, 6, 6)], normal(1, 2, 6), rules)
    factors = nnx.state(model, nnx.LoRAParam)
    with pytest.raises(
        ValueError, match=r"layers/0/w: .*10 for dot_general, 1 for einsum.*scales_"
    ):
        describe(factors, scale=integrations.qwix.scales_of(provider))
    same = [rule(op_names=("einsum", "dot_general"), config=of(4.0)), rule(config=of(9.0))]
    scale_of = integrations.qwix.scales_of
    assert scale_of(integrations.qwix.LoRAProvider(same)).of("l/w") == of(4.0).scale
    only = [rule(module_path=".*", op_names=("einsum",), config=of(4.0)), qwix.QuantizationRule()]
    assert scale_of(integrations.qwix.LoRAProvider(only)).of("l/w") == of(4.0).scale


def test_a_weight_that_is_used_in_two_ways_is_refused():
    """A weight used as W and as its transpose: an error by name, on NNX and on Linen."""
    import qwix

    x, tied = normal(1, 3, 6), lambda x, w: dot(dot(x, w), w, axis=1)
    for shape in ((6, 6), (6, 5)):
        with pytest.raises(ValueError, match=r"layers/0/w is used in two ways.*module_path"):
            adapted([Product(tied, *shape)], x)
    twice, _ = adapted([Product(lambda x, w: dot(dot(x, w), w), 6, 6)], x)  # in one way
    layer = twice.layers[0]
    w = layer.w[...] + nn.LoRAConfig(rank=2).scale * layer.w_lora_a[...] @ layer.w_lora_b[...]
    np.testing.assert_allclose(twice(x), x @ w @ w, rtol=1e-4, atol=1e-4)

    class Tied(linen.Module):
        @linen.compact
        def __call__(self, x):
            return tied(x, self.param("w", linen.initializers.ones, (6, 6)))

    rule = integrations.qwix.LoRARule(config=nn.LoRAConfig(rank=2))
    model = qwix.apply_lora_to_model(Tied(), integrations.qwix.LoRAProvider([rule]))
    with pytest.raises(ValueError, match=r"w is used in two ways"):
        model.init(jax.random.key(0), x)


def test_operations_that_our_provider_does_not_adapt_are_refused():
    """Convolutions and einsums of three operands: an error by name, unless the rule leaves them."""
    numbers = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers
    )
    three = lambda x, w: jnp.einsum("bd,df,f->bf", x, w, jnp.ones(5))
    rules = [
        integrations.qwix.LoRARule(op_names=("dot_general",), config=nn.LoRAConfig(rank=2)),
    ]
    for compute, shape, x, match in (
        (convolve, (3, 3, 4, 5), normal(1, 2, 6, 6, 4), "does not adapt convolutions"),
        (three, (6, 5), normal(1, 3, 6), "does not adapt the einsum 'bd,df,f->bf'"),
    ):
        with pytest.raises(ValueError, match=rf"layers/0/w: LoRAProvider {match}.*op_names"):
            adapted([Product(compute, *shape)], x)
        model, _ = adapted([Product(compute, *shape), Product(dot, 5, 4)], x, rules)
        assert [pair.path for pair in find_pairs(nnx.state(model, nnx.LoRAParam)).pairs] == [
            "layers/1/w"
        ]


@pytest.mark.parametrize("equation", ["bd,df", "fd,da", "...d,df"])
def test_an_einsum_without_an_arrow_is_adapted(equation):
    """An einsum whose output is implicit: adapted as the one that is written out."""
    x = normal(1, 3, 6)
    model, _ = adapted([Product(lambda x, w: jnp.einsum(equation, x, w), 6, 5)], x)
    layer, scale = model.layers[0], nn.LoRAConfig(rank=2).scale
    w = layer.w[...] + scale * layer.w_lora_a[...] @ layer.w_lora_b[...]
    np.testing.assert_allclose(model(x), jnp.einsum(equation, x, w), rtol=1e-4, atol=1e-4)


def test_evaluation_turns_dropout_off():
    """NNX: `model.eval()` turns the dropout of our provider off, `model.train()` on."""
    x = normal(1, 3, 6)
    model, _ = adapted([Product(dot, 6, 5)], x, dropout=0.5)
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))
    model.train()
    model.set_attributes(qwix_rngs=nnx.Rngs(5))
    assert jnp.abs(model(x) - model(x)).max() > 0.1


@pytest.mark.parametrize("extra", EXTRAS)
def test_specs_of_our_provider_say_the_layout(extra):
    """As many experts as the rank: `specs.from_qwix` says the layout of our provider's pairs."""
    x, einsum = normal(1, 2, 3, 6), lambda x, w: jnp.einsum("ebd,edf->ebf", x, w)
    model, _ = adapted([Product(einsum, 2, 6, 5)], x, extra=EXTRAS[extra])
    factors = nnx.state(model, nnx.LoRAParam)
    with pytest.raises(ValueError, match="in 2 ways"):
        find_pairs(factors)
    [pair] = find_pairs(factors, specs.from_qwix(model)).take(factors)
    assert (pair.a.shape, pair.b.shape) == ((2, 6, 2), (2, 2, 5))
    wanted = {"plain": "LoRAPair", "shadows": "ShadowedPair", "frames": "FramedPair"}
    assert type(pair).__name__ == wanted[extra]
