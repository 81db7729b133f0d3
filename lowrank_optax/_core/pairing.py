"""Pairing: takes any parameter tree apart into LoRA pairs and the rest, and puts it together."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import layouts, meshes
from lowrank_optax._core.layouts import (
    DEFAULT_SPECS,
    Layout,
    Member,
    PairMatcher,
    PairSpec,
    Unpaired,
)
from lowrank_optax._core.linalg import SIDES
from lowrank_optax._core.names import SAYS_LORA, in_words, node_name, path_name
from lowrank_optax._core.nodes import is_masked, is_node, kind_with
from lowrank_optax._core.readings import resolve, weights_beside
from lowrank_optax._core.suspects import near_misses


@dataclass(frozen=True)
class PairLeaves:
    """Where the leaves of one pair are in a flattened tree.

    Args:
        path: the pair's name, the path of what holds its leaves.
        layout: the meaning of its factors' axes.
        leaves: leaf index by role.
        kind: the pair's kind, the type of its values.
    """

    path: str
    layout: Layout
    leaves: Mapping[str, int]
    kind: Any

    def shapes(self, leaves: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of the canonical factors, (batch..., in, r) and (batch..., r, out)."""
        layout, shape = self.layout, lambda role: tuple(leaves[self.leaves[role]].shape)
        batch, n_in, rank = layouts.matrix_shape(self.path, shape("a"), *layout.axes("a"))
        *_, n_out = layouts.matrix_shape(self.path, shape("b"), *layout.axes("b"))
        return (*batch, n_in, rank), (*batch, rank, n_out)

    def partition(self, role: str, ndim: int, batch: Sequence[Any], long: Any) -> jax.P:
        """Returns the partition of a factor's leaf from those of its canonical axes."""
        rows, columns = self.layout.axes(role)
        order = layouts.canonical_order(self.path, ndim, rows, columns)
        along = self.layout.a_in if role == "a" else self.layout.b_out
        entries: list[Any] = [None] * ndim
        for axis, entry in zip(order, batch, strict=False):
            entries[axis] = entry
        entries[along[0]] = long  # several axes that are one canonical axis: the major one
        return jax.P(*entries)

    def take(self, leaves: Sequence[Any], kind: Any = None) -> Any:
        """Takes this pair out of a flat list, factors canonical, as its own or another kind."""
        kind = kind or self.kind
        values = {role: leaves[i] for role, i in self.leaves.items() if role in kind._fields}
        values = {role: None if is_masked(x) else x for role, x in values.items()}
        for role in SIDES:
            if values[role] is not None:
                values[role] = layouts.to_matrix(values[role], *self.layout.axes(role))
        return kind(**values)

    def put(self, leaves: list[Any], pair: Any, like: Sequence[Any]) -> None:
        """Puts a canonical pair back into a flat list, each leaf in the layout of `like`.

        A leaf that the given pair lacks becomes `MaskedNode`, as those outside pairs do.
        """
        for role, index in self.leaves.items():
            value = getattr(pair, role, None)
            if value is not None and role in SIDES:
                value = layouts.from_matrix(value, *self.layout.axes(role), like[index].shape)
            leaves[index] = optax.MaskedNode() if value is None else value


