"""SST-2: the sentiment of film-review sentences, with MiniLM-L6 in place of RoBERTa-base.

Learning rates are chosen on GLUE's dev set (872 sentences, called "validation" here); the labelled
test set (1,821 sentences), where there is one, is only reported. GLUE's own test labels are not
public: the hub gives no "test" split, a data folder does if it holds `test_labeled.tsv`.
"""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.models.bert import MeanHead, TextClassifier, load_encoder
from experiments.models.minilm import find_model_dir
from experiments.models.text import encode, load_tokenizer
from experiments.tasks.base import (
    Batch,
    OnStep,
    Task,
    TaskOptions,
    Totals,
    classification_totals,
    data_folder,
    ignore_steps,
    padded_batches,
    shuffled_batches,
)

HUB_NAME = "stanfordnlp/sst2"
FILES = {"train": "train.tsv", "validation": "dev.tsv", "test": "test_labeled.tsv"}
OPTIONAL = "test"
EVAL_BATCH = 64

Split = tuple[list[str], np.ndarray]


class SST2Options(TaskOptions):
    """Sizes of the adapters and of the batches.

    For adapters in all linear maps set `targets` to `query|key|value|out|mlp_in|mlp_out`.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "query|value"
    batch_size: int = 32
    max_length: int = 48
    eval_limit: int | None = None


class SST2(Task[SST2Options]):
    """MiniLM-L6 with adapters and a new linear head on SST-2.

    Args:
        options: Sizes.
        data_dir: Folder with `train.tsv`, `dev.tsv` and perhaps `test_labeled.tsv`, or one that
            holds it as `sst2`; the Hugging Face hub is asked when it is None.
        on_step: Not called.
    """

    name: ClassVar[str] = "sst2"
    options_type = SST2Options

    def __init__(
        self,
        options: SST2Options,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options)
        model_dir = find_model_dir()
        splits = read_tsv_folder(data_folder(data_dir, "sst2")) if data_dir else read_hub()
        self._data = {"source": "tsv" if data_dir else HUB_NAME} | {
            name: f"{len(labels)} sentences, sha256 {_digest(sentences, labels)}"
            for name, (sentences, labels) in splits.items()
        }
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
        model = TextClassifier(encoder, MeanHead(encoder.shape.width, 2, rngs=rngs))
        adapters.add_to(model, options.targets, rank=options.rank, alpha=options.alpha, rngs=rngs)
        return model

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields shuffled training batches for ever."""
        return shuffled_batches(self._examples["train"], self.options.batch_size, seed)

    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns the batches of a split, or of its first `eval_limit` sentences."""
        limit = self.options.eval_limit
        examples = {name: values[:limit] for name, values in self._examples[split].items()}
        return padded_batches(examples, EVAL_BATCH)

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns cross entropy and correct answers."""
        return classification_totals(
            model(batch["tokens"], batch["mask"], batch["segments"]), batch
        )


def read_tsv_folder(folder: Path) -> dict[str, Split]:
    """Reads SST-2 in GLUE's form: a header `sentence<TAB>label`, then one sentence a line.

    Raises:
        ExperimentError: A file is missing or not of this form.
    """
    splits = {}
    for name, file_name in FILES.items():
        path = folder / file_name
        if path.is_file():
            splits[name] = _read_tsv(path)
        elif name != OPTIONAL:
            raise ExperimentError(
                f"{path} does not exist. --data-dir must name a folder with GLUE's SST-2 as "
                f"{FILES['train']} and {FILES['validation']} (and, for a test score, "
                f"{FILES['test']}): fetch https://dl.fbaipublicfiles.com/glue/data/SST-2.zip, "
                f"or leave --data-dir out to load {HUB_NAME} from the Hugging Face hub"
            )
    return splits


def read_hub() -> dict[str, Split]:
    """Loads SST-2's train and dev set from the Hugging Face hub.

    Raises:
        ExperimentError: The hub cannot be reached.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(HUB_NAME)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ExperimentError(
            f"cannot load {HUB_NAME} from the Hugging Face hub ({type(error).__name__}: {error}). "
            "Without internet, pass --data-dir with GLUE's SST-2: a folder that holds "
            f"{FILES['train']} and {FILES['validation']} "
            "(https://dl.fbaipublicfiles.com/glue/data/SST-2.zip)"
        ) from error
    return {
        name: (list(loaded[name]["sentence"]), np.array(loaded[name]["label"], np.int32))
        for name in ("train", "validation")
    }


def _read_tsv(path: Path) -> Split:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path} is not UTF-8 text ({error}); fetch it again") from error
    # QUOTE_NONE: quotation marks are part of the sentences.
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(rows, None)
    if header != ["sentence", "label"]:
        raise ExperimentError(f"{path}: the header is {header}, not ['sentence', 'label']")
    sentences, labels = [], []
    for number, row in enumerate(rows, start=2):
        if len(row) != 2 or row[1] not in ("0", "1"):
            raise ExperimentError(
                f"{path}, line {number}: {row} is not a sentence and a label 0 or 1"
            )
        sentences.append(row[0])
        labels.append(int(row[1]))
    if not sentences:
        raise ExperimentError(f"{path} holds no sentences")
    return sentences, np.array(labels, np.int32)


def _digest(sentences: list[str], labels: np.ndarray) -> str:
    return hashlib.sha256("\n".join(sentences).encode() + labels.tobytes()).hexdigest()[:12]
