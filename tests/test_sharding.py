"""How parameters and states lie, and what is refused, with the leaf's name and a remedy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from lowrank_optax import (
    DEFAULT_SPECS,
    LoRAPair,
    Metric,
    PairSpec,
    ShadowedPair,
    altlora,
    altlora_plus,
    clip_by_global_norm,
    frame,
    lora_pro,
    lora_pro_efficient,
    nn,
    sds_lora,
    shadow,
    sharding,
    svd_lora,
)
from lowrank_optax._core.names import path_name

P = jax.P
KEY = jax.random.key(0)


def make_mesh(kind=AxisType.Auto, names=("data", "model")):
    return jax.make_mesh((4, 2), names, axis_types=(kind, kind))


def make_pair(n_in=8, n_out=16, batch=()):
    return LoRAPair(jnp.ones((*batch, n_in, 2)), jnp.ones((*batch, 2, n_out)))


COLUMNS_AND_LAYERS = sharding.stacked(sharding.tensor_parallel(["up"], ["down"]), "data")


def sds_lora_of(rate, fallback):
    return sds_lora(rate, total_steps=20, fallback=fallback)


def lying(recipe, tree, **keywords):
    return sharding.partition_specs(tree, make_mesh(), recipe, **keywords)


# Clipping


def test_the_norm_is_that_of_whole_gradients_inside_shard_map():
    """One factor is sharded, one replicated: both are clipped by one norm."""
    mesh = make_mesh()
    grads = {"q": LoRAPair(jnp.arange(16.0).reshape(8, 2), jnp.ones((2, 4))), "bias": jnp.ones(3)}
    specs = {"q": LoRAPair(P("data"), P()), "bias": P()}
    tx = clip_by_global_norm(1.0)

    @jax.shard_map(mesh=mesh, in_specs=(specs,), out_specs=specs)
    def clipped(grads):
        return tx.update(grads, tx.init(grads), param_specs=specs)[0]

    expected, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    for x, y in zip(
        jax.tree.leaves(jax.jit(clipped)(grads)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("make", [altlora_plus, sds_lora_of], ids=["altlora_plus", "sds_lora"])
def test_a_fallback_gets_the_specs_of_its_leaves_inside_shard_map(make):
    """Its clip needs the norm over all devices."""
    mesh = make_mesh()
    tx = make(0.1, fallback=optax.chain(clip_by_global_norm(0.5), optax.sgd(0.1)))
    pair = LoRAPair(jnp.arange(16.0).reshape(8, 2) / 16, jnp.ones((2, 4)))
    params = {"q": frame(pair) if make is sds_lora_of else pair}
    params |= {"w": jnp.arange(8.0), "bias": jnp.ones(3)}
    specs = jax.tree.map(lambda x: P(), params) | {"w": P("data")}

    @jax.shard_map(mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
    def updates(params):
        return tx.update(params, tx.init(params), params, param_specs=specs)[0]

    expected, _ = tx.update(params, tx.init(params), params)
    found = jax.jit(updates)(params)
    for name in ("w", "bias"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_dense_moments_of_factors_that_one_mesh_axis_shards_are_refused_inside_shard_map():
    mesh = make_mesh()
    params = {"q": LoRAPair(jnp.ones((8, 2)), jnp.ones((2, 4)))}
    specs = {"q": LoRAPair(P("data", None), P(None, "data"))}

    def updates(tx):
        @jax.shard_map(mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
        def run(params):
            return tx.update(params, tx.init(params), params, param_specs=specs)[0]

        return jax.jit(run)(params)

    with refused(r"the mesh axis \['data'\] shards .*lora_pro_efficient"):
        updates(lora_pro(0.1))
    expected, _ = (tx := lora_pro_efficient(0.1)).update(params, tx.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), updates(tx), expected)


def test_the_norm_of_float16_gradients_is_finite():
    grads = {"q": LoRAPair(*(jnp.full(s, 300.0, jnp.float16) for s in ((8, 2), (2, 4))))}
    clipped, _ = clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    assert clipped["q"].a.dtype == jnp.float16
    np.testing.assert_allclose(clipped["q"].a, 1 / np.sqrt(24), rtol=1e-2)


# Recipes


def test_one_expression_in_place_of_a_list_is_refused():
    """Its letters would each be an expression, and fit everything."""
    for name in ("columns", "rows"):
        with pytest.raises(TypeError, match=rf"`{name}` must be a list .*write \['up\|q'\]"):
            sharding.tensor_parallel(**{name: "up|q"})


def test_fsdp_shards_the_first_axis_that_the_mesh_divides():
    mesh, recipe = make_mesh(), sharding.fsdp(min_size=32)
    specs = {shape: recipe("w", shape, mesh) for shape in [(8, 6), (6, 8), (6, 6), (4, 4), (64,)]}
    assert specs == {
        (8, 6): P("data", None),
        (6, 8): P(None, "data"),
        (6, 6): P(),
        (4, 4): P(),  # too small
        (64,): P(),
    }


def test_tensor_parallel_lays_biases_of_columns_alone():
    tree = {
        "up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
        "down": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)},
        "norm": jnp.ones(4),
    }
    assert lying(sharding.tensor_parallel(["up"], ["down"]), tree) == {
        "up": {"kernel": P(None, "model"), "bias": P("model")},
        "down": {"kernel": P("model", None), "bias": P()},
        "norm": P(),
    }


def test_fsdp_within_tensor_parallel_takes_the_axis_that_is_left():
    mesh = make_mesh()
    recipe = sharding.fsdp(within=sharding.tensor_parallel(["up"], ["down"]), min_size=32)
    assert recipe("up", (8, 6), mesh) == P("data", "model")
    assert recipe("down", (8, 4), mesh) == P("model", "data")
    assert recipe("down", (8, 6), mesh) == P("model", None)  # four devices do not divide 6
    assert recipe("down", (2, 4), mesh) == P("model", None)  # too small
    assert recipe("norm", (8,), mesh) == P()


def test_kernels_with_many_axes_give_their_pairs_the_sharding_of_the_major_one():
    mesh = make_mesh()
    at = lambda *spec: NamedSharding(mesh, P(*spec))
    kernels = {
        "q": {"kernel": jax.ShapeDtypeStruct((3, 8, 4, 2), "f4", sharding=at(None, None, "data"))},
        "o": {"kernel": jax.ShapeDtypeStruct((4, 2, 8), "f4", sharding=at("data", None, "model"))},
    }
    recipe = sharding.as_kernels(kernels)
    assert recipe("q", (3, 8, 8), mesh) == P(None, None, "data")
    assert recipe("o", (8, 8), mesh) == P("data", "model")
    assert recipe("q/kernel", (3, 8, 4, 2), mesh) == P(None, None, "data", None)


def by_heads(recipe, number=4, size=2):
    """As an attention layer has them whose model dimension is heads · head_dim."""
    return sharding.heads(recipe, {"q": (number, size)}, {"o": (number, size)})


@pytest.mark.parametrize(
    ("recipe", "q", "o"),
    [
        (sharding.data_parallel(), (None, None), (None, None)),
        (sharding.fsdp(min_size=0), ("data", None), ("data", None)),
        (sharding.tensor_parallel(["q"], ["o"]), (None, "model"), ("model", None)),
        (
            sharding.fsdp(within=sharding.tensor_parallel(["q"], ["o"]), min_size=0),
            ("data", "model"),
            ("model", "data"),
        ),
    ],
)
def test_attention_kernels_and_their_pairs_are_sharded_by_heads(recipe, q, o):
    tree = {
        "q": {"kernel": jnp.ones((8, 4, 2)), "bias": jnp.ones((4, 2)), "pair": make_pair(8, 8)},
        "o": {"kernel": jnp.ones((4, 2, 8)), "bias": jnp.ones(8), "pair": make_pair(8, 8)},
        "stacked_q": {"kernel": jnp.ones((4, 8, 4, 2)), "pair": make_pair(8, 8, (4,))},
        "stacked_o": {"kernel": jnp.ones((4, 4, 2, 8)), "pair": make_pair(8, 8, (4,))},
    }
    pair = lambda i, o, *layers: LoRAPair(P(*layers, i, None), P(*layers, None, o))
    assert lying(by_heads(recipe), tree) == {
        "q": {"kernel": P(*q, None), "bias": bias_of(q), "pair": pair(*q)},
        "o": {"kernel": P(o[0], None, o[1]), "bias": P(), "pair": pair(*o)},
        "stacked_q": {"kernel": P(None, *q, None), "pair": pair(*q, None)},
        "stacked_o": {"kernel": P(None, o[0], None, o[1]), "pair": pair(*o, None)},
    }


def bias_of(kernel):
    return P(kernel[1], None)


def test_fsdp_takes_another_axis_where_the_mesh_does_not_divide_the_heads():
    """Though it divides heads · head_dim, the axis that a pair has."""
    mesh, recipe = make_mesh(), by_heads(sharding.fsdp(min_size=0), 2, 4)
    assert recipe("o", (2, 4, 8), mesh) == P(None, None, "data")
    assert recipe("o", (8, 8), mesh) == P(None, "data")
    assert recipe("q", (2, 8), mesh) == P(None, None)  # neither


def test_heads_of_one():
    recipe = by_heads(sharding.tensor_parallel(["q"]), 1, 8)
    assert recipe("q", (8, 1, 8), make_mesh()) == P(None, "model", None)
    assert recipe("q", (8, 8), make_mesh()) == P(None, "model")  # a pair, not a bias of (8, 8)


# Specs of pairs, in every layout


def test_pairs_lie_as_their_kernels_in_every_layout():
    n_in, n_out, heads = 8, 16, (4, 4)
    named = {"lora_a": jnp.ones((n_in, 2)), "lora_b": jnp.ones((2, n_out))}
    tree = {
        "up": {
            "node": make_pair(),
            "flax": named,
            "qwix": {"w_lora_a": jnp.ones((n_in, 2)), "w_lora_b": jnp.ones((2, n_out))},
            "peft": {"lora_A": jnp.ones((2, n_in)), "lora_B": jnp.ones((n_out, 2))},
            "heads": {"down_a": jnp.ones((n_in, 2)), "down_b": jnp.ones((2, *heads))},
        },
        "down": make_pair(),
    }
    several = PairSpec("down_a", "down_b", b_rank=-3, b_out=(-2, -1))
    specs = (several, *DEFAULT_SPECS)
    found = lying(sharding.tensor_parallel(["up"], ["^down"]), tree, specs=specs)
    a, b = P(None, None), P(None, "model")
    assert found == {
        "up": {
            "node": LoRAPair(a, b),
            "flax": {"lora_a": a, "lora_b": b},
            "qwix": {"w_lora_a": a, "w_lora_b": b},
            "peft": {"lora_A": a, "lora_B": P("model", None)},
            "heads": {"down_a": a, "down_b": P(None, "model", None)},
        },
        "down": LoRAPair(P("model", None), a),
    }


def test_auxiliary_leaves_lie_as_their_factors():
    """By each leaf's long axis; what has none is replicated but for its layers."""
    pair = make_pair(batch=(4,))
    nodes = {
        "up": shadow(pair, KEY, iterations=2, metric=Metric()),
        "up_framed": frame(pair),
    }
    found = lying(COLUMNS_AND_LAYERS, nodes)
    rest, out = P("data", None, None), P("data", None, "model")
    up, framed = found["up"], found["up_framed"]
    assert (up.a, up.m_a, up.krylov_a) == (rest,) * 3
    assert (up.b, up.m_b, up.krylov_b) == (out,) * 3
    assert (up.checksum, up.kfac) == (rest, P("data", None))
    assert (up.d_in, up.d_out) == (P("data", None), P("data", "model"))
    assert (framed.a, framed.f_in, framed.b, framed.f_out) == (rest, rest, out, out)
    assert framed.warm == P("data")