@dataclass(frozen=True)
class Pairing:
    """A parameter tree taken apart into pairs and the rest.

    Made by `find_pairs`. It holds structure only, no arrays.

    Args:
        treedef: structure of the whole tree.
        paths: name of every leaf.
        pairs: where each pair is.
    """

    treedef: jax.tree_util.PyTreeDef
    paths: tuple[str, ...]
    pairs: tuple[PairLeaves, ...]

    def take(self, tree: Any, kind: Any = None) -> list[Any]:
        """Returns the pairs of a tree of this structure, factors canonical, in a fixed order.

        Args:
            tree: as the tree of `find_pairs`.
            kind: the type of the values; each pair's own kind by default.
        """
        leaves = self.treedef.flatten_up_to(tree)
        return [pair.take(leaves, kind) for pair in self.pairs]

    def put(self, values: Sequence[Any], like: Any) -> Any:
        """Builds a tree of pairs in the layout of `like`; other leaves become `MaskedNode`."""
        like_leaves = self.treedef.flatten_up_to(like)
        leaves: list[Any] = [optax.MaskedNode()] * len(self.paths)
        for pair, value in zip(self.pairs, values, strict=True):
            pair.put(leaves, value, like_leaves)
        return jax.tree.unflatten(self.treedef, leaves)

    def rest(self, tree: Any) -> Any:
        """Returns the tree with the leaves of pairs replaced by `MaskedNode`."""
        leaves = self.treedef.flatten_up_to(tree)
        for index in self.paired:
            leaves[index] = optax.MaskedNode()
        return jax.tree.unflatten(self.treedef, leaves)

    def merge(self, pairs: Any, rest: Any) -> Any:
        """Joins what `put` and `rest` return into one whole tree."""
        leaves = self.treedef.flatten_up_to(rest)
        pair_leaves = self.treedef.flatten_up_to(pairs)
        for index in self.paired:
            leaves[index] = pair_leaves[index]
        return jax.tree.unflatten(self.treedef, leaves)

    def by_leaf(self, tree: Any, what: str) -> list[Any]:
        """Reads one value for each leaf from `tree`: a single value or a prefix tree of them."""
        try:
            full = jax.tree.broadcast(tree, jax.tree.unflatten(self.treedef, self.paths))
        except ValueError as error:
            raise ValueError(
                f"`{what}` does not fit the parameter tree; give one value, or a tree (or a prefix"
                f" of one) with the structure of the parameters.\n{error}"
            ) from error
        return jax.tree.leaves(full)

    def mask(self, mask: Any, params: Any) -> Any:
        """Resolves what optax takes as a mask to a tree of one boolean for each leaf.

        Args:
            mask: None; a callable from the parameters to a (prefix) tree of booleans; or such a
                tree, which may be a module that can also be called.
            params: the parameters.

        Returns:
            The tree, or None.
        """
        if mask is None:
            return None
        if not self.paths:
            return params  # optax asks with a placeholder that has no leaves
        is_function = jax.tree_util.all_leaves([mask]) or isinstance(mask, jax.tree_util.Partial)
        tree = mask(params) if is_function and callable(mask) else mask
        return jax.tree.unflatten(self.treedef, self.by_leaf(tree, "mask"))

    @property
    def paired(self) -> list[int]:
        """The indices of all leaves that are in a pair."""
        return [index for pair in self.pairs for index in pair.leaves.values()]

    @property
    def unpaired(self) -> list[str]:
        """The paths of all leaves that are in none."""
        paired = set(self.paired)
        return [path for index, path in enumerate(self.paths) if index not in paired]


def find_pairs(tree: Any, specs: Sequence[PairMatcher] | None = None) -> Pairing:
    """Finds the LoRA pairs of a parameter tree.

    Args:
        tree: parameters: arrays, `ShapeDtypeStruct` or Flax variables in any nesting. Nodes, such
            as `LoRAPair`, are pairs whatever `specs` says. `None` and `MaskedNode` are passed over.
        specs: layouts, tried in order on every leaf: `PairSpec` objects, `Unpaired` for leaves that
            belong to no pair, or callables from path and leaf (its shape and dtype) to a `Member`
            or None. `DEFAULT_SPECS` by default.

    Returns:
        The pairing, with pairs in the order of the tree. It may hold no pairs at all. A warning
        names leaves that look like factors and are in no pair.

    Raises:
        ValueError: half a pair, shapes that do not multiply, can be read in several ways or are not
            those of the weight beside them, a rank above min(in, out), batch axes that differ. The
            message names the path and the remedy.
        TypeError: a factor that is not floating; specs that are none.

    Example:
        >>> import jax.numpy as jnp
        >>> tree = {"q": {"kernel": jnp.ones((6, 4)),
        ...               "lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
        >>> [pair.path for pair in find_pairs(tree).pairs]
        ['q']
    """
    specs = _checked_specs(specs)
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = tuple(path_name(path) for path, _ in flat)
    leaves = [leaf for _, leaf in flat]
    in_nodes = _members_of_nodes(tree)

    found: dict[tuple[str, str], tuple[Member, dict[str, int]]] = {}
    unpaired = set()
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        member = in_nodes.get(path) or layouts.first_match(specs, path, leaf)
        if isinstance(member, Unpaired):
            unpaired.add(index)
        elif member is not None:
            key = (member.pair, f"{member.spec.a}|{member.spec.b}")
            _, indices = found.setdefault(key, (member, {}))
            if member.role in indices:
                raise ValueError(
                    f"{paths[indices[member.role]]} and {path} both claim the role"
                    f" {member.role!r} of {in_words(member.pair)}; make the spec tell them apart."
                )
            indices[member.role] = index
    paired = {index for _, indices in found.values() for index in indices.values()}
    beside = weights_beside(paths, leaves, paired)
    pairs = []
    for (name, _), (member, indices) in found.items():
        kind = _kind_of(name, member.kind, indices)
        _check_whole(name, kind, indices, paths)
        path_a, path_b = (paths[indices[side]] for side in SIDES)
        shape_a, shape_b = (tuple(leaves[indices[side]].shape) for side in SIDES)
        weights = beside.get(_holder(path_a), [])
        layout = resolve(member.spec, (path_a, path_b), (shape_a, shape_b), weights)
        pairs.append(PairLeaves(name, layout, indices, kind))
    for pair in pairs:
        _check_types(pair, paths, leaves)
        _check_shapes(pair, paths, leaves, paths[pair.leaves["a"]] in in_nodes)
    if message := near_misses(paths, leaves, paired | unpaired):
        warnings.warn(message, stacklevel=2)
    return Pairing(treedef, paths, tuple(pairs))


