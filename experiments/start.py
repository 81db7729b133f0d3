"""The options of a method in a study; `start` has adapters start from the gradient."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from experiments.errors import ExperimentError, first_problem
from experiments.methods import get_method
from experiments.schema import Record


class Start(Record):
    """A start of the adapters from the gradient of the first batches; see `nn.gradient_start`.

    Attributes:
        method: Which start.
        gamma: The larger, the smaller the start.
        keep_function: Whether the kernels are corrected so that the model computes what it did.
        batches: How many batches.
    """

    method: Literal["lora_one", "lora_ga", "frames"] = "lora_one"
    gamma: float = Field(default=128.0, gt=0)
    keep_function: bool = False
    batches: int = Field(default=8, gt=0)


def parse_start(values: Mapping[str, Any]) -> Start:
    """Checks the option `start` of a method.

    Raises:
        ExperimentError: There is no such setting, or a value does not fit.
    """
    try:
        return Start.model_validate(values)
    except ValidationError as error:
        raise ExperimentError(
            f"start.{first_problem(error)} (settings of a start: {', '.join(Start.model_fields)})"
        ) from error


def options_of(method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a method's options as results store them, those of its start complete.

    Args:
        method: Name of the method.
        changes: What a study changes of them.

    Raises:
        ExperimentError: There is no such method, or its start is not one.
    """
    options = {**get_method(method).options, **changes}
    if "start" in options:
        options["start"] = parse_start(options["start"]).model_dump()
    return options
