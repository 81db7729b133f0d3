"""Keras on JAX: its own loop with the optimizers, and `model.fit` by `integrations.keras.Optax`."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import (
    LoRAPair,
    altlora_plus,
    clip_by_global_norm,
    find_pairs,
    integrations,
    lora_rite,
    oplora,
    polora,
    scales_from,
)
from tests.integration.checks import (
    ALPHA,
    RANK,
    assert_read_rightly,
    assert_trains,
    normal,
    randomized,
)

os.environ["KERAS_BACKEND"] = "jax"
pytestmark = pytest.mark.libraries("keras")

ALPHAS = {"embedding": 2.0, "query": 6.0, "dense": 8.0}
SCALES = {name: alpha / RANK for name, alpha in ALPHAS.items()}
TOKENS, TARGET = np.arange(40).reshape(8, 5) % 20, np.asarray(normal(5, 8, 5, 16))


def adapted(alphas=ALPHAS, **settings):
    """A model with LoRA on a Dense, an EinsumDense and an Embedding layer."""
    import keras

    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(20, 16, name="embedding", **settings)(inputs)
    query = keras.layers.EinsumDense("btd,dnh->btnh", (None, 4, 6), name="query", **settings)
    hidden = keras.layers.Activation("tanh", **settings)(query(hidden))
    hidden = keras.layers.Reshape((5, 24), **settings)(hidden)
    model = keras.Model(inputs, keras.layers.Dense(16, name="dense", **settings)(hidden))
    for layer, alpha in alphas.items():
        model.get_layer(layer).enable_lora(RANK, lora_alpha=alpha)
    for i, variable in enumerate(model.variables):  # no b is zero
        variable.assign(normal(i, *variable.shape) / 4)
    return model


def values(variables):
    return {v.path: np.array(v.value) for v in variables}


def counting(tx, traces):
    def update(*args, **kwargs):
        traces.append(1)
        return tx.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def compiled(tx, **settings):
    model = adapted(**settings)
    model.compile(integrations.keras.Optax(tx), loss="mse")
    return model


def fit(model, epochs=1, **settings):
    settings = {"batch_size": 8, "shuffle": False, "verbose": 0, **settings}
    return model.fit(TOKENS, TARGET, epochs=epochs, **settings).history["loss"]


def test_keras_dense_einsum_and_embedding():
    """`Dense`, `EinsumDense`, `Embedding` in a loop of one's own, by `stateless_call`."""
    model = adapted(dict.fromkeys(ALPHAS, ALPHA))
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


def pairs_of(trainable):
    """The trainable variables as this library writes pairs itself, with matrices for factors."""
    of = lambda name, kind: LoRAPair(
        trainable[f"{name}/lora_{kind}_a"].reshape(-1, RANK), trainable[f"{name}/lora_{kind}_b"]
    )
    return {
        "embedding": of("embedding", "embeddings"),
        "query": of("query", "kernel"),
        "dense": of("dense", "kernel"),
        "bias": trainable["dense/bias"],
    }


def loss_by_hand(params, frozen):
    """The model's loss without Keras."""
    full = {
        name: frozen[path].reshape(params[name].a.shape[0], -1)
        + SCALES[name] * params[name].a @ params[name].b
        for name, path in (
            ("embedding", "embedding/embeddings"),
            ("query", "query/kernel"),
            ("dense", "dense/kernel"),
        )
    }
    hidden = jnp.tanh(full["embedding"][TOKENS] @ full["query"].reshape(16, 24))
    return jnp.mean((hidden @ full["dense"] + params["bias"] - TARGET) ** 2)


@pytest.mark.parametrize("method", [polora, altlora_plus, lora_rite])
def test_fit_makes_the_steps_that_optax_makes_by_hand(method):
    """`model.fit`: its first three steps are those of the same method on pairs made by hand."""
    tx = method(1e-2, scale=scales_from(SCALES)) if method is not lora_rite else method(1e-2)
    model = compiled(tx)
    params = jax.tree.map(jnp.asarray, pairs_of(values(model.trainable_variables)))
    frozen = values(model.non_trainable_variables)
    state = tx.init(params)
    for _ in range(3):
        loss, grads = jax.value_and_grad(loss_by_hand)(params, frozen)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(fit(model), [loss], rtol=1e-5)
        ours = pairs_of(values(model.trainable_variables))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), ours, params
        )


