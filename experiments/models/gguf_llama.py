"""A Llama decoder and its tokenizer from one GGUF file with unquantized weights."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from experiments.errors import ExperimentError
from experiments.models.checkpoint import Checkpoint, Tensor, fill
from experiments.models.llama import Llama, LlamaShape, tensor_names

SPACE = "▁"
"""What SentencePiece writes for a space."""

RENAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFLlama(NamedTuple):
    """What a GGUF file of a Llama holds; the tokenizer adds no special tokens."""

    model: Llama
    tokenizer: Tokenizer
    bos: int


def load_gguf(path: Path, dtype: DTypeLike = jnp.float32) -> GGUFLlama:
    """Loads a Llama decoder and its SentencePiece tokenizer.

    Args:
        path: The `.gguf` file; its weights must be float32 or float16.
        dtype: Of the weights and the activations.

    Returns:
        The decoder, the tokenizer and the token that begins a text.

    Raises:
        ExperimentError: The file is missing, damaged, of another architecture, or quantized.
    """
    if not path.is_file():
        raise ExperimentError(f"{path} does not exist; a GGUF file of a Llama is needed")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ExperimentError(f"{path} cannot be read as GGUF ({error}); fetch it again") from error
    _require(path, fields, "general.architecture", "llama")
    _require(path, fields, "tokenizer.ggml.model", "llama")
    try:
        shape = _shape(fields, tensors)
        tokenizer = sentencepiece_bpe(
            fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
        )
        bos = int(fields["tokenizer.ggml.bos_token_id"])
    except KeyError as error:
        raise ExperimentError(f"{path} lacks {error}; convert the model again") from error
    for tensor in tensors.values():
        if tensor.data.dtype not in (np.float32, np.float16):
            raise ExperimentError(
                f"{path}: {tensor.name!r} is quantized ({tensor.tensor_type.name}); "
                "a file with F32 or F16 weights is needed"
            )
    readers = {
        _hugging_face_name(name): _reader(name, tensor.data, shape)
        for name, tensor in tensors.items()
    }
    model = fill(
        lambda: Llama(shape, dtype, rngs=nnx.Rngs(0)),
        Checkpoint(path, readers),
        dict(tensor_names(shape)),
    )
    return GGUFLlama(model, tokenizer, bos)


def sentencepiece_bpe(pieces: list[str], scores: list[float]) -> Tokenizer:
    """Builds the byte-pair encoding of a SentencePiece vocabulary.

    SentencePiece joins the neighbours whose union is the piece of highest score, the leftmost
    first. As ordered merges: every split of every piece into two pieces, by falling score. What no
    piece covers becomes bytes. A space is put before the text, as SentencePiece does by default.

    Args:
        pieces: The pieces; their positions are the token ids. `<0x00>` ... `<0xFF>` are bytes,
            `<unk>` is the unknown piece.
        scores: Their scores.

    Returns:
        The tokenizer, which adds no special tokens.
    """
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    splits = [
        (-scores[i], vocabulary[piece[:k]], vocabulary[piece[k:]], piece[:k], piece[k:])
        for piece, i in vocabulary.items()
        for k in range(1, len(piece))
        if piece[:k] in vocabulary and piece[k:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(splits)]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    return tokenizer


def half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key matrix from interleaved to half-split rotary pairs.

    GGUF and llama2.c rotate the features (2i, 2i + 1) of a head together, `Llama` rotates
    (i, i + half) as Hugging Face's weights want it.

    Args:
        weight: (heads * head_width, in).
        heads: Number of heads.

    Returns:
        The matrix with its rows reordered within each head.
    """
    rows, n_in = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, n_in)
    return pairs.swapaxes(1, 2).reshape(rows, n_in)


def _require(path: Path, fields: Mapping[str, Any], name: str, value: str) -> None:
    if fields.get(name) != value:
        raise ExperimentError(f"{path}: {name} is {fields.get(name)!r}, {value!r} is expected")


def _shape(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> LlamaShape:
    width = fields["llama.embedding_length"]
    heads = fields["llama.attention.head_count"]
    embedding = tensors["token_embd.weight"].data
    output = tensors.get("output.weight")
    return LlamaShape(
        vocabulary=len(embedding),
        width=width,
        depth=fields["llama.block_count"],
        heads=heads,
        kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_width=fields.get("llama.attention.key_length", width // heads),
        mlp_width=fields["llama.feed_forward_length"],
        norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        # Some converters write the tied matrix twice.
        tied=output is None or np.array_equal(output.data, embedding),
        rope_theta=fields.get("llama.rope.freq_base", 10000.0),
    )


def _hugging_face_name(name: str) -> str:
    *block, kind, suffix = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{RENAMES.get(kind, kind)}.{suffix}"


def _reader(name: str, data: np.ndarray, shape: LlamaShape) -> Callable[[], Tensor]:
    if ".attn_q." in name:
        return partial(half_split_rows, data, shape.heads)
    if ".attn_k." in name:
        return partial(half_split_rows, data, shape.kv_heads)
    return lambda: data
