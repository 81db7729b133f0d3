"""Layers on a mesh, forward and backward: what one device computes, lying as the parameters do."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding

from lowrank_optax import Metric, nn, sharding
from lowrank_optax._core.names import path_name
from tests import collectives

P = jax.P
KEY = jax.random.key(0)

# Every kind of node; the shadows have products of degree up to four.
EXTRAS: dict[str, nn.Extra | None] = {
    "plain": None,
    "framed": nn.Frames(),
    **{f"shadows k={k}": nn.Shadows(k) for k in (0, 1, 2)},
    **{f"shadows k={k} without momentum": nn.Shadows(k, 0) for k in (0, 1, 2)},
    "K-FAC": nn.Shadows(1, metric=Metric()),
    "Shampoo": nn.Shadows(1, metric=Metric("shampoo")),
}
CONFIGS = {name: nn.LoRAConfig(2, 3.0, extra=x) for name, x in EXTRAS.items()}
CONFIGS["DoRA"] = nn.LoRAConfig(2, 3.0, dora=True)
# On every route with every recipe; the other shadows have fewer products than k = 2.
EVERYWHERE = CONFIGS.keys() - {
    "shadows k=1",
    "shadows k=0 without momentum",
    "shadows k=2 without momentum",
}

D, F, LAYERS = 12, 20, 2
HEADS = (4, 2)
TENSOR = sharding.tensor_parallel(["query|up"], ["out|down"])
by_heads = functools.partial(sharding.heads, columns={"query": HEADS}, rows={"out": HEADS})
RECIPES = {
    "data": sharding.data_parallel(),
    "fsdp": by_heads(sharding.fsdp(min_size=0)),
    "tensor": by_heads(TENSOR),
    "fsdp within tensor": by_heads(sharding.fsdp(within=TENSOR, min_size=0)),
}
X = np.random.default_rng(1).normal(size=(4, 3, D))

# Each model has scanned layers, whose attention kernels have three axes before they are stacked,
# and two linear layers. `whole` is how the output lies of a layer whose in axis is sharded: nothing
# else needs telling.


class NNXBlock(nnx.Module):
    def __init__(self, lora, rngs):
        keywords = {"use_bias": False, "lora": lora, "rngs": rngs}
        self.query = nn.LoRALinearGeneral(D, HEADS, **keywords)
        self.out = nn.LoRALinearGeneral(HEADS, D, axis=(-2, -1), **keywords)

    def __call__(self, x, whole):
        return x + self.out(jnp.tanh(self.query(x)), out_sharding=whole)


class NNXModel(nnx.Module):
    def __init__(self, lora, rngs):
        make = nnx.vmap(lambda rngs: NNXBlock(lora, rngs))
        self.blocks = nnx.split_rngs(splits=LAYERS)(make)(rngs)
        self.up = nn.LoRALinear(D, F, lora=lora, rngs=rngs)
        self.down = nn.LoRALinear(F, D, lora=lora, rngs=rngs)

    def __call__(self, x, whole):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, block):
            return block(x, whole)

        return self.down(jnp.tanh(self.up(forward(x, self.blocks))), out_sharding=whole)


class LinenBlock(linen.Module):
    lora: nn.LoRAConfig
    whole: Any

    @linen.compact
    def __call__(self, x, _):
        dot = functools.partial(jax.lax.dot_general, out_sharding=self.whole)
        general = functools.partial(nn.LoRADenseGeneral, use_bias=False, lora=self.lora)
        query = jnp.tanh(general(HEADS, name="query")(x))
        return x + general(D, axis=(-2, -1), dot_general=dot, name="out")(query), None


class LinenModel(linen.Module):
    lora: nn.LoRAConfig
    whole: Any

    @linen.compact
    def __call__(self, x):
        scan = linen.scan(
            LinenBlock,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = scan(self.lora, self.whole, name="blocks")(x, None)
        dot = functools.partial(jax.lax.dot_general, out_sharding=self.whole)
        up = nn.LoRADense(F, lora=self.lora, name="up")
        return nn.LoRADense(D, dot_general=dot, lora=self.lora, name="down")(jnp.tanh(up(x)))


class Case(NamedTuple):
    """A model as a function.

    Args:
        forward: y, from adapters, frozen parameters, x and `whole`.
        lora: the adapters.
        frozen: the other parameters.
    """

    forward: Callable[..., Any]
    lora: Any
    frozen: Any


def by_lora_apply(config):
    shapes = {"up": ((), D, F), "down": ((), F, D), "stacked_up": ((LAYERS,), D, F)}
    make = lambda: {name: config.init_pair(KEY, *shape) for name, shape in shapes.items()}

    def forward(lora, frozen, x, whole):
        del frozen, whole
        tokens = x.reshape(-1, D)
        many = jnp.broadcast_to(tokens, (LAYERS, *tokens.shape))
        hidden = jnp.tanh(nn.lora_apply(x, lora["up"], 1.5))
        return nn.lora_apply(many, lora["stacked_up"]), nn.lora_apply(hidden, lora["down"], 1.5)

    return Case(forward, jax.eval_shape(make), {})


def by_nnx(config):
    model = nnx.eval_shape(lambda: NNXModel(config, nnx.Rngs(0)))
    graph, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def forward(lora, frozen, x, whole):
        return nnx.merge(graph, lora, frozen, copy=True)(x, whole)

    return Case(forward, lora, frozen)


def by_linen(config):
    variables: Any = jax.eval_shape(LinenModel(config, None).init, KEY, X)

    def forward(lora, frozen, x, whole):
        return LinenModel(config, whole).apply({"lora": lora, "params": frozen}, x)

    return Case(forward, variables["lora"], variables["params"])


ROUTES = {"lora_apply": by_lora_apply, "nnx": by_nnx, "linen": by_linen}


def drawn(tree):
    """Fills a tree of shapes in float64, so that no product vanishes."""
    numbers = np.random.default_rng(0)
    fixed = {"d_in": 1, "d_out": 1, "kfac": Metric()[1:], "shampoo": Metric()[1:], "warm": 0.5}
    fixed |= {"krylov_a": 0, "krylov_b": 0, "checksum": 0}

    def draw(path, leaf):
        name = path_name(path).rpartition("/")[2].removeprefix("lora_")
        normal = numbers.normal(size=leaf.shape, scale=0.5)
        return np.broadcast_to(np.float64(fixed[name]), leaf.shape) if name in fixed else normal

    return jax.tree_util.tree_map_with_path(draw, tree)


@functools.cache
def case_of(route, kind) -> Case:
    case = ROUTES[route](CONFIGS[kind])
    return case._replace(lora=drawn(case.lora), frozen=drawn(case.frozen))


@functools.cache
def gradients(route, kind, whole=None):
    """Makes the function of adapters, frozen parameters and x: gradients of both ends, and y."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 2), has_aux=True)
    def run(lora, frozen, x):
        y = case_of(route, kind).forward(lora, frozen, x, whole)
        return sum(jnp.sum(jnp.sin(part)) for part in jax.tree.leaves(y)), y

    return run


