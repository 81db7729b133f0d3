"""Random parameter trees: pairs are found or an error is clear, and no factor is lost silently."""

import random
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, altlora, find_pairs

TREES = 2400
WITH_UPDATE = 16  # every so many trees are also trained, beside optax's own adamw
BUNCHES = 8

# How libraries name factors: the names within a layer, and whether the rank axis of a comes first.
NAMES = {
    "flax": (["lora_a"], ["lora_b"], False),
    "qwix": (["kernel_lora_a"], ["kernel_lora_b"], False),
    "peft": (["lora_A"], ["lora_B"], True),
    "peft weight": (["lora_A", "weight"], ["lora_B", "weight"], True),
    "peft named": (["lora_A", "default", "weight"], ["lora_B", "default", "weight"], True),
    "peft flat": (["q.lora_A.weight"], ["q.lora_B.weight"], True),
    "embedding": (["lora_embedding_A", "default"], ["lora_embedding_B", "default"], True),
    "gemma": (["lora", "a"], ["lora", "b"], False),
    "kohya": (["lora_down", "weight"], ["lora_up", "weight"], True),
    "keras": (["lora_kernel_a"], ["lora_kernel_b"], False),
}
NEAR_MISSES = {
    "unknown kind": (["lora_left"], ["lora_right"], False),
    "unknown suffix": (["lora_A_quant"], ["lora_B_quant"], True),
}
FAULTS = ("half", "ranks differ", "integer", "rank too large")
OTHERS = [(), (3,), (0,), (4, 3), (2, 0), (2, 3, 4)]


class Holder(NamedTuple):
    first: object
    second: object


class Tree(NamedTuple):
    """A tree, and what is known of it.

    Args:
        params: the tree.
        pairs: how many good pairs it has.
        near: the names that no layout knows.
        fault: what is wrong, or None.
    """

    params: dict
    pairs: int
    near: list
    fault: str | None


def put(layer, keys, value):
    for key in keys[:-1]:
        layer = layer.setdefault(key, {})
    layer[keys[-1]] = value


def array(rng, shape, dtype):
    return np.asarray(rng.normal(size=shape)).astype(dtype)


def add_pair(rng, layer, names, *, fault=None):
    name_a, name_b, rank_first = names
    n_in, n_out, rank = (int(n) for n in rng.integers([3, 3, 1], [7, 7, 3]))
    dtype = [np.float32, np.float16, jnp.bfloat16][int(rng.integers(3))]
    rank_a, rank_b = (
        (8, 8) if fault == "rank too large" else (rank, rank + (fault == "ranks differ"))
    )
    a, b = (n_in, rank_a), (rank_b, n_out)
    a, b = (a[::-1], b[::-1]) if rank_first else (a, b)
    dtype = np.int32 if fault == "integer" else dtype
    keep = int(rng.integers(2))
    if fault != "half" or keep == 0:
        put(layer, name_a, array(rng, a, dtype))
    if fault != "half" or keep == 1:
        put(layer, name_b, array(rng, b, dtype))


def make_tree(seed) -> Tree:
    rng, pick = np.random.default_rng(seed), random.Random(seed)
    fault = pick.choice(FAULTS) if pick.random() < 0.3 else None
    layers, pairs, near = [], 0, []
    shared = array(rng, (3,), np.float32)
    for index in range(pick.randint(1, 5)):
        layer = {"kernel": array(rng, (4, 3), np.float32)}
        kind = pick.random()
        if kind < 0.55:
            add_pair(rng, layer, pick.choice(list(NAMES.values())))
            pairs += 1
        elif kind < 0.65:
            layer["adapter"] = LoRAPair(
                array(rng, (4, 2), np.float32), array(rng, (2, 3), np.float32)
            )
            pairs += 1
        elif kind < 0.75:
            names = pick.choice(list(NEAR_MISSES.values()))
            add_pair(rng, layer, names)
            near += ["/".join(names[0]), "/".join(names[1])]
        if pick.random() < 0.4:
            layer["other"] = array(rng, pick.choice(OTHERS), np.float32)
        if pick.random() < 0.2:
            layer["tied"] = shared  # one array, several places
        if pick.random() < 0.15:
            layer["nothing"] = pick.choice([None, {}, [], optax.MaskedNode()])
        layers.append((index, layer))
    if fault:
        broken: dict = {}
        add_pair(rng, broken, pick.choice(list(NAMES.values())), fault=fault)
        layers.append((99, broken))
    pick.shuffle(layers)
    return Tree(nest(pick, layers), pairs, near, fault)


