"""Causal language modelling on windows of a text, by a Llama decoder.

The first 90 % of the text are for training, 5 % for validation and 5 % for the test. Training
windows lie anywhere in the text; evaluation windows follow one another. The loss is in nats a
token, the accuracy that of the next token.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.models.llama import Llama
from experiments.task import Batch, Task, TaskOptions, Totals
from experiments.tasks.data import classification_totals, padded_batches

SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
EVAL_BATCH = 32


class WindowOptions(TaskOptions):
    """Sizes of the adapters and of the batches; the adapters are in all seven linear maps.

    Attributes:
        rank: r of the adapters.
        alpha: Numerator of their scale alpha / r.
        targets: Which linear maps are adapted.
        batch_size: Windows a step.
        length: Tokens a window that are predicted.
        eval_limit: Only so many windows of a split; all of them if None.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "query|key|value|out|gate|up|down"
    batch_size: int = Field(default=8, ge=1)
    length: int = Field(default=128, ge=1)
    eval_limit: int | None = Field(default=None, ge=1)


WindowOptionsT = TypeVar("WindowOptionsT", bound=WindowOptions)


class WindowTask(Task[WindowOptionsT]):
    """A decoder with adapters on a text.

    Args:
        options: Sizes.
        model: The decoder.
        text: The text.
        encode: Makes token ids of a text, by the decoder's tokenizer.
        path: Where the text is from, for messages.
        record: What identifies model and text.
    """

    def __init__(
        self,
        options: WindowOptionsT,
        *,
        model: Llama,
        text: str,
        encode: Callable[[str], Sequence[int]],
        path: Path,
        record: dict[str, str],
    ) -> None:
        super().__init__(options)
        self._base = nnx.split(model)
        self._data = dict(record)
        self._tokens = {}
        for split, (begin, end) in SPLITS.items():
            part = text[round(begin * len(text)) : round(end * len(text))]
            tokens = np.array(encode(part), np.int32)
            if len(tokens) <= options.length:
                raise ExperimentError(
                    f"{path}: the {split} split has {len(tokens)} tokens, "
                    f"which is not above length {options.length}"
                )
            size = f"{len(part)} characters, {len(tokens)} tokens"
            self._data[split] = f"{size}, {digest(part.encode())}"
            self._tokens[split] = tokens

    @property
    def head(self) -> nnx.filterlib.Filter:
        """Nothing: the model keeps its vocabulary."""
        return nnx.Nothing()

    @property
    def splits(self) -> tuple[str, ...]:
        """Learning rates are chosen on validation, the test is only reported."""
        return ("validation", "test")

    @property
    def data(self) -> dict[str, str]:
        """Sizes and digests of the model and of the text."""
        return self._data

    def build_model(self, seed: int, adapters: Adapters) -> Llama:
        """Returns the pretrained decoder with fresh adapters."""
        options, rngs = self.options, nnx.Rngs(seed)
        model = nnx.merge(*self._base)
        adapters.add_to(model, options.targets, options.lora, rngs=rngs)
        return model

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields windows from random places of the training text for ever."""
        options, tokens = self.options, self._tokens["train"]
        rng = np.random.default_rng(seed)
        while True:
            starts = rng.integers(len(tokens) - options.length, size=options.batch_size)
            weight = np.ones(options.batch_size, np.float32)
            yield self._windows(tokens, starts) | {"weight": weight}

    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns the windows of a split, one after another; an odd rest is left out."""
        length, tokens = self.options.length, self._tokens[split]
        starts = np.arange(0, len(tokens) - length, length)[: self.options.eval_limit]
        return padded_batches(self._windows(tokens, starts), EVAL_BATCH)

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns cross entropy and correct guesses of the next tokens."""
        weight = jnp.broadcast_to(batch["weight"][:, None], batch["label"].shape)
        return classification_totals(model(batch["tokens"]), batch | {"weight": weight})

    def _windows(self, tokens: np.ndarray, starts: np.ndarray) -> Batch:
        windows = tokens[starts[:, None] + np.arange(self.options.length + 1)]
        return {"tokens": windows[:, :-1], "label": windows[:, 1:]}


def require_file(task: str, data_dir: Path | None, name: str, sources: dict[str, str]) -> Path:
    """Returns a file of the data folder.

    Args:
        task: Name of the task, for messages.
        data_dir: The folder.
        name: The file's path in it.
        sources: Where to fetch each file that the task needs, by its path.

    Raises:
        ExperimentError: There is no folder or no such file.
    """
    wanted = "; ".join(f"{file}: {source}" for file, source in sources.items())
    if data_dir is None:
        raise ExperimentError(f"task {task!r} needs --data-dir, a folder that holds {wanted}")
    if not (data_dir / name).is_file():
        raise ExperimentError(
            f"{data_dir / name} does not exist; --data-dir must name a folder that holds {wanted}"
        )
    return data_dir / name


def read_text(path: Path) -> str:
    """Reads a text.

    Raises:
        ExperimentError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path} is not UTF-8 text ({error}); fetch it again") from error


def digest(content: bytes) -> str:
    """Returns the beginning of the SHA-256 of a file or a text."""
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"
