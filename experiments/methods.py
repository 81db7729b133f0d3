"""The optimizers that can be compared: one row each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax
from flax import nnx

from experiments.errors import ExperimentError
from lowrank_optax import altlora, altlora_plus


@dataclass(frozen=True)
class Method:
    """One optimizer for the adapters, or for the whole model.

    Attributes:
        summary: One line for `python -m experiments list`.
        make: Called with the learning-rate schedule, `options`, and `scale=` if `takes_scale`.
        options: What is passed on besides, and stored with every result.
        takes_scale: Whether the optimizer wants the forward scale of each pair.
        trains: Which variables of the model the optimizer moves.
    """

    summary: str
    make: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_scale: bool = False
    trains: nnx.filterlib.Filter = nnx.LoRAParam

    def build(self, schedule: optax.Schedule, scale: Any) -> optax.GradientTransformation:
        """Returns the optimizer at a schedule, for adapters with the forward scale `scale`."""
        extra = {"scale": scale} if self.takes_scale else {}
        return self.make(schedule, **self.options, **extra)


def _altlora(order: str) -> Method:
    return Method(f"AltLoRA, {order}", altlora, {"order": order}, takes_scale=True)


def _altlora_plus(order: str) -> Method:
    return Method(f"AltLoRA+, {order}", altlora_plus, {"order": order}, takes_scale=True)


METHODS: dict[str, Method] = {
    "adamw": Method("LoRA with AdamW, the baseline", optax.adamw, {"weight_decay": 0.0}),
    "altlora": _altlora("alternating"),
    "altlora-simultaneous": _altlora("simultaneous"),
    "altlora-sequential": _altlora("sequential"),
    "altlora-plus": _altlora_plus("alternating"),
    "altlora-plus-simultaneous": _altlora_plus("simultaneous"),
    "altlora-plus-sequential": _altlora_plus("sequential"),
    "full-adamw": Method(
        "AdamW on all weights, no adapters", optax.adamw, {"weight_decay": 0.0}, trains=nnx.Param
    ),
}


def get_method(name: str) -> Method:
    """Returns a method by name.

    Raises:
        ExperimentError: There is no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise ExperimentError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]
