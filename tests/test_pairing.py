"""Pairing: every layout in the wild, and the errors that name the path and the remedy."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_optax import (
    DEFAULT_SPECS,
    LoRAPair,
    Member,
    PairSpec,
    Unpaired,
    altlora,
    find_pairs,
    scales_from,
)
from lowrank_optax._core.scales import scales
from lowrank_optax.adapters import PeftConfig

A, B = jnp.arange(12.0).reshape(6, 2), jnp.arange(8.0).reshape(2, 4)


def taken(tree, specs=DEFAULT_SPECS):
    """Canonical pairs by path."""
    pairing = find_pairs(tree, specs)
    names = [pair.path for pair in pairing.pairs]
    return dict(zip(names, pairing.take(tree), strict=True))


LAYOUTS = {
    "flax": ({"q": {"lora_a": A, "lora_b": B, "kernel": A}}, "q"),
    "linen collection": (
        {"lora": {"layers_0": {"q": {"lora_a": A, "lora_b": B}}}},
        "lora/layers_0/q",
    ),
    "qwix": ({"q": {"w_lora_a": A, "w_lora_b": B, "w": A}}, "q/w"),
    "peft": ({"q": {"lora_A": A.T, "lora_B": B.T}}, "q"),
    "peft weight": ({"q": {"lora_A": {"weight": A.T}, "lora_B": {"weight": B.T}}}, "q"),
    "peft named adapter": (
        {"q": {"lora_A": {"default": {"weight": A.T}}, "lora_B": {"default": {"weight": B.T}}}},
        "q/default",
    ),
    "peft flat": (
        {"base_model.model.q.lora_A.weight": A.T, "base_model.model.q.lora_B.weight": B.T},
        "base_model/model/q",
    ),
    "node": ({"q": LoRAPair(A, B)}, "q"),
    "node in a list": ([{"q": LoRAPair(A, B)}], "0/q"),
    "root": (LoRAPair(A, B), ""),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_in_the_wild(name):
    tree, path = LAYOUTS[name]
    pairs = taken(tree)
    assert list(pairs) == [path]
    assert jnp.array_equal(pairs[path].a, A)
    assert jnp.array_equal(pairs[path].b, B)


@pytest.mark.parametrize("name", LAYOUTS)
def test_put_undoes_take(name):
    tree, _ = LAYOUTS[name]
    pairing = find_pairs(tree)
    back = pairing.merge(pairing.put(pairing.take(tree), tree), pairing.rest(tree))
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert jnp.array_equal(one, two)


def test_two_qwix_weights_of_one_module_are_two_pairs():
    tree = {"mlp": {"up_lora_a": A, "up_lora_b": B, "down_lora_a": A, "down_lora_b": B}}
    assert set(taken(tree)) == {"mlp/up", "mlp/down"}


def test_nnx_state_and_plain_arrays_have_the_same_paths():
    class Layer(nnx.Module):
        def __init__(self):
            self.lora_a, self.lora_b = nnx.LoRAParam(A), nnx.LoRAParam(B)

    model = nnx.List([Layer()])
    state = nnx.state(model, nnx.LoRAParam)
    assert list(taken(state)) == list(taken(nnx.to_pure_dict(state))) == ["0"]


def test_multi_axis_factors_by_a_declared_spec():
    """A kernel (d, heads, head_dim) whose b keeps its axes, rank first, layers stacked second."""
    a = jnp.arange(2 * 6 * 3.0).reshape(3, 6, 2)  # (layers, d, r)
    b = jnp.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)  # (r, layers, heads, head_dim)
    spec = PairSpec("down", "up", b_rank=0, b_out=(2, 3))
    tree = {"q": {"down": a, "up": b}}
    pair = taken(tree, [spec])["q"]
    assert (pair.a.shape, pair.b.shape) == ((3, 6, 2), (3, 2, 20))
    expected = np.einsum("ldr,rlhk->ldhk", a, b).reshape(3, 6, 20)
    np.testing.assert_allclose(pair.a @ pair.b, expected)
    pairing = find_pairs(tree, [spec])
    assert jnp.array_equal(pairing.put([pair], tree)["q"]["up"], b)


def test_a_callable_declares_pairs():
    def by_letter(path, leaf):
        head, _, last = path.rpartition("/")
        return Member(head, last, PairSpec("a", "b")) if last in ("a", "b") else None

    assert list(taken({"q": {"a": A, "b": B}}, [by_letter])) == ["q"]


def test_spec_drives_the_optimizer():
    transposed = PairSpec("down", "up", a_in=(1,), a_rank=0, b_rank=1, b_out=(0,))
    plain = {"q": LoRAPair(A, B)}
    theirs = {"q": {"down": A.T, "up": B.T}}
    update = altlora(0.1, order="simultaneous").update
    ours, _ = update(plain, altlora(0.1, order="simultaneous").init(plain), plain)
    tx = altlora(0.1, order="simultaneous", specs=[transposed])
    updates, _ = tx.update(theirs, tx.init(theirs), theirs)
    np.testing.assert_allclose(updates["q"]["down"].T, ours["q"].a, rtol=1e-6)
    np.testing.assert_allclose(updates["q"]["up"].T, ours["q"].b, rtol=1e-6)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"q": {"lora_a": A}}, r"Half a pair at 'q'.*q/lora_a.*'b'.*same label"),
        ({"q": {"lora_a": A, "lora_b": B[:1]}}, r"q/lora_a \(6, 2\).*do not multiply.*PairSpec"),
        (
            {"q": LoRAPair(jnp.ones((3, 6, 2)), jnp.ones((4, 2, 5)))},
            r"q/a.*different batch axes: \(3,\) and \(4,\)",
        ),
        ({"q": LoRAPair(jnp.ones((6, 5)), jnp.ones((5, 4)))}, r"rank 5.*min\(in, out\) = 4"),
        ({"q": LoRAPair(jnp.ones((6, 0)), jnp.ones((0, 4)))}, r"rank 0 must lie between 1"),
        ({"q": LoRAPair(jnp.ones(6), jnp.ones((2, 4)))}, r"q/a: a factor needs the axes"),
        (
            {"q": LoRAPair(jnp.ones((6, 2)), optax.MaskedNode())},
            r"Half a pair at 'q'.*give them the same label or mask",
        ),
    ],
)
def test_misshapen_pairs_name_the_path_and_the_remedy(tree, message):
    with pytest.raises(ValueError, match=message):
        find_pairs(tree)


def test_integer_factors_are_refused():
    with pytest.raises(TypeError, match=r"q/a: a LoRA factor must be floating, got int32"):
        find_pairs({"q": LoRAPair(jnp.ones((6, 2), jnp.int32), B)})


def test_one_role_claimed_twice_is_refused():
    everything = lambda path, leaf: Member("all", "a", PairSpec("a", "b"))
    with pytest.raises(ValueError, match=r"x and y both claim the role 'a'"):
        find_pairs({"x": A, "y": A}, [everything])


def test_lookalikes_that_match_no_spec_are_warned_about():
    with pytest.warns(UserWarning, match="q/lora_down.*PairSpec"):
        find_pairs({"q": {"lora_down": A, "lora_up": B}})


TWO = {"x": LoRAPair(A, B), "y": LoRAPair(A, B)}


@pytest.mark.parametrize(
    "scale",
    [
        lambda path: {"x": 2.0, "y": 3.0}[path],
        {"x": 2.0, "y": 3.0},
        {"x": LoRAPair(2.0, 2.0), "y": LoRAPair(3.0, 3.0)},
    ],
)
def test_scales_by_path_by_name_and_by_tree(scale):
    assert scales(find_pairs(TWO), scale) == [2.0, 3.0]
    assert scales(find_pairs(TWO), 4.0) == [4.0, 4.0]


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"x": 2.0}, "`scale` has no number for 'y'; it names 'x'"),
        ({"x": LoRAPair(2.0, 3.0), "y": 1.0}, "x: `scale` differs between its two factors"),
        (-1.0, "x: `scale` must be positive, got -1.0"),
        (float("nan"), "x: `scale` must be positive, got nan"),
        (float("inf"), "x: `scale` must be finite, got inf"),
    ],
)
def test_scales_that_do_not_fit(scale, message):
    with pytest.raises(ValueError, match=message):
        scales(find_pairs(TWO), scale)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"a": ".*/down"}, ValueError, "'.*/down' is a regular expression"),
        ({"b": "^up$"}, ValueError, "is a regular expression"),
        ({"a_in": 0}, TypeError, r"`a_in` must be .*axes.*such as \(0,\), got 0"),
        ({"b_out": [0]}, TypeError, r"`b_out` must be .*got \[0\]"),
        ({"a_rank": (0,)}, TypeError, r"`a_rank` must be an axis, such as 0, got \(0,\)"),
    ],
)
def test_a_spec_is_checked_when_it_is_made(keywords, error, message):
    with pytest.raises(error, match=message):
        PairSpec(**{"a": "down", "b": "up", **keywords})


def test_the_remedy_for_a_rank_that_is_too_high_works():
    named = {"q": {"lora_a": jnp.ones((6, 7)), "lora_b": jnp.ones((7, 9))}}
    with pytest.raises(ValueError, match=r"by specs=\[Unpaired\('q'\), \*DEFAULT_SPECS\]"):
        find_pairs(named)
    assert not find_pairs(named, [Unpaired("q"), *DEFAULT_SPECS]).pairs
    with pytest.raises(ValueError, match=r"smaller LoRA rank for this layer\. If"):
        find_pairs({"q": LoRAPair(*named["q"].values())})


def test_a_pair_that_is_the_whole_tree_has_a_name_in_messages():
    with pytest.raises(ValueError, match="at the root: `scale` must be positive, got 0"):
        scales(find_pairs(LoRAPair(A, B)), 0.0)


def test_scales_are_checked_in_init():
    with pytest.raises(ValueError, match="no number for 'y'; it names 'x'"):
        altlora(0.1, scale={"x": 2.0}).init(TWO)


def test_a_scale_for_each_leaf_may_be_arrays_under_jit():
    params = {"q": LoRAPair(jnp.eye(4, 2), jnp.ones((2, 3)))}
    tx = altlora(0.1, scale=jax.tree.map(lambda _: jnp.float32(2.0), params))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = (one := altlora(0.1, scale=2.0)).update(params, one.init(params), params)
    np.testing.assert_allclose(updates["q"].b, expected["q"].b, rtol=1e-5)


def test_scales_by_rule():
    tree = {"attention": {"q": LoRAPair(A, B)}, "mlp": {"up": LoRAPair(A, B)}}
    rules = scales_from({"attention/*": 2.0, "up": 3.0})
    assert scales(find_pairs(tree), rules) == [2.0, 3.0]
    with pytest.raises(ValueError, match=r"mlp/up: no pattern of `scale` fits, of 'attention'"):
        altlora(0.1, scale=scales_from({"attention": 2.0})).init(tree)
    with pytest.raises(TypeError, match=r"numbers by pattern or an adapters\.PeftConfig, got 2"):
        scales_from(2.0)


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        (".*q", "Write 'q'"),
        ("layers/.*/q", r"Write 'layers/\*/q'"),
        ("^layers/.*$", "Write 'layers'"),
        (".*", r"Write '\*'"),
        ("q|v", "Write one pattern for each alternative"),
        (r"layers/(0|1)", "Write one pattern for each alternative"),
        (r"layers/\d", "Write one pattern for each alternative"),
        ("[qv]", "Write one pattern for each alternative"),
    ],
)
def test_regular_expressions_are_no_patterns(pattern, remedy):
    with pytest.raises(ValueError, match=f"^scales_from: .* is a regular expression.*{remedy}"):
        scales_from({pattern: 2.0, "*": 1.0})
    with pytest.raises(ValueError, match=f"^Unpaired: .* is a regular expression.*{remedy}"):
        Unpaired(pattern)


def test_patterns_of_scales_that_decide_for_no_pair_are_warned_about():
    """A table may serve several models, and a partitioned optimizer sees a part of the pairs."""
    rules = scales_from({"x": 2.0, "typo": 3.0, "*": 1.0, "y": 4.0})
    with pytest.warns(UserWarning, match="no pair: 'typo', 'y'. Pairs there are 'x', 'y'"):
        altlora(0.1, scale=rules).init(TWO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        altlora(0.1, scale=scales_from({"x": 2.0, "y": 3.0, "*": 1.0})).init(TWO)
        altlora(0.1, scale=rules, allow_no_pairs=True).init({"bias": A})


def test_numbers_of_subtrees_and_of_paths_in_them_are_not_mixed():
    """The number of the path would count for nothing."""
    pair = LoRAPair(A, B)
    tree = {"layers": {"0": {"q": pair, "v": pair}}, "head": pair}
    subtrees = {"layers": 2.0, "head": 1.0}
    assert scales(find_pairs(tree), subtrees) == [1.0, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"so 'layers/0/q' would count for nothing; name every"):
        scales(find_pairs(tree), {**subtrees, "layers/0/q": 4.0})


def test_scales_of_a_peft_adapter():
    config = PeftConfig(r=8, alpha=16.0, rank_pattern={"mlp.up": 4}, use_rslora=True)
    tree = {"q": LoRAPair(A, B), "mlp": {"up": LoRAPair(A, B)}}
    found = scales(find_pairs(tree), scales_from(config))
    assert found == pytest.approx([16 / 2, 16 / 8**0.5])
    renamed = scales_from(config, {"q": "mlp.up", "mlp/up": "q"}.get)
    assert scales(find_pairs(tree), renamed) == pytest.approx([16 / 8**0.5, 16 / 2])


def test_rules_are_no_schedule_for_inject_hyperparams():
    rules = scales_from({"x": 2.0, "y": 3.0})
    injected = optax.inject_hyperparams(altlora)(0.1, scale=rules)
    updates, _ = injected.update(TWO, injected.init(TWO), TWO)
    plain = altlora(0.1, scale={"x": 2.0, "y": 3.0})
    expected, _ = plain.update(TWO, plain.init(TWO), TWO)
    np.testing.assert_allclose(updates["y"].a, expected["y"].a, rtol=1e-6)
    by_callable = scales_from(lambda path: 2.0 if path == "x" else 3.0)
    injected = optax.inject_hyperparams(altlora)(0.1, scale=by_callable)
    updates, _ = injected.update(TWO, injected.init(TWO), TWO)
    np.testing.assert_allclose(updates["y"].a, expected["y"].a, rtol=1e-6)