# States


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_states_lie_as_their_parameters(kind):
    mesh = make_mesh(kind)
    params = {"up": make_pair(batch=(4,)), "norm": jnp.ones(16)}
    params = sharding.shard_model(params, mesh, COLUMNS_AND_LAYERS)
    tx = optax.chain(optax.clip_by_global_norm(1.0), altlora_plus(1e-3))
    state = sharding.shard_state(tx, params)[1]
    for moments in (state.pairs.mu, state.pairs.nu):
        assert moments["up"].b.sharding.spec == P("data", None, "model")
        assert moments["up"].a.sharding.spec == P("data", None, None)
    [drift] = state.pairs.drift
    assert drift.a.sharding.spec == drift.b.sharding.spec == P("data", None, None)
    assert state.count.sharding.is_fully_replicated
    moment = jax.tree.leaves(state.fallback)[1]
    assert moment.sharding.mesh == mesh
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    of_shapes = sharding.state_shardings(tx, shapes)  # what restoring a checkpoint has at hand
    assert of_shapes[1].pairs.mu["up"].b == NamedSharding(mesh, P("data", None, "model"))


def test_an_nnx_module_is_placed_and_trains():
    mesh = make_mesh()
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    holder = nnx.Dict(up=model)
    nn.add_lora(holder, "up", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    state = sharding.shard_model(nnx.state(holder), mesh, sharding.tensor_parallel(["up"]))
    nnx.update(holder, state)
    leaves = {
        path_name(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    ends = lambda end: [spec for path, spec in leaves.items() if path.endswith(end)]
    assert ends("kernel") == ends("lora_b") == [P(None, "model")]
    assert ends("lora_a") == [P(None, None)]
    assert holder.up(jnp.ones((2, 8))).shape == (2, 16)


# The train step


def loss(params, kernel, batch):
    x, y = batch
    return jnp.mean((x @ kernel + nn.lora_apply(x, params["up"]) - y) ** 2)


def make_step(**keywords):
    mesh = make_mesh()
    params = {"up": LoRAPair(jax.random.normal(KEY, (8, 2)), jnp.zeros((2, 16)))}
    params = sharding.shard_model(params, mesh, sharding.tensor_parallel(["up"]))
    tx = altlora(0.1)
    step = sharding.train_step(loss, tx, params, **keywords)
    batch = (jax.random.normal(KEY, (8, 8)), jnp.ones((8, 16)))
    return step, params, sharding.shard_state(tx, params), jnp.zeros((8, 16)), batch


def test_the_train_step_donates_and_keeps_everything_in_place():
    step, params, state, kernel, batch = make_step()
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    old = jax.tree.leaves((params, state))
    params, state, first = step(params, state, kernel, batch)
    assert all(leaf.is_deleted() for leaf in old if leaf.ndim)
    assert jax.tree.map(lambda x: x.sharding, (params, state)) == places
    _, _, second = step(params, state, kernel, batch)
    assert second < first


def test_the_train_step_may_keep_its_inputs():
    step, params, state, kernel, batch = make_step(donate=False)
    once, again = step(params, state, kernel, batch), step(params, state, kernel, batch)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), once, again))


