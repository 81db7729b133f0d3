import os
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from experiments.adapters import LowRank
from experiments.errors import ExperimentError
from experiments.models.gguf_llama import load_gguf
from experiments.models.llama import greedy_decode
from experiments.schema import Plan
from experiments.tasks.lm import LM, MODEL_FILE, TEXT_FILE
from experiments.tasks.windows import WindowOptions
from experiments.trainer import Trainer
from tests.experiments.test_llama import PIECES, GGUFFile, logits_of, write_gguf
from tests.experiments.tiny_models import LLAMA, random_tensors

DATA = Path(os.environ.get("EXPERIMENTS_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL_MODEL = DATA / MODEL_FILE

PUBLISHED = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. \
One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. \
She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." \
Her mom said, "Don't worry, Lily. We can help you"""
"""What llama2.c's doc/stories260K.md gives for temperature 0."""

needs_stories = pytest.mark.skipif(
    not REAL_MODEL.is_file(),
    reason=f"{REAL_MODEL} is not there: set EXPERIMENTS_DATA to a folder with {MODEL_FILE}",
)


@needs_stories
def test_greedy_decoding_gives_the_published_sample():
    model, tokenizer, bos = load_gguf(REAL_MODEL)
    want = [bos, *tokenizer.encode(PUBLISHED).ids]
    assert len(want) == 256
    assert tokenizer.decode(want[1:]) == PUBLISHED
    # Every token being the likeliest after those before it, decoding one by one gives the same.
    logits = logits_of(model, np.array([want], np.int32))
    np.testing.assert_array_equal(logits[0, :-1].argmax(axis=-1), want[1:])
    got = greedy_decode(model, np.array([[bos]], np.int32), np.array([1]), 24)
    np.testing.assert_array_equal(got[0], want[:24])


@pytest.fixture
def folder(tmp_path):
    """A data folder with a tiny model and a text that a bigram model could learn."""
    (tmp_path / MODEL_FILE).parent.mkdir()
    (tmp_path / TEXT_FILE).parent.mkdir()
    config = LLAMA | {"num_hidden_layers": 1}
    tensors = random_tensors(config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (len(PIECES), config["hidden_size"]))
    write_gguf(tmp_path / MODEL_FILE, tensors, config, GGUFFile())
    (tmp_path / TEXT_FILE).write_text("abc bca\n" * 250)
    return tmp_path


OPTIONS = WindowOptions(rank=2, batch_size=4, length=8)


def test_a_tiny_model_learns_a_tiny_text(folder):
    task = LM(OPTIONS, folder)
    assert re.match(r"1800 characters, \d+ tokens, sha256 \w{12}$", task.data["train"])
    result = Trainer(task, "adamw", Plan(steps=60, eval_every=60, head_learning_rate=1e-3)).run(
        3e-2, seed=0
    )
    start = result.result.curve[0].validation
    assert result.result.final["validation"].loss < 0.5 * start.loss
    assert result.result.final["test"].loss < 0.5 * start.loss


def test_windows_predict_the_next_token(folder):
    task = LM(OPTIONS, folder)
    batch = next(task.train_batches(0))
    assert batch["tokens"].shape == batch["label"].shape == (4, 8)
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["label"][:, :-1])
    again = next(task.train_batches(0))
    np.testing.assert_array_equal(batch["tokens"], again["tokens"])
    assert (batch["tokens"] != next(task.train_batches(1))["tokens"]).any()


def test_evaluation_covers_a_split_once(folder):
    task = LM(OPTIONS, folder)
    (batch,) = task.eval_batches("validation")
    kept = int(batch["weight"].sum())
    text = batch["label"][:kept].ravel()
    tokenizer = load_gguf(folder / MODEL_FILE).tokenizer
    part = ("abc bca\n" * 250)[1800:1900]
    np.testing.assert_array_equal(text, tokenizer.encode(part).ids[1 : len(text) + 1])
    assert len(tokenizer.encode(part).ids) - len(text) <= OPTIONS.length
    limited = LM(OPTIONS.model_copy(update={"eval_limit": 2}), folder)
    assert limited.eval_batches("test")[0]["weight"].sum() == 2


def test_the_loss_is_a_mean_over_tokens(folder):
    task = LM(OPTIONS, folder)
    model = task.build_model(0, LowRank())
    (batch,) = task.eval_batches("validation")
    totals = nnx.jit(task.totals)(model, batch)
    kept = batch["weight"] > 0
    logits = np.asarray(logits_of(model, batch["tokens"][kept]), np.float64)
    label = batch["label"][kept][..., None]
    chosen = np.take_along_axis(logits, label, axis=-1)[..., 0]
    losses = np.log(np.exp(logits).sum(axis=-1)) - chosen
    assert totals.weight == losses.size
    np.testing.assert_allclose(totals.loss, losses.sum(), rtol=1e-5)
    assert totals.correct == (logits.argmax(-1) == label[..., 0]).sum()


@pytest.mark.parametrize("missing", [MODEL_FILE, TEXT_FILE])
def test_a_missing_file_says_what_to_fetch(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ExperimentError, match=rf"{missing} does not exist.*tinyllamas.*char-rnn"):
        LM(OPTIONS, folder)


def test_bad_text_and_no_folder_are_errors(folder):
    with pytest.raises(ExperimentError, match="needs --data-dir"):
        LM(OPTIONS)
    (folder / TEXT_FILE).write_text("abc")
    with pytest.raises(ExperimentError, match="which is not above length 8"):
        LM(OPTIONS, folder)
    (folder / TEXT_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExperimentError, match="is not UTF-8"):
        LM(OPTIONS, folder)
