"""NNX and Linen modules with `Shadows`: layers that OPLoRA can train, made by one argument."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from lowrank_optax import LoRAPair, ShadowedPair, nn, oplora, oplora_proj, shadow
from lowrank_optax._core import krylov

KEY = jax.random.key(0)
NORMAL = jax.nn.initializers.normal(1.0)
PLAIN = nn.LoRAConfig(rank=2, alpha=3.0, b_init=NORMAL)
# Two iterations: the bases then have quadratic, cubic and quartic elements of both sides.
SHADOWED = dataclasses.replace(PLAIN, extra=nn.Shadows(iterations=2, momentum_rank=1))
SETTINGS: dict[str, Any] = {"rank": 2, "alpha": 3.0, "b_init": NORMAL}
WRT = nnx.DiffState(0, nnx.LoRAParam)


def normal(shape, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def pure(module, filters: Any = nnx.LoRAParam):
    """The leaves of an NNX module, by name and without the prefix that all adapters have."""
    return strip(jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, filters))))


def strip(tree):
    if not isinstance(tree, dict):
        return tree
    return {str(k).removeprefix("lora_"): strip(v) for k, v in tree.items()}


def assert_close(actual, expected, tolerance=1e-4):
    """Compares two trees leaf by leaf, each relative to its largest number."""

    def compare(path, x, y):
        error = 1e-30 + tolerance * np.abs(y).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=error, err_msg=jax.tree_util.keystr(path))

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(compare, actual, expected)


def assert_bases_are_of(gradient, pair, grads):
    """Compares the products with those that the full gradient of the kernel gives."""
    g = 1.5 * np.asarray(gradient, np.float64)  # of the product a b: s times that of the kernel
    a = [np.concatenate([pair["a"], pair["m_a"]], axis=-1)]
    b = [np.concatenate([pair["b"], pair["m_b"]], axis=-2)]
    for i in range(4):
        a.append(g @ b[i].swapaxes(-1, -2))
        b.append(a[i].swapaxes(-1, -2) @ g)
    bases, _ = krylov.unpack(ShadowedPair(**pair), ShadowedPair(**grads))
    assert_close(bases, {"a": a[:4], "b": b[:5]})


NNX_LAYERS: dict[str, Any] = {
    "linear, one token": (lambda **kw: nn.LoRALinear(4, 6, use_bias=False, **kw), (4,)),
    "general, axes apart": (
        lambda **kw: nn.LoRALinearGeneral((2, 4), 6, axis=(0, -1), **kw),
        (2, 5, 4),
    ),
    "general, batch": (lambda **kw: nn.LoRALinearGeneral(4, 6, batch_axis={0: 3}, **kw), (3, 5, 4)),
    "einsum": (lambda **kw: nn.LoRAEinsum("BTD,NDH->BTNH", (2, 4, 3), **kw), (3, 5, 4)),
    "einsum, two batch axes": (
        lambda **kw: nn.LoRAEinsum("XTDE,EDXF->TXFE", (3, 4, 2, 6), **kw),
        (2, 5, 4, 3),
    ),
}


@pytest.mark.parametrize(("make", "x_shape"), NNX_LAYERS.values(), ids=NNX_LAYERS)
def test_nnx_layers_return_the_products_of_their_full_gradient(make, x_shape):
    x = normal(x_shape)

    @nnx.jit
    def run():
        plain, layer = (make(lora=lora, rngs=nnx.Rngs(0)) for lora in (PLAIN, SHADOWED))
        layer.lora_m_b[...] = NORMAL(KEY, layer.lora_m_b.shape)  # starts at zero
        loss = lambda layer: jnp.sum(jnp.sin(layer(x)))
        outputs = plain(x), layer(x)
        kernel = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.PathContains("kernel")))(layer)
        gradient = layer.axes.to_matrix(kernel["base"]["kernel"][...])
        return outputs, gradient, layer, *(nnx.grad(loss, argnums=WRT)(m) for m in (plain, layer))

    (y_plain, y), gradient, layer, plain_grads, grads = run()
    plain_grads, grads = (strip(nnx.to_pure_dict(tree)) for tree in (plain_grads, grads))
    np.testing.assert_array_equal(y, y_plain)
    assert_close({side: grads[side] for side in "ab"}, plain_grads)
    assert_bases_are_of(gradient, pure(layer), grads)
    assert isinstance(layer.pair, ShadowedPair)


LINEN_LAYERS: dict[str, Any] = {
    "dense": (linen.Dense, nn.LoRADense, {"features": 6}, (3, 5, 4)),
    "general, batch": (
        linen.DenseGeneral,
        nn.LoRADenseGeneral,
        {"features": (6,), "batch_dims": (0,)},
        (3, 5, 4),
    ),
    "einsum, experts": (
        linen.Einsum,
        nn.LoRAEinsumDense,
        {"shape": (3, 4, 6), "einsum_str": "BTED,EDF->BTEF"},
        (2, 5, 3, 4),
    ),
}


@pytest.mark.parametrize(
    ("base", "module", "fields", "shape"), LINEN_LAYERS.values(), ids=LINEN_LAYERS
)
def test_linen_layers_return_the_products_of_their_full_gradient(base, module, fields, shape):
    x, base = normal(shape), base(**fields)
    plain, layer = (module(**fields, lora=lora) for lora in (PLAIN, SHADOWED))

    @jax.jit
    def run(key):
        y_plain, variables_plain = plain.init_with_output(key, x)
        variables = layer.init(key, x)
        m_b = NORMAL(key, variables["lora"]["lora_m_b"].shape)
        variables = {**variables, "lora": {**variables["lora"], "lora_m_b": m_b}}

        def loss(variables, apply=layer.apply):
            y = apply(variables, x)
            return jnp.sum(jnp.sin(y)), y

        def intercepted(variables, x):  # the variables say that there are shadows
            with nn.lora_interceptor("", nn.LoRAConfig(rank=2, alpha=3.0)):
                return base.apply(variables, x)

        grads, y = jax.grad(loss, has_aux=True)(variables)
        grads_plain, _ = jax.grad(loss, has_aux=True)(variables_plain, plain.apply)
        others = jax.grad(loss, has_aux=True)(variables, intercepted)
        [adapter] = nn.lora_adapters(layer, variables, x).values()
        gradient = adapter.axes.to_matrix(grads["params"]["kernel"])
        return variables, grads, y, grads_plain, y_plain, gradient, others

    variables, grads, y, grads_plain, y_plain, gradient, others = run(KEY)
    np.testing.assert_array_equal(y, y_plain)
    assert_close(others, (grads, y))
    pair, grads, grads_plain = (strip(tree["lora"]) for tree in (variables, grads, grads_plain))
    assert_close({side: grads[side] for side in "ab"}, grads_plain)
    assert_bases_are_of(gradient, pair, grads)


def test_shadows_are_float32_leaves_beside_unchanged_factors():
    def make(**settings):
        lora = dataclasses.replace(PLAIN, **settings)
        return nn.LoRAEinsum("BTED,EDF->BTEF", (3, 4, 6), lora=lora, rngs=nnx.Rngs(0))

    plain, layer = pure(make()), pure(make(extra=nn.Shadows()))
    node = shadow(LoRAPair(jnp.ones((3, 4, 2)), jnp.ones((3, 2, 6))), KEY)
    assert jax.tree.map(np.shape, ShadowedPair(**layer)) == jax.tree.map(np.shape, node)
    for side in "ab":  # the same key draws the same factors
        np.testing.assert_array_equal(layer[side], plain[side])
    assert not np.any(layer["m_b"])
    assert not np.any(layer["krylov_b"])
    draws = [*layer["m_a"], *layer["a"]]  # of each expert: all different, or the bases lose rank
    assert not any(np.allclose(x, y) for i, x in enumerate(draws) for y in draws[:i])

    dtypes = jax.tree.map(
        lambda leaf: leaf.dtype.name,
        pure(make(extra=nn.Shadows(), param_dtype=jnp.bfloat16)),
    )
    assert dtypes.pop("a") == dtypes.pop("b") == "bfloat16"
    assert dtypes == dict.fromkeys(["m_a", "m_b", "krylov_b", "checksum"], "float32")

    jacobi = pure(make(extra=nn.Shadows(iterations=0, momentum_rank=0)))
    assert set(jacobi) == {"a", "b"}
    without = pure(make(extra=nn.Shadows(iterations=0)))
    assert set(without) == {"a", "b", "m_a", "m_b", "checksum"}


class MLP(nnx.Module):
    def __init__(self, rngs=None, **options):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.first = nnx.Linear(5, 8, rngs=rngs, **options)
        self.second = nnx.Linear(8, 4, rngs=rngs, **options)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


X, TARGET = normal((32, 5)), normal((32, 4), seed=2)


def adapted(extra, model=None, **settings):
    model = MLP() if model is None else model
    config = nn.LoRAConfig(**{"rank": 2, "alpha": 3.0, "extra": extra, **settings})
    nn.add_lora(model, "first|second", config, rngs=nnx.Rngs(1))
    return model


def train(model, tx, steps, x=X, target=TARGET):
    """Trains the adapters; returns losses, adapters after each step, and the optimizer's state."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x) - target).astype(jnp.float32) ** 2)
        value, grads = nnx.value_and_grad(loss, argnums=WRT)(model)
        optimizer.update(model, grads)
        return value

    losses, states = [], [pure(model)]
    for _ in range(steps):
        losses.append(float(step(model, optimizer)))
        states.append(pure(model))
    return losses, states, nnx.to_pure_dict(nnx.state(optimizer))


