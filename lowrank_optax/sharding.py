r"""Sharding: from the kernels' partition specs to those of factors, auxiliary leaves and states.

A factor lies as the kernel it belongs to: with a kernel (in, out) sharded as ``P(i, o)``::

    a ~ P(i, None)      b ~ P(None, o)      r is never sharded

so the r×r algebra is a product on each device and a sum of r×r matrices over devices; what is
(in, r) or (r, out) never moves. Auxiliary leaves have an in or an out axis too and lie likewise.
States follow by their types: an optimizer's ``init`` is traced on an abstract mesh whose axes are
all explicit, so that each leaf of the state says itself how it lies.

A *recipe* says how the base parameters lie: it maps path, shape and mesh to a ``PartitionSpec``,
and is asked about a pair as about the kernel (batch..., in, out) at the pair's path.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from lowrank_optax.factors import (
    DEFAULT_SPECS,
    LONG_AXES,
    PairLeaves,
    PairMatcher,
    find_pairs,
    path_name,
)

Recipe = Callable[[str, tuple[int, ...], Mesh], jax.P]


class TrainStep(Protocol):
    """What :func:`train_step` builds: ``(params, state, *inputs) → (params, state, loss)``."""

    def __call__(self, params: Any, state: Any, *inputs: Any) -> tuple[Any, Any, jax.Array]:
        """Makes a step."""
        ...

    def lower(self, params: Any, state: Any, *inputs: Any) -> jax.stages.Lowered:
        """Lowers a step for shapes or arrays, as ``jax.jit``'s method does."""
        ...


def data_parallel() -> Recipe:
    """Replicates every parameter: each device sees its own examples.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> data_parallel()("q/kernel", (6, 4), mesh)
        P()
    """
    return lambda path, shape, mesh: jax.P()