def test_the_batch_lies_where_it_is_said():
    step, params, state, kernel, batch = make_step(batch_spec=P(("data", "model")))
    compiled = step.lower(params, state, kernel, batch).compile()
    [_, _, of_kernel, of_batch], _ = compiled.input_shardings
    assert {x.spec for x in of_batch} == {P(("data", "model"))}
    assert of_kernel.is_fully_replicated
    params, state, value = step(params, state, kernel, batch)
    assert np.isfinite(value)


# Bad input


def refused(match):
    return pytest.raises(ValueError, match=match)


def test_unknown_mesh_axes():
    tree = {"up": make_pair()}
    with refused(r"up: the mesh has no axis 'rows'; use one of 'data', 'model'"):
        lying(sharding.fsdp("rows", min_size=0), tree)
    with refused(r"up/b: the mesh has no axis 'tensor'; use one of"):
        lying(sharding.tensor_parallel(["up"], axis="tensor"), tree)
    with refused(r"batch_spec: the mesh has no axis 'batch'; use one of"):
        make_step(batch_spec=P("batch"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_rank_axis(kind):
    lies = NamedSharding(make_mesh(kind), P(None, "model"))
    params = {"up": make_pair()}
    params = jax.device_put(params, NamedSharding(lies.mesh, P()))
    params["up"] = params["up"]._replace(a=jax.device_put(params["up"].a, lies))
    message = r"up/a: its rank axis is sharded over 'model'. Replicate it"
    with refused(message):
        sharding.train_step(loss, altlora(0.1), params)
    if kind == AxisType.Explicit:
        with jax.set_mesh(lies.mesh), refused(message):
            altlora(0.1).init(params)


def test_a_rank_axis_cut_up_by_shard_map():
    params = {"up": make_pair()}
    tx = altlora(0.1)
    specs = {"up": LoRAPair(P(), P("model", None))}
    with refused(r"up/b: its rank axis is sharded over \('model',\). Replicate it"):
        tx.update(params, tx.init(params), params, param_specs=specs)
    with refused(r"up/a: `param_specs` must give a PartitionSpec of at most 2 entries"):
        tx.update(params, tx.init(params), params, param_specs=P(None, None, "data"))


def test_factors_of_one_pair_on_different_meshes():
    one, two = make_mesh(), make_mesh(names=("x", "y"))
    pair = make_pair()
    params = {
        "up": LoRAPair(
            jax.device_put(pair.a, NamedSharding(one, P())),
            jax.device_put(pair.b, NamedSharding(two, P())),
        )
    }
    for function in (sharding.shard_state, sharding.state_shardings):
        with refused(r"up/b is on .*up/a on .*place all parameters on one mesh"):
            function(altlora(0.1), params)
    with refused(r"up/a: is on no mesh .*place it first \(`shard_model`\)"):
        sharding.train_step(loss, altlora(0.1), {"up": pair})
    with refused(r"no parameters"):
        sharding.mesh_of({})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            lambda *_: P(("data", "model")),
            r"up/lora_a: 8 devices along .* do not divide an axis of 4",
        ),
        (
            lambda *_: P(None, "data"),
            r"up/lora_b: 4 devices along 'data' do not divide",
        ),
        (
            lambda *_: P("model", "model"),
            r"up/kernel: P\('model', 'model'\) uses a mesh axis twice",
        ),
        (lambda *_: P(None, None, "data"), r"up/kernel: .* has more entries than the shape"),
        (sharding.tensor_parallel(["up"], ["p/k"]), r"up/kernel: fits both `columns` and `rows`"),
    ],
)
def test_specs_that_do_not_fit(recipe, message):
    """A mesh that does not divide an axis, an axis used twice, too many entries, two roles."""
    tree = {"up": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 6))}}
    if "kernel" in message:
        tree = {"up": {"kernel": jnp.ones((4, 6))}}
    with refused(message):
        lying(recipe, tree)


