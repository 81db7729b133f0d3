"""Pages of the documentation and the README's claim, made from the stored results alone.

Everything between the markers of a file is generated; what stands around them is kept.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from experiments.errors import ExperimentError
from experiments.figures import draw_probes, draw_variant, draw_variants
from experiments.headline import RECOMMENDED, SHOWN, Comparison, claim, compare, headline_table
from experiments.hunt import hunt_table, is_attempt
from experiments.overview_figures import (
    draw_rules,
    draw_scaling,
    draw_speedups,
    draw_stability,
)
from experiments.peers import TUNED_ADAMW
from experiments.rules import rules_table, trials, unseen_table
from experiments.scaling import MIDDLE, scaling_table, series
from experiments.scaling import STUDY as SCALING
from experiments.schema import RunResult
from experiments.stability import broken_seeds, lost_runs, ranges, stability_table
from experiments.study import Study, StudyFile, expand, load_study, study_names
from experiments.summary import (
    MethodSummary,
    difference,
    is_complete,
    summarize,
    tuned_baseline,
)
from experiments.sweep import next_run, other_setting, read_results, require_same_data
from experiments.tables import (
    comparison_table,
    markdown,
    probe_table,
    spread,
    sweep_table,
)
from experiments.why import MECHANISM, parts_table, steps_table

MARKERS = "<!-- {}: begin -->", "<!-- {}: end -->"
SPEEDUPS = "speedups.png"
HUNT = "hunt.md"
STABILITY = "stability"
RATES = "rates"
WHY = "why.md"

LEGEND = """\
Mean ± standard deviation over seeds at each method's best learning rate (chosen by the mean
final validation loss of the sweep; `*`: it is an end of the sweep). "AdamW" is LoRA with AdamW as
it is best: of the rows `adamw` (one rate), `lora-plus-4` and `lora-plus` (b 4 and 16 times as
fast), those that were run. "Fewer steps": AdamW's steps to the lowest point of its mean
validation curve, divided by the method's to the same loss, interpolated between evaluations; a
start counts as many steps as it takes gradients. In AdamW's row its own seeds are counted so: what
is no gain. A dash where evaluations are rarer than every 5 % of a run. "lr off by one": the same,
averaged over the best rate and its neighbours in the sweep; 0 for a run that does not get there. A
difference of losses is given with its pooled standard error and, in brackets, in units of it; it is
claimed only above two. With three seeds on each side chance alone gives that much in 12 of 100
cases, with five in 8 (t-test): of many differences some are chance, and none counts the finite
sample of sentences or pictures. "Time to AdamW's loss" is in units of AdamW's. "Time a step" is
measured in turn with `adamw` in the same process, and rough where other work ran beside; "memory"
is trained leaves, state and the compiled step's temporaries. "Lost": diverged or failed runs of the
sweep. A commit with "+" had changes that were not committed."""


class Variant:
    """The results of one variant, against its plan.

    Args:
        name: Name of the variant.
        study: Its plan.
        results: Its results.
    """

    def __init__(self, name: str, study: Study, results: list[RunResult]) -> None:
        self.name = name
        self.study = study
        order = list(study.learning_rates)
        self.results = sorted(
            (r for r in results if r.config.method in order),
            key=lambda r: (order.index(r.config.method), r.config.learning_rate, r.config.seed),
        )
        self.summaries = summarize(self.results)
        self.missing: Mapping[str, str] = dict(_missing(study, self.results))


def _missing(study: Study, results: Sequence[RunResult]) -> Iterator[tuple[str, str]]:
    """Yields what is still to run of each method."""
    for method in study.learning_rates:
        mine = [result for result in results if result.config.method == method]
        done = [result for result in mine if result.status != "failed"]
        if next_run(study, method, done) is not None:
            yield method, f"`{method}`" + f" ({len(mine)} runs so far)" * bool(mine)


def read_variants(file: StudyFile, results: Path) -> list[Variant]:
    """Reads a study's committed results.

    Raises:
        ExperimentError: A result cannot be read, or is of other settings than the study's, or
            results of one variant are of different data.
    """
    found = read_results(results / file.name)
    plans = expand(file.study, {}, [])
    for result in found:
        config, study = result.config, plans.get(result.config.variant)
        other = other_setting(result, file.name, study) if study else "variant than the study's"
        if other:
            raise ExperimentError(
                f"{results / file.name / config.file_name()} has another {other}: move it away, "
                "or run the study again"
            )
    variants = []
    for name, study in plans.items():
        mine = [result for result in found if result.config.variant == name]
        if mine:
            require_same_data(mine, results / file.name)
            variants.append(Variant(name, study, mine))
    return variants


def study_page(file: StudyFile, variants: Sequence[Variant]) -> str:
    """Writes the generated part of a study's page; attempts have a page of their own."""
    variants = [variant for variant in variants if not is_attempt(variant.name)]
    parts = [_provenance(variants), LEGEND]
    if file.study.variant_axis:
        parts.append(f"![Loss by variant]({file.name}.png)")
    if file.name == SCALING and (found := series(variants)):
        parts += [f"![Steps and losses by size]({SCALING}.png)", scaling_table(found)]
    for variant in variants:
        if variant.name:
            parts.append(f"## {variant.name}")
        if variant.missing:
            parts.append(
                "**Not complete.** Still to run: " + ", ".join(variant.missing.values()) + "."
            )
        parts.append(comparison_table(variant.summaries))
        parts.append(f"![Loss curves and sweep]({_figure_name(file, variant)})")
        if probes := probe_table(variant.summaries):
            parts += [
                "Gradients and steps, means over the run and over the adapted layers:",
                probes,
            ]
            parts.append(f"![Gradients and steps]({_figure_name(file, variant, 'probes')})")
        seeds = len(variant.study.first_seeds)
        of_what = f"mean of the first {seeds} seeds" if seeds > 1 else "first seed"
        parts.append(f"Final validation loss by learning rate, {of_what}:")
        parts.append(sweep_table(variant.summaries))
    return "\n\n".join(parts)


