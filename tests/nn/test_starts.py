"""Starts from the gradient against dense singular value decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lowrank_optax import LoRAPair, nn
from lowrank_optax._core.sketch import Triplets

RANK, IN, HIDDEN, OUT, TOKENS = 2, 10, 8, 6, 40


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(IN, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, OUT, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


BATCHES = [(normal(i, TOKENS, IN), normal(10 + i, TOKENS, OUT)) for i in range(2)]


def loss_fn(model, batch):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


def adapted(**settings):
    model = MLP(nnx.Rngs(0))
    config = nn.LoRAConfig(**{"rank": RANK, "alpha": 3.0, **settings})
    nn.add_lora(model, "first|second", config, rngs=nnx.Rngs(1))
    return model


def dense_gradients():
    """The mean gradient of each kernel over the batches."""
    model = MLP(nnx.Rngs(0))
    grads = [nnx.grad(loss_fn)(model, batch) for batch in BATCHES]
    return {
        name: np.mean([grad[name]["kernel"][...] for grad in grads], axis=0)
        for name in ("first", "second")
    }


def dense_svd(name):
    return np.linalg.svd(dense_gradients()[name], full_matrices=False)


def layers(model):
    return {"first": model.first, "second": model.second}


def start(model, method="lora_one", **keywords):
    keywords = {"iterations": 20, "progress": False, **keywords}
    return nn.gradient_start(model, loss_fn, BATCHES, method, **keywords)


def test_lora_one_is_the_truncated_svd_of_minus_the_gradient():
    model = adapted()
    values = start(model, gamma=64.0)
    for name, layer in layers(model).items():
        u, sigma, v = dense_svd(name)
        np.testing.assert_allclose(values[name], sigma[:RANK], rtol=1e-4)
        expected = -(u[:, :RANK] * (sigma[:RANK] / sigma[0] / 64)) @ v[:RANK]
        np.testing.assert_allclose(layer.pair.a @ layer.pair.b, expected, atol=1e-6)
        for gram in (layer.pair.a.T @ layer.pair.a, layer.pair.b @ layer.pair.b.T):
            np.testing.assert_allclose(gram, np.diag(sigma[:RANK] / sigma[0] / 64), atol=1e-6)
        np.testing.assert_array_equal(layer.base.kernel[...], layers(MLP(nnx.Rngs(0)))[name].kernel)


def test_lora_one_descends():
    model = adapted()
    before = np.mean([loss_fn(model, batch) for batch in BATCHES])
    start(model, gamma=64.0)
    assert np.mean([loss_fn(model, batch) for batch in BATCHES]) < before


def test_lora_ga_takes_the_next_right_vectors_and_keeps_the_function():
    model = adapted()
    expected = model(BATCHES[0][0])
    start(model, "lora_ga")
    np.testing.assert_allclose(model(BATCHES[0][0]), expected, atol=1e-5)
    for name, layer in layers(model).items():
        u, _, v = dense_svd(name)
        size = v.shape[1] ** 0.25 / 4
        for factor, axis, basis in (
            (layer.pair.a, 0, u[:, :RANK]),
            (layer.pair.b.T, 0, v[RANK : 2 * RANK].T),
        ):
            np.testing.assert_allclose(np.linalg.norm(factor, axis=axis), size, rtol=1e-4)
            np.testing.assert_allclose(np.abs(basis.T @ factor) / size, np.eye(RANK), atol=1e-3)


@pytest.mark.parametrize("method", ["lora_one", "lora_ga"])
def test_keeping_the_function_is_a_choice(method):
    x = BATCHES[0][0]
    kept, moved = adapted(), adapted()
    before = kept(x)
    start(kept, method, gamma=1.0, keep_function=True)
    start(moved, method, gamma=1.0, keep_function=False)
    np.testing.assert_allclose(kept(x), before, atol=1e-5)
    assert jnp.max(jnp.abs(moved(x) - before)) > 0.01


def test_frames_are_the_singular_vectors_and_the_factors_zero():
    model = adapted(extra=nn.Frames(warmup=False))
    before = model(BATCHES[0][0])
    start(model, "frames")
    for name, layer in layers(model).items():
        u, _, v = dense_svd(name)
        pair = layer.pair
        assert not jnp.any(pair.a)
        assert not jnp.any(pair.b)
        np.testing.assert_allclose(np.abs(u[:, :RANK].T @ pair.f_in), np.eye(RANK), atol=1e-3)
        np.testing.assert_allclose(np.abs(pair.f_out @ v[:RANK].T), np.eye(RANK), atol=1e-3)
    np.testing.assert_array_equal(model(BATCHES[0][0]), before)


def test_what_an_adapter_carries_follows_its_factors():
    model = adapted(extra=nn.Frames())
    start(model)
    for layer in layers(model).values():
        np.testing.assert_array_equal(layer.pair.f_in, layer.pair.a)
        np.testing.assert_array_equal(layer.pair.f_out, layer.pair.b)
    shadowed = adapted(extra=nn.Shadows())
    start(shadowed)
    plain = adapted()
    start(plain)
    np.testing.assert_array_equal(shadowed.first.pair.a, plain.first.pair.a)
    assert jnp.any(shadowed.first.pair.m_a)


def test_it_does_not_matter_what_the_adapters_hold_and_they_are_put_back_on_errors():
    model, other = adapted(), adapted(b_init=jax.nn.initializers.ones)
    start(model)
    start(other)
    np.testing.assert_allclose(model.first.pair.a, other.first.pair.a, rtol=1e-5)
    graph = nnx.graphdef(adapted())
    broken = adapted()
    with pytest.raises(RuntimeError, match="out of data"):
        nn.gradient_start(broken, fails, BATCHES, progress=False)
    assert nnx.graphdef(broken) == graph


def fails(model, batch):
    raise RuntimeError("out of data")


def test_no_gradient_of_a_kernel_is_formed():
    """No intermediate value of the gradient has the shape of the kernel."""
    model = nnx.Sequential(nnx.Linear(48, 64, use_bias=False, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=RANK), rngs=nnx.Rngs(1))
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    loss = lambda factors, x: jnp.mean(nnx.merge(graph, factors, rest)(x) ** 2)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(factors, jnp.ones((5, 48)))
    shapes = [tuple(v.aval.shape) for equation in jaxpr.eqns for v in equation.outvars]
    assert (48, RANK) in shapes
    assert (48, 64) not in shapes


def test_linen_and_plain_trees():
    model = linen.Sequential([linen.Dense(HIDDEN), linen.tanh, linen.Dense(OUT)])
    config = nn.LoRAConfig(rank=RANK, alpha=3.0)
    with nn.lora_interceptor("layers_0", config) as adapters:
        variables = model.init(jax.random.key(0), BATCHES[0][0])
    scales = {path: adapter.scale for path, adapter in adapters.items()}

    def loss(lora, params, batch):
        x, y = batch
        with nn.lora_interceptor("layers_0", config):
            return jnp.mean((model.apply({"params": params, "lora": lora}, x) - y) ** 2)

    found = nn.gradient_triplets(
        loss,
        variables["lora"],
        BATCHES,
        variables["params"],
        scale=scales,
        iterations=20,
        progress=False,
    )

    def dense(params):
        errors = [jnp.mean((model.apply({"params": params}, x) - y) ** 2) for x, y in BATCHES]
        return sum(errors) / len(errors)

    full = jax.grad(dense)(variables["params"])["layers_0"]["kernel"]
    sigma = np.linalg.svd(full, compute_uv=False)
    np.testing.assert_allclose(found["layers_0"].values, sigma[:RANK], rtol=1e-4)
    pair = nn.start_pair(found["layers_0"], RANK, "lora_one", 8.0)
    lora = {"layers_0": {"lora_a": pair.a, "lora_b": pair.b}}
    assert jnp.sum(full * (pair.a @ pair.b)) < 0
    kept = nn.unmerge_lora_variables({"params": variables["params"], "lora": lora}, adapters)
    with nn.lora_interceptor("layers_0", config):
        y = model.apply({"params": kept, "lora": lora}, BATCHES[0][0])
    np.testing.assert_allclose(y, model.apply(variables, BATCHES[0][0]), atol=1e-5)


def test_stacked_layers_have_a_gradient_each():
    kernels, x = normal(3, 3, IN, OUT), normal(4, 3, TOKENS, IN)

    def of_kernel(kernels, pair=None):
        y = jnp.einsum("lti,lio->lto", x, kernels)
        y = y if pair is None else y + nn.lora_apply(x, pair)
        return jnp.mean((y - 1) ** 2)

    loss = lambda params, batch: of_kernel(kernels, params["stack"])
    params = {"stack": LoRAPair(jnp.zeros((3, IN, RANK)), jnp.zeros((3, RANK, OUT)))}
    found = nn.gradient_triplets(loss, params, [0], iterations=20, progress=False)["stack"]
    sigma = np.linalg.svd(jax.grad(of_kernel)(kernels), compute_uv=False)
    np.testing.assert_allclose(found.values, sigma[:, :RANK], rtol=1e-4)


def zero(model, batch):
    return 0.0 * loss_fn(model, batch)


def infinite(model, batch):
    return jnp.inf * loss_fn(model, batch)


ONE_TOKEN = [(x[:1], y[:1]) for x, y in BATCHES[:1]]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"loss_fn": zero}, "first: the gradient is zero and gives no start"),
        ({"loss_fn": infinite}, "first: the gradient is not finite"),
        ({"batches": ONE_TOKEN}, "first: the gradient has rank 1, but the start needs 2"),
        ({"batches": []}, "at least one batch"),
        ({"method": "svd"}, "`method` must be one of lora_one, lora_ga, frames"),
        ({"method": "pissa"}, r"weight_start\(model, .pissa.\)"),
        ({"gamma": 0.0}, "`gamma` must be positive"),
        ({"iterations": -1}, "`iterations` must be at least 0"),
        ({"method": "frames"}, r"first: a start of frames needs .*Frames\(warmup=False\)"),
    ],
)
def test_what_gives_no_start_is_refused_and_leaves_the_model_alone(keywords, message):
    model = adapted()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    arguments = {"loss_fn": loss_fn, "batches": BATCHES, **keywords}
    with pytest.raises(ValueError, match=message):
        nn.gradient_start(model, **arguments, progress=False)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_a_rank_that_only_rounding_gives_is_refused_on_accelerators(monkeypatch):
    """A direction of 1e-5 of the largest is noise in TF32, and none where all bits count."""
    x = jnp.eye(2, IN) * jnp.array([[1.0], [1e-5]])
    loss = lambda model, x: jnp.sum(model.first(x) * jnp.eye(2, HIDDEN))
    arguments = {"loss_fn": loss, "batches": [x], "iterations": 4, "progress": False}
    only_first = MLP(nnx.Rngs(0))
    nn.add_lora(only_first, "first", nn.LoRAConfig(rank=RANK), rngs=nnx.Rngs(1))
    nn.gradient_start(only_first, **arguments)
    by_default = {jax.devices()[0].platform: 2.0**-10}
    monkeypatch.setattr("lowrank_optax.nn.starts._ROUNDING_BY_DEFAULT", by_default)
    with jax.default_matmul_precision("highest"):
        nn.gradient_start(only_first, **arguments)
    with pytest.raises(ValueError, match="first: the gradient has rank 1, but the start needs 2"):
        nn.gradient_start(only_first, **arguments)


def test_a_zero_column_under_dora_leaves_every_layer_alone():
    model = MLP(nnx.Rngs(0))
    config = nn.LoRAConfig(rank=RANK, dora=True)
    nn.add_lora(model, "first|second", config, rngs=nnx.Rngs(1))
    kernel = model.second.base.kernel
    kernel[...] = kernel[...].at[:, 0].set(0.0)  # as weights that are restored too late
    before = jax.tree.map(jnp.copy, nnx.state(model))
    with pytest.raises(ValueError, match=r"second: 1 of the .* columns of its kernel are zero"):
        start(model, keep_function=True)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    assert not model.first.corrected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, "`gamma` must be positive"),
        ({"rank": 3}, r"at rank 3 needs 3 triplets, got 2; .*blocks=2"),
        ({"method": "lora_ga"}, "at rank 2 needs 4 triplets, got 2"),
        ({"values": jnp.zeros(2)}, "the gradient is zero and gives no start"),
        ({"values": jnp.array([1.0, 1e-8])}, "the gradient has rank 1, but the start needs 2"),
    ],
)
def test_start_pair_refuses_what_gives_no_start(arguments, message):
    values = arguments.pop("values", jnp.array([2.0, 1.0]))
    triplets = Triplets(jnp.eye(4, 2), values, jnp.eye(2, 3))
    with pytest.raises(ValueError, match=message):
        nn.start_pair(triplets, **{"rank": 2, "method": "lora_one", "gamma": 1.0, **arguments})


@pytest.mark.parametrize("keywords", [{"blocks": 0}, {"iterations": -1}])
def test_gradient_triplets_refuses_nonsense(keywords):
    params = {"q": LoRAPair(jnp.zeros((4, 2)), jnp.zeros((2, 3)))}
    loss = lambda params, x: jnp.sum(nn.lora_apply(x, params["q"]))
    with pytest.raises(ValueError, match="must be at least"):
        nn.gradient_triplets(loss, params, [jnp.eye(4)], progress=False, **keywords)


def test_a_gradient_is_the_mean_over_many_bfloat16_batches():
    """A bfloat16 sum would stop to grow."""
    params = {"q": LoRAPair(*(jnp.zeros(s, jnp.bfloat16) for s in ((4, 2), (2, 3))))}
    loss = lambda params, x: jnp.sum(nn.lora_apply(x, params["q"]) * jnp.arange(3.0))
    of = lambda batches: nn.gradient_triplets(loss, params, batches, iterations=0, progress=False)[
        "q"
    ].values[0]
    one = jnp.eye(4, dtype=jnp.bfloat16)
    np.testing.assert_allclose(of([one] * 600), of([one]), rtol=1e-3)


def test_rounding_of_bfloat16_adapters_is_no_direction():
    model = MLP(nnx.Rngs(0))
    config = nn.LoRAConfig(rank=RANK, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    nn.add_lora(model, "first", config, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="first: the gradient has rank 1, but the start needs 2"):
        nn.gradient_start(model, loss_fn, ONE_TOKEN, progress=False)


def test_a_kernel_that_is_not_floating_cannot_be_corrected():
    model = adapted()
    model.first.base.kernel.set_value(model.first.base.kernel[...].astype(jnp.int8))
    with pytest.raises(ValueError, match=r"first: its kernel of int8 .*keep_function=False"):
        start(model, keep_function=True)


@pytest.mark.parametrize("method", ["lora_one", "lora_ga"])
def test_factors_that_frames_would_replace_are_refused(method):
    model = adapted(extra=nn.Frames(warmup=False))
    with pytest.raises(ValueError, match=r"first: .* starts with factors of its own; give method="):
        start(model, method)


def test_merged_layers_are_refused():
    model = adapted()
    nn.merge_lora(model)
    with pytest.raises(ValueError, match="first: is merged; call unmerge_lora first"):
        start(model)