def test_kernels_that_pairs_do_not_belong_to():
    mesh = make_mesh()
    lies = NamedSharding(mesh, P(None, None, "model"))
    recipe = sharding.as_kernels(
        {"q": {"kernel": jax.ShapeDtypeStruct((8, 2, 4), "f4", sharding=lies)}}
    )
    with refused(r"k: no kernel found at k/kernel, .*say where it is by `kernel_of`"):
        recipe("k", (8, 8), mesh)
    with refused(r"q: a kernel of shape \(8, 2, 4\) does not make \(8, 6\)"):
        recipe("q", (8, 6), mesh)
    with refused(r"q/kernel: sharded as .*only the first of them can be sharded"):
        recipe("q", (8, 8), mesh)


def test_heads_that_a_kernel_does_not_have():
    recipe = by_heads(sharding.tensor_parallel(["q"], ["o"]))
    with refused(r"q/kernel: a shape of \(8, 2, 4\) has no 4 heads of 2 at its out axis; correct"):
        recipe("q/kernel", (8, 2, 4), make_mesh())
    with refused(r"o/kernel: a shape of \(8, 2, 4\) has no 4 heads of 2 at its in axis; correct"):
        recipe("o/kernel", (8, 2, 4), make_mesh())
    with refused(r"o/q: fits 'q' and 'o' of `heads`; make one more specific"):
        recipe("o/q", (8, 8), make_mesh())
    with refused(r"q/kernel: 4 devices along 'data' do not divide an axis of 2"):
        tree = {"q": {"kernel": jnp.ones((8, 2, 4))}}
        lying(by_heads(sharding.tensor_parallel(["q"], axis="data"), 2, 4), tree)


