"""Pairs whose layout nobody declared: names and shapes of other libraries, read as meant there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_optax import DEFAULT_SPECS, Member, PairSpec, Unpaired, altlora, find_pairs, specs


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def factors(shape_a, shape_b):
    return jnp.asarray(normal(0, *shape_a)), jnp.asarray(normal(1, *shape_b))


def only_pair(tree, layouts=None):
    found = find_pairs(tree, layouts)
    (at,), (pair,) = found.pairs, found.take(tree)
    return at, pair


# name: tree from (a, b), shapes of a and b, the product as that library computes it, pair's name
THEIRS = {
    "qwix attention": (
        lambda a, b: {"q": {"w_lora_a": a, "w_lora_b": b}},
        ((16, 4), (4, 2, 8)),
        "dr,rnh->dnh",
        "q/w",
    ),
    "qwix attention, as many heads as rank": (
        lambda a, b: {"q": {"w_lora_a": a, "w_lora_b": b}},
        ((16, 4), (4, 4, 8)),
        "dr,rnh->dnh",
        "q/w",
    ),
    "qwix output projection": (
        lambda a, b: {"o": {"w_lora_a": a, "w_lora_b": b}},
        ((4, 8, 4), (4, 16)),
        "nhr,rd->nhd",
        "o/w",
    ),
    "qwix experts with one b": (
        lambda a, b: {"moe": {"w_lora_a": a, "w_lora_b": b}},
        ((3, 16, 4), (4, 12)),
        "edr,rf->edf",
        "moe/w",
    ),
    "qwix, two axes in and two out": (
        lambda a, b: {"x": {"w_lora_a": a, "w_lora_b": b}},
        ((5, 6, 4), (4, 7, 8)),
        "abr,rcd->abcd",
        "x/w",
    ),
    "qwix, scanned layers": (
        lambda a, b: {"x": {"kernel_lora_a": a, "kernel_lora_b": b}},
        ((5, 16, 4), (5, 4, 12)),
        "lir,lro->lio",
        "x/kernel",
    ),
    "gemma": (
        lambda a, b: {"q_einsum": {"lora": {"a": a, "b": b}, "w": jnp.ones((2, 16, 8))}},
        ((16, 4), (4, 2, 8)),
        "dr,rnh->dnh",
        "q_einsum",
    ),
    "Keras": (
        lambda a, b: {"dense": {"lora_kernel_a": a, "lora_kernel_b": b}},
        ((16, 4), (4, 12)),
        "ir,ro->io",
        "dense",
    ),
    "Keras EinsumDense": (
        lambda a, b: {"query": {"lora_kernel_a": a, "lora_kernel_b": b}},
        ((16, 2, 4), (4, 8)),
        "inr,ro->ino",
        "query",
    ),
    "Keras embeddings": (
        lambda a, b: {"embedding": {"lora_embeddings_a": a, "lora_embeddings_b": b}},
        ((30, 4), (4, 12)),
        "ir,ro->io",
        "embedding",
    ),
    "MaxText": (
        lambda a, b: {"q": {"lora_a": {"kernel": a}, "lora_b": {"kernel": b}}},
        ((16, 4), (4, 12)),
        "ir,ro->io",
        "q",
    ),
    "MaxText, layers scanned on axis 1": (
        lambda a, b: {
            "q": {
                "lora_a": {"kernel": a},
                "lora_b": {"kernel": b},
                "kernel": jnp.ones((16, 5, 2, 6)),
            }
        },
        ((16, 5, 4), (4, 5, 2, 6)),
        "ilr,rlnh->ilnh",
        "q",
    ),
    "Levanter": (
        lambda a, b: {"q": {"lora_A": {"weight": [a]}, "lora_B": {"weight": [b]}}},
        ((4, 16), (12, 4)),
        "ri,or->io",
        "q/0",
    ),
    "PEFT embedding, named adapter": (
        lambda a, b: {
            "e": {"lora_embedding_A": {"default": a}, "lora_embedding_B": {"default": b}}
        },
        ((4, 30), (12, 4)),
        "ri,or->io",
        "e/default",
    ),
    "quax, whose a makes the output": (
        lambda a, b: {"linear": {"weight": {"w": jnp.ones((12, 16)), "a": b, "b": a}}},
        ((4, 16), (12, 4)),
        "ri,or->io",
        "linear/weight",
    ),
    "openpi": (
        lambda a, b: {"q": {"lora_a": a, "lora_b": b}},
        ((16, 4), (4, 2, 8)),
        "dr,rnh->dnh",
        "q",
    ),
    "stacked along the last axis": (
        lambda a, b: {"q": {"lora_a": a, "lora_b": b}},
        ((16, 4, 5), (4, 12, 5)),
        "irl,rol->iol",
        "q",
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_what_other_libraries_write_is_read_as_they_mean_it(name):
    """ΔK of the pair that was found is what the library multiplies."""
    make, shapes, product, expected_name = THEIRS[name]
    a, b = factors(*shapes)
    at, pair = only_pair(make(a, b))
    assert at.path == expected_name
    theirs = np.einsum(product, a, b)
    batch = "l" if "l" in product else ""
    letters = product.split("->")[1]
    moved = np.moveaxis(theirs, letters.index("l"), 0) if batch else theirs
    np.testing.assert_allclose(pair.a @ pair.b, moved.reshape((pair.a @ pair.b).shape), rtol=1e-4)


@pytest.mark.parametrize("name", THEIRS)
def test_the_step_is_that_of_the_plain_pair(name):
    make, shapes, *_ = THEIRS[name]
    tree = make(*factors(*shapes))
    grads = jax.tree.map(lambda x: jnp.asarray(normal(2, *x.shape)), tree)
    found = find_pairs(tree)
    tx = altlora(0.1)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    (pair,), (grad,) = found.take(tree), found.take(grads)
    expected, _ = tx.update(grad, tx.init(pair), pair)
    (update,) = found.take(updates)
    np.testing.assert_allclose(update.a, expected.a, rtol=1e-4)
    np.testing.assert_allclose(update.b, expected.b, rtol=1e-4)


AMBIGUOUS = (4, 6, 4), (4, 4, 8)  # four layers of 6 → 8, or 4 × 6 → 4 × 8


def test_what_can_be_read_in_several_ways_is_an_error_with_the_spec_of_each():
    a, b = factors(*AMBIGUOUS)
    tree = {"q": {"w_lora_a": a, "w_lora_b": b}}
    with pytest.raises(ValueError, match=r"q/w_lora_a \(4, 6, 4\) .* in 2 ways") as error:
        find_pairs(tree)
    lines = str(error.value).splitlines()[1:]
    assert [line.partition(":")[0].strip() for line in lines] == [
        "6 → 8, 4 of them",
        "4 × 6 → 4 × 8",
    ]
    shapes = [
        only_pair(tree, [eval(line.partition(": ")[2], {"PairSpec": PairSpec}), *DEFAULT_SPECS])[1]
        for line in lines
    ]
    assert [pair.a.shape for pair in shapes] == [(4, 6, 4), (24, 4)]


@pytest.mark.parametrize(
    ("kernel", "shape"), [((4, 6, 8), (4, 6, 4)), ((4, 6, 4, 8), (24, 4)), ((4, 4, 6, 8), (24, 4))]
)
def test_the_weight_beside_them_decides(kernel, shape):
    a, b = factors(*AMBIGUOUS)
    tree = {"q": {"w": jnp.ones(kernel), "bias": jnp.ones(8), "w_lora_a": a, "w_lora_b": b}}
    assert only_pair(tree)[1].a.shape == shape


def test_as_many_stacked_layers_as_ranks_are_layers_in_this_librarys_names():
    a, b = factors(*AMBIGUOUS)
    assert only_pair({"q": {"lora_a": a, "lora_b": b}})[1].a.shape == (4, 6, 4)


def test_qwix_says_the_layout_itself():
    class Einsum(nnx.Module):
        def __init__(self):
            self.w_lora_a, self.w_lora_b = map(nnx.LoRAParam, factors(*AMBIGUOUS))
            self.w_lora_einsum_str = "btxy,xyr,rkl->btkl"

    class Model(nnx.Module):
        def __init__(self):
            self.einsum = Einsum()
            self.dense_lora_a, self.dense_lora_b = map(nnx.LoRAParam, factors((6, 2), (2, 4)))

    model = Model()
    state = nnx.state(model, nnx.LoRAParam)
    found = find_pairs(state, specs.from_qwix(model))
    taken = zip(found.pairs, found.take(state), strict=True)
    shapes = {at.path: pair.a.shape for at, pair in taken}
    assert shapes == {"dense": (6, 2), "einsum/w": (24, 4)}


def test_literal_parts_of_a_pattern_stay_in_the_name():
    a, b = factors((6, 2), (2, 4))
    tree = {k: {"w_lora_a": a, "w_lora_b": b} for k in ("q", "k", "v")}
    layouts = [PairSpec(f"{k}/*_lora_a", f"{k}/*_lora_b") for k in tree]
    assert [pair.path for pair in find_pairs(tree, layouts).pairs] == ["k/w", "q/w", "v/w"]
    tree = {"q_proj_lora_a": a, "q_proj_lora_b": b, "k_proj_lora_a": a, "k_proj_lora_b": b}
    layouts = [PairSpec(f"{k}_*_lora_a", f"{k}_*_lora_b") for k in "qk"]
    assert [pair.path for pair in find_pairs(tree, layouts).pairs] == ["k_proj", "q_proj"]


def test_a_callable_spec_sees_shape_and_dtype():
    a, b = factors((6, 2), (2, 4))
    tree = {"x": {"one": a, "two": b, "other": jnp.ones((3, 3), jnp.int8)}}
    seen = {}

    def by_shape(path, leaf):
        seen[path] = leaf.shape, leaf.dtype
        role = {(6, 2): "a", (2, 4): "b"}.get(leaf.shape)
        return role and Member("x", role, PairSpec("a", "b"))

    assert only_pair(tree, [by_shape])[0].path == "x"
    assert seen["x/other"] == ((3, 3), jnp.int8)


def test_a_pair_that_is_too_small_can_be_left_to_the_fallback():
    """A router of four experts under a rank of eight."""
    a, b = factors((16, 8), (8, 4))
    tree = {
        "router": {"lora_a": a, "lora_b": b},
        "q": dict(zip(("lora_a", "lora_b"), factors((16, 8), (8, 12)), strict=True)),
    }
    with pytest.raises(ValueError, match=r"router.*specs=\[Unpaired\('router'\), \*DEFAULT_SPECS"):
        find_pairs(tree)
    layouts = [Unpaired("router"), *DEFAULT_SPECS]
    assert [pair.path for pair in find_pairs(tree, layouts).pairs] == ["q"]
    tx = altlora(0.1, specs=layouts, fallback=optax.sgd(1.0))
    updates, _ = tx.update(tree, tx.init(tree), tree)
    np.testing.assert_array_equal(updates["router"]["lora_a"], -a)


def test_a_stack_along_a_middle_axis_is_not_taken_for_one_layer():
    """Of Flax's names too: only a stack along leading axes is taken for granted."""
    tree = {"lora_a": jnp.ones((16, 3, 4)), "lora_b": jnp.ones((4, 3, 16))}
    with pytest.raises(ValueError, match="can be read in 2 ways") as caught:
        find_pairs(tree)
    assert "16 × 3 → 3 × 16:" in str(caught.value)
    assert "16 → 16, 3 of them:" in str(caught.value)
    leading = {"lora_a": jnp.ones((3, 16, 4)), "lora_b": jnp.ones((3, 4, 16))}
    [pair] = find_pairs(leading).take(leading)
    assert pair.a.shape == (3, 16, 4)


