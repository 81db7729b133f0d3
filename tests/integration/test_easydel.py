"""EasyDeL's own LoRA, trained through its state by its trainer's step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_optax import describe, polora
from tests.integration.checks import RANK, assert_read_rightly, randomized

pytestmark = pytest.mark.libraries("easydel")

HIDDEN, FEED, HEADS, KV_HEADS = 16, 24, 4, 2
TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def tiny_llama():
    import easydel

    config = easydel.LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=FEED,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=32,
    )
    exact = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": "highest"}
    model = easydel.LlamaForCausalLM(config, **exact, rngs=nnx.Rngs(0))
    return model.apply_lora_to_layers(
        lora_rank=RANK, lora_pattern="(q|k|v|o|gate|up|down)_proj", verbose=False
    )


def test_easydel_state():
    """A tiny Llama by `apply_lora_to_layers`; its `EasyDeLState` in its trainer's step."""
    import easydel
    from easydel.trainers.trainer._fn import training_step

    model = tiny_llama()
    graph, factors, weights, rest = nnx.split(model, nnx.LoRAParam, nnx.Param, ...)
    factors = randomized(factors)
    model = nnx.merge(graph, factors, weights, rest)
    state = easydel.EasyDeLState.create(model=model, tx=polora(0.1), init_opt_state=True)

    narrow = HIDDEN * KV_HEADS // HEADS
    expected = {
        **dict.fromkeys(("self_attn/q_proj", "self_attn/o_proj"), (HIDDEN, HIDDEN)),
        **dict.fromkeys(("self_attn/k_proj", "self_attn/v_proj"), (HIDDEN, narrow)),
        **dict.fromkeys(("mlp/gate_proj", "mlp/up_proj"), (HIDDEN, FEED)),
        "mlp/down_proj": (FEED, HIDDEN),
    }
    summary = describe(state.graphstate, scale=1.0)
    assert not summary.fallback
    assert {row.path: (row.a[-2], row.b[-1], row.scale) for row in summary.rows} == {
        f"model/layers/{n}/{name}": (*size, 1.0) for n in (0, 1) for name, size in expected.items()
    }

    def loss(factors, weights):
        logits = nnx.merge(graph, factors, weights, rest)(input_ids=TOKENS).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()

    with state.mesh:
        by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(state.graphstate, weights)
    kernels = {
        "/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(by_weights)
    }
    assert_read_rightly(
        state.graphstate, by_factors, lambda path: kernels[f"{path}/base_module/kernel"], scale=1.0
    )

    traces, losses = [], []

    @jax.jit
    def step(state, batch):
        traces.append(1)
        return training_step(state, batch)

    batch = {"input_ids": TOKENS, "attention_mask": jnp.ones_like(TOKENS), "labels": TOKENS}
    state = state.shard_state()  # as its trainer does; otherwise the second step is traced again
    with state.mesh:
        for _ in range(10):
            state, metrics = step(state, batch)
            losses.append(metrics.loss)
    assert losses[-1] < 0.98 * losses[0]
    assert len(traces) == 1
    assert state.step == 10
    _, trained, frozen, _ = nnx.split(state.model, nnx.LoRAParam, nnx.Param, ...)
    jax.tree.map(np.testing.assert_array_equal, frozen, weights)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), trained, factors)))
