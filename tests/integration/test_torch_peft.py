"""Hugging Face PEFT reads what this library writes, and the other way round."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_optax import LoRAPair, nn
from lowrank_optax.adapters import read_peft, save_peft

WHY = "`make integration` has an environment with it"
peft = pytest.importorskip("peft", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

pytestmark = pytest.mark.libraries("peft", "torch", "transformers")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert():
    config = transformers.BertConfig(**SIZES, intermediate_size=48, vocab_size=50)
    return transformers.BertModel(config), lambda model: model(TOKENS).last_hidden_state


def llama():
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=48, vocab_size=50
    )
    return transformers.LlamaForCausalLM(config), lambda model: model(TOKENS).logits


def t5():
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50
    )
    forward = lambda model: model(input_ids=TOKENS, decoder_input_ids=TOKENS).last_hidden_state
    return transformers.T5Model(config), forward


def vit():
    config = transformers.ViTConfig(**SIZES, intermediate_size=48, image_size=16, patch_size=8)
    pixels = torch.arange(3 * 16 * 16).reshape(1, 3, 16, 16) / 768
    return transformers.ViTModel(config), lambda model: model(pixel_values=pixels).last_hidden_state


MODELS = {"bert": bert, "llama": llama, "t5": t5, "vit": vit}


def linear_maps(model):
    """All linear maps by name; every second one is adapted, with ranks and alphas of its own."""
    maps = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    return dict(maps[::2])


def make_pairs(model):
    pairs, scales = {}, {}
    for index, (name, module) in enumerate(linear_maps(model).items()):
        rank = 2 + index % 3
        keys = jax.random.split(jax.random.key(index))
        a = jax.random.normal(keys[0], (module.in_features, rank)) / 6
        b = jax.random.normal(keys[1], (rank, module.out_features)) / 6
        pairs[name], scales[name] = LoRAPair(a, b), 0.5 + 0.25 * (index % 4)
    return pairs, scales


def to_torch(x):
    return torch.from_numpy(np.array(x))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_what_we_write(name, rslora, tmp_path):
    """PEFT loads our files into BERT, Llama, T5 and ViT: equal outputs, merged and not."""
    torch.manual_seed(0)
    model, forward = MODELS[name]()
    model.eval()
    pairs, scales = make_pairs(model)
    tree = {path.replace(".", "/"): pair for path, pair in pairs.items()}
    by_path = {path.replace(".", "/"): scale for path, scale in scales.items()}
    save_peft(tmp_path / "out", tree, scale=by_path, use_rslora=rslora)
    with torch.no_grad():
        before = forward(model)
        maps = linear_maps(model)
        kept = {path: module.weight.clone() for path, module in maps.items()}
        for path, module in maps.items():
            module.weight += scales[path] * to_torch(pairs[path].a @ pairs[path].b).T
        expected = forward(model)
        for path, module in maps.items():
            module.weight.copy_(kept[path])
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
        torch.testing.assert_close(forward(loaded), expected, rtol=1e-5, atol=1e-5)
        assert (expected - before).abs().max() > 1e-2
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(forward(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_we_read_what_peft_writes(name, tmp_path):
    """We read what PEFT writes of BERT, Llama, T5 and ViT."""
    torch.manual_seed(0)
    model, _ = MODELS[name]()
    names = list(linear_maps(model))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=names,
        rank_pattern={names[0]: 2},
        alpha_pattern={names[1]: 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    found = read_peft(tmp_path)
    assert set(found.others) == ({"lm_head.weight"} if name == "llama" else set())
    deltas = {
        path.removeprefix("base_model.model."): module.get_delta_weight("default")
        for path, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(deltas) == set(found.pairs) == set(names)
    for path, pair in found.pairs.items():
        ours = found.config.scale(path) * (pair.a @ pair.b)
        np.testing.assert_allclose(ours.T, deltas[path].detach().numpy(), atol=1e-5)


def test_peft_tells_a_name_from_one_that_ends_with_it(tmp_path):
    """Scales of a module whose name is the tail of another's are right in PEFT."""
    torch.manual_seed(0)
    maps = {name: torch.nn.Linear(8, 8, bias=False) for name in ("proj", "enc", "dec")}
    model = torch.nn.ModuleDict(
        {
            "proj": maps["proj"],
            "enc": torch.nn.ModuleDict({"proj": maps["enc"]}),
            "dec": torch.nn.ModuleDict({"proj": maps["dec"]}),
        }
    )
    scales = {"proj": 4.0, "enc.proj": 1.0, "dec.proj": 0.5}
    ranks = {"proj": 3, "enc.proj": 2, "dec.proj": 2}
    pairs = {
        name: LoRAPair(jnp.full((8, rank), 0.1 * rank), jnp.ones((rank, 8)))
        for name, rank in ranks.items()
    }
    save_peft(tmp_path / "out", pairs, scale=lambda path: scales[path.replace("/", ".")])
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    for name, pair in pairs.items():
        delta = loaded.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        np.testing.assert_allclose(delta.detach(), scales[name] * (pair.a @ pair.b).T, rtol=1e-6)