def _holder(path: str) -> str:
    """The path of what holds a leaf, or holds what holds a factor alone, as `q/lora_a/kernel`."""
    *above, _ = path.split("/")
    while above and SAYS_LORA.search(above[-1]):
        above.pop()
    return "/".join(above)


def _checked_specs(specs: Any) -> Sequence[PairMatcher]:
    if specs is None:
        return DEFAULT_SPECS
    if isinstance(specs, PairSpec) or not isinstance(specs, Sequence) or isinstance(specs, str):
        raise TypeError(f"`specs` must be a list of PairSpec or callables, got {specs!r}.")
    for spec in specs:
        if not (isinstance(spec, PairSpec | Unpaired) or callable(spec)):
            raise TypeError(f"`specs` must hold PairSpec, Unpaired or callables, got {spec!r}.")
    return specs


def sharded_axes(
    pairing: Pairing, params: Any, param_specs: Any
) -> list[dict[str, tuple[str, ...]]]:
    """Reads over which mesh axes every pair's factors are sharded.

    Args:
        pairing: the pairs.
        params: the parameters.
        param_specs: a `PartitionSpec` for each of them: a tree, or a prefix of one.

    Returns:
        For each pair, the mesh axes of the long axes by side, and of the batch axes.

    Raises:
        ValueError: specs that do not fit, or that shard a rank axis.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> tree = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))}
        >>> specs = {"q": LoRAPair(jax.P("model"), jax.P())}
        >>> sharded_axes(find_pairs(tree), tree, specs)
        [{'a': ('model',), 'b': (), 'batch': ()}]
    """
    by_leaf = pairing.by_leaf(param_specs, "param_specs")
    leaves = pairing.treedef.flatten_up_to(params)

    def names(pair: PairLeaves, role: str, axes: layouts.Axes) -> tuple[str, ...]:
        index = pair.leaves[role]
        spec, ndim = by_leaf[index], leaves[index].ndim
        if not isinstance(spec, jax.P) or len(spec) > ndim:
            raise ValueError(
                f"{pairing.paths[index]}: `param_specs` must give a PartitionSpec of at most {ndim}"
                f" entries, got {spec!r}."
            )
        entries = [*spec, *[None] * (ndim - len(spec))]
        found = [entries[axis] for axis in axes if entries[axis] is not None]
        return tuple(name for entry in found for name in jax.tree.leaves(entry))

    result = []
    for pair in pairing.pairs:
        layout = pair.layout
        for role, axis in (("a", layout.a_rank), ("b", layout.b_rank)):
            _check_rank_axis(pairing.paths[pair.leaves[role]], names(pair, role, (axis,)))
        long = {"a": names(pair, "a", layout.a_in), "b": names(pair, "b", layout.b_out)}
        ndim = leaves[pair.leaves["a"]].ndim
        rest = set(range(ndim)) - {axis % ndim for axis in (layout.a_rank, *layout.a_in)}
        result.append({**long, "batch": names(pair, "a", tuple(sorted(rest)))})
    return result


