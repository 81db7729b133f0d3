"""PEFT's files: written, read, loaded, and refused where they are not plain LoRA."""

import json
import random
import re
import struct
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lowrank_optax import LoRAPair, frame, nn
from lowrank_optax.adapters import (
    load_peft,
    name_maps,
    peft_config,
    plain_pair,
    read_peft,
    save_peft,
)
from lowrank_optax.adapters.peft_config import PeftConfig
from lowrank_optax.adapters.peft_file import CONFIG, WEIGHTS, write_peft
from tests.test_claims_sds_lora import SCALE
from tests.test_foreign_changes import trained_pair


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def pair(seed=0, n_in=6, rank=2, n_out=4, dtype=jnp.float32):
    return LoRAPair(
        normal(seed, n_in, rank).astype(dtype), normal(seed + 1, rank, n_out).astype(dtype)
    )


class Model(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.Linear(6, 4, rngs=rngs)
        self.value = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.concatenate([self.query(x), self.value(x)], axis=-1)


def adapted(seed=0, **config):
    model = Model(nnx.Rngs(7))
    settings = {"rank": 2, "alpha": 8.0, "b_init": jax.nn.initializers.normal(1.0), **config}
    nn.add_lora(model, "query", nn.LoRAConfig(**settings), rngs=nnx.Rngs(seed))
    other = nn.LoRAConfig(**{**settings, "rank": 3, "alpha": 6.0})
    nn.add_lora(model, "value", other, rngs=nnx.Rngs(seed + 1))
    return model


X = normal(9, 5, 6)
NAMES = {"query": "encoder.attention.q_proj", "value": "encoder.attention.v_proj"}


def test_a_model_goes_out_and_comes_back_exactly(tmp_path):
    model, other = adapted(0), adapted(5)
    errors = save_peft(tmp_path / "out", model, names=NAMES, base_model="ours/base")
    assert errors == dict.fromkeys(NAMES.values(), 0.0)
    assert not jnp.allclose(other(X), model(X))
    assert load_peft(tmp_path / "out", other, names=NAMES) is other
    np.testing.assert_array_equal(other(X), model(X))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "ours/base"
    assert config["target_modules"] == sorted(NAMES.values())
    found = read_peft(tmp_path / "out")
    assert found.scales == {NAMES["query"]: 4.0, NAMES["value"]: 2.0}
    assert found.config.rank(NAMES["value"]) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_tree_goes_out_and_comes_back_exactly_in_every_dtype(tmp_path, dtype):
    tree = {"q": pair(0, dtype=dtype), "mlp": [pair(2, 4, 1, 9, dtype), {"bias": jnp.ones(3)}]}
    scale = {"q": 2.0, "mlp/0": 0.3}
    save_peft(tmp_path / "out", tree, scale=scale)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    back = load_peft(tmp_path / "out", zeros, scale=scale)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for side in "ab":
        np.testing.assert_array_equal(getattr(back["q"], side), getattr(tree["q"], side))
        np.testing.assert_array_equal(getattr(back["mlp"][0], side), getattr(tree["mlp"][0], side))
    assert not jnp.any(back["mlp"][1]["bias"])


def test_the_tensors_are_peft_s(tmp_path):
    """Checked without this library's reader."""
    from safetensors.numpy import load_file

    q = pair()
    save_peft(tmp_path / "out", {"layers": {"0": {"q": q}}}, scale=4.0)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    prefix = "base_model.model.layers.0.q"
    assert set(tensors) == {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_A.weight"], q.a.T)
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_B.weight"], q.b.T)


def test_stacked_layers_have_a_name_each(tmp_path):
    stacked = jax.tree.map(lambda *x: jnp.stack(x), pair(0), pair(2), pair(4))
    names = {"q": "layers.{}.q"}
    save_peft(tmp_path / "out", {"q": stacked}, scale=1.0, names=names)
    found = read_peft(tmp_path / "out")
    np.testing.assert_array_equal(found.pairs["layers.1.q"].a, pair(2).a)
    zeros = {"q": jax.tree.map(jnp.zeros_like, stacked)}
    back = load_peft(tmp_path / "out", zeros, scale=1.0, names=names)
    np.testing.assert_array_equal(back["q"].b, stacked.b)
    with pytest.raises(ValueError, match=r"q: has 1 batch axes \(3,\), so its name needs as many"):
        save_peft(tmp_path / "other", {"q": stacked}, scale=1.0)


def test_names_with_wildcards(tmp_path):
    tree = {"layers": [{"attn": {"q_proj": {"w": pair(i)}}} for i in range(12)]}
    names = name_maps.TUNIX_LLAMA3
    save_peft(tmp_path / "out", tree, scale=1.0, names=names)
    found = read_peft(tmp_path / "out")
    np.testing.assert_array_equal(found.pairs["model.layers.11.self_attn.q_proj"].a, pair(11).a)
    back = load_peft(tmp_path / "out", jax.tree.map(jnp.zeros_like, tree), scale=1.0, names=names)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    with pytest.raises(ValueError, match=r"`names` has no name for 'x/q'; it names layers/\*"):
        save_peft(tmp_path / "new", {"x": {"q": pair()}}, scale=1.0, names=names)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_modules_side_by_side_share_a_and_have_their_part_of_b(tmp_path, stack):
    """As keys and values of Gemma, whose kernels are one: ΔK of each is its columns of a b."""
    shape = lambda *of: jax.random.normal(jax.random.key(len(of)), (*stack, *of))
    kv = LoRAPair(shape(6, 2), shape(2, 8))
    layer = "{}." if stack else ""
    names = {"kv": (f"{layer}k", f"{layer}v")}
    save_peft(tmp_path / "out", {"kv": kv}, scale=1.0, names=names)
    found = read_peft(tmp_path / "out").pairs
    last = "2." if stack else ""
    product = (kv.a @ kv.b)[-1] if stack else kv.a @ kv.b
    np.testing.assert_allclose(found[f"{last}k"].a @ found[f"{last}k"].b, product[:, :4], rtol=1e-5)
    np.testing.assert_allclose(found[f"{last}v"].a @ found[f"{last}v"].b, product[:, 4:], rtol=1e-5)
    zeros = jax.tree.map(jnp.zeros_like, {"kv": kv})
    back = load_peft(tmp_path / "out", zeros, scale=1.0, names=names)
    jax.tree.map(np.testing.assert_array_equal, back, {"kv": kv})


def test_modules_side_by_side_with_factors_of_their_own_are_refused(tmp_path):
    two = {"k": pair(0), "v": pair(1)}
    save_peft(tmp_path / "out", two, scale=1.0)
    width = 2 * pair(0).b.shape[-1]
    kv = {"kv": LoRAPair(pair(0).a, jnp.zeros((pair(0).b.shape[0], width)))}
    with pytest.raises(ValueError, match="kv: its modules share one factor a here, but not in"):
        load_peft(tmp_path / "out", kv, scale=1.0, names={"kv": ("k", "v")})
    with pytest.raises(ValueError, match="kv: its 8 outputs have no 3 equal parts, for k, v, w"):
        save_peft(tmp_path / "new", kv, scale=1.0, names={"kv": ("k", "v", "w")})
    assert not (tmp_path / "new").exists()


def test_a_name_fits_the_pair_and_its_module(tmp_path):
    """As of qwix, which names the weight, and of `nn.add_lora`, which names the layer."""
    of = lambda tree, folder: save_peft(
        tmp_path / folder, {"layers": [tree]}, scale=1.0, names=name_maps.TUNIX_GEMMA
    )
    by_qwix = of({"attn": {"q_einsum": {"w": pair()}}}, "qwix")
    by_surgery = of({"attn": {"q_einsum": pair()}}, "surgery")
    assert list(by_qwix) == list(by_surgery) == ["model.layers.0.self_attn.q_proj"]


def test_a_linen_collection_goes_out_and_comes_back(tmp_path):
    model, config = linen.Dense(4, name="q"), nn.LoRAConfig(rank=2, alpha=8.0)
    with nn.lora_interceptor("", config):
        variables = model.init(jax.random.key(0), X)
    lora = jax.tree.map(lambda x: x + 1.0, variables["lora"])
    names = {"": "q"} if "lora_a" in lora else None
    save_peft(tmp_path / "out", lora, scale=4.0, names=names)
    back = load_peft(tmp_path / "out", variables["lora"], scale=4.0, names=names)
    jax.tree.map(np.testing.assert_array_equal, back, lora)


def test_finished_frames_need_rank_r_and_unfinished_ones_2r(tmp_path):
    node, _ = trained_pair()
    save_peft(tmp_path / "done", {"q": node}, scale=SCALE)
    finished = read_peft(tmp_path / "done").pairs["q"]
    plain = plain_pair(node)
    rank = node.a.shape[-1]
    turned = frame(LoRAPair(node.a, node.b), jax.random.key(0))._replace(a=node.a, b=node.b)
    errors = save_peft(tmp_path / "middle", {"q": turned}, scale=SCALE)
    middle = read_peft(tmp_path / "middle").pairs["q"]
    assert middle.a.shape[-1] == 2 * rank
    assert errors == {"q": 0.0}
    theirs = plain_pair(turned)
    np.testing.assert_allclose(middle.a @ middle.b, theirs.a @ theirs.b, atol=1e-5)
    assert finished.a.shape[-1] in (rank, 2 * rank)
    np.testing.assert_allclose(finished.a @ finished.b, plain.a @ plain.b, atol=1e-5)
    errors = save_peft(tmp_path / "cut", {"q": turned}, scale=SCALE, rank=1)
    assert read_peft(tmp_path / "cut").config.r == 1
    assert 0 < errors["q"] < 1


def test_factors_that_are_computed_are_float32_unless_dtype_says_otherwise(tmp_path):
    half = pair(dtype=jnp.bfloat16)
    written = {
        "as it is": ({"q": half}, {}, jnp.bfloat16),
        "frames": ({"q": frame(half)}, {}, jnp.float32),
        "cut": ({"q": half}, {"rank": 1}, jnp.float32),
        "cast": ({"q": frame(half)}, {"rank": 1, "dtype": jnp.bfloat16}, jnp.bfloat16),
    }
    for name, (tree, settings, dtype) in written.items():
        save_peft(tmp_path / name, tree, scale=1.0, **settings)
        assert {x.dtype for x in read_peft(tmp_path / name).pairs["q"]} == {jnp.dtype(dtype)}


def test_rslora_scales_are_the_same(tmp_path):
    save_peft(tmp_path / "out", {"q": pair(rank=4, n_in=9, n_out=9)}, scale=4.0, use_rslora=True)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (8, True)
    assert read_peft(tmp_path / "out").scales == {"q": 4.0}


def test_weights_of_a_head_go_beside(tmp_path):
    head = {"classifier.weight": normal(3, 3, 6), "classifier.bias": jnp.ones(3)}
    save_peft(tmp_path / "out", {"q": pair()}, scale=1.0, modules_to_save=head)
    found = read_peft(tmp_path / "out")
    assert found.config.modules_to_save == ["classifier"]
    jax.tree.map(np.testing.assert_array_equal, found.others, head)


def test_nested_heads_are_written_by_their_full_names(tmp_path):
    """The last part alone, `dense`, would make PEFT wrap that of every encoder layer."""
    names = ["classifier.dense.weight", "classifier.out_proj.weight", "bert.pooler.dense.bias"]
    head = {name: normal(3, 3) for name in names}
    save_peft(tmp_path / "out", {"bert.pooler.query": pair()}, scale=1.0, modules_to_save=head)
    found = read_peft(tmp_path / "out")
    modules = ["bert.pooler.dense", "classifier.dense", "classifier.out_proj"]
    assert found.config.modules_to_save == modules
    jax.tree.map(np.testing.assert_array_equal, found.others, head)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head", "'lm_head' is no weight of a module; .* as in 'lm_head.weight'"),
        ("q.weight", "'q.weight' is a weight of q, which is adapted"),
    ],
)
def test_whole_weights_that_peft_would_not_place_are_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        save_peft(tmp_path / "out", {"q": pair()}, scale=1.0, modules_to_save={name: jnp.ones(3)})
    assert not (tmp_path / "out").exists()


