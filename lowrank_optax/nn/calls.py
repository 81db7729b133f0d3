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


def require_array(y: Any, what: str) -> None:
    """Raises unless a layer returned one array, to which an adapter can add.

    Raises:
        TypeError: it returned something else.

    Example:
        >>> require_array(jax.numpy.ones(2), "layers/0")
    """
    if not hasattr(y, "dtype"):
        raise TypeError(
            f"{what} returns a {type(y).__name__}, not one array, so LoRA cannot add to it: adapt a"
            " layer inside of it"
        )


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
    given: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    values = list(given.values())
    if any(
        p.kind is p.VAR_POSITIONAL and name in given for name, p in signature.parameters.items()
    ):
        values = [*args, *kwargs.values()]
    if not values:
        raise TypeError(f"{method.__qualname__} is called without an input, which LoRA adapts")
    return LayerCall(values[0], given.get("einsum_str"))
