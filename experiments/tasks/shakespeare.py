"""A decoder of the Hugging Face form on Shakespeare, by the decoder's own tokenizer."""

from pathlib import Path
from typing import ClassVar

from experiments.errors import ExperimentError
from experiments.models.checkpoint import CONFIG_FILE, read_shape
from experiments.models.llama import LlamaShape, load_llama
from experiments.models.text import read_tokenizer
from experiments.task import OnStep, ignore_steps
from experiments.tasks.hub import find_model, weights_digest
from experiments.tasks.lm import SOURCES, TEXT_FILE
from experiments.tasks.windows import WindowOptions, WindowTask, read_text, require_file


class ShakespeareOptions(WindowOptions):
    """Sizes, and the decoder.

    Attributes:
        model: Name on the hub, or a folder.
        width: Features of a token that the decoder must have; any if None.
        depth: Layers that it must have; any if None.
    """

    model: str
    width: int | None = None
    depth: int | None = None


class Shakespeare(WindowTask[ShakespeareOptions]):
    """A pretrained decoder with adapters on tinyshakespeare.

    Args:
        options: Sizes and the decoder.
        data_dir: Folder that holds `tinyshakespeare/input.txt`.
        on_step: Not called.
    """

    name: ClassVar[str] = "shakespeare"
    options_type = ShakespeareOptions

    @classmethod
    def check(cls, options: ShakespeareOptions) -> None:
        """Refuses a decoder of another architecture or size, by its `config.json` alone."""
        shape = read_shape(find_model(options.model, [CONFIG_FILE]), LlamaShape)
        for name in ("width", "depth"):
            wanted, there = getattr(options, name), getattr(shape, name)
            if wanted not in (None, there):
                raise ExperimentError(
                    f"the decoder in {options.model} has {name} {there}, and this study needs "
                    f"{wanted}: pass --model with one that "
                    f"`python -m experiments pretrain --{name} {wanted}` makes"
                )

    def __init__(
        self,
        options: ShakespeareOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        self.check(options)
        folder = find_model(options.model)
        path = require_file(self.name, data_dir, TEXT_FILE, {TEXT_FILE: SOURCES[TEXT_FILE]})
        tokenizer = read_tokenizer(folder)
        super().__init__(
            options,
            model=load_llama(folder),
            text=read_text(path),
            encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            path=path,
            record={"source": TEXT_FILE, "model": weights_digest(folder)},
        )
