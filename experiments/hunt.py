"""The hunt: what was tried so that a method needs fewer steps, and what PoLoRA's parts do.

An attempt changes a few options of `polora-start`, or leaves one of its parts out, or changes what
it is compared with, AdamW and LoRA+; its learning rates are swept again. It is a variant `hunt-…`
of a study, or `long-hunt-…` where it is compared with the variant `long`; `docs/results/hunt.md`
has a row for each.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from experiments.headline import RECOMMENDED
from experiments.methods import LORA_ONE
from experiments.summary import (
    MethodSummary,
    Variant,
    difference,
    goal_of,
    speedup,
    tuned_baseline,
)
from experiments.tables import NOTHING, markdown, spread, times, verdict

PREFIX = "hunt-"
ABLATED = "polora-ablated-start"
REFERENCE = "peers"
"""How the variant begins that an attempt is compared with, unless it names another: it has AdamW
and the unchanged method. Of several the first one counts."""


class Attempt(NamedTuple):
    """What an attempt changes, in words and as options, and of which method."""

    change: str
    options: Mapping[str, Any]
    method: str = RECOMMENDED


ATTEMPTS = {
    "shorter-momentum": Attempt("b1 = 0.8, not 0.9", {"b1": 0.8}),
    "longer-momentum": Attempt("b1 = 0.95, not 0.9", {"b1": 0.95}),
    "shorter-curvature": Attempt("b2 = 0.9, not 0.99", {"b2": 0.9}),
    "flat-curvature": Attempt("δ = 1, not 1e-4: the diagonals hardly count", {"delta": 1.0}),
    "linear-radius": Attempt(
        "the paper's linear radius, with γ = 1024",
        {"radius": "linear", "start": {"gamma": 1024.0}},
    ),
    "larger-start": Attempt("γ = 128, LoRA-One's, not 1e6", {"start": {"gamma": 128.0}}),
    "kept-function": Attempt(
        "γ = 128, kernels corrected so that the model computes what it did",
        {"start": {"gamma": 128.0, "keep_function": True}},
    ),
    "no-momentum": Attempt("b1 = 0, not 0.9", {"b1": 0.0}),
    "no-nesterov": Attempt("without Nesterov's look ahead", {"nesterov": False}, ABLATED),
    "no-polar": Attempt(
        "without polar factors: the whitened momentum as it is", {"polar": False}, ABLATED
    ),
    "no-diagonal": Attempt("without the curvature diagonals", {"diagonal": False}, ABLATED),
    "no-radius": Attempt(
        "without the radius: a step of each factor of length η", {"bounded": False}, ABLATED
    ),
    "exact-start": Attempt(
        "the start from 8 batches, with two rounds of power iteration",
        {"start": {"gamma": 1e6, "batches": 8, "iterations": 2}},
    ),
    "adamw-b2-99": Attempt("AdamW: b2 = 0.99, not 0.999", {"b2": 0.99}, "adamw"),
    "adamw-b2-95": Attempt("AdamW: b2 = 0.95, not 0.999", {"b2": 0.95}, "adamw"),
    "adamw-small-start": Attempt(
        "AdamW from the gradient: γ = 1e6, not 128", {"start": {"gamma": 1e6}}, "adamw-start"
    ),
    "lora-plus-b2-99": Attempt("LoRA+: b2 = 0.99, not 0.999", {"b2": 0.99}, "lora-plus"),
    "lora-plus-start": Attempt(
        "LoRA+: from the gradient, γ = 128", {"start": LORA_ONE}, "lora-plus"
    ),
}


def attempts(
    rates: Mapping[str, tuple[float, ...]],
    reference: Mapping[str, Any] | None = None,
    *,
    named: str = "",
    names: Collection[str] = tuple(ATTEMPTS),
) -> dict[str, dict[str, Any]]:
    """Makes the variants of attempts.

    Args:
        rates: The learning rates with which a sweep begins, by the unchanged method.
        reference: What the variant that they are compared with changes in the study.
        named: That variant's name, where it is not the first one of the peers.
        names: Which attempts; all unless given.
    """
    prefix = f"{named}-{PREFIX}" if named else PREFIX
    return {
        f"{prefix}{name}": {
            **(reference or {}),
            "learning_rates": {ATTEMPTS[name].method: rates[_unchanged(ATTEMPTS[name])]},
            f"method_options.{ATTEMPTS[name].method}": dict(ATTEMPTS[name].options),
        }
        for name in names
    }


def _unchanged(attempt: Attempt) -> str:
    """The method that an attempt changes."""
    return RECOMMENDED if attempt.method == ABLATED else attempt.method


def is_attempt(variant: str) -> bool:
    """Says whether a variant of a study is an attempt."""
    return PREFIX in variant


def _reference_of(variant: str) -> str:
    """The name that an attempt's variant gives to what it is compared with; empty if none."""
    return variant.partition(PREFIX)[0].removesuffix("-")


def hunt_table(studies: Mapping[str, Sequence[Variant]]) -> str:
    """Writes a row for the unchanged method and for each attempt, study by study, in Markdown.

    Args:
        studies: The variants by study.

    Returns:
        The table; empty if there was no attempt.
    """
    headings = ["study", "change", "lr", "fewer steps than AdamW", "loss", "loss – unchanged"]
    headings.append("validation loss – unchanged")
    rows = [row for name, variants in studies.items() for row in _rows(name, variants)]
    return markdown(headings, rows) if rows else ""


def _rows(study: str, variants: Sequence[Variant]) -> Iterator[list[str]]:
    by_name = {variant.name: variant.summaries for variant in variants}
    tried = sorted(filter(is_attempt, by_name), key=_reference_of)
    for named, variants_tried in groupby(tried, _reference_of):
        peers = next((name for name in by_name if name.startswith(REFERENCE)), REFERENCE)
        reference = by_name.get(named or peers, [])
        label = f"{study}:{named}" if named else study
        yield from _compared(label, reference, {name: by_name[name] for name in variants_tried})


def _compared(
    label: str,
    reference: Sequence[MethodSummary],
    tried: Mapping[str, Sequence[MethodSummary]],
) -> Iterator[list[str]]:
    baseline = tuned_baseline(reference)
    unchanged = {summary.method: summary for summary in reference if summary.best}
    if baseline is None or RECOMMENDED not in unchanged:
        return
    goal, split = goal_of(baseline), baseline.reported_split

    def row(change: str, summary: MethodSummary, before: MethodSummary | None) -> list[str]:
        if not summary.best:
            return [label, change, NOTHING, "none finished", *[NOTHING] * 3]
        rate = f"{summary.best[0].config.learning_rate:g}" + "*" * summary.at_edge
        steps, loss = times(speedup(summary, goal)), spread(summary.losses(split))
        differences = [
            verdict(difference(summary.losses(name), before.losses(name))) if before else NOTHING
            for name in (split, "validation")
        ]
        return [label, change, rate, steps, loss, *differences]

    yield row("none", unchanged[RECOMMENDED], None)
    for name, summaries in tried.items():
        attempt = ATTEMPTS[name.rpartition(PREFIX)[2]]
        for summary in summaries:
            yield row(attempt.change, summary, unchanged.get(_unchanged(attempt)))
