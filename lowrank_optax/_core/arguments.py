"""Checks of hyperparameters, one wording for all methods."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

NUMBERS = int | float | np.number | np.ndarray | jax.Array


def check(name: str, value: Any, ok: Callable[[Any], bool], remedy: str) -> None:
    """Raises unless a value is a number and passes; whether a traced one does cannot be known.

    Args:
        name: the argument's name.
        value: its value.
        ok: the condition.
        remedy: what the value must be, as the end of a sentence.

    Raises:
        TypeError: it is no number.
        ValueError: the condition fails, or it is infinite.

    Example:
        >>> check("damping", 1e-6, lambda v: v > 0, "must be positive")
    """
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if isinstance(value, jax.core.Tracer):
        return
    if np.ndim(value) != 0:
        raise TypeError(f"`{name}` must be one number, got an array of shape {np.shape(value)}.")
    if np.isinf(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")
    if not ok(np.asarray(value)[()]):
        raise ValueError(f"`{name}` {remedy}, got {value}.")


def check_schedule(name: str, value: Any, ok: Callable[[Any], bool], remedy: str) -> None:
    """Raises unless a value is a schedule, or a number that passes.

    Args:
        name: as in `check`.
        value: its value; what a schedule gives cannot be checked.
        ok: as in `check`.
        remedy: as in `check`.

    Raises:
        TypeError: it is neither.
        ValueError: the condition fails.

    Example:
        >>> check_schedule("learning_rate", lambda count: 0.1, lambda v: v > 0, "must be positive")
    """
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"`{name}` must be a number or a schedule, got {value!r}.")
    check(name, value, ok, remedy)


STATIC_HINT = "; under `optax.inject_hyperparams` name it in `static_args`"


def check_rate(name: str, value: Any) -> None:
    """Raises unless a learning rate is a schedule, or a number above zero.

    An array may be zero: `optax.inject_hyperparams` makes one of a schedule, which may begin there.

    Example:
        >>> check_rate("learning_rate", jax.numpy.zeros([]))
    """
    if isinstance(value, jax.Array):
        check(name, value, lambda v: v >= 0, "must not be negative")
    else:
        check_schedule(name, value, lambda v: v > 0, "must be positive")


def check_integer(name: str, value: Any, least: int, hint: str = "") -> None:
    """Raises unless a value is an integer that is large enough; shapes and loops depend on it.

    Args:
        name: the argument's name.
        value: its value.
        least: the smallest value that is allowed.
        hint: what to say besides of what is not an integer, such as `STATIC_HINT`.

    Raises:
        TypeError: it is not an integer. A boolean is none.
        ValueError: it is too small.

    Example:
        >>> check_integer("iterations", 1, least=0)
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}` must be an integer, got {value!r}{hint}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises unless a number is whole and large enough; it may be traced, and so a float.

    Example:
        >>> check_whole("switch_every", 2.0, least=1)
    """
    is_whole = lambda v: v >= least and v == v // 1
    check(name, value, is_whole, f"must be a whole number, {least} or more")


def check_positive(name: str, value: Any) -> None:
    """Raises unless a plain number is positive.

    Example:
        >>> check_positive("learning_rate", 1e-3)
    """
    check(name, value, lambda v: v > 0, "must be positive")


def check_decay(name: str, value: Any) -> None:
    """Raises unless a plain number can be the decay of a moving average.

    Example:
        >>> check_decay("b1", 0.9)
    """
    check(name, value, lambda v: 0 <= v < 1, "must lie in [0, 1)")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises unless the value is one of the choices.

    Example:
        >>> check_choice("first", "b", ("a", "b"))
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def is_zero(value: Any) -> bool:
    """Says whether a number is known to be zero before the program runs.

    Example:
        >>> is_zero(0.0), is_zero(lambda count: 0.0)
        (True, False)
    """
    return isinstance(value, int | float) and value == 0
