"""What classifications of sentences share: MiniLM-L6, in place of RoBERTa-base, with a new head."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.adapters import Adapters
from experiments.models.bert import MeanHead, TextClassifier, load_encoder
from experiments.models.minilm import find_model_dir
from experiments.models.text import encode, load_tokenizer
from experiments.task import Batch, Task, TaskOptions, Totals
from experiments.tasks.data import classification_totals, padded_batches, shuffled_batches_by_length

EVAL_BATCH = 64
WIDTH = 8
"""Batches are cut to the longest of their sentences, up to a multiple of so many tokens."""

Split = tuple[list[str], np.ndarray]


class SentenceOptions(TaskOptions):
    """Sizes of the adapters and of the batches.

    For adapters in all linear maps set `targets` to `query|key|value|out|mlp_in|mlp_out`.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "query|value"
    batch_size: int = 32
    max_length: int = 48
    eval_limit: int | None = None


class SentenceTask(Task[SentenceOptions]):
    """MiniLM-L6 with adapters and a new linear head.

    Attributes:
        classes: How many classes there are.

    Args:
        options: Sizes.
        splits: Sentences and labels by split.
        source: Where they are from, for the record.
    """

    options_type = SentenceOptions
    classes: ClassVar[int] = 2

    def __init__(self, options: SentenceOptions, splits: dict[str, Split], source: str) -> None:
        super().__init__(options)
        self._data = {"source": source} | {
            name: f"{len(labels)} sentences, sha256 {_digest(sentences, labels)}"
            for name, (sentences, labels) in splits.items()
        }
        model_dir = find_model_dir()
        encoder = load_encoder(model_dir)
        tokenizer = load_tokenizer(model_dir, options.max_length, encoder.shape.pad)
        self._examples = {
            name: encode(tokenizer, sentences) | {"label": labels}
            for name, (sentences, labels) in splits.items()
        }
        self._base = nnx.split(encoder)

    @property
    def head(self) -> nnx.filterlib.Filter:
        """The new classifier."""
        return nnx.All(nnx.PathContains("head"), nnx.Param)

    @property
    def splits(self) -> tuple[str, ...]:
        """Validation, and the test where its labels are there."""
        return tuple(name for name in self._examples if name != "train")

    @property
    def data(self) -> dict[str, str]:
        """Where the data came from, with sizes and digests."""
        return self._data

    def build_model(self, seed: int, adapters: Adapters) -> TextClassifier:
        """Returns the pretrained encoder with a fresh head and fresh adapters."""
        options, rngs = self.options, nnx.Rngs(seed)
        encoder = nnx.merge(*self._base)
        model = TextClassifier(encoder, MeanHead(encoder.shape.width, self.classes, rngs=rngs))
        adapters.add_to(model, options.targets, options.lora, rngs=rngs)
        return model

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields shuffled training batches for ever, of sentences of like length."""
        examples, batch_size = self._examples["train"], self.options.batch_size
        return map(_cut, shuffled_batches_by_length(examples, _lengths(examples), batch_size, seed))

    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns the batches of a split, or of its first `eval_limit` sentences, by length."""
        examples, limit = self._examples[split], self.options.eval_limit
        order = np.argsort(_lengths(examples)[:limit], kind="stable")
        ordered = {name: values[order] for name, values in examples.items()}
        return [_cut(batch) for batch in padded_batches(ordered, EVAL_BATCH)]

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns cross entropy, correct answers, and how two classes were confused."""
        logits = model(batch["tokens"], batch["mask"], batch["segments"])
        found = classification_totals(logits, batch)
        if self.classes != 2:
            return found
        answers = nnx.one_hot(logits.argmax(axis=-1), 2) * batch["weight"][:, None]
        confusion = jnp.matmul(nnx.one_hot(batch["label"], 2).T, answers)
        return found._replace(confusion=confusion)


def _lengths(examples: Batch) -> np.ndarray:
    return examples["mask"].sum(axis=1)


def _cut(batch: Batch) -> Batch:
    width = -(-int(_lengths(batch).max()) // WIDTH) * WIDTH
    return {
        name: values[:, :width] if values.ndim == 2 else values for name, values in batch.items()
    }


def _digest(sentences: list[str], labels: np.ndarray) -> str:
    return hashlib.sha256("\n".join(sentences).encode() + labels.tobytes()).hexdigest()[:12]
