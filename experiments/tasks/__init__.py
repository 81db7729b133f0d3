"""The tasks, by name; each is imported when it is asked for, with the packages that it needs."""

import importlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiments.errors import ExperimentError, first_problem
from experiments.task import OnStep, Task, TaskOptions

TASKS = {
    "authors": "authors.Authors",
    "books": "books.Books",
    "cifar": "cifar.Cifar",
    "cifar-back": "cifar.CifarBack",
    "cifar-transfer": "cifar.CifarTransfer",
    "cifar100": "cifar100.CIFAR100",
    "cola": "cola.CoLA",
    "conditioning": "conditioning.Conditioning",
    "digits": "digits.Digits",
    "gsm8k": "gsm8k.GSM8K",
    "linear": "linear.Linear",
    "lm": "lm.LM",
    "mnist": "mnist.MNIST",
    "mnli": "mnli.MNLI",
    "shakespeare": "shakespeare.Shakespeare",
    "sst2": "sst2.SST2",
}
"""Module and class of every task."""


def option_names(name: str) -> list[str]:
    """Returns the names of a task's options.

    Raises:
        ExperimentError: There is no such task.
    """
    return list(_find(name).options_type.model_fields)


def parse_options(name: str, options: dict[str, Any]) -> TaskOptions:
    """Checks a task's options.

    Raises:
        ExperimentError: There is no such task or option, or a value does not fit.
    """
    kind = _find(name).options_type
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise ExperimentError(
            f"task_options.{first_problem(error)} "
            f"(options of task {name!r}: {', '.join(kind.model_fields)})"
        ) from error


def require_model_option(name: str) -> None:
    """Refuses tasks whose model cannot be chosen.

    Raises:
        ExperimentError: There is no such task, or it has no option `model`.
    """
    if "model" not in option_names(name):
        others = [task for task in TASKS if "model" in option_names(task)]
        raise ExperimentError(
            f"task {name!r} has a model of its own and takes no --model; these take one, as --task:"
            f" {', '.join(others)}"
        )


def check_task(name: str, options: dict[str, Any]) -> None:
    """Checks what can be known of a task before its data and its weights are loaded.

    Raises:
        ExperimentError: Unknown task or option, or a model that is not there or of another kind.
    """
    _find(name).check(parse_options(name, options))


def _find(name: str) -> type[Task[Any]]:
    if name not in TASKS:
        raise ExperimentError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    module, kind = TASKS[name].split(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)


def load_task(
    name: str, options: dict[str, Any], data_dir: Path | None, on_step: OnStep
) -> Task[Any]:
    """Builds a task, with its data and its pretrained weights.

    Args:
        name: Name of the task.
        options: Its options; the rest keep their defaults.
        data_dir: Folder that holds the data sets as `sst2`, `mnist`, …, or the task's data itself.
        on_step: Called after each step of a pretraining.

    Returns:
        The task, ready to train.

    Raises:
        ExperimentError: Unknown task or option, or data or weights that are not there.
    """
    return _find(name)(parse_options(name, options), data_dir, on_step)
