"""The table of methods: one row buys a method every check of this folder."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from lowrank_optax import (
    LoRAPair,
    Metric,
    altlora,
    altlora_plus,
    frame,
    lora_fa,
    lora_muon,
    lora_plus,
    lora_pro,
    lora_pro_efficient,
    lora_rite,
    lora_soap,
    oplora,
    oplora_proj,
    polora,
    reflora,
    scale_by_inverse_sqrt_gram,
    scaled_adamw,
    scaled_oplora,
    sds_lora,
    shadow,
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


def chained(scale_by: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """Makes an alias of a transformation without a learning rate."""

    def make(learning_rate: Any, **keywords: Any) -> optax.GradientTransformation:
        return optax.chain(scale_by(**keywords), optax.scale_by_learning_rate(learning_rate))

    return make


class Method(NamedTuple):
    """A row.

    Args:
        name: test id.
        make: the transformation, from a learning rate (number or schedule) and keywords.
        keywords: what the row fixes.
        state_copies: bytes of state in units of the bytes of all factors, in float32.
        node: what the method needs in place of a pair.
        single_pass: whether the gradient must come from a single backward pass, so that mean
            gradients over micro-batches do not serve.
        learning_rate: a rate at which the method trains the pairs of this folder.
        vectors: how many state vectors of in + out numbers a pair has besides.
        matrices: how many r×r matrices the state has at most for each factor.
        moves: the factors that it trains, and of which its state has copies.
        remains: the part of the loss below which 30 steps bring it; where a factor rests, the best
            that the other one can do is far from zero.
        dense: how many in×out matrices the state has for each pair, which are made and used on
            meshes by sums as long as the factors.
        form_of: the row of which it is another form, with the same state; what depends on the state
            alone is checked there.
        is_alias: whether it serves any parameter tree with a learning rate of its own, and so
            passes the suite that optax has for contributed optimizers.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    keywords: dict[str, Any]
    state_copies: int
    node: Callable[[LoRAPair], Any] = plain
    single_pass: bool = False
    learning_rate: float = 0.05
    vectors: int = 0
    matrices: int = 1
    moves: str = "ab"
    remains: float = 0.5
    dense: int = 0
    form_of: str = ""
    is_alias: bool = True

    def __call__(self, learning_rate: Any = None, **more: Any) -> optax.GradientTransformation:
        rate = self.learning_rate if learning_rate is None else learning_rate
        return self.make(rate, **{**self.keywords, **more})


# At momentum 0.9 this step is too long for these two: they overshoot and diverge.
LIGHTER = {"momentum": 0.5}
NO_WARMUP = {"total_steps": 30, "warmup_steps": 0, "refresh": "preserving"}
PROJ = shadowed(iterations=2, momentum_rank=0)

METHODS = [
    Method("altlora", altlora, {}, 1),
    Method("altlora-alternating", altlora, {"order": "alternating"}, 1, form_of="altlora"),
    Method("altlora-sequential", altlora, {"order": "sequential"}, 1, form_of="altlora"),
    Method("altlora_plus", altlora_plus, {}, 2),
    Method(
        "altlora_plus-alternating",
        altlora_plus,
        {"order": "alternating"},
        2,
        form_of="altlora_plus",
    ),
    Method(
        "altlora_plus-sequential", altlora_plus, {"order": "sequential"}, 2, form_of="altlora_plus"
    ),
    Method("lora_muon", lora_muon, {}, 1, learning_rate=0.2),
    Method("lora_plus", lora_plus, {"ratio": 4.0}, 2),
    Method("scaled_adamw", scaled_adamw, {}, 2),
    Method(
        "scaled_adamw-sequential", scaled_adamw, {"order": "sequential"}, 2, form_of="scaled_adamw"
    ),
    Method("lora_rite", lora_rite, {}, 1, matrices=2),
    Method("lora_fa", lora_fa, {}, 2, moves="b", remains=0.8),
    Method("lora_pro", lora_pro, {}, 0, dense=2),
    Method("lora_pro_efficient", lora_pro_efficient, {}, 2),
    Method("lora_soap", lora_soap, {}, 2, matrices=2),
    Method("lora_soap-every-3", lora_soap, {"every": 3}, 2, matrices=2, form_of="lora_soap"),
    Method("reflora", reflora, {"warmup_steps": 1}, 2),
    Method(
        "reflora-scalar",
        reflora,
        {"refactoring": "scalar", "warmup_steps": 1},
        2,
        form_of="reflora",
    ),
    Method("polora", polora, {}, 1, learning_rate=0.5, vectors=1),
    Method(
        "polora-paper",
        polora,
        {"partner": "gram", "radius": "linear"},
        1,
        learning_rate=0.5,
        vectors=1,
        form_of="polora",
    ),
    Method("preconditioned", oplora, {"momentum": 0.0, "iterations": 0, "lmbd": 1.0}, 0),
    Method("oplora-0", oplora, {"iterations": 0, **LIGHTER}, 0, shadowed(iterations=0)),
    Method("oplora-1", oplora, {}, 0, shadowed(), single_pass=True),
    Method(
        "oplora-2",
        oplora,
        {"iterations": 2},
        0,
        shadowed(iterations=2),
        single_pass=True,
        form_of="oplora-1",
    ),
    Method("oplora_proj", oplora_proj, LIGHTER, 2, PROJ, single_pass=True),
    Method("scaled_oplora", scaled_oplora, {}, 0, shadowed(metric=Metric()), single_pass=True),
    Method("sds_lora", sds_lora, {"total_steps": 30, "warmup_steps": 2}, 2, frame),
    Method("sds_lora-no-warmup", sds_lora, NO_WARMUP, 2, random_frames, form_of="sds_lora"),
    Method(
        "scale_by_inverse_sqrt_gram", chained(scale_by_inverse_sqrt_gram), {}, 0, is_alias=False
    ),
]

FIRST_FORMS = [method for method in METHODS if not method.form_of]
