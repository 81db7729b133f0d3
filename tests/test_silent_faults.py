"""Small inputs that once failed silently, each with its right value."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from lowrank_optax import (
    LoRAPair,
    altlora,
    altlora_plus,
    find_pairs,
    nn,
    oplora,
    sds_lora,
    shadow,
    skipped,
)

PAIR = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 5)))


def init_and_update(tx, params):
    return tx.update(params, tx.init(params), params)


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