def test_a_step_without_a_batch():
    step, params, state, *_ = make_step()
    with refused(r"needs a batch: call `step\(params, state, batch\)`"):
        step(params, state)


# The mesh that `jax.make_mesh` makes if nothing else is said


@pytest.mark.parametrize("metric", [None, Metric(), Metric("shampoo")])
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("spec", [P("model", None), P(None, "model")])
def test_shadows_on_the_default_mesh(spec, iterations, metric):
    """Ones throughout: y = 8 · 2 in each of 4 × 6 places, and each gradient is a number of them."""
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    node = shadow(make_pair(8, 6), KEY, iterations=iterations, metric=metric)
    x = jnp.ones((4, 8))
    loss = lambda node: nn.lora_apply(x, node).sum()
    alone, expected = jax.value_and_grad(loss)(node)
    with jax.set_mesh(mesh):
        node = sharding.shard_model(node, mesh, lambda *_: spec)
        value = loss(node)
        grads = jax.grad(loss)(node)
    assert value == alone == 4 * 6 * 16
    assert grads.a.sum() == expected.a.sum() == 8 * 2 * 4 * 6
    assert jax.tree.map(jax.typeof, grads) == jax.tree.map(jax.typeof, node)
    for name, one, many in zip(node._fields, expected, grads, strict=True):
        if one is not None:
            size = 1e-5 * np.abs(one).max()  # float32, of sums of at most 8 numbers
            np.testing.assert_allclose(many, one, rtol=0, atol=size, err_msg=name)


