"""Layouts: which leaves of a parameter tree form a pair, and the meaning of their axes.

This module and `names` alone know key names and axis orders. Everything above it sees canonical
pairs, `a` of shape (..., in, r) and `b` of shape (..., r, out), where leading axes are batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp

from lowrank_optax._core.linalg import SIDES
from lowrank_optax._core.names import lies_under, matched, pair_name, require_pattern
from lowrank_optax._core.nodes import auxiliary_names, make_node

Axes = tuple[int, ...]


class Layout(NamedTuple):
    """The meaning of the axes of two factors.

    Args:
        a_in: axes of a that contract with the layer's input.
        a_rank: rank axis of a.
        b_rank: rank axis of b.
        b_out: axes of b that make the layer's output.

    Example:
        >>> Layout().axes("a")
        ((-2,), (-1,))
    """

    a_in: Axes = (-2,)
    a_rank: int = -1
    b_rank: int = -2
    b_out: Axes = (-1,)

    def axes(self, role: str) -> tuple[Axes, Axes]:
        """Returns the axes of a factor's leaf that are its canonical rows, and columns."""
        if role == "a":
            return self.a_in, (self.a_rank,)
        return (self.b_rank,), self.b_out


@dataclass(frozen=True)
class PairSpec:
    """Declares which leaves of a parameter tree form a pair, and the meaning of their axes.

    A pattern names the tail of a leaf's path. Components are separated by `/` and may hold
    wildcards `*`. Leaves whose paths agree outside the pattern, wildcards included, belong
    together. The pair's name is what stands before the pattern, and what the patterns of a and b
    begin with, up to a word that says LoRA.

    Axes that are neither input, rank nor output are batch axes and must come in the same
    order in both factors. Several input or output axes are flattened. Where no axes are declared
    they are read from the shapes: a is (batch…, in…, r) and b is (batch…, r, out…), or one batch
    axis stands somewhere else in both. The weight beside them decides where several readings fit.

    Args:
        a: pattern of the input-side factor.
        b: pattern of the output-side factor.
        auxiliary: patterns of auxiliary leaves by field name, or one pattern with `{}` in place of
            the name, for the fields of every registered kind of pair (`register_node`).
        a_in: axes of `a` that contract with the layer's input.
        a_rank: rank axis of `a`.
        b_rank: rank axis of `b`.
        b_out: axes of `b` that make the layer's output.
        leading_batch: whether, of several readings, that with the most leading batch axes is taken,
            if one has any; an error by default.

    Raises:
        ValueError: a pattern is a regular expression.
        TypeError: axes that are none.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import find_pairs
        >>> transposed = PairSpec("down", "up", a_in=(1,), a_rank=0, b_rank=1, b_out=(0,))
        >>> tree = {"q": {"down": jnp.ones((2, 6)), "up": jnp.zeros((4, 2))}}
        >>> [pair] = find_pairs(tree, [transposed]).take(tree)
        >>> pair.a.shape, pair.b.shape
        ((6, 2), (2, 4))
    """

    a: str
    b: str
    auxiliary: Mapping[str, str] | str = field(default_factory=dict)
    a_in: Axes | None = None
    a_rank: int | None = None
    b_rank: int | None = None
    b_out: Axes | None = None
    leading_batch: bool = False

    def __post_init__(self) -> None:
        for pattern in self.patterns().values():
            require_pattern("PairSpec", pattern)
        for name in ("a_in", "b_out"):
            axes = getattr(self, name)
            if axes is not None and not _are_integers(axes):
                raise TypeError(
                    f"PairSpec: `{name}` must be a tuple of axes, such as (0,), got {axes!r}."
                )
        for name in ("a_rank", "b_rank"):
            axis = getattr(self, name)
            if axis is not None and not _are_integers((axis,)):
                raise TypeError(f"PairSpec: `{name}` must be an axis, such as 0, got {axis!r}.")

    @property
    def layout(self) -> Layout | None:
        """The axes as declared; None if nothing is."""
        given = {name: getattr(self, name) for name in Layout._fields}
        declared = {name: value for name, value in given.items() if value is not None}
        return Layout(**declared) if declared else None

    def patterns(self) -> dict[str, str]:
        """Returns the pattern of every leaf a pair may have, by its role."""
        auxiliary = self.auxiliary
        if isinstance(auxiliary, str):
            auxiliary = {name: auxiliary.format(name) for name in auxiliary_names()}
        return {"a": self.a, "b": self.b, **auxiliary}

    def match(self, path: str) -> "Member | None":
        """Says which role the leaf at `path` plays, or None if it plays none."""
        for role, pattern in self.patterns().items():
            found = matched(pattern, path)
            if found is not None:
                prefix, *captures = found
                return Member(pair_name((self.a, self.b), prefix, captures), role, self)
        return None