def fsdp(axis: str = "data", *, within: Recipe | None = None, min_size: int = 2**14) -> Recipe:
    """Shards every kernel along its in axis, or out axis where only that is free and divides.

    Args:
        axis: the mesh axis.
        within: a recipe for other mesh axes, as :func:`tensor_parallel`, which has the first choice
            of each kernel's axes.
        min_size: what has fewer entries is left as ``within`` has it.

    Returns:
        The recipe. Pairs lie as their kernels do: without ``within`` one of the two factors is
        sharded, with it often both.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> fsdp(min_size=0)("q/kernel", (6, 4), mesh)
        P('data', None)
        >>> fsdp(within=tensor_parallel(["up"], ["down"]), min_size=0)("down/kernel", (8, 6), mesh)
        P('model', 'data')
    """

    def recipe(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.P:
        spec = jax.P() if within is None else within(path, shape, mesh)
        if len(shape) < 2 or math.prod(shape) < min_size:
            return spec
        size = _axis_size(path, axis, mesh)
        entries = [*spec, *[None] * (len(shape) - len(spec))]
        for position in (-2, -1):
            if entries[position] is None and shape[position] % size == 0:
                entries[position] = axis
                return jax.P(*entries)
        return spec

    return recipe


def tensor_parallel(
    columns: Sequence[str] = (), rows: Sequence[str] = (), *, axis: str = "model"
) -> Recipe:
    """Shards kernels of named layers along out (columns) or in (rows), as Megatron does.

    Args:
        columns: regular expressions, searched in a parameter's path: layers that come first, as
            ``"q_proj|up_proj"``; their biases are sharded too.
        rows: layers that take in what the first ones put out, as ``"o_proj|down_proj"``.
        axis: the mesh axis.

    Returns:
        The recipe; parameters that no expression fits are replicated.

    Raises:
        ValueError: from the recipe, a path that fits both.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> recipe = tensor_parallel(["up"], ["down"])
        >>> recipe("mlp/up/kernel", (6, 8), mesh), recipe("mlp/down/kernel", (8, 6), mesh)
        (P(None, 'model'), P('model', None))
    """

    def recipe(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.P:
        is_column = any(re.search(pattern, path) for pattern in columns)
        is_row = any(re.search(pattern, path) for pattern in rows)
        if is_column and is_row:
            raise ValueError(f"{path}: fits both `columns` and `rows`; make one more specific.")
        if is_column and shape:
            return jax.P(*_entries(len(shape), {-1: axis}))
        if is_row and len(shape) > 1:
            return jax.P(*_entries(len(shape), {-2: axis}))
        return jax.P()

    return recipe


def stacked(recipe: Recipe, axis: str) -> Recipe:
    """Shards the leading axis of stacked layers, and the others by a recipe.

    Args:
        recipe: of a single layer's parameters.
        axis: the mesh axis of the layers. Parameters of two axes are taken for single layers.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((1, 1), ("layer", "model"))
        >>> stacked(tensor_parallel(["up"]), "layer")("up/kernel", (12, 6, 8), mesh)
        P('layer', None, 'model')
    """

    def sharded(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.P:
        spec = recipe(path, shape, mesh)
        entries = [*spec, *[None] * (len(shape) - len(spec))]
        return jax.P(axis, *entries[1:]) if len(shape) > 2 else spec

    return sharded


def as_kernels(
    params: Any,
    kernel_of: Callable[[str], Sequence[str]] = lambda pair: (
        f"{pair}/kernel",
        f"{pair}/base/kernel",
        f"{pair}/weight",
        pair,
    ),
) -> Recipe:
    """Leaves placed base parameters where they lie, and lays pairs as their kernels.

    Args:
        params: the parameters, base kernels among them: arrays or ``ShapeDtypeStruct`` that lie on
            a mesh.
        kernel_of: the paths at which a pair's kernel may be, by the pair's path.

    Returns:
        The recipe.

    Raises:
        ValueError: from the recipe, a pair whose kernel is not found, or whose kernel's axes make
            no in and out axes of the pair's sizes that are sharded as a whole.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> lies = jax.NamedSharding(mesh, jax.P(None, "model", None))
        >>> heads = {"q": {"kernel": jax.device_put(jnp.ones((6, 2, 4)), lies)}}
        >>> as_kernels(heads)("q", (6, 8), mesh)
        P(None, 'model')
    """
    leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}

    def recipe(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.P:
        candidates = [name for name in (path, *kernel_of(path)) if name in leaves]
        if not candidates:
            raise ValueError(
                f"{path}: no kernel found at {', '.join(kernel_of(path))}; say where it is by"
                " `kernel_of`."
            )
        kernel = leaves[candidates[0]]
        spec = _lying(candidates[0], kernel).spec
        entries = [*spec, *[None] * (kernel.ndim - len(spec))]
        if tuple(kernel.shape) == shape:
            return jax.P(*entries)
        batch = len(shape) - 2
        for stop in range(batch + 1, kernel.ndim):
            groups = (batch, stop), (stop, kernel.ndim)
            sizes = tuple(math.prod(kernel.shape[i:j]) for i, j in groups)
            if (*kernel.shape[:batch], *sizes) == shape:
                flat = [_flattened(candidates[0], entries[i:j]) for i, j in groups]
                return jax.P(*entries[:batch], *flat)
        raise ValueError(
            f"{path}: a kernel of shape {tuple(kernel.shape)} does not make {shape}; say which"
            " kernel is meant by `kernel_of`."
        )

    return recipe


def partition_specs(
    params: Any, mesh: Mesh, recipe: Recipe, specs: Sequence[PairMatcher] = DEFAULT_SPECS
) -> Any:
    """Finds how every leaf of a parameter tree lies.

    Args:
        params: arrays or shapes, pairs in any layout among them.
        mesh: the mesh.
        recipe: how base parameters lie.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        A tree of ``PartitionSpec`` shaped like the parameters.

    Raises:
        ValueError: a spec with axes that the mesh lacks, or that does not divide its leaf; pairs
            that do not fit (see ``find_pairs``).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 8)))}
        >>> partition_specs(params, mesh, tensor_parallel(["up"]))
        {'up': LoRAPair(a=P(None, None), b=P(None, 'model'))}
    """
    pairing = find_pairs(params, specs)
    leaves = pairing.treedef.flatten_up_to(params)
    found: list[Any] = [None] * len(leaves)
    for pair in pairing.pairs:
        for role, spec in _pair_specs(pair, leaves, mesh, recipe).items():
            found[pair.leaves[role]] = spec
    for index, (path, leaf) in enumerate(zip(pairing.paths, leaves, strict=True)):
        if found[index] is None:
            found[index] = recipe(path, tuple(leaf.shape), mesh)
        _check(path, tuple(leaf.shape), found[index], mesh)
    return jax.tree.unflatten(pairing.treedef, found)


def shard_model(
    params: Any, mesh: Mesh, recipe: Recipe, specs: Sequence[PairMatcher] = DEFAULT_SPECS
) -> Any:
    """Places the parameters of a model on a mesh.

    Args:
        params: a tree of arrays, or an NNX module, whose variables are arrays.
        mesh: the mesh, of Auto or Explicit axes, of one process or several.
        recipe: how base parameters lie.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The tree, placed.

    Raises:
        ValueError: as :func:`partition_specs`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 8)))}
        >>> shard_model(params, mesh, tensor_parallel(["up"]))["up"].b.sharding.spec
        P(None, 'model')
    """
    found = partition_specs(params, mesh, recipe, specs)
    return jax.device_put(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), found))


def state_shardings(tx: optax.GradientTransformation, params: Any) -> Any:
    """Finds how every leaf of an optimizer's state lies, from how the parameters lie.

    Args:
        tx: any transformation whose ``init`` runs on an Explicit mesh.
        params: parameters that lie on one mesh: arrays, or ``ShapeDtypeStruct`` with shardings.

    Returns:
        A tree of ``NamedSharding`` shaped like the state: for ``jax.jit``, and for restoring a
        checkpoint in place.

    Raises:
        ValueError: parameters that do not lie on one mesh.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, altlora
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 8)))}
        >>> params = shard_model(params, mesh, tensor_parallel(["up"]))
        >>> state_shardings(altlora(1e-3), params).pairs.mu["up"].b.spec
        P(None, 'model')
    """
    mesh = mesh_of(params)
    names = mesh.axis_names
    explicit = AbstractMesh(mesh.axis_sizes, names, axis_types=(AxisType.Explicit,) * len(names))

    def typed(leaf: Any) -> jax.ShapeDtypeStruct:
        lies = NamedSharding(explicit, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies)

    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(typed, params))
    spec = lambda leaf: jax.P() if leaf.sharding is None else leaf.sharding.spec
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), state)


