"""The optimizers that can be compared: one row each.

Nothing but the standard library is imported before an optimizer is made, so that `list` is quick.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.errors import ExperimentError

if TYPE_CHECKING:
    import optax

    from experiments.adapters import Adapters
    from lowrank_optax import nn


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


def _pairs() -> Adapters:
    from experiments.adapters import LowRank

    return LowRank()


def _pairs_with(extra: Callable[[Any], nn.Extra]) -> Callable[[], Adapters]:
    """Pairs and what an optimizer needs beside them; `extra` is given `lowrank_optax`."""

    def make() -> Adapters:
        import lowrank_optax
        from experiments.adapters import LowRank

        return LowRank(extra(lowrank_optax))

    return make


def _whole_model() -> Adapters:
    from experiments.adapters import WholeModel

    return WholeModel()


def _dense() -> Adapters:
    from experiments.adapters import Dense

    return Dense()


@dataclass(frozen=True)
class Method:
    """One optimizer for the adapters, or for the whole model.

    Attributes:
        summary: One line for `python -m experiments list`.
        make: Called with the `Setting` and the options.
        options: What is passed on besides, and stored with every result; a study may change it.
            `start`, if there, is not passed on: it holds the values of a `Start`, or of a
            `WeightStart`.
        make_adapters: Makes `adapters`.
    """

    summary: str
    make: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any] = field(default_factory=dict)
    make_adapters: Callable[[], Adapters] = _pairs

    @functools.cached_property
    def adapters(self) -> Adapters:
        """What the optimizer needs in the model."""
        return self.make_adapters()


def _adamw(setting: Setting, **options: Any) -> optax.GradientTransformation:
    import optax

    return optax.adamw(setting.schedule, weight_decay=0.0, **options)


def _sgd(setting: Setting, momentum: float) -> optax.GradientTransformation:
    import optax

    return optax.sgd(setting.schedule, momentum)


def _unscaled(name: str) -> Callable[..., optax.GradientTransformation]:
    """Makes an optimizer of the library that takes its own options."""

    def make(setting: Setting, **options: Any) -> optax.GradientTransformation:
        import lowrank_optax

        return getattr(lowrank_optax, name)(setting.schedule, **options)

    return make


def _scaled(name: str) -> Callable[..., optax.GradientTransformation]:
    """Makes one that knows the forward scales, and takes its own options."""
    optimizer = _unscaled(name)
    return lambda setting, **options: optimizer(setting, scale=setting.scale, **options)


def _preconditioned(
    setting: Setting, momentum: float, damping: float
) -> optax.GradientTransformation:
    """OPLoRA's Jacobi step of length 1, then momentum SGD: its ridge is the damping."""
    import optax

    from lowrank_optax import oplora

    direction = oplora(1.0, 0.0, iterations=0, lmbd=damping, scale=setting.scale)
    return optax.chain(direction, optax.trace(momentum), optax.scale_by_schedule(setting.schedule))


def _sds_lora(setting: Setting, **options: Any) -> optax.GradientTransformation:
    import optax

    from lowrank_optax import sds_lora

    return sds_lora(
        optax.adamw(setting.schedule, weight_decay=0.0),
        total_steps=setting.total_steps,
        scale=setting.scale,
        **options,
    )


def _sds_lora_sgd(
    setting: Setting, warmup_steps: int, momentum: float
) -> optax.GradientTransformation:
    import optax

    from lowrank_optax import sds_lora

    return sds_lora(
        optax.sgd(setting.schedule, momentum),
        total_steps=setting.total_steps,
        warmup_steps=warmup_steps,
        scale=setting.scale,
    )


def _ablated(setting: Setting, **options: Any) -> optax.GradientTransformation:
    from experiments.ablations import ablated_polora

    return ablated_polora(setting.schedule, scale=setting.scale, **options)


def _svd_lora(setting: Setting, momentum: float) -> optax.GradientTransformation:
    import optax

    from lowrank_optax import svd_lora

    return svd_lora(optax.sgd(setting.schedule, momentum), setting.rank)


_ORDERS = {"": "alternating", "-simultaneous": "simultaneous", "-sequential": "sequential"}
_POLORA = {"b1": 0.9, "partner": "identity", "radius": "exact"}
_TWO_SIDED = {**_POLORA, "partner": "gram"}
_RIDGE = {"momentum": 0.9, "lmbd": 1e-2}

LORA_ONE = {
    "method": "lora_one",
    "gamma": 128.0,
    "keep_function": False,
    "batches": 1,
    "iterations": 0,
}
"""A start from the gradient of one batch, of the released size."""

_START = {"start": LORA_ONE}
_TINY_START = {"start": {**LORA_ONE, "gamma": 1e6}}
_PISSA, _OLORA = ({"start": {"method": method}} for method in ("pissa", "olora"))
_FRAMES_START = {"start": {**LORA_ONE, "method": "frames"}}

