"""Texts as token ids, by the `tokenizer.json` beside a model's weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from experiments.errors import ExperimentError

TOKENIZER_FILE = "tokenizer.json"


def read_tokenizer(model_dir: Path) -> Tokenizer:
    """Reads the tokenizer as it is.

    Raises:
        ExperimentError: `tokenizer.json` is missing or unreadable.
    """
    path = model_dir / TOKENIZER_FILE
    if not path.is_file():
        raise ExperimentError(f"{path} does not exist; it belongs beside the model's weights")
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ExperimentError(f"{path} cannot be read as a tokenizer ({error})") from error


def load_tokenizer(model_dir: Path, max_length: int, pad: int) -> Tokenizer:
    """Loads the tokenizer, set to truncate and to pad every text on the right to `max_length`.

    Args:
        model_dir: Folder with `tokenizer.json`.
        max_length: Tokens of every text, special ones included.
        pad: Id of the padding token.

    Returns:
        The tokenizer.

    Raises:
        ExperimentError: `tokenizer.json` is missing or unreadable, or knows no token `pad`.
    """
    tokenizer = read_tokenizer(model_dir)
    pad_token = tokenizer.id_to_token(pad)
    if pad_token is None:
        raise ExperimentError(
            f"{model_dir / TOKENIZER_FILE} has no token {pad}, with which config.json pads texts"
        )
    tokenizer.enable_truncation(max_length=max_length)
    tokenizer.enable_padding(length=max_length, pad_id=pad, pad_token=pad_token)
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: Sequence[str] | Sequence[tuple[str, str]]
) -> dict[str, np.ndarray]:
    """Turns texts, or pairs of texts, into arrays (texts, max_length).

    Returns:
        `tokens` (int32), `mask` (bool, False for padding), and `segments` (int32), which says of
        which text of a pair a token is.
    """
    encodings = tokenizer.encode_batch(list(texts))
    return {
        "tokens": np.array([e.ids for e in encodings], dtype=np.int32),
        "mask": np.array([e.attention_mask for e in encodings], dtype=bool),
        "segments": np.array([e.type_ids for e in encodings], dtype=np.int32),
    }
