"""CoLA: is a sentence grammatical? With MiniLM-L6 in place of RoBERTa-base.

Learning rates are chosen on the in-domain dev set (527 sentences, "validation"); the out-of-domain
one (516, "test") is only reported. GLUE's dev set is both together. Its score is Matthews'
correlation.
"""

import csv
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.errors import ExperimentError
from experiments.task import OnStep, ignore_steps
from experiments.tasks.data import data_folder
from experiments.tasks.sentences import SentenceOptions, SentenceTask, Split

FILES = {
    "train": "in_domain_train.tsv",
    "validation": "in_domain_dev.tsv",
    "test": "out_of_domain_dev.tsv",
}
SOURCE = "https://nyu-mll.github.io/CoLA/cola_public_1.1.zip, its folder `raw`"


class CoLA(SentenceTask):
    """The acceptability of sentences.

    Args:
        options: Sizes.
        data_dir: Folder with the three files of the corpus, or one that holds it as `cola`.
        on_step: Not called.
    """

    name: ClassVar[str] = "cola"

    def __init__(
        self,
        options: SentenceOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        remedy = f"--data-dir must name a folder with {', '.join(FILES.values())}: {SOURCE}"
        if data_dir is None:
            raise ExperimentError(remedy)
        folder = data_folder(data_dir, "cola")
        for file in FILES.values():
            if not (folder / file).is_file():
                raise ExperimentError(f"{folder / file} does not exist; {remedy}")
        splits = {name: read_split(folder / file) for name, file in FILES.items()}
        super().__init__(options, splits, "tsv")


def read_split(path: Path) -> Split:
    """Reads a file of lines `source<TAB>label<TAB>mark<TAB>sentence`.

    Raises:
        ExperimentError: The file is not of this form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path} is not UTF-8 text ({error}); fetch it again") from error
    rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    for number, row in enumerate(rows, start=1):
        if len(row) != 4 or row[1] not in ("0", "1"):
            raise ExperimentError(
                f"{path}, line {number}: {row} is not source, label 0 or 1, mark and sentence"
            )
    if not rows:
        raise ExperimentError(f"{path} holds no sentences")
    return [row[3] for row in rows], np.array([int(row[1]) for row in rows], np.int32)
