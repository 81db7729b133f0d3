"""Small inputs that once failed silently, each with its right value."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_optax import (
    LoRAPair,
    altlora,
    altlora_plus,
    clip_by_global_norm,
    find_pairs,
    frame,
    nn,
    oplora,
    polora,
    scale_gradients,
    sds_lora,
    shadow,
    skipped,
)

PAIR = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 5)))


def init_and_update(tx, params):
    return tx.update(params, tx.init(params), params)


# Leaves beside the pairs under a rate that is not AdamW's

WITH_HEAD = {"q": PAIR, "head": jnp.ones(3)}
WITHOUT_HEAD = {"q": PAIR}


@pytest.mark.parametrize("make", [altlora, polora])
def test_a_head_under_a_rate_that_is_not_adamws_is_warned_about(make):
    with pytest.warns(UserWarning, match=r"trains head by AdamW at its own learning rate"):
        make(0.3).init(WITH_HEAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(0.3).init(WITHOUT_HEAD)
        make(0.3, fallback=optax.adamw(1e-3)).init(WITH_HEAD)
        make(0.3, allow_no_pairs=True).init({"head": jnp.ones(3)})


def test_a_head_under_the_rate_of_adamw_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        altlora_plus(1e-3).init(WITH_HEAD)


def test_a_head_beside_shadows_is_warned_about():
    shadowed = {"q": shadow(PAIR, jax.random.key(0)), "head": jnp.ones(3)}
    with pytest.warns(UserWarning, match=r"oplora trains head by AdamW"):
        oplora(0.3).init(shadowed)


# OPLoRA's momentum beside what acts on all leaves


def fitting():
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (32, 12)), jax.random.normal(keys[1], (12, 8))
    node = shadow(LoRAPair(jax.random.normal(keys[2], (12, 3)) / 3, jnp.zeros((3, 8))), keys[2])
    return node, lambda p: jnp.mean((nn.lora_apply(x, p) - x @ w) ** 2)


def l2(loss):
    return lambda p: loss(p) + 0.005 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))


FOREIGN = {
    "decay": (lambda tx: optax.chain(optax.add_decayed_weights(0.01), tx), lambda loss: loss),
    "l2": (lambda tx: tx, l2),
    "noise": (
        lambda tx: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), tx),
        lambda f: f,
    ),
    "clip": (lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx), lambda loss: loss),
    "loss scale": (lambda tx: tx, lambda loss: lambda p: 1024 * loss(p)),
}


def train(tx, loss, node, steps=12):
    state = tx.init(node)

    @jax.jit
    def step(node, state):
        updates, state = tx.update(jax.grad(loss)(node), state, node)
        return optax.apply_updates(node, updates), state

    for _ in range(steps):
        node, state = step(node, state)
    jax.effects_barrier()
    return node, state


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("kind", ["decay", "l2", "noise"])
def test_what_is_added_to_oploras_gradients_is_refused_counted_and_told(kind, iterations):
    wrap, changed = FOREIGN[kind]
    node, loss = fitting()
    node = shadow(LoRAPair(node.a, node.b), jax.random.key(3), iterations=iterations)
    tx = wrap(oplora(0.02, iterations=iterations))
    with pytest.warns(UserWarning, match=r"moved no pair.*weight decay"):
        after, state = train(tx, changed(loss), node)
    assert skipped(state) == 12
    assert loss(after) == loss(node)


@pytest.mark.parametrize("kind", ["clip", "loss scale"])
def test_oplora_that_is_scaled_stands_still_and_says_so_unless_its_products_are_linear(kind):
    wrap, changed = FOREIGN[kind]
    node, loss = fitting()
    factor = 1024 if kind == "loss scale" else 1
    if kind == "clip":
        with pytest.warns(UserWarning, match="moved no pair"):
            after, state = train(wrap(oplora(0.02)), changed(loss), node)
        assert skipped(state) == 12
        assert loss(after) == loss(node)
    linear = shadow(LoRAPair(node.a, node.b), jax.random.key(3), iterations=0)
    after, state = train(wrap(oplora(0.02 / factor, iterations=0)), changed(loss), linear)
    assert skipped(state) == 0
    assert loss(after) < loss(node)


def test_of_a_stack_the_entries_with_true_products_move_without_a_warning():
    one, loss = fitting()
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    tx = oplora(0.02)
    grads = jax.grad(lambda p: jnp.sum(jax.vmap(loss)(p)))(stack)
    grads = jax.tree.map(lambda leaf: leaf.at[1].multiply(0.1), grads)  # as clipping would
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, state = jax.jit(tx.update)(grads, tx.init(stack), stack)
        jax.effects_barrier()
    after = optax.apply_updates(stack, updates)
    of = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)
    assert loss(of(after, 0)) < loss(one)
    assert loss(of(after, 1)) == loss(one)
    assert skipped(state) == 1


def test_oplora_without_foreign_changes_says_nothing():
    node, loss = fitting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after, state = train(oplora(0.02), loss, node)
    assert skipped(state) == 0
    assert loss(after) < loss(node)


# Names


def test_one_layer_with_two_names_has_one_name():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.query = nnx.Linear(6, 6, rngs=rngs)
            self.also_query = self.query

    model = Tied(nnx.Rngs(0))
    reported = nn.add_lora(model, "query", nn.LoRAConfig(2), rngs=nnx.Rngs(1))
    scales = nn.lora_scales(model)
    found = [pair.path for pair in find_pairs(nnx.state(model, nnx.LoRAParam)).pairs]
    assert reported == list(scales) == found == ["also_query"]
    assert [row.path for row in nn.lora_summary(model).rows] == found
    optimizer = nnx.Optimizer(model, altlora_plus(1e-2, scale=scales), wrt=nnx.LoRAParam)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda m: m.query.lora_b[...].sum(), argnums=wrt)(model)
    optimizer.update(model, grads)
    assert nn.merge_lora(model) == nn.unmerge_lora(model) == nn.remove_lora(model) == found


@pytest.mark.parametrize("target", [r"a\.b", "a/b", "a.b"])
def test_a_key_with_a_dot_has_one_name(target):
    model = nnx.Dict({"a.b": nnx.Linear(4, 4, rngs=nnx.Rngs(0))})
    assert nn.add_lora(model, target, nn.LoRAConfig(2), rngs=nnx.Rngs(1)) == ["a/b"]
    assert list(nn.lora_scales(model)) == ["a/b"]
    params = nnx.state(model, nnx.LoRAParam)
    assert [pair.path for pair in find_pairs(params).pairs] == ["a/b"]
    init_and_update(altlora(0.1, scale=nn.lora_scales(model)), params)


def test_names_stay_through_split_and_merge():
    model = nnx.Dict(z=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), a=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    nn.add_lora(model, "z|a", nn.LoRAConfig(2), rngs=nnx.Rngs(1))
    again = nnx.merge(*nnx.split(model))
    assert nn.lora_scales(again) == nn.lora_scales(model)


@pytest.mark.parametrize(
    ("params", "scale", "message"),
    [
        ({"q": PAIR, "k": PAIR}, {"q": 2.0}, "no number for 'k'; it names 'q'"),
        (
            {"lora": {"q": PAIR}},
            {"q": 2.0},
            "'lora/q'.*wrapped one level deeper: put 'lora'/ before",
        ),
        ({"q": PAIR}, {}, "no number for 'q'; it names nothing"),
    ],
)
def test_a_scale_by_path_says_what_it_lacks(params, scale, message):
    with pytest.raises(ValueError, match=message):
        init_and_update(altlora_plus(0.1, scale=scale), params)


# Pairs that are not found


def test_factors_of_peft_embeddings_are_a_pair():
    tree = {
        "q_proj": {
            "lora_A": {"default": {"weight": jnp.ones((2, 6))}},
            "lora_B": {"default": {"weight": jnp.ones((5, 2))}},
        },
        "embed": {
            "lora_embedding_A": {"default": jnp.ones((2, 50))},
            "lora_embedding_B": {"default": jnp.zeros((6, 2))},
        },
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_pairs(tree)
    names = [pair.path for pair in found.pairs]
    shapes = {
        name: (pair.a.shape, pair.b.shape)
        for name, pair in zip(names, found.take(tree), strict=True)
    }
    assert shapes == {"embed/default": ((50, 2), (2, 6)), "q_proj/default": ((6, 2), (2, 5))}


def test_near_misses_are_named_with_the_spec_that_takes_them():
    tree = {
        "good": PAIR,
        "layer": {"lora_A_w": jnp.ones((2, 40)), "lora_B_w": jnp.ones((5, 2))},
        "flora": jnp.ones((3, 3)),
        "lora_scale": jnp.ones(()),
    }
    with pytest.warns(UserWarning, match="layer/lora_A_w, layer/lora_B_w") as given:
        find_pairs(tree)
    (warning,) = given
    assert "flora" not in str(warning.message)
    from lowrank_optax import DEFAULT_SPECS, PairSpec  # noqa: F401

    spec = str(warning.message).partition("specs=")[2].rstrip(".")
    found = find_pairs(tree, eval(spec))
    assert [pair.path for pair in found.pairs] == ["good", "layer"]


@pytest.mark.parametrize("params", [{"w": jnp.ones(3)}, {}, []])
@pytest.mark.parametrize(
    "make", [altlora, oplora, lambda rate, **k: sds_lora(rate, total_steps=20, **k)]
)
def test_parameters_without_pairs_are_an_error_unless_allowed(make, params):
    with pytest.raises(ValueError, match=r"add_lora.*allow_no_pairs=True"):
        make(0.1).init(params)
    make(0.1, allow_no_pairs=True).init(params)


def test_a_forgotten_add_lora_is_an_error():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="given no parameters at all"):
        nnx.Optimizer(model, altlora(0.1), wrt=nnx.LoRAParam)


def test_optaxs_own_placeholders_are_no_error():
    tx = optax.chain(optax.clip(1.0), altlora(0.1))
    state = tx.init({"q": PAIR})
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    labels = {"q": "ours", "w": "rest"}
    both = optax.partition({"ours": altlora(0.1), "rest": optax.sgd(0.1)}, labels)
    init_and_update(both, {"q": PAIR, "w": jnp.ones(3)})


# States of others


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda p: altlora(0.1).init(p), "state of another method, AltLoRAState"),
        (lambda p: optax.adamw(0.1).init(p), "needs the state of its own `init`, got a tuple"),
        (lambda p: altlora_plus(0.1).init(p)._asdict(), "restored without a target"),
        (
            lambda p: altlora_plus(0.1).init({"q": PAIR._replace(a=jnp.ones((7, 2)))}),
            "q: the state",
        ),
    ],
)
def test_a_state_of_another_run_is_refused(state, message):
    params = {"q": PAIR}
    with pytest.raises((TypeError, ValueError), match=message):
        altlora_plus(0.1).update(params, state(params), params)


# What a review by users of another kind found


def test_a_pair_under_an_attribute_called_value_keeps_its_name():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Attention:
        query: LoRAPair
        value: LoRAPair

    tree = {"attention": Attention(PAIR, PAIR)}
    names = [pair.path for pair in find_pairs(tree).pairs]
    assert names == ["attention/query", "attention/value"]
    assert [pair.path for pair in find_pairs(Attention(PAIR, PAIR)).pairs] == ["query", "value"]
    boxed = nnx.State({"w": nnx.Param(PAIR)})
    assert [pair.path for pair in find_pairs(boxed).pairs] == ["w"]


@pytest.mark.parametrize(
    ("rate", "error"),
    [(None, TypeError), (-0.1, ValueError), (float("nan"), ValueError), ("1e-3", TypeError)],
)
def test_the_learning_rate_of_sds_lora_is_checked(rate, error):
    with pytest.raises(error, match="`inner` must be"):
        sds_lora(rate, total_steps=20)


@pytest.mark.parametrize(
    ("option", "value"),
    [("jax_numpy_rank_promotion", "raise"), ("jax_numpy_dtype_promotion", "strict")],
)
@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_scaled_products_in_strict_modes(option, value, iterations):
    node = shadow(PAIR, jax.random.key(0), iterations=iterations)
    expected = scale_gradients(node, 0.5)
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        tx = clip_by_global_norm(1.0)
        tx.update(node, tx.init(node), node)
        jax.tree.map(np.testing.assert_array_equal, scale_gradients(node, 0.5), expected)
    finally:
        jax.config.update(option, before)


def test_states_of_others_are_refused_by_sds_lora():
    tree = {"q": frame(PAIR)}
    tx = sds_lora(0.1, total_steps=20)
    good = tx.init(tree)
    for state in (altlora(0.1).init({"q": PAIR}), good._asdict(), None):
        with pytest.raises(TypeError, match="sds_lora needs the state of its own `init`"):
            tx.update(tree, state, tree)
    wider = {"q": frame(LoRAPair(jnp.ones((6, 4)), jnp.ones((4, 5))))}
    with pytest.raises(ValueError, match="for factors of other shapes"):
        tx.update(tree, tx.init(wider), tree)


@pytest.mark.parametrize("others", [["q"], ["q", "v"], ["q", "k", "v"]])
def test_the_state_of_other_layers_is_refused(others):
    tree = {"q": PAIR, "k": PAIR}
    tx = altlora(0.1)
    with pytest.raises(ValueError, match="altlora is for other parameters than these"):
        tx.update(tree, tx.init(dict.fromkeys(others, PAIR)), tree)


def test_a_layer_called_by_a_name_behind_keywords():
    class Forwarding(nnx.Linear):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    model = nnx.Sequential(Forwarding(6, 5, rngs=nnx.Rngs(0)))
    b_init = jax.nn.initializers.ones
    nn.add_lora(model, "layers/0", nn.LoRAConfig(2, b_init=b_init), rngs=nnx.Rngs(1))
    x = jnp.ones((3, 6))
    np.testing.assert_array_equal(model.layers[0](inputs=x), model.layers[0](x))


def test_a_layer_that_returns_more_than_an_array_is_named():
    class Two(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x), 0.0

    model = nnx.Sequential(Two(6, 5, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(2), rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match="Two returns a tuple, not one array"):
        model(jnp.ones((3, 6)))


def test_merging_a_layer_with_a_call_of_its_own_is_warned_about():
    class LinearReLU(nnx.Linear):
        def __call__(self, x):
            return nnx.relu(super().__call__(x))

    model = nnx.Sequential(LinearReLU(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 5, rngs=nnx.Rngs(1)))
    nn.add_lora(model, "layers/.", nn.LoRAConfig(2), rngs=nnx.Rngs(1))
    with pytest.warns(UserWarning, match="layers/0: LinearReLU has its own __call__") as given:
        nn.merge_lora(model)
    assert len(given) == 1


@pytest.mark.parametrize("names", [("loraA", "loraB"), ("lora-a", "lora-b")])
def test_more_near_misses_are_named(names):
    tree = {"good": PAIR, "m": dict(zip(names, PAIR, strict=True))}
    with pytest.warns(UserWarning, match=f"m/{names[0]}"):
        find_pairs(tree)


@pytest.mark.parametrize("name", ["flora", "loral", "Loradian"])
def test_words_that_only_contain_it_are_none(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_pairs({"good": PAIR, "m": {name: PAIR.a}})


def test_an_optimizer_older_than_the_adapters_is_diagnosed():
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 5, rngs=nnx.Rngs(1)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(2), rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, altlora(0.1), wrt=nnx.LoRAParam)
    assert nn.check_training_setup(model, optimizer) == []
    nn.add_lora(model, "layers/1", nn.LoRAConfig(2), rngs=nnx.Rngs(1))
    [problem] = nn.check_training_setup(model, optimizer)
    assert problem.startswith("The optimizer's state is that of other parameters")


@pytest.mark.parametrize("value", [np.array(-1.0), jnp.float32(-1.0), -1.0])
def test_numbers_held_as_arrays_are_checked(value):
    with pytest.raises(ValueError, match=r"`learning_rate` must (be positive|not be negative)"):
        altlora(value)
    with pytest.raises(ValueError, match="`scale` must be positive"):
        altlora(0.1, scale=value).init({"q": PAIR})
    with pytest.raises(TypeError, match="must be one number, got an array of shape"):
        altlora(jnp.ones(3))


def test_a_fallback_that_is_no_transformation_is_refused():
    with pytest.raises(TypeError, match="`fallback` must be an optax transformation"):
        altlora(0.1, fallback=0.1)