@functools.cache
def on_one_device(route, kind):
    case = case_of(route, kind)
    return jax.device_get(gradients(route, kind)(case.lora, case.frozen, X))


@functools.cache
def mesh_of(kind):
    return jax.make_mesh((2, 2), ("data", "model"), (kind,) * 2, devices=jax.devices()[:4])


CONSTANTS = ("f_in", "f_out", "warm", "kfac", "shampoo")  # no gradient of them is formed


def assert_close(found, expected):
    """Compares leaves relative to their largest number: sums in another order, in float64."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, y), x in zip(leaves, jax.tree.leaves(jax.device_get(found)), strict=True):
        name, size = path_name(path), np.abs(y).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10 * size, err_msg=name)
        assert (size == 0) == name.endswith(CONSTANTS), name


ON_MESHES = [(recipe, AxisType.Explicit) for recipe in RECIPES]
# Where the compiler chooses, one recipe has the collectives of the others.
ON_MESHES += [("fsdp within tensor", AxisType.Auto)]
SELDOM = [(recipe, AxisType.Auto) for recipe in RECIPES if (recipe, AxisType.Auto) not in ON_MESHES]


@pytest.mark.parametrize(
    ("recipe", "mesh_kind"),
    [*ON_MESHES, *(pytest.param(*each, marks=pytest.mark.slow) for each in SELDOM)],
    ids=lambda x: getattr(x, "name", x),
)
@pytest.mark.parametrize("kind", sorted(EVERYWHERE))
@pytest.mark.parametrize("route", ROUTES)
def test_layers(route, kind, recipe, mesh_kind, x64):
    case, mesh, expected = case_of(route, kind), mesh_of(mesh_kind), on_one_device(route, kind)
    is_explicit, is_tensor = mesh_kind == AxisType.Explicit, "tensor" in recipe
    place = lambda tree: sharding.shard_model(tree, mesh, RECIPES[recipe]) if tree else tree
    lora, frozen = place(case.lora), place(case.frozen)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    whole = P("data", None, None) if is_explicit and is_tensor else None
    with jax.set_mesh(mesh):
        grads, y = gradients(route, kind, whole)(lora, frozen, x)
        assert_close((grads, y), expected)
        if is_explicit:
            assert jax.tree.map(jax.typeof, grads) == jax.tree.map(jax.typeof, (lora, x))


# Single layers on an Explicit mesh

EXPLICIT = functools.partial(mesh_of, AxisType.Explicit)


def check(loss, node, spec, x, spec_x):
    """Compares a loss's gradients of node and x with those of one device; returns the former.

    `spec` is that of the kernel to which the node belongs.
    """
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    expected = jax.device_get(grad(node, x))
    mesh = EXPLICIT()
    node = sharding.shard_model({"": node}, mesh, lambda *_: spec)[""]
    x = jax.device_put(x, NamedSharding(mesh, spec_x))
    with jax.set_mesh(mesh):
        found = grad(node, x)
    assert_close(found, expected)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, (node, x))


def squares(node, x):
    return jnp.sum(jnp.square(nn.lora_apply(x, node)))


def make(kind, n_in=D, n_out=F, batch=()):
    return drawn(jax.eval_shape(lambda: CONFIGS[kind].init_pair(KEY, batch, n_in, n_out)))


def numbers(*shape):
    return np.random.default_rng(2).normal(size=shape)


each_kind = pytest.mark.parametrize("kind", ["plain", "framed", "shadows k=2", "K-FAC"])


@each_kind
@pytest.mark.parametrize(
    ("spec", "spec_x"),
    [
        (P(None, "data"), P("data")),
        (P(("data", "model"), None), P("data")),
        (P("model", None), P("data")),
        (P("model", "data"), P()),
        (P(None, "model"), P("data", "model")),
        (P("data", None), P(None, "model")),
    ],
)
def test_factors_whose_sharding_is_not_that_of_their_input(kind, spec, spec_x, x64):
    check(squares, make(kind), spec, numbers(4, D), spec_x)


@each_kind
@pytest.mark.parametrize(
    ("spec", "spec_x"),
    [
        (P("data", None, "model"), P("data", None, None)),
        (P("data", None, "model"), P(None, "model", None)),
        (P("data", None, "model"), P(None, "data", None)),
        (P(None, "data", None), P("model", "data", None)),
    ],
)
def test_batch_axes_over_a_mesh_axis(kind, spec, spec_x, x64):
    check(squares, make(kind, batch=(2,)), spec, numbers(2, 4, D), spec_x)


@pytest.mark.parametrize(
    ("spec_x", "spec_y"),
    [
        (P(), P("data", None, "model")),  # batch entries stay where they are
        (P(None, "data"), P(None, "data", "model")),
        (P(None, "model"), P("data", "model", None)),
    ],
)
def test_the_output_lies_as_the_input_and_then_as_the_factors(spec_x, spec_y):
    mesh, node = EXPLICIT(), jax.tree.map(jnp.float32, make("plain", batch=(2,)))
    node = sharding.shard_model({"": node}, mesh, lambda *_: P("data", None, "model"))[""]
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((2, 4, D)), NamedSharding(mesh, spec_x))
        assert jax.typeof(nn.lora_apply(x, node)).sharding.spec == spec_y


@pytest.mark.parametrize("kind", ["plain", "framed"])
@pytest.mark.parametrize(
    ("batch", "shape", "spec_x"),
    [
        ((2,), (4, D), P("data")),
        ((2,), (D,), P()),
        ((2, 1), (1, 4, 6, D), P(None, "data")),
        ((1,), (4, 2, D), P("data")),
    ],
)
def test_batch_axes_that_broadcast(kind, batch, shape, spec_x, x64):
    spec = P(
        *["data" if size > 1 and "data" not in spec_x else None for size in batch], None, "model"
    )
    check(squares, make(kind, batch=batch), spec, numbers(*shape), spec_x)


@each_kind
@pytest.mark.parametrize("spec_x", [P("data"), P(None, None, "data")])
def test_experts_with_two_axes_at_each_place(kind, spec_x, x64):
    """Tokens, in and out are two axes each, which the factors see as one."""
    contraction = nn.Contraction.from_einsum("BTEDG,EDGNF->BTENF")
    x, kernel_shape = numbers(2, 2, 2, 6, 2), (2, 6, 2, 10, 2)

    def loss(node, x):
        y = nn.lora_apply(contraction.flatten_input(x), node)
        return jnp.sum(jnp.square(contraction.unflatten_output(y, x.shape, kernel_shape)))

    check(loss, make(kind, batch=(2,)), P(None, None, "model"), x, spec_x)


@pytest.mark.parametrize("kind", ["shadows k=1", "K-FAC", "Shampoo"])
def test_shadows_that_lie_otherwise_than_their_factors(kind, x64):
    """As `shadow` makes them of a placed pair; gradients lie as each leaf does."""
    node, x, mesh = make(kind), numbers(4, D), EXPLICIT()
    grad = jax.jit(jax.grad(squares, argnums=(0, 1)))
    expected = jax.device_get(grad(node, x))
    row = NamedSharding(mesh, P("model", None))
    with jax.set_mesh(mesh):
        mixed = jax.tree.map(jnp.asarray, node)._replace(a=jax.device_put(node.a, row))
        found = grad(mixed, jnp.asarray(x))
    assert_close(found, expected)
    assert jax.tree.map(jax.typeof, found[0]) == jax.tree.map(jax.typeof, mixed)


@pytest.mark.parametrize("kind", ["plain", "framed", "shadows k=2"])
def test_dropout_and_rematerialization(kind):
    """The same entries are dropped, in the layers of NNX and of Linen."""
    lora, x = dataclasses.replace(CONFIGS[kind], dropout=0.5), np.float32(numbers(4, D))
    layer, dense = nn.LoRALinear(D, F, lora=lora, rngs=nnx.Rngs(0)), nn.LoRADense(F, lora=lora)
    graph, leaves, frozen = nnx.split(layer, nnx.LoRAParam, ...)
    variables: Any = dense.init({"params": KEY, "dropout": KEY}, x)
    lora_of = {"nnx": leaves, "linen": variables["lora"]}
    frozen_of = {"nnx": frozen, "linen": variables["params"]}

    @jax.jit
    @jax.grad
    def grad(lora, frozen, x):
        by_linen = lambda lora, x: dense.apply(
            {"params": frozen["linen"], "lora": lora}, x, rngs={"dropout": KEY}
        )
        y = nnx.merge(graph, lora["nnx"], frozen["nnx"], copy=True)(x)
        return jnp.sum(jnp.square(y + jax.checkpoint(by_linen)(lora["linen"], x)))

    expected = jax.device_get(grad(lora_of, frozen_of, x))
    mesh = EXPLICIT()
    recipe = lambda _, shape, mesh: P("data", "model") if len(shape) == 2 else P()
    place = lambda tree: sharding.shard_model(tree, mesh, recipe)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = jax.device_get(grad(place(lora_of), place(frozen_of), x))
    for one, many in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        # Products of degree four in float32, whose sums lie in another order.
        np.testing.assert_allclose(many, one, rtol=0, atol=1e-4 * np.abs(one).max())


def test_bfloat16_and_strict_promotion():
    """The adapter's products in bfloat16; no axis is added or dtype changed behind one's back."""
    mesh, x = EXPLICIT(), jnp.asarray(numbers(4, D), jnp.float32)
    for kind in ("plain", "framed", "shadows k=2", "K-FAC"):
        node = jax.tree.map(jnp.float32, make(kind))
        loss = lambda node, x: jnp.sum(jnp.square(nn.lora_apply(x, node, 1.5, jnp.bfloat16)))
        grad = jax.jit(jax.grad(loss))
        expected = jax.device_get(grad(node, x))
        with jax.set_mesh(mesh), jax.numpy_rank_promotion("raise"):
            placed = sharding.shard_model({"": node}, mesh, lambda *_: P("data", "model"))[""]
            found = grad(placed, jax.device_put(x, NamedSharding(mesh, P("data"))))
        assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, placed)
        for one, many in zip(expected, found, strict=True):
            if one is not None:  # each of up to four products rounds to 2⁻⁸
                np.testing.assert_allclose(many, one, rtol=0, atol=2**-6 * np.abs(one).max())


@pytest.mark.parametrize("spec", [P("model", None), P(None, "data")])
def test_base_layers_that_need_out_sharding(spec):
    """Those of which docs/sharding.md says so: JAX refuses the product of input and kernel."""
    mesh = EXPLICIT()
    recipe = lambda path, shape, mesh: spec if len(shape) == 2 else P()
    layer = nn.LoRALinear(F, D, use_bias=False, lora=CONFIGS["plain"], rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    state = sharding.shard_model(state, mesh, recipe)
    x = jnp.ones((4, F))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data", spec[0])))
        run = lambda whole: nnx.merge(graph, state)(x, out_sharding=whole)
        with pytest.raises(Exception, match=r"out_sharding|illegally sharded"):
            run(None)
        assert jax.typeof(run(P("data", None))).sharding.spec == P("data", None)


def test_the_attention_of_flax_with_sharded_heads():
    """`nnx.MultiHeadAttention` hands `out_sharding` to its last layer."""
    mesh, lora = (
        EXPLICIT(),
        dataclasses.replace(CONFIGS["shadows k=2"], b_init=nnx.initializers.ones),
    )
    model = nnx.Dict(attention=nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "query|key|value|out", lora, rngs=nnx.Rngs(1))
    graph, leaves, frozen = nnx.split(model, nnx.LoRAParam, ...)

    @functools.partial(jax.jit, static_argnums=3)
    @jax.grad
    def grad(leaves, frozen, x, whole):
        model = nnx.merge(graph, leaves, frozen, copy=True)
        return jnp.sum(jnp.square(model.attention(x, out_sharding=whole)))

    x = np.float32(numbers(4, 3, 8))
    expected = grad(leaves, frozen, x, None)
    recipe = sharding.heads(
        sharding.tensor_parallel(["query|key|value"], ["out"]),
        {"query|key|value": HEADS},
        {"out": HEADS},
    )
    place = lambda tree: sharding.shard_model(tree, mesh, recipe)
    placed = place(leaves), place(frozen)
    assert placed[0]["attention"]["query"]["lora_b"].sharding.spec == P(None, "model")
    assert placed[1]["attention"]["query"]["base"]["kernel"].sharding.spec[1] == "model"
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = grad(*placed, x, P("data", None, None))
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, placed[0])
    for one, many in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(many, one, rtol=0, atol=1e-4 * np.abs(one).max())


def test_the_output_of_a_layer_lies_as_that_of_its_base():
    """Here whole, which its adapter's own output is not."""
    mesh, lora, whole = EXPLICIT(), CONFIGS["plain"], P("data", None)
    graph, state = nnx.split(nn.LoRALinear(D, F, lora=lora, rngs=nnx.Rngs(0)))
    dot_general = functools.partial(jax.lax.dot_general, out_sharding=whole)
    dense: Any = nn.LoRADense(F, lora=lora, dot_general=dot_general)
    x = jnp.ones((4, D))
    variables = nn.LoRADense(F, lora=lora).init(KEY, x)
    recipe = lambda path, shape, mesh: P(None, "model") if len(shape) == 2 else P()
    state, variables = (sharding.shard_model(tree, mesh, recipe) for tree in (state, variables))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        for y in (nnx.merge(graph, state)(x, out_sharding=whole), dense.apply(variables, x)):
            assert jax.typeof(y).sharding.spec == whole