def test_fit_trains_in_one_trace_and_leaves_frozen_weights():
    """`model.fit`: the loss falls in one trace, and frozen weights stay the same bits."""
    traces, read = [], set()
    scale = lambda path: read.add(path) or SCALES[path]
    model = compiled(counting(polora(3e-2, scale=scale), traces))
    before = values(model.variables)
    losses = fit(model, epochs=30, batch_size=4)
    assert losses[-1] < 0.8 * losses[0]
    assert len(traces) == 1
    assert read == set(SCALES)
    trainable = [v.path for v in model.trainable_variables]
    for path, value in values(model.variables).items():
        assert np.array_equal(value, before[path]) == (path not in trainable), path
    found = find_pairs(values(model.trainable_variables))
    assert sorted(pair.path for pair in found.pairs) == sorted(SCALES)
    assert model.optimizer.iterations == 60


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_fit_keeps_dtypes_under_policies(policy):
    """`model.fit` under bfloat16 and both mixed policies, float16 with Keras's loss scaling."""
    traces = []
    tx = counting(polora(1e-1, scale=scales_from(SCALES)), traces)
    model = compiled(tx, dtype=policy)
    dtypes = {v.path: v.value.dtype for v in model.variables}
    assert dtypes["dense/bias"] == ("bfloat16" if policy == "bfloat16" else "float32")
    fit(model)
    kept = {v.path: v.value.dtype for v in model.optimizer.variables}
    losses = fit(model, epochs=30)
    assert losses[-1] < 0.8 * losses[0]
    assert {v.path: v.value.dtype for v in model.variables} == dtypes
    assert {v.path: v.value.dtype for v in model.optimizer.variables} == kept
    assert len(traces) == 1


def variables_of(tree):
    """Keras variables, by path."""
    import keras

    made = []
    for path, x in tree.items():
        scope, _, name = path.rpartition("/")
        with keras.name_scope(scope):
            made.append(keras.Variable(x, dtype=x.dtype, name=name))
    return made


