"""Adapters of the experiments' models under the names that Hugging Face's models have."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.flax import load_file

from experiments.models import bert, llama, pretrained_vit
from experiments.models.checkpoint import layer_names
from lowrank_optax import find_pairs, nn, polora
from lowrank_optax.adapters import load_peft, read_peft, save_peft

DATA = Path(os.environ.get("EXPERIMENTS_DATA", Path(__file__).parents[3] / "shared" / "data"))
MNLI = DATA / "roberta_base_lora_mnli" / "adapter.safetensors"
CONFIG = nn.LoRAConfig(rank=2, alpha=4.0, b_init=jax.nn.initializers.normal())
ATTENTION = ".*/(query|key|value|out)"
SIZES = {"width": 8, "depth": 2, "heads": 2, "mlp_width": 12}


def roberta_shape(**sizes):
    return bert.EncoderShape(
        model_type="roberta", vocabulary=20, positions=12, segments=1, norm_eps=1e-5, pad=1, **sizes
    )


def encoder():
    shape = roberta_shape(**SIZES)
    model = bert.Encoder(shape, rngs=nnx.Rngs(0))
    return model, bert.tensor_names(shape), "encoder.layer.1.attention.self.query"


def decoder():
    shape = llama.LlamaShape.model_validate(
        {
            "vocab_size": 20,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 12,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 16,
            "tie_word_embeddings": True,
        }
    )
    model = llama.Llama(shape, rngs=nnx.Rngs(0))
    return model, llama.tensor_names(shape), "model.layers.1.self_attn.q_proj"


def image_encoder():
    shape = pretrained_vit.ViTShape.model_validate(
        {
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 3,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "layer_norm_eps": 1e-5,
        }
    )
    model = pretrained_vit.ImageEncoder(shape, rngs=nnx.Rngs(0))
    names = pretrained_vit.tensor_names(shape)
    return model, names, "encoder.layer.1.attention.attention.query"


@pytest.mark.parametrize("make", [encoder, decoder, image_encoder])
def test_adapters_go_out_and_come_back_under_hugging_face_names(make, tmp_path):
    model, tensors, one = make()
    names = layer_names(tensors)
    paths = nn.add_lora(model, ATTENTION, CONFIG, rngs=nnx.Rngs(1))
    assert len(paths) == 8
    save_peft(tmp_path / "out", model, names=names)
    found = read_peft(tmp_path / "out").pairs
    assert one in found
    [query] = [path for path in paths if path.endswith("1/attention/query")]
    np.testing.assert_array_equal(found[one].a, _layer(model, query).a)
    trained = jax.tree.map(jnp.array, nnx.state(model, nnx.LoRAParam))
    nnx.update(model, jax.tree.map(jnp.zeros_like, trained))
    load_peft(tmp_path / "out", model, names=names)
    loaded = nnx.state(model, nnx.LoRAParam)
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)


def _layer(model, path):
    for key in path.split("/"):
        model = model[int(key)] if key.isdigit() else getattr(model, key)
    return model.pair


@pytest.mark.skipif(not MNLI.exists(), reason=f"{MNLI} is not there: set EXPERIMENTS_DATA")
def test_the_24_pairs_of_a_real_mnli_adapter_load_and_train(tmp_path):
    """Microsoft's LoRA of RoBERTa-base on MNLI: as a tree, and in a model of its width."""
    tensors = load_file(MNLI)
    factors = {name: x for name, x in tensors.items() if "lora" in name}
    pairing = find_pairs(factors)
    assert len(pairing.pairs) == 24
    pairs = pairing.take(factors)
    assert {(pair.a.shape, pair.b.shape) for pair in pairs} == {((768, 8), (8, 768))}
    save_peft(tmp_path / "mnli", factors, scale=2.0)

    shape = roberta_shape(width=768, depth=12, heads=12, mlp_width=16)
    head = bert.FirstTokenHead(768, 3, rngs=nnx.Rngs(1))
    model = bert.TextClassifier(bert.Encoder(shape, rngs=nnx.Rngs(0)), head)
    config = nn.LoRAConfig(rank=8, alpha=16.0)
    nn.add_lora(model, ".*/(query|value)", config, rngs=nnx.Rngs(2))
    names = layer_names(bert.tensor_names(shape), "encoder/", "roberta.")
    load_peft(tmp_path / "mnli", model, names=names)
    name = "roberta.encoder.layer.9.attention.self.value"
    ours = _layer(model, "encoder/layers/9/attention/value")
    np.testing.assert_array_equal(ours.a, tensors[f"{name}.lora_A"].T)
    np.testing.assert_array_equal(ours.b, tensors[f"{name}.lora_B"].T)

    tokens = jnp.arange(2, 12).reshape(2, 5)
    graph, trained, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(trained):
        logits = nnx.merge(graph, trained, rest)(tokens, jnp.ones_like(tokens, bool))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 2])).mean()

    tx = polora(0.1, scale=nn.lora_scales(model))
    state, before = tx.init(trained), trained

    @jax.jit
    def step(trained, state):
        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    losses = []
    for _ in range(4):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), before, trained)
    assert sum(jax.tree.leaves(moved)) == 48
