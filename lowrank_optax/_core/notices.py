"""Warnings that a compiled step can give while it runs."""

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax

_ENABLED: ContextVar[bool] = ContextVar("notices", default=True)


@contextlib.contextmanager
def notices(enabled: bool) -> Iterator[None]:
    """Switches the warnings that compiled updates give, for what is traced in the context.

    They are host callbacks (`jax.debug.callback`) under a condition that does not hold in a run
    that goes well. Switch them off around `jax.export`, which cannot carry callbacks, and where
    JAX's persistent compilation cache should keep the step, which it does not with callbacks.

    Args:
        enabled: whether updates traced in the context warn.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, notices, oplora, shadow
        >>> params = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> tx = oplora(0.1)
        >>> with notices(False):
        ...     update = jax.jit(tx.update).lower(params, tx.init(params), params)
        >>> "callback" in update.as_text()
        False
    """
    token = _ENABLED.set(enabled)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def warn_if(condition: jax.Array, message: str) -> None:
    """Gives a Python warning when a traced condition holds.

    Args:
        condition: a boolean scalar.
        message: what to say.

    Example:
        >>> import jax.numpy as jnp
        >>> with warnings.catch_warnings(record=True) as given:
        ...     warnings.simplefilter("always")
        ...     jax.jit(lambda x: warn_if(x > 0, "too large"))(jnp.array(1))
        ...     jax.effects_barrier()
        >>> [str(each.message) for each in given]
        ['too large']
    """
    if not _ENABLED.get():
        return

    def warn(holds: Any) -> None:
        # Under `vmap` both sides of a condition are computed, so it is asked again.
        if holds:
            warnings.warn(message, stacklevel=2)

    jax.lax.cond(condition, lambda: jax.debug.callback(warn, condition), lambda: None)
