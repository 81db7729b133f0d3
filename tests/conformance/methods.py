"""The table of methods: one row buys a method every check of test_conformance.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from lowrank_optax import altlora, altlora_plus, scale_by_altlora, scale_by_altlora_plus


class Method(NamedTuple):
    """A row.

    Args:
        name: test id.
        make: the transformation, from a learning rate (number or schedule) and keywords.
        keywords: what the row fixes.
        state_copies: bytes of state in units of the bytes of all factors, in float32.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    keywords: dict[str, Any]
    state_copies: int

    def __call__(self, learning_rate: Any = 0.05, **more: Any) -> optax.GradientTransformation:
        return self.make(learning_rate, **self.keywords, **more)


def chained(scale_by: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """Makes an alias of a transformation without a learning rate."""

    def make(learning_rate: Any, **keywords: Any) -> optax.GradientTransformation:
        return optax.chain(scale_by(**keywords), optax.scale_by_learning_rate(learning_rate))

    return make


METHODS = [
    Method("altlora", altlora, {}, 1),
    Method("altlora-simultaneous", altlora, {"order": "simultaneous"}, 1),
    Method("altlora-sequential", altlora, {"order": "sequential"}, 1),
    Method("altlora_plus", altlora_plus, {}, 2),
    Method("altlora_plus-sequential", altlora_plus, {"order": "sequential"}, 2),
    Method("scale_by_altlora", chained(scale_by_altlora), {"order": "simultaneous"}, 2),
    Method("scale_by_altlora_plus", chained(scale_by_altlora_plus), {}, 3),
]
