"""The comparison by which an optimizer is chosen: its methods, and where their sweeps begin.

Every task that takes part has a variant `peers` of its study. LoRA with AdamW is tuned in two
dimensions there: its learning rate, and b's rate in units of a's (1, 4, 16).
"""

import math

TUNED_ADAMW = ("adamw", "lora-plus-4", "lora-plus")
"""The baseline: of these, the one with the lowest final validation loss in a study."""

HIGHLIGHTS = (
    "adamw",
    "lora-plus-4",
    "lora-plus",
    "adamw-start",
    "polora",
    "polora-start",
    "full-adamw",
)
"""What runs where all peers would take too long."""


OTHERS = (
    "scaled-adamw",
    "lora-fa",
    "lora-pro",
    "lora-pro-efficient",
    "reflora",
    "reflora-scalar",
    "lora-soap",
    "adamw-pissa",
    "adamw-olora",
    "polora-pissa",
)
"""Further optimizers, and starts from the weights, on four studies."""


def around(rate: float, count: int = 5) -> tuple[float, ...]:
    """Returns `count` rates of the grid 1, 3, 10, … around one of it.

    Raises:
        ValueError: The rate is not on the grid.
    """
    exponent = math.floor(math.log10(rate) + 1e-9)
    digit = round(rate / 10**exponent, 6)
    if digit not in (1, 3):
        raise ValueError(f"{rate:g} is not on the grid 1, 3, 10, …")
    middle = 2 * exponent + (digit == 3)
    steps = range(middle - count // 2, middle - count // 2 + count)
    return tuple(float(f"{3 if step % 2 else 1}e{step // 2}") for step in steps)


def peers(adamw: float, polora: float, count: int = 5) -> dict[str, tuple[float, ...]]:
    """Returns the learning rates of all peers.

    Args:
        adamw: Where the best rate of LoRA with AdamW is expected, on the grid 1, 3, 10, …
        polora: Where PoLoRA's is.
        count: How many rates a sweep begins with; it grows until the best one is inside.
    """
    third = around(adamw)[1]
    tenth = around(adamw)[0]
    centers = {
        "adamw": adamw,
        "lora-plus-4": third,
        "lora-plus": tenth,
        "adamw-start": adamw,
        "polora": polora,
        "polora-start": polora,
        "polora-two-sided": polora,
        "polora-two-sided-start": polora,
        "lora-rite": adamw,
        "lora-muon": third,
        "altlora-plus-simultaneous": third,
        "sds-lora": tenth,
        "sds-lora-start": tenth,
        "full-adamw": tenth,
    }
    return {method: around(center, count) for method, center in centers.items()}


def others(adamw: float, polora: float, count: int = 5) -> dict[str, tuple[float, ...]]:
    """Returns the learning rates of what else a user might pick; see `peers`."""
    centers = dict.fromkeys(OTHERS, adamw) | {"polora-pissa": polora}
    return {method: around(center, count) for method, center in centers.items()}


def highlights(adamw: float, polora: float, count: int = 5) -> dict[str, tuple[float, ...]]:
    """Returns the learning rates of `HIGHLIGHTS`; see `peers`."""
    rates = peers(adamw, polora, count)
    return {method: rates[method] for method in HIGHLIGHTS}