def shard_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """Initializes an optimizer's state where it belongs; no device ever holds all of it.

    Args:
        tx: as in :func:`state_shardings`.
        params: arrays that lie on one mesh.

    Returns:
        The state.

    Raises:
        ValueError: parameters that do not lie on one mesh.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, altlora
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 8)))}
        >>> params = shard_model(params, mesh, tensor_parallel(["up"]))
        >>> shard_state(altlora(1e-3), params).pairs.mu["up"].b.sharding.spec
        P(None, 'model')
    """
    with jax.set_mesh(mesh_of(params)):
        return jax.jit(tx.init, out_shardings=state_shardings(tx, params))(params)


def train_step(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    params: Any,
    *,
    batch_spec: jax.P | None = None,
    donate: bool = True,
) -> TrainStep:
    """Builds a jitted train step that keeps parameters and state where they lie.

    Args:
        loss: ``loss(params, *inputs)``, a scalar; differentiated in ``params``.
        tx: the optimizer.
        params: what is trained, placed: arrays or ``ShapeDtypeStruct`` that lie on one mesh.
        batch_spec: how the last input, the batch, lies; by default its leading axis is sharded over
            the mesh's first axis. Other inputs, as frozen parameters, stay where they are.
        donate: whether the old parameters and state give their memory to the new ones.

    Returns:
        ``step(params, state, *inputs) → (params, state, loss)``, with ``jax.jit``'s ``lower``.

    Raises:
        ValueError: parameters that do not lie on one mesh; a batch spec that does not fit it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, altlora, nn
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> params = shard_model(LoRAPair(jnp.eye(4, 2), jnp.zeros((2, 3))), mesh, data_parallel())
        >>> tx = altlora(0.1)
        >>> step = train_step(lambda p, x: jnp.mean((nn.lora_apply(x, p) - 1) ** 2), tx, params)
        >>> params, state, first = step(params, shard_state(tx, params), jnp.eye(4))
        >>> params, state, second = step(params, state, jnp.eye(4))
        >>> bool(second < first)
        True
    """
    mesh = mesh_of(params)
    spec = jax.P(mesh.axis_names[0]) if batch_spec is None else batch_spec
    for name in jax.tree.leaves(tuple(spec)):
        _axis_size("batch_spec", name, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    state_places = state_shardings(tx, params)

    def step(params: Any, state: Any, *inputs: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, *inputs)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @functools.cache
    def jitted(inputs: int) -> Any:
        others = (None,) * (inputs - 1)
        return jax.jit(
            step,
            in_shardings=(places, state_places, *others, NamedSharding(mesh, spec)),
            out_shardings=(places, state_places, NamedSharding(mesh, jax.P())),
            donate_argnums=(0, 1) if donate else (),
        )

    def on_mesh(method: str) -> Callable[..., Any]:
        def call(params: Any, state: Any, *inputs: Any) -> Any:
            if not inputs:
                raise ValueError("the step needs a batch: call `step(params, state, batch)`.")
            with jax.set_mesh(mesh):
                return getattr(jitted(len(inputs)), method)(params, state, *inputs)

        return call

    run: Any = on_mesh("__call__")
    run.lower = on_mesh("lower")
    return run


def mesh_of(params: Any) -> Any:
    """Returns the one mesh that all leaves lie on.

    Raises:
        ValueError: a leaf that lies on no mesh or on another one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> mesh_of({"w": jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, jax.P()))}) == mesh
        True
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    meshes = {path: _lying(path, leaf).mesh for path, leaf in leaves.items()}
    if not meshes:
        raise ValueError("no parameters: there is no leaf to read a mesh from.")
    first, mesh = next(iter(meshes.items()))
    for path, here in meshes.items():
        if here != mesh:
            raise ValueError(
                f"{path} lies on {here}, {first} on {mesh}: place all parameters on one mesh"
                " (`shard_model`)."
            )
    return mesh


def _pair_specs(
    pair: PairLeaves, leaves: Sequence[Any], mesh: Mesh, recipe: Recipe
) -> dict[str, jax.P]:
    """Lays the leaves of one pair as the recipe lays its kernel."""
    shape_a, shape_b = pair.shapes(leaves)
    spec = recipe(pair.path, (*shape_a[:-1], shape_b[-1]), mesh)
    entries = (*spec, *[None] * (len(shape_a) - len(spec)))
    batch, sides = entries[:-2], {"in": entries[-2], "out": entries[-1]}
    result = {}
    for role, index in pair.leaves.items():
        side, axis = LONG_AXES.get(role, ("", 0))
        ndim = len(leaves[index].shape)
        if role in ("a", "b"):
            result[role] = pair.partition(role, ndim, batch, sides[side])
        else:
            of_leaf = _entries(ndim, {axis: sides[side]} if side else {})
            result[role] = jax.P(*batch, *of_leaf[len(batch) :])
    return result


def _entries(ndim: int, named: dict[int, Any]) -> list[Any]:
    entries: list[Any] = [None] * ndim
    for axis, name in named.items():
        entries[axis] = name
    return entries


def _flattened(path: str, entries: Sequence[Any]) -> Any:
    """The entry of several axes made one."""
    if any(entry is not None for entry in entries[1:]):
        raise ValueError(
            f"{path}: lies as {jax.P(*entries)} on axes that a factor has as one; only the first of"
            " them can be sharded. Shard heads rather than what is in a head."
        )
    return entries[0]


def _lying(path: str, leaf: Any) -> NamedSharding:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"{path}: lies on no mesh ({sharding}); place it first (`shard_model`).")
    return sharding


def _axis_size(path: str, name: Any, mesh: Mesh) -> int:
    if name not in mesh.shape:
        raise ValueError(
            f"{path}: the mesh has no axis {name!r}; use one of {', '.join(map(repr, mesh.shape))}."
        )
    return mesh.shape[name]


def _check(path: str, shape: tuple[int, ...], spec: jax.P, mesh: Mesh) -> None:
    """Raises unless the spec fits leaf and mesh."""
    if len(spec) > len(shape):
        raise ValueError(f"{path}: {spec} has more entries than the shape {shape} has axes.")
    names = jax.tree.leaves(tuple(spec))
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: {spec} uses a mesh axis twice; use each once.")
    for size, entry in zip(shape, spec, strict=False):
        parts = math.prod(_axis_size(path, name, mesh) for name in jax.tree.leaves(entry))
        if size % parts:
            raise ValueError(
                f"{path}: {parts} devices along {entry!r} do not divide an axis of {size} in"
                f" {shape}; pad the axis, replicate it (`P(None)`) or choose another mesh."
            )