EXPERTS = (16, 4), (4, 4, 12)  # one a for the b of four experts, or 16 → 4 × 12


@pytest.mark.parametrize(
    ("names", "kernel"),
    [
        (("lora_a", "lora_b"), "kernel"),
        (("w_lora_a", "w_lora_b"), "w"),
        (("lora_kernel_a", "lora_kernel_b"), "kernel"),
    ],
)
def test_a_single_reading_that_is_not_the_weight_beside_them_is_refused(names, kernel):
    """Of other experts' factors a (16, 12) kernel would get updates of 16 → 4 × 12."""
    tree = {"q": {**dict(zip(names, factors(*EXPERTS), strict=True)), kernel: jnp.ones((16, 12))}}
    message = rf"are read as 16 → 4 × 12, which is not the {kernel} \(16, 12\).*PairSpec"
    with pytest.raises(ValueError, match=message):
        find_pairs(tree)
    layouts = [PairSpec(*names, b_rank=1, b_out=(0, 2)), *DEFAULT_SPECS]
    assert only_pair(tree, layouts)[1].b.shape == (4, 48)


@pytest.mark.parametrize(
    "beside",
    [
        {"kernel": jnp.ones((16, 48))},  # flat
        {"kernel": jnp.ones((4, 12, 16))},  # in another order
        {"kernel": jnp.ones((8, 12), jnp.uint8)},  # packed
        {"position": jnp.ones((16, 12))},  # something else
        {"kernel": jnp.ones((16, 4, 12)), "weight": jnp.ones((3, 3))},
    ],
)
def test_a_single_reading_stays_where_the_weight_is_that_or_unknown(beside):
    a, b = factors(*EXPERTS)
    assert only_pair({"q": {"lora_a": a, "lora_b": b, **beside}})[1].b.shape == (4, 48)


def test_plain_factors_may_adapt_a_part_of_a_weight():
    """As one of the three projections in one kernel."""
    a, b = factors((16, 4), (4, 12))
    tree = {"qkv": {"q_lora_a": a, "q_lora_b": b, "q": jnp.ones((16, 36))}}
    assert only_pair(tree)[1].b.shape == (4, 12)


def test_the_shard_of_a_weight_is_not_compared():
    """Inside `shard_map` a kernel may be a shard where its factors are whole."""
    a, b = factors((16, 4), (4, 4, 12))
    tree = {"q": {"lora_a": a, "lora_b": b, "kernel": jnp.ones((16, 4, 12))}}
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("d",), auto, devices=jax.devices()[:2])
    specs = {"q": {"lora_a": jax.P(), "lora_b": jax.P(), "kernel": jax.P("d")}}

    def count(tree):
        assert tree["q"]["kernel"].shape == (8, 4, 12)
        return jnp.array(len(find_pairs(tree).pairs))

    count = jax.shard_map(count, mesh=mesh, in_specs=(specs,), out_specs=jax.P())
    assert count(tree) == 1