# Methods that cannot run under a setting


def test_shadowed_factors_cut_up_by_shard_map():
    mesh, node = make_mesh(), shadow(make_pair(), KEY)
    specs = sharding.partition_specs({"up": node}, mesh, sharding.tensor_parallel(["up"]))["up"]
    grad = jax.grad(lambda node, x: jnp.sum(nn.lora_apply(x, node)))
    run = jax.shard_map(grad, mesh=mesh, in_specs=(specs, P("data")), out_specs=specs)
    with refused(r"differ along the mesh axes \['model'\].*Shard them by `jit` on a mesh instead"):
        jax.eval_shape(run, node, jnp.ones((4, 8)))


def test_shampoo_with_all_features_sharded_on_an_explicit_mesh():
    mesh = make_mesh(AxisType.Explicit)
    node = shadow(make_pair(), KEY, metric=Metric("shampoo"))
    node = sharding.shard_model({"up": node}, mesh, lambda *_: P("data", "model"))["up"]
    x = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P(None, "data")))
    with (
        jax.set_mesh(mesh),
        refused(r"blocks of input or output features, and both are sharded.*use an Auto mesh"),
    ):
        jax.eval_shape(jax.grad(lambda node: jnp.sum(nn.lora_apply(x, node))), node)


def test_svd_lora_with_a_matrix_in_parts():
    params, tx = {"w": jnp.ones((8, 8))}, svd_lora(optax.sgd(0.1), rank=2)
    lies = NamedSharding(make_mesh(AxisType.Explicit), P("data"))
    with jax.set_mesh(lies.mesh), refused(r"w: .* whole matrices on an Explicit mesh"):
        tx.init(jax.device_put(params, lies))
    with refused(
        r"w: .* whole matrices, but inside `shard_map` this one is sharded as P\(.*'data'"
    ):
        tx.update(params, tx.init(params), params, param_specs={"w": P(None, "data")})


