"""Causal language modelling: the Llama stories260K, pretrained on tiny stories, on Shakespeare.

The first 90 % of the text are for training, 5 % for validation and 5 % for the test, tokenized by
the model's own tokenizer. Training windows lie anywhere in the text; evaluation windows follow one
another. The loss is in nats a token, the accuracy that of the next token.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.models.gguf_llama import load_gguf
from experiments.models.llama import Llama
from experiments.task import Batch, OnStep, Task, TaskOptions, Totals, ignore_steps
from experiments.tasks.data import classification_totals, padded_batches

MODEL_FILE = "stories260k/stories260K.gguf"
TEXT_FILE = "tinyshakespeare/input.txt"
SOURCES = {
    MODEL_FILE: "the GGUF form of karpathy/tinyllamas (stories260K) on the Hugging Face hub",
    TEXT_FILE: "data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn",
}
SPLITS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
EVAL_BATCH = 32


class LMOptions(TaskOptions):
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


class LM(Task[LMOptions]):
    """stories260K with adapters on tinyshakespeare.

    Args:
        options: Sizes.
        data_dir: Folder that holds `tinyshakespeare/input.txt` and `stories260k/stories260K.gguf`.
        on_step: Not called.
    """

    name: ClassVar[str] = "lm"
    options_type = LMOptions

    def __init__(
        self,
        options: LMOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options)
        model_path, text_path = (_require_file(data_dir, name) for name in SOURCES)
        loaded = load_gguf(model_path)
        text = _read_text(text_path)
        self._base = nnx.split(loaded.model)
        self._data = {
            "source": TEXT_FILE,
            "model": f"{MODEL_FILE}, {_digest(model_path.read_bytes())}",
        }
        self._tokens = {}
        for split, (begin, end) in SPLITS.items():
            part = text[round(begin * len(text)) : round(end * len(text))]
            tokens = np.array(loaded.tokenizer.encode(part).ids, np.int32)
            if len(tokens) <= options.length:
                raise ExperimentError(
                    f"{text_path}: the {split} split has {len(tokens)} tokens, "
                    f"which is not above length {options.length}"
                )
            size = f"{len(part)} characters, {len(tokens)} tokens"
            self._data[split] = f"{size}, {_digest(part.encode())}"
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


def _require_file(data_dir: Path | None, name: str) -> Path:
    wanted = "; ".join(f"{file}: {source}" for file, source in SOURCES.items())
    if data_dir is None:
        raise ExperimentError(f"task 'lm' needs --data-dir, a folder that holds {wanted}")
    if not (data_dir / name).is_file():
        raise ExperimentError(
            f"{data_dir / name} does not exist; --data-dir must name a folder that holds {wanted}"
        )
    return data_dir / name


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path} is not UTF-8 text ({error}); fetch it again") from error


def _digest(content: bytes) -> str:
    return f"sha256 {hashlib.sha256(content).hexdigest()[:12]}"
