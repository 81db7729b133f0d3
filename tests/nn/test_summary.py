"""The table of a model's adapters."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from lowrank_optax import DEFAULT_SPECS, LoRAPair, Unpaired, describe, nn


def adapted():
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    nn.add_lora(model, "layers/0", nn.LoRAConfig(rank=2, alpha=4.0), rngs=nnx.Rngs(2))
    frames = nn.LoRAConfig(rank=1, alpha=3.0, extra=nn.Frames())
    nn.add_lora(model, "layers/1", frames, rngs=nnx.Rngs(3))
    return model


def test_rows_of_an_nnx_model():
    summary = nn.lora_summary(adapted())
    assert [tuple(row) for row in summary.rows] == [
        ("layers/0", "LoRAPair", (4, 2), (2, 8), 2, 2.0, 24),
        ("layers/1", "FramedPair", (8, 1), (1, 2), 1, 3.0, 10),  # frames are not trained
    ]
    assert summary.trained == 34


def test_it_is_a_table_in_a_terminal_and_in_a_notebook():
    summary = nn.lora_summary(adapted())
    for text in (repr(summary), str(summary), summary._repr_html_()):
        assert "2 adapters, 34 trained parameters" in text
        for word in ("path", "kind", "layers/1", "FramedPair", "8×1", "trained"):
            assert word in text
    assert max(len(line) for line in str(summary).splitlines()) <= 100
    assert summary._repr_html_().startswith("<pre")


def test_rows_of_a_linen_collection_and_of_any_tree():
    model = linen.Sequential([linen.Dense(8)])
    with nn.lora_interceptor("layers_0", nn.LoRAConfig(rank=2)) as adapters:
        lora = model.init(jax.random.key(0), jnp.ones((1, 4)))["lora"]
    scales = {path: adapter.scale for path, adapter in adapters.items()}
    [row] = nn.lora_summary(lora, scales).rows
    assert (row.path, row.scale, row.trained) == ("layers_0", 8.0, 24)
    [row] = nn.lora_summary({"q": LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 8)))}).rows
    assert row.scale is None
    assert "?" in repr(nn.lora_summary(lora))


def test_an_nnx_model_knows_its_scales():
    with pytest.raises(ValueError, match="leave `scale` out"):
        nn.lora_summary(adapted(), scale=99.0)


def test_a_model_without_adapters_has_an_empty_table():
    summary = nn.lora_summary(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert summary.rows == ()
    assert "0 adapters" in repr(summary)


def test_long_paths_fold():
    tree = {"/".join(["block"] * 30): LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 8)))}
    lines = str(nn.lora_summary(tree)).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) > 6


@pytest.mark.parametrize("scale", [2.0, lambda path: 2.0])
def test_scales_of_a_tree(scale):
    tree = {"q": LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 8)))}
    assert nn.lora_summary(tree, scale).rows[0].scale == 2.0


def test_describe_says_what_an_optimizer_makes_of_a_tree():
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = {
        "q": {"w_lora_a": of(16, 4), "w_lora_b": of(4, 2, 8), "w": of(16, 2, 8)},
        "router": {"lora_a": of(16, 4), "lora_b": of(4, 8)},
    }
    summary = describe(tree, [Unpaired("router"), *DEFAULT_SPECS], {"q/w": 2.0})
    [row] = summary.rows
    assert (row.path, row.a, row.b, row.rank, row.scale) == ("q/w", (16, 4), (4, 16), 4, 2.0)
    assert summary.fallback == {"q/w": 256, "router/lora_a": 64, "router/lora_b": 32}
    shown = " ".join(repr(summary).split())
    assert shown.endswith("go to the fallback, 352 parameters: q/w, router/lora_a, router/lora_b")
    with pytest.raises(ValueError, match="`scale` has no number for 'q/w'"):
        describe(tree, [Unpaired("router"), *DEFAULT_SPECS], {"k/w": 2.0})
