"""CIFAR-100: small photographs of a hundred kinds of things, by a pretrained ViT with a new head.

The images are enlarged to the model's size in the forward pass. The last tenth of the training
images is for validation.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from PIL import Image, UnidentifiedImageError

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.models.pretrained_vit import (
    ImageClassifier,
    ViTShape,
    load_image_encoder,
    load_normalization,
)
from experiments.task import Batch, OnStep, Totals, ignore_steps
from experiments.tasks.data import classification_totals
from experiments.tasks.hub import (
    HubData,
    HubOptions,
    HubTask,
    find_model,
    rows_digest,
    split_off_last_tenth,
    weights_digest,
)

CLASSES = 100
DATA = HubData(
    folder="cifar100",
    name="uoft-cs/cifar100",
    config=None,
    splits={"train": ("train",), "test": ("test",)},
    columns={"img": (), "fine_label": ()},
    image="img",
)


class CIFAR100Options(HubOptions):
    """Sizes; see `HubOptions`."""


class CIFAR100(HubTask[CIFAR100Options]):
    """A pretrained ViT with adapters and a new head on CIFAR-100.

    Args:
        options: Sizes.
        data_dir: Folder of the data, see `experiments.tasks.hub`; the hub is asked if it is None.
        on_step: Not called.
    """

    name: ClassVar[str] = "cifar100"
    options_type = CIFAR100Options
    shape = ViTShape
    eval_batch: ClassVar[int] = 64

    def __init__(
        self,
        options: CIFAR100Options,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options)
        model_dir = find_model(options.model)
        self._normalization = load_normalization(model_dir)
        self._base = nnx.split(load_image_encoder(model_dir))
        self.record = {"source": DATA.name, "model": weights_digest(model_dir)}
        self.examples = {}
        for split, columns in DATA.load(data_dir).items():
            self.examples[split] = {
                "image": decode_images(split, columns["img"]),
                "label": _labels(split, columns["fine_label"]),
            }
            self.record[split] = rows_digest(columns)
        self.examples["train"], self.examples["validation"] = split_off_last_tenth(
            self.examples["train"]
        )

    @property
    def head(self) -> nnx.filterlib.Filter:
        """The new classifier."""
        return nnx.All(nnx.PathContains("head"), nnx.Param)

    def build_model(self, seed: int, adapters: Adapters) -> ImageClassifier:
        """Returns the pretrained encoder with a fresh head and fresh adapters."""
        options, rngs = self.options, nnx.Rngs(seed)
        encoder = nnx.merge(*self._base)
        head = nnx.Linear(encoder.shape.width, CLASSES, rngs=rngs)
        model = ImageClassifier(encoder, self._normalization, head)
        adapters.add_to(model, options.targets, options.lora, rngs=rngs)
        return model

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns cross entropy and correct answers."""
        return classification_totals(model(batch["image"]), batch)


def decode_images(split: str, encoded: Sequence[dict[str, Any]]) -> np.ndarray:
    """Decodes image files of one size.

    Args:
        split: Name of the split, for messages.
        encoded: The files, as `{"bytes": ...}`.

    Returns:
        (images, height, width, 3), uint8.

    Raises:
        ExperimentError: A file is no image, or of another size than the first.
    """
    images = []
    for row, file in enumerate(encoded):
        try:
            images.append(np.asarray(Image.open(io.BytesIO(file["bytes"])).convert("RGB")))
        except (UnidentifiedImageError, OSError, TypeError, KeyError) as error:
            raise ExperimentError(
                f"CIFAR-100's split {split!r}, row {row} is no image ({error}); fetch it again"
            ) from error
        if images[-1].shape != images[0].shape:
            raise ExperimentError(
                f"CIFAR-100's split {split!r}, row {row}: the image is of shape "
                f"{images[-1].shape}, the first of {images[0].shape}"
            )
    return np.stack(images)


def _labels(split: str, values: Sequence[int]) -> np.ndarray:
    labels = np.array(values, np.int32)
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ExperimentError(
            f"CIFAR-100's split {split!r}: labels from {labels.min()} to {labels.max()}, "
            f"0 to {CLASSES - 1} are expected"
        )
    return labels