def test_bfloat16_factors():
    """Factors in bfloat16: the step is that of optax, and the state is in float32."""
    params = {"x/lora_kernel_a": normal(0, 6, 2), "x/lora_kernel_b": normal(1, 2, 4)}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx, variables = polora(1e-1, scale=2.0), variables_of(params)
    optimizer = integrations.keras.Optax(tx)
    optimizer.apply(list(params.values()), variables)
    updates, state = tx.update(params, tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    for variable in variables:
        assert variable.value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(variable.value, expected[variable.path])
    for variable, leaf in zip(optimizer.variables[1:], jax.tree.leaves(state), strict=True):
        assert variable.value.dtype == leaf.dtype
        np.testing.assert_array_equal(variable.value, leaf)


def test_going_on_as_if_never_interrupted():
    """`get_weights` and `save_own_variables`: training goes on in a new model, bit by bit."""
    tx = optax.chain(optax.add_noise(1e-3, 0.5, 0), polora(3e-2, scale=scales_from(SCALES)))
    model, state = compiled(tx), {}
    fit(model, epochs=3)
    weights = model.get_weights()
    model.optimizer.save_own_variables(state)
    losses = fit(model, epochs=3)
    again = compiled(tx)
    again.set_weights(weights)
    again.optimizer.build(again.trainable_variables)
    again.optimizer.load_own_variables(state)
    assert fit(again, epochs=3) == losses
    for one, other in (
        (model.variables, again.variables),
        (model.optimizer.variables, again.optimizer.variables),
    ):
        for v, w in zip(one, other, strict=True):
            np.testing.assert_array_equal(v.value, w.value)


def test_weights_files_without_lora_go_on(tmp_path):
    """Without LoRA, Keras's `save_weights` and `load_weights` keep the optimizer's state too."""
    path, tx = tmp_path / "model.weights.h5", optax.adam(1e-2)
    model, again = compiled(tx, alphas={}), compiled(tx, alphas={})
    fit(model, epochs=3)
    model.save_weights(path)
    again.optimizer.build(again.trainable_variables)
    again.load_weights(path)
    assert fit(again, epochs=2) == fit(model, epochs=2)


def test_state_belongs_to_places_not_to_names():
    """A model made again, whose layers Keras numbers otherwise, loads the state in its places."""
    saved = []
    for first, second in (("dense_8", "dense_9"), ("dense_9", "dense_10")):
        tree = {
            f"{layer}/lora_kernel_{side}": normal(i, *shape)
            for layer, i in ((first, 0), (second, 2))
            for side, shape in (("a", (6, 2)), ("b", (2, 6)))
        }
        optimizer = integrations.keras.Optax(polora(1e-2, scale=2.0))
        optimizer.apply(list(tree.values()), variables_of(tree))
        store = {}
        optimizer.save_own_variables(store)
        saved.append(store)
    one, other = saved
    assert list(one) == list(other)
    for place, value in one.items():
        np.testing.assert_array_equal(value, other[place])
    assert not np.array_equal(one["state.pairs.mu[0]"], one["state.pairs.mu[2]"])


def test_what_cannot_be_loaded_or_saved_says_how_to(tmp_path):
    """Saving a whole model, and loading merged weights or another method's state, name a remedy."""
    path, tx = tmp_path / "model.weights.h5", polora(3e-2, scale=1.5)
    model = compiled(tx)
    fit(model)
    with pytest.raises(ValueError, match=r"To go on training, keep `model\.get_weights"):
        model.save(tmp_path / "model.keras")
    model.save_weights(path)
    again = compiled(tx)
    with pytest.raises(ValueError, match=r"call `optimizer\.build"):
        again.load_weights(path)
    again.optimizer.build(again.trainable_variables)
    with pytest.raises(ValueError, match=r"lora_\w+_a is zero.*Keras saves weights with"):
        again.load_weights(path)
    np.testing.assert_allclose(again.predict(TOKENS), model.predict(TOKENS), rtol=1e-4, atol=1e-5)
    other, state = compiled(lora_rite(3e-2)), {}
    other.optimizer.build(other.trainable_variables)
    model.optimizer.save_own_variables(state)
    with pytest.raises(ValueError, match=r"is not that of this optimizer.*state\."):
        other.optimizer.load_own_variables(state)
    model.compile("sgd", loss="mse")
    model.save(tmp_path / "model.keras")


def test_learning_rate_callbacks_reach_an_injected_rate():
    """Keras's learning-rate callbacks set the rate of `optax.inject_hyperparams`, and no other."""
    import keras

    inner = lambda learning_rate: polora(learning_rate, scale=scales_from(SCALES))
    stop = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate if epoch < 2 else 0.0)
    model = compiled(optax.inject_hyperparams(inner)(learning_rate=3e-2))
    fit(model, epochs=2, callbacks=[stop])
    np.testing.assert_allclose(model.optimizer.learning_rate.value, 3e-2)
    before = values(model.trainable_variables)
    fit(model, initial_epoch=2, epochs=4, callbacks=[stop])
    assert model.optimizer.learning_rate.value == 0.0
    for path, value in values(model.trainable_variables).items():
        np.testing.assert_array_equal(value, before[path])

    with pytest.raises(ValueError, match="belongs to the optax transformation"):
        fit(compiled(polora(1e-2)), callbacks=[stop])
    scheduled = optax.inject_hyperparams(inner)(learning_rate=optax.constant_schedule(1e-2))
    with pytest.raises(ValueError, match="has a schedule"):
        fit(compiled(scheduled), callbacks=[stop])


def test_state_that_is_a_parameter_itself():
    """A transformation that keeps the parameters as its state: `fit` donates no buffer twice."""
    start = optax.GradientTransformation(lambda params: params, lambda g, s, p: (g, s))
    model = compiled(optax.chain(start, polora(1e-2)))
    before = values(model.trainable_variables)
    fit(model, epochs=2)
    kept = [v for v in model.optimizer.variables if v.name.startswith("0.")]
    for variable, value in zip(kept, before.values(), strict=True):
        np.testing.assert_array_equal(variable.value, value)


def test_clipping_and_accumulation_are_those_of_optax():
    """Clipping and accumulation by optax: a step on two halves of a batch is that by hand."""
    inner = optax.chain(clip_by_global_norm(0.1), polora(1e-2, scale=scales_from(SCALES)))
    model = compiled(optax.MultiSteps(inner, 2).gradient_transformation())
    params = jax.tree.map(jnp.asarray, pairs_of(values(model.trainable_variables)))
    updates, _ = inner.update(
        jax.grad(loss_by_hand)(params, values(model.non_trainable_variables)),
        inner.init(params),
        params,
    )
    fit(model, batch_size=4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
        pairs_of(values(model.trainable_variables)),
        optax.apply_updates(params, updates),
    )


