"""The engine on toy rules: batching, turns, auxiliary leaves and failed factorizations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, PairSpec, altlora, linalg
from lowrank_optax.batching import Batched, Either, answer
from lowrank_optax.pairwise import lift


class NoState(NamedTuple):
    """A method without state."""


class CountedPair(NamedTuple):
    """A pair with a leaf that no gradient trains."""

    a: Any
    b: Any
    steps: Any


SPEC = PairSpec("lora_a", "lora_b", auxiliary={"steps": "lora_steps"}, nodes=(CountedPair,))
TREE = {
    "q": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3)), "lora_steps": jnp.zeros(2)},
    "bias": jnp.ones(3),
}


def counting_rule(step, grads, state, pair, scale):
    yield []
    return CountedPair(-grads.a, -grads.b, jnp.ones_like(pair.steps)), state


def counting(**keywords):
    return lift(
        [counting_rule],
        NoState,
        lambda pair: NoState(),
        fallback=optax.set_to_zero(),
        specs=[SPEC],
        node=CountedPair,
        **keywords,
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


def test_requests_of_one_shape_share_one_call():
    calls = []

    def invert(stack):
        calls.append(stack.shape)
        return jnp.linalg.inv(stack)

    matrices = [2 * jnp.eye(3), jnp.broadcast_to(4 * jnp.eye(3), (2, 5, 3, 3)), 8 * jnp.eye(2)]
    results, failures = answer([Batched(invert, m) for m in matrices])
    assert sorted(calls) == [(1, 2, 2), (11, 3, 3)]
    assert int(failures) == 0
    for matrix, result in zip(matrices, results, strict=True):
        np.testing.assert_allclose(result, jnp.linalg.inv(matrix))


def test_many_requests_come_back_in_order():
    matrices = [float(i + 1) * jnp.eye(2) for i in range(40)]
    results, _ = answer([Batched(jnp.negative, m) for m in matrices])
    for matrix, result in zip(matrices, results, strict=True):
        assert jnp.array_equal(result, -matrix)


def test_one_of_two_things_is_decided_for_all_pairs_by_one_conditional():
    def request(flag, i):
        then, otherwise = (lambda: jnp.array(i)), (lambda: jnp.array(-i))
        return Either(flag, then, otherwise)

    def both(first, second):
        results, failures = answer([request(f, i) for i in (1, 2) for f in (first, second)])
        return results, failures

    flags = jnp.array(True), jnp.array(False)
    assert str(jax.make_jaxpr(both)(*flags)).count("cond[") == 2
    results, failures = both(*flags)
    assert [int(r) for r in results] == [1, -1, 2, -2]
    assert int(failures) == 0


def test_turns_follow_the_count():
    def mover(side):
        def rule(step, grads, state, pair, scale):
            yield []
            updates = {s: jnp.full_like(x, s == side) for s, x in pair._asdict().items()}
            return LoRAPair(**updates), state

        return rule

    tx = lift(
        [mover("a"), mover("b")],
        NoState,
        lambda pair: NoState(),
        fallback=optax.identity(),
        turn=lambda count: (count // 2) % 2,
    )
    pair = LoRAPair(jnp.zeros((4, 2)), jnp.zeros((2, 3)))
    state = tx.init(pair)
    moved = []
    for _ in range(5):
        updates, state = tx.update(pair, state, pair)
        moved.append("a" if jnp.any(updates.a) else "b")
    assert moved == ["a", "a", "b", "b", "a"]


def test_a_failed_factorization_does_not_move_its_pair_and_is_counted():
    """Factors that overflow when squared have no Gram matrix; the other pair must not notice."""
    huge = LoRAPair(jnp.full((4, 2), 1e25), jnp.ones((2, 3)))
    fine = LoRAPair(jnp.eye(4, 2), jnp.ones((2, 3)))
    params = {"fine": fine, "huge": huge}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = altlora(0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    assert int(state.skipped) == 1
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates["huge"]))
    alone, _ = tx.update({"fine": grads["fine"]}, tx.init({"fine": fine}), {"fine": fine})
    np.testing.assert_array_equal(updates["fine"].b, alone["fine"].b)


def test_small_algebra_is_exact_for_bfloat16_inputs():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 4)), jnp.bfloat16)
    np.testing.assert_allclose(
        linalg.gram("a", x), np.float64(x).T @ np.float64(x), rtol=1e-5, atol=1e-5
    )