def test_peft_reads_embeddings_that_were_converted(tmp_path):
    """`convert` keeps the keys of embeddings and of whole base layers: equal outputs in PEFT."""
    pytest.importorskip("typer", reason=WHY)
    from typer.testing import CliRunner

    from lowrank_optax._command_line import app

    torch.manual_seed(0)
    model, forward = llama()
    model.eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    targets = ["embed_tokens", "q_proj", "lm_head"]
    settings = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    adapted.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    arguments = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert read_peft(tmp_path / "ours").embeddings == {"model.embed_tokens"}
    fresh, _ = llama()
    fresh.load_state_dict(kept)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded), forward(adapted))


def test_peft_places_a_nested_head(tmp_path):
    """The classifier of RoBERTa holds maps, one of them named `dense` as those of its encoder."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        **SIZES, intermediate_size=48, vocab_size=50, max_position_embeddings=20, num_labels=3
    )
    model = transformers.RobertaForSequenceClassification(config).eval()
    head = {
        f"classifier.{name}": 0.1 * torch.randn_like(value)
        for name, value in model.classifier.named_parameters()
    }
    query = "roberta.encoder.layer.0.attention.self.query"
    pair = LoRAPair(jnp.full((32, 2), 0.1), jnp.ones((2, 32)))
    whole = {name: jnp.asarray(value.numpy()) for name, value in head.items()}
    save_peft(tmp_path / "out", {query: pair}, scale=2.0, modules_to_save=whole)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    expected = transformers.RobertaForSequenceClassification(config).eval()
    state[f"{query}.weight"] += 2.0 * to_torch(pair.a @ pair.b).T
    expected.load_state_dict({**state, **head})
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, expected(TOKENS).logits)


def test_a_saved_classifier_comes_along(tmp_path):
    """A classifier in `modules_to_save` comes along."""
    config = transformers.BertConfig(**SIZES, intermediate_size=48, vocab_size=50)
    model = transformers.BertForSequenceClassification(config)
    settings = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path)
    found = read_peft(tmp_path)
    weight = model.classifier.modules_to_save["default"].weight
    np.testing.assert_array_equal(found.others["classifier.weight"], weight.detach().numpy())
    assert all(jnp.any(pair.a) for pair in found.pairs.values())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("theirs", ["pissa", "pissa_niter_16", "olora"])
def test_starts_from_the_weights_are_those_of_peft(theirs, dtype, rslora):
    """PEFT's `pissa`, `pissa_niter_16`, `olora`: the pair and the kernel of `nn.split_kernel`."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 16, bias=False).to(dtype)
    # Singular values with a gap, so that the fast start is as exact as the other.
    u, sigma, v = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
    sigma[3:] *= 0.2
    layer.weight.data = (u @ torch.diag(sigma) @ v).to(dtype)
    weight = layer.weight.detach().clone()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["proj"], use_rslora=rslora, init_lora_weights=theirs
    )
    model = peft.get_peft_model(torch.nn.ModuleDict({"proj": layer}), config)
    adapted = model.base_model.model["proj"]
    scale = nn.LoRAConfig(3, 6.0, rslora=rslora).scale
    assert scale == pytest.approx(adapted.scaling["default"])
    kernel = jnp.asarray(weight.float().numpy().T)
    kernel = kernel.astype(jnp.bfloat16 if dtype == torch.bfloat16 else jnp.float32)
    method = {"pissa_niter_16": "pissa_fast"}.get(theirs, theirs)
    pair, rest = nn.split_kernel(kernel, 3, method, scale=scale)
    to_numpy = lambda x: x.detach().float().numpy().T
    a, b = (to_numpy(getattr(adapted, name)["default"].weight) for name in ("lora_A", "lora_B"))
    # PEFT rounds its factors to the weight's dtype, after subtracting them; ours stay float32.
    near = 1e-5 if dtype == torch.float32 else 2.0**-7
    np.testing.assert_allclose(pair.a @ pair.b, a @ b, atol=near)
    for ours, other in ((pair.a.T @ pair.a, a.T @ a), (pair.b @ pair.b.T, b @ b.T)):
        np.testing.assert_allclose(np.abs(ours), np.abs(other), atol=near)  # up to signs
    base = to_numpy(adapted.base_layer.weight)
    unit = 2.0**-7 * np.abs(base) if dtype == torch.bfloat16 else 0
    assert np.all(np.abs(np.asarray(rest, np.float32) - base) <= unit + 1e-5)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_started_and_trained_adapter_fits_the_original_model(method, tmp_path):
    """What `nn.weight_start` changed goes into the file: PEFT adds it to the original weights."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(24, 16)}).eval()
    original = nnx.Dict(proj=nnx.Linear(24, 16, rngs=nnx.Rngs(0)))
    original.proj.kernel[...] = jnp.asarray(model["proj"].weight.detach().numpy().T)
    original.proj.bias[...] = jnp.asarray(model["proj"].bias.detach().numpy())
    ours = nnx.clone(original)
    config = nn.LoRAConfig(3, 6.0, rslora=True)
    nn.add_lora(ours, "proj", config, rngs=nnx.Rngs(1))
    nn.weight_start(ours, method, progress=False)
    ours.proj.lora_b[...] += 0.1
    save_peft(tmp_path / "out", ours, original=original, use_rslora=True)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    x = torch.randn(5, 24)
    with torch.no_grad():
        theirs = loaded.base_model.model["proj"](x).numpy()
    np.testing.assert_allclose(ours.proj(jnp.asarray(x.numpy())), theirs, atol=1e-4)


def test_an_adapter_of_a_tied_table_is_pefts_when_merged_or_when_tied(tmp_path):
    """Ours acts on both uses of a table; PEFT's on the lookup alone unless merged or tied."""
    sizes = {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 50}
    config = transformers.LlamaConfig(**SIZES, **sizes, tie_word_embeddings=True)
    original = transformers.LlamaForCausalLM(config).eval()
    a, b = (
        jax.random.normal(jax.random.key(i), shape) / 3 for i, shape in ((0, (50, 2)), (1, (2, 32)))
    )
    delta = 2.0 * to_torch(a @ b)

    def logits(model):
        with torch.no_grad():
            return model(TOKENS).logits

    def model():
        return copy.deepcopy(original)

    def changed(*tables):
        """The logits where the embedding, the head, or both have the update."""
        moved = model()
        head = moved.lm_head.weight.detach().clone()
        moved.lm_head.weight = torch.nn.Parameter(head + delta * ("head" in tables))
        moved.model.embed_tokens.weight.data += delta * ("embed" in tables)
        return logits(moved)

    save_peft(
        tmp_path / "one",
        {"embed": LoRAPair(a, b)},
        scale=2.0,
        names={"embed": "model.embed_tokens"},
        embeddings=["embed"],
    )
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "one")
    close(logits(loaded), changed("embed"))
    close(logits(loaded.merge_and_unload()), changed("embed", "head"))
    path = tmp_path / "one" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ensure_weight_tying": True}))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        tied = peft.PeftModel.from_pretrained(model(), tmp_path / "one")
    close(logits(tied), changed("embed", "head"))
    assert (changed("embed") - changed("embed", "head")).abs().max() > 0.1
