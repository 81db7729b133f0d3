"""What a compiled step sends between devices: its collective operations, read from the program.

The counts are those of the optimized program, after the partitioner has placed everything and the
compiler has merged what it merges. That makes them checkable: a step that gathers a factor, or sums
more than r×r matrices, says so here before any device has run it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
"""The collective operations, by their names in HLO; ``send`` and ``recv`` are none."""


class Shape(NamedTuple):
    """An array on a device.

    Args:
        dtype: its name in HLO, as ``"f32"`` or ``"bf16"``.
        dims: its sizes.

    Example:
        >>> Shape("f32", (4, 2))
        Shape(dtype='f32', dims=(4, 2))
    """

    dtype: str
    dims: tuple[int, ...]


class Branch(NamedTuple):
    """One of the ways that a conditional may go.

    Args:
        conditional: the operation's name in the program.
        number: which of its branches, counted from 0.

    Example:
        >>> Branch("conditional.1", 0)
        Branch(conditional='conditional.1', number=0)
    """

    conditional: str
    number: int


class Collective(NamedTuple):
    """One collective operation of a program.

    Args:
        kind: one of ``KINDS``.
        bytes: of its result on one device, over the arrays of a tuple: the whole for an all-reduce
            or an all-gather, one part for a reduce-scatter.
        shapes: the arrays of its result.
        times: how often a call of the program runs it: 1, or the product of the trip counts of the
            loops around it. None where the compiler does not know one of them.
        branches: of the conditionals around it, outermost first; it only runs where all are taken.
        source: the JAX operation it stems from, as far as the compiler still knows.

    Example:
        >>> Collective("all-reduce", 32, (Shape("f32", (4, 2)),), 1).times
        1
    """

    kind: str
    bytes: int
    shapes: tuple[Shape, ...]
    times: int | None
    branches: tuple[Branch, ...] = ()
    source: str = ""


def collectives(compiled: jax.stages.Compiled | str) -> list[Collective]:
    """Lists the collective operations of a compiled program.

    Args:
        compiled: what ``jax.jit(f).lower(...).compile()`` returns, or the text of an optimized HLO
            module.

    Returns:
        Each operation that a call reaches, in the order of the program, asynchronous ones once. An
        operation of a computation that is called from two places stands there twice.

    Raises:
        ValueError: a program without text, or a text without an entry.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> ring = [(i, (i + 1) % 8) for i in range(8)]
        >>> turn = lambda _, x: jax.lax.ppermute(x, "data", ring)
        >>> f = lambda x: jax.lax.fori_loop(0, 5, turn, x)
        >>> f = jax.shard_map(f, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
        >>> [found] = collectives(jax.jit(f).lower(jnp.ones((8, 3))).compile())
        >>> found.kind, found.bytes, found.times
        ('collective-permute', 12, 5)
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    entry, computations = _parse(text or "")
    return list(_reached(entry, computations, times=1, branches=()))


def traffic(compiled: jax.stages.Compiled | str) -> dict[str, int]:
    """Sums the results of a program's collective operations on one device.

    Args:
        compiled: as in :func:`collectives`.

    Returns:
        Bytes for each call, by kind; kinds that do not occur are left out. Of each conditional only
        the branch with the most bytes is counted.

    Raises:
        ValueError: a collective in a loop whose trip count the compiler does not know; as
            :func:`collectives`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> x = jax.device_put(jnp.ones((8, 3)), jax.NamedSharding(mesh, jax.P("data")))
        >>> traffic(jax.jit(lambda x: x.sum(0)).lower(x).compile())
        {'all-reduce': 12}
    """
    return dict(_dearest(collectives(compiled), depth=0))


class _Operation(NamedTuple):
    """A line of a program: a collective, or something that calls other computations."""

    name: str
    opcode: str
    collective: Collective | None
    called: tuple[str, ...]
    trips: int | None


# Names in HLO; quoted strings hold metadata, which may look like anything.
_NAME = r"%?([\w.\-]+)"
_HEADER = re.compile(rf"(ENTRY\s+)?{_NAME}\s+(?:\(.*\)\s*->.*)?\{{$")
_LINE = re.compile(rf"\s*(?:ROOT\s+)?{_NAME}\s+=\s+(.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_IGNORED = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'known_trip_count\\?":\s*\{\\?"n\\?":\s*\\?"(\d+)')
_SOURCE = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
_TOKEN = re.compile(r"\s*(?:([()])|,|([a-z]\w*)\[([^\]]*)\](?:\{[^}]*\})?)")


def _parse(text: str) -> tuple[str, dict[str, list[_Operation]]]:
    """Reads the name of the entry, and of each computation what matters in it."""
    entry, current = "", ""
    computations: dict[str, list[_Operation]] = defaultdict(list)
    for line in text.splitlines():
        if header := _HEADER.match(line.rstrip()):
            current = header[2]
            entry = current if header[1] else entry
        elif current and (operation := _operation(line)):
            computations[current].append(operation)
    if not entry:
        raise ValueError(
            "found no entry computation; give a compiled program that has text, or the text of an"
            " optimized HLO module."
        )
    return entry, computations


def _operation(line: str) -> _Operation | None:
    """Reads a line; None if nothing in it matters here."""
    match = _LINE.match(_IGNORED.sub("", line))
    if match is None:
        return None
    name, rest = match.groups()
    result, end = _result(rest)
    opcode_match = _OPCODE.match(rest, end)
    if opcode_match is None:
        return None
    opcode = opcode_match[1]
    collective = None
    if opcode.removesuffix("-start") in KINDS:
        shapes = tuple(_leaves(_of_start(opcode, result) if "-start" in opcode else result))
        source = _SOURCE.search(rest)
        collective = Collective(
            kind=opcode.removesuffix("-start"),
            bytes=sum(map(_bytes, shapes)),
            shapes=shapes,
            times=1,
            source=source[1] if source else "",
        )
    called: list[str] = []
    # What is asynchronous is counted where it starts; its end may name the same computation.
    if collective is None and opcode not in ("async-update", "async-done"):
        for names, single in _CALLED.findall(_STRING.sub('""', rest[opcode_match.end() :])):
            called += re.findall(_NAME, names) if names else [single]
    if collective is None and not called:
        return None
    trips = _TRIPS.search(rest)
    return _Operation(name, opcode, collective, tuple(called), int(trips[1]) if trips else None)


def _result(text: str) -> tuple[Any, int]:
    """Reads the type that a line begins with: a shape, or a list of such; and where it ends."""
    stack: list[list[Any]] = [[]]
    position = 0
    while token := _TOKEN.match(text, position):
        position = token.end()
        parenthesis, dtype, dims = token.groups()
        if parenthesis == "(":
            stack.append([])
        elif parenthesis == ")":
            inner = stack.pop()
            stack[-1].append(inner)
        elif dtype:
            sizes = re.findall(r"\d+", dims)
            stack[-1].append(Shape(dtype, tuple(map(int, sizes))))
        if len(stack) == 1 and stack[0]:
            break
    return stack[0][0] if stack[0] else [], position


def _of_start(opcode: str, result: Any) -> Any:
    """Takes the result out of what an asynchronous start returns.

    Other than a start of its own kind of an all-reduce, which returns its result, these return
    operands, results, and possibly more.
    """
    is_own = opcode == "all-reduce-start" and not isinstance(result[0], list)
    return result if is_own else result[1]


def _leaves(result: Any) -> Iterator[Shape]:
    if isinstance(result, Shape):
        yield result
    else:
        for part in result:
            yield from _leaves(part)


def _bytes(shape: Shape) -> int:
    """The first number in the name of a dtype are its bits; tokens have none."""
    bits = re.search(r"\d+", shape.dtype)
    per_entry = 8 if shape.dtype == "pred" else int(bits[0]) if bits else 0
    return math.ceil(per_entry * math.prod(shape.dims) / 8)


def _reached(
    name: str,
    computations: dict[str, list[_Operation]],
    times: int | None,
    branches: tuple[Branch, ...],
) -> Iterator[Collective]:
    """Follows what a computation calls."""
    for operation in computations.get(name, ()):
        if operation.collective is not None:
            yield operation.collective._replace(times=times, branches=branches)
            continue
        inner = times
        if operation.opcode == "while":
            known = times is not None and operation.trips is not None
            inner = times * operation.trips if known else None  # type: ignore[operator]
        for number, called in enumerate(operation.called):
            taken = branches
            if operation.opcode == "conditional":
                taken = (*branches, Branch(operation.name, number))
            yield from _reached(called, computations, inner, taken)


def _dearest(found: Sequence[Collective], depth: int) -> dict[str, int]:
    """Sums by kind, of each conditional at this depth the branch with the most bytes."""
    total: dict[str, int] = defaultdict(int)
    inside: dict[str, dict[int, list[Collective]]] = defaultdict(lambda: defaultdict(list))
    for each in found:
        if len(each.branches) > depth:
            conditional, number = each.branches[depth]
            inside[conditional][number].append(each)
        elif each.times is None:
            raise ValueError(
                f"{each.kind} of {each.bytes} bytes ({each.source or 'of unknown source'}) runs in"
                " a loop whose trip count the compiler does not know; count it by hand from"
                " `collectives`."
            )
        else:
            total[each.kind] += each.times * each.bytes
    for ways in inside.values():
        sums = [_dearest(way, depth + 1) for way in ways.values()]
        for kind, size in max(sums, key=lambda sizes: sum(sizes.values())).items():
            total[kind] += size
    return total
