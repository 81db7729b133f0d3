"""Tiny data sets in the form of the real ones."""

import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.decoder import make_decoder
from experiments.schema import RunResult
from experiments.task import ignore_steps
from experiments.tasks import books
from experiments.tasks.lm import MODEL_FILE, TEXT_FILE
from tests.experiments.test_llama import PIECES, GGUFFile, write_gguf
from tests.experiments.tiny_models import LLAMA, random_tensors


def write_all(folder: Path) -> Path:
    """Writes every data set that a study reads."""
    for write in (
        write_mnist,
        write_cifar,
        write_sst2,
        write_cola,
        write_lm,
        write_books,
        write_gsm8k,
    ):
        write(folder)
    return folder


def write_mnist(folder: Path, count: int = 60) -> None:
    """Writes random images whose brightness is their class."""
    (folder / "mnist").mkdir()
    label = np.arange(count, dtype=np.uint8) % 10
    image = np.broadcast_to(25 * label[:, None, None], (count, 28, 28)).astype(np.uint8)
    arrays: dict[str, Any] = {"x_train": image, "y_train": label, "x_test": image, "y_test": label}
    np.savez(folder / "mnist" / "mnist.npz", **arrays)


def write_cifar(folder: Path, count: int = 80) -> None:
    """Writes grey images sorted by class, whose brightness is their class, as JPEG bytes."""
    (folder / "cifar10_jpeg").mkdir()
    label = np.sort(np.arange(count) % 10).astype(np.uint8)
    files = []
    for value in label:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (25 * int(value),) * 3).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    arrays: dict[str, Any] = {"classes": np.array(list("abcdefghij"))}
    for part in ("train", "test"):
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_len"] = np.array(list(map(len, files)), np.uint16)
        arrays[f"{part}_label"] = label
    np.savez(folder / "cifar10_jpeg" / "cifar10_jpeg.npz", **arrays)


def write_sst2(folder: Path) -> None:
    """Writes good and dull films."""
    (folder / "sst2").mkdir()
    rows = ["sentence\tlabel", *(["a good film\t1", "a dull film\t0"] * 8)]
    for name in ("train.tsv", "dev.tsv", "test_labeled.tsv"):
        (folder / "sst2" / name).write_text("\n".join(rows) + "\n")


def write_cola(folder: Path) -> None:
    """Writes sentences in and out of order."""
    (folder / "cola").mkdir()
    rows = ["x01\t1\t\tThe cat sleeps.", "x01\t0\t*\tCat the sleeps."] * 8
    for name in ("in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv"):
        (folder / "cola" / name).write_text("\n".join(rows) + "\n")


def write_lm(folder: Path) -> None:
    """Writes a decoder of one layer and a text that a bigram model could learn."""
    for name in (MODEL_FILE, TEXT_FILE):
        (folder / name).parent.mkdir()
    config = LLAMA | {"num_hidden_layers": 1}
    tensors = random_tensors(config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (len(PIECES), config["hidden_size"]))
    write_gguf(folder / MODEL_FILE, tensors, config, GGUFFile())
    (folder / TEXT_FILE).write_text("abc bca\n" * 250)


def write_books(folder: Path) -> None:
    """Writes novels of ten authors, compressed: lines that a bigram model could learn."""
    (folder / books.TEXT_FILE).parent.mkdir()
    line = "abc bca 12 " * 6
    novels = [
        f"# Title: {author}\r\n\r\n## Author: {author}\r\n\r\n## Year: 1869\r\n\r\n"
        + f"{line}{author}\r\n\r\n" * 440
        for author in "ABCDEFGHIJ"
    ]
    (folder / books.TEXT_FILE).write_bytes(lzma.compress("".join(novels).encode()))


def write_gsm8k(folder: Path, count: int = 20) -> None:
    """Writes problems whose answer is in the question."""
    (folder / "gsm8k").mkdir()
    rows = [{"question": f"abc {n}", "answer": f"bca #### {n}"} for n in range(count)]
    for name in ("train.jsonl", "test.jsonl"):
        (folder / "gsm8k" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


BOOKS = books.BooksOptions(
    width=32, depth=1, head_width=8, vocabulary=300, batch_size=4, length=16, eval_limit=8
)


def write_decoder(folder: Path, data: Path, steps: int = 60) -> RunResult:
    """Pretrains a tiny decoder on the books of a folder of data."""
    task = books.Books(BOOKS, data)
    return make_decoder(task, folder, steps=steps, learning_rate=1e-2, on_step=ignore_steps)
