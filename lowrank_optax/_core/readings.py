"""Readings: what the shapes of two factors say about the meaning of their axes.

With r the rank, a is (batch…, in…, r) and b is (batch…, r, out…), or one batch axis stands at
another place, the same in both, as where layers are stacked along another axis.
"""

import math
from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.layouts import Layout, PairSpec

Shape = tuple[int, ...]

_KERNELS = ("kernel", "weight", "w", "embedding")  # names of what the factors beside it adapt


class Weight(NamedTuple):
    """A leaf of two axes or more beside factors.

    Args:
        name: its name in what holds it.
        shape: its shape.
        is_floating: whether it is, so that its shape is that of the matrix it stands for.

    Example:
        >>> Weight("kernel", (6, 4), True).name
        'kernel'
    """

    name: str
    shape: Shape
    is_floating: bool


def weights_beside(
    paths: Sequence[str], leaves: Sequence[Any], paired: Set[int]
) -> dict[str, list[Weight]]:
    """Returns the leaves of two axes or more that are in no pair, by what holds them.

    Args:
        paths: name of every leaf.
        leaves: the leaves.
        paired: the indices of those that are in a pair.

    Returns:
        The weights by the path of what holds them.

    Example:
        >>> weights_beside(["q/kernel", "q/bias"], [jnp.ones((6, 4)), jnp.ones(4)], set())
        {'q': [Weight(name='kernel', shape=(6, 4), is_floating=True)]}
    """
    found: dict[str, list[Weight]] = {}
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        shape = tuple(getattr(leaf, "shape", ()))
        if index not in paired and len(shape) > 1:
            holder, _, name = path.rpartition("/")
            is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            found.setdefault(holder, []).append(Weight(name, shape, is_floating))
    return found


def resolve(
    spec: PairSpec, names: tuple[str, str], shapes: tuple[Shape, Shape], weights: Sequence[Weight]
) -> Layout:
    """Returns the layout that a spec declares, or else the one that the shapes say.

    Args:
        spec: the spec.
        names: paths of a and b, for messages.
        shapes: their shapes.
        weights: those beside them. They decide between several readings.

    Returns:
        The layout; that of a stack of matrices if no reading fits.

    Raises:
        ValueError: several readings fit; the message has the spec of each. Or the only one is not
            that of the weight beside them.

    Example:
        >>> resolve(PairSpec("a", "b"), ("q/a", "q/b"), ((16, 4), (4, 2, 8)), [])
        Layout(a_in=(0,), a_rank=1, b_rank=0, b_out=(1, 2))
    """
    if spec.layout is not None:
        return spec.layout
    found = list(dict.fromkeys(_readings(*shapes)))
    if len(found) > 1:
        fitting = [each for each in found if _fits(each, shapes, weights)]
        found = fitting or found
    if not found:
        return Layout()
    if len(found) == 1 or (spec.leading_batch and found[0].a_in[0] > 0):
        _require_size(found[0], names, shapes, weights)
        return found[0]
    shown = "".join(f"\n  {_described(each, shapes)}: {_written(spec, each)}" for each in found)
    raise ValueError(
        f"{names[0]} {shapes[0]} and {names[1]} {shapes[1]} can be read in {len(found)} ways;"
        f" declare the right one, as specs=[..., *DEFAULT_SPECS]:{shown}"
    )


def _readings(a: Shape, b: Shape) -> Iterator[Layout]:
    """Yields the layouts that fit the shapes: those with leading batch axes first."""
    for n in reversed(range(min(len(a), len(b)) - 1)):
        if a[:n] == b[:n]:
            yield from _without_batch(a, b, range(n), range(n))
    if len(a) > 2 and len(b) > 2:
        inner = [(at, at) for at in range(1, min(len(a), len(b)) - 1)]
        for at_a, at_b in [*inner, (len(a) - 1, len(b) - 1)]:
            if a[at_a] == b[at_b]:
                yield from _without_batch(a, b, [at_a], [at_b])


def _without_batch(
    a: Shape, b: Shape, batch_a: Sequence[int], batch_b: Sequence[int]
) -> Iterator[Layout]:
    *a_in, a_rank = (axis for axis in range(len(a)) if axis not in batch_a)
    b_rank, *b_out = (axis for axis in range(len(b)) if axis not in batch_b)
    if a_in and b_out and a[a_rank] == b[b_rank]:
        yield Layout(tuple(a_in), a_rank, b_rank, tuple(b_out))


def _parts(layout: Layout, shapes: tuple[Shape, Shape]) -> tuple[Shape, Shape, Shape]:
    """The sizes of the batch, in and out axes."""
    a, b = shapes
    of = lambda shape, axes: tuple(shape[axis] for axis in axes)
    batch = [axis for axis in range(len(a)) if axis not in (*layout.a_in, layout.a_rank)]
    return of(a, batch), of(a, layout.a_in), of(b, layout.b_out)


def _fits(layout: Layout, shapes: tuple[Shape, Shape], weights: Sequence[Weight]) -> bool:
    sizes = sorted(size for part in _parts(layout, shapes) for size in part)
    return any(sorted(weight.shape) == sizes for weight in weights)


def _require_size(
    layout: Layout, names: tuple[str, str], shapes: tuple[Shape, Shape], weights: Sequence[Weight]
) -> None:
    """Raises if factors of more than two axes have not as many entries as the weight they adapt.

    Plain matrices cannot be misread, so they may adapt a part of a weight. Packed weights do not
    show their shape, and inside `shard_map` a weight may be a shard where its factors are whole.
    """
    if max(map(len, shapes)) == 2 or jax.sharding.get_abstract_mesh().manual_axes:
        return
    named, said, _ = names[0].rpartition("/")[2].partition("_lora_")  # as qwix's `w_lora_a`
    adapted = [
        weight
        for weight in weights
        if weight.is_floating and (weight.name == named if said else weight.name in _KERNELS)
    ]
    size = math.prod(size for part in _parts(layout, shapes) for size in part)
    if adapted and all(math.prod(weight.shape) != size for weight in adapted):
        name, shape, _ = adapted[0]
        raise ValueError(
            f"{names[0]} {shapes[0]} and {names[1]} {shapes[1]} are read as"
            f" {_described(layout, shapes)}, which is not the {name} {shape} beside them; declare"
            " their axes with a PairSpec, as specs=[..., *DEFAULT_SPECS]."
        )


def _described(layout: Layout, shapes: tuple[Shape, Shape]) -> str:
    batch, n_in, n_out = (" × ".join(map(str, part)) for part in _parts(layout, shapes))
    return f"{n_in} → {n_out}" + (f", {batch} of them" if batch else "")


def _written(spec: PairSpec, layout: Layout) -> str:
    axes = ", ".join(f"{name}={value}" for name, value in layout._asdict().items())
    return f"PairSpec({spec.a!r}, {spec.b!r}, {axes})"
