r"""Rules for the learning rate: from what is known before training to a rate near the best.

A rule is c / (n^p r^q d^m), with n adapted layers, the rank r and the mean width d of the layers,
where the width of a layer is √(inputs · outputs). Exponents are 0, ½ or 1. They were chosen by the
sweeps of the studies in `FITTED`: of all 27 triples, that which predicts the best rate of each
comparison well from the others, and for methods of one family the same. The scale alpha / r is 2
there, the steps are 150 to 200.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from experiments.peers import TUNED_ADAMW
from experiments.scaling import STUDY as SCALING
from experiments.schema import RunConfig
from experiments.studies.layers import LAYERS
from experiments.summary import MethodSummary, SweepPoint, Variant, is_complete
from experiments.tables import markdown

GRID_STEP = math.log10(3.0) + 0.03
"""Decades of one step of a sweep by factors of three, the rounding of its rates included."""

FITTED = {
    "cifar": ("peers", "papers"),
    "cifar-transfer": ("peers", "rank-32", "papers"),
    "digits": ("peers", "papers"),
    "layers": ("layers-35",),  # the model of `lm`
    "glue-sst2": ("peers-query-value", "papers-query-value", "papers-all-linear"),
    "lm": ("peers", "rank-32", "papers"),
    "mnist": ("peers", "papers"),
}
"""The variants of studies that the rules were fitted to: those that had run."""


class Layers(NamedTuple):
    """What is adapted.

    Attributes:
        number: n, how many layers.
        width: d, the mean of √(inputs · outputs) over them.
    """

    number: int
    width: float


DECODERS = {128: Layers(28, 163), 256: Layers(28, 325), 448: Layers(28, 569)}
"""All linear maps of the decoders that `pretrain` makes, by the decoder's width."""

ADAPTED: Mapping[tuple[str, str], Layers] = {
    ("mnist", r"linear/\d"): Layers(3, 116),
    ("cifar", r"layers/\d"): Layers(4, 256),
    ("cifar-transfer", r"layers/\d"): Layers(4, 256),
    ("digits", "query|key|value|out|mlp_in|mlp_out"): Layers(18, 85),
    ("sst2", "query|value"): Layers(12, 384),
    ("sst2", "query|key|value|out|mlp_in|mlp_out"): Layers(36, 512),
    ("cola", "query|key|value|out|mlp_in|mlp_out"): Layers(36, 512),
    **{("lm", targets): Layers(number, 76) for number, targets in LAYERS.items()},
    ("authors", "query|value"): Layers(12, 384),
    ("cifar-back", r"layers/\d"): Layers(4, 256),
    ("gsm8k", "query|key|value|out|gate|up|down"): DECODERS[128],
}
"""The layers of a task, by its targets."""


class Rule(NamedTuple):
    """A learning rate as a function of what is known before training.

    Attributes:
        constant: c.
        layers: p, the power of 1 / n.
        rank: q, the power of 1 / r.
        width: m, the power of 1 / d.
    """

    constant: float
    layers: float
    rank: float
    width: float

    def rate(self, layers: Layers, rank: int) -> float:
        """Returns the learning rate: the peak of a schedule with warm-up and cosine decay."""
        powers = layers.number**self.layers * rank**self.rank * layers.width**self.width
        return self.constant / powers

    @property
    def formula(self) -> str:
        """The rule as it is written in the documentation."""
        powers = (("n", self.layers), ("r", self.rank), ("d", self.width))
        written = {1.0: "{}", 0.5: "√{}"}
        under = [written[power].format(name) for name, power in powers if power]
        return f"{self.constant:g} / ({' '.join(under)})"


RULES: Mapping[str, Rule] = {
    "polora-start": Rule(27, 1, 0, 0.5),
    "polora": Rule(29, 1, 0, 0.5),
    "polora-two-sided": Rule(46, 1, 0, 0.5),
    "adamw": Rule(26, 1, 0.5, 1),
    "lora-plus-4": Rule(8.7, 1, 0.5, 1),
    "lora-plus": Rule(2.6, 1, 0.5, 1),
    "altlora-plus-simultaneous": Rule(45, 1, 0.5, 1),
    "lora-rite": Rule(18, 1, 0.5, 1),
    "oplora": Rule(160, 1, 0.5, 1),
    "lora-muon": Rule(8.9, 1, 0, 1),
    "sds-lora": Rule(12, 1, 1, 1),
}
"""Fixed before anything that is not in `FITTED` was run, but for the papers' methods on CoLA and
AdamW's first sweeps on SST-2 at rank 32, which had been seen when AdamW's powers were chosen."""


