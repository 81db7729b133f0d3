"""Who wrote this paragraph? Ten authors, with MiniLM-L6 in place of a larger encoder.

The paragraphs of 60 to 400 characters of each author's books, in their order: the first 80 % are
for training, 10 % for validation and 10 % for the test, and of each part as many from every author.
"""

import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.errors import ExperimentError
from experiments.task import OnStep, ignore_steps
from experiments.tasks.books import SOURCES, TEXT_FILE, read_books
from experiments.tasks.sentences import SentenceOptions, SentenceTask, Split
from experiments.tasks.windows import require_file

AUTHORS = 10
SHORTEST, LONGEST = 60, 400
PARTS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
COUNTS = {"train": 350, "validation": 20, "test": 40}
"""Paragraphs of each author; of validation, which is scored 20 times a run, fewer."""

HEADING = re.compile(r"^# Title: .*\n+## Author: (.*)\n+## Year: .*\n", re.MULTILINE)


class Authors(SentenceTask):
    """The author of a paragraph.

    Args:
        options: Sizes.
        data_dir: Folder that holds `books/books.txt.xz`.
        on_step: Not called.
    """

    name: ClassVar[str] = "authors"
    classes: ClassVar[int] = AUTHORS

    def __init__(
        self,
        options: SentenceOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        path = require_file(self.name, data_dir, TEXT_FILE, SOURCES)
        by_author = paragraphs_of(read_books(path))
        if len(by_author) != AUTHORS:
            raise ExperimentError(
                f"{path} holds books of {len(by_author)} authors, and the task needs {AUTHORS}: "
                "each book must begin with '# Title: …', '## Author: …' and '## Year: …'"
            )
        super().__init__(options, split_evenly(by_author), TEXT_FILE)


def paragraphs_of(text: str) -> dict[str, list[str]]:
    """Returns the paragraphs of fitting length by author, in the order of the text.

    Args:
        text: Books, each under a heading with title, author and year.
    """
    pieces = HEADING.split(text)  # what is before the first heading, then author, text, author, …
    found: dict[str, list[str]] = {}
    for author, book in zip(pieces[1::2], pieces[2::2], strict=True):
        paragraphs = (" ".join(piece.split()) for piece in book.split("\n\n"))
        fitting = [p for p in paragraphs if SHORTEST <= len(p) <= LONGEST and p[0] not in "#_-"]
        found.setdefault(author.strip(), []).extend(fitting)
    return found


def split_evenly(by_author: dict[str, list[str]]) -> dict[str, Split]:
    """Draws as many paragraphs of every author, spread evenly over each part of their books.

    Raises:
        ExperimentError: An author has too few.
    """
    splits: dict[str, Split] = {}
    for name, (begin, end) in PARTS.items():
        texts, labels = [], []
        for label, (author, paragraphs) in enumerate(sorted(by_author.items())):
            size = len(paragraphs)
            part = paragraphs[round(begin * size) : round(end * size)]
            if len(part) < COUNTS[name]:
                raise ExperimentError(
                    f"of {author} there are {len(part)} paragraphs of {SHORTEST} to {LONGEST} "
                    f"characters for {name}, and {COUNTS[name]} are needed"
                )
            chosen = np.linspace(0, len(part) - 1, COUNTS[name]).round().astype(int)
            texts += [part[index] for index in chosen]
            labels += [label] * COUNTS[name]
        splits[name] = (texts, np.array(labels, np.int32))
    return splits