def test_whole_weights_of_a_file_are_not_dropped_unsaid(tmp_path):
    head = {"classifier.weight": normal(3, 3, 6)}
    save_peft(tmp_path / "out", {"q": pair()}, scale=1.0, modules_to_save=head)
    with pytest.raises(ValueError, match=r"whole weights too: classifier\.weight.*ignore_others"):
        load_peft(tmp_path / "out", {"q": pair(5)}, scale=1.0)
    back = load_peft(tmp_path / "out", {"q": pair(5)}, scale=1.0, ignore_others=True)
    np.testing.assert_array_equal(back["q"].a, pair().a)


def test_merged_layers_are_refused_where_the_kernel_counts(tmp_path):
    """Of a merged kernel the adapter would be written twice, or not at all, or not be used."""
    original, model = Model(nnx.Rngs(7)), adapted()
    save_peft(tmp_path / "one", model)
    nn.merge_lora(model)
    with pytest.raises(ValueError, match=r"^query: its kernel .* call nn.unmerge_lora first"):
        save_peft(tmp_path / "out", model, original=original)
    with pytest.raises(ValueError, match=r"^query of `original`: .* nn.unmerge_lora"):
        save_peft(tmp_path / "out", adapted(), original=model)
    before = model.query.pair.a
    with pytest.raises(ValueError, match=r"^query: its kernel .* call nn.unmerge_lora first"):
        load_peft(tmp_path / "one", model)
    np.testing.assert_array_equal(model.query.pair.a, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "name"),
    [("l/*/e/*/up", "l.*.up"), ("l/*/e/0/up", "l.*.e.*.up"), ("l/0/e/0/up", ("l.0.q", "l.*.k"))],
)
def test_names_with_other_wildcards_than_their_keys_are_refused(tmp_path, key, name):
    tree = {"l": {"0": {"e": {"0": {"up": pair()}}}}}
    with pytest.raises(ValueError, match=rf"for '{re.escape(key)}'; a name needs as many wild"):
        save_peft(tmp_path / "out", tree, scale=1.0, names={key: name})


