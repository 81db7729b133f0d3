"""Inputs for tiny models, and what torch `transformers` computes from them.

`python -m tests.experiments.parity` writes parity_reference.npz: the outputs of torch for the
models of `tiny_models.py`, against which this project's models are tested where torch is not
installed. It needs the extra `parity`.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.experiments.tiny_models import CLASSES, CONFIGS, VOCABULARY, write_model

REFERENCE = Path(__file__).with_name("parity_reference.npz")


def text_batch(pad: int, segments: int) -> dict[str, np.ndarray]:
    """Returns three texts of 12, 7 and 1 tokens, padded on the right, in two segments if wanted."""
    rng = np.random.default_rng(1)
    mask = np.arange(12) < np.array([[12], [7], [1]])
    tokens = rng.integers(3, VOCABULARY, size=mask.shape, dtype=np.int32)
    return {
        "tokens": np.where(mask, tokens, pad).astype(np.int32),
        "mask": mask,
        "segments": (np.arange(12) >= 5).astype(np.int32) * mask * (segments - 1),
    }


def images() -> np.ndarray:
    """Returns two images (2, height, width, channels) in the range of normalized pixels."""
    size = CONFIGS["vit"]["image_size"]
    return np.random.default_rng(2).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def long_tokens() -> np.ndarray:
    """Returns token ids (2, 48) for decoders."""
    return np.random.default_rng(3).integers(VOCABULARY, size=(2, 48), dtype=np.int32)


def torch_outputs(folder: Path) -> dict[str, np.ndarray]:
    """Computes the logits of every model by torch, from weights written to `folder`."""
    # Imported here, so that test runners can import this file without them.
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    outputs = {}
    for name, config in CONFIGS.items():
        write_model(folder / name, config)
        model_class = getattr(transformers, config["architectures"][0])
        extra: dict[str, Any] = {} if "llama" in name else {"num_labels": CLASSES}
        model, report = model_class.from_pretrained(
            folder / name,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            **extra,
        )
        # A name that torch does not know, or misses, would leave a weight of its own at random.
        assert not report["unexpected_keys"], report
        assert not set(report["missing_keys"]) - {"lm_head.weight"}, report
        with torch.no_grad():
            outputs[name] = model.eval()(**_torch_inputs(name, config)).logits.numpy()
    return outputs


def _torch_inputs(name: str, config: dict[str, Any]) -> dict[str, Any]:
    import torch

    if name == "vit":
        return {"pixel_values": torch.tensor(images().transpose(0, 3, 1, 2))}
    if "llama" in name:
        return {"input_ids": torch.tensor(long_tokens().astype(np.int64))}
    batch = text_batch(config["pad_token_id"], config["type_vocab_size"])
    names = {"tokens": "input_ids", "mask": "attention_mask", "segments": "token_type_ids"}
    return {names[key]: torch.tensor(value.astype(np.int64)) for key, value in batch.items()}


if __name__ == "__main__":
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        logits = torch_outputs(Path(scratch))
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    np.savez_compressed(REFERENCE, versions=np.array(versions), **logits)  # type: ignore[arg-type]
    print(versions, {name: values.shape for name, values in logits.items()})
