"""SST-2: the sentiment of film-review sentences, with MiniLM-L6 in place of RoBERTa-base.

Learning rates are chosen on GLUE's dev set (872 sentences, called "validation" here); the labelled
test set (1,821 sentences), where there is one, is only reported. GLUE's own test labels are not
public: the hub gives no "test" split, a data folder does if it holds `test_labeled.tsv`.
"""

import csv
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.errors import ExperimentError
from experiments.task import OnStep, ignore_steps
from experiments.tasks.data import data_folder
from experiments.tasks.sentences import SentenceOptions, SentenceTask, Split

HUB_NAME = "stanfordnlp/sst2"
FILES = {"train": "train.tsv", "validation": "dev.tsv", "test": "test_labeled.tsv"}
OPTIONAL = "test"


class SST2(SentenceTask):
    """The sentiment of sentences.

    Args:
        options: Sizes.
        data_dir: Folder with `train.tsv`, `dev.tsv` and perhaps `test_labeled.tsv`, or one that
            holds it as `sst2`; the Hugging Face hub is asked when it is None.
        on_step: Not called.
    """

    name: ClassVar[str] = "sst2"

    def __init__(
        self,
        options: SentenceOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        splits = read_tsv_folder(data_folder(data_dir, "sst2")) if data_dir else read_hub()
        super().__init__(options, splits, "tsv" if data_dir else HUB_NAME)


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
