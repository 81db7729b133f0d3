"""LoRA factor pairs: the pair as a value, and pairing, which finds pairs in any parameter tree.

This is the only module that knows key names and axis orders. Everything above it sees canonical
pairs, ``a`` of shape (..., in, r) and ``b`` of shape (..., r, out), where leading axes are batch.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import meshes


class LoRAPair(NamedTuple):
    """The two factors of one LoRA adapter, ``ΔK = scale · a · b``.

    It is a pytree and may stand as a node anywhere in a parameter tree; like every node it may hold
    other things than arrays, such as shardings or mask entries.

    Args:
        a: the input-side factor, (..., in, r), floating.
        b: the output-side factor, (..., r, out), floating; leading axes are batch axes.

    Example:
        >>> import jax.numpy as jnp
        >>> pair = LoRAPair(a=jnp.ones((6, 2)), b=jnp.zeros((2, 4)))
        >>> (pair.a @ pair.b).shape
        (6, 4)

    Source: LoRA, arXiv 2106.09685, in Flax orientation (``a = Aᵀ``, ``b = Bᵀ``).
    """

    a: Any
    b: Any


class ShadowedPair(NamedTuple):
    """A pair with the auxiliary leaves of OPLoRA, made by :func:`lowrank_optax.shadow`.

    No gradient trains the auxiliary leaves: what comes back for them are products of the full
    gradient (``lowrank_optax.nn.lora_apply``), and the optimizer moves them by ordinary updates.

    Args:
        a: the input-side factor, (..., in, r).
        b: the output-side factor, (..., r, out).
        m_a: input-side factor of the low-rank momentum, (..., in, q), or None.
        m_b: output-side factor of the low-rank momentum, (..., q, out), or None.
        krylov_a: zeros, (..., in, n R), or None; its gradient is n further products ``G yᵀ`` of
            R = r + q columns, with a metric R = r + 2q.
        krylov_b: zeros, (..., n R, out), or None; its gradient is n further products ``xᵀ G``.
        seal: zeros, (..., R, 2), where there are further products: tells if they are of one pass.
        d_in: diagonal of the input-side metric, (..., in), or None.
        d_out: diagonal of the output-side metric, (..., out), or None.
        kfac: settings of the metric, (..., 3), if its statistics are K-FAC's, or None.
        shampoo: the same if they are Shampoo's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import shadow
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> node.m_a.shape, node.m_b.shape, node.krylov_b.shape
        ((6, 2), (2, 4), (4, 4))

    Source: OPLoRA, arXiv 2509.19977, whose released code keeps all activations instead.
    """

    a: Any
    b: Any
    m_a: Any = None
    m_b: Any = None
    krylov_a: Any = None
    krylov_b: Any = None
    seal: Any = None
    d_in: Any = None
    d_out: Any = None
    kfac: Any = None
    shampoo: Any = None


class FramedPair(NamedTuple):
    """A pair whose gradients flow through frames, made by :func:`lowrank_optax.frame`.

    ``ΔK = scale · (a · f_out + f_in · b - warm · f_in · f_out)``, where the frames and ``warm`` are
    constants for differentiation; the optimizer moves them by ordinary updates.

    Args:
        a: the input-side factor, (..., in, r).
        b: the output-side factor, (..., r, out).
        f_in: the input-side frame, (..., in, r): orthonormal columns; ``a`` itself in the warm-up.
        f_out: the output-side frame, (..., r, out): orthonormal rows; ``b`` itself in the warm-up.
        warm: 1 in the warm-up, which makes this ordinary LoRA, 0 after; (...). None without one.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import frame
        >>> node = frame(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))))
        >>> node.f_in.shape, node.f_out.shape, node.warm.item()
        ((6, 2), (2, 4), 1.0)

    Source: SDS-LoRA, arXiv 2606.16454.
    """

    a: Any
    b: Any
    f_in: Any
    f_out: Any
    warm: Any = None


NODES = (LoRAPair, ShadowedPair, FramedPair)
"""The kinds of pairs, each of which may stand as a node in a parameter tree."""

AUXILIARY = (*ShadowedPair._fields[2:], *FramedPair._fields[2:])
"""Names of all leaves that a pair may have beside its factors."""


LONG_AXES: Mapping[str, tuple[str, int]] = {
    **dict.fromkeys(["a", "m_a", "krylov_a", "f_in"], ("in", -2)),
    **dict.fromkeys(["b", "m_b", "krylov_b", "f_out"], ("out", -1)),
    "d_in": ("in", -1),
    "d_out": ("out", -1),
}
"""Which canonical leaves of pairs have an in or an out axis, and where."""


def make_node(leaves: Mapping[str, Any], nodes: Sequence[Any] = NODES) -> Any:
    """Makes the first kind of pair that has such leaves.

    Args:
        leaves: factors and auxiliary leaves by field name.
        nodes: the kinds to choose from.

    Returns:
        The pair.

    Raises:
        ValueError: no kind of pair has such leaves together.

    Example:
        >>> make_node({"a": 1.0, "b": 2.0})
        LoRAPair(a=1.0, b=2.0)
    """
    for node in nodes:
        needed = set(node._fields) - set(node._field_defaults)
        if needed <= set(leaves) <= set(node._fields):
            return node(**leaves)
    raise ValueError(
        f"no kind of pair has the leaves {', '.join(leaves)} together; take the leaves of one"
        " optimizer out before adding those of another."
    )


@dataclass(frozen=True)
class PairSpec:
    """Declares which leaves of a parameter tree form a pair, and the meaning of their axes.

    A pattern names the tail of a leaf's path. Components are separated by ``/`` and may hold
    wildcards ``*``; leaves whose paths agree outside the pattern, wildcards included, belong
    together. Axes that are neither input, rank nor output are batch axes and must come in the same
    order in both factors; several input or output axes are flattened.

    Args:
        a: pattern of the input-side factor.
        b: pattern of the output-side factor.
        auxiliary: patterns of leaves that no gradient trains, by name.
        nodes: the NamedTuples that pairs with auxiliary leaves become, of fields ``a``, ``b`` and
            auxiliary names; the first one that has all leaves of a pair. Fields with a default are
            optional. A pair without any auxiliary leaf is a plain ``LoRAPair``.
        a_in: axes of ``a`` that contract with the layer's input.
        a_rank: rank axis of ``a``.
        b_rank: rank axis of ``b``.
        b_out: axes of ``b`` that make the layer's output.

    Example:
        >>> import jax.numpy as jnp
        >>> transposed = PairSpec("down", "up", a_in=(1,), a_rank=0, b_rank=1, b_out=(0,))
        >>> tree = {"q": {"down": jnp.ones((2, 6)), "up": jnp.zeros((4, 2))}}
        >>> [pair] = find_pairs(tree, [transposed]).take(tree)
        >>> pair.a.shape, pair.b.shape
        ((6, 2), (2, 4))
    """

    a: str
    b: str
    auxiliary: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[Any, ...] = ()
    a_in: tuple[int, ...] = (-2,)
    a_rank: int = -1
    b_rank: int = -2
    b_out: tuple[int, ...] = (-1,)

    def axes(self, role: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the axes of a factor's leaf that are its canonical rows, and columns."""
        if role == "a":
            return self.a_in, (self.a_rank,)
        return (self.b_rank,), self.b_out

    def match(self, path: str) -> "Member | None":
        """Says which role the leaf at ``path`` plays, or None if it plays none."""
        for role, pattern in {"a": self.a, "b": self.b, **self.auxiliary}.items():
            found = re.fullmatch(_tail_regex(pattern), path)
            if found:
                prefix, *captures = found.groups(default="")
                name = "/".join([prefix.rstrip("/"), *captures]).strip("/")
                return Member(pair=name, role=role, spec=self)
        return None


