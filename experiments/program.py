"""Functions of batches, compiled ahead for each shape of batch."""

import time
from collections.abc import Callable
from typing import Any

import jax


class Program:
    """A function compiled ahead, so that no step's time holds it, for each shape of batch.

    Args:
        function: Of trees of arrays, among them a batch.
        batch_at: Which argument the batch is.
        options: Of `jax.jit`.

    Attributes:
        seconds: Spent compiling so far.
    """

    def __init__(self, function: Callable[..., Any], batch_at: int, **options: Any) -> None:
        self.seconds = 0.0
        self._jitted = jax.jit(function, **options)
        self._batch_at = batch_at
        self._executables: dict[Any, jax.stages.Compiled] = {}

    def of(self, *arguments: Any) -> jax.stages.Compiled:
        """Returns the executable for such arguments."""
        batch = arguments[self._batch_at]
        key = tuple(sorted((name, values.shape) for name, values in batch.items()))
        if key not in self._executables:
            begin = time.perf_counter()
            self._executables[key] = self._jitted.lower(*arguments).compile()
            self.seconds += time.perf_counter() - begin
        return self._executables[key]

    def __call__(self, *arguments: Any) -> Any:
        """Returns what the function does for such arguments."""
        return self.of(*arguments)(*arguments)

    @property
    def temporary_bytes(self) -> int | None:
        """Of the executable that needs most; None where the device does not say."""
        known = (each.memory_analysis() for each in self._executables.values())
        return max((m.temp_size_in_bytes for m in known if m is not None), default=None)
