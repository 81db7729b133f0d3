"""Pairs as values: the plain pair, and the registry of other kinds of pairs.

A *node* is a pair of factors, maybe with auxiliary leaves beside them. It is a `NamedTuple`, hence
a pytree, and it owns its behaviour: how it is applied to an input, which plain pair it equals, and
which axes of its leaves are long. Nothing else in the library asks what kind of node it has.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import meshes
from lowrank_optax._core.linalg import SIDES, Side

AxisName = str | tuple[str, ...] | None
LongAxes = Mapping[str, tuple[str, int]]

_KINDS: list[Any] = []

_Node = TypeVar("_Node")


def register_node(cls: type[_Node]) -> type[_Node]:
    r"""Makes a kind of pair known to pairing, layers, sharding, export and diagnostics.

    The class is a `NamedTuple` whose fields are `a`, `b` and the auxiliary leaves. These
    are not trained by gradients; an optimizer may move them by ordinary updates. A field with a
    default is optional. Flax modules store the field `x` as the variable `lora_x`. A class that
    does not define one of these gets that of `LoRAPair`:

    - `long_axes()`, a static method: maps an auxiliary field to `("in", axis)` or `("out", axis)`,
      the axis that is sharded like that axis of the kernel. Other fields are replicated.
    - `apply(x, scale, axis_name=None)`: the adapter's output for an input (..., in), in at least
      float32. `axis_name` is what `nn.lora_apply` was given.
    - `plain()`: the `LoRAPair` with the same product, for merging and export.
    - `made_by()`, a static method: how a user gets such a pair, as the end of a sentence.

    Args:
        cls: the class.

    Returns:
        The class.

    Raises:
        TypeError: no `NamedTuple`, or one without the fields `a` and `b`.
        ValueError: a class that is registered already.

    Example:
        >>> import jax.numpy as jnp
        >>> @register_node
        ... class GatedPair(NamedTuple):
        ...     a: Any
        ...     b: Any
        ...     gate: Any
        ...     def plain(self):
        ...         return LoRAPair(self.a * self.gate, self.b)
        ...     def apply(self, x, scale, axis_name=None):
        ...         return self.plain().apply(x, scale)
        >>> pair = GatedPair(jnp.ones((6, 2)), jnp.ones((2, 4)), gate=jnp.zeros(2))
        >>> pair.apply(jnp.ones(6), scale=1.0).tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    fields = getattr(cls, "_fields", ())
    if not (isinstance(cls, type) and issubclass(cls, tuple) and {"a", "b"} <= set(fields)):
        raise TypeError(
            f"{getattr(cls, '__name__', cls)!s} cannot be a kind of pair: register a NamedTuple"
            " with the fields `a` and `b`, the factors."
        )
    if cls in _KINDS:
        raise ValueError(f"{cls.__name__} is registered already; register each kind of pair once.")
    for name in ("long_axes", "apply", "plain", "made_by"):
        if not hasattr(cls, name):
            setattr(cls, name, vars(LoRAPair)[name])
    _KINDS.append(cls)
    return cls