def functional_run(weights, begin, config, tx, steps):
    """The same training by hand: pairs from `shadow`, applied by `lora_apply`."""

    def start(leaves):
        pair = LoRAPair(jnp.array(leaves["a"]), jnp.array(leaves["b"]))
        node = shadow(pair, KEY, iterations=config.iterations, momentum_rank=config.momentum_rank)
        return node if node.m_a is None else node._replace(m_a=jnp.array(leaves["m_a"]))

    def loss(params):
        layer = lambda x, name: (
            x @ weights[name]["kernel"]
            + weights[name]["bias"]
            + nn.lora_apply(x, params[name], 1.5)
        )
        return jnp.mean((layer(jnp.tanh(layer(X, "first")), "second") - TARGET) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = {name: start(leaves) for name, leaves in begin.items()}
    state, states = tx.init(params), [params]
    for _ in range(steps):
        params, state = step(params, state)
        states.append(params)
    present = lambda node: {k: v for k, v in node._asdict().items() if v is not None}
    return [{name: present(node) for name, node in params.items()} for params in states]


METHODS: dict[str, Any] = {
    "oplora": (oplora, (0.3,), {}, nn.Shadows()),
    "Jacobi": (oplora, (0.1,), {"iterations": 0}, nn.Shadows(iterations=0)),
    "oplora_proj": (oplora_proj, (0.3,), {}, nn.Shadows(iterations=2, momentum_rank=0)),
}


@pytest.mark.parametrize(("method", "args", "keywords", "config"), METHODS.values(), ids=METHODS)
def test_nnx_training_equals_the_functional_one(method, args, keywords, config):
    model = adapted(config)
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    before = pure(model, frozen)
    tx = method(*args, **keywords, scale=nn.lora_scales(model))
    losses, states, optimizer = train(model, tx, 12)
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer["opt_state"]["skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, pure(model, frozen), before)

    weights = {name: layer["base"] for name, layer in before.items()}
    tx = method(*args, **keywords, scale=1.5)
    for state, expected in zip(
        states, functional_run(weights, states[0], config, tx, 12), strict=True
    ):
        assert_close(state, expected, 1e-3)


class LinenMLP(linen.Module):
    lora: nn.LoRAConfig | None = None

    @linen.compact
    def __call__(self, x):
        def dense(features, name):
            if self.lora is None:
                return linen.Dense(features, name=name)
            return nn.LoRADense(features, lora=self.lora, name=name)

        return dense(4, "second")(jnp.tanh(dense(8, "first")(x)))


@pytest.mark.parametrize(("name", "intercepted"), [("oplora", False), ("oplora_proj", True)])
def test_linen_training_equals_the_functional_one(name, intercepted):
    method, args, keywords, config = METHODS[name]
    lora = nn.LoRAConfig(rank=2, alpha=3.0, extra=config)
    if intercepted:
        model: Any = LinenMLP()
        with nn.lora_interceptor("first|second", nn.LoRAConfig(rank=2, alpha=3.0, extra=config)):
            variables = model.init(KEY, X)
    else:
        model = LinenMLP(lora)
        variables = model.init(KEY, X)
    tx = method(*args, **keywords, scale=1.5)

    @jax.jit
    def step(leaves, state):
        def loss(leaves):
            tree = {**variables, "lora": leaves}
            if not intercepted:
                return jnp.mean((model.apply(tree, X) - TARGET) ** 2)
            with nn.lora_interceptor("first|second", nn.LoRAConfig(rank=2, alpha=3.0)):
                return jnp.mean((model.apply(tree, X) - TARGET) ** 2)

        value, grads = jax.value_and_grad(loss)(leaves)
        updates, state = tx.update(grads, state, leaves)
        return optax.apply_updates(leaves, updates), state, value

    leaves = variables["lora"]
    state, states, losses = tx.init(leaves), [strip(leaves)], []
    for _ in range(12):
        leaves, state, value = step(leaves, state)
        states.append(strip(leaves))
        losses.append(value)
    assert losses[-1] < 0.8 * losses[0]
    assert state.skipped == 0
    expected = functional_run(variables["params"], states[0], config, tx, 12)
    for actual, reference in zip(states, expected, strict=True):
        assert_close(actual, reference, 1e-3)


class Attention(nnx.Module):
    def __init__(self):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.attention(x)


def test_attention_of_an_existing_model_is_trained_and_merged():
    model, x = Attention(), normal((2, 3, 8))
    forward = nnx.jit(lambda model, x: model(x))
    plain = forward(model, x)
    rngs = nnx.Rngs(1)
    assert nn.add_lora(
        model, "query|out", nn.LoRAConfig(rank=2, extra=nn.Shadows()), rngs=rngs
    ) == [
        "attention/out",
        "attention/query",
    ]
    assert isinstance(model.attention.query.pair, ShadowedPair)
    np.testing.assert_array_equal(forward(model, x), plain)

    losses, *_ = train(model, oplora(0.3, scale=nn.lora_scales(model)), 10, x, jnp.sin(x))
    assert losses[-1] < 0.9 * losses[0]

    y, leaves = forward(model, x), pure(model)
    assert np.abs(y - plain).max() > 0.1
    nn.merge_lora(model)
    np.testing.assert_allclose(forward(model, x), y, atol=1e-5)
    nn.unmerge_lora(model)
    np.testing.assert_allclose(forward(model, x), y, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, pure(model), leaves)
    nn.remove_lora(model)
    np.testing.assert_allclose(forward(model, x), plain, atol=1e-5)
    assert pure(model) == {}


def test_linen_variables_with_shadows_merge_and_unmerge():
    model = LinenMLP()
    with nn.lora_interceptor("first", nn.LoRAConfig(**SETTINGS, extra=nn.Shadows())) as adapters:
        y, variables = model.init_with_output(KEY, X)
    merged = nn.merge_lora_variables(variables, adapters)
    np.testing.assert_allclose(model.apply({"params": merged}, X), y, atol=1e-5)
    back = nn.unmerge_lora_variables({**variables, "params": merged}, adapters)
    assert_close(back, variables["params"])


@pytest.mark.parametrize(
    ("config", "tx"),
    [
        (None, oplora(0.1)),
        (nn.Shadows(momentum_rank=0), oplora(0.1)),
        (nn.Shadows(iterations=1), oplora(0.1, iterations=2)),
        (nn.Shadows(), oplora_proj(0.1)),
    ],
)
def test_a_model_without_the_shadows_that_the_optimizer_needs_is_refused(config, tx):
    with pytest.raises(ValueError, match=r"^first: oplora.* needs a pair with shadows: .*shadow\("):
        nnx.Optimizer(adapted(config), tx, wrt=nnx.LoRAParam)


def test_an_adapter_used_twice_in_a_forward_pass_is_not_moved_but_counted():
    class Twice(nnx.Module):
        def __init__(self):
            lora = dataclasses.replace(PLAIN, extra=nn.Shadows())
            self.layer = nn.LoRALinear(5, 5, lora=lora, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(jnp.tanh(self.layer(x)))

    model = Twice()
    _, states, optimizer = train(model, oplora(0.1, scale=1.5), 2, X, X)
    assert optimizer["opt_state"]["skipped"] == 2
    jax.tree.map(np.testing.assert_array_equal, states[-1], states[0])


def test_a_bfloat16_model_is_trained_with_float32_shadows():
    model = adapted(nn.Shadows(), MLP(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16))
    x = X.astype(jnp.bfloat16)
    assert model(x).dtype == jnp.bfloat16
    losses, states, optimizer = train(model, oplora(0.3, scale=1.5), 20, x)
    assert losses[-1] < 0.85 * losses[0]
    assert optimizer["opt_state"]["skipped"] == 0
    for leaf in jax.tree.leaves([states[0], states[-1]]):
        assert leaf.dtype == jnp.float32


def test_the_dtype_of_the_adapter_rounds_no_more_than_without_shadows():
    plain, layer = (
        nn.LoRALinear(5, 5, lora=dataclasses.replace(lora, dtype=jnp.bfloat16), rngs=nnx.Rngs(0))
        for lora in (PLAIN, SHADOWED)
    )
    np.testing.assert_array_equal(layer(X), plain(X))


@pytest.mark.parametrize("spec", [jax.P("d", None), jax.P(None, "d")])
def test_inputs_with_explicit_shardings_work_as_without_them(spec):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    layer, x = nn.LoRALinear(4, 6, lora=SHADOWED, rngs=nnx.Rngs(0)), normal((2, 3, 4))

    @nnx.jit
    def run(layer, x):
        out = jax.typeof(x).sharding.spec
        loss = lambda layer: jnp.sum(jnp.sin(layer(x, out_sharding=out if any(out) else None)))
        return nnx.grad(loss, argnums=WRT)(layer)

    expected = run(layer, x)
    with jax.set_mesh(mesh):
        grads = run(layer, jax.device_put(x, jax.NamedSharding(mesh, spec)))
    assert_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected))


class Square(linen.Module):
    lora: nn.LoRAConfig

    @linen.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.LoRADense(5, lora=self.lora, name="dense")(x)), None