UNSEEN_STUDIES = ("authors", "cifar-back", "gsm8k")
"""Tasks that no default was chosen on. Not `scaling`: its text is that of `lm`."""

UNSEEN = (
    "adamw",
    "lora-plus-4",
    "lora-plus",
    "adamw-start",
    "polora-start",
    "polora",
    "altlora-plus-simultaneous",
    "sds-lora",
    "oplora",
)
"""What runs on tasks that no rule was fitted to."""


def sweeps_by_rule(
    layers: Layers, rank: int, methods: Sequence[str] = UNSEEN
) -> dict[str, tuple[float, ...]]:
    """Returns the sweeps of methods: the rate by the rule, a third and three times it.

    Args:
        layers: What is adapted.
        rank: r of the adapters.
        methods: Names of methods that have a rule; AdamW from the gradient is swept as AdamW is.
    """
    rule_of = lambda method: RULES["adamw" if method == "adamw-start" else method]
    middles = {method: rule_of(method).rate(layers, rank) for method in methods}
    return {
        method: tuple(float(f"{factor * rate:.2g}") for factor in (1 / 3, 1.0, 3.0))
        for method, rate in middles.items()
    }


class Trial(NamedTuple):
    """A rule beside a sweep.

    Attributes:
        comparison: Name of the study and the variant.
        method: Name of the method.
        layers: What is adapted.
        rank: r of the adapters.
        best: The best rate of the sweep, between its rates by a parabola through three losses.
        is_fitted: Whether the rule was fitted to it, among others.
    """

    comparison: str
    method: str
    layers: Layers
    rank: int
    best: float
    is_fitted: bool

    @property
    def predicted(self) -> float:
        """The rate by the rule."""
        return RULES[self.method].rate(self.layers, self.rank)

    @property
    def error(self) -> float:
        """Decades by which the rule is above the best rate."""
        return math.log10(self.predicted / self.best)


def trials(studies: Mapping[str, Sequence[Variant]]) -> list[Trial]:
    """Sets every rule beside every sweep of the comparisons of the peers and of the papers.

    Args:
        studies: The variants by study.
    """
    return [
        Trial(
            f"{study}, {variant.name}".removesuffix(", "),
            summary.method,
            layers,
            config.task_options["rank"],
            best_rate(summary),
            variant.name in FITTED.get(study, ()),
        )
        for study, variant in _swept(studies)
        for summary in variant.summaries
        if summary.method in RULES and summary.best and not summary.at_edge
        for config in [summary.config]
        for layers in [layers_of(config)]
        if layers is not None
    ]


def layers_of(config: RunConfig) -> Layers | None:
    """Returns what a run adapts; None for tasks that no rule was made for."""
    options = config.task_options
    if config.task == "shakespeare":
        return DECODERS.get(options["width"])
    return ADAPTED.get((config.task, options.get("targets", "")))


POWERS = [(p, q, m) for p, q, m in itertools.product((0, 0.5, 1), repeat=3)]
"""The triples of exponents that a rule may have."""


def left_out_error(fitted: Sequence[Trial], powers: tuple[float, float, float]) -> float:
    """Predicts the best rate on each model from those on the others, by a rule of given powers.

    Args:
        fitted: Sweeps of one method.
        powers: Of 1 / n, 1 / r and 1 / d.

    Returns:
        The root of the mean square of the errors, in decades.
    """
    # log c of each sweep; a rule's is the mean.
    constants = [
        math.log10(trial.best / Rule(1.0, *powers).rate(trial.layers, trial.rank))
        for trial in fitted
    ]
    models = [(trial.layers, trial.rank) for trial in fitted]
    errors = []
    for model, own in zip(models, constants, strict=True):
        others = [x for other, x in zip(models, constants, strict=True) if other != model]
        errors.append(statistics.mean(others) - own)
    return math.sqrt(statistics.mean(error**2 for error in errors))


