import json
from dataclasses import dataclass

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from experiments.errors import ExperimentError
from experiments.models.gguf_llama import load_gguf, sentencepiece_bpe
from experiments.models.llama import greedy_decode, load_llama
from tests.experiments import tiny_models
from tests.experiments.parity import REFERENCE, long_tokens
from tests.experiments.tiny_models import LLAMA, LLAMA_3, write_model


@nnx.jit
def logits_of(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_logits_equal_those_of_torch(name, tmp_path):
    write_model(tmp_path, tiny_models.CONFIGS[name])
    got = logits_of(load_llama(tmp_path), long_tokens())
    np.testing.assert_allclose(got, np.load(REFERENCE)[name], rtol=0, atol=1e-4)


def test_newer_files_write_the_rotary_settings_otherwise(tmp_path):
    old = LLAMA_3
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    for name, config in (("old", old), ("new", new)):
        write_model(tmp_path / name, config)
    assert load_llama(tmp_path / "new").shape == load_llama(tmp_path / "old").shape


def test_bfloat16_weights_in_shards(tmp_path):
    config = LLAMA | {"num_key_value_heads": 4}
    tensors = write_model(tmp_path / "whole", config)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_text(json.dumps(config))
    halves = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in halves.items():
        # numpy has no bfloat16; jax's arrays do.
        rounded = {name: np.asarray(jnp.bfloat16(tensors[name])) for name in names}
        save_file(rounded, shards / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    model = load_llama(shards, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    want = logits_of(load_llama(tmp_path / "whole"), long_tokens())
    got = logits_of(model, long_tokens())
    assert got.dtype == jnp.float32
    assert 0 < np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)

    (shards / "b.safetensors").unlink()
    with pytest.raises(ExperimentError, match=r"b\.safetensors does not exist"):
        load_llama(shards)
    index.write_text("{}")
    with pytest.raises(ExperimentError, match="lists no shards"):
        load_llama(shards)


def test_greedy_decoding_follows_the_logits(tmp_path):
    write_model(tmp_path, LLAMA)
    model = load_llama(tmp_path)
    prompts, sizes = jnp.array([[5, 9], [1, 2]], jnp.int32), jnp.array([2, 2])
    tokens = greedy_decode(model, prompts, sizes, 12)
    np.testing.assert_array_equal(tokens[:, :2], prompts)
    np.testing.assert_array_equal(tokens[:, 2:], logits_of(model, tokens).argmax(-1)[:, 1:-1])
    assert len(set(tokens[0].tolist())) > 3


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text(tmp_path):
    write_model(tmp_path, LLAMA_3)
    model, tokens = load_llama(tmp_path), long_tokens()
    caches, read = model.caches(*tokens.shape), jax.jit(model.extend)
    got = []
    for position in range(tokens.shape[1]):
        logits, caches = read(tokens[:, position], caches, jnp.int32(position))
        got.append(logits)
    want = logits_of(model, tokens)
    np.testing.assert_allclose(jnp.stack(got, axis=1), want, rtol=0, atol=1e-4)


def test_prompts_of_any_length_decode_as_each_alone(tmp_path):
    write_model(tmp_path, LLAMA)
    model = load_llama(tmp_path)
    prompts, sizes = jnp.array([[5, 9, 3], [1, 0, 0]], jnp.int32), jnp.array([3, 1])
    together = greedy_decode(model, prompts, sizes, 10)
    for row, size in enumerate(sizes.tolist()):
        alone = greedy_decode(model, prompts[row : row + 1, :size], sizes[row : row + 1], 10)
        np.testing.assert_array_equal(together[row], alone[0])


def test_decoding_stops_at_the_end_of_a_text(tmp_path):
    write_model(tmp_path, LLAMA)
    model = load_llama(tmp_path)
    prompts, sizes = jnp.array([[5, 9], [1, 2]], jnp.int32), jnp.array([2, 2])
    free = greedy_decode(model, prompts, sizes, 10)
    end = int(free[0, 4])
    first = [row[2:].tolist().index(end) + 2 if end in row[2:] else 10 for row in free]
    ended = greedy_decode(model, prompts, sizes, 10, eos=end)
    for row, at in enumerate(first):
        np.testing.assert_array_equal(ended[row, : at + 1], free[row, : at + 1])
        assert (ended[row, at:] == end).all()


def test_what_stands_behind_a_prompt_is_not_decoded(tmp_path):
    """As the reference answer in a row of problems: all texts end early, and it is gone."""
    write_model(tmp_path, LLAMA)
    model = load_llama(tmp_path)
    prompt, size = jnp.array([[5, 9]], jnp.int32), jnp.array([2])
    end = int(greedy_decode(model, prompt, size, 3)[0, 2])
    answered = jnp.array([[5, 9, 3, 7, 8, 4]], jnp.int32)
    got = greedy_decode(model, answered, size, 6, eos=end)
    np.testing.assert_array_equal(got[0], [5, 9, end, end, end, end])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; this task takes 'llama'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "dynamic"}}, "rotary embeddings of type 'dynamic'"),
        ({"num_hidden_layers": 3}, r"no tensor 'model\.layers\.2\."),
        ({"intermediate_size": 8}, r"gives shape \(32, 48\), \(32, 8\) is expected|\(8,"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_another_architecture_is_refused(change, message, tmp_path):
    write_model(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(ExperimentError, match=message):
        load_llama(tmp_path)


def test_missing_and_damaged_files_are_errors(tmp_path):
    with pytest.raises(ExperimentError, match=r"config\.json does not exist.*Hugging Face form"):
        load_llama(tmp_path)
    write_model(tmp_path, LLAMA)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ExperimentError, match="cannot be read as safetensors"):
        load_llama(tmp_path)
    weights.unlink()
    with pytest.raises(ExperimentError, match=r"model\.safetensors does not exist"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ExperimentError, match="is not JSON"):
        load_llama(tmp_path)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES += ["ab", "▁a", "bc", "abc", "▁abc", "▁", "a", "b", "c"]
SCORES = [0.0] * 259 + [-float(i) for i in range(9)]


@dataclass
class GGUFFile:
    """What `write_gguf` puts into a file, and may put wrong."""

    architecture: str = "llama"
    dtype: type = np.float32
    tied: bool = False
    bos: bool = True


def interleave(weight, heads):
    """Puts the rows i and i + half of each head next to one another."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def write_gguf(path, tensors, config, file):
    """Writes a Hugging Face model in GGUF, with interleaved rotary pairs as llama.cpp wants it."""
    writer = gguf.GGUFWriter(path, file.architecture)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    if file.bos:
        writer.add_bos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        data = tensor.astype(file.dtype) if tensor.ndim == 2 else tensor
        if "q_proj" in name:
            data = interleave(data, config["num_attention_heads"])
        if "k_proj" in name:
            data = interleave(data, config["num_key_value_heads"])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
    if file.tied:
        writer.add_tensor("output.weight", tensors["model.embed_tokens.weight"].astype(file.dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gguf_gives_the_model_of_the_safetensors(tied, dtype, tmp_path):
    config = LLAMA | {"tie_word_embeddings": tied}
    tensors = write_model(tmp_path, config)
    write_gguf(tmp_path / "a.gguf", tensors, config, GGUFFile(dtype=dtype, tied=tied))
    loaded = load_gguf(tmp_path / "a.gguf")
    assert loaded.bos == 1
    assert loaded.model.shape.tied == tied
    want = logits_of(load_llama(tmp_path), long_tokens())
    atol = 1e-5 if dtype is np.float32 else 0.05
    np.testing.assert_allclose(logits_of(loaded.model, long_tokens()), want, rtol=0, atol=atol)


def test_a_foreign_or_damaged_gguf_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    with pytest.raises(ExperimentError, match=r"a\.gguf does not exist"):
        load_gguf(path)
    path.write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(ExperimentError, match="cannot be read as GGUF"):
        load_gguf(path)
    tensors = tiny_models.random_tensors(LLAMA)
    write_gguf(path, tensors, LLAMA, GGUFFile())
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(ExperimentError, match="cannot be read as GGUF"):
        load_gguf(path)
    path.unlink()
    write_gguf(path, tensors, LLAMA, GGUFFile(architecture="gemma"))
    with pytest.raises(ExperimentError, match=r"general\.architecture is 'gemma'"):
        load_gguf(path)
    path.unlink()
    write_gguf(path, tensors, LLAMA, GGUFFile(bos=False))
    with pytest.raises(ExperimentError, match="bos_token_id"):
        load_gguf(path)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["▁abc"]),  # by way of "ab", although "▁a" comes first in the text
        ("ab", ["▁", "ab"]),
        ("bc", ["▁", "bc"]),
        ("aab", ["▁a", "ab"]),
        ("babc", ["▁", "b", "abc"]),
        ("a\né", ["▁a", "<0x0A>", "<0xC3>", "<0xA9>"]),
        ("a <s>", ["▁a", "▁", "<0x3C>", "<0x73>", "<0x3E>"]),
        ("  c", ["▁", "▁", "▁", "c"]),
    ],
)
def test_byte_pairs_are_joined_by_score(text, pieces):
    tokenizer = sentencepiece_bpe(PIECES, SCORES)
    encoding = tokenizer.encode(text)
    assert encoding.tokens == pieces
    assert tokenizer.decode(encoding.ids) == text