@register_node
class LoRAPair(NamedTuple):
    r"""The two factors of one LoRA adapter.

    $$\Delta K = s\,a\,b$$

    It is a pytree and may stand as a node anywhere in a parameter tree. Like every node it may hold
    other things than arrays, such as shardings or mask entries.

    Args:
        a: the input-side factor, (..., in, r), floating.
        b: the output-side factor, (..., r, out), floating; leading axes are batch axes.

    Example:
        >>> import jax.numpy as jnp
        >>> pair = LoRAPair(a=jnp.ones((6, 2)), b=jnp.zeros((2, 4)))
        >>> (pair.a @ pair.b).shape
        (6, 4)

    Source: LoRA, arXiv 2106.09685, in Flax orientation ($a = A^\top$, $b = B^\top$).
    """

    a: Any
    b: Any

    @staticmethod
    def long_axes() -> LongAxes:
        """Returns nothing: there is no leaf beside the factors."""
        return {}

    @staticmethod
    def made_by() -> str:
        """Returns how to get this kind of pair."""
        return "leave out what the pair has beside its factors"

    def apply(self, x: jax.Array, scale: Any, axis_name: AxisName = None) -> jax.Array:
        """Computes `s (x a) b`; see `register_node`."""
        narrow = matmul(x, self.a.astype(x.dtype))
        return matmul((scale * narrow).astype(x.dtype), self.b.astype(x.dtype))

    def plain(self) -> "LoRAPair":
        """Returns the factors alone."""
        return LoRAPair(self.a, self.b)


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies an input by a weight of its dtype and accumulates in at least float32.

    Example:
        >>> import jax.numpy as jnp
        >>> matmul(jnp.ones((1, 3), jnp.bfloat16), jnp.ones((3, 2), jnp.bfloat16)).dtype.name
        'float32'
    """
    return meshes.matmul(x, y, jnp.promote_types(x.dtype, jnp.float32))


def both(function: Callable[..., Any], *pairs: Any) -> LoRAPair:
    """Applies a function to both factors: `function("a", ...)` and `function("b", ...)`.

    Args:
        function: called with the side and that side's value of each pair.
        pairs: nodes; a side on which the first one has None stays None.

    Returns:
        The two results as a pair.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax.engine import gram
        >>> both(gram, LoRAPair(jnp.ones((6, 1)), jnp.ones((1, 4))))
        LoRAPair(a=Array([[6.]], dtype=float32), b=Array([[4.]], dtype=float32))
    """

    def on(side: Side) -> Any:
        values = [getattr(pair, side) for pair in pairs]
        return None if values[0] is None else function(side, *values)

    return LoRAPair(*map(on, SIDES))


def swap(pair: Any) -> LoRAPair:
    """Gives each factor what belongs to the other one.

    Example:
        >>> swap(LoRAPair(a=1, b=2))
        LoRAPair(a=2, b=1)
    """
    return LoRAPair(pair.b, pair.a)


def only(sides: str, pair: Any) -> LoRAPair:
    """Returns a pair's factors on some sides, None on the others, for steps that move one factor.

    `both`, `swap`, `Pairs.together`, `Pairs.descend`, `jax.tree.map` and `optax.tree.*` pass over
    None.

    Args:
        sides: `"a"`, `"b"` or `"ab"`.
        pair: a node.

    Returns:
        The pair.

    Example:
        >>> only("b", LoRAPair(a=1, b=2))
        LoRAPair(a=None, b=2)
    """
    return LoRAPair(*(getattr(pair, side) if side in sides else None for side in SIDES))


def join(first: Any, second: Any) -> LoRAPair:
    """Joins two pairs that `only` took apart: the first one's factors, the second one's where None.

    Example:
        >>> join(LoRAPair(a=1, b=None), LoRAPair(a=None, b=2))
        LoRAPair(a=1, b=2)
    """
    either = lambda x, y: y if x is None else x
    return LoRAPair(either(first.a, second.a), either(first.b, second.b))


def node_kinds() -> tuple[Any, ...]:
    """Returns the registered kinds of pairs, `LoRAPair` first.

    Example:
        >>> node_kinds()[0].__name__
        'LoRAPair'
    """
    return tuple(_KINDS)


def is_node(x: Any) -> bool:
    """Says whether a value is a pair of a registered kind.

    Example:
        >>> is_node(LoRAPair(1.0, 2.0)), is_node((1.0, 2.0))
        (True, False)
    """
    return isinstance(x, node_kinds())


def auxiliary_names() -> tuple[str, ...]:
    """Returns the names of all leaves that a pair may have beside its factors.

    Example:
        >>> "a" in auxiliary_names()
        False
    """
    names = dict.fromkeys(name for kind in _KINDS for name in kind._fields)
    return tuple(name for name in names if name not in SIDES)


def make_node(leaves: Mapping[str, Any]) -> Any:
    """Makes the first registered kind of pair that has such leaves.

    Args:
        leaves: factors and auxiliary leaves by field name.

    Returns:
        The pair.

    Raises:
        ValueError: no kind of pair has such leaves together.

    Example:
        >>> make_node({"a": 1.0, "b": 2.0})
        LoRAPair(a=1.0, b=2.0)
    """
    return kind_with(leaves)(**leaves)


def kind_with(names: Any) -> Any:
    """Finds the first registered kind of pair that has fields of these names.

    Raises:
        ValueError: no kind has them together.

    Example:
        >>> kind_with(["a", "b"]).__name__
        'LoRAPair'
    """
    for kind in _KINDS:
        if set(names) <= set(kind._fields):
            return kind
    raise ValueError(
        f"no kind of pair has the leaves {', '.join(names)} together; take the leaves of one"
        " optimizer out before adding those of another."
    )


def is_masked(x: Any) -> bool:
    """Says whether something stands for a leaf that is left out.

    Example:
        >>> is_masked(optax.MaskedNode())
        True
    """
    return isinstance(x, optax.MaskedNode)