def _figure_name(file: StudyFile, variant: Variant, what: str = "curves") -> str:
    return "-".join(part for part in (file.name, variant.name, what) if part) + ".png"


def _provenance(variants: Sequence[Variant]) -> str:
    runs = [result for variant in variants for result in variant.results]
    seconds = sum(run.wall_seconds for run in runs)
    machines = Counter(
        f"{run.environment.device}, {run.environment.cpu_count} cores, Python "
        f"{run.environment.python}, "
        + ", ".join(f"{k} {run.environment.packages[k]}" for k in ("jax", "flax", "optax"))
        for run in runs
    )
    commits = {
        (run.environment.git_commit or "unknown")[:8] + "+" * bool(run.environment.git_dirty)
        for run in runs
    }
    states = Counter(run.status for run in runs)
    return (
        f"{len(runs)} runs ({', '.join(f'{n} {state}' for state, n in sorted(states.items()))}), "
        f"{seconds / 60:.0f} minutes in all. Machine: {'; '.join(sorted(machines))}. "
        f"Code: {', '.join(sorted(commits))}."
    )


def index_block(studies: Mapping[str, Sequence[Variant]]) -> str:
    """Writes the table of all studies: one row for every variant that AdamW belongs to."""
    rows = []
    for name, variants in studies.items():
        for variant in variants:
            is_compared = bool(set(TUNED_ADAMW) & set(variant.study.learning_rates))
            if is_attempt(variant.name) or not is_compared:
                continue
            label = f"[{name}]({name}.md)" + f", {variant.name}" * bool(variant.name)
            state = f"{len(variant.missing)} methods incomplete" if variant.missing else "complete"
            rows.append([label, *_verdicts(variant.summaries), state])
    headings = ["study", "AdamW's loss", "claimed better", "within noise", "claimed worse", "runs"]
    text = (
        "Each method at its own best learning rate, final loss (on the test where there is one) "
        "against LoRA with tuned AdamW; a difference is claimed above twice its pooled standard "
        "error."
    )
    return f"{text}\n\n{markdown(headings, rows)}"


