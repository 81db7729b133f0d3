"""Why PoLoRA works, as tables: what its parts do, and what its steps look like beside AdamW's."""

import statistics
from collections.abc import Mapping, Sequence

from experiments.headline import RECOMMENDED
from experiments.hunt import PREFIX, REFERENCE
from experiments.summary import MethodSummary, Variant, difference
from experiments.tables import NOTHING, PROBES, markdown, probe_mean, spread, verdict

PARTS = {
    "no-diagonal": "the curvature diagonals",
    "no-momentum": "the momentum",
    "no-radius": "the radius: each factor moves by η instead",
    "no-polar": "the polar factors",
    "no-nesterov": "Nesterov's look ahead",
}
"""The attempts of the hunt that leave a part out, in words."""

ABLATED = ("digits", "lm")
MECHANISM = "mechanism-polora"
SHOWN = ("step_alignment", "step_rank", "step_norm", "delta_rank")


def parts_table(studies: Mapping[str, Sequence[Variant]]) -> str:
    """Writes a row for each part of PoLoRA, left out on two tasks, in Markdown.

    Args:
        studies: The variants by study.

    Returns:
        The table; empty unless both tasks have the unchanged method.
    """
    whole = {study: _methods(studies.get(study, ()), REFERENCE) for study in ABLATED}
    if not all(RECOMMENDED in methods for methods in whole.values()):
        return ""
    rows = [
        [part, *(_cell(studies[study], name, whole[study]) for study in ABLATED)]
        for name, part in PARTS.items()
    ]
    start = [_changed(whole[study].get("polora"), whole[study][RECOMMENDED]) for study in ABLATED]
    headings = [f"{study}: loss {_mean(whole[study][RECOMMENDED])} becomes" for study in ABLATED]
    return markdown(["left out", *headings], [*rows, ["the start from the gradient", *start]])


def steps_table(variants: Sequence[Variant]) -> str:
    """Writes the probes of PoLoRA's and AdamW's steps, a column a method, in Markdown.

    Args:
        variants: The study `MECHANISM`.

    Returns:
        The table; empty if nothing has run.
    """
    methods = _methods(variants, "")
    if not methods:
        return ""
    rows = [
        [PROBES[name], *(probe_mean(summary.best, name) for summary in methods.values())]
        for name in SHOWN
    ]
    losses = [spread(summary.losses("test")) for summary in methods.values()]
    return markdown(["", *methods], [*rows, ["test loss", *losses]])


def _methods(variants: Sequence[Variant], name: str) -> dict[str, MethodSummary]:
    """Returns the methods of a variant that have finished runs."""
    return {
        summary.method: summary
        for variant in variants
        if variant.name == name
        for summary in variant.summaries
        if summary.best
    }


def _cell(variants: Sequence[Variant], name: str, whole: Mapping[str, MethodSummary]) -> str:
    changed = next(iter(_methods(variants, PREFIX + name).values()), None)
    return _changed(changed, whole[RECOMMENDED])


def _changed(changed: MethodSummary | None, whole: MethodSummary) -> str:
    if changed is None:
        return NOTHING
    split = whole.reported_split
    losses = changed.losses(split)
    cell = f"{spread(losses)}; {verdict(difference(losses, whole.losses(split)))}"
    if split == "validation":
        return cell
    found = difference(changed.losses("validation"), whole.losses("validation"))
    return f"{cell}. Validation: {verdict(found)}"


def _mean(summary: MethodSummary) -> str:
    return f"{statistics.mean(summary.losses(summary.reported_split)):.4g}"