def nest(pick, layers):
    """Puts layers into dicts, lists, tuples and named tuples of any depth."""
    nodes = [{f"layer_{index}": layer} for index, layer in layers]
    while len(nodes) > 1:
        first, second = nodes.pop(), nodes.pop()
        kind = pick.randint(0, 3)
        nodes.insert(
            0,
            [
                lambda a, b: {"x": a, "y": b},
                lambda a, b: [a, b],
                lambda a, b: (a, b),
                Holder,
            ][kind](first, second),
        )
    return {"model": nodes[0]}


def leaves_of(params):
    return jax.tree_util.tree_leaves_with_path(params)


@pytest.mark.parametrize("bunch", range(BUNCHES))
def test_random_trees(bunch):
    size = TREES // BUNCHES
    for seed in range(bunch * size, (bunch + 1) * size):
        check(make_tree(seed), seed)


def pairs_or_error(params):
    """What `find_pairs` returned, the error that it raised, and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            found, error = find_pairs(params), ""
        except (ValueError, TypeError) as raised:
            found, error = None, str(raised)
    return found, error, " ".join(str(each.message) for each in given)


def check(tree, seed):
    found, error, told = pairs_or_error(tree.params)
    if error:
        assert tree.fault, f"seed {seed}: {error}"
        assert "layer_99" in error, f"seed {seed}: {error}"
        return
    assert tree.fault is None, f"seed {seed}: a pair with the fault {tree.fault!r} was taken"
    assert len(found.pairs) == tree.pairs, f"seed {seed}"
    assert bool(told) == bool(tree.near), f"seed {seed}: {told}"
    assert_nothing_is_lost(tree, found, told, seed)
    if seed % WITH_UPDATE == 0 and tree.pairs:
        assert_trains_as_adamw_does(tree, found, seed)


def assert_nothing_is_lost(tree, found, told, seed):
    """Every leaf with a name of LoRA is in a pair, or a warning speaks of such leaves."""
    paired = {index for pair in found.pairs for index in pair.leaves.values()}
    for index, path in enumerate(found.paths):
        if re.search("lora", path, re.IGNORECASE) and index not in paired:
            assert "belong to no pair" in told, f"seed {seed}: {path}"
            assert any(path.endswith(name) for name in tree.near), f"seed {seed}: {path}"
    back = found.merge(found.put(found.take(tree.params), tree.params), found.rest(tree.params))
    same = lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    jax.tree.map(same, back, tree.params)


def assert_trains_as_adamw_does(tree, found, seed):
    grads = tree.params
    tx, control = altlora(0.1), optax.adamw(0.1, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        updates, _ = tx.update(grads, tx.init(tree.params), tree.params)
    expected, _ = control.update(grads, control.init(tree.params), tree.params)
    assert jax.tree.structure(updates) == jax.tree.structure(expected), f"seed {seed}"
    paired = {index for pair in found.pairs for index in pair.leaves.values()}
    both = zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True)
    for index, (own, wanted) in enumerate(both):
        assert own.shape == wanted.shape, f"seed {seed}: {found.paths[index]}"
        if index in paired:
            assert jnp.all(jnp.isfinite(own)), f"seed {seed}: {found.paths[index]}"
            assert jnp.any(own != 0), f"seed {seed}: {found.paths[index]} does not move"
        else:
            np.testing.assert_allclose(own, wanted, rtol=1e-6, err_msg=f"seed {seed}")
