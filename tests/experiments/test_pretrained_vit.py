import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments.errors import ExperimentError
from experiments.models.checkpoint import fill, open_safetensors
from experiments.models.pretrained_vit import (
    ImageClassifier,
    Normalization,
    load_image_encoder,
    load_normalization,
)
from tests.experiments.parity import REFERENCE, images
from tests.experiments.tiny_models import CLASSES, VIT, WIDTH, write_model

HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def load_classifier(folder):
    head = fill(
        lambda: nnx.Linear(WIDTH, CLASSES, rngs=nnx.Rngs(0)),
        open_safetensors(folder),
        {"kernel": "classifier.weight", "bias": "classifier.bias"},
    )
    return ImageClassifier(load_image_encoder(folder), Normalization.model_validate(HALVES), head)


@nnx.jit
def logits_of(model, pixels):
    return model(pixels)


def test_logits_equal_those_of_torch(tmp_path):
    write_model(tmp_path, VIT)
    # The classifier takes pixels of 0 ... 255; those of the reference are normalized already.
    got = logits_of(load_classifier(tmp_path), (images() + 1.0) * 127.5)
    np.testing.assert_allclose(got, np.load(REFERENCE)["vit"], rtol=0, atol=1e-4)


def test_small_images_are_enlarged_as_by_pillow(tmp_path):
    write_model(tmp_path, VIT)
    small = np.random.default_rng(0).integers(256, size=(1, 4, 4, 3), dtype=np.uint8)
    large = np.stack(
        [
            Image.fromarray(small[0, :, :, i].astype(np.float32), mode="F").resize((12, 12), 2)
            for i in range(3)
        ],
        axis=-1,
    )
    model = load_classifier(tmp_path)
    got, want = logits_of(model, small), logits_of(model, large[None])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_normalization_is_the_models(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HALVES | {"size": 224}))
    assert load_normalization(tmp_path) == Normalization.model_validate(HALVES)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ExperimentError, match=r"preprocessor_config\.json: image_mean: Field"):
        load_normalization(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ExperimentError, match=r"preprocessor_config\.json does not exist"):
        load_normalization(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deit"}, "model_type is 'deit'; this task takes 'vit'"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"image_size": 16}, r"gives shape \(1, 10, 32\), \(1, 17, 32\) is expected"),
        ({"patch_size": 6}, "is expected"),
    ],
)
def test_another_architecture_is_refused(change, message, tmp_path):
    write_model(tmp_path, VIT)
    (tmp_path / "config.json").write_text(json.dumps(VIT | change))
    with pytest.raises(ExperimentError, match=message):
        load_image_encoder(tmp_path)
