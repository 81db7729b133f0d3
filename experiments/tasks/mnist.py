"""MNIST: LeNet-5 with adapters in its linear layers, from a random start as in the OPLoRA paper.

There is nothing pretrained: the kernels of the linear layers stay what was drawn, and adapters
learn beside them. Convolutions and biases are trained by AdamW at the same rate in every method
(they are the "head"), so that only what moves the linear layers differs.
"""

from pathlib import Path
from typing import ClassVar

from flax import nnx

from experiments.adapters import Adapters
from experiments.models.lenet import LeNet5
from experiments.task import OnStep, ignore_steps
from experiments.tasks.images import ImageOptions, ImageTask, read_npz, split_off, take

SPLIT_SEED = 0
SOURCE = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"


class MNISTOptions(ImageOptions):
    """Sizes; the rank is the paper's."""

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"linear/\d"


class MNIST(ImageTask[MNISTOptions]):
    """LeNet-5 on the handwritten digits."""

    name: ClassVar[str] = "mnist"
    options_type = MNISTOptions

    def __init__(
        self,
        options: MNISTOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options)
        keys = ("x_train", "y_train", "x_test", "y_test")
        arrays = read_npz(data_dir, "mnist", "mnist.npz", keys, SOURCE)
        pack = lambda part: {
            "image": arrays[f"x_{part}"],
            "label": arrays[f"y_{part}"].astype("int32"),
        }
        train, validation = split_off(pack("train"), options.validation_size, SPLIT_SEED)
        test = take(pack("test"), options.test_limit, SPLIT_SEED)
        self.examples = {"train": train, "validation": validation, "test": test}

    @property
    def head(self) -> nnx.filterlib.Filter:
        """Convolutions and biases."""
        linear_kernels = nnx.All(nnx.PathContains("linear"), nnx.PathContains("kernel"))
        return nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam), nnx.Not(linear_kernels))

    def build_model(self, seed: int, adapters: Adapters) -> LeNet5:
        """Returns a fresh network, the same for all kinds of adapters."""
        options, rngs = self.options, nnx.Rngs(seed)
        model = LeNet5(rngs=rngs)
        adapters.add_to(model, options.targets, options.lora, rngs=rngs)
        return model
