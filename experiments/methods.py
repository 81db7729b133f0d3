"""The optimizers that can be compared: one row each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import optax

from experiments.adapters import Adapters, Dense, LowRank, WholeModel
from experiments.errors import ExperimentError
from lowrank_optax import (
    altlora,
    altlora_plus,
    nn,
    oplora,
    oplora_proj,
    scaled_oplora,
    sds_lora,
    shadows,
    svd_lora,
)


class Setting(NamedTuple):
    """What a run fixes and an optimizer may want to know.

    Attributes:
        schedule: Learning rate by update count.
        total_steps: How many updates the run makes.
        scale: Forward scale s by a pair's path.
        rank: r of the adapters.
    """

    schedule: optax.Schedule
    total_steps: int
    scale: Callable[[str], float]
    rank: int


@dataclass(frozen=True)
class Method:
    """One optimizer for the adapters, or for the whole model.

    Attributes:
        summary: One line for `python -m experiments list`.
        make: Called with the `Setting` and the options.
        options: What is passed on besides, and stored with every result; a study may change it.
        adapters: What the optimizer needs in the model.
    """

    summary: str
    make: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any] = field(default_factory=dict)
    adapters: Adapters = field(default_factory=LowRank)


def _adamw(setting: Setting) -> optax.GradientTransformation:
    return optax.adamw(setting.schedule, weight_decay=0.0)


def _sgd(setting: Setting, momentum: float) -> optax.GradientTransformation:
    return optax.sgd(setting.schedule, momentum)


def _lora_plus(setting: Setting, ratio: float) -> optax.GradientTransformation:
    """The learning rate is that of `a`."""
    faster = lambda count: ratio * setting.schedule(count)
    return optax.partition(
        {
            "lora_a": optax.adamw(setting.schedule, weight_decay=0.0),
            "lora_b": optax.adamw(faster, weight_decay=0.0),
        },
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params),
    )


def _altlora(setting: Setting, **options: Any) -> optax.GradientTransformation:
    return altlora(setting.schedule, scale=setting.scale, **options)


def _altlora_plus(setting: Setting, **options: Any) -> optax.GradientTransformation:
    return altlora_plus(setting.schedule, scale=setting.scale, **options)


def _oplora(setting: Setting, **options: Any) -> optax.GradientTransformation:
    return oplora(setting.schedule, scale=setting.scale, **options)


def _oplora_proj(setting: Setting, **options: Any) -> optax.GradientTransformation:
    return oplora_proj(setting.schedule, scale=setting.scale, **options)


def _scaled_oplora(setting: Setting, **options: Any) -> optax.GradientTransformation:
    return scaled_oplora(setting.schedule, scale=setting.scale, **options)


def _preconditioned(
    setting: Setting, momentum: float, damping: float
) -> optax.GradientTransformation:
    """OPLoRA's Jacobi step of length 1, then momentum SGD: its ridge is the damping."""
    direction = oplora(1.0, 0.0, iterations=0, lmbd=damping, scale=setting.scale)
    return optax.chain(direction, optax.trace(momentum), optax.scale_by_schedule(setting.schedule))


def _sds_lora(setting: Setting, **options: Any) -> optax.GradientTransformation:
    return sds_lora(
        optax.adamw(setting.schedule, weight_decay=0.0),
        total_steps=setting.total_steps,
        scale=setting.scale,
        **options,
    )


def _sds_lora_sgd(
    setting: Setting, warmup_steps: int, momentum: float
) -> optax.GradientTransformation:
    return sds_lora(
        optax.sgd(setting.schedule, momentum),
        total_steps=setting.total_steps,
        warmup_steps=warmup_steps,
        scale=setting.scale,
    )


def _svd_lora(setting: Setting, momentum: float) -> optax.GradientTransformation:
    return svd_lora(optax.sgd(setting.schedule, momentum), setting.rank)


_ORDERS = {"": "alternating", "-simultaneous": "simultaneous", "-sequential": "sequential"}
_RIDGE = {"momentum": 0.9, "lmbd": 1e-2}

METHODS: dict[str, Method] = {
    "adamw": Method("LoRA with AdamW, the baseline", _adamw),
    "lora-plus": Method("LoRA+: AdamW, b 16 times as fast as a", _lora_plus, {"ratio": 16.0}),
    "sgd": Method("LoRA with momentum SGD", _sgd, {"momentum": 0.9}),
    "full-adamw": Method("AdamW on all weights, no adapters", _adamw, adapters=WholeModel()),
    "svd-lora": Method(
        "SVDLoRA: momentum SGD on the dense change, cut to the rank at each step",
        _svd_lora,
        {"momentum": 0.9},
        Dense(),
    ),
    **{
        f"altlora{suffix}": Method(f"AltLoRA, {order}", _altlora, {"order": order})
        for suffix, order in _ORDERS.items()
    },
    **{
        f"altlora-plus{suffix}": Method(f"AltLoRA+, {order}", _altlora_plus, {"order": order})
        for suffix, order in _ORDERS.items()
    },
    "preconditioned": Method(
        "Preconditioned LoRA: SGD on projected gradients",
        _preconditioned,
        {"momentum": 0.0, "damping": 1e-2},
    ),
    "oplora": Method("OPLoRA, k = 1", _oplora, {"iterations": 1, **_RIDGE}, LowRank(nn.Shadows())),
    "oplora-2": Method(
        "OPLoRA, k = 2", _oplora, {"iterations": 2, **_RIDGE}, LowRank(nn.Shadows(iterations=2))
    ),
    "oplora-proj": Method(
        "OPLoRA-proj, k = 1",
        _oplora_proj,
        {"iterations": 1, **_RIDGE},
        LowRank(nn.Shadows(iterations=2, momentum_rank=0)),
    ),
    "scaled-oplora": Method(
        "OPLoRA in K-FAC's diagonal metric, k = 1",
        _scaled_oplora,
        {"iterations": 1, "b1": 0.9, "lmbd": 1e-2},
        LowRank(nn.Shadows(metric=shadows.Metric())),
    ),
    "sds-lora": Method(
        "SDS-LoRA with AdamW, 10 steps of warm-up",
        _sds_lora,
        {"warmup_steps": 10},
        LowRank(frames=nn.Frames()),
    ),
    "sds-lora-sgd": Method(
        "SDS-LoRA with momentum SGD, 10 steps of warm-up",
        _sds_lora_sgd,
        {"warmup_steps": 10, "momentum": 0.9},
        LowRank(frames=nn.Frames()),
    ),
    "sds-lora-no-warmup": Method(
        "SDS-LoRA with AdamW, from random frames",
        _sds_lora,
        {"warmup_steps": 0},
        LowRank(frames=nn.Frames(warmup=False)),
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
