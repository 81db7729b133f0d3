"""Pretraining of a small Llama decoder on English books, with a tokenizer made from them.

The tokenizer is a byte-level BPE in which every digit is a token of its own. It is made from the
training part of the text.
"""

import lzma
from pathlib import Path
from typing import ClassVar

from flax import nnx
from pydantic import Field
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from experiments.errors import ExperimentError
from experiments.models.llama import Llama, LlamaShape
from experiments.task import OnStep, ignore_steps
from experiments.tasks.windows import SPLITS, WindowOptions, WindowTask, require_file

TEXT_FILE = "books/books.txt.xz"
SOURCES = {
    TEXT_FILE: "books in the public domain as one xz-compressed text, such as those of "
    "github.com/mlschmitt/classic-books-markdown"
}
END = "<|end|>"
"""The token that ends a text; its id is 0."""


class BooksOptions(WindowOptions):
    """Sizes of the decoder and of the batches; the options of adapters are not used.

    Attributes:
        width: Features of a token.
        depth: Layers.
        head_width: Features of an attention head; it divides `width`.
        vocabulary: Tokens of the tokenizer.
    """

    batch_size: int = Field(default=16, ge=1)
    eval_limit: int | None = Field(default=256, ge=1)
    width: int = Field(default=256, ge=8)
    depth: int = Field(default=4, ge=1)
    head_width: int = Field(default=32, ge=2)
    vocabulary: int = Field(default=4096, ge=300)

    @property
    def shape(self) -> LlamaShape:
        """The sizes of the decoder."""
        heads = self.width // self.head_width
        return LlamaShape(
            vocabulary=self.vocabulary,
            width=self.width,
            depth=self.depth,
            heads=heads,
            kv_heads=heads,
            head_width=self.head_width,
            mlp_width=8 * round(self.width / 3),
            norm_eps=1e-5,
            tied=True,
            eos=0,
        )


class Books(WindowTask[BooksOptions]):
    """A decoder from a random start on books: all its weights are to be trained.

    Args:
        options: Sizes.
        data_dir: Folder that holds `books/books.txt.xz`.
        on_step: Not called.

    Attributes:
        tokenizer: The decoder's tokenizer.
    """

    name: ClassVar[str] = "books"
    options_type = BooksOptions

    def __init__(
        self,
        options: BooksOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        if options.width % options.head_width:
            raise ExperimentError(
                f"a width of {options.width} cannot be split into heads of {options.head_width}: "
                "choose a multiple"
            )
        path = require_file(self.name, data_dir, TEXT_FILE, SOURCES)
        text = read_books(path)
        self.tokenizer = make_tokenizer(
            text[: round(SPLITS["train"][1] * len(text))], options.vocabulary
        )
        super().__init__(
            options,
            model=Llama(options.shape, rngs=nnx.Rngs(0)),
            text=text,
            encode=self._encode,
            path=path,
            record={"source": TEXT_FILE},
        )

    def _encode(self, text: str) -> list[int]:
        pieces = self.tokenizer.encode_batch(text.splitlines(keepends=True))
        return [token for piece in pieces for token in piece.ids]


def make_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Makes a byte-level BPE of a text.

    Args:
        text: The text.
        vocabulary: Tokens wanted; a short text gives fewer.

    Returns:
        The tokenizer, whose token 0 ends a text.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def read_books(path: Path) -> str:
    """Reads the books, with the line ends of Unix.

    Raises:
        ExperimentError: The file is damaged.
    """
    try:
        return lzma.decompress(path.read_bytes()).decode("utf-8").replace("\r\n", "\n")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ExperimentError(
            f"{path} is not UTF-8 text compressed by xz ({error}); fetch it again"
        ) from error
