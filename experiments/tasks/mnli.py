"""MNLI: does a premise entail a hypothesis? BERT or RoBERTa with a new head.

Learning rates are chosen on the matched dev set ("validation"); the mismatched dev set is only
reported ("test"). There is no dropout.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from pydantic import Field

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.models.bert import (
    EncoderShape,
    FirstTokenHead,
    TextClassifier,
    load_encoder,
    load_pooler,
)
from experiments.models.text import encode, load_tokenizer
from experiments.task import Batch, OnStep, Totals, ignore_steps
from experiments.tasks.data import classification_totals
from experiments.tasks.hub import (
    HubData,
    HubOptions,
    HubTask,
    find_model,
    rows_digest,
    weights_digest,
)

LABELS = ("entailment", "neutral", "contradiction")
DATA = HubData(
    folder="mnli",
    name="nyu-mll/glue",
    config="mnli",
    splits={
        "train": ("train",),
        "validation": ("validation_matched", "dev_matched"),
        "test": ("validation_mismatched", "dev_mismatched"),
    },
    columns={"premise": ("sentence1",), "hypothesis": ("sentence2",), "label": ("gold_label",)},
)


class MNLIOptions(HubOptions):
    """Sizes; see `HubOptions`.

    Attributes:
        max_length: Tokens of a premise and its hypothesis, special ones included.
    """

    max_length: int = Field(default=128, ge=4)


class MNLI(HubTask[MNLIOptions]):
    """A pretrained encoder with adapters and a new head on MNLI.

    BERT's head starts with its pretrained pooler, RoBERTa's is all new.

    Args:
        options: Sizes.
        data_dir: Folder of the data, see `experiments.tasks.hub`; the hub is asked if it is None.
        on_step: Not called.
    """

    name: ClassVar[str] = "mnli"
    options_type = MNLIOptions
    shape = EncoderShape
    eval_batch: ClassVar[int] = 64

    def __init__(
        self,
        options: MNLIOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options)
        model_dir = find_model(options.model)
        encoder = load_encoder(model_dir)
        shape = encoder.shape
        if options.max_length > shape.max_length:
            raise ExperimentError(
                f"task_options.max_length: {options.model} has positions for {shape.max_length} "
                f"tokens, not for {options.max_length}"
            )
        tokenizer = load_tokenizer(model_dir, options.max_length, shape.pad)
        self.record = {"source": DATA.name, "model": weights_digest(model_dir)}
        self.examples = {}
        for split, columns in DATA.load(data_dir).items():
            pairs = list(zip(columns["premise"], columns["hypothesis"], strict=True))
            label = _labels(split, columns["label"])
            self.examples[split] = encode(tokenizer, pairs) | {"label": label}
            self.record[split] = rows_digest(columns)
        pooler = load_pooler(model_dir, shape) if shape.model_type == "bert" else None
        self._base = nnx.split((encoder, pooler))

    @property
    def head(self) -> nnx.filterlib.Filter:
        """The new classifier."""
        return nnx.All(nnx.PathContains("head"), nnx.Param)

    def build_model(self, seed: int, adapters: Adapters) -> TextClassifier:
        """Returns the pretrained encoder with a fresh head and fresh adapters."""
        options, rngs = self.options, nnx.Rngs(seed)
        encoder, pooler = nnx.merge(*self._base)
        head = FirstTokenHead(encoder.shape.width, len(LABELS), rngs=rngs)
        if pooler is not None:
            head.dense = pooler
        model = TextClassifier(encoder, head)
        adapters.add_to(model, options.targets, options.lora, rngs=rngs)
        return model

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns cross entropy and correct answers."""
        logits = model(batch["tokens"], batch["mask"], batch["segments"])
        return classification_totals(logits, batch)


def _labels(split: str, values: Sequence[str | int]) -> np.ndarray:
    """Turns labels, written as words or as numbers, into numbers."""
    numbers = {word: i for i, word in enumerate(LABELS)} | {i: i for i in range(len(LABELS))}
    for row, value in enumerate(values):
        if value not in numbers:
            raise ExperimentError(
                f"MNLI's split {split!r}, row {row}: the label {value!r} is none of "
                f"{', '.join(LABELS)} and not 0, 1 or 2"
            )
    return np.array([numbers[value] for value in values], np.int32)
