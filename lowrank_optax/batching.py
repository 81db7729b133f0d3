"""What rules ask for, and how it is answered for all pairs at once.

Rules run in rounds: each yields requests, and those of all pairs in a round are answered together.
:class:`Batched` asks for algebra on r×r matrices: matrices of the same shape are stacked, so that
few Choleskys serve every layer. :class:`Either` asks for one of two things, by a flag that is only
known when the program runs.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import meshes


class Batched:
    """A request for small algebra, which the engine answers for all pairs at once.

    Args:
        function: maps stacked matrices (n, r, r) to one array (n, ...) or a tuple of such; the same
            object for every pair.
        matrices: its arguments for this pair, each (..., r, r).

    Example:
        >>> import jax.numpy as jnp
        >>> [inverse], _ = answer([Batched(jnp.linalg.inv, 2.0 * jnp.eye(2))])
        >>> inverse.tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """

    def __init__(self, function: Callable[..., Any], *matrices: jax.Array) -> None:
        self.function = function
        self.matrices = matrices
        self.layers_over = meshes.cut_axes("batch")  # a rule makes its requests under its cut


class Either:
    """A request for one of two things, answered by one conditional for all pairs.

    What one branch returns as it was and the other one changes is changed in place. XLA copies it
    where each branch changes something else: give each factor a request of its own.

    Args:
        flag: a boolean scalar, the same object for every pair.
        then: called without arguments if the flag is true.
        otherwise: called if it is not; returns the same structure, shapes and dtypes.

    Example:
        >>> import jax.numpy as jnp
        >>> [found], _ = answer([Either(jnp.array(False), lambda: 1.0, lambda: 2.0)])
        >>> float(found)
        2.0
    """

    def __init__(
        self, flag: jax.Array, then: Callable[[], Any], otherwise: Callable[[], Any]
    ) -> None:
        self.flag = flag
        self.then = meshes.as_cut_here(then)
        self.otherwise = meshes.as_cut_here(otherwise)


Request = Batched | Either


def answer(requests: Sequence[Request]) -> tuple[list[Any], jax.Array]:
    """Answers requests together: matrices of one function and shape are stacked into few calls.

    Requests for one of two things are gathered in one conditional for each flag.

    Args:
        requests: any number, from any pairs.

    Returns:
        The results, in the order of the requests, with their batch axes, and how many failed. A
        ``Batched`` result that is not finite throughout is a failure and comes back as zero.

    Example:
        >>> import jax.numpy as jnp
        >>> requests = [Batched(jnp.linalg.inv, s * jnp.eye(2)) for s in (2.0, 0.0)]
        >>> [half, nan], failures = answer(requests)
        >>> half.tolist(), nan.tolist(), int(failures)
        ([[0.5, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]], 1)
    """
    groups: dict[Any, dict[int, Batched]] = defaultdict(dict)
    conditionals: dict[int, dict[int, Either]] = defaultdict(dict)
    answers: dict[int, Any] = {}
    failures = jnp.zeros([], jnp.int32)
    for index, request in enumerate(requests):
        if isinstance(request, Either):
            conditionals[id(request.flag)][index] = request
            continue
        spec = meshes.spec_of(request.matrices[0])
        if spec is not None and any(spec):
            answers[index], failed = _call_on_shards(request, spec)
            failures += failed
            continue
        kind = tuple((m.shape[-2:], m.dtype) for m in request.matrices)
        groups[request.function, kind, request.layers_over][index] = request
    for (function, *_, layers_over), group in groups.items():
        # A stack of n results is taken apart by n slices at n offsets, each a program of its own
        # for the compiler. Stacks of √n repeat the same √n offsets, which it compiles once.
        size = math.isqrt(len(group) - 1) + 1
        indices = list(group)
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            results, failed = _call(function, [group[index] for index in chunk])
            answers.update(zip(chunk, results, strict=True))
            failures += jax.lax.psum(failed, layers_over) if layers_over else failed
    for choices in conditionals.values():
        answers.update(zip(choices, _decide(list(choices.values())), strict=True))
    return [answers[i] for i in range(len(requests))], failures


def _decide(requests: Sequence[Either]) -> list[Any]:
    """Answers requests that share a flag."""
    return jax.lax.cond(
        requests[0].flag,
        lambda: [request.then() for request in requests],
        lambda: [request.otherwise() for request in requests],
    )


def _call(function: Callable[..., Any], requests: Sequence[Batched]) -> tuple[list[Any], jax.Array]:
    """Calls a function once on the stacked matrices of several requests."""
    stacks = [
        jnp.concatenate([m.reshape(-1, *m.shape[-2:]) for m in column])
        for column in zip(*(request.matrices for request in requests), strict=True)
    ]
    guarded, finite = _guarded(function, stacks)
    batches = [request.matrices[0].shape[:-2] for request in requests]
    stops = list(itertools.accumulate(math.prod(batch) for batch in batches))

    def part(x: jax.Array, stop: int, batch: tuple[int, ...]) -> jax.Array:
        return x[stop - math.prod(batch) : stop].reshape(*batch, *x.shape[1:])

    results = [
        jax.tree.map(functools.partial(part, stop=stop, batch=batch), guarded)
        for stop, batch in zip(stops, batches, strict=True)
    ]
    return results, jnp.sum(~finite, dtype=jnp.int32)


def _call_on_shards(request: Batched, spec: jax.P) -> tuple[Any, jax.Array]:
    """Answers a request whose batch axes are cut up on an Explicit mesh where its matrices lie."""
    batch = jax.P(*spec[:-2])

    def on_shard(*matrices: jax.Array) -> Any:
        shape = matrices[0].shape[:-2]
        stacks = [m.reshape(-1, *m.shape[-2:]) for m in matrices]
        both = _guarded(request.function, stacks)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), both)

    run = jax.shard_map(on_shard, in_specs=batch, out_specs=batch, check_vma=False)
    result, finite = run(*request.matrices)
    return result, jnp.sum(~finite, dtype=jnp.int32)


def _guarded(function: Callable[..., Any], stacks: Sequence[jax.Array]) -> tuple[Any, jax.Array]:
    """Calls a function on stacks; zeros where a result is not finite, and where it is."""
    result = function(*stacks)
    flat = [x.reshape(len(x), -1) for x in jax.tree.leaves(result)]
    finite = jnp.isfinite(sum(jnp.sum(x, axis=1) for x in flat))
    keep = lambda x: jnp.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    return jax.tree.map(keep, result), finite


def lockstep(
    runs: Sequence[Generator[Sequence[Request], list[Any], Any]],
    cuts: Sequence[Mapping[str, tuple[str, ...]]] | None = None,
) -> tuple[list[Any], jax.Array]:
    """Runs all rules to their end, one round of requests at a time.

    Args:
        runs: the started rules.
        cuts: for each, the mesh axes that cut up its factors (``meshes.cut``).

    Returns:
        Their results, and how many requests failed.

    Example:
        >>> import jax.numpy as jnp
        >>> def run():
        ...     [inverse] = yield [Batched(jnp.linalg.inv, 2.0 * jnp.eye(1))]
        ...     return inverse.item()
        >>> lockstep([run()])[0]
        [0.5]
    """
    results: list[Any] = [None] * len(runs)
    failures = jnp.zeros([], jnp.int32)
    replies: dict[int, Any] = dict.fromkeys(range(len(runs)))
    while replies:
        requests: dict[int, Sequence[Request]] = {}
        for index, reply in replies.items():
            try:
                with meshes.cut(cuts[index] if cuts else {}):
                    requests[index] = runs[index].send(reply)
            except StopIteration as stop:
                results[index] = stop.value
        answers, failed = answer([request for asked in requests.values() for request in asked])
        failures += failed
        in_order = iter(answers)
        replies = {i: [next(in_order) for _ in asked] for i, asked in requests.items()}
    return results, failures
