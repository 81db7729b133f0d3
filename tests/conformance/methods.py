"""The table of methods: one row buys a method every check of test_conformance.py."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from lowrank_optax import (
    LoRAPair,
    altlora,
    altlora_plus,
    frame,
    oplora,
    oplora_proj,
    scale_by_altlora,
    scale_by_altlora_plus,
    scale_by_inverse_sqrt_gram,
    scaled_oplora,
    sds_lora,
    shadow,
    shadows,
)


def plain(pair: LoRAPair) -> LoRAPair:
    """Leaves a pair as it is."""
    return pair


def shadowed(**keywords: Any) -> Callable[[LoRAPair], Any]:
    """Adds shadows whose momentum has rank 2 whatever the pair's rank."""
    return lambda pair: shadow(pair, jax.random.key(9), **{"momentum_rank": 2, **keywords})


def random_frames(pair: LoRAPair) -> Any:
    """Starts from random frames and factors of zero."""
    return frame(pair, jax.random.key(9))


class Method(NamedTuple):
    """A row.

    Args:
        name: test id.
        make: the transformation, from a learning rate (number or schedule) and keywords.
        keywords: what the row fixes.
        state_copies: bytes of state in units of the bytes of all factors, in float32.
        node: what the method needs in place of a pair.
        linear: whether mean gradients over micro-batches serve.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    keywords: dict[str, Any]
    state_copies: int
    node: Callable[[LoRAPair], Any] = plain
    linear: bool = True

    def __call__(self, learning_rate: Any = 0.05, **more: Any) -> optax.GradientTransformation:
        return self.make(learning_rate, **self.keywords, **more)


def chained(scale_by: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """Makes an alias of a transformation without a learning rate."""

    def make(learning_rate: Any, **keywords: Any) -> optax.GradientTransformation:
        return optax.chain(scale_by(**keywords), optax.scale_by_learning_rate(learning_rate))

    return make


# At momentum 0.9 this step is too long for these two: they overshoot and diverge.
LIGHTER = {"momentum": 0.5}
NO_WARMUP = {"total_steps": 30, "warmup_steps": 0, "refresh": "preserving"}

METHODS = [
    Method("altlora", altlora, {}, 1),
    Method("altlora-simultaneous", altlora, {"order": "simultaneous"}, 1),
    Method("altlora-sequential", altlora, {"order": "sequential"}, 1),
    Method("altlora_plus", altlora_plus, {}, 2),
    Method("altlora_plus-sequential", altlora_plus, {"order": "sequential"}, 2),
    Method("scale_by_altlora", chained(scale_by_altlora), {"order": "simultaneous"}, 2),
    Method("scale_by_altlora_plus", chained(scale_by_altlora_plus), {}, 3),
    Method("preconditioned", oplora, {"momentum": 0.0, "iterations": 0, "lmbd": 1.0}, 0),
    Method("oplora-0", oplora, {"iterations": 0, **LIGHTER}, 0, shadowed(iterations=0)),
    Method("oplora-1", oplora, {}, 0, shadowed(), linear=False),
    Method("oplora-2", oplora, {"iterations": 2}, 0, shadowed(iterations=2), linear=False),
    Method("oplora_proj", oplora_proj, LIGHTER, 2, shadowed(iterations=2, momentum_rank=0), False),
    Method("sds_lora", sds_lora, {"total_steps": 30, "warmup_steps": 2}, 2, frame),
    Method("sds_lora-no-warmup", sds_lora, NO_WARMUP, 2, random_frames),
    Method("scale_by_inverse_sqrt_gram", chained(scale_by_inverse_sqrt_gram), {}, 0),
    Method("scaled_oplora", scaled_oplora, {}, 0, shadowed(metric=shadows.Metric()), False),
]