def headline_block(comparisons: Sequence[Comparison]) -> str:
    """Writes the table of the peers."""
    text = (
        f"Fewer steps than tuned AdamW's to its best validation loss, mean ± standard deviation "
        f"over seeds, and the difference of the final losses. A start from the gradient counts as "
        f"many steps as it takes gradients. Each seed counts from its first evaluation below that "
        f'loss, which favours noisy curves; "its mean curve" is free of that. The last of '
        f"{len(SHOWN)} methods trains all weights. Losses are those on the test where there is one;"
        " where a difference is not seen on validation too, it may be the test sample's."
    )
    return f"{text}\n\n{headline_table(comparisons)}" if comparisons else text


def counted_comparisons(studies: Mapping[str, Sequence[Variant]]) -> list[Comparison]:
    """Returns what is complete of the comparisons with AdamW as it is tuned in two dimensions.

    One task at eight sizes would outweigh the others: of `SCALING` the middle counts.
    """
    found = [
        compare(f"{name}, {variant.name}".removesuffix(", "), name, variant.summaries)
        for name, variants in studies.items()
        for variant in variants
        if name != SCALING or variant.name == MIDDLE
        if is_complete(variant, [RECOMMENDED, *TUNED_ADAMW])
    ]
    return [comparison for comparison in found if comparison is not None]


def _verdicts(summaries: Sequence[MethodSummary]) -> list[str]:
    base = tuned_baseline(summaries)
    if base is None:
        return ["not run", "", "", ""]
    split = base.reported_split
    groups: dict[str, list[str]] = {"better": [], "same": [], "worse": []}
    for summary in summaries:
        if summary is base:
            continue
        if not summary.best:
            groups["worse"].append(f"{summary.method} (none finished)")
            continue
        found = difference(summary.losses(split), base.losses(split))
        if found.error is None:
            continue
        side = ("better" if found.value < 0 else "worse") if found.claimed else "same"
        groups[side].append(summary.method)
    loss = f"{spread(base.losses(split))} ({base.method})"
    return [loss, *(", ".join(names) for names in groups.values())]


def replace_block(text: str, block: str, name: str, marker: str = "results") -> str:
    """Puts a generated block between the markers of a text.

    Raises:
        ExperimentError: The text lacks the markers, or has them more than once.
    """
    begin, end = (mark.format(marker) for mark in MARKERS)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ExperimentError(f"{name} must hold {begin!r} and {end!r} once each")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{block}\n{end}{tail}"


def make_pages(results: Path, docs: Path, readme: Path) -> dict[Path, str]:
    """Writes, in memory, every file that follows from the results.

    Args:
        results: Folder with one folder of results a study.
        docs: Folder of the pages.
        readme: The README.

    Returns:
        The contents by path.

    Raises:
        ExperimentError: Results are unreadable or of other settings, or a folder of results is of
            no study.
    """
    pages, studies = {}, {}
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if folder.name not in study_names():
            raise ExperimentError(f"{folder} holds results of no study: move it away")
    for file, variants in _studies(results):
        studies[file.name] = variants
        path = docs / f"{file.name}.md"
        title = file.description.splitlines()[0]
        text = path.read_text() if path.exists() else _empty_page(title)
        pages[path] = replace_block(text, study_page(file, variants), str(path))
    if hunted := hunt_table(studies):
        path = docs / HUNT
        text = path.read_text() if path.exists() else _empty_page("Hunt")
        pages[path] = replace_block(text, hunted, str(path))
    if found := ranges(studies):
        path = docs / f"{STABILITY}.md"
        text = path.read_text() if path.exists() else _empty_page("Stability")
        table = stability_table(found, lost_runs(studies), broken_seeds(studies))
        figure = f"![Width of the range of good learning rates, by method]({STABILITY}.png)"
        pages[path] = replace_block(text, f"{figure}\n\n{table}", str(path))
    if tried := trials(studies):
        path = docs / f"{RATES}.md"
        text = path.read_text() if path.exists() else _empty_page("Learning rates")
        figure = f"![Best learning rates of the sweeps against those by the rules]({RATES}.png)"
        block = "\n\n".join(filter(None, [rules_table(tried), figure, unseen_table(studies)]))
        pages[path] = replace_block(text, block, str(path))
    if (parts := parts_table(studies)) and (steps := steps_table(studies.get(MECHANISM, ()))):
        path = docs / WHY
        text = path.read_text() if path.exists() else _empty_page("Why", "parts", "steps")
        text = replace_block(text, parts, str(path), "parts")
        pages[path] = replace_block(text, steps, str(path), "steps")
    index = docs / "README.md"
    comparisons = counted_comparisons(studies)
    text = index.read_text() if index.exists() else _empty_page("Results", "headline", "results")
    text = replace_block(text, headline_block(comparisons), str(index), "headline")
    pages[index] = replace_block(text, index_block(studies), str(index))
    if readme.exists():
        text = readme.read_text()
        pages[readme] = replace_block(text, claim(comparisons), str(readme), "claim")
    return pages