class Stack(linen.Module):
    lora: nn.LoRAConfig
    remat: bool = False

    @linen.compact
    def __call__(self, x):
        scan = linen.scan(
            linen.remat(Square) if self.remat else Square,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return scan(self.lora, name="layers")(x, None)[0]


def test_linen_scan_and_remat_over_layers_equal_the_layers_one_by_one():
    lora = dataclasses.replace(PLAIN, extra=nn.Shadows())
    model, rematted, layer = (Stack(lora), Stack(lora, remat=True), Square(lora))
    variables: Any = jax.jit(model.init)(KEY, X)
    tx = oplora(0.1, scale=1.5)
    unstack = lambda tree: [jax.tree.map(operator.itemgetter(i), tree) for i in range(3)]

    def scanned(leaves, model: Any = model):
        tree = {**variables, "lora": {"layers": leaves}}
        return jnp.sum(jnp.sin(model.apply(tree, X)))

    def one_by_one(leaves):
        x: Any = X
        for params, lora in zip(unstack(variables["params"]["layers"]), leaves, strict=True):
            x, _ = layer.apply({"params": params, "lora": lora}, x)
        return jnp.sum(jnp.sin(x))

    @jax.jit
    def run(leaves):
        results = []
        for loss, tree in ((scanned, leaves), (one_by_one, unstack(leaves))):
            grads = jax.grad(loss)(tree)
            updates, state = tx.update(grads, tx.init(tree), tree)
            results.append((grads, updates, state.skipped))
        return *results, jax.grad(scanned)(leaves, rematted)

    leaves = variables["lora"]["layers"]
    assert not np.allclose(leaves["dense"]["lora_m_a"][0], leaves["dense"]["lora_m_a"][1])
    (grads, updates, skipped), expected, grads_rematted = run(leaves)
    assert np.all(np.any(grads["dense"]["lora_krylov_b"], axis=(-2, -1)))
    assert skipped == expected[-1] == 0
    assert_close((unstack(grads), unstack(updates)), expected[:2], 1e-3)
    assert_close(grads_rematted, grads)


def test_nnx_scan_over_stacked_layers_equals_the_layers_one_by_one():
    def make(rngs):
        return nn.LoRALinear(5, 5, lora=SHADOWED, rngs=rngs)

    def base(rngs):
        return nnx.Dict(dense=nnx.Linear(5, 5, rngs=rngs))

    def stacked(make):
        return nnx.split_rngs(splits=3)(nnx.vmap(make))(nnx.Rngs(0))

    added = stacked(base)
    nn.add_lora(added, "dense", nn.LoRAConfig(**SETTINGS, extra=SHADOWED.extra), rngs=nnx.Rngs(1))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def forward(x, layer):
        return x + jnp.tanh(layer(x))

    def one_by_one(layers):
        x = X
        graphdef, state = nnx.split(layers)
        for i in range(3):
            layer = nnx.merge(graphdef, jax.tree.map(operator.itemgetter(i), state))
            x = x + jnp.tanh(layer(x))
        return jnp.sum(jnp.sin(x))

    for layers in (stacked(make), added.dense):
        assert layers.lora_m_a.shape == (3, 5, 1)
        assert not np.allclose(layers.lora_m_a[0], layers.lora_m_a[1])

    @nnx.jit
    def run(layers):
        losses = lambda layers: jnp.sum(jnp.sin(forward(X, layers))), one_by_one
        return [nnx.grad(loss, argnums=WRT)(layers) for loss in losses]

    assert_close(*map(nnx.to_pure_dict, run(added.dense)), tolerance=1e-3)


def assert_consistent(pair, grads):
    """Checks that linear and quadratic products are of one gradient: B₂ B₀ᵀ = A₁ᵀ A₁."""
    bases, _ = krylov.unpack(ShadowedPair(**pair), ShadowedPair(**grads))
    [_, a], [b, _, b_quadratic] = bases["a"], bases["b"]
    assert np.any(a)
    assert_close(b_quadratic @ b.T, a.T @ a)


def test_nnx_dropout_drops_the_same_inputs_in_all_products():
    settings: dict[str, Any] = {"alpha": 3.0, "dropout": 0.5, "b_init": NORMAL}
    plain, model = (adapted(config, **settings) for config in (None, nn.Shadows()))

    @nnx.jit
    def run(model):
        grads = nnx.grad(lambda model: jnp.mean(model(X) ** 2), argnums=WRT)(model)
        return grads, model(X), model(X)

    (grads, *outputs), (_, *others) = run(model), run(plain)
    jax.tree.map(np.testing.assert_array_equal, outputs, others)
    assert not np.allclose(*outputs)
    assert_consistent(pure(model)["first"], strip(nnx.to_pure_dict(grads))["first"])


def test_linen_dropout_drops_the_same_inputs_in_all_products():
    lora = nn.LoRAConfig(rank=2, dropout=0.5, b_init=NORMAL, extra=nn.Shadows())
    model: Any = nn.LoRADense(4, lora=lora)
    variables = model.init({"params": KEY, "dropout": KEY}, X)
    factors = {side: variables["lora"][side] for side in ("lora_a", "lora_b")}

    @jax.jit
    def run(leaves, key):
        y = model.apply({**variables, "lora": leaves}, X, rngs={"dropout": key})
        return jnp.mean(y**2), y

    gradient = jax.grad(run, has_aux=True)
    (grads, y), (_, y_plain) = (gradient(tree, KEY) for tree in (variables["lora"], factors))
    np.testing.assert_array_equal(y, y_plain)
    assert not np.allclose(y, run(variables["lora"], jax.random.key(1))[1])
    assert_consistent(strip(variables["lora"]), strip(grads))


def test_initializers_that_box_factors_with_sharding_names_work_with_shadows():
    settings = {"rank": 2, "extra": nn.Shadows()}
    boxed = linen.with_partitioning
    init: dict[str, Any] = {
        "a_init": boxed(NORMAL, ("embed", None)),
        "b_init": boxed(NORMAL, (None, "mlp")),
    }
    model: Any = nn.LoRADense(6, lora=nn.LoRAConfig(**settings, **init))
    variables = model.init(KEY, X)
    assert linen.get_partition_spec(variables)["lora"]["lora_a"] == jax.P("embed", None)
    grads = jax.grad(lambda lora: model.apply({**variables, "lora": lora}, X).sum())(
        variables["lora"]
    )
    assert np.any(grads["lora_krylov_b"])


def test_equal_shadows_give_equal_graphs_so_that_jit_does_not_retrace():
    first, second = (nnx.graphdef(adapted(nn.Shadows())) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": -1}, "`iterations` must be at least 0, got -1"),
        ({"momentum_rank": -1}, "`momentum_rank` must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        nn.Shadows(**settings)


def test_a_momentum_rank_that_a_kernel_cannot_have_names_the_layer():
    config = nn.Shadows(momentum_rank=5)
    adapted(nn.Shadows(momentum_rank=4))
    refused = r": momentum_rank 5 exceeds min\(in, out\) = 4 of its \(8, 4\) kernel; lower"
    model = MLP()
    with pytest.raises(ValueError, match="^second" + refused):
        adapted(config, model)
    assert nnx.graphdef(model) == nnx.graphdef(MLP())  # left alone
    lora = dataclasses.replace(PLAIN, extra=config)
    with pytest.raises(ValueError, match="^LoRALinear" + refused):
        nn.LoRALinear(8, 4, lora=lora, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="^second" + refused):
        LinenMLP(lora).init(KEY, X)
    with (
        pytest.raises(ValueError, match="^second" + refused),
        nn.lora_interceptor("first|second", nn.LoRAConfig(rank=2, extra=config)),
    ):
        LinenMLP().init(KEY, X)