METHODS: dict[str, Method] = {
    "adamw": Method("LoRA with AdamW, the baseline", _adamw),
    "adamw-start": Method("LoRA with AdamW, started from the gradient", _adamw, _START),
    "adamw-pissa": Method("LoRA with AdamW, started from the kernel (PiSSA)", _adamw, _PISSA),
    "adamw-olora": Method("LoRA with AdamW, started from the kernel (OLoRA)", _adamw, _OLORA),
    "polora": Method("PoLoRA, one-sided, exact radius", _scaled("polora"), _POLORA),
    "polora-start": Method(
        "PoLoRA, started from the gradient", _scaled("polora"), {**_POLORA, **_TINY_START}
    ),
    "polora-pissa": Method(
        "PoLoRA, started from the kernel (PiSSA)", _scaled("polora"), {**_POLORA, **_PISSA}
    ),
    "polora-two-sided": Method(
        "PoLoRA, whitened by the other factor too", _scaled("polora"), _TWO_SIDED
    ),
    "polora-two-sided-start": Method(
        "PoLoRA, two-sided, started from the gradient",
        _scaled("polora"),
        {**_TWO_SIDED, **_TINY_START},
    ),
    "polora-ablated-start": Method(
        "PoLoRA less one of its parts, started from the gradient", _ablated, _TINY_START
    ),
    "lora-plus": Method(
        "LoRA+: AdamW, b 16 times as fast as a", _unscaled("lora_plus"), {"ratio": 16.0}
    ),
    "lora-plus-4": Method("LoRA+ with b 4 times as fast", _unscaled("lora_plus"), {"ratio": 4.0}),
    "lora-muon": Method("Muon on each factor", _unscaled("lora_muon"), {"b1": 0.95}),
    "scaled-adamw": Method(
        "ScaledAdamW: AdamW on preconditioned gradients",
        _unscaled("scaled_adamw"),
        {"order": "simultaneous", "damping": 1e-2},
    ),
    "lora-rite": Method(
        "LoRA-RITE: a matrix second moment of gradients in the factors' frames",
        _unscaled("lora_rite"),
        {"clip_unmagnified_grad": 1.0},
    ),
    "lora-fa": Method("LoRA-FA: a frozen, AdamW on projected gradients of b", _scaled("lora_fa")),
    "lora-pro": Method(
        "LoRA-Pro: Adam with dense moments of the equivalent gradient", _scaled("lora_pro")
    ),
    "lora-pro-efficient": Method(
        "LoRA-Pro's efficient form: Adam on the adjusted gradients", _scaled("lora_pro_efficient")
    ),
    "reflora": Method(
        "RefLoRA: Adam on gradients of balanced factors, 10 steps of warm-up",
        _unscaled("reflora"),
        {"refactoring": "full", "warmup_steps": 10},
    ),
    "reflora-scalar": Method(
        "RefLoRA-S: Adam at rates by the ratio of the factors' norms, 10 steps of warm-up",
        _unscaled("reflora"),
        {"refactoring": "scalar", "warmup_steps": 10},
    ),
    "lora-soap": Method("SOAP on the rank axis", _unscaled("lora_soap"), {"every": 1}),
    "sgd": Method("LoRA with momentum SGD", _sgd, {"momentum": 0.9}),
    "full-adamw": Method("AdamW on all weights, no adapters", _adamw, make_adapters=_whole_model),
    "svd-lora": Method(
        "SVDLoRA: momentum SGD on the dense change, cut to the rank at each step",
        _svd_lora,
        {"momentum": 0.9},
        _dense,
    ),
    **{
        f"altlora{suffix}": Method(f"AltLoRA, {order}", _scaled("altlora"), {"order": order})
        for suffix, order in _ORDERS.items()
    },
    **{
        f"altlora-plus{suffix}": Method(
            f"AltLoRA+, {order}", _scaled("altlora_plus"), {"order": order}
        )
        for suffix, order in _ORDERS.items()
    },
    "preconditioned": Method(
        "Preconditioned LoRA: SGD on projected gradients",
        _preconditioned,
        {"momentum": 0.0, "damping": 1e-2},
    ),
    "oplora": Method(
        "OPLoRA, k = 1",
        _scaled("oplora"),
        {"iterations": 1, **_RIDGE},
        _pairs_with(lambda library: library.nn.Shadows()),
    ),
    "oplora-2": Method(
        "OPLoRA, k = 2",
        _scaled("oplora"),
        {"iterations": 2, **_RIDGE},
        _pairs_with(lambda library: library.nn.Shadows(iterations=2)),
    ),
    "oplora-proj": Method(
        "OPLoRA-proj, k = 1",
        _scaled("oplora_proj"),
        {"iterations": 1, **_RIDGE},
        _pairs_with(lambda library: library.nn.Shadows(iterations=2, momentum_rank=0)),
    ),
    "scaled-oplora": Method(
        "OPLoRA in K-FAC's diagonal metric, k = 1",
        _scaled("scaled_oplora"),
        {"iterations": 1, "b1": 0.9, "lmbd": 1e-2},
        _pairs_with(lambda library: library.nn.Shadows(metric=library.Metric())),
    ),
    "sds-lora": Method(
        "SDS-LoRA with AdamW, 10 steps of warm-up",
        _sds_lora,
        {"warmup_steps": 10},
        _pairs_with(lambda library: library.nn.Frames()),
    ),
    "sds-lora-start": Method(
        "SDS-LoRA with AdamW, from frames of the gradient",
        _sds_lora,
        {"warmup_steps": 0, **_FRAMES_START},
        _pairs_with(lambda library: library.nn.Frames(warmup=False)),
    ),
    "sds-lora-sgd": Method(
        "SDS-LoRA with momentum SGD, 10 steps of warm-up",
        _sds_lora_sgd,
        {"warmup_steps": 10, "momentum": 0.9},
        _pairs_with(lambda library: library.nn.Frames()),
    ),
    "sds-lora-no-warmup": Method(
        "SDS-LoRA with AdamW, from random frames",
        _sds_lora,
        {"warmup_steps": 0},
        _pairs_with(lambda library: library.nn.Frames(warmup=False)),
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