@pytest.mark.parametrize("name", ["{layers}.{}.q", "{}.{0}", "{}.q}"])
def test_names_with_other_braces_are_refused(tmp_path, name):
    stacked = jax.tree.map(lambda x: x[None], pair())
    with pytest.raises(ValueError, match=r"q: the name .* has braces other than `{}`"):
        save_peft(tmp_path / "out", {"q": stacked}, scale=1.0, names={"q": name})


def test_nothing_is_overwritten_and_a_failed_save_leaves_nothing(tmp_path):
    save_peft(tmp_path / "out", {"q": pair()}, scale=1.0)
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="give another folder"):
        save_peft(tmp_path / "out", {"q": pair(5)}, scale=1.0)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    with pytest.raises(ValueError, match="`scale`"):
        save_peft(tmp_path / "new", {"q": pair()})
    with pytest.raises(ValueError, match="rank"):
        save_peft(tmp_path / "new", {"q": pair()}, scale=1.0, rank=3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_does_not_fit_is_listed_on_both_sides_and_changes_nothing(tmp_path):
    model = adapted()
    save_peft(tmp_path / "out", model, names={"query": "q_proj", "value": "v_proj"})
    other = adapted(5)
    before = other(X)
    with pytest.raises(ValueError, match=r"without a module .*: value; modules .*: v_proj"):
        load_peft(tmp_path / "out", other, names={"query": "q_proj", "value": "value"})
    names = {"query": "q_proj", "value": "v_proj"}
    with pytest.raises(ValueError, match=r"query: has the scale 5, but q_proj in the file 4"):
        load_peft(tmp_path / "out", adapted(5, alpha=10.0), names=names)
    with pytest.raises(ValueError, match=r"query: its factor a is \(6, 1\), but .* \(6, 2\)"):
        load_peft(tmp_path / "out", adapted(5, rank=1, alpha=4.0), names=names)
    np.testing.assert_array_equal(other(X), before)


# Configurations

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA', not 'LORA'"),
        ({"r": 0}, "r=0, which is no positive integer"),
        ({"r": 4.0}, "r=4.0, which is no positive integer"),
        ({"lora_alpha": "16"}, "lora_alpha='16', which is no positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\]=-1"),
        ({"rank_pattern": {"(": 2}}, "no pattern"),
        ({"alpha_pattern": [1]}, "no mapping"),
        ({"target_modules": [1]}, "no list of names"),
    ],
)
def test_configurations_that_are_not_plain_lora_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        PeftConfig.parse(json.dumps({**PLAIN, **changes}))


