"""Studies: what is compared, as data. A study file holds overrides of one `Study` only."""

import importlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import Field, NonNegativeInt, ValidationError, field_validator

from experiments import studies
from experiments.catalogue import study_names
from experiments.errors import ExperimentError, first_problem
from experiments.methods import METHODS, get_method
from experiments.schema import Plan, Record
from experiments.tasks import option_names, parse_options


class Study(Record):
    """A comparison of methods on one task.

    Attributes:
        task: Name of the task.
        task_options: Options of the task that differ from its defaults.
        plan: Steps and schedule, the same for all methods.
        learning_rates: The methods and the peak learning rates that each is swept over.
        method_options: What differs from the methods' own options, by method.
        seeds: The sweep runs with the first ones; the best learning rate of each method, by mean
            final validation loss, then runs with the others.
        sweep_seeds: With how many seeds a sweep runs: more than one where the validation split is
            so small that a seed's luck would choose the rate.
        extensions: By how many rates a sweep may grow whose best is an end of it.
        variants: Under which further changes (see `override`) all this is repeated, by name; none
            for one comparison without a name.
        variant_axis: What the variants are a series of, for a figure along it; none if empty.
    """

    task: str
    task_options: dict[str, Any] = Field(default_factory=dict)
    plan: Plan
    learning_rates: dict[str, tuple[float, ...]] = Field(min_length=1)
    method_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0,), min_length=1)
    sweep_seeds: int = Field(default=1, ge=1)
    extensions: int = Field(default=4, ge=0)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    variant_axis: str = ""

    @field_validator("learning_rates")
    @classmethod
    def _check_rates(cls, value: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        for method, rates in value.items():
            if not rates or any(not rate > 0 for rate in rates):
                raise ValueError(f"{method} needs positive learning rates, got {rates}")
        return {method: tuple(sorted(rates)) for method, rates in value.items()}

    def runs(self) -> int:
        """Returns how many runs one variant takes if no sweep grows."""
        sweep = sum(map(len, self.learning_rates.values())) * len(self.first_seeds)
        return sweep + len(self.learning_rates) * (len(self.seeds) - len(self.first_seeds))

    @property
    def first_seeds(self) -> tuple[int, ...]:
        """The seeds of the sweep."""
        return self.seeds[: self.sweep_seeds]


class StudyFile(NamedTuple):
    """What a file of `experiments/studies/` gives."""

    name: str
    description: str
    study: Study
    smoke: Mapping[str, Any]


def load_study(name: str) -> StudyFile:
    """Loads a study by name.

    Raises:
        ExperimentError: There is no such study; the message lists those there are.
    """
    if name not in study_names():
        raise ExperimentError(f"unknown study {name!r}; there are: {', '.join(study_names())}")
    module = importlib.import_module(f"{studies.__name__}.{name.replace('-', '_')}")
    return StudyFile(name, (module.__doc__ or "").strip(), module.STUDY, module.SMOKE)


def override(study: Study, changes: Mapping[str, Any]) -> Study:
    """Returns the study with some values changed.

    Args:
        study: The study.
        changes: New values by dotted key, such as `{"plan.steps": 100, "seeds": [0, 1]}`.

    Raises:
        ExperimentError: There is no such key, or the value does not fit; the message says which.
    """
    values = study.model_dump()
    known = [
        *(f"plan.{key}" for key in values["plan"]),
        *(f"learning_rates.{key}" for key in values["learning_rates"]),
        *(f"method_options.{key}" for key in values["learning_rates"]),
        *(f"task_options.{key}" for key in option_names(study.task)),
        *("learning_rates", "seeds", "sweep_seeds", "extensions"),
    ]
    # A variant may set options of a method of its own, which a smaller set then leaves out.
    options = {f"method_options.{method}" for method in METHODS}
    for key, value in changes.items():
        if key not in known and key not in options:
            raise ExperimentError(f"unknown override {key!r}; there are: {', '.join(known)}")
        group, _, name = key.partition(".")
        if name:
            values[group][name] = value
        else:
            values[group] = value
    try:
        changed = Study.model_validate(values)
    except ValidationError as error:
        raise ExperimentError(first_problem(error)) from error
    for method in changed.learning_rates:
        get_method(method)
    parse_options(changed.task, changed.task_options)
    return changed


def expand(study: Study, changes: Mapping[str, Any], chosen: list[str]) -> dict[str, Study]:
    """Takes a study apart into its variants.

    Args:
        study: The study.
        changes: Changes to all variants; they go before a variant's own.
        chosen: Names of the variants wanted; empty for all.

    Returns:
        One study without variants for each of the variants, by name.

    Raises:
        ExperimentError: There is no such variant, or a change does not fit.
    """
    plain = study.model_copy(update={"variants": {}})
    variants = study.variants or {"": {}}
    for name in chosen:
        if name not in variants:
            raise ExperimentError(
                f"unknown variant {name!r}; there are: {', '.join(variants) or 'none'}"
            )
    return {
        name: override(plain, {**own, **changes})
        for name, own in variants.items()
        if not chosen or name in chosen
    }


def with_task(study: Study, task: str) -> Study:
    """Returns a study of another task, with the task's own defaults and no variants."""
    return study.model_copy(update={"task": task, "task_options": {}, "variants": {}})


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Parses `key=value` texts; a value that is not JSON is taken as a string.

    Raises:
        ExperimentError: A text has no `=`.
    """
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ExperimentError(f"--override {text!r} is not of the form key=value")
        try:
            changes[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            changes[key.strip()] = value
    return changes


def select(study: Study, methods: list[str], learning_rates: list[float]) -> Study:
    """Narrows a study to some methods, or replaces its sweep by given learning rates.

    Raises:
        ExperimentError: Unknown method, or one that the study has no learning rates for.
    """
    chosen = {}
    for method in methods or list(study.learning_rates):
        get_method(method)
        rates = tuple(learning_rates) or study.learning_rates.get(method)
        if not rates:
            raise ExperimentError(
                f"the study has no learning rates for {method!r} (it has: "
                f"{', '.join(study.learning_rates)}); pass --learning-rate"
            )
        chosen[method] = rates
    extensions = 0 if learning_rates else study.extensions
    return override(study, {"learning_rates": chosen, "extensions": extensions})
