"""The options of a method in a study; `start` has adapters start from gradient or weights."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from experiments.errors import ExperimentError, first_problem
from experiments.methods import get_method
from experiments.schema import Record


class NoStartError(ExperimentError):
    """A model's adapters cannot start as their method says.

    Args:
        message: Why.
        model: The model, its adapters as usual.
    """

    def __init__(self, message: str, model: Any) -> None:
        super().__init__(message)
        self.model = model


class Start(Record):
    """A start of the adapters from the gradient of the first batches; see `nn.gradient_start`.

    Attributes:
        method: Which start.
        gamma: The larger, the smaller the start.
        keep_function: Whether the kernels are corrected so that the model computes what it did.
        batches: How many batches.
        iterations: Rounds of power iteration.
    """

    method: Literal["lora_one", "lora_ga", "frames"] = "lora_one"
    gamma: float = Field(default=128.0, gt=0)
    keep_function: bool = False
    batches: int = Field(default=1, gt=0)
    iterations: int = Field(default=0, ge=0)

    @property
    def gradients(self) -> int:
        """Returns how many gradients of a batch the start takes."""
        blocks = 2 if self.method == "lora_ga" else 1
        return blocks * (2 + 2 * self.iterations) * self.batches


class WeightStart(Record):
    """A start of the adapters from the kernels, which it corrects; see `nn.weight_start`.

    Attributes:
        method: Which start.
    """

    method: Literal["pissa", "pissa_fast", "olora"]

    @property
    def keep_function(self) -> bool:
        """True: the model computes what it did."""
        return True

    @property
    def gradients(self) -> int:
        """Returns 0: it needs no batch."""
        return 0


_OF_WEIGHTS = get_args(WeightStart.model_fields["method"].annotation)


def parse_start(values: Mapping[str, Any]) -> Start | WeightStart:
    """Checks the option `start` of a method.

    Raises:
        ExperimentError: There is no such setting, or a value does not fit.
    """
    kind = WeightStart if values.get("method") in _OF_WEIGHTS else Start
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ExperimentError(
            f"start.{first_problem(error)} (settings of a start: {', '.join(kind.model_fields)})"
        ) from error


def gradients_of(options: Mapping[str, Any]) -> int:
    """Returns how many gradients a run's start took, from the method's options as stored.

    Args:
        options: The options.
    """
    if "start" not in options:
        return 0
    start = options["start"]
    if start["method"] in _OF_WEIGHTS:
        return 0
    return Start.model_validate(start).gradients


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
