"""What a call of a layer means to its adapter, whatever signature the layer has."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class LayerCall(NamedTuple):
    """The arguments of a layer's call that its adapter needs.

    Attributes:
        inputs: the layer's input, its first argument.
        einsum_str: the string that an einsum layer was called with, if any.

    Example:
        >>> LayerCall(inputs=1.0).einsum_str is None
        True
    """

    inputs: jax.Array
    einsum_str: str | None = None


def read_call(
    method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> LayerCall:
    """Reads the arguments of a call by the signature of the layer's method.

    Args:
        method: the bound method.
        args: what it is called with.
        kwargs: what it is called with by name.

    Returns:
        The input and the einsum string.

    Raises:
        TypeError: the arguments do not fit the signature, or there is no input among them.

    Example:
        >>> class Layer:
        ...     def __call__(self, x, *, train=False):
        ...         return x
        >>> read_call(Layer().__call__, (), {"train": True, "x": 3.0}).inputs
        3.0
    """
    signature = inspect.signature(method)
    given = signature.bind(*args, **kwargs).arguments
    values = list(given.values())
    if any(
        p.kind is p.VAR_POSITIONAL and name in given for name, p in signature.parameters.items()
    ):
        values = list(args)
    if not values:
        raise TypeError(f"{method.__qualname__} is called without an input, which LoRA adapts")
    return LayerCall(values[0], given.get("einsum_str"))
