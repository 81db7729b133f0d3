"""The Llama stories260K, pretrained on tiny stories, on Shakespeare, by its own tokenizer."""

from pathlib import Path
from typing import ClassVar

from experiments.models.gguf_llama import load_gguf
from experiments.task import OnStep, ignore_steps
from experiments.tasks.windows import WindowOptions, WindowTask, digest, read_text, require_file

MODEL_FILE = "stories260k/stories260K.gguf"
TEXT_FILE = "tinyshakespeare/input.txt"
SOURCES = {
    MODEL_FILE: "the GGUF form of karpathy/tinyllamas (stories260K) on the Hugging Face hub",
    TEXT_FILE: "data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn",
}


class LM(WindowTask[WindowOptions]):
    """stories260K with adapters on tinyshakespeare.

    Args:
        options: Sizes.
        data_dir: Folder that holds `tinyshakespeare/input.txt` and `stories260k/stories260K.gguf`.
        on_step: Not called.
    """

    name: ClassVar[str] = "lm"
    options_type = WindowOptions

    def __init__(
        self,
        options: WindowOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        model_path, text_path = (
            require_file(self.name, data_dir, name, SOURCES) for name in SOURCES
        )
        loaded = load_gguf(model_path)
        super().__init__(
            options,
            model=loaded.model,
            text=read_text(text_path),
            encode=lambda text: loaded.tokenizer.encode(text).ids,
            path=text_path,
            record={
                "source": TEXT_FILE,
                "model": f"{MODEL_FILE}, {digest(model_path.read_bytes())}",
            },
        )