REFUSED: dict[str, list[Any]] = {
    "use_qalora": [True],
    "lora_bias": [True],
    "bias": ["all", "lora_only"],
    "layer_replication": [[[0, 2]]],
    "alora_invocation_tokens": [[1, 2]],
    "target_parameters": [["experts.weight"]],
    "trainable_token_indices": [[0], {"embed": [0]}],
    "arrow_config": [{}],
    "use_bdlora": [{"nblocks": 2}, True],
    "kasa_config": [{}],
    "monteclora_config": [{}],
}
HARMLESS = (
    dict.fromkeys(REFUSED),
    {
        **dict.fromkeys(("use_qalora", "lora_bias", "use_bdlora"), False),
        "bias": "none",
        "target_parameters": [],
    },
)


@pytest.mark.parametrize(
    ("setting", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_a_setting_that_changes_what_the_factors_mean_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"has {setting}=.*, which is not supported"):
        PeftConfig.parse(json.dumps({**PLAIN, setting: value}))


STARTS = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]


@pytest.mark.parametrize("start", [*STARTS, "OLoRA"])
def test_a_start_that_changes_the_base_model_is_refused_by_name(start):
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which changes the base"):
        PeftConfig.parse(json.dumps({**PLAIN, "init_lora_weights": start}))


@pytest.mark.parametrize("values", HARMLESS, ids=["none", "others"])
@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_settings_that_change_nothing_are_taken(values, start):
    found = PeftConfig.parse(json.dumps({**PLAIN, **values, "init_lora_weights": start}))
    assert (found.r, found.alpha) == (8, 16)


