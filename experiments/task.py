"""What the trainer asks of a task."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from pydantic import BaseModel, ConfigDict

from experiments.adapters import Adapters
from lowrank_optax import nn

Batch = dict[str, np.ndarray]
OnStep = Callable[[int, int], None]
"""Called after each step of something long, with the steps done and the steps in all."""


def ignore_steps(done: int, total: int) -> None:
    """Does nothing: for callers without a progress bar."""


class TaskOptions(BaseModel):
    """Base of a task's options, with those of the adapters: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = 8
    alpha: float = 16.0
    targets: str

    @property
    def lora(self) -> nn.LoRAConfig:
        """The settings of the adapters."""
        return nn.LoRAConfig(rank=self.rank, alpha=self.alpha)


OptionsT = TypeVar("OptionsT", bound=TaskOptions)


class Totals(NamedTuple):
    """Sums over a batch.

    Attributes:
        loss: Of the examples that count; divided by `weight` it is the mean loss.
        correct: How many were right, or None where nothing is right or wrong.
        weight: How many examples (or tokens) count.
        confusion: How often each class (row) was taken for each (column), where the task's score
            needs it.
    """

    loss: jax.Array
    correct: jax.Array | None
    weight: jax.Array
    confusion: jax.Array | None = None

    def matthews(self) -> float | None:
        """Returns Matthews' correlation of two classes; 0 where only one is ever answered."""
        if self.confusion is None:
            return None
        (tn, fp), (fn, tp) = self.confusion
        margins = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return float((tp * tn - fp * fn) / margins) if margins else 0.0


class Task(ABC, Generic[OptionsT]):
    """A model to adapt and the data to adapt it to.

    Subclasses set `name` and `options_type`. The expensive things (weights, data) belong in the
    constructor, so that all runs of a study share them. All constructors take the same arguments.

    Args:
        options: Sizes.
        data_dir: Folder with the data, see `data_folder`; None where the task gets them itself.
        on_step: Called after each step of a pretraining.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[TaskOptions]]

    def __init__(
        self, options: OptionsT, data_dir: Path | None = None, on_step: OnStep = ignore_steps
    ) -> None:
        self.options = options

    @classmethod
    def check(cls, options: OptionsT) -> None:
        """Raises what can be known to be wrong before data and weights are loaded."""

    @abstractmethod
    def build_model(self, seed: int, adapters: Adapters) -> nnx.Module:
        """Returns the pretrained model with fresh adapters and a fresh head from `seed`.

        The random draws of the head do not depend on the kind of adapters.
        """

    @property
    @abstractmethod
    def head(self) -> nnx.filterlib.Filter:
        """Which parameters besides those of the method are trained: the new head."""

    @abstractmethod
    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields batches without end, in an order that `seed` fixes."""

    @abstractmethod
    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns the batches of a split. What runs on batches is compiled for each shape."""

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The splits there are; "validation" always, "test" where there is one."""

    @property
    @abstractmethod
    def data(self) -> dict[str, str]:
        """What identifies the data, for the record."""

    @abstractmethod
    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns loss and correct answers of one batch, summed over the examples that count."""

    def solved(self, model: Any, split: str) -> float | None:
        """Returns the share of problems that generated answers solve; None if there are none."""
        return None
