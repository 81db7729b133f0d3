"""A small decoder pretrained here, as a folder in the Hugging Face form: what `pretrain` makes."""

import os
import shutil
from pathlib import Path

from experiments.errors import ExperimentError
from experiments.models.llama import save_llama
from experiments.models.text import TOKENIZER_FILE
from experiments.schema import RunResult
from experiments.task import OnStep
from experiments.tasks.books import Books
from experiments.tasks.pretraining import pretrain

RECORD_FILE = "pretraining.json"
"""The record of the pretraining beside the weights."""


def require_no_folder(out: Path) -> None:
    """Refuses to write over a folder.

    Raises:
        ExperimentError: It exists.
    """
    if out.exists():
        raise ExperimentError(f"{out} exists; delete it, or choose another --out")


def make_decoder(
    task: Books, out: Path, *, steps: int, learning_rate: float, on_step: OnStep
) -> RunResult:
    """Pretrains a decoder on books and writes it, with its tokenizer, as a whole or not at all.

    Args:
        task: The decoder and the books.
        out: Folder to make.
        steps: How many updates.
        learning_rate: Peak learning rate of AdamW.
        on_step: Called after each step.

    Returns:
        The record of the training.

    Raises:
        ExperimentError: The folder exists, the training diverges, or the disk is full.
    """
    require_no_folder(out)
    run = pretrain(task, steps=steps, learning_rate=learning_rate, seed=0, on_step=on_step)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        try:
            save_llama(run.model, unfinished)
            task.tokenizer.save(str(unfinished / TOKENIZER_FILE))
            (unfinished / RECORD_FILE).write_text(run.result.model_dump_json() + "\n")
            unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise ExperimentError(f"cannot write {out}: {error}") from error
    return run.result