def test_every_refused_setting_is_in_these_tests():
    assert peft_config._UNSUPPORTED.keys() == REFUSED.keys()
    assert set(peft_config._CHANGES_BASE) == set(STARTS) - {"pissa_niter_4"}


@pytest.mark.parametrize("missing", ["r", "lora_alpha"])
def test_a_missing_number_is_named(missing):
    values = {key: value for key, value in PLAIN.items() if key != missing}
    with pytest.raises(ValueError, match=f"lacks '{missing}'"):
        PeftConfig.parse(json.dumps(values))


def test_a_setting_given_twice_is_refused():
    with pytest.raises(ValueError, match="'r' twice"):
        PeftConfig.parse('{"peft_type": "LORA", "r": 8, "lora_alpha": 1, "r": 4}')


def test_patterns_match_the_tail_of_a_name_as_in_peft():
    config = PeftConfig(8, 16.0, {"layers.0.q": 4, r".*\.v": 2}, {"q": 8.0}, use_rslora=True)
    assert [config.rank(name) for name in ("m.layers.0.q", "layers.1.q", "m.x.v")] == [4, 8, 2]
    assert config.scale("m.layers.0.q") == 4.0


def test_a_name_that_another_one_ends_with_has_its_own_rank_and_scale(tmp_path):
    tree = {"proj": pair(0, rank=3), "enc.proj": pair(1), "dec.proj": pair(2), "x.dec.proj": pair()}
    scale = {"proj": 4.0, "enc.proj": 1.0, "dec.proj": 1.0, "x.dec.proj": 0.5}
    save_peft(tmp_path / "out", tree, scale=lambda path: scale[path.replace("/", ".")])
    found = read_peft(tmp_path / "out")
    assert found.scales == scale
    assert found.config.rank_pattern == {"^proj": 3}
    with pytest.raises(ValueError, match=r"'q\\n': PEFT's patterns give it the rank or scale of"):
        PeftConfig.of(dict.fromkeys(["q", "q\n", "v"], 2), {"q": 4.0, "q\n": 1.0, "v": 1.0})


def test_every_scale_comes_back_to_the_rounding_of_float64(tmp_path):
    """Alphas of six digits gave scales that `load_peft` then refused."""
    for rank, scale in ((3, 1.23456789), (7, 1 / 3), (64, 1e-3 / 7), (2, 0.3)):
        for rslora in (False, True):
            config = PeftConfig.of({"q": rank}, {"q": scale}, use_rslora=rslora)
            assert config.scale("q") == pytest.approx(scale, rel=1e-12)
    save_peft(tmp_path / "out", {"q": pair()}, scale=1.23456789)
    load_peft(tmp_path / "out", {"q": pair(5)}, scale=1.23456789)
    assert PeftConfig.of({"q": 3}, {"q": 2 / 3}).alpha == 2


# Files


@pytest.fixture
def good(tmp_path):
    save_peft(tmp_path / "good", {"q": pair(), "v": pair(2, 5, 1, 5)}, scale=2.0)
    return tmp_path / "good"