def _members_of_nodes(tree: Any) -> dict[str, Member]:
    """Members of the pairs that stand in the tree as nodes, by leaf path."""
    members = {}
    spec = PairSpec("a", "b", **Layout()._asdict())
    is_end = lambda x: is_node(x) or _is_variable(x)
    for path, end in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_end):
        for inner, node in jax.tree_util.tree_leaves_with_path(end, is_leaf=is_node):
            if is_node(node):
                for sub_path, _ in jax.tree_util.tree_leaves_with_path(node):
                    member = Member(node_name(path), sub_path[0].name, spec, type(node))
                    members[path_name((*path, *inner, *sub_path))] = member
    return members


def _is_variable(x: Any) -> bool:
    """Whether a subtree is a variable of Flax, whose attribute `value` names nothing."""
    return type(x).__module__.startswith("flax.") and hasattr(type(x), "value")


def _kind_of(name: str, kind: Any, leaves: Mapping[str, int]) -> Any:
    """The kind of a pair; one whose auxiliary leaves are all masked is a plain pair."""
    if kind is not None and set(leaves) != set(SIDES):
        return kind
    try:
        return kind_with(leaves)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_whole(name: str, kind: Any, leaves: Mapping[str, int], paths: Sequence[str]) -> None:
    """Raises if a required leaf of a pair is missing."""
    for role in kind._fields:
        if role not in leaves and role not in kind._field_defaults:
            present = ", ".join(paths[i] for i in leaves.values())
            raise ValueError(
                f"Half a pair at {repr(name) if name else 'the root'}: found {present}, but no leaf"
                f" for {role!r}. Keep the factors of a pair together: give them the same label or"
                " mask, or leave both out."
            )


def _check_types(pair: PairLeaves, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raises unless the factors are floating and their types say that no rank axis is sharded."""
    for role, axis in (("a", pair.layout.a_rank), ("b", pair.layout.b_rank)):
        path, leaf = paths[pair.leaves[role]], leaves[pair.leaves[role]]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"{path}: a LoRA factor must be floating, got {leaf.dtype}.")
        if isinstance(leaf, jax.Array) and (spec := meshes.spec_of(leaf)) is not None:
            _check_rank_axis(path, spec[axis])


def _check_shapes(
    pair: PairLeaves, paths: Sequence[str], leaves: Sequence[Any], is_node: bool
) -> None:
    """Raises unless the factors multiply and their rank is possible."""
    (path_a, shape_a), (path_b, shape_b) = (
        (paths[pair.leaves[role]], tuple(leaves[pair.leaves[role]].shape)) for role in SIDES
    )
    both = f"{path_a} {shape_a} and {path_b} {shape_b}"
    remedy = "If their axes are laid out differently, declare them with a PairSpec (`specs`)."
    batch_a, n_in, rank = layouts.matrix_shape(path_a, shape_a, *pair.layout.axes("a"))
    batch_b, rank_b, n_out = layouts.matrix_shape(path_b, shape_b, *pair.layout.axes("b"))
    if rank != rank_b:
        raise ValueError(f"{both} do not multiply: ranks {rank} and {rank_b}. {remedy}")
    if batch_a != batch_b:
        raise ValueError(f"{both} have different batch axes: {batch_a} and {batch_b}. {remedy}")
    if rank < 1 or (rank > min(n_in, n_out) and not meshes.inside_shard_map()):
        named = f", or leave it to the fallback by specs=[Unpaired({pair.path!r}), *DEFAULT_SPECS]"
        without = "" if is_node else named  # nodes are pairs whatever the specs say
        raise ValueError(
            f"{both}: the rank {rank} must lie between 1 and min(in, out) = {min(n_in, n_out)};"
            f" choose a smaller LoRA rank for this layer{without}. {remedy}"
        )


def _check_rank_axis(path: str, names: Any) -> None:
    if names:
        raise ValueError(
            f"{path}: its rank axis is sharded over {names!r}. Replicate it: the r×r algebra needs"
            " all of it on every device, and it is too short to gain by sharding. Shard the in axis"
            " of a and the out axis of b."
        )
