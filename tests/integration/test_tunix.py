"""tunix's models, adapted by qwix and by `nn.add_lora`, and its trainer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lowrank_optax import (
    adapters,
    altlora_plus,
    describe,
    integrations,
    nn,
    oplora,
    polora,
    scales_from,
    sds_lora,
)
from tests.integration.checks import (
    ALPHA,
    RANK,
    assert_read_rightly,
    assert_trains,
    randomized,
)

pytestmark = pytest.mark.libraries("google-tunix", "qwix")
SCALE = ALPHA / RANK
TARGETS = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|down_proj|up_proj)"
TOKENS, POSITIONS = jnp.arange(6)[None], jnp.arange(6)[None]
INPUTS = (TOKENS, POSITIONS, None, jnp.tril(jnp.ones((1, 6, 6), bool)))

METHODS = {
    "polora": (polora, None, 0.1),
    "altlora_plus": (altlora_plus, None, 0.01),
    "oplora": (oplora, nn.Shadows(), 0.5),
    "sds_lora": (
        functools.partial(sds_lora, total_steps=40, warmup_steps=0),
        nn.Frames(warmup=False),
        0.01,
    ),
}


def tiny_llama():
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
    return llama.Llama3(config, rngs=nnx.Rngs(0))


def tiny_gemma(kv_heads):
    from tunix.models.gemma import model as gemma

    config = gemma.ModelConfig(
        num_layers=2,
        num_embed=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=8,
        num_kv_heads=kv_heads,
        final_logit_softcap=None,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=(gemma.AttentionType.GLOBAL,) * 2,
    )
    return gemma.Gemma(config, rngs=nnx.Rngs(0))


def by_qwix(model, provider):
    import qwix

    return qwix.apply_lora_to_model(model, provider, *INPUTS, rngs=nnx.Rngs(1))


def qwix_provider(targets=TARGETS):
    import qwix

    return qwix.LoraProvider(module_path=targets, rank=RANK, alpha=ALPHA)


def loss_of(model):
    logits, _ = model(*INPUTS)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), TOKENS[:, 1:]
    ).mean()


def parts(model):
    """The factors, drawn anew, the weights, and the loss as a function of both."""
    graph, factors, weights, rest = nnx.split(model, nnx.LoRAParam, nnx.Param, ...)
    loss = lambda factors, weights: loss_of(nnx.merge(graph, factors, weights, rest))
    return randomized(factors), weights, loss


def test_llama_by_qwix(tmp_path):
    """Llama 3 by qwix: its seven projections are found, train, and go to PEFT under its names."""
    factors, weights, loss = parts(by_qwix(tiny_llama(), qwix_provider()))
    scale = scales_from({"*": SCALE})
    summary = describe(factors, scale=scale)
    assert len(summary.rows) == 2 * 7
    assert not summary.fallback
    widths = {row.path.split("/")[-2]: (row.a[-2], row.b[-1]) for row in summary.rows}
    assert widths["q_proj"] == (16, 32)
    assert widths["o_proj"] == (32, 16)
    assert widths["k_proj"] == widths["v_proj"] == (16, 16)
    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    flat = {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(by_weights)}
    assert_read_rightly(factors, by_factors, flat.get, SCALE)
    assert_trains(lambda factors: loss(factors, weights), factors, SCALE, to=0.98)
    names = adapters.name_maps.TUNIX_LLAMA3
    adapters.save_peft(tmp_path / "out", factors, scale=scale, names=names)
    found = adapters.read_peft(tmp_path / "out").pairs
    assert {name.split(".")[-1] for name in found} == set(widths)
    assert {name.split(".")[2] for name in found} == {"0", "1"}
    loaded = adapters.load_peft(tmp_path / "out", factors, scale=scale, names=names)
    jax.tree.map(np.testing.assert_array_equal, loaded, factors)


def test_llama_by_add_lora(tmp_path):
    """Llama 3 by `nn.add_lora`, its einsum layers too; the same names for PEFT."""
    model = tiny_llama()
    paths = nn.add_lora(model, TARGETS, nn.LoRAConfig(RANK, alpha=ALPHA), rngs=nnx.Rngs(1))
    assert len(paths) == 2 * 7
    factors, weights, loss = parts(model)
    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    flat = {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(by_weights)}
    of = lambda path: flat.get(f"{path}/base/w", flat.get(f"{path}/base/kernel"))
    assert_read_rightly(factors, by_factors, of, SCALE)
    assert_trains(lambda factors: loss(factors, weights), factors, SCALE, to=0.98)
    names = adapters.name_maps.TUNIX_LLAMA3
    assert len(adapters.save_peft(tmp_path / "out", model, names=names)) == 2 * 7
    adapted = model(*INPUTS)[0]
    nn.merge_lora(model)
    np.testing.assert_allclose(model(*INPUTS)[0], adapted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_llama_trains_in_tunix_trainer(method):
    """Llama 3 in tunix's `PeftTrainer`, by four methods with our provider for qwix."""
    from tunix.sft import peft_trainer

    make, extra, rate = METHODS[method]
    config = nn.LoRAConfig(RANK, alpha=ALPHA, extra=extra)
    rules = [integrations.qwix.LoRARule(module_path=TARGETS, config=config)]
    provider = integrations.qwix.LoRAProvider(rules)
    model = by_qwix(tiny_llama(), provider)
    tx = make(rate, scale=integrations.qwix.scales_of(provider))
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=20)
    trainer = peft_trainer.PeftTrainer(model, tx, settings)
    traces = []

    def loss(model, tokens):
        traces.append(1)
        return loss_of(model)

    trainer = trainer.with_loss_fn(loss).with_gen_model_input_fn(lambda x: {"tokens": x["tokens"]})
    frozen = [x for _, x in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.LoRAParam)))]
    before = [np.array(x[...]) for x in frozen if isinstance(x, nnx.Param)]
    start = loss_of(model)
    trainer.train([{"tokens": np.asarray(TOKENS)}] * 20)
    assert trainer.train_steps == 20
    assert loss_of(model) < 0.98 * start
    assert len(traces) == 1
    after = [x for _, x in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.LoRAParam)))]
    after = [np.array(x[...]) for x in after if isinstance(x, nnx.Param)]
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_gemma_by_qwix(kv_heads, tmp_path):
    """Gemma by qwix: keys and values in one kernel are two modules of PEFT, and come back."""
    targets = ".*(q_einsum|kv_einsum|qkv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)"
    model = by_qwix(tiny_gemma(kv_heads), qwix_provider(targets))
    factors, weights, loss = parts(model)
    # A kernel of queries has its heads before the input features.
    orders = {"q_einsum": (1, 0, 2), "kv_einsum": (2, 0, 1, 3), "qkv_einsum": (2, 0, 1, 3)}

    def full(path):
        kernel = flat[path]
        return jnp.transpose(kernel, orders.get(path.split("/")[-2], range(kernel.ndim)))

    by_factors, by_weights = jax.grad(loss, argnums=(0, 1))(factors, weights)
    flat = {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(by_weights)}
    assert_read_rightly(factors, by_factors, full, SCALE)
    names = adapters.name_maps.TUNIX_GEMMA
    adapters.save_peft(tmp_path / "out", factors, scale=SCALE, names=names)
    found = adapters.read_peft(tmp_path / "out").pairs
    assert {name.split(".")[-1] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    attention = model.layers[0].attn
    fused = attention.kv_einsum if kv_heads == 2 else attention.qkv_einsum
    of = nnx.to_pure_dict(factors)["layers"][0]["attn"]
    name = "kv_einsum" if kv_heads == 2 else "qkv_einsum"
    delta = jnp.einsum("dr,rckh->cdkh", of[name]["w_lora_a"], of[name]["w_lora_b"])
    value = found["model.layers.0.self_attn.v_proj"]
    wanted = delta[-1].reshape(16, kv_heads * 8)
    np.testing.assert_allclose(value.a @ value.b, wanted, rtol=1e-4, atol=1e-5)
    assert fused.w[...].shape == (delta.shape[0], delta.shape[2], 16, 8)
    zeros = jax.tree.map(jnp.zeros_like, factors)
    loaded = adapters.load_peft(tmp_path / "out", zeros, scale=SCALE, names=names)
    jax.tree.map(np.testing.assert_array_equal, loaded, factors)


def test_gemma_by_add_lora():
    """Gemma by `nn.add_lora`: einsum layers with keys and values in one kernel train."""
    model = tiny_gemma(2)
    config = nn.LoRAConfig(RANK, alpha=ALPHA)
    paths = nn.add_lora(model, ".*_einsum", config, rngs=nnx.Rngs(1))
    assert len(paths) == 2 * 3
    factors, weights, loss = parts(model)
    assert_trains(lambda factors: loss(factors, weights), factors, SCALE, to=0.98)
