"""The tasks, by name."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiments.errors import ExperimentError
from experiments.tasks.base import OnStep, Task, TaskOptions
from experiments.tasks.digits import Digits, DigitsOptions
from experiments.tasks.sst2 import SST2, SST2Options

OPTIONS: dict[str, type[TaskOptions]] = {"digits": DigitsOptions, "sst2": SST2Options}


def parse_options(name: str, options: dict[str, Any]) -> TaskOptions:
    """Checks a task's options.

    Raises:
        ExperimentError: There is no such task or option, or a value does not fit.
    """
    if name not in OPTIONS:
        raise ExperimentError(f"unknown task {name!r}; there are: {', '.join(OPTIONS)}")
    try:
        return OPTIONS[name].model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(OPTIONS[name].model_fields)
        raise ExperimentError(
            f"task_options.{'.'.join(map(str, first['loc']))}: {first['msg']} "
            f"(options of task {name!r}: {known})"
        ) from error


def load_task(
    name: str, options: dict[str, Any], data_dir: Path | None, on_step: OnStep
) -> Task[Any]:
    """Builds a task, with its data and its pretrained weights.

    Args:
        name: Name of the task.
        options: Its options; the rest keep their defaults.
        data_dir: Folder with the data, for tasks whose data does not come with a package.
        on_step: Called after each step of a pretraining.

    Returns:
        The task, ready to train.

    Raises:
        ExperimentError: Unknown task or option, or data or weights that are not there.
    """
    parsed = parse_options(name, options)
    if isinstance(parsed, SST2Options):
        return SST2(parsed, data_dir)
    if data_dir is not None:
        raise ExperimentError(f"task {name!r} takes no --data-dir: its data come with scikit-learn")
    assert isinstance(parsed, DigitsOptions)
    return Digits(parsed, on_step)
