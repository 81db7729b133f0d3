"""The tasks, by name."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiments.errors import ExperimentError
from experiments.task import OnStep, Task, TaskOptions
from experiments.tasks.cifar import Cifar, CifarTransfer
from experiments.tasks.cifar100 import CIFAR100
from experiments.tasks.cola import CoLA
from experiments.tasks.conditioning import Conditioning
from experiments.tasks.digits import Digits
from experiments.tasks.gsm8k import GSM8K
from experiments.tasks.linear import Linear
from experiments.tasks.lm import LM
from experiments.tasks.mnist import MNIST
from experiments.tasks.mnli import MNLI
from experiments.tasks.sst2 import SST2

_ALL: tuple[type[Task[Any]], ...] = (
    Cifar,
    CIFAR100,
    CifarTransfer,
    CoLA,
    Conditioning,
    Digits,
    GSM8K,
    Linear,
    LM,
    MNIST,
    MNLI,
    SST2,
)
TASKS = {task.name: task for task in _ALL}


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
        first = error.errors()[0]
        raise ExperimentError(
            f"task_options.{'.'.join(map(str, first['loc']))}: {first['msg']} "
            f"(options of task {name!r}: {', '.join(kind.model_fields)})"
        ) from error


def _find(name: str) -> type[Task[Any]]:
    if name not in TASKS:
        raise ExperimentError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    return TASKS[name]


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
    return TASKS[name](parse_options(name, options), data_dir, on_step)
