"""Which layers of a model get adapters."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lowrank_optax._core.names import listed

Targets = str | Sequence[str] | Callable[[str, Any], bool]

_LISTED_PATHS = 12
_KINDS = "a regular expression, a sequence of them, or a predicate (path, module) -> bool"


class TargetMatcher:
    """Matches module paths against targets and remembers which patterns were of use.

    Args:
        targets: a regular expression, a sequence of them, or a predicate `(path, module) -> bool`.
            An expression matches a module if it matches the whole '/'-joined path or its last
            component (`re.fullmatch`): `'query|value'`, `r'layers/[01]/.*/query'`.

    Raises:
        ValueError: if the sequence is empty, or a pattern is not a regular expression.
        TypeError: if targets are something else.

    Example:
        >>> matcher = TargetMatcher(['query', 'layers/0/mlp'])
        >>> matcher('layers/3/attention/query', None), matcher('layers/3/mlp', None)
        (True, False)
        >>> matcher.unused
        ['layers/0/mlp']
    """

    def __init__(self, targets: Targets):
        is_class = isinstance(targets, type)
        if is_class or not (callable(targets) or isinstance(targets, str | Sequence)):
            raise TypeError(f"targets must be {_KINDS}; got {targets!r}")
        self._predicate = targets if callable(targets) else None
        patterns = [targets] if isinstance(targets, str) else targets
        self._hits: dict[str, int] = {} if callable(patterns) else dict.fromkeys(patterns, 0)
        self._matched = False
        if self._predicate is None and not self._hits:
            raise ValueError("targets is empty: name at least one layer")
        for pattern in self._hits:
            _check_pattern(pattern)

    def __call__(self, path: str, module: Any) -> bool:
        """Says whether a module is a target.

        Args:
            path: '/'-joined path of the module.
            module: the module, for a predicate.

        Returns:
            True if any pattern or the predicate matches.
        """
        if self._predicate is not None:
            found = bool(self._predicate(path, module))
        else:
            names = (path, path.rpartition("/")[2])
            hits = [p for p in self._hits if any(re.fullmatch(p, name) for name in names)]
            for pattern in hits:
                self._hits[pattern] += 1
            found = bool(hits)
        self._matched |= found
        return found

    @property
    def unused(self) -> list[str]:
        """The patterns that have matched nothing so far."""
        if self._predicate is not None:
            return [] if self._matched else ["the predicate"]
        return [pattern for pattern, hits in self._hits.items() if not hits]

    def require_all_used(self, available: Iterable[str]) -> None:
        """Refuses patterns that matched nothing.

        Args:
            available: paths of layers that could have been matched, for the message.

        Raises:
            ValueError: if a pattern, or the predicate, matched nothing.
        """
        if not self.unused:
            return
        paths = sorted(available)
        there = listed(paths, _LISTED_PATHS) or "none (wrap a bare layer by hand)"
        raise ValueError(
            f"targets that match no module: {', '.join(self.unused)}. "
            f"Layers that can be adapted: {there}"
        )


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"targets must be {_KINDS}; got {pattern!r} among them")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"targets: {pattern!r} is not a regular expression ({error}); in these, 'any text' is"
            " '.*', as in '.*query'"
        ) from error