def best_rate(summary: MethodSummary) -> float:
    """Returns the lowest point of a parabola through a sweep's best run and its neighbours.

    The parabola is of the logarithms of loss and rate. Beside a run that did not finish, the best
    rate itself is returned.

    Args:
        summary: A sweep whose best rate is no end of it.
    """
    points = summary.sweep
    at = min(range(len(points)), key=lambda index: points[index].validation_loss)
    near = points[at - 1 : at + 2]
    if not all(math.isfinite(point.validation_loss) for point in near):
        return points[at].learning_rate
    (x0, x1, x2), (y0, y1, y2) = (
        [math.log(point.learning_rate) for point in near],
        [math.log(point.validation_loss) for point in near],
    )
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if right <= left:
        return points[at].learning_rate
    return math.exp((x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left))


def rules_table(found: Sequence[Trial]) -> str:
    """Writes a row for each rule, in Markdown.

    Args:
        found: The rules beside the sweeps.
    """
    rows = []
    for method, rule in RULES.items():
        mine = [trial for trial in found if trial.method == method]
        if not mine:
            continue
        cells = [method, rule.formula]
        for is_fitted in (True, False):
            some = [trial.error for trial in mine if trial.is_fitted == is_fitted]
            near = sum(abs(error) <= GRID_STEP for error in some)
            cells += [f"{near} of {len(some)}", _root_mean_square(some)] if some else ["–", "–"]
        fitted = [trial for trial in mine if trial.is_fitted]
        own = left_out_error(fitted, (rule.layers, rule.rank, rule.width))
        least = min(left_out_error(fitted, powers) for powers in POWERS)
        cells.insert(2, f"{own:.2f} ({least:.2f})")
        worst = max(mine, key=lambda trial: abs(trial.error))
        cells.append(f"{worst.predicted / worst.best:.2g}× ({worst.comparison})")
        rows.append(cells)
    headings = ["method", "learning rate", "left out: error (least of 27)"]
    headings += ["fitted: within a step", "error, decades", "others: within a step"]
    headings += ["error, decades", "furthest from the best rate"]
    return markdown(headings, rows)


def unseen_table(studies: Mapping[str, Sequence[Variant]]) -> str:
    """Writes what the rules reach without a sweep on the tasks of `UNSEEN_STUDIES`, in Markdown.

    Args:
        studies: The variants by study.

    Returns:
        A row for each task and method, with AdamW as it is best for the same seed; only what is
        complete. Empty if nothing is.
    """
    rows = []
    for study in UNSEEN_STUDIES:
        for variant in studies.get(study, ()):
            if not is_complete(variant, TUNED_ADAMW):
                continue
            tuned = [summary for summary in variant.summaries if summary.method in TUNED_ADAMW]
            loss, baseline = min((_lowest(each).validation_loss, each.method) for each in tuned)
            for summary in variant.summaries:
                layers, rule = layers_of(summary.config), RULES.get(summary.method)
                if layers is None or rule is None or summary.method in variant.missing:
                    continue
                rate = rule.rate(layers, summary.config.task_options["rank"])
                distance = lambda point, rate=rate: abs(math.log(point.learning_rate / rate))
                by_rule = min(summary.sweep, key=distance)
                best = _lowest(summary)
                rows.append(
                    [
                        f"[{study}]({study}.md)" + f", {variant.name}" * bool(variant.name),
                        summary.method,
                        f"{by_rule.learning_rate:g}",
                        f"{by_rule.validation_loss:.4g}",
                        f"{best.learning_rate:g}",
                        f"{best.validation_loss:.4g}",
                        f"{loss:.4g} ({baseline})",
                    ]
                )
    headings = ["task", "method", "rate by the rule", "loss", "best rate", "loss", "swept AdamW"]
    return markdown(headings, rows) if rows else ""


def _lowest(summary: MethodSummary) -> SweepPoint:
    return min(summary.sweep, key=lambda point: point.validation_loss)


def _root_mean_square(errors: Sequence[float]) -> str:
    return f"{math.sqrt(statistics.mean(error**2 for error in errors)):.2f}"


def _swept(studies: Mapping[str, Sequence[Variant]]) -> Iterator[tuple[str, Variant]]:
    """Yields study and variant of what each method runs with its own defaults in."""
    for study in sorted(studies):
        for variant in studies[study]:
            is_plain = variant.name.startswith(("peers", "papers", "rank-", "layers-"))
            if is_plain or study in (*UNSEEN_STUDIES, SCALING):
                yield study, variant
