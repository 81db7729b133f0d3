"""Digits: a small ViT pretrained on the digits 0-4, its adapters trained on 5-9.

Real data without a download: the 1,797 handwritten 8x8 digits that scikit-learn carries.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.models.vit import ViT
from experiments.task import Batch, OnStep, Task, TaskOptions, Totals, ignore_steps
from experiments.tasks.data import classification_totals, padded_batches, shuffled_batches
from experiments.tasks.pretraining import pretrain

SPLIT_SEED = 0
EVAL_BATCH = 256


class DigitsOptions(TaskOptions):
    """Sizes of the model and of its adapters, and the pretraining."""

    width: int = 64
    depth: int = 3
    heads: int = 4
    rank: int = 4
    alpha: float = 8.0
    targets: str = "query|key|value|out|mlp_in|mlp_out"
    batch_size: int = 32
    pretrain_steps: int = 200
    pretrain_learning_rate: float = 1e-3
    pretrain_seed: int = 0


class PretrainDigits(Task[DigitsOptions]):
    """All weights of a fresh ViT on the digits 0-4."""

    name: ClassVar[str] = "digits-pretrain"
    options_type = DigitsOptions

    def __init__(
        self,
        options: DigitsOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options)
        if data_dir is not None:
            raise ExperimentError(
                "the digits take no --data-dir: their data come with scikit-learn"
            )
        self._examples = _digits(range(5))

    @property
    def head(self) -> nnx.filterlib.Filter:
        """Nothing: the method trains everything."""
        return nnx.Nothing()

    @property
    def splits(self) -> tuple[str, ...]:
        """A held-out split to see that the pretraining worked."""
        return ("validation",)

    @property
    def data(self) -> dict[str, str]:
        """Name of the data."""
        return {"source": "scikit-learn digits, classes 0-4"}

    def build_model(self, seed: int, adapters: Adapters) -> ViT:
        """Returns a fresh ViT, without adapters."""
        options = self.options
        return ViT(
            image_size=8,
            patch_size=2,
            width=options.width,
            depth=options.depth,
            heads=options.heads,
            classes=5,
            rngs=nnx.Rngs(seed),
        )

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields shuffled training batches for ever."""
        return shuffled_batches(self._examples["train"], self.options.batch_size, seed)

    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns the batches of a split."""
        return padded_batches(self._examples[split], EVAL_BATCH)

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns cross entropy and correct answers."""
        return classification_totals(model(batch["image"]), batch)


class Digits(PretrainDigits):
    """Adapters and a new head on the digits 5-9, on top of one pretrained ViT.

    60 % of the digits 5-9 are for training, 20 % for validation and 20 % for the test; the split
    is the same for all seeds.
    """

    name: ClassVar[str] = "digits"

    def __init__(
        self,
        options: DigitsOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options, data_dir)
        self._examples = _digits(range(5, 10))
        base = pretrain(
            PretrainDigits(options),
            steps=options.pretrain_steps,
            learning_rate=options.pretrain_learning_rate,
            seed=options.pretrain_seed,
            on_step=on_step,
        )
        self._base = nnx.split(base.model)

    @property
    def head(self) -> nnx.filterlib.Filter:
        """The new classifier for five classes that the base has not seen."""
        return nnx.All(nnx.PathContains("head"), nnx.Param)

    @property
    def splits(self) -> tuple[str, ...]:
        """Learning rates are chosen on validation, the test is only reported."""
        return ("validation", "test")

    @property
    def data(self) -> dict[str, str]:
        """Name of the data."""
        return {"source": "scikit-learn digits, classes 5-9"}

    def build_model(self, seed: int, adapters: Adapters) -> ViT:
        """Returns the pretrained ViT with a fresh head and fresh adapters."""
        options = self.options
        rngs = nnx.Rngs(seed)
        model = nnx.merge(*self._base)
        model.head = nnx.Linear(options.width, 5, rngs=rngs)
        adapters.add_to(model, options.targets, options.lora, rngs=rngs)
        return model


def _digits(classes: range) -> dict[str, Batch]:
    """Returns the train, validation and test examples of five consecutive digits."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16.0
    chosen = np.isin(labels, classes)
    images, labels = images[chosen], (labels[chosen] - classes[0]).astype(np.int32)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED
    )
    train, validation = train_test_split(
        rest, test_size=0.25, stratify=labels[rest], random_state=SPLIT_SEED
    )
    splits = {"train": train, "validation": validation, "test": test}
    return {name: {"image": images[i], "label": labels[i]} for name, i in splits.items()}