# Data parallel by shard_map and pmap: each device has a part of the batch

NODES = {
    "plain": lambda pair: pair,
    "shadowed": functools.partial(shadow, key=KEY, iterations=2),
    "metric": functools.partial(shadow, key=KEY, metric=Metric()),
    "framed": frame,
}


def mean_loss(node, x, axis_name=None):
    return jnp.mean(jnp.sin(nn.lora_apply(x, node, axis_name=axis_name)))


def checked(node, x):
    """JAX itself sums the gradients of what is replicated."""
    return jax.grad(lambda node: jax.lax.pmean(mean_loss(node, x), "data"))(node)


def unchecked(node, x):
    """Linear gradients are averaged afterwards, those of shadows in the layer."""
    if isinstance(node, ShadowedPair):
        return jax.grad(mean_loss)(node, x, "data")
    return jax.lax.pmean(jax.grad(mean_loss)(node, x), "data")


@pytest.mark.parametrize("kind", NODES)
def test_data_parallel_gradients_are_those_of_one_device(kind, x64):
    pair = LoRAPair(jax.random.normal(KEY, (6, 2)), jax.random.normal(KEY, (2, 10)))
    node, x = NODES[kind](pair), jax.random.normal(KEY, (8, 6))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    keywords = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P()}
    by_pmap = jax.pmap(unchecked, axis_name="data", in_axes=(None, 0))
    expected = jax.jit(jax.grad(mean_loss))(node, x)
    found = {
        "shard_map": jax.jit(jax.shard_map(checked, **keywords))(node, x),
        "unchecked": jax.jit(jax.shard_map(unchecked, check_vma=False, **keywords))(node, x),
        "pmap": jax.tree.map(lambda g: g[1], by_pmap(node, x.reshape(2, 4, 6))),
    }
    explicit = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(explicit, spec))
    with jax.set_mesh(explicit):
        grad = jax.jit(jax.grad(mean_loss))
        found["explicit mesh"] = grad(place(node, P()), place(x, P("data")))
    for setting, grads in found.items():
        for one, many in zip(jax.tree.leaves(expected), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(many, one, rtol=1e-10, atol=1e-12, err_msg=setting)


@pytest.mark.parametrize("setting", ["checked", "unchecked"])
def test_the_scale_of_shadowed_pairs_has_the_gradient_of_the_whole_batch(setting):
    node, x = shadow(make_pair(), KEY), jax.random.normal(KEY, (8, 8))
    named = None if setting == "checked" else "data"
    loss = lambda scale, x: jnp.mean(jnp.sin(nn.lora_apply(x, node, scale, axis_name=named)))

    def gradient(scale, x):
        if setting == "unchecked":
            return jax.grad(loss)(scale, x)
        return jax.grad(lambda scale: jax.lax.pmean(loss(scale, x), "data"))(scale)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=setting == "checked",
    )
    alone = jax.grad(lambda scale: jnp.mean(jnp.sin(nn.lora_apply(x, node, scale))))(1.5)
    np.testing.assert_allclose(jax.jit(run)(1.5, x), alone, rtol=1e-5)
