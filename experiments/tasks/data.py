"""What tasks share: where data are, how batches are cut from them, how answers are scored."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments.errors import ExperimentError
from experiments.task import Batch, Totals


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