def test_a_pickle_is_named_and_not_read(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    (tmp_path / CONFIG).write_text(json.dumps(PLAIN))
    with pytest.raises(FileNotFoundError, match="a pickle, which can run any code"):
        read_peft(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(good, name):
    (good / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_peft(good)


def rewritten(folder, change):
    """Rewrites the weights; `change` gets a dict of NumPy arrays by key."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, folder / WEIGHTS)


A_OF_Q = "base_model.model.q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A_OF_Q), "q has a factor B alone"),
        (lambda t: t.update({A_OF_Q: t[A_OF_Q][:1]}), r"shapes \(1, 6\) and \(4, 2\).*rank 2"),
        (lambda t: t.update({A_OF_Q: t[A_OF_Q] * np.nan}), "not finite"),
        (lambda t: t.update({A_OF_Q: t[A_OF_Q].astype(np.int8)}), "must be floating"),
        (lambda t: t.update({A_OF_Q: t[A_OF_Q][None]}), r"shapes \(1, 2, 6\)"),
        (lambda t: t.update({"q.lora_A.weight": t.pop(A_OF_Q)}), "does not begin with"),
        (lambda t: t.update({"base_model.model.x.lora_C.weight": np.ones(3)}), "neither a factor"),
        (lambda t: t.clear(), "holds no factor"),
    ],
)
def test_weights_that_do_not_fit_name_the_tensor(good, change, message):
    rewritten(good, change)
    with pytest.raises(ValueError, match=message):
        read_peft(good)


def test_whole_weights_that_peft_stores_unasked_are_read(good):
    """A count of batches, and the table and head of a resized vocabulary."""
    whole = {
        "base_model.model.embed_tokens.weight": np.ones((7, 6), np.float32),
        "base_model.model.classifier.norm.num_batches_tracked": np.array([3], np.int64),
    }
    config = json.loads((good / CONFIG).read_text())
    (good / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["classifier"]}))
    rewritten(good, lambda tensors: tensors.update(whole))
    found = read_peft(good).others
    assert found["embed_tokens.weight"].shape == (7, 6)
    assert found["classifier.norm.num_batches_tracked"].tolist() == [3]
    with pytest.raises(ValueError, match=r"holds whole weights too: classifier.*, embed_tokens"):
        load_peft(good, {"q": LoRAPair(jnp.zeros((6, 2)), jnp.zeros((2, 4)))}, scale=2.0)


def mutations(data: bytes, number: int):
    """Damaged copies of a file, seeded."""
    generator = random.Random(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(number):
        kind = generator.randrange(6)
        copy = bytearray(data)
        if kind == 0:
            copy = copy[: generator.randrange(len(data))]
        elif kind == 1:
            copy[:8] = struct.pack("<Q", generator.choice([0, 1, header, 2**31, 2**63, 2**64 - 1]))
        elif kind == 2:
            for _ in range(generator.randint(1, 4)):
                copy[generator.randrange(8, header)] = generator.randrange(256)
        elif kind == 3:
            at = generator.randrange(8, header)
            copy[at:at] = bytes(generator.randrange(32, 127) for _ in range(3))
        elif kind == 4:
            digits = [i for i in range(8, header) if chr(data[i]).isdigit()]
            copy[generator.choice(digits)] = ord(generator.choice("0123456789"))
        else:
            copy[generator.randrange(header, len(data))] ^= 1 << generator.randrange(8)
        yield bytes(copy)


def outcome(folder):
    """The shapes of what is read, or the message of the error."""
    try:
        return jax.tree.map(jnp.shape, read_peft(folder).pairs)
    except ValueError as error:
        return str(error)


def test_adapters_that_start_with_factors_of_their_own_are_not_loaded_into(tmp_path):
    save_peft(tmp_path / "out", adapted(), names=NAMES)
    model = Model(nnx.Rngs(7))
    for path, rank, alpha in (("query", 2, 8.0), ("value", 3, 6.0)):
        extra = nn.Frames(warmup=False)
        scaled = alpha / rank * rank**0.5
        nn.add_lora(model, path, nn.LoRAConfig(rank, scaled, extra=extra), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"query: an adapter with Frames\(warmup=False\) starts"):
        load_peft(tmp_path / "out", model, names=NAMES)


@pytest.mark.parametrize("key", [None, jax.random.key(0)])
def test_framed_pairs_of_a_tree_are_not_loaded_into(tmp_path, key):
    save_peft(tmp_path / "out", {"q": pair()}, scale=2.0)
    with pytest.raises(ValueError, match=r"q: is a FramedPair; load into a LoRAPair"):
        load_peft(tmp_path / "out", {"q": frame(pair(3), key)}, scale=2.0)


def test_2000_damaged_files_end_in_an_error_or_a_whole_adapter(good):
    """A flipped bit of a number cannot be known; all else is an error, never half an adapter."""
    weights, config, sound = good / WEIGHTS, good / CONFIG, outcome(good)
    data, loaded = weights.read_bytes(), 0
    for damaged in mutations(data, 1700):
        weights.write_bytes(damaged)
        found = outcome(good)
        assert found == sound or WEIGHTS in found
        loaded += found == sound
    assert loaded < 700
    weights.write_bytes(data)
    generator, text = random.Random(1), config.read_bytes()
    for _ in range(400):
        copy = bytearray(text)
        for _ in range(generator.randint(1, 5)):
            copy[generator.randrange(len(copy))] = generator.randrange(256)
        config.write_bytes(bytes(copy))
        found = outcome(good)
        assert found == sound or CONFIG in found


def test_a_start_that_changed_the_kernels_is_written_for_the_original_base(tmp_path):
    """K + s a b of the trained model is the original kernel plus what the file adds to it."""
    original = Model(nnx.Rngs(7))
    model = nnx.clone(original)
    nn.add_lora(model, "query|value", nn.LoRAConfig(2, alpha=6.0), rngs=nnx.Rngs(0))
    target = normal(4, 5, 12)
    loss = lambda model, x: jnp.mean((model(x) - target) ** 2)
    start = {"gamma": 2.0, "keep_function": True, "progress": False}
    nn.gradient_start(model, loss, [X], **start)
    assert not jnp.allclose(model.query.base.kernel[...], original.query.kernel[...], atol=1e-3)
    errors = save_peft(tmp_path / "out", model, original=original)
    assert max(errors.values()) < 1e-5
    found = read_peft(tmp_path / "out")
    assert found.config.r == 4
    for name, layer in (("query", model.query), ("value", model.value)):
        now = layer.base.kernel[...] + layer.scale * layer.pair.a @ layer.pair.b
        written = found.scales[name] * found.pairs[name].a @ found.pairs[name].b
        np.testing.assert_allclose(getattr(original, name).kernel[...] + written, now, atol=1e-5)
    with pytest.raises(ValueError, match="query: `original` has no such layer"):
        save_peft(tmp_path / "new", model, original=nnx.Linear(6, 4, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", ["pissa", "pissa_fast", "olora"])
def test_a_start_from_the_weights_is_written_for_the_original_base(method, use_rslora, tmp_path):
    """What the file adds to the original kernels is what training has added to them."""
    original = Model(nnx.Rngs(7))
    model = nnx.clone(original)
    config = nn.LoRAConfig(2, alpha=6.0, rslora=use_rslora)
    nn.add_lora(model, "query|value", config, rngs=nnx.Rngs(0))
    nn.weight_start(model, method, progress=False)
    with pytest.raises(ValueError, match=r"query: a start has changed its kernel, .*`original`"):
        save_peft(tmp_path / "out", model)
    model.query.lora_b[...] += 0.1
    errors = save_peft(tmp_path / "out", model, original=original, use_rslora=use_rslora)
    assert max(errors.values()) < 1e-5
    found = read_peft(tmp_path / "out")
    assert (found.config.r, found.config.use_rslora) == (4, use_rslora)
    for name, layer in (("query", model.query), ("value", model.value)):
        now = layer.kernel[...] + layer.scale * layer.pair.a @ layer.pair.b
        written = found.scales[name] * found.pairs[name].a @ found.pairs[name].b
        np.testing.assert_allclose(getattr(original, name).kernel[...] + written, now, atol=1e-5)
    # Beside its own kernels the pair is written as it is, and does not fit other ones.
    save_peft(tmp_path / "own", model, original=model)
    own = read_peft(tmp_path / "own")
    assert own.config.r == 2
    np.testing.assert_allclose(own.pairs["query"].a, model.query.pair.a, rtol=1e-6)
    with pytest.raises(ValueError, match=r"query: a start has changed its kernel, .*load into"):
        load_peft(tmp_path / "own", model)


def test_a_start_is_written_at_a_given_rank_as_the_nearest_to_the_whole_change(tmp_path):
    original = Model(nnx.Rngs(7))
    model = nnx.clone(original)
    nn.add_lora(model, "query", nn.LoRAConfig(2, alpha=6.0), rngs=nnx.Rngs(0))
    nn.weight_start(model, progress=False)
    layer = model.query
    layer.lora_a[...] += normal(1, 6, 2)
    layer.lora_b[...] += normal(2, 2, 4)
    errors = save_peft(tmp_path / "out", model, original=original, rank=2)
    found = read_peft(tmp_path / "out")
    assert found.config.r == 2
    now = layer.kernel[...] + layer.scale * layer.lora_a[...] @ layer.lora_b[...]
    change = np.float64(now - original.query.kernel[...])
    left, values, right = np.linalg.svd(change, full_matrices=False)
    written = found.scales["query"] * found.pairs["query"].a @ found.pairs["query"].b
    np.testing.assert_allclose(written, left[:, :2] * values[:2] @ right[:2], atol=1e-5)
    cut = np.linalg.norm(values[2:]) / np.linalg.norm(values)
    assert cut > 0.01
    assert errors["query"] == pytest.approx(cut, rel=1e-4)


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    broken = LoRAPair(jnp.full((6, 2), jnp.nan), pair().b)
    with pytest.raises(ValueError, match=r"q\.lora_A\.weight holds numbers that are not finite"):
        save_peft(tmp_path / "out", {"q": broken}, scale=1.0)
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_was_written(tmp_path):
    save_peft(tmp_path / "out", {"q": pair()}, scale=1.0)
    assert all(path.stat().st_mode & 0o004 for path in (tmp_path / "out").iterdir())


def test_a_save_that_fails_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.rename", full)
    with pytest.raises(OSError, match="No space"):
        save_peft(tmp_path / "out", {"q": pair()}, scale=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_the_header_twice_is_refused(good):
    data = (good / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size].rstrip()
    entry = json.dumps({A_OF_Q: json.loads(header)[A_OF_Q]}).encode()[1:-1]
    doubled = header[:-1] + b"," + entry + b"}"
    (good / WEIGHTS).write_bytes(struct.pack("<Q", len(doubled)) + doubled + data[8 + size :])
    with pytest.raises(ValueError, match="a key twice"):
        read_peft(good)


SAVES = """
import sys, jax.numpy as jnp
from lowrank_optax import LoRAPair
from lowrank_optax.adapters import save_peft
for number in range(10_000):
    full = lambda *shape: jnp.full(shape, float(number))
    pair = LoRAPair(full(64000, 16), full(16, 64000))
    save_peft(f"{sys.argv[1]}/{number}", {"q": {"k": pair}}, scale=1.0)
    print(number, flush=True)
"""


def test_a_killed_save_leaves_whole_adapters_alone(tmp_path):
    """kill −9 at 6 moments within a save of 8 MB: a folder that is there can be read."""
    begun = lambda folder: [path for path in folder.glob(".*") if path.is_dir()]
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        command = [sys.executable, "-c", SAVES, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout.readline() == "0\n"
            while not begun(folder):
                time.sleep(0.0005)
            time.sleep(0.002 * attempt)
            worker.kill()
        whole = [path for path in folder.iterdir() if not path.name.startswith(".")]
        assert whole
        assert begun(folder) or len(whole) > 1
        for path in whole:
            found = read_peft(path).pairs["q.k"]
            assert float(found.a[0, 0]) == float(found.b[-1, -1]) == int(path.name)


def test_convolutions_have_torchs_layout(tmp_path):
    """A is (r, c, k₁, k₂), B is (out, r, 1, 1); rows of a are channels, then places."""
    from safetensors.numpy import load_file

    a, b = jnp.arange(24.0).reshape(12, 2), jnp.ones((2, 5))
    config = PeftConfig.of({"conv": 2}, {"conv": 3.0})
    folder = write_peft(
        tmp_path / "one", config, {"conv": LoRAPair(a, b)}, {}, windows={"conv": (2, 3)}
    )
    stored = load_file(folder / WEIGHTS)
    assert stored["base_model.model.conv.lora_A.weight"].shape == (2, 2, 2, 3)
    assert stored["base_model.model.conv.lora_B.weight"].shape == (5, 2, 1, 1)
    assert stored["base_model.model.conv.lora_A.weight"][1, 1, 0, 2] == a[6 + 2, 1]
    found = read_peft(folder)
    assert found.windows == {"conv": (2, 3)}
    np.testing.assert_array_equal(found.pairs["conv"].a, a)
    np.testing.assert_array_equal(found.pairs["conv"].b, b)
