"""What the trainer asks of a task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from flax import nnx
from pydantic import BaseModel, ConfigDict

from experiments.adapters import Adapters
from experiments.errors import ExperimentError

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


def data_folder(data_dir: Path, name: str) -> Path:
    """Returns the folder of one data set: `data_dir/name` where that is there, else `data_dir`."""
    return data_dir / name if (data_dir / name).is_dir() else data_dir


def classification_totals(logits: jax.Array, batch: Mapping[str, Any]) -> Totals:
    """Cross entropy and accuracy of `batch["label"]`, weighted by `batch["weight"]`."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    hits = (logits.argmax(axis=-1) == batch["label"]).astype(losses.dtype)
    weight = batch["weight"]
    return Totals((losses * weight).sum(), (hits * weight).sum(), weight.sum())


def shuffled_batches(examples: Batch, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yields batches of `examples` for ever, reshuffled every epoch; an odd rest is left out."""
    count = len(examples["label"])
    if batch_size > count:
        raise ExperimentError(f"batch_size {batch_size} is above the {count} training examples")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: values[chosen] for name, values in examples.items()}
            yield batch | {"weight": np.ones(batch_size, np.float32)}


def shuffled_batches_by_length(
    examples: Batch, lengths: np.ndarray, batch_size: int, seed: int, pool: int = 16
) -> Iterator[Batch]:
    """As `shuffled_batches`, but among each `pool` of them examples of like length are together.

    Args:
        examples: Arrays over examples.
        lengths: Of each example.
        batch_size: Examples a batch.
        seed: Fixes the order.
        pool: How many batches are drawn before they are sorted.

    Yields:
        The batches of a pool, in random order.
    """
    size = batch_size * max(1, min(pool, len(lengths) // batch_size))
    rng = np.random.default_rng(seed)
    for drawn in shuffled_batches(examples | {"length": lengths}, size, seed):
        order = np.argsort(drawn.pop("length"), kind="stable").reshape(-1, batch_size)
        for chosen in rng.permutation(order):
            yield {name: values[chosen] for name, values in drawn.items()}


def padded_batches(examples: Batch, batch_size: int) -> list[Batch]:
    """Cuts `examples` into batches of one shape; the fill of the last one has weight 0."""
    count = len(examples["label"])
    batches = []
    for start in range(0, count, batch_size):
        chosen = np.arange(start, start + batch_size)
        batch = {name: values[np.minimum(chosen, count - 1)] for name, values in examples.items()}
        batches.append(batch | {"weight": (chosen < count).astype(np.float32)})
    return batches
