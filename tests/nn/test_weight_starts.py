"""Starts from the weights against dense decompositions; the model computes what it did."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding

from lowrank_optax import adapters, altlora_plus, lora_rite, nn, polora

METHODS = ["pissa", "pissa_fast", "olora"]
RANK, IN, HIDDEN, OUT = 2, 10, 8, 6


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X = normal(0, 40, IN)


class MLP(nnx.Module):
    def __init__(self, rngs, **options):
        self.first = nnx.Linear(IN, HIDDEN, rngs=rngs, **options)
        self.second = nnx.Linear(HIDDEN, OUT, rngs=rngs, **options)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def adapted(options=None, **settings):
    model = MLP(nnx.Rngs(0), **(options or {}))
    config = nn.LoRAConfig(**{"rank": RANK, "alpha": 3.0, **settings})
    nn.add_lora(model, "first|second", config, rngs=nnx.Rngs(1))
    return model


def start(model, method="pissa", **keywords):
    return nn.weight_start(model, method, progress=False, **keywords)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_takes_the_leading_singular_triplets(rslora):
    model = adapted(rslora=rslora)
    kernel = np.asarray(model.first.kernel[...], np.float64)
    assert start(model) == ["first", "second"]
    u, sigma, v = np.linalg.svd(kernel)
    a, b = model.first.pair
    leading = (u[:, :RANK] * sigma[:RANK]) @ v[:RANK]
    np.testing.assert_allclose(model.first.scale * a @ b, leading, atol=1e-5)
    np.testing.assert_allclose(model.first.kernel[...], kernel - leading, atol=1e-5)
    for gram in (a.T @ a, b @ b.T):
        np.testing.assert_allclose(gram, np.diag(sigma[:RANK] / model.first.scale), atol=1e-5)


def test_olora_takes_rows_of_r_and_columns_of_q():
    """As in PEFT: its weight is Kᵀ = Q R, B is of Q, A of R, and s B A is subtracted."""
    model = adapted()
    kernel = np.asarray(model.first.kernel[...], np.float64)
    start(model, "olora")
    q, r = np.linalg.qr(kernel.T)
    a, b = model.first.pair
    np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-6)
    np.testing.assert_allclose(np.abs(b @ q), np.eye(RANK, HIDDEN), atol=1e-5)
    np.testing.assert_allclose(a @ b, (q[:, :RANK] @ r[:RANK]).T, atol=1e-5)
    left = kernel - model.first.scale * (q[:, :RANK] @ r[:RANK]).T
    np.testing.assert_allclose(model.first.kernel[...], left, atol=1e-5)


def test_the_fast_start_finds_the_same_triplets():
    exact, fast = adapted(), adapted()
    start(exact)
    start(fast, "pissa_fast", iterations=60)
    for one, two in ((exact.first, fast.first), (exact.second, fast.second)):
        np.testing.assert_allclose(one.pair.a @ one.pair.b, two.pair.a @ two.pair.b, atol=1e-4)
    rough = adapted()
    start(rough, "pissa_fast", iterations=0)
    assert jnp.max(jnp.abs(rough.first.pair.a @ rough.first.pair.b)) > 0
    np.testing.assert_allclose(rough(X), adapted()(X), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"b_init": jax.nn.initializers.ones}, {"rank": OUT}]
    + [{"extra": extra} for extra in (nn.Frames(), nn.Shadows())],
    ids=["plain", "rslora", "b", "full", "frames", "shadows"],
)
def test_the_model_computes_what_it_did(method, settings):
    model = adapted(**settings)
    before, kernel = model(X), model.first.kernel[...]
    start(model, method)
    np.testing.assert_allclose(model(X), before, atol=2e-5)
    assert jnp.max(jnp.abs(model.first.kernel[...] - kernel)) > 0.1
    assert jnp.any(model.first.pair.b)


def test_what_an_adapter_carries_follows_its_factors():
    framed, shadowed = adapted(extra=nn.Frames()), adapted(extra=nn.Shadows())
    start(framed)
    start(shadowed)
    np.testing.assert_array_equal(framed.first.pair.f_in, framed.first.pair.a)
    assert jnp.any(shadowed.first.pair.m_a)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_call_changes_no_more_than_rounding(method):
    model = adapted()
    before = model(X)
    start(model, method)
    kernel, product = model.first.kernel[...], model.first.pair.a @ model.first.pair.b
    start(model, method)
    np.testing.assert_allclose(model.first.kernel[...], kernel, atol=1e-5)
    np.testing.assert_allclose(model.first.pair.a @ model.first.pair.b, product, atol=1e-5)
    np.testing.assert_allclose(model(X), before, atol=2e-5)


def test_a_trained_adapter_counts_to_the_kernel():
    model = adapted()
    start(model)
    model.first.lora_b[...] += 0.1
    trained = model(X)
    start(model, "olora")
    np.testing.assert_allclose(model(X), trained, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_in_double_precision_to_its_rounding(method, x64):
    options = {"param_dtype": jnp.float64}
    model = adapted(options, param_dtype=jnp.float64)
    before = model(X.astype(jnp.float64))
    start(model, method)
    np.testing.assert_allclose(model(X.astype(jnp.float64)), before, atol=1e-13)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_kernel_is_kept_to_its_rounding(method, param_dtype):
    """What is left is rounded once, after the factors: half a unit in the last place of it."""
    model = adapted({"param_dtype": jnp.bfloat16}, param_dtype=param_dtype)
    kernel = np.asarray(model.first.kernel[...], np.float64)
    start(model, method)
    layer = model.first
    assert layer.kernel.dtype == jnp.bfloat16
    assert layer.pair.a.dtype == param_dtype
    left = np.asarray(layer.kernel[...], np.float64)
    a, b = (np.asarray(x, np.float64) for x in layer.pair)
    rounding = 2.0**-8 * np.maximum(np.abs(left), 2.0**-100)
    assert np.all(np.abs(left + layer.scale * a @ b - kernel) <= rounding + 1e-6)


LAYERS = {
    "to heads": (lambda rngs: nnx.LinearGeneral(8, (2, 3), rngs=rngs), (5, 8)),
    "from heads": (lambda rngs: nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=rngs), (5, 2, 3)),
    "einsum": (lambda rngs: nnx.Einsum("td,ndh->tnh", (2, 8, 3), rngs=rngs), (5, 8)),
    "experts": (lambda rngs: nnx.Einsum("etd,edf->etf", (3, 8, 4), rngs=rngs), (3, 5, 8)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_with_several_axes(name, method):
    make, shape = LAYERS[name]
    model, x = nnx.Sequential(make(nnx.Rngs(0))), normal(1, *shape)
    nn.add_lora(model, "layers/0", nn.LoRAConfig(RANK, 3.0), rngs=nnx.Rngs(1))
    layer, before = model.layers[0], model(x)
    full = np.asarray(layer.axes.to_matrix(layer.kernel[...]))
    start(model, method)
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    left = layer.axes.to_matrix(layer.kernel[...])
    np.testing.assert_allclose(full - left, nn.lora_delta(layer.pair, layer.scale), atol=1e-5)
    if method == "pissa":
        values = np.linalg.svd(left, compute_uv=False)
        expected = np.linalg.svd(full, compute_uv=False)[..., RANK:]
        np.testing.assert_allclose(values[..., : expected.shape[-1]], expected, atol=1e-5)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_stacked_layers_start_as_each_alone(method):
    @nnx.vmap
    def make(key):
        return nnx.Linear(IN, OUT, rngs=nnx.Rngs(key))

    model = nnx.Sequential(make(jax.random.split(jax.random.key(0), 3)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(RANK, 3.0), rngs=nnx.Rngs(1))
    kernels, layer = model.layers[0].kernel[...], model.layers[0]
    start(model, method)
    for index in range(3):
        pair, rest = nn.split_kernel(kernels[index], RANK, method, scale=layer.scale)
        np.testing.assert_allclose(
            layer.pair.a[index] @ layer.pair.b[index], pair.a @ pair.b, atol=1e-5
        )
        np.testing.assert_allclose(layer.kernel[...][index], rest, atol=1e-5)


OPTIMIZERS = {
    "adamw": lambda scales: optax.adamw(1e-2),
    "polora": lambda scales: polora(0.1, scale=scales),
    "altlora_plus": lambda scales: altlora_plus(1e-2, scale=scales),
    "lora_rite": lambda scales: lora_rite(1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_optimizer_trains_from_every_start(method, optimizer):
    model, target = adapted(), normal(2, 40, OUT)
    start(model, method)
    frozen = model.first.kernel[...]
    tx = nnx.Optimizer(model, OPTIMIZERS[optimizer](nn.lora_scales(model)), wrt=nnx.LoRAParam)
    loss_fn = lambda model: jnp.mean((model(X) - target) ** 2)

    @nnx.jit
    def step(model, tx):
        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        tx.update(model, grads)
        return loss

    losses = [step(model, tx) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_array_equal(model.first.kernel[...], frozen)


@pytest.mark.parametrize("method", METHODS)
def test_linen_and_plain_trees(method):
    model = linen.Sequential([linen.Dense(HIDDEN), linen.tanh, linen.Dense(OUT)])
    config = nn.LoRAConfig(RANK, 3.0)
    with nn.lora_interceptor("layers_0", config) as found:
        variables = model.init(jax.random.key(0), X)
    params, lora = jax.tree.map(jnp.asarray, (variables["params"], variables["lora"]))
    for path, adapter in found.items():
        kernel = params[path][adapter.kernel]
        pair, rest = nn.split_kernel(
            kernel, config.rank, method, scale=adapter.scale, axes=adapter.axes
        )
        params[path][adapter.kernel] = rest
        lora[path] = {"lora_a": pair.a, "lora_b": pair.b}
    started = {"params": params, "lora": lora}
    with nn.lora_interceptor("layers_0", config):
        y = model.apply(started, X)
    expected = model.apply({"params": variables["params"]}, X)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    merged = nn.merge_lora_variables(started, found)
    np.testing.assert_allclose(model.apply({"params": merged}, X), expected, atol=1e-5)
    # What a trained pair is to the original base: a pair of twice the rank.
    trained = jax.tree.map(lambda x: x + 0.1, pair)
    s = config.scale
    of_base, error = adapters.combine([trained, pair], [s, -s], 2 * RANK)
    change = s * (trained.a @ trained.b - pair.a @ pair.b)
    np.testing.assert_allclose(of_base.a @ of_base.b, change, atol=1e-5)
    assert error < 1e-6


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_kernels_stay_where_they_lie(kind):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    lying = lambda *spec: NamedSharding(mesh, jax.P(*spec))
    model, expected = adapted(), adapted()
    layer, before = model.first, model(X)
    for variable, spec in (
        (layer.kernel, ("x", "y")),
        (layer.lora_a, ("x", None)),
        (layer.lora_b, (None, "y")),
    ):
        variable.set_value(jax.device_put(variable[...], lying(*spec)))
    start(model)
    start(expected)
    assert layer.kernel[...].sharding == lying("x", "y")
    assert layer.lora_a[...].sharding == lying("x", None)
    assert layer.lora_b[...].sharding == lying(None, "y")
    for name in ("kernel", "lora_a", "lora_b"):
        ours, theirs = (np.asarray(getattr(m.first, name)[...]) for m in (model, expected))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(expected(X), before, atol=1e-5)


def test_splitting_keeps_dtype_and_place_of_a_kernel(x64):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    lying = NamedSharding(mesh, jax.P("x", "y"))
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((IN, OUT)))
    for method in METHODS:
        pair, rest = nn.split_kernel(
            jax.device_put(kernel, lying), RANK, method, scale=1.5, dtype=jnp.float64
        )
        assert rest.sharding == lying
        assert rest.dtype == pair.a.dtype == jnp.float64
        np.testing.assert_allclose(rest + 1.5 * pair.a @ pair.b, kernel, atol=1e-13)
        rounded, rest = nn.split_kernel(kernel, RANK, method, dtype=jnp.bfloat16)
        assert rounded.a.dtype == rounded.b.dtype == jnp.bfloat16
        wide = [x.astype(jnp.float64) for x in rounded]
        np.testing.assert_allclose(rest + wide[0] @ wide[1], kernel, atol=1e-6)
    leading = nn.split_kernel(kernel, RANK, dtype=jnp.float64)[0]
    u, sigma, v = np.linalg.svd(kernel)
    expected = (u[:, :RANK] * sigma[:RANK]) @ v[:RANK]
    np.testing.assert_allclose(leading.a @ leading.b, expected, atol=1e-12)


def merged(model):
    nn.merge_lora(model)


def integer(model):
    model.second.base.kernel.set_value(model.second.kernel[...].astype(jnp.int8))


def small_float(model):
    model.second.base.kernel.set_value(model.second.kernel[...].astype(jnp.float8_e4m3fn))


def of_rank_one(model):
    kernel = model.second.kernel
    kernel[...] = jnp.outer(normal(3, HIDDEN), normal(4, OUT))


def of_zeros(model):
    model.second.kernel[...] = jnp.zeros((HIDDEN, OUT))


def not_finite(model):
    model.second.kernel[...] = model.second.kernel[...].at[0, 0].set(jnp.nan)


def shared(model):
    model.third = nnx.Linear(HIDDEN, OUT, rngs=nnx.Rngs(0))
    model.third.kernel = model.second.kernel


@pytest.mark.parametrize(
    ("change", "keywords", "message"),
    [
        (merged, {}, "first: is merged; call unmerge_lora first"),
        (integer, {}, "second: a kernel of int8 cannot hold"),
        (small_float, {}, "second: a kernel of float8_e4m3fn cannot hold"),
        (of_rank_one, {}, "second: the kernel has rank 1, but PiSSA needs 2: give a lower rank"),
        (of_rank_one, {"method": "pissa_fast"}, "second: the kernel has rank 1, but PiSSA"),
        (of_zeros, {}, "second: the kernel has rank 0, but PiSSA needs 2"),
        (not_finite, {}, "second: the kernel is not finite; restore"),
        (not_finite, {"method": "olora"}, "second: the kernel is not finite; restore"),
        (shared, {}, "second: its kernel is shared by .*third.*; a change would"),
        (None, {"method": "svd"}, "`method` must be one of pissa, pissa_fast, olora"),
        (None, {"iterations": -1}, "`iterations` must be at least 0"),
    ],
)
def test_what_gives_no_start_is_refused_and_leaves_the_model_alone(change, keywords, message):
    model = adapted()
    if change is not None:
        change(model)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    with pytest.raises(ValueError, match=message):
        start(model, **keywords)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    assert not model.first.corrected


def test_a_kernel_of_low_rank_starts_by_olora():
    model = adapted()
    of_rank_one(model)
    before = model(X)
    start(model, "olora")
    np.testing.assert_allclose(model(X), before, atol=1e-5)


def test_frames_without_warmup_are_refused_by_name():
    model = adapted(extra=nn.Frames(warmup=False))
    with pytest.raises(ValueError, match=r"first: an adapter with Frames\(warmup=False\) starts"):
        start(model)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rank": 7}, r"the kernel: rank 7 exceeds min\(in, out\) = 6 of its \(10, 6\) kernel"),
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"scale": 0.0}, "`scale` must be positive"),
        ({"kernel": jnp.ones((10, 6), jnp.int8)}, "a kernel of int8 cannot hold"),
        ({"kernel": jnp.ones((10, 6))}, "the kernel has rank 1, but PiSSA needs 2"),
    ],
)
def test_kernels_that_cannot_be_split_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        nn.split_kernel(**{"kernel": normal(0, 10, 6), "rank": 2, **keywords})


def test_merging_after_a_start_is_right():
    model = adapted()
    before = model(X)
    start(model)
    model.first.lora_b[...] += 0.1
    trained = model(X)
    assert jnp.max(jnp.abs(trained - before)) > 0.01
    nn.unload_lora(model)
    np.testing.assert_allclose(model(X), trained, atol=1e-5)


def gradient_start(model, **keywords):
    loss = lambda model, x: jnp.mean((model(x) - 1) ** 2)
    return nn.gradient_start(model, loss, [X], progress=False, **keywords)


@pytest.mark.parametrize("first", [start, lambda m: gradient_start(m, keep_function=True)])
def test_a_kernel_that_a_start_has_changed_is_not_taken_for_the_original(first):
    model = adapted()
    first(model)
    with pytest.raises(ValueError, match=r"first: a start has changed its kernel, .*unload_lora"):
        nn.remove_lora(model)
    with pytest.raises(ValueError, match="first: a start has changed its kernel already; start a"):
        gradient_start(model)
    before = model(X)
    start(model)
    np.testing.assert_allclose(model(X), before, atol=1e-5)


def test_a_gradient_start_does_not_correct_shared_kernels():
    model = adapted()
    shared(model)
    gradient_start(model)
    with pytest.raises(ValueError, match="second: its kernel is shared by"):
        gradient_start(model, keep_function=True)


KINDS = {
    "convolution": (lambda rngs: nnx.Conv(3, 6, (3, 2), rngs=rngs), (2, 7, 6, 3), {}),
    "embedding": (lambda rngs: nnx.Embed(7, 6, rngs=rngs), None, {}),
    "DoRA": (lambda rngs: nnx.Linear(5, 6, rngs=rngs), (4, 5), {"dora": True}),
}


@pytest.mark.parametrize(("make", "shape", "options"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_other_kinds_of_layers_keep_their_function(make, shape, options, method):
    model = nnx.Sequential(make(nnx.Rngs(0)))
    x = jnp.array([[3, 0, 6]]) if shape is None else jax.random.normal(jax.random.key(1), shape)
    before, kernel = model(x), jax.tree.map(jnp.copy, nnx.state(model.layers[0]))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=2, **options), rngs=nnx.Rngs(1))
    nn.weight_start(model, method, progress=False)
    np.testing.assert_allclose(model(x), before, rtol=1e-4, atol=1e-5)
    layer = model.layers[0]
    assert float(jnp.abs(layer.lora_b[...]).max()) > 0.1
    changed = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), nnx.state(layer.base), kernel)
    assert any(jax.tree.leaves(changed))