class Member(NamedTuple):
    """The part one leaf plays: a pair's name, ``role`` (``"a"``, ``"b"`` or auxiliary), its spec.

    A callable given as a spec returns one for each leaf that belongs to a pair, None for others.

    Example:
        >>> spec = PairSpec("a", "b")
        >>> member = Member(pair="layers/0/q", role="a", spec=spec)
        >>> member.role
        'a'
    """

    pair: str
    role: str
    spec: PairSpec


PairMatcher = PairSpec | Callable[[str], Member | None]

_PEFT_AXES: dict[str, Any] = {"a_in": (-1,), "a_rank": -2, "b_rank": -1, "b_out": (-2,)}

DEFAULT_SPECS: tuple[PairMatcher, ...] = (
    PairSpec(  # Flax NNX and Linen, EasyDeL, this library's modules
        "lora_a",
        "lora_b",
        auxiliary={name: f"lora_{name}" for name in AUXILIARY},
        nodes=(ShadowedPair, FramedPair),
    ),
    PairSpec("*_lora_a", "*_lora_b"),  # qwix: beside the weight it adapts
    PairSpec("lora_A", "lora_B", **_PEFT_AXES),  # Hugging Face PEFT and its ports
    PairSpec("lora_A/weight", "lora_B/weight", **_PEFT_AXES),
    PairSpec("lora_A/*/weight", "lora_B/*/weight", **_PEFT_AXES),
)
"""Layouts that are found without being declared."""


