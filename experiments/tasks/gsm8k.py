"""GSM8K: worked answers to school mathematics, by a Llama decoder.

A text is question, line break, answer and the end-of-text token; the loss is in nats a token of the
answer, the accuracy that of the answer's next token given those before. With `solve_limit` answers
to test problems are generated after the training, greedily: a problem is solved if the number after
`####` is the right one. The last tenth of the training problems are for validation.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field
from tokenizers import Tokenizer

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.models.llama import Llama, LlamaShape, greedy_decode, load_llama
from experiments.models.text import read_tokenizer
from experiments.task import Batch, OnStep, Totals, ignore_steps
from experiments.tasks.data import classification_totals, padded_batches
from experiments.tasks.hub import (
    HubData,
    HubOptions,
    HubTask,
    find_model,
    rows_digest,
    split_off_last_tenth,
    weights_digest,
)

DATA = HubData(
    folder="gsm8k",
    name="openai/gsm8k",
    config="main",
    splits={"train": ("train",), "test": ("test",)},
    columns={"question": (), "answer": ()},
)


class GSM8KOptions(HubOptions):
    """Sizes; see `HubOptions`. The adapters are in all seven linear maps.

    Attributes:
        max_length: Tokens of question and answer; what is longer is cut.
        dtype: Of the pretrained weights and the activations; the adapters are float32.
        solve_limit: To so many of the test problems an answer is generated after the training.
    """

    targets: str = "query|key|value|out|gate|up|down"
    batch_size: int = Field(default=8, ge=1)
    max_length: int = Field(default=384, ge=2)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    solve_limit: int = Field(default=0, ge=0)


class GSM8K(HubTask[GSM8KOptions]):
    """A pretrained decoder with adapters on GSM8K.

    Args:
        options: Sizes.
        data_dir: Folder of the data, see `experiments.tasks.hub`; the hub is asked if it is None.
        on_step: Not called.
    """

    name: ClassVar[str] = "gsm8k"
    options_type = GSM8KOptions
    shape = LlamaShape
    eval_batch: ClassVar[int] = 16

    def __init__(
        self,
        options: GSM8KOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options)
        model_dir = find_model(options.model)
        model = load_llama(model_dir, jnp.dtype(options.dtype))
        self._tokenizer, eos = read_tokenizer(model_dir), model.shape.eos
        if eos is None:
            raise ExperimentError(f"{model_dir}/config.json: eos_token_id is missing")
        columns = DATA.load(data_dir)
        self.examples = {
            split: pack_answers(self._tokenizer, eos, texts["question"], texts["answer"], options)
            for split, texts in columns.items()
        }
        self.examples["train"], self.examples["validation"] = split_off_last_tenth(
            self.examples["train"]
        )
        self.record = {"source": DATA.name, "model": weights_digest(model_dir)}
        self.record |= {split: rows_digest(texts) for split, texts in columns.items()}
        self._base, self._eos = nnx.split(model), eos
        self._solutions = [final_number(answer) for answer in columns["test"]["answer"]]

    @property
    def head(self) -> nnx.filterlib.Filter:
        """Nothing: the model keeps its vocabulary."""
        return nnx.Nothing()

    def build_model(self, seed: int, adapters: Adapters) -> Llama:
        """Returns the pretrained decoder with fresh adapters."""
        options, rngs = self.options, nnx.Rngs(seed)
        model = nnx.merge(*self._base)
        adapters.add_to(model, options.targets, options.lora, rngs=rngs)
        return model

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns cross entropy and correct guesses of the answers' tokens."""
        weight = batch["weight"][:, None] * batch["in_answer"]
        return classification_totals(model(batch["tokens"]), batch | {"weight": weight})

    def solved(self, model: Any, split: str) -> float | None:
        """Returns the share of the first `solve_limit` test problems that the model solves."""
        solutions = self._solutions[: self.options.solve_limit]
        if split != "test" or not solutions:
            return None
        problems = {name: x[: len(solutions)] for name, x in self.examples["test"].items()}
        replies: list[str] = []
        for batch in padded_batches(problems, self.eval_batch):
            sizes = batch["in_answer"].argmax(axis=1) + 1
            prompts = jnp.asarray(batch["tokens"])
            texts = greedy_decode(
                model, prompts, jnp.asarray(sizes), self.options.max_length, eos=self._eos
            )
            replies += [
                self._tokenizer.decode(text[size:])
                for text, size in zip(np.asarray(texts), sizes, strict=True)
            ]
        found = map(final_number, replies)  # those of the last batch's fill come last
        right = [x is not None and x == y for x, y in zip(found, solutions, strict=False)]
        return sum(right) / len(solutions)


def final_number(answer: str) -> str | None:
    """Returns the number after the first `####` of an answer, without commas; None without one."""
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)", answer)
    return found.group(1).replace(",", "") if found else None


def pack_answers(
    tokenizer: Tokenizer,
    eos: int,
    questions: Sequence[str],
    answers: Sequence[str],
    options: GSM8KOptions,
) -> Batch:
    """Turns problems into rows of tokens.

    Args:
        tokenizer: The model's; what it puts before a text, it puts before the question.
        eos: Token that ends an answer, and fills the rows.
        questions: The questions.
        answers: Their answers.
        options: `max_length` is used.

    Returns:
        `tokens`, their successors `label`, and `in_answer`, 1 where the successor is of the
        answer, all (problems, max_length - 1).

    Raises:
        ExperimentError: A question leaves no room for its answer.
    """
    length = options.max_length
    prompts = tokenizer.encode_batch([f"{question}\n" for question in questions])
    replies = tokenizer.encode_batch(list(answers), add_special_tokens=False)
    rows = np.full((len(questions), length), eos, np.int32)
    in_answer = np.zeros((len(questions), length), np.float32)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        begin = len(prompt.ids)
        if begin >= length:
            raise ExperimentError(
                f"task_options.max_length: GSM8K's question {questions[row][:40]!r}… has {begin} "
                f"tokens; {length} leave no room for the answer"
            )
        text = [*prompt.ids, *reply.ids, eos][:length]
        rows[row, : len(text)] = text
        in_answer[row, begin : len(text)] = 1.0
    return {"tokens": rows[:, :-1], "label": rows[:, 1:], "in_answer": in_answer[:, 1:]}