def _are_integers(axes: Any) -> bool:
    return isinstance(axes, tuple) and all(type(axis) is int for axis in axes)


class Member(NamedTuple):
    """The part one leaf plays in a pair.

    A callable given as a spec returns one for each leaf that belongs to a pair, None for others.

    Args:
        pair: the pair's name.
        role: `"a"`, `"b"` or the name of an auxiliary field.
        spec: the layout.
        kind: the kind of pair; None for the first registered one that has all of its leaves.

    Example:
        >>> spec = PairSpec("a", "b")
        >>> member = Member(pair="layers/0/q", role="a", spec=spec)
        >>> member.role
        'a'
    """

    pair: str
    role: str
    spec: PairSpec
    kind: Any = None


@dataclass(frozen=True)
class Unpaired:
    """Declares, among specs, leaves that belong to no pair, for the fallback to train.

    Args:
        pattern: of the tail of their paths, or of a path that they lie under, as in `PairSpec`.

    Raises:
        ValueError: the pattern is a regular expression.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import DEFAULT_SPECS, find_pairs
        >>> tree = {"router": {"lora_a": jnp.ones((6, 8)), "lora_b": jnp.ones((8, 4))}}
        >>> find_pairs(tree, [Unpaired("router"), *DEFAULT_SPECS]).pairs
        ()
    """

    pattern: str

    def __post_init__(self) -> None:
        require_pattern("Unpaired", self.pattern)

    def match(self, path: str) -> bool:
        """Says whether a leaf is one of them."""
        return lies_under(self.pattern, path)


PairMatcher = PairSpec | Unpaired | Callable[[str, Any], Member | None]


_PEFT_AXES = Layout(a_in=(-1,), a_rank=-2, b_rank=-1, b_out=(-2,))._asdict()

_VARIABLE = "lora_{}"

DEFAULT_SPECS: tuple[PairMatcher, ...] = (
    # Flax, EasyDeL, openpi, this library's modules
    PairSpec("lora_a", "lora_b", auxiliary=_VARIABLE, leading_batch=True),
    # qwix: beside the weight they adapt
    PairSpec("*_lora_a", "*_lora_b", auxiliary="*_" + _VARIABLE),
    PairSpec("lora_a/kernel", "lora_b/kernel"),  # MaxText
    PairSpec("lora_A", "lora_B", **_PEFT_AXES),  # Hugging Face PEFT and its ports
    PairSpec("lora_A/weight", "lora_B/weight", **_PEFT_AXES),
    PairSpec("lora_A/*/weight", "lora_B/*/weight", **_PEFT_AXES),
    PairSpec("lora_A/weight/*", "lora_B/weight/*", **_PEFT_AXES),  # Levanter
    PairSpec("lora_embedding_A", "lora_embedding_B", **_PEFT_AXES),
    PairSpec("lora_embedding_A/*", "lora_embedding_B/*", **_PEFT_AXES),
    PairSpec("lora_down/weight", "lora_up/weight", **_PEFT_AXES),  # kohya's and its ports
    PairSpec("lora_down/kernel", "lora_up/kernel"),
    PairSpec("lora/a", "lora/b"),  # gemma
    PairSpec("lora_kernel_a", "lora_kernel_b"),  # Keras
    PairSpec("lora_embeddings_a", "lora_embeddings_b"),
    PairSpec("weight/b", "weight/a", **_PEFT_AXES),  # quax, whose a makes the output
)
"""Layouts that are found without being declared."""


def variables_of(node: Any) -> dict[str, Any]:
    """Returns the leaves of a node by the names that they have in this library's Flax modules.

    Example:
        >>> from lowrank_optax import LoRAPair
        >>> variables_of(LoRAPair(a=1.0, b=2.0))
        {'lora_a': 1.0, 'lora_b': 2.0}
    """
    leaves = node._asdict().items()
    return {_VARIABLE.format(name): leaf for name, leaf in leaves if leaf is not None}


