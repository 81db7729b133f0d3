"""Models and data sets of the Hugging Face hub, or of local folders in the same form.

`--model NAME` is fetched from the hub, `--model DIR` is a folder with `config.json`, safetensors
and, for text, `tokenizer.json`. Data sets come from the hub unless `--data-dir` names a folder that
holds their splits as `.parquet` (as the hub stores them), `.jsonl` or `.tsv`.

| task | model | data set on the hub | files in a folder |
|---|---|---|---|
| `mnli` | BERT or RoBERTa, such as `roberta-base` | `nyu-mll/glue`, `mnli` | `train`, `dev_matched`, `dev_mismatched` |
| `gsm8k` | Llama, such as `meta-llama/Llama-3.2-1B` | `openai/gsm8k`, `main` | `train`, `test` |
| `cifar100` | ViT, such as `google/vit-base-patch16-224-in21k` | `uoft-cs/cifar100` | `train`, `test` |
"""  # noqa: E501

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from experiments.errors import ExperimentError
from experiments.models.checkpoint import CONFIG_FILE, Shape, read_shape
from experiments.task import Batch, Task, TaskOptions
from experiments.tasks.data import data_folder, padded_batches, shuffled_batches

MODEL_FILES = ["*.json", "*.safetensors"]
MODEL_FORM = "config.json, model.safetensors and, for text, tokenizer.json"
BUILDERS = {"parquet": "parquet", "jsonl": "json", "tsv": "csv"}
"""The loader of `datasets` for files of each suffix."""


class HubOptions(TaskOptions):
    """What the tasks with a model of the hub share.

    Attributes:
        model: Name on the hub, or a folder.
        rank: r of the adapters.
        alpha: Numerator of their scale alpha / r.
        targets: Which linear maps are adapted.
        batch_size: Examples a step.
        eval_limit: Only so many examples of a split; all of them if None.
    """

    model: str
    rank: int = 8
    alpha: float = 16.0
    targets: str = "query|value"
    batch_size: int = Field(default=32, ge=1)
    eval_limit: int | None = Field(default=None, ge=1)


HubOptionsT = TypeVar("HubOptionsT", bound=HubOptions)


class HubTask(Task[HubOptionsT]):
    """A pretrained model on a data set of the hub: subclasses set `examples` and `record`.

    Attributes:
        shape: Sizes of the models that the task takes.
        eval_batch: Examples of an evaluation batch.
        examples: Arrays by split: "train", "validation" and "test".
        record: What identifies the data and the model.
    """

    shape: ClassVar[type[Shape]]
    eval_batch: ClassVar[int]
    examples: dict[str, Batch]
    record: dict[str, str]

    @classmethod
    def check(cls, options: HubOptionsT) -> None:
        """Refuses a model of another architecture, by its `config.json` alone."""
        folder = find_model(options.model, [CONFIG_FILE])
        try:
            read_shape(folder, cls.shape)
        except ExperimentError as error:
            raise ExperimentError(
                f"--model {options.model} for task {cls.name!r}: {error}"
            ) from error

    @property
    def data(self) -> dict[str, str]:
        """Where the data came from, with sizes and digests of data and model."""
        return self.record

    @property
    def splits(self) -> tuple[str, ...]:
        """Learning rates are chosen on validation, the test is only reported."""
        return ("validation", "test")

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields shuffled training batches for ever."""
        return shuffled_batches(self.examples["train"], self.options.batch_size, seed)

    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns the batches of a split, or of its first `eval_limit` examples."""
        limit = self.options.eval_limit
        examples = {name: values[:limit] for name, values in self.examples[split].items()}
        return padded_batches(examples, self.eval_batch)


