"""tunix's models, adapted by qwix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_optax import adapters, describe, scales_from
from tests.integration.checks import ALPHA, RANK, assert_trains, randomized

pytestmark = pytest.mark.libraries("google-tunix", "qwix")


def test_tunix_llama_attention(tmp_path):
    """The tiny Llama 3 of tunix, all of whose projections are einsums."""
    import qwix
    from tunix.models.llama3 import model as llama

    config = llama.ModelConfig(
        num_layers=2,
        vocab_size=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    tokens, positions = jnp.arange(6)[None], jnp.arange(6)[None]
    mask = jnp.tril(jnp.ones((1, 6, 6), bool))
    inputs = (tokens, positions, None, mask)
    provider = qwix.LoraProvider(
        module_path=r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|down_proj|up_proj)",
        rank=RANK,
        alpha=ALPHA,
    )
    model = qwix.apply_lora_to_model(model, provider, *inputs, rngs=nnx.Rngs(1))
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors):
        logits, _ = nnx.merge(graph, factors, rest)(*inputs)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
        ).mean()

    factors = randomized(factors)
    summary = describe(factors, scale=scales_from({"*": ALPHA / RANK}))
    assert len(summary.rows) == 2 * 7
    assert not summary.fallback
    widths = {row.path.split("/")[-2]: (row.a[-2], row.b[-1]) for row in summary.rows}
    assert widths["q_proj"] == (16, 32)
    assert widths["o_proj"] == (32, 16)
    assert widths["k_proj"] == widths["v_proj"] == (16, 16)
    assert_trains(loss, factors, ALPHA / RANK, to=0.98)
    scale, names = ALPHA / RANK, adapters.name_maps.TUNIX_LLAMA3
    adapters.save_peft(tmp_path / "out", factors, scale=scale, names=names)
    found = adapters.read_peft(tmp_path / "out").pairs
    assert {name.split(".")[-1] for name in found} == set(widths)
    assert {name.split(".")[2] for name in found} == {"0", "1"}
    loaded = adapters.load_peft(tmp_path / "out", factors, scale=scale, names=names)
    jax.tree.map(np.testing.assert_array_equal, loaded, factors)