def _tail_regex(pattern: str) -> str:
    tail = re.escape(pattern).replace(r"\*", "([^/]+)")
    return f"(.*/)?{tail}"


def path_name(path: Sequence[Any]) -> str:
    """Writes a key path as ``layers/0/lora_a``, the same for NNX variables and plain arrays.

    Args:
        path: a key path of ``jax.tree_util``.

    Returns:
        The keys joined by ``/``. Dots inside dictionary keys separate components too, as in PEFT's
        flat names; the trailing attribute of a Flax variable (``.value``) is left out.

    Example:
        >>> import jax
        >>> tree = {"layers": [{"lora_a": 0.0}], "q.lora_A.weight": 0.0}
        >>> [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        ['layers/0/lora_a', 'q/lora_A/weight']
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    names = []
    for key in path:
        match key:
            case jax.tree_util.DictKey() | jax.tree_util.FlattenedIndexKey():
                names.append(str(key.key).replace(".", "/"))
            case jax.tree_util.SequenceKey():
                names.append(str(key.idx))
            case jax.tree_util.GetAttrKey():
                names.append(key.name)
            case _:
                names.append(str(key).strip("."))
    return "/".join(names)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


@dataclass(frozen=True)
class PairLeaves:
    """Where one pair lies in a flattened tree.

    Args:
        path: the pair's name, the path of what holds its leaves.
        spec: the layout of its leaves.
        leaves: leaf index by role.
    """

    path: str
    spec: PairSpec
    leaves: Mapping[str, int]

    @property
    def node(self) -> Any:
        """The type of this pair's values."""
        fitting = (n for n in (LoRAPair, *self.spec.nodes) if set(self.leaves) <= set(n._fields))
        node = next(fitting, None)
        if node is None:
            raise ValueError(
                f"{self.path}: no kind of pair has the leaves {', '.join(self.leaves)} together;"
                " take the leaves of one optimizer out before adding those of another."
            )
        return node

    def shapes(self, leaves: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of the canonical factors, (batch..., in, r) and (batch..., r, out)."""
        spec, shape = self.spec, lambda role: tuple(leaves[self.leaves[role]].shape)
        batch, n_in, rank = _matrix_shape(self.path, shape("a"), *spec.axes("a"))
        *_, n_out = _matrix_shape(self.path, shape("b"), *spec.axes("b"))
        return (*batch, n_in, rank), (*batch, rank, n_out)

    def partition(self, role: str, ndim: int, batch: Sequence[Any], long: Any) -> jax.P:
        """Returns the partition of a factor's leaf from those of its canonical axes."""
        rows, columns = self.spec.axes(role)
        order = _axes(self.path, ndim, rows, columns)
        along = self.spec.a_in if role == "a" else self.spec.b_out
        entries: list[Any] = [None] * ndim
        for axis, entry in zip(order, batch, strict=False):
            entries[axis] = entry
        entries[along[0]] = long  # several axes that are one canonical axis: the major one
        return jax.P(*entries)

    def take(self, leaves: Sequence[Any], node: Any = None) -> Any:
        """Takes this pair out of a flat list with canonical factors, as its or another node."""
        spec = self.spec
        values = {role: leaves[index] for role, index in self.leaves.items()}
        values = {role: None if _is_masked(x) else x for role, x in values.items()}
        for role in ("a", "b"):
            values[role] = _to_matrix(values[role], *spec.axes(role))
        return (node or self.node)(**values)

    def put(self, leaves: list[Any], pair: Any, like: Sequence[Any]) -> None:
        """Puts a canonical pair back into a flat list, each leaf in the layout of ``like``.

        A leaf that the given pair lacks becomes ``MaskedNode``, as those outside pairs do.
        """
        spec = self.spec
        for role, index in self.leaves.items():
            value = getattr(pair, role)
            if role in ("a", "b"):
                value = _from_matrix(value, *spec.axes(role), like[index].shape)
            leaves[index] = optax.MaskedNode() if value is None else value


@dataclass(frozen=True)
class Pairing:
    """A parameter tree taken apart into pairs and the rest.

    Made by :func:`find_pairs`. It holds structure only, no arrays.

    Args:
        treedef: structure of the whole tree.
        paths: name of every leaf.
        pairs: where each pair lies.
    """

    treedef: jax.tree_util.PyTreeDef
    paths: tuple[str, ...]
    pairs: tuple[PairLeaves, ...]

    def take(self, tree: Any, node: Any = None) -> list[Any]:
        """Returns the pairs of a tree of this structure, factors canonical, in a fixed order."""
        leaves = self.treedef.flatten_up_to(tree)
        return [pair.take(leaves, node) for pair in self.pairs]

    def put(self, values: Sequence[Any], like: Any) -> Any:
        """Builds a tree of pairs in the layout of ``like``; other leaves become ``MaskedNode``."""
        like_leaves = self.treedef.flatten_up_to(like)
        leaves: list[Any] = [optax.MaskedNode()] * len(self.paths)
        for pair, value in zip(self.pairs, values, strict=True):
            pair.put(leaves, value, like_leaves)
        return jax.tree.unflatten(self.treedef, leaves)

    def rest(self, tree: Any) -> Any:
        """Returns the tree with the leaves of pairs replaced by ``MaskedNode``."""
        leaves = self.treedef.flatten_up_to(tree)
        for index in self._paired:
            leaves[index] = optax.MaskedNode()
        return jax.tree.unflatten(self.treedef, leaves)

    def merge(self, pairs: Any, rest: Any) -> Any:
        """Joins what :meth:`put` and :meth:`rest` return into one whole tree."""
        leaves = self.treedef.flatten_up_to(rest)
        pair_leaves = self.treedef.flatten_up_to(pairs)
        for index in self._paired:
            leaves[index] = pair_leaves[index]
        return jax.tree.unflatten(self.treedef, leaves)

    def by_leaf(self, tree: Any, what: str) -> list[Any]:
        """Reads one value for each leaf from ``tree``: a single value or a prefix tree of them."""
        try:
            full = jax.tree.broadcast(tree, jax.tree.unflatten(self.treedef, self.paths))
        except ValueError as error:
            raise ValueError(
                f"`{what}` does not fit the parameter tree; give one value, or a tree (or a prefix"
                f" of one) with the structure of the parameters. {error}"
            ) from error
        return jax.tree.leaves(full)

    @property
    def _paired(self) -> list[int]:
        return [index for pair in self.pairs for index in pair.leaves.values()]


def find_pairs(tree: Any, specs: Sequence[PairMatcher] = DEFAULT_SPECS) -> Pairing:
    """Finds the LoRA pairs of a parameter tree.

    Args:
        tree: parameters: arrays, ``ShapeDtypeStruct`` or Flax variables in any nesting.
            ``LoRAPair`` nodes are pairs whatever ``specs`` says; ``None`` and ``MaskedNode`` are
            passed over.
        specs: tried in order on every leaf's path: :class:`PairSpec` objects, or callables from the
            path to a :class:`Member` or None.

    Returns:
        The pairing, with pairs in the order of the tree. It may hold no pairs at all.

    Raises:
        ValueError: half a pair, shapes that do not multiply, a rank above min(in, out), batch axes
            that differ. The message names the path and the remedy.
        TypeError: a factor that is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> tree = {"q": {"kernel": jnp.ones((6, 4)),
        ...               "lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}}
        >>> [pair.path for pair in find_pairs(tree).pairs]
        ['q']
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = tuple(path_name(path) for path, _ in flat)
    leaves = [leaf for _, leaf in flat]
    members = _node_members(tree)

    found: dict[tuple[str, PairSpec | str], tuple[PairSpec, dict[str, int]]] = {}
    for index, path in enumerate(paths):
        member = members.get(path) or _first_match(specs, path)
        if member is not None:
            key = (member.pair, f"{member.spec.a}|{member.spec.b}")
            _, indices = found.setdefault(key, (member.spec, {}))
            if member.role in indices:
                raise ValueError(
                    f"{paths[indices[member.role]]} and {path} both claim the role"
                    f" {member.role!r} of the pair {member.pair!r}; make the spec tell them apart."
                )
            indices[member.role] = index
    pairs = tuple(PairLeaves(name, spec, idx) for (name, _), (spec, idx) in found.items())
    for pair in pairs:
        _check(pair, paths, leaves)
        _check_types(pair, paths, leaves)
    if not pairs and any("lora" in path.lower() for path in paths):
        suspects = [path for path in paths if "lora" in path.lower()]
        warnings.warn(
            f"No LoRA pairs found, but some leaves look like factors: {', '.join(suspects[:4])}."
            " Declare their layout with a PairSpec (argument `specs`).",
            stacklevel=2,
        )
    return Pairing(treedef, paths, pairs)


def scales(pairing: Pairing, scale: Any) -> list[Any]:
    """Reads the forward scale s of every pair, ``ΔK = s · a · b``.

    Args:
        pairing: the pairs.
        scale: one number; a callable from a pair's path to its number; or a tree: numbers by path
            (``{"layers/0/q": 2.0, ...}``), or a (prefix of a) tree shaped like the parameters.

    Returns:
        One number per pair.

    Raises:
        ValueError: a tree that does not fit or gives the factors of a pair different scales, or a
            number that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> tree = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))}
        >>> scales(find_pairs(tree), lambda path: 16 / 2 if path == "q" else 1.0)
        [8.0]
    """
    names = [pair.path for pair in pairing.pairs]
    if callable(scale):
        values = [scale(name) for name in names]
    elif not names:
        values = []
    elif _is_by_path(scale, names):
        values = [scale[name] for name in names]
    else:
        leaves = pairing.by_leaf(scale, "scale")
        values = [leaves[pair.leaves["a"]] for pair in pairing.pairs]
        for pair, value in zip(pairing.pairs, values, strict=True):
            if leaves[pair.leaves["b"]] is not value and leaves[pair.leaves["b"]] != value:
                raise ValueError(
                    f"{pair.path}: `scale` differs between its two factors; give both the same."
                )
    for name, value in zip(names, values, strict=True):
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name}: `scale` must be positive, got {value}.")
    return values


def cuts(pairing: Pairing, params: Any, param_specs: Any) -> list[dict[str, tuple[str, ...]]]:
    """Reads over which mesh axes every pair's factors are cut up.

    Args:
        pairing: the pairs.
        params: the parameters.
        param_specs: a ``PartitionSpec`` for each of them: a tree, or a prefix of one.

    Returns:
        For each pair, the mesh axes of the long axes by side, and of the batch axes.

    Raises:
        ValueError: specs that do not fit, or that cut up a rank axis.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tree = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))}
        >>> specs = {"q": LoRAPair(jax.P("model"), jax.P())}
        >>> cuts(find_pairs(tree), tree, specs)
        [{'a': ('model',), 'b': (), 'batch': ()}]
    """
    by_leaf = pairing.by_leaf(param_specs, "param_specs")
    leaves = pairing.treedef.flatten_up_to(params)

    def names(pair: PairLeaves, role: str, axes: tuple[int, ...]) -> tuple[str, ...]:
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
        spec = pair.spec
        for role, axis in (("a", spec.a_rank), ("b", spec.b_rank)):
            check_rank_axis(pairing.paths[pair.leaves[role]], names(pair, role, (axis,)))
        cut = {"a": names(pair, "a", spec.a_in), "b": names(pair, "b", spec.b_out)}
        index = pair.leaves["a"]
        rest = set(range(-leaves[index].ndim, 0)) - {spec.a_rank, *spec.a_in}
        result.append({**cut, "batch": names(pair, "a", tuple(sorted(rest)))})
    return result


def check_rank_axis(path: str, names: Any) -> None:
    """Raises if mesh axes cut up a rank axis.

    Example:
        >>> check_rank_axis("q/lora_a", ())
    """
    if names:
        raise ValueError(
            f"{path}: its rank axis is sharded over {names!r}. Replicate it: the r×r algebra needs"
            " all of it on every device, and it is too short to gain by sharding. Shard the in axis"
            " of a and the out axis of b."
        )


def _is_by_path(scale: Any, names: Sequence[str]) -> bool:
    by_path = isinstance(scale, Mapping) and set(names) <= set(scale)
    return by_path and jax.tree_util.all_leaves([scale[name] for name in names])


def _first_match(specs: Sequence[PairMatcher], path: str) -> Member | None:
    for spec in specs:
        member = spec.match(path) if isinstance(spec, PairSpec) else spec(path)
        if member is not None:
            return member
    return None


def _node_members(tree: Any) -> dict[str, Member]:
    """Members of the pairs that stand in the tree as nodes, by leaf path."""
    is_node = lambda x: isinstance(x, NODES)
    members = {}
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node):
        if is_node(node):
            fields = type(node)._fields
            auxiliary = {name: name for name in fields if name not in ("a", "b")}
            spec = PairSpec("a", "b", auxiliary=auxiliary, nodes=(type(node),))
            for sub_path, _ in jax.tree_util.tree_leaves_with_path(node):
                member = Member(path_name(path), sub_path[0].name, spec)
                members[path_name((*path, *sub_path))] = member
    return members


def _check(pair: PairLeaves, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raises unless the leaves make a whole, well-shaped pair."""
    spec, index = pair.spec, pair.leaves
    for role in pair.node._fields:
        if role not in index and role not in pair.node._field_defaults:
            present = ", ".join(paths[i] for i in index.values())
            raise ValueError(
                f"Half a pair at {pair.path!r}: found {present}, but no leaf for {role!r}. Keep the"
                " factors of a pair together: give them the same label or mask, or leave both out."
            )
    for role in ("a", "b"):
        leaf = leaves[index[role]]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{paths[index[role]]}: a LoRA factor must be floating, got {leaf.dtype}."
            )
    path_a, path_b = paths[index["a"]], paths[index["b"]]
    shape_a, shape_b = tuple(leaves[index["a"]].shape), tuple(leaves[index["b"]].shape)
    both = f"{path_a} {shape_a} and {path_b} {shape_b}"
    remedy = "If their axes are laid out differently, declare them with a PairSpec (`specs`)."
    batch_a, n_in, rank = _matrix_shape(path_a, shape_a, *spec.axes("a"))
    batch_b, rank_b, n_out = _matrix_shape(path_b, shape_b, *spec.axes("b"))
    if rank != rank_b:
        raise ValueError(f"{both} do not multiply: ranks {rank} and {rank_b}. {remedy}")
    if batch_a != batch_b:
        raise ValueError(f"{both} have different batch axes: {batch_a} and {batch_b}. {remedy}")
    if not 1 <= rank <= min(n_in, n_out):
        raise ValueError(
            f"{both}: the rank {rank} must lie between 1 and min(in, out) = {min(n_in, n_out)};"
            f" choose a smaller LoRA rank for this layer. {remedy}"
        )


