"""A decoder is pretrained and written in the form that `--model` takes."""

import json
import re

import numpy as np
import pytest

from experiments import decoder
from experiments.decoder import RECORD_FILE
from experiments.errors import ExperimentError
from experiments.models.llama import load_llama, tensor_names
from experiments.models.text import read_tokenizer
from experiments.schema import RunResult
from experiments.tasks import books
from experiments.tasks.books import Books, make_tokenizer
from experiments.tasks.shakespeare import Shakespeare, ShakespeareOptions
from tests.experiments.test_cli import invoke
from tests.experiments.tiny_data import BOOKS, write_books, write_decoder, write_lm


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_books(folder)
    write_lm(folder)
    return folder


@pytest.fixture(scope="module")
def made(data):
    return write_decoder(data / "decoder", data)


def test_the_decoder_has_learnt_its_text(made):
    start, end = made.curve[0].validation.loss, made.final["test"].loss
    assert end < 0.2 * start


def test_the_folder_holds_the_trained_weights_and_their_record(data, made):
    folder = data / "decoder"
    assert RunResult.model_validate_json((folder / RECORD_FILE).read_text()) == made
    model, task = load_llama(folder), Books(BOOKS, data)
    assert model.shape == BOOKS.shape
    (batch,) = task.eval_batches("test")
    totals = task.totals(model, batch)
    np.testing.assert_allclose(totals.loss / totals.weight, made.final["test"].loss, rtol=1e-5)
    assert dict(tensor_names(model.shape)).keys() >= {"embed/embedding", "norm/scale"}


def test_the_config_has_the_names_of_a_hugging_face_llama(data, made):
    config = json.loads((data / "decoder" / "config.json").read_text())
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    assert config.items() >= ({"model_type": "llama", "eos_token_id": 0} | sizes).items()
    assert not {"width", "depth", "heads", "eos"} & set(config)


def test_the_folder_loads_in_the_task_that_takes_a_decoder(data, made):
    options = ShakespeareOptions(model=str(data / "decoder"), width=32, length=16, batch_size=2)
    task = Shakespeare(options, data)
    assert next(task.train_batches(0))["tokens"].shape == (2, 16)
    assert re.fullmatch(r"sha256 \w{12}", task.data["model"])


@pytest.mark.parametrize(("size", "there"), [("width", 32), ("depth", 1)])
def test_a_decoder_of_another_size_is_refused(data, made, size, there):
    options = ShakespeareOptions(model=str(data / "decoder"), **{size: 64})
    wanted = rf"has {size} {there}, and .* needs 64: .*pretrain --{size}"
    with pytest.raises(ExperimentError, match=wanted):
        Shakespeare.check(options)


def test_a_tokenizer_keeps_every_text_and_splits_numbers(data, made):
    tokenizer = read_tokenizer(data / "decoder")
    text = "abc  bca\n1234 naïve “quotes” 🙂"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens.ids) == text
    assert [token for token in tokens.tokens if token.isdigit()] == list("1234")
    assert tokenizer.token_to_id(books.END) == 0
    assert make_tokenizer("abc " * 100, 300).get_vocab_size() <= 300


def test_the_command_makes_a_folder_and_leaves_an_existing_one_alone(data, tmp_path):
    arguments = ["pretrain", "--width=32", "--depth=1", "--steps=2", "--batch-size=2"]
    where = ["--data-dir", data, "--out", tmp_path / "made"]
    code, output = invoke(*arguments, *where)
    assert code == 0, output
    assert re.search(r"made: [\d,]+ parameters, test loss [\d.]+ nats a token", output)
    before = {path: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    code, output = invoke(*arguments, *where)
    assert code == 2
    assert "made exists; delete it, or choose another --out" in output
    assert {path: path.read_bytes() for path in (tmp_path / "made").iterdir()} == before


def test_nothing_is_left_of_a_decoder_that_cannot_be_written(data, tmp_path, monkeypatch):
    def fail(model, folder):
        (folder / "model.safetensors").write_bytes(b"part")
        raise OSError("no space left on device")

    monkeypatch.setattr(decoder, "save_llama", fail)
    with pytest.raises(ExperimentError, match=r"cannot write .*no space left"):
        write_decoder(tmp_path / "made", data, steps=1)
    assert not list(tmp_path.iterdir())


def test_damaged_files_say_what_to_do(data, made, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in (data / "decoder").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ExperimentError, match="cannot be read as safetensors"):
        load_llama(folder)
    (tmp_path / books.TEXT_FILE).parent.mkdir()
    (tmp_path / books.TEXT_FILE).write_bytes(b"no xz")
    with pytest.raises(ExperimentError, match="is not UTF-8 text compressed by xz"):
        Books(BOOKS, tmp_path)
    with pytest.raises(ExperimentError, match="cannot be split into heads of 8: choose a multiple"):
        Books(BOOKS.model_copy(update={"width": 30}), data)
