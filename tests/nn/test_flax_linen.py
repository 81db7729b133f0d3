"""Linen LoRA modules, the interceptor, and merging."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from lowrank_optax import nn

KEY = jax.random.key(0)
RANK_2 = nn.LoRAConfig(rank=2, alpha=3.0, b_init=jax.nn.initializers.normal(1.0))
NORMAL_B: dict[str, Any] = {"rank": 2, "alpha": 3.0, "b_init": RANK_2.b_init}


def normal(shape, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


LAYERS = {
    "dense": (linen.Dense, nn.LoRADense, {"features": 6}, (3, 5, 4)),
    "dense, bias off": (linen.Dense, nn.LoRADense, {"features": 6, "use_bias": False}, (4,)),
    "general": (linen.DenseGeneral, nn.LoRADenseGeneral, {"features": (2, 3)}, (3, 5, 4)),
    "general, two axes": (
        linen.DenseGeneral,
        nn.LoRADenseGeneral,
        {"features": 6, "axis": (-2, -1)},
        (5, 2, 4),
    ),
    "general, batch": (
        linen.DenseGeneral,
        nn.LoRADenseGeneral,
        {"features": (6,), "batch_dims": (0,)},
        (3, 5, 4),
    ),
    "einsum, ambiguous shapes": (
        linen.Einsum,
        nn.LoRAEinsumDense,
        {"shape": (4, 4, 4), "einsum_str": "BTD,NDH->BTNH"},
        (3, 5, 4),
    ),
}


@pytest.mark.parametrize(("plain", "lora", "fields", "x_shape"), LAYERS.values(), ids=LAYERS)
def test_modules_and_interceptor_equal_the_plain_layer_with_merged_kernel(
    plain, lora, fields, x_shape
):
    x, plain, built = normal(x_shape), plain(**fields), lora(**fields, lora=RANK_2)

    @jax.jit  # one compilation instead of one for each operation
    def run(key):
        base_y, base = plain.init_with_output(key, x)
        y, variables = built.init_with_output(key, x)
        adapters = nn.lora_adapters(built, variables, x)
        with nn.lora_interceptor("", nn.LoRAConfig(**NORMAL_B)) as intercepted:
            intercepted_y = plain.apply(variables, x)
        assert intercepted == adapters
        merged = {"params": nn.merge_lora_variables(variables, adapters)}
        others = built.apply(variables, x), intercepted_y, plain.apply(merged, x)
        return base_y, base["params"], y, variables["params"], others

    base_y, base, y, params, others = run(KEY)
    jax.tree.map(np.testing.assert_array_equal, params, base)
    assert np.abs(y - base_y).max() > 0.1
    for other in others:
        np.testing.assert_allclose(other, y, atol=1e-4)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        x = x + linen.MultiHeadDotProductAttention(2, name="attention")(x)
        return x + linen.Dense(8, name="mlp")(linen.LayerNorm(name="norm")(x)), None


class Encoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = Block(name=f"layers_{i}")(x)
        return x


class Scanned(linen.Module):
    collections: tuple[str, ...] = ("params", "lora")
    remat: bool = False

    @linen.compact
    def __call__(self, x):
        block = linen.remat(Block) if self.remat else Block
        scan = linen.scan(
            block,
            variable_axes=dict.fromkeys(self.collections, 0),
            split_rngs={"params": True},
            length=3,
        )
        return scan(name="layers")(x, None)[0]


X = normal((2, 3, 8))


@pytest.fixture(scope="module")
def encoder():
    """Plain variables, LoRA variables with random b, and adapters of `Encoder`."""
    plain = jax.jit(Encoder().init)(KEY, X)
    with nn.lora_interceptor("query|value", nn.LoRAConfig(**NORMAL_B)) as adapters:
        variables = jax.jit(Encoder().init)(KEY, X)
    return plain, variables, adapters


def apply(variables, **settings):
    @jax.jit
    def run(variables):
        with nn.lora_interceptor("query|value", nn.LoRAConfig(**{**NORMAL_B, **settings})):
            return Encoder().apply(variables, X)

    return run(variables)


def test_init_adds_a_collection_and_leaves_the_parameters_alone(encoder):
    plain, variables, adapters = encoder
    paths = {f"layers_{i}/attention/{name}" for i in (0, 1) for name in ("query", "value")}
    assert set(variables) == {"params", "lora"}
    assert set(adapters) == paths
    jax.tree.map(np.testing.assert_array_equal, variables["params"], plain["params"])
    shapes = jax.tree.map(jnp.shape, variables["lora"]["layers_1"])
    assert shapes == {
        "attention": {
            "query": {"lora_a": (8, 2), "lora_b": (2, 8)},
            "value": {"lora_a": (8, 2), "lora_b": (2, 8)},
        }
    }
    a = [variables["lora"][f"layers_{i}"]["attention"]["query"]["lora_a"] for i in (0, 1)]
    assert not np.allclose(*a)


def test_zero_b_leaves_the_output_unchanged(encoder):
    plain, variables, _ = encoder
    lora = jax.tree.map(jnp.zeros_like, variables["lora"])
    y = jax.jit(Encoder().apply)(plain, X)
    np.testing.assert_array_equal(apply({**variables, "lora": lora}), y)
    assert np.abs(apply(variables) - y).max() > 0.1


def test_merge_and_unmerge_round_trip(encoder):
    plain, variables, adapters = encoder
    merged = nn.merge_lora_variables(variables, adapters)
    y = jax.jit(Encoder().apply)({"params": merged}, X)
    np.testing.assert_allclose(y, apply(variables), atol=1e-3)
    back = nn.unmerge_lora_variables({**variables, "params": merged}, adapters)
    assert set(back) == set(plain["params"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), back, plain["params"])


def test_training_the_collection_lowers_the_loss(encoder):
    _, variables, _ = encoder
    params = variables["params"]
    before = jax.tree.map(np.array, params)
    lora = jax.tree.map(lambda leaf: 0.1 * leaf, variables["lora"])
    tx = optax.adamw(0.02)
    state = tx.init(lora)

    @jax.jit
    def step(lora, state):
        def loss(lora):
            with nn.lora_interceptor("query|value", nn.LoRAConfig(rank=2)):
                y = Encoder().apply({"params": params, "lora": lora}, X)
            return jnp.mean((jnp.asarray(y) - jnp.sin(X)) ** 2)

        value, grads = jax.value_and_grad(loss)(lora)
        updates, state_ = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state_, value

    losses = []
    for _ in range(30):
        lora, state, value = step(lora, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_gradients_are_those_of_the_effective_kernel():
    model: Any = nn.LoRADenseGeneral((2, 3), lora=RANK_2)
    x, dy = normal((5, 4)), normal((5, 2, 3))
    variables = jax.jit(model.init)(KEY, x)
    loss = lambda lora: jnp.vdot(model.apply({**variables, "lora": lora}, x), dy)
    grads = jax.jit(jax.grad(loss))(variables["lora"])
    full = np.asarray(x).T @ np.asarray(dy).reshape(5, 6)
    lora = jax.tree.map(np.asarray, variables["lora"])
    np.testing.assert_allclose(grads["lora_a"], 1.5 * full @ lora["lora_b"].T, atol=1e-4)
    np.testing.assert_allclose(grads["lora_b"], 1.5 * lora["lora_a"].T @ full, atol=1e-4)


def test_pretrained_parameters_get_adapters_by_apply():
    model, x = linen.Sequential([linen.Dense(6)]), normal((2, 4))
    params = jax.jit(model.init)(KEY, x)["params"]
    with nn.lora_interceptor("layers_0", nn.LoRAConfig(rank=2)):
        y, lora = model.apply({"params": params}, x, mutable=["lora"], rngs={"lora": KEY})
    np.testing.assert_array_equal(y, model.apply({"params": params}, x))
    assert lora["lora"]["layers_0"]["lora_a"].shape == (4, 2)


def test_the_lora_stream_draws_the_factors_if_there_is_one():
    model, x = nn.LoRADense(6, lora=RANK_2), normal((2, 4))
    first, second = (
        model.init({"params": KEY, "lora": jax.random.key(seed)}, x) for seed in (1, 2)
    )
    np.testing.assert_array_equal(first["params"]["kernel"], second["params"]["kernel"])
    assert not np.allclose(first["lora"]["lora_a"], second["lora"]["lora_a"])


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers(remat):
    model: Any = Scanned(remat=remat)

    @jax.jit
    def init_and_apply(key):
        with nn.lora_interceptor("query|out", nn.LoRAConfig(**NORMAL_B)) as adapters:
            variables = model.init(key, X)
            value, grads = jax.value_and_grad(
                lambda lora: model.apply({**variables, "lora": lora}, X).sum()
            )(variables["lora"])
            y = model.apply(variables, X)
        merged = nn.merge_lora_variables(variables, adapters)
        plain = model.apply({"params": merged}, X)
        return variables, value, grads, y, plain, model.apply(variables, X)

    variables, value, grads, y, plain, base = init_and_apply(KEY)
    lora = variables["lora"]["layers"]["attention"]
    assert lora["out"]["lora_a"].shape == (3, 8, 2)
    assert lora["out"]["lora_b"].shape == (3, 2, 8)
    assert not np.allclose(lora["query"]["lora_a"][0], lora["query"]["lora_a"][1])
    np.testing.assert_allclose(plain, y, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(value, y.sum(), rtol=1e-4)
    assert np.abs(y - base).max() > 0.1
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_scan_without_the_collection_names_the_remedy():
    with (
        pytest.raises(ValueError, match=r"layers/attention/query: .*'lora': 0 to variable_axes"),
        nn.lora_interceptor("query", nn.LoRAConfig(rank=2)),
    ):
        jax.eval_shape(Scanned(collections=("params",)).init, KEY, X)


def test_dtypes_and_settings():
    x = normal((3, 4), jnp.bfloat16)
    model = linen.Dense(6, param_dtype=jnp.bfloat16)
    with nn.lora_interceptor("", nn.LoRAConfig(rank=4, alpha=8.0, rslora=True)) as adapters:
        y, variables = jax.jit(model.init_with_output)(KEY, x)
    assert y.dtype == jnp.bfloat16
    assert adapters[""].scale == 4.0
    assert {leaf.dtype for leaf in variables["lora"].values()} == {jnp.dtype("float32")}
    merged = nn.merge_lora_variables(variables, adapters)
    assert merged["kernel"].dtype == jnp.bfloat16


def test_dropout_needs_its_rng_unless_deterministic():
    x, lora = jnp.tile(normal((1, 4)), (4096, 1)), nn.LoRAConfig(rank=2, dropout=0.5)
    model: Any = nn.LoRADense(6, lora=dataclasses.replace(lora, b_init=RANK_2.b_init))
    variables = jax.jit(model.init)(KEY, x)
    exact = nn.LoRADense(6, lora=lora, deterministic=True).apply(variables, x)
    first, second = (
        model.apply(variables, x, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 2)
    )
    assert not np.allclose(first, second)
    sample = np.asarray(first)
    standard_error = sample.std(0) / 64
    assert np.all(standard_error > 0)
    assert np.all(np.abs(sample.mean(0) - np.asarray(exact)[0]) < 5 * standard_error)
    with pytest.raises(Exception, match='needs PRNG for "dropout"'):
        model.apply(variables, x)

    settings: dict[str, Any] = {"rank": 2, "dropout": 0.5}
    with nn.lora_interceptor("", nn.LoRAConfig(**settings), deterministic=True):
        np.testing.assert_array_equal(linen.Dense(6).apply(variables, x), exact)
    with nn.lora_interceptor("", nn.LoRAConfig(**settings)):
        intercepted: Any = linen.Dense(6).apply(variables, x, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(intercepted, first, rtol=1e-5, atol=1e-5)


def test_sharding_boxes_of_parameters_and_factors_survive_a_merge():
    boxed = linen.with_partitioning
    init = jax.nn.initializers.normal(1.0)
    model: Any = linen.Dense(6, kernel_init=boxed(init, ("embed", "mlp")))
    x = normal((2, 4))
    settings: dict[str, Any] = {
        "a_init": boxed(init, ("embed", None)),
        "b_init": boxed(init, (None, "mlp")),
    }
    with nn.lora_interceptor("", nn.LoRAConfig(rank=2, **settings)) as adapters:
        y, variables = model.init_with_output(KEY, x)
    assert linen.get_partition_spec(variables)["lora"]["lora_a"] == jax.P("embed", None)
    merged = nn.merge_lora_variables(variables, adapters)
    assert merged["kernel"].names == ("embed", "mlp")
    np.testing.assert_allclose(model.apply({"params": merged}, x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        ("quary", {}, "match no module: quary.*layers_0/attention/key"),
        (["query", "valeu"], {}, r"match no module: valeu\."),
        (lambda path, module: False, {}, "the predicate"),
        ("norm", {}, "layers_0/norm is a LayerNorm"),
        ("attention", {}, "layers_0/attention is a MultiHeadDotProductAttention"),
        ("query", {"rank": 0}, "`rank` must be at least 1"),
        ("query", {"rank": 9}, "layers_0/attention/query: rank 9 exceeds"),
        ("query", {"dropout": 1.0}, "`dropout` must lie in"),
        ("query", {"alpha": 0.0}, "`alpha` must be positive"),
    ],
)
def test_refusals(targets, settings, message):
    with (
        pytest.raises(ValueError, match=message),
        nn.lora_interceptor(targets, nn.LoRAConfig(**{"rank": 2, **settings})),
    ):
        jax.eval_shape(Encoder().init, KEY, X)


def test_apply_alone_does_not_complain_about_layers_it_does_not_trace(encoder):
    with nn.lora_interceptor(["query", "decoder"], nn.LoRAConfig(rank=2)):
        pass


def test_a_module_with_lora_is_refused_and_a_missing_adapter_is_named(encoder):
    with (
        pytest.raises(ValueError, match="layers_0 already has LoRA"),
        nn.lora_interceptor("layers_0", nn.LoRAConfig(rank=2)),
    ):
        jax.eval_shape(linen.Sequential([nn.LoRADense(2)]).init, KEY, X)
    plain, variables, adapters = encoder
    with pytest.raises(ValueError, match="layers_0/attention/query: the variables hold no adapter"):
        apply(plain)
    with pytest.raises(ValueError, match="no 'lora' collection"):
        nn.merge_lora_variables(plain, adapters)
    with pytest.raises(ValueError, match=r"layers_0/attention/query: no adapter.*lora_adapters"):
        nn.merge_lora_variables(variables, {})
    wrong = {path: nn.LinenAdapter(nn.KernelAxes.in_order(0, 2, 1), 1.0) for path in adapters}
    with pytest.raises(ValueError, match="layers_0/attention/query: a matrix of shape"):
        nn.merge_lora_variables(variables, wrong)


def test_a_kernel_used_in_two_roles_is_refused():
    class Tied(linen.Module):
        @linen.compact
        def __call__(self, x):
            proj = linen.Einsum((4, 4), use_bias=False, name="proj")
            return proj(proj(x, "td,df->tf"), "tf,df->td")

    with (
        pytest.raises(ValueError, match="proj: two calls of it"),
        nn.lora_interceptor("proj", nn.LoRAConfig(rank=2)),
    ):
        jax.eval_shape(Tied().init, KEY, normal((3, 4)))


def test_layers_of_different_settings_have_an_interceptor_each():
    model, x = linen.Sequential([linen.Dense(8), linen.Dense(6)]), normal((3, 4))
    both = lambda: (
        nn.lora_interceptor("layers_0", nn.LoRAConfig(rank=2, b_init=RANK_2.b_init)),
        nn.lora_interceptor("layers_1", nn.LoRAConfig(rank=4, b_init=RANK_2.b_init)),
    )
    first, second = both()
    with first as small, second as large:
        variables = model.init(jax.random.key(0), x)
    ranks = {name: leaves["lora_a"].shape[-1] for name, leaves in variables["lora"].items()}
    assert ranks == {"layers_0": 2, "layers_1": 4}
    assert (set(small), set(large)) == ({"layers_0"}, {"layers_1"})
    first, second = both()
    with first, second:
        y = model.apply(variables, x)
    merged = nn.merge_lora_variables(variables, {**small, **large})
    np.testing.assert_allclose(y, model.apply({"params": merged}, x), rtol=1e-5)
    first, _ = both()
    with first, pytest.raises(ValueError, match=r"layers_1: .* no target matches it"):
        model.apply(variables, x)


def test_two_interceptors_of_one_layer_are_refused():
    model, config = linen.Sequential([linen.Dense(8)]), nn.LoRAConfig(rank=2)
    with (
        nn.lora_interceptor("layers_0", config),
        nn.lora_interceptor("layers_.*", config),
        pytest.raises(ValueError, match="layers_0: two interceptors adapt this layer"),
    ):
        model.init(jax.random.key(0), normal((3, 4)))


def test_parameters_of_another_model_are_named():
    model, x = linen.Sequential([linen.Dense(8)]), normal((3, 4))
    with nn.lora_interceptor("layers_0", nn.LoRAConfig(rank=2)) as adapters:
        variables = model.init(jax.random.key(0), x)
    other = {"params": {"encoder": variables["params"]}, "lora": variables["lora"]}
    message = "layers_0: the parameters hold no 'kernel' there.*There are: encoder/layers_0/kernel"
    with pytest.raises(ValueError, match=message):
        nn.merge_lora_variables(other, adapters)
