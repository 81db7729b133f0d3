"""The engine on toy rules: the verbs, auxiliary leaves, small state and failed factorizations."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import (
    DEFAULT_SPECS,
    LoRAPair,
    PairSpec,
    Unpaired,
    altlora,
    altlora_plus,
    engine,
    frame,
    polora,
    sds_lora,
    skipped,
)
from lowrank_optax._core.batching import together
from lowrank_optax._core.verbs import Verbs
from lowrank_optax.engine import NoState, both, gram, lift


@engine.register_node
class CountedPair(NamedTuple):
    """A pair with a leaf that no gradient trains."""

    a: Any
    b: Any
    steps: Any


SPEC = PairSpec("lora_a", "lora_b", auxiliary={"steps": "lora_steps"})
TREE = {
    "q": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3)), "lora_steps": jnp.zeros(2)},
    "bias": jnp.ones(3),
}
PAIR = LoRAPair(jnp.eye(4, 2), jnp.ones((2, 3)))


def count_steps(pairs, grads, params, state):
    count = lambda g, p: CountedPair(-g.a, -g.b, jnp.ones_like(p.steps))
    return pairs.each(count, grads, params), state


counting = functools.partial(
    lift, count_steps, NoState, fallback=optax.set_to_zero(), specs=[SPEC], node=CountedPair
)


def test_auxiliary_leaves_are_moved_by_ordinary_updates():
    tx, params = counting(), TREE
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert params["q"]["lora_steps"].tolist() == [3.0, 3.0]
    assert jnp.array_equal(params["bias"], TREE["bias"])


def test_a_pair_without_the_auxiliary_leaf_is_named():
    tree = {"q": {"lora_a": TREE["q"]["lora_a"], "lora_b": TREE["q"]["lora_b"]}}
    with pytest.raises(ValueError, match=r"q: .* works on CountedPair, but this is a LoRAPair"):
        counting().init(tree)


def test_a_method_refuses_nodes_it_does_not_know():
    with pytest.raises(ValueError, match=r"q: .* works on LoRAPair, but this is a CountedPair"):
        altlora(0.1, specs=[SPEC]).init(TREE)


def test_each_maps_pair_by_pair_and_takes_tuples_apart():
    two = Verbs([{}, {}])
    assert two.each(lambda x, y: x * y, [1, 2], [3, 4]) == [3, 8]
    assert two.each(lambda x: (x, -x), [1, 2]) == ([1, 2], [-1, -2])
    assert two.each(lambda x: x, [None, 2]) == [None, 2]
    assert two.each(lambda x: (x, -x), [None, 2]) == ([None, 2], [None, -2])


def test_matrices_of_one_shape_share_one_call():
    calls = []

    def invert(stack):
        calls.append(stack.shape)
        return jnp.linalg.inv(stack)

    matrices = [2 * jnp.eye(3), jnp.broadcast_to(4 * jnp.eye(3), (2, 5, 3, 3)), 8 * jnp.eye(2)]
    results, failures = together(invert, matrices)
    assert sorted(calls) == [(1, 2, 2), (11, 3, 3)]
    assert int(failures) == 0
    for matrix, result in zip(matrices, results, strict=True):
        np.testing.assert_allclose(result, jnp.linalg.inv(matrix))


def test_both_sides_of_all_pairs_share_one_call():
    calls = []

    def negate_and_double(stack):
        calls.append(stack.shape)
        return -stack, 2 * stack

    grams = [both(gram, PAIR), both(gram, LoRAPair(2 * PAIR.a, 3 * PAIR.b))]
    negative, double = Verbs([{}, {}]).together(negate_and_double, grams)
    assert calls == [(2, 2, 2), (2, 2, 2)]  # four matrices, in stacks of √4
    expected = [jax.tree.map(lambda x, f=f: f * x, grams) for f in (-1, 2)]
    jax.tree.map(np.testing.assert_array_equal, [negative, double], expected)


def test_many_matrices_come_back_in_order():
    matrices = [float(i + 1) * jnp.eye(2) for i in range(40)]
    results, _ = together(jnp.negative, matrices)
    for matrix, result in zip(matrices, results, strict=True):
        assert jnp.array_equal(result, -matrix)


def test_large_results_that_are_finite_are_kept():
    huge = jnp.full((2, 2), 3e38)
    [result], failures = together(lambda stack: stack, [huge])
    assert jnp.array_equal(result, huge)
    assert int(failures) == 0


def test_switch_is_one_conditional_and_counts_the_failures_of_its_branch():
    def chosen(index):
        verbs = Verbs([{}])
        invert = lambda scale: verbs.together(jnp.linalg.inv, [scale * jnp.eye(2)])
        verbs.together(jnp.linalg.inv, [jnp.zeros((2, 2))])
        [result] = verbs.switch(index, [lambda: invert(2.0), lambda: invert(0.0)])
        return result[0, 0], verbs.failures

    assert str(jax.make_jaxpr(chosen)(jnp.array(0))).count("cond[") == 1
    assert [float(x) for x in chosen(jnp.array(0))] == [0.5, 1]
    assert [float(x) for x in chosen(jnp.array(1))] == [0.0, 2]
    assert [float(x) for x in chosen(True)] == [0.0, 2]


def test_descend_applies_schedule_decay_and_mask():
    def step_along_ones(pairs, grads, params, state):
        return pairs.descend(jax.tree.map(jnp.ones_like, params), params), state

    tx = lift(
        step_along_ones,
        NoState,
        learning_rate=lambda count: 0.1 * (count + 1),
        weight_decay=0.5,
        mask=LoRAPair(True, False),
    )
    state = tx.init(PAIR)
    for rate in (0.1, 0.2):
        updates, state = tx.update(PAIR, state, PAIR)
        np.testing.assert_allclose(updates.a, -rate * (1 + 0.5 * PAIR.a), rtol=1e-6)
        np.testing.assert_allclose(updates.b, -rate * jnp.ones((2, 3)), rtol=1e-6)


class Mixed(NamedTuple):
    """A state of both kinds."""

    mu: Any
    matrix: engine.Small


def test_state_starts_at_zero_and_small_fields_are_lists():
    rule = lambda pairs, grads, params, state: (pairs.descend(grads, params), state)
    tx = lift(rule, Mixed, learning_rate=0.1)
    params = {"q": jax.tree.map(lambda x: x.astype(jnp.bfloat16), PAIR), "bias": jnp.ones(3)}
    state = tx.init(params)
    assert jax.tree.map(jnp.shape, state.pairs.mu["q"]) == LoRAPair((4, 2), (2, 3))
    assert state.pairs.mu["bias"] == optax.MaskedNode()
    assert jax.tree.map(jnp.shape, state.pairs.matrix) == [LoRAPair((2, 2), (2, 2))]
    assert {x.dtype for x in jax.tree.leaves(state.pairs)} == {jnp.dtype("float32")}
    assert not any(jnp.any(x) for x in jax.tree.leaves(state.pairs))


def as_generator(pairs, grads, params, state):
    yield grads, state


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (as_generator, TypeError, "the rule of mine is a generator"),
        (lambda p, g, x, s: g, ValueError, r"must return \(updates, state\)"),
        (lambda p, g, x, s: (g, None), ValueError, "a state of the structure and shapes"),
        (lambda p, g, x, s: (g[0], s), ValueError, "a list of updates, one for each of 1 pairs"),
        (lambda p, g, x, s: ([], s), ValueError, "a list of updates, one for each of 1 pairs"),
        (
            lambda p, g, x, s: ([g[0]._replace(b=g[0].a)], s),
            ValueError,
            r"for 'b' of shape \(2, 3\) it gave \(4, 2\)",
        ),
    ],
)
def test_what_a_rule_must_not_return_is_refused(rule, error, message):
    tx = lift(rule, Mixed, learning_rate=0.1, name="mine")
    with pytest.raises(error, match=message):
        tx.update(PAIR, tx.init(PAIR), PAIR)


def test_an_update_that_a_rule_leaves_out_is_zero():
    tx = lift(lambda p, g, x, s: ([LoRAPair(g[0].a, None)], s), NoState)
    updates, _ = tx.update(PAIR, tx.init(PAIR), PAIR)
    assert jnp.array_equal(updates.a, PAIR.a)
    assert not jnp.any(updates.b)


class TwoFields(NamedTuple):
    """Without factors."""

    x: Any
    y: Any


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            TwoFields,
            TypeError,
            "TwoFields cannot be a kind of pair: register a NamedTuple with the",
        ),
        (dict, TypeError, "dict cannot be a kind of pair"),
        (CountedPair, ValueError, "CountedPair is registered already"),
    ],
)
def test_what_is_no_kind_of_pair_is_refused(kind, error, message):
    with pytest.raises(error, match=message):
        engine.register_node(kind)


def test_what_a_method_skips_as_the_fallback_of_another_counts_too():
    huge = LoRAPair(jnp.full((4, 2), 1e25), jnp.ones((2, 3)))
    params = {"q": LoRAPair(jnp.eye(4, 2), jnp.ones((2, 3))), "other": huge}
    tx = altlora(0.1, specs=[Unpaired("other"), *DEFAULT_SPECS], fallback=altlora(0.1))
    params["other"] = dict(zip(("lora_a", "lora_b"), huge, strict=True))
    updates, state = tx.update(params, tx.init(params), params)
    assert state.skipped == 0
    assert skipped(state) == 1
    assert not jnp.any(updates["other"]["lora_b"])


def test_a_failed_factorization_does_not_move_its_pair_and_is_counted():
    """Factors that overflow when squared have no Gram matrix; the other pair must not notice."""
    huge = LoRAPair(jnp.full((4, 2), 1e25), jnp.ones((2, 3)))
    fine = LoRAPair(jnp.eye(4, 2), jnp.ones((2, 3)))
    params = {"fine": fine, "huge": huge}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = altlora(0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    assert int(state.skipped) == 1
    assert not jnp.any(updates["huge"].b)
    alone, _ = tx.update({"fine": grads["fine"]}, tx.init({"fine": fine}), {"fine": fine})
    np.testing.assert_allclose(updates["fine"].b, alone["fine"].b, rtol=1e-6)


def test_small_algebra_is_exact_for_bfloat16_inputs():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 4)), jnp.bfloat16)
    np.testing.assert_allclose(gram("a", x), np.float64(x).T @ np.float64(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [altlora, altlora_plus, polora])
def test_low_precision_gradients_do_not_round_updates_of_float32_parameters(make):
    params = LoRAPair(jnp.eye(6, 2), jnp.eye(2, 5))
    wide = jax.tree.map(lambda x: 0.5 * x, params)
    narrow = jax.tree.map(lambda x: x.astype(jnp.float16), wide)
    tx = make(2e-8)
    updates, _ = tx.update(narrow, tx.init(params), params)
    expected, _ = tx.update(wide, tx.init(params), params)
    control = optax.adamw(2e-8).update(narrow, optax.adamw(2e-8).init(params), params)[0]
    for own, other, theirs in zip(updates, expected, control, strict=True):
        assert own.dtype == theirs.dtype == jnp.float32
        np.testing.assert_allclose(own, other, rtol=1e-3)
        assert jnp.any(own != 0)


def test_frames_are_orthonormal_with_float16_gradients():
    node = frame(LoRAPair(jnp.ones((6, 2)) + jnp.eye(6, 2), jnp.eye(2, 5)), jax.random.key(0))
    tx = sds_lora(0.1, total_steps=20, warmup_steps=0)
    state = tx.init(node)
    for _ in range(6):
        grads = jax.tree.map(lambda x: (x + 1).astype(jnp.float16), node)
        updates, state = tx.update(grads, state, node)
        node = optax.apply_updates(node, updates)
    np.testing.assert_allclose(node.f_in.T @ node.f_in, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(node.f_out @ node.f_out.T, np.eye(2), atol=1e-5)