def node_of(get: Callable[[str], Any]) -> Any:
    """Undoes `variables_of`.

    Args:
        get: returns the leaf of a name such as `lora_a`, None for a leaf that is not there.

    Returns:
        The node.

    Raises:
        ValueError: no kind of pair has such leaves together.

    Example:
        >>> node_of({"lora_a": 1.0, "lora_b": 2.0}.get)
        LoRAPair(a=1.0, b=2.0)
    """
    leaves = {name: get(_VARIABLE.format(name)) for name in (*SIDES, *auxiliary_names())}
    return make_node({name: leaf for name, leaf in leaves.items() if leaf is not None})


def first_match(specs: Sequence[PairMatcher], path: str, leaf: Any) -> Member | Unpaired | None:
    """Returns what the first layout that knows a leaf says of it, or None.

    Example:
        >>> first_match(DEFAULT_SPECS, "layers/0/q/lora_b", None).role
        'b'
    """
    for spec in specs:
        match spec:
            case Unpaired():
                member: Any = spec if spec.match(path) else None
            case PairSpec():
                member = spec.match(path)
            case _:
                member = spec(path, leaf)
        if member is not None:
            return member
    return None


def canonical_order(path: str, ndim: int, rows: Axes, columns: Axes) -> Axes:
    """Orders a leaf's axes as (batch, rows, columns).

    Args:
        path: the leaf's name, for messages.
        ndim: how many axes it has.
        rows: those that are the canonical rows.
        columns: those that are the canonical columns.

    Returns:
        A permutation of the axes.

    Raises:
        ValueError: an axis that the leaf lacks or that is named twice.

    Example:
        >>> canonical_order("q/lora_A", 2, (-1,), (-2,))
        (1, 0)
    """
    if any(not -ndim <= axis < ndim for axis in rows + columns):
        raise ValueError(
            f"{path}: a factor needs the axes {rows + columns} but has {ndim}; declare its layout"
            " with a PairSpec (`specs`)."
        )
    named = tuple(axis % ndim for axis in rows + columns)
    if len(set(named)) != len(named):
        raise ValueError(f"{path}: the axes {rows + columns} name one axis of {ndim} twice.")
    return (*(axis for axis in range(ndim) if axis not in named), *named)


def matrix_shape(
    path: str, shape: Sequence[int], rows: Axes, columns: Axes
) -> tuple[tuple[int, ...], int, int]:
    """Returns the batch shape, rows and columns of a leaf as a stack of matrices.

    Example:
        >>> matrix_shape("q/lora_b", (3, 2, 4, 8), (1,), (2, 3))
        ((3,), 2, 32)
    """
    ordered = [shape[axis] for axis in canonical_order(path, len(shape), rows, columns)]
    row, column = len(shape) - len(rows) - len(columns), len(shape) - len(columns)
    return tuple(ordered[:row]), math.prod(ordered[row:column]), math.prod(ordered[column:])


def to_matrix(x: Any, rows: Axes, columns: Axes) -> Any:
    """Brings a leaf to (batch..., rows, columns).

    Example:
        >>> import jax.numpy as jnp
        >>> to_matrix(jnp.ones((2, 6)), (1,), (0,)).shape
        (6, 2)
    """
    order = canonical_order("", x.ndim, rows, columns)
    if order == tuple(range(x.ndim)) and len(rows) == len(columns) == 1:
        return x
    batch, n_rows, n_columns = matrix_shape("", x.shape, rows, columns)
    return jnp.transpose(x, order).reshape(*batch, n_rows, n_columns)


def from_matrix(x: Any, rows: Axes, columns: Axes, shape: Sequence[int]) -> Any:
    """Undoes `to_matrix` for a leaf of the given shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from_matrix(jnp.ones((6, 2)), (1,), (0,), (2, 6)).shape
        (2, 6)
    """
    order = canonical_order("", len(shape), rows, columns)
    if order == tuple(range(len(shape))) and len(rows) == len(columns) == 1:
        return x
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    return jnp.transpose(x.reshape([shape[axis] for axis in order]), inverse)