def test_variables_that_keras_overwrites_itself():
    """Scales of a float8 layer, which Keras overwrites with their gradients, are left to Keras."""
    import keras

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16, name="plain")])
    model.add(keras.layers.Dense(16, name="quantized", dtype="float8_from_float32"))
    model.layers[0].enable_lora(RANK, lora_alpha=ALPHA)
    model.compile(integrations.keras.Optax(polora(1e-2, scale=ALPHA / RANK)), loss="mse")
    before = values(model.trainable_variables)
    x = np.asarray(normal(0, 8, 16))
    model.fit(x, x, epochs=2, verbose=0)
    after = values(model.trainable_variables)
    assert {path for path in before if np.array_equal(before[path], after[path])} == set()
    assert not [v for v in model.optimizer.variables if "amax" in v.name]


@pytest.mark.parametrize("parallel", ["data", "model"])
def test_keras_distribution(parallel):
    """Keras's distributions on eight devices: steps are as on one, the state is laid out alike."""
    import keras

    tx = polora(3e-2, scale=scales_from(SCALES))
    alone = compiled(tx)
    losses = fit(alone, epochs=3)
    distribution = keras.distribution
    if parallel == "data":
        chosen = distribution.DataParallel(devices=[f"cpu:{i}" for i in range(8)])
    else:
        mesh = distribution.DeviceMesh((2, 4), ("batch", "model"), [f"cpu:{i}" for i in range(8)])
        layouts = distribution.LayoutMap(mesh)
        layouts["dense/lora_kernel_b"] = (None, "model")
        layouts["dense/kernel"] = (None, "model")
        chosen = distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    with chosen.scope():
        model = compiled(tx)
        np.testing.assert_allclose(fit(model, epochs=3), losses, rtol=1e-4)
    for one, other in zip(alone.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_allclose(one.value, other.value, rtol=1e-3, atol=1e-5)
    [b] = [v for v in model.trainable_variables if v.path == "dense/lora_kernel_b"]
    [mu] = [v for v in model.optimizer.variables if v.name == "pairs.mu.dense.lora_kernel_b"]
    assert mu.value.sharding.is_equivalent_to(b.value.sharding, 2)
    assert b.value.sharding.is_fully_replicated == (parallel == "data")


def test_mistakes_are_errors_with_a_remedy():
    """Names that collide, missing gradients or shadows, and wrong arguments are clear errors."""
    make = integrations.keras.Optax
    tree = {"x/lora_kernel_a": normal(0, 6, 2), "x/lora_kernel_b": normal(1, 2, 4)}
    variables = variables_of({**tree, "x/bias": normal(2, 4)})
    with pytest.raises(TypeError, match="must be an optax transformation"):
        make(polora)
    with pytest.raises(TypeError, match="clipnorm"):
        make(polora(1e-2), clipnorm=1.0)
    with pytest.raises(ValueError, match="path x/bias: give their layers different names"):
        make(polora(1e-2)).build([*variables, *variables_of({"x/bias": normal(2, 4)})])
    with pytest.raises(ValueError, match=r"^x: oplora needs a pair with shadows"):
        make(oplora(1e-2)).build(variables)
    optimizer = make(polora(1e-2))
    optimizer.build(variables)
    grads = [v.value for v in variables]
    with (
        pytest.warns(match="Gradients do not exist"),
        pytest.raises(ValueError, match="No gradient for x/bias"),
    ):
        optimizer.apply([*grads[:2], None], variables)
    optimizer.apply(grads)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_another_backend():
    """On another backend than JAX, the optimizer says how to change it."""
    code = "import optax; from lowrank_optax.integrations.keras import Optax; Optax(optax.sgd(1.0))"
    done = run_python(code, KERAS_BACKEND="numpy")
    assert "RuntimeError: Optax needs Keras on JAX" in done.stderr
    assert "KERAS_BACKEND=jax" in done.stderr


def test_keras_is_imported_only_when_named():
    """Importing this library and its integrations leaves Keras alone, and works without it."""
    code = (
        "import sys; from lowrank_optax import integrations; assert 'keras' not in sys.modules;"
        "sys.modules['keras'] = None; integrations.keras"
    )
    done = run_python(code)
    assert "AssertionError" not in done.stderr
    assert "pip install keras" in done.stderr
