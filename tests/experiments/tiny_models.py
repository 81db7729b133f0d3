"""Tiny random models in the Hugging Face form; names and shapes are written out, not derived."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH, MLP, DEPTH, VOCABULARY, CLASSES = 32, 48, 2, 64, 3

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": MLP,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3 = LLAMA | {
    "tie_word_embeddings": True,
    "head_dim": 16,
    "rope_theta": 500.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
BERT: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": MLP,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "num_labels": CLASSES,
}
ROBERTA = BERT | {
    "architectures": ["RobertaForSequenceClassification"],
    "model_type": "roberta",
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
VIT: dict[str, Any] = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": MLP,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "num_labels": CLASSES,
}
CONFIGS = {"llama": LLAMA, "llama3": LLAMA_3, "bert": BERT, "roberta": ROBERTA, "vit": VIT}


def write_model(folder: Path, config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Writes `config.json` and `model.safetensors` with random weights, and returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Draws all weights of a model, large enough that every part of it matters."""
    rng = np.random.default_rng(seed)
    kinds = {"llama": _llama, "bert": _bert, "roberta": _roberta, "vit": _vit}
    tensors = {}
    for name, shape in kinds[config["model_type"]](config):
        values = 0.3 * rng.standard_normal(shape, dtype=np.float32)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        tensors[name] = 1.0 + values if is_norm else values
    return tensors


def _llama(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", WIDTH // heads)
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (WIDTH,)
        yield f"{layer}.self_attn.q_proj.weight", (heads * head, WIDTH)
        yield f"{layer}.self_attn.k_proj.weight", (kv_heads * head, WIDTH)
        yield f"{layer}.self_attn.v_proj.weight", (kv_heads * head, WIDTH)
        yield f"{layer}.self_attn.o_proj.weight", (WIDTH, heads * head)
        yield f"{layer}.post_attention_layernorm.weight", (WIDTH,)
        yield f"{layer}.mlp.gate_proj.weight", (MLP, WIDTH)
        yield f"{layer}.mlp.up_proj.weight", (MLP, WIDTH)
        yield f"{layer}.mlp.down_proj.weight", (WIDTH, MLP)
    yield "model.norm.weight", (WIDTH,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (VOCABULARY, WIDTH)


def _linear(name: str, n_out: int, n_in: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (n_out, n_in)
    yield f"{name}.bias", (n_out,)


def _norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (WIDTH,)
    yield f"{name}.bias", (WIDTH,)


def _encoder(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    embeddings = f"{prefix}.embeddings"
    yield f"{embeddings}.word_embeddings.weight", (VOCABULARY, WIDTH)
    yield (
        f"{embeddings}.position_embeddings.weight",
        (config["max_position_embeddings"], WIDTH),
    )
    yield f"{embeddings}.token_type_embeddings.weight", (config["type_vocab_size"], WIDTH)
    yield from _norm(f"{embeddings}.LayerNorm")
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}.encoder.layer.{i}"
        for projection in ("query", "key", "value"):
            yield from _linear(f"{layer}.attention.self.{projection}", WIDTH, WIDTH)
        yield from _linear(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        yield from _norm(f"{layer}.attention.output.LayerNorm")
        yield from _linear(f"{layer}.intermediate.dense", MLP, WIDTH)
        yield from _linear(f"{layer}.output.dense", WIDTH, MLP)
        yield from _norm(f"{layer}.output.LayerNorm")


def _bert(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _encoder(config, "bert")
    yield from _linear("bert.pooler.dense", WIDTH, WIDTH)
    yield from _linear("classifier", CLASSES, WIDTH)


def _roberta(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _encoder(config, "roberta")
    yield from _linear("classifier.dense", WIDTH, WIDTH)
    yield from _linear("classifier.out_proj", CLASSES, WIDTH)


def _vit(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    patch, channels = config["patch_size"], config["num_channels"]
    patches = (config["image_size"] // patch) ** 2
    yield "vit.embeddings.cls_token", (1, 1, WIDTH)
    yield "vit.embeddings.position_embeddings", (1, patches + 1, WIDTH)
    yield "vit.embeddings.patch_embeddings.projection.weight", (WIDTH, channels, patch, patch)
    yield "vit.embeddings.patch_embeddings.projection.bias", (WIDTH,)
    for i in range(config["num_hidden_layers"]):
        layer = f"vit.encoder.layer.{i}"
        yield from _norm(f"{layer}.layernorm_before")
        for projection in ("query", "key", "value"):
            yield from _linear(f"{layer}.attention.attention.{projection}", WIDTH, WIDTH)
        yield from _linear(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        yield from _norm(f"{layer}.layernorm_after")
        yield from _linear(f"{layer}.intermediate.dense", MLP, WIDTH)
        yield from _linear(f"{layer}.output.dense", WIDTH, MLP)
    yield from _norm("vit.layernorm")
    yield from _linear("classifier", CLASSES, WIDTH)
