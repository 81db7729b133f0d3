"""What the tasks on images share: reading their files, splits, batches and scores."""

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments.errors import ExperimentError
from experiments.task import Batch, Task, TaskOptions, Totals
from experiments.tasks.data import (
    classification_totals,
    data_folder,
    padded_batches,
    shuffled_batches,
)

EVAL_BATCH = 500


class ImageOptions(TaskOptions):
    """Sizes of the batches and of the splits.

    Attributes:
        batch_size: Images a step.
        validation_size: Training images split off to choose learning rates on.
        test_limit: Test images, drawn at random; all of them if None.
    """

    batch_size: int = 64
    validation_size: int = 2000
    test_limit: int | None = None


ImageOptionsT = TypeVar("ImageOptionsT", bound=ImageOptions)


class ImageTask(Task[ImageOptionsT]):
    """Classification of images: subclasses set `examples` by split."""

    examples: dict[str, Batch]

    @property
    def splits(self) -> tuple[str, ...]:
        """Learning rates are chosen on validation, the test is only reported."""
        return tuple(split for split in self.examples if split != "train")

    @property
    def data(self) -> dict[str, str]:
        """Sizes and digests of the splits."""
        return {
            name: f"{len(split['label'])} images, {digest(split['image'], split['label'])}"
            for name, split in self.examples.items()
        }

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields shuffled training batches for ever."""
        return shuffled_batches(self.examples["train"], self.options.batch_size, seed)

    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns the batches of a split."""
        return padded_batches(self.examples[split], EVAL_BATCH)

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns cross entropy and correct answers."""
        return classification_totals(model(batch["image"]), batch)


def digest(*arrays: np.ndarray) -> str:
    """Returns the beginning of the SHA-256 of arrays."""
    return "sha256 " + hashlib.sha256(b"".join(map(bytes, arrays))).hexdigest()[:12]


def read_npz(
    data_dir: Path | None, folder: str, file: str, keys: Sequence[str], source: str
) -> Any:
    """Reads arrays of a NumPy archive.

    Args:
        data_dir: As `Task` takes it.
        folder: Name of the data set's folder.
        file: Name of the archive in it.
        keys: The arrays wanted.
        source: Where a user finds it, for the message.

    Returns:
        The arrays by key.

    Raises:
        ExperimentError: No folder is given, the file is missing or damaged, or lacks an array.
    """
    remedy = f"--data-dir must name a folder that holds {folder}/{file}: {source}"
    if data_dir is None:
        raise ExperimentError(remedy)
    path = data_folder(data_dir, folder) / file
    if not path.is_file():
        raise ExperimentError(f"{path} does not exist; {remedy}")
    try:
        with np.load(path) as archive:
            return {key: archive[key] for key in keys}
    except KeyError as error:
        raise ExperimentError(f"{path}: {error.args[0]}; {remedy}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ExperimentError(f"{path} is damaged ({error}); fetch it again. {remedy}") from error


def split_off(examples: Batch, size: int, seed: int) -> tuple[Batch, Batch]:
    """Splits examples at random.

    Args:
        examples: Arrays with the examples along the first axis.
        size: How many to split off; a fifth of them at most.
        seed: Of the choice.

    Returns:
        The rest, and those split off.
    """
    count = len(examples["label"])
    order = np.random.default_rng(seed).permutation(count)
    size = min(size, count // 5)
    pick = lambda rows: {name: values[rows] for name, values in examples.items()}
    return pick(order[size:]), pick(order[:size])


def take(examples: Batch, limit: int | None, seed: int) -> Batch:
    """Draws so many examples at random; all of them if `limit` is None."""
    count = len(examples["label"])
    rows = np.random.default_rng(seed).permutation(count)[:limit]
    return {name: values[rows] for name, values in examples.items()}