def _studies(results: Path) -> Iterator[tuple[StudyFile, list[Variant]]]:
    for name in study_names():
        if (results / name).is_dir():
            file = load_study(name)
            variants = read_variants(file, results)
            if variants:
                yield file, variants


def _empty_page(title: str, *markers: str) -> str:
    blocks = ["\n".join(mark.format(name) for mark in MARKERS) for name in markers or ("results",)]
    return "\n\n".join([f"# {title}", *blocks]) + "\n"


def write_pages(pages: Mapping[Path, str]) -> list[Path]:
    """Writes the pages that changed, each in one atomic step, and returns their paths."""
    changed = [
        path for path, text in pages.items() if not path.exists() or path.read_text() != text
    ]
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(pages[path])
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return changed


def draw_pages(results: Path, docs: Path) -> list[Path]:
    """Draws every figure of the pages, and returns their paths."""
    drawn: list[Path] = []

    def draw(function: Callable[..., None], found: object, title: str, name: str) -> None:
        drawn.append(docs / name)
        function(found, title, drawn[-1])

    studies = {file.name: variants for file, variants in _studies(results)}
    if comparisons := counted_comparisons(studies):
        draw(draw_speedups, comparisons, "Fewer steps than tuned AdamW", SPEEDUPS)
    if found := ranges(studies):
        draw(draw_stability, found, "How forgiving each method is", f"{STABILITY}.png")
    if tried := trials(studies):
        draw(draw_rules, tried, "Learning rates by rule and by sweep", f"{RATES}.png")
    if grown := series(studies.get(SCALING, ())):
        draw(draw_scaling, grown, "What grows with width, rank and steps", f"{SCALING}.png")
    for file, variants in _studies(results):
        if file.study.variant_axis:
            by_variant = {variant.name: variant.summaries for variant in variants}
            draw(draw_variants, by_variant, file.study.variant_axis, f"{file.name}.png")
        for variant in variants:
            if is_attempt(variant.name):
                continue
            steps = variant.results[0].config.plan.steps
            title = f"{file.name} {variant.name}".strip() + f", {steps} steps"
            draw(draw_variant, variant.summaries, title, _figure_name(file, variant))
            if probe_table(variant.summaries):
                draw(draw_probes, variant.summaries, title, _figure_name(file, variant, "probes"))
    return drawn


def check_pages(pages: Mapping[Path, str]) -> list[str]:
    """Says what is not as it follows from the results; figures only have to be there."""
    wrong = [
        f"{path} does not follow from the results"
        for path, text in pages.items()
        if not path.exists() or path.read_text() != text
    ]
    for path, text in pages.items():
        for line in text.splitlines():
            if line.startswith("![") and line.endswith(".png)"):
                figure = path.parent / line[line.index("](") + 2 : -1]
                if not figure.exists():
                    wrong.append(f"{figure} is missing")
    return wrong
