"""What the trainer asks of a task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from flax import nnx
from pydantic import BaseModel, ConfigDict

from experiments.errors import ExperimentError

Batch = dict[str, np.ndarray]
OnStep = Callable[[int, int], None]
"""Called after each step of something long, with the steps done and the steps in all."""


def ignore_steps(done: int, total: int) -> None:
    """Does nothing: for callers without a progress bar."""


class TaskOptions(BaseModel):
    """Base of a task's options: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


OptionsT = TypeVar("OptionsT", bound=TaskOptions)


class Totals(NamedTuple):
    """Sums over a batch. Divided by `weight` they are the mean loss and the accuracy."""

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array


class Task(ABC, Generic[OptionsT]):
    """A model to adapt and the data to adapt it to.

    Subclasses set `name` and say which options they take. The expensive things (weights, data)
    belong in the constructor, so that all runs of a study share them.
    """

    name: ClassVar[str]

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    @abstractmethod
    def build_model(self, seed: int) -> nnx.Module:
        """Returns the pretrained model with fresh adapters and a fresh head from `seed`."""

    @property
    @abstractmethod
    def head(self) -> nnx.filterlib.Filter:
        """Which parameters besides those of the method are trained: the new head."""

    @abstractmethod
    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields batches without end, in an order that `seed` fixes."""

    @abstractmethod
    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns the batches of a split, all of one shape."""

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


def classification_totals(logits: jax.Array, batch: Batch) -> Totals:
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


def padded_batches(examples: Batch, batch_size: int) -> list[Batch]:
    """Cuts `examples` into batches of one shape; the fill of the last one has weight 0."""
    count = len(examples["label"])
    batches = []
    for start in range(0, count, batch_size):
        chosen = np.arange(start, start + batch_size)
        batch = {name: values[np.minimum(chosen, count - 1)] for name, values in examples.items()}
        batches.append(batch | {"weight": (chosen < count).astype(np.float32)})
    return batches