def _check_types(pair: PairLeaves, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raises if a factor's type says that its rank axis is sharded."""
    for role, axis in (("a", pair.spec.a_rank), ("b", pair.spec.b_rank)):
        leaf = leaves[pair.leaves[role]]
        if isinstance(leaf, jax.Array) and (spec := meshes.spec_of(leaf)) is not None:
            check_rank_axis(paths[pair.leaves[role]], spec[axis])


def _axes(path: str, ndim: int, rows: tuple[int, ...], cols: tuple[int, ...]) -> tuple[int, ...]:
    """Order of axes that brings (batch, rows, cols) together."""
    if any(not -ndim <= axis < ndim for axis in rows + cols):
        raise ValueError(
            f"{path}: a factor needs the axes {rows + cols} but has {ndim}; declare its layout with"
            " a PairSpec (`specs`)."
        )
    named = tuple(axis % ndim for axis in rows + cols)
    if len(set(named)) != len(named):
        raise ValueError(f"{path}: the axes {rows + cols} name one axis of {ndim} twice.")
    return (*(axis for axis in range(ndim) if axis not in named), *named)


def _matrix_shape(
    path: str, shape: tuple[int, ...], rows: tuple[int, ...], cols: tuple[int, ...]
) -> tuple[tuple[int, ...], int, int]:
    ordered = [shape[axis] for axis in _axes(path, len(shape), rows, cols)]
    row, col = len(shape) - len(rows) - len(cols), len(shape) - len(cols)
    return tuple(ordered[:row]), math.prod(ordered[row:col]), math.prod(ordered[col:])


def _to_matrix(x: Any, rows: tuple[int, ...], cols: tuple[int, ...]) -> Any:
    """Brings a leaf to (batch..., rows, cols)."""
    order = _axes("", x.ndim, rows, cols)
    if order == tuple(range(x.ndim)) and len(rows) == len(cols) == 1:
        return x
    batch, n_rows, n_cols = _matrix_shape("", x.shape, rows, cols)
    return jnp.transpose(x, order).reshape(*batch, n_rows, n_cols)


def _from_matrix(x: Any, rows: tuple[int, ...], cols: tuple[int, ...], shape: Any) -> Any:
    """Undoes :func:`_to_matrix` for a leaf of the given shape."""
    order = _axes("", len(shape), rows, cols)
    if order == tuple(range(len(shape))) and len(rows) == len(cols) == 1:
        return x
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    return jnp.transpose(x.reshape([shape[axis] for axis in order]), inverse)
