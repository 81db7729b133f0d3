import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from experiments.errors import ExperimentError
from experiments.models.bert import (
    EncoderShape,
    FirstTokenHead,
    TextClassifier,
    load_encoder,
    load_pooler,
    open_encoder,
)
from experiments.models.checkpoint import fill, linear_names
from experiments.models.text import encode, load_tokenizer
from tests.experiments.parity import REFERENCE, text_batch
from tests.experiments.tiny_models import BERT, CLASSES, CONFIGS, WIDTH, write_model

HEADS = {
    "bert": {"dense": "pooler.dense", "classifier": "classifier"},
    "roberta": {"dense": "classifier.dense", "classifier": "classifier.out_proj"},
}


@nnx.jit
def logits_of(model, batch):
    return model(batch["tokens"], batch["mask"], batch["segments"])


def load_classifier(folder, kind):
    encoder = load_encoder(folder)
    names = dict(
        pair for ours, theirs in HEADS[kind].items() for pair in linear_names(ours, theirs)
    )
    head = fill(
        lambda: FirstTokenHead(WIDTH, CLASSES, rngs=nnx.Rngs(0)),
        open_encoder(folder, encoder.shape),
        names,
    )
    return TextClassifier(encoder, head)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_logits_equal_those_of_torch(kind, tmp_path):
    config = CONFIGS[kind]
    write_model(tmp_path, config)
    batch = text_batch(config["pad_token_id"], config["type_vocab_size"])
    got = logits_of(load_classifier(tmp_path, kind), batch)
    np.testing.assert_allclose(got, np.load(REFERENCE)[kind], rtol=0, atol=1e-4)


def test_the_longest_text_is_the_last_position():
    assert EncoderShape.model_validate(CONFIGS["bert"]).max_length == 40
    assert EncoderShape.model_validate(CONFIGS["roberta"]).max_length == 38


def test_names_of_older_files_and_of_bare_encoders(tmp_path):
    tensors = write_model(tmp_path / "new", BERT)
    old = {}
    for name, value in tensors.items():
        renamed = name.removeprefix("bert.")
        if "LayerNorm" in name:
            renamed = renamed.replace(".weight", ".gamma").replace(".bias", ".beta")
        old[renamed] = value
    write_model(tmp_path / "old", BERT, seed=1)
    save_file(old, tmp_path / "old" / "model.safetensors")
    new_state, old_state = (nnx.state(load_encoder(tmp_path / x)) for x in ("new", "old"))
    jax.tree.map(np.testing.assert_array_equal, new_state, old_state)
    kernel = load_pooler(tmp_path / "old", load_encoder(tmp_path / "old").shape).kernel[...]
    np.testing.assert_array_equal(kernel, tensors["bert.pooler.dense.weight"].T)


def test_weights_are_float32_whatever_the_file_holds(tmp_path):
    tensors = write_model(tmp_path, BERT)
    half = {name: value.astype(np.float16) for name, value in tensors.items()}
    save_file(half, tmp_path / "model.safetensors")
    leaves = jax.tree.leaves(nnx.state(load_encoder(tmp_path)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "albert"}, "model_type is 'albert'; this task takes 'bert' or 'roberta'"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_hidden_layers": 3}, r"no tensor 'encoder\.layer\.2\."),
        ({"max_position_embeddings": 8}, r"gives shape \(40, 32\), \(8, 32\) is expected"),
    ],
)
def test_another_architecture_is_refused(change, message, tmp_path):
    write_model(tmp_path, BERT)
    (tmp_path / "config.json").write_text(json.dumps(BERT | change))
    with pytest.raises(ExperimentError, match=message):
        load_encoder(tmp_path)


def test_a_missing_pooler_is_an_error(tmp_path):
    write_model(tmp_path, CONFIGS["roberta"])
    with pytest.raises(ExperimentError, match=r"no tensor 'pooler\.dense\."):
        load_pooler(tmp_path, load_encoder(tmp_path).shape)


def test_tokenizers_pad_with_the_models_token(tmp_path):
    vocabulary = {"<s>": 0, "<pad>": 1, "a": 2, "b": 3, "<unk>": 4}
    Tokenizer(WordLevel(vocabulary, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    batch = encode(load_tokenizer(tmp_path, 3, pad=1), ["a", "zz"])
    np.testing.assert_array_equal(batch["tokens"], [[2, 1, 1], [4, 1, 1]])
    np.testing.assert_array_equal(batch["mask"], [[True, False, False]] * 2)
    with pytest.raises(ExperimentError, match="has no token 9"):
        load_tokenizer(tmp_path, 3, pad=9)


def test_missing_and_damaged_tokenizers_are_errors(tmp_path):
    with pytest.raises(ExperimentError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path, 8, pad=0)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ExperimentError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path, 8, pad=0)