TOKENS, LONG, WIDEST = 64, (80, 96), 12  # each part of an axis is longer than the widest basis


@pytest.mark.parametrize("recipe", ["data", "fsdp", "tensor", "fsdp within tensor"])
@pytest.mark.parametrize("kind", ["framed", "shadows k=2", "K-FAC"])
def test_what_a_backward_pass_sends_on_an_explicit_mesh(kind, recipe):
    """Narrow products alone; and nothing is gathered but the factors that FSDP has sharded."""
    config = dataclasses.replace(CONFIGS[kind], rank=4)
    shapes = {"up": LONG, "down": LONG[::-1]}
    nodes = {name: config.init_pair(KEY, (), *shape) for name, shape in shapes.items()}
    mesh = EXPLICIT()

    @functools.partial(jax.grad, argnums=(0, 1))
    def grad(nodes, x):
        hidden = jnp.tanh(nn.lora_apply(x, nodes["up"]))
        return jnp.sum(jnp.square(nn.lora_apply(hidden, nodes["down"])))

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((TOKENS, LONG[0])), NamedSharding(mesh, P("data")))
        nodes = sharding.shard_model(nodes, mesh, RECIPES[recipe])
        program = jax.jit(grad).lower(nodes, x).compile()
    for each in collectives.collectives(program):
        for shape in each.shapes:
            long = [size for size in shape.dims if size > WIDEST]
            assert len(long) <= 1, each
            if each.kind == "all-gather":
                assert "fsdp" in recipe, each
                assert not long or long[0] in (*LONG, *(size // 2 for size in LONG)), each
