"""Readings: what the shapes of two factors say about the meaning of their axes.

With r the rank, a is (batch…, in…, r) and b is (batch…, r, out…), or one batch axis stands at
another place, the same in both, as where layers are stacked along another axis.
"""

from collections.abc import Iterator, Sequence

from lowrank_optax._core.layouts import Layout, PairSpec

Shape = tuple[int, ...]


def resolve(
    spec: PairSpec, names: tuple[str, str], shapes: tuple[Shape, Shape], kernels: Sequence[Shape]
) -> Layout:
    """Returns the layout that a spec declares, or else the one that the shapes say.

    Args:
        spec: the spec.
        names: paths of a and b, for messages.
        shapes: their shapes.
        kernels: shapes of the weights beside them. They decide between several readings.

    Returns:
        The layout; that of a stack of matrices if no reading fits.

    Raises:
        ValueError: several readings fit; the message has the spec of each.

    Example:
        >>> resolve(PairSpec("a", "b"), ("q/a", "q/b"), ((16, 4), (4, 2, 8)), [])
        Layout(a_in=(0,), a_rank=1, b_rank=0, b_out=(1, 2))
    """
    if spec.layout is not None:
        return spec.layout
    found = list(dict.fromkeys(_readings(*shapes)))
    if len(found) > 1:
        fitting = [each for each in found if _fits(each, shapes, kernels)]
        found = fitting or found
    if not found:
        return Layout()
    if len(found) == 1 or (spec.leading_batch and found[0].a_in[0] > 0):
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


def _fits(layout: Layout, shapes: tuple[Shape, Shape], kernels: Sequence[Shape]) -> bool:
    sizes = sorted(size for part in _parts(layout, shapes) for size in part)
    return any(sorted(kernel) == sizes for kernel in kernels)


def _described(layout: Layout, shapes: tuple[Shape, Shape]) -> str:
    batch, n_in, n_out = (" × ".join(map(str, part)) for part in _parts(layout, shapes))
    return f"{n_in} → {n_out}" + (f", {batch} of them" if batch else "")


def _written(spec: PairSpec, layout: Layout) -> str:
    axes = ", ".join(f"{name}={value}" for name, value in layout._asdict().items())
    return f"PairSpec({spec.a!r}, {spec.b!r}, {axes})"