@dataclass(frozen=True)
class HubData:
    """A data set.

    Attributes:
        folder: Name of its folder.
        name: Its name on the hub.
        config: Which of the data sets under that name.
        splits: Names of a split by the task's name for it, the hub's first; a local file may have
            any of them.
        columns: What the task reads; other spellings of a column follow its name.
        image: Column whose images are wanted as the files' bytes.
    """

    folder: str
    name: str
    config: str | None
    splits: Mapping[str, Sequence[str]]
    columns: Mapping[str, Sequence[str]]
    image: str | None = None

    @property
    def remedy(self) -> str:
        """What a user without internet has to do."""
        stems = ", ".join(names[-1] for names in self.splits.values())
        return (
            f"pass --data-dir with a folder that holds {stems}, each as .parquet, .jsonl or .tsv "
            f"with the columns {', '.join(self.columns)}: {self.name} on the Hugging Face hub"
        )

    def load(self, data_dir: Path | None) -> dict[str, dict[str, list[Any]]]:
        """Reads all splits.

        Args:
            data_dir: Folder of the files, or one that holds it as `folder`; the hub if None.

        Returns:
            The columns by split.

        Raises:
            ExperimentError: The hub cannot be reached; a file is missing or damaged, or lacks a
                column or all rows.
        """
        tables = {}
        for split, names in self.splits.items():
            if data_dir is None:
                where, table = f"{self.name}, {names[0]}", self._from_hub(names[0])
            else:
                files = self._find(data_folder(data_dir, self.folder), names)
                where, table = str(files[0]), self._from_files(files)
            tables[split] = self._columns(where, table)
        return tables

    def _from_hub(self, split: str) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.name, self.config, split=split)
        except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ExperimentError(
                f"cannot load {self.name} from the Hugging Face hub ({_short(error)}). "
                f"Without internet, {self.remedy}"
            ) from error

    def _find(self, folder: Path, names: Sequence[str]) -> list[Path]:
        # Repositories on the hub keep the shards of a data set in a folder of its own.
        places = [folder, folder / "data", *([folder / self.config] if self.config else [])]
        for place, suffix, name in itertools.product(places, BUILDERS, names):
            whole = place / f"{name}.{suffix}"
            files = [whole] if whole.is_file() else sorted(place.glob(f"{name}-*-of-*.{suffix}"))
            if files:
                return files
        raise ExperimentError(f"{folder} holds no {' or '.join(names)}; {self.remedy}")

    def _from_files(self, files: list[Path]) -> Any:
        import datasets

        suffix = files[0].suffix[1:]
        # Quotation marks in GLUE's files are part of the sentences.
        form = {"sep": "\t", "quoting": 3} if suffix == "tsv" else {}
        if not all(path.stat().st_size for path in files):
            raise ExperimentError(f"{files[0]} is empty; fetch it again")
        paths = [str(path) for path in files]
        try:
            return datasets.load_dataset(BUILDERS[suffix], data_files=paths, split="train", **form)
        except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            raise ExperimentError(
                f"{files[0]} cannot be read as {suffix} ({_short(cause)}); fetch it again"
            ) from error

    def _columns(self, where: str, table: Any) -> dict[str, list[Any]]:
        import datasets

        if self.image in table.column_names:
            table = table.cast_column(self.image, datasets.Image(decode=False))
        if not len(table):
            raise ExperimentError(f"{where} holds no rows; {self.remedy}")
        columns = {}
        for column, others in self.columns.items():
            spelling = next((x for x in (column, *others) if x in table.column_names), None)
            if spelling is None:
                raise ExperimentError(
                    f"{where} has no column {column!r}, but: {', '.join(table.column_names)}; "
                    f"{self.remedy}"
                )
            columns[column] = list(table[spelling])
        return columns


def find_model(model: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """Returns the folder of a model, fetched from the hub where it is not local.

    Args:
        model: Name on the hub, or a folder.
        files: Which files are fetched, as patterns.

    Raises:
        ExperimentError: There is no such folder, or the hub cannot be reached or has no such model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith(("./", "../", "~")):
        raise ExperimentError(
            f"--model {model}: there is no such folder; it must hold {MODEL_FORM}. A small "
            "decoder of this form is made by `python -m experiments pretrain`"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"cannot fetch {model!r} from the Hugging Face hub ({_short(error)}). "
            f"Without internet, or for a model that needs permission, fetch it elsewhere and pass "
            f"--model with a folder that holds {MODEL_FORM}"
        ) from error


def split_off_last_tenth(examples: Batch) -> tuple[Batch, Batch]:
    """Returns the first nine tenths and the last tenth (at least one) of the examples."""
    count = len(examples["label"])
    cut = count - max(1, count // 10)
    first = {name: values[:cut] for name, values in examples.items()}
    return first, {name: values[cut:] for name, values in examples.items()}


def weights_digest(model_dir: Path) -> str:
    """Returns the beginning of the SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:12]}"


def rows_digest(columns: Mapping[str, Sequence[Any]]) -> str:
    """Returns the number of rows, and the beginning of the SHA-256 of their texts and numbers."""
    digest = hashlib.sha256()
    for values in columns.values():
        digest.update("\n".join(map(str, values)).encode())
    return f"{len(next(iter(columns.values())))} rows, sha256 {digest.hexdigest()[:12]}"


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
