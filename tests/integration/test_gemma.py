"""gemma's own LoRA, on Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import adapters, describe, polora
from tests.integration.checks import RANK, assert_read_rightly, randomized

pytestmark = pytest.mark.libraries("gemma", "kauldron")

EMBED, HIDDEN, HEADS, HEAD = 16, 24, 4, 6
TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def tiny_gemma(kv_heads, transposed):
    """Gemma 3's blocks, one of either kind of attention, adapted by gemma's own module."""
    from gemma import gm

    config = gm.nn.config.TransformerConfig(
        num_embed=32,
        embed_dim=EMBED,
        hidden_dim=HIDDEN,
        num_heads=HEADS,
        head_dim=HEAD,
        num_kv_heads=kv_heads,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL),
        sliding_window_size=4,
        transpose_gating_einsum=transposed,
    )
    model = gm.nn.Transformer(config=config, dtype=jnp.float32)
    return gm.nn.LoRA(rank=RANK, model=model, dtype=jnp.float32)


def weight_of(tree, path, input_axes):
    """The weight that a pair adapts, with the axis of its input first."""
    *above, wrapper = path.split("/")
    for key in above:
        tree = tree[key]
    name = wrapper.removeprefix("_LoRAEinsum_")  # a number, but for the two einsums of an MLP
    leaf, name = (tree[name], name) if name in tree else (tree["w"], above[-1])
    return jnp.moveaxis(leaf, input_axes[name], 0)


@pytest.mark.parametrize(("kv_heads", "transposed"), [(1, True), (2, False), (HEADS, True)])
def test_gemma_lora(kv_heads, transposed, tmp_path):
    """Linen: Gemma 3's einsums by `gm.nn.LoRA`, in `kd.optim.partial_updates`, and to PEFT."""
    from gemma import peft
    from kauldron import kd

    model = tiny_gemma(kv_heads, transposed)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    weights, factors = peft.split_params(params)
    weights, factors = randomized(weights), randomized(factors)

    def loss(params):
        logits = model.apply({"params": params}, TOKENS).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()

    summary = describe(factors, scale=1.0)
    assert not summary.fallback
    sizes = {row.path: (row.a[-2], row.b[-1], row.scale) for row in summary.rows}
    heads, kv = HEADS * HEAD, kv_heads * HEAD
    attention = {"q_einsum": (EMBED, heads), "kv_einsum": (EMBED, 2 * kv)}
    if kv_heads == HEADS:
        attention = {"qkv_einsum": (EMBED, 3 * kv)}
    expected = {
        "attn/attn_vec_einsum/_LoRAEinsum_0": (heads, EMBED),
        **{f"attn/{name}/_LoRAEinsum_0": size for name, size in attention.items()},
        "mlp/_LoRAEinsum_gating_einsum": (EMBED, 2 * HIDDEN),
        "mlp/_LoRAEinsum_linear": (HIDDEN, EMBED),
    }
    assert sizes == {
        f"layer_{n}/{name}": (*size, 1.0) for n in (0, 1) for name, size in expected.items()
    }

    axes = dict.fromkeys(("q_einsum", "kv_einsum", "qkv_einsum"), -2)
    axes |= {"attn_vec_einsum": 0, "linear": 0, "gating_einsum": -1 if transposed else -2}
    params = peft.merge_params(weights, factors)
    by_weights, by_factors = peft.split_params(jax.grad(loss)(params))
    assert_read_rightly(
        factors, by_factors, lambda path: weight_of(by_weights, path, axes), scale=1.0
    )

    tx = kd.optim.partial_updates(polora(0.1), mask=kd.optim.select("lora"))
    state, traces, before = tx.init(params), [], loss(params)

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        params, state = step(params, state)
    assert loss(params) < 0.95 * before
    assert len(traces) == 1
    frozen, trained = peft.split_params(params)
    jax.tree.map(np.testing.assert_array_equal, frozen, weights)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), trained, factors)))

    names = adapters.name_maps.GEMMA
    adapters.save_peft(tmp_path / "out", trained, scale=1.0, names=names)
    found = adapters.read_peft(tmp_path / "out").pairs
    assert {name.split(".")[-1] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    gating = trained["layer_1"]["mlp"]["_LoRAEinsum_gating_einsum"]["lora"]
    up = found["model.layers.1.mlp.up_proj"]
    np.testing.assert_allclose(up.a @ up.b, gating["a"] @ gating["b"][:, 1], rtol=1e-5)
    zeros = jax.tree.map(jnp.zeros_like, trained)
    loaded = adapters.load_peft(tmp_path / "out", zeros, scale=1.0, names=names)
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)
