"""What the page of each method shows."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """What the page of a method shows.

    Attributes:
        methods: Columns of the table of learning rates, as in `experiments.methods`.
        costs: Rows of the table of costs, as the benchmarks name them, by what the page calls them;
            a page without any has no table.
        steps: Methods of the figure's left panel.
        curves: Study and variant of the right panel, and its methods.
        usual_start: Whether the left panel begins at a usual start, not at trained factors.
    """

    methods: tuple[str, ...]
    costs: Mapping[str, str]
    steps: tuple[str, ...]
    curves: tuple[str, str, tuple[str, ...]] | None
    usual_start: bool = False


CHOICES = (
    "adamw",
    "polora-start",
    "polora",
    "lora-plus",
    "lora-rite",
    "altlora-simultaneous",
    "altlora-plus-simultaneous",
    "sds-lora",
    "oplora",
)
"""Columns of the guide's table of rates."""

_WEIGHT_STARTS = ("adamw-pissa", "adamw-olora", "polora-pissa")
_STARTS = ("adamw-start", "polora-start", "sds-lora-start")
_ALTLORA = ("altlora", "altlora-simultaneous", "altlora-sequential")
_ALTLORA_PLUS = ("altlora-plus", "altlora-plus-simultaneous", "altlora-plus-sequential")

PAGE_OF = {
    "polora": Page(
        ("polora", "polora-start", "polora-two-sided", "polora-two-sided-start"),
        {"`polora`": "polora", '`polora`, `partner="gram"`': "polora two-sided"},
        ("polora", "polora-two-sided"),
        ("cifar-transfer", "peers", ("polora", "polora-start")),
    ),
    "gradient_starts": Page(
        _STARTS,
        {},
        ("adamw-start", "polora-start"),
        ("lm", "peers", ("adamw", "adamw-start", "polora", "polora-start")),
        usual_start=True,
    ),
    "weight_starts": Page(_WEIGHT_STARTS, {}, _WEIGHT_STARTS, None, usual_start=True),
    "altlora": Page(
        (*_ALTLORA, *_ALTLORA_PLUS),
        {"`altlora`": "altlora", "`altlora_plus`": "altlora_plus"},
        ("altlora-simultaneous", "altlora-plus-simultaneous"),
        ("linear", "stochastic", ("altlora-simultaneous", "altlora-plus-simultaneous")),
    ),
    "oplora": Page(
        ("oplora", "oplora-2", "oplora-proj", "scaled-oplora", "preconditioned"),
        {
            "`oplora`": "oplora k=1",
            "`oplora`, `iterations=2`": "oplora k=2",
            "`oplora_proj`": "oplora_proj k=1",
            "`scaled_oplora`": "scaled_oplora k=1",
        },
        ("oplora", "oplora-proj", "scaled-oplora"),
        ("linear", "stochastic", ("oplora", "oplora-2", "svd-lora")),
    ),
    "sds_lora": Page(
        ("sds-lora", "sds-lora-no-warmup", "sds-lora-start"),
        {"`sds_lora`": "sds_lora"},
        ("sds-lora", "sds-lora-sgd"),
        ("lm", "peers", ("sds-lora", "sds-lora-start")),
    ),
    "svd_lora": Page(
        ("svd-lora",), {}, ("svd-lora",), ("linear", "stochastic", ("svd-lora", "oplora-2"))
    ),
    "scaled_adamw": Page(
        ("scaled-adamw",), {"`scaled_adamw`": "scaled_adamw"}, ("scaled-adamw",), None
    ),
    "lora_plus": Page(
        ("lora-plus-4", "lora-plus"),
        {"`lora_plus`": "lora_plus"},
        ("lora-plus-4", "lora-plus"),
        ("cifar", "peers", ("lora-plus-4", "lora-plus", "adamw")),
    ),
    "lora_rite": Page(
        ("lora-rite",),
        {"`lora_rite`": "lora_rite"},
        ("lora-rite",),
        ("lm", "rank-32", ("lora-rite",)),
    ),
    "lora_fa": Page(("lora-fa",), {"`lora_fa`": "lora_fa"}, ("lora-fa",), None),
    "lora_pro": Page(
        ("lora-pro", "lora-pro-efficient"),
        {"`lora_pro`": "lora_pro", "`lora_pro_efficient`": "lora_pro_efficient"},
        ("lora-pro", "lora-pro-efficient"),
        None,
    ),
    "reflora": Page(
        ("reflora", "reflora-scalar"),
        {"`reflora`": "reflora", '`reflora`, `refactoring="scalar"`': "reflora scalar"},
        ("reflora", "reflora-scalar"),
        None,
    ),
    "lora_soap": Page(("lora-soap",), {"`lora_soap`": "lora_soap"}, ("lora-soap",), None),
    "lora_muon": Page(
        ("lora-muon",),
        {"`lora_muon`": "lora_muon"},
        ("lora-muon",),
        ("cifar-transfer", "peers", ("lora-muon",)),
    ),
}
