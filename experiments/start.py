"""The option `start` of a method: adapters that start from the gradient of the first batches."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from experiments.errors import ExperimentError, first_problem
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
