"""The command line `lowrank-optax`, as a user runs it."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread
from safetensors import flax, safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from lowrank_optax import LoRAPair, nn
from lowrank_optax._command_line import app
from lowrank_optax.adapters import PeftConfig, read_peft, save_peft, write_peft
from lowrank_optax.adapters.peft_file import CONFIG, WEIGHTS


def pair(seed, n_in=12, rank=3, n_out=8):
    keys = jax.random.split(jax.random.key(seed))
    return LoRAPair(
        jax.random.normal(keys[0], (n_in, rank)), jax.random.normal(keys[1], (rank, n_out))
    )


def run(*arguments):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    return result.exit_code, result.output


@pytest.fixture
def adapter(tmp_path):
    tree = {"q": pair(0), "v": pair(1, rank=2)}
    save_peft(tmp_path / "one", tree, scale=2.0, base_model="ours/base")
    return tmp_path / "one"


def delta(folder, name):
    found = read_peft(folder)
    return found.config.scale(name) * np.asarray(found.pairs[name].a @ found.pairs[name].b)


def test_inspect_prints_what_numpy_computes(adapter):
    code, output = run("inspect", adapter, "--json")
    assert code == 0
    found = json.loads(output)
    assert list(found) == ["q", "v"]
    for name, each in found.items():
        values = np.linalg.svd(delta(adapter, name), compute_uv=False)[: each["rank"]]
        np.testing.assert_allclose(each["singular_values"], values, rtol=1e-5)
        np.testing.assert_allclose(each["norm"], values[0], rtol=1e-5)
        gram = np.asarray(read_peft(adapter).pairs[name].a, np.float64)
        np.testing.assert_allclose(each["condition_a"], np.linalg.cond(gram.T @ gram), rtol=1e-6)
        assert 1 <= each["effective_rank"] <= each["rank"]
    assert found["q"]["in"], found["q"]["out"] == (12, 8)


def test_inspect_prints_a_table_and_draws(adapter, tmp_path):
    code, output = run("inspect", adapter, "--plot", tmp_path / "spectra.png")
    assert code == 0
    assert "2 pairs" in output
    assert "12 → 8" in output
    assert imread(tmp_path / "spectra.png").std() > 0.01


def test_singular_factors_have_an_infinite_condition(tmp_path):
    zero = LoRAPair(pair(0).a, jnp.zeros((3, 8)))
    save_peft(tmp_path / "zero", {"q": zero}, scale=1.0)
    found = json.loads(run("inspect", tmp_path / "zero", "--json")[1])["q"]
    assert (found["norm"], found["effective_rank"], found["condition_b"]) == (0.0, 0.0, None)
    assert "inf" in run("inspect", tmp_path / "zero")[1]


def test_diff_of_an_adapter_with_itself_turned_is_nothing(adapter, tmp_path):
    """The same ΔK from other factors: no angle, no distance."""
    mix = jax.random.normal(jax.random.key(5), (3, 3))
    q = read_peft(adapter).pairs["q"]
    other = {"q": LoRAPair(q.a @ mix, jnp.linalg.inv(mix) @ q.b), "extra": pair(4)}
    save_peft(tmp_path / "two", other, scale=2.0)
    code, output = run("diff", adapter, tmp_path / "two", "--json")
    assert code == 0
    found = json.loads(output)
    assert found["in_one_alone"] == ["extra", "v"]
    assert found["modules"]["q"]["angle_a"] < 0.1
    assert found["modules"]["q"]["distance"] < 1e-4
    assert "in one of them alone: extra, v" in run("diff", adapter, tmp_path / "two")[1]


def test_diff_measures_angles_and_distance(tmp_path):
    eye = np.eye(4, dtype=np.float32)
    save_peft(tmp_path / "x", {"q": LoRAPair(eye[:, :1], eye[:1])}, scale=1.0)
    save_peft(tmp_path / "y", {"q": LoRAPair(eye[:, 1:2], eye[:1])}, scale=1.0)
    found = json.loads(run("diff", tmp_path / "x", tmp_path / "y", "--json")[1])["modules"]["q"]
    assert (found["angle_a"], found["angle_b"]) == (90.0, 0.0)
    assert found["distance"] == pytest.approx(2**0.5)


def test_convert_cuts_casts_and_keeps_scales(adapter, tmp_path):
    code, output = run("convert", adapter, tmp_path / "out", "--dtype", "bfloat16", "--rslora")
    assert code == 0
    assert "2 pairs written" in output
    found = read_peft(tmp_path / "out")
    assert found.pairs["q"].a.dtype == jnp.bfloat16
    assert (found.config.use_rslora, found.config.base_model) == (True, "ours/base")
    assert found.scales == pytest.approx({"q": 2.0, "v": 2.0}, rel=1e-5)
    code, output = run("convert", adapter, tmp_path / "cut", "--rank", 1)
    assert "largest relative error" in " ".join(output.split())
    left, values, right = np.linalg.svd(delta(adapter, "q"))
    best = values[0] * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(delta(tmp_path / "cut", "q"), best, atol=1e-4)


def test_combine_is_the_weighted_sum(adapter, tmp_path):
    save_peft(tmp_path / "two", {"q": pair(6, rank=2), "v": pair(7, rank=1)}, scale=0.5)
    code, output = run(
        "combine", tmp_path / "out", adapter, tmp_path / "two",
        "--rank", 5, "--weight", 0.25, "--weight", -2.0,
    )  # fmt: skip
    assert code == 2
    assert "v: --rank must be from 1 to 3 here, got 5" in output
    code, output = run(
        "combine", tmp_path / "out", adapter, tmp_path / "two",
        "--rank", 3, "--weight", 0.25, "--weight", -2.0,
    )  # fmt: skip
    assert code == 0, output
    total = 0.25 * delta(adapter, "v") - 2.0 * delta(tmp_path / "two", "v")
    np.testing.assert_allclose(delta(tmp_path / "out", "v"), total, atol=1e-4)


@pytest.fixture
def embedding_adapter(tmp_path):
    """As PEFT writes one of an embedding and a head, with `save_embedding_layers=True`."""
    config = PeftConfig(2, 4.0, target_modules=["embed", "head", "q"])
    pairs = {"embed": pair(0, 20, 2, 8), "head": pair(1, 8, 2, 20), "q": pair(2, 8, 2, 8)}
    whole = {"embed.weight": jnp.ones((20, 8)), "head.weight": jnp.ones((20, 8))}
    return write_peft(tmp_path / "embedding", config, pairs, whole, embeddings={"embed"})


EMBEDDING_KEYS = {
    "embed.lora_embedding_A", "embed.lora_embedding_B", "embed.base_layer.weight",
    "head.lora_A.weight", "head.lora_B.weight", "head.base_layer.weight",
    "q.lora_A.weight", "q.lora_B.weight",
}  # fmt: skip


@pytest.mark.parametrize("command", ["convert", "combine"])
def test_embeddings_and_base_layers_keep_their_keys(embedding_adapter, tmp_path, command):
    out = tmp_path / "out"
    arguments = {
        "convert": ("convert", embedding_adapter, out, "--rank", 1),
        "combine": ("combine", out, embedding_adapter, embedding_adapter, "--rank", 1),
    }
    code, output = run(*arguments[command])
    assert code == 0, output
    for folder in (embedding_adapter, out):
        keys = {f"base_model.model.{key}" for key in EMBEDDING_KEYS}
        assert set(load_file(folder / WEIGHTS)) == keys
        found = read_peft(folder)
        assert found.embeddings == {"embed"}
        assert set(found.others) == {"embed.weight", "head.weight"}


def test_factors_that_do_not_fit_the_weight_beside_them_are_refused(embedding_adapter):
    tensors = load_file(embedding_adapter / WEIGHTS)
    tensors["base_model.model.head.lora_A.weight"] = np.ones((2, 4), np.float32)
    save_file(tensors, embedding_adapter / WEIGHTS)
    with pytest.raises(ValueError, match=r"head has factors of .*base_layer.weight the shape"):
        read_peft(embedding_adapter)


def base_model(folder, dtype=np.float32, n_in=12):
    folder.mkdir()
    normal = np.random.default_rng(0).normal
    first = {"q.weight": normal(size=(8, n_in)).astype(dtype), "q.bias": np.ones(8, dtype)}
    save_file(first, folder / "model-1.safetensors")
    save_file({"v.weight": normal(size=(8, n_in)).astype(dtype)}, folder / "model-2.safetensors")
    return folder


def test_merge_adds_to_the_weights_and_touches_nothing_else(adapter, tmp_path):
    base = base_model(tmp_path / "base")
    code, output = run("merge", adapter, base, tmp_path / "out")
    assert code == 0, output
    for file, name in (("model-1", "q"), ("model-2", "v")):
        before, after = (load_file(at / f"{file}.safetensors") for at in (base, tmp_path / "out"))
        expected = before[f"{name}.weight"] + delta(adapter, name).T
        np.testing.assert_allclose(after[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(load_file(tmp_path / "out/model-1.safetensors")["q.bias"], 1)


def test_weights_kept_transposed_are_not_merged_and_stay_marked(tmp_path):
    """GPT-2's Conv1D keeps (in, out): on a square weight nothing but the setting tells."""
    save_peft(tmp_path / "one", {"q": pair(0, 8), "v": pair(1, 8)}, scale=1.0)
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    (tmp_path / "one" / CONFIG).write_text(json.dumps({**config, "fan_in_fan_out": True}))
    base = base_model(tmp_path / "base", n_in=8)
    code, output = run("merge", tmp_path / "one", base, tmp_path / "out")
    assert code == 2
    assert "has fan_in_fan_out=True" in " ".join(output.split())
    run("convert", tmp_path / "one", tmp_path / "converted")
    save_peft(tmp_path / "two", {"q": pair(2, 8), "v": pair(3, 8)}, scale=1.0)
    run("combine", tmp_path / "sum", tmp_path / "two", tmp_path / "one", "--rank", 2)
    for folder in ("converted", "sum"):
        assert json.loads((tmp_path / folder / CONFIG).read_text())["fan_in_fan_out"] is True


def test_merge_keeps_every_other_tensor_bit_by_bit(adapter, tmp_path):
    """As int64 and float64, which JAX would narrow, and the metadata of the file."""
    base = base_model(tmp_path / "base", np.float64)
    path = base / "model-1.safetensors"
    tensors = load_file(path)
    beside = {"ids": np.array([2**40 + 1]), "third": np.array(1 / 3), "q8": np.ones(3, np.int8)}
    save_file({**tensors, **beside}, path, {"format": "pt", "note": "ours"})
    code, output = run("merge", adapter, base, tmp_path / "out")
    assert code == 0, output
    after = load_file(tmp_path / "out/model-1.safetensors")
    for name, value in beside.items():
        assert after[name].dtype == value.dtype
        np.testing.assert_array_equal(after[name], value)
    expected = tensors["q.weight"] + delta(adapter, "q").T
    np.testing.assert_allclose(after["q.weight"], expected, rtol=1e-6, atol=1e-6)
    assert after["q.weight"].dtype == np.float64
    with safe_open(tmp_path / "out/model-1.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", "note": "ours"}


def test_merge_adds_to_a_weight_in_each_of_two_files_and_in_bfloat16(adapter, tmp_path):
    base = base_model(tmp_path / "base")
    both = {"q.weight": jnp.ones((8, 12), jnp.bfloat16), "v.weight": jnp.ones((8, 12))}
    flax.save_file(both, base / "consolidated.safetensors")
    code, output = run("merge", adapter, base, tmp_path / "out")
    assert code == 0, output
    after = flax.load_file(tmp_path / "out/consolidated.safetensors")
    expected = (1 + delta(adapter, "q").T).astype(jnp.bfloat16)
    np.testing.assert_array_equal(after["q.weight"], expected)
    first = load_file(base / "model-1.safetensors")["q.weight"] + delta(adapter, "q").T
    found = load_file(tmp_path / "out/model-1.safetensors")["q.weight"]
    np.testing.assert_allclose(found, first, rtol=1e-5, atol=1e-5)


def test_merge_adds_to_an_embedding_as_it_lies(tmp_path):
    """(in, out), unlike linear maps: nothing but the key tells on a square one."""
    embed = pair(0, 8, 2, 8)
    config = PeftConfig(2, 4.0, target_modules=["embed"])
    write_peft(tmp_path / "one", config, {"embed": embed}, {}, embeddings={"embed"})
    (tmp_path / "base").mkdir()
    save_file({"embed.weight": np.ones((8, 8), np.float32)}, tmp_path / "base/model.safetensors")
    code, output = run("merge", tmp_path / "one", tmp_path / "base", tmp_path / "out")
    assert code == 0, output
    found = load_file(tmp_path / "out/model.safetensors")["embed.weight"]
    np.testing.assert_allclose(found, 1 + 2.0 * embed.a @ embed.b, rtol=1e-5, atol=1e-5)


def test_merge_adds_to_a_convolution_as_flax_would(tmp_path):
    """Torch's kernel (out, c, k₁, k₂) is ours, (k₁, k₂, c, out), transposed; so is ΔK."""
    model = nnx.Sequential(nnx.Conv(3, 8, (2, 3), rngs=nnx.Rngs(0)))
    config = nn.LoRAConfig(rank=2, alpha=4.0, b_init=jax.nn.initializers.normal(1.0))
    nn.add_lora(model, "layers/0", config, rngs=nnx.Rngs(1))
    layer = model.layers[0]
    as_torch = lambda kernel: np.array(np.transpose(kernel, (3, 2, 0, 1)), order="C")
    (tmp_path / "base").mkdir()
    save_file({"conv.weight": as_torch(layer.kernel[...])}, tmp_path / "base/model.safetensors")
    config = PeftConfig(2, 4.0, target_modules=["conv"])
    write_peft(tmp_path / "one", config, {"conv": layer.pair}, {}, windows={"conv": (2, 3)})
    code, output = run("merge", tmp_path / "one", tmp_path / "base", tmp_path / "out")
    assert code == 0, output
    nn.merge_lora(model)
    found = load_file(tmp_path / "out/model.safetensors")["conv.weight"]
    np.testing.assert_allclose(found, as_torch(layer.kernel[...]), rtol=1e-5, atol=1e-5)
    code, output = run("convert", tmp_path / "one", tmp_path / "cut", "--rank", 1)
    assert code == 0, output
    assert read_peft(tmp_path / "cut").windows == {"conv": (2, 3)}


def test_a_damaged_base_model_is_one_line(adapter, tmp_path):
    base = base_model(tmp_path / "base")
    (base / "model-2.safetensors").write_bytes(b"no header")
    code, output = run("merge", adapter, base, tmp_path / "out")
    assert (code, "not a readable safetensors file" in " ".join(output.split())) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one"]


@pytest.mark.parametrize("other", [None, 2.0])
def test_combine_refuses_whole_weights_that_differ(tmp_path, other):
    """It kept those of the first adapter alone."""
    head = lambda value: {} if value is None else {"head.weight": jnp.full((2, 3), value)}
    for folder, value in (("one", 1.0), ("same", 1.0), ("two", other)):
        save_peft(tmp_path / folder, {"q": pair(0)}, scale=1.0, modules_to_save=head(value))
    for order in (("one", "two"), ("two", "one")):
        folders = [tmp_path / name for name in order]
        code, output = run("combine", tmp_path / "out", *folders, "--rank", 1)
        assert code == 2
        assert "head.weight is a whole weight that is not the same" in output
    run("combine", tmp_path / "out", tmp_path / "one", tmp_path / "same", "--rank", 1)
    np.testing.assert_array_equal(read_peft(tmp_path / "out").others["head.weight"], 1)


def test_adapters_of_other_shapes_are_one_line(adapter, tmp_path):
    save_peft(tmp_path / "two", {"q": pair(0, 9), "v": pair(1)}, scale=1.0)
    for arguments in (
        ("diff", adapter, tmp_path / "two"),
        ("combine", tmp_path / "out", adapter, tmp_path / "two", "--rank", 1),
    ):
        code, output = run(*arguments)
        assert code == 2
        assert "q is 12 → 8 and 9 → 8 in these adapters" in " ".join(output.split())


def test_diff_from_a_zero_adapter_is_infinite(adapter, tmp_path):
    zeros = jax.tree.map(jnp.zeros_like, {"q": pair(0)})
    save_peft(tmp_path / "zero", zeros, scale=1.0)
    found = json.loads(run("diff", tmp_path / "zero", adapter, "--json")[1])["modules"]["q"]
    assert found["distance"] is None
    assert "inf" in run("diff", tmp_path / "zero", adapter)[1]
    same = json.loads(run("diff", tmp_path / "zero", tmp_path / "zero", "--json")[1])
    assert same["modules"]["q"]["distance"] == 0


def test_convert_cuts_to_the_rank_that_a_pair_can_have(tmp_path):
    pairs = {"q": pair(0, 12, 6, 4), "v": pair(1)}  # PEFT allows a rank above the outputs
    config = PeftConfig.of({"q": 6, "v": 3}, {"q": 1.0, "v": 1.0})
    write_peft(tmp_path / "one", config, pairs, {})
    assert run("convert", tmp_path / "one", tmp_path / "out", "--rank", 5)[0] == 0
    found = read_peft(tmp_path / "out")
    assert {name: pair.a.shape[1] for name, pair in found.pairs.items()} == {"q": 4, "v": 3}


@pytest.mark.parametrize("kind", ["missing weight", "int8", "shape"])
def test_a_merge_that_cannot_be_leaves_nothing(adapter, tmp_path, kind):
    base = base_model(tmp_path / "base", np.int8 if kind == "int8" else np.float32)
    if kind == "missing weight":
        (base / "model-2.safetensors").unlink()
    if kind == "shape":
        save_file({"v.weight": np.ones((12, 8), np.float32)}, base / "model-2.safetensors")
    code, output = run("merge", adapter, base, tmp_path / "out")
    assert code == 2
    said = " ".join(output.split())
    expected = {
        "missing weight": "has no weight of v",
        "int8": "q.weight is of I8",
        "shape": "has the shape (12, 8), but the adapter's is (8, 12)",
    }[kind]
    assert expected in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "adapter_config.json is missing"),
        (["convert", "one", "one"], "one exists; give another folder"),
        (["convert", "one", "new", "--dtype", "int8"], "--dtype must be float32"),
        (["convert", "one", "new", "--rank", "0"], "`rank` must be at least 1"),
        (["combine", "new", "one", "--rank", "1", "--weight", "1", "--weight", "2"], "got 2"),
        (["merge", "one", "nowhere", "new"], "holds no safetensors file"),
    ],
)
def test_mistakes_are_one_line_and_the_exit_code_2(adapter, monkeypatch, arguments, message):
    monkeypatch.chdir(adapter.parent)
    code, output = run(*arguments)
    assert code == 2
    assert message in " ".join(output.split())
    assert "Traceback" not in output


def test_help_of_the_module_names_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_optax", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("inspect", "diff", "convert", "combine", "merge"):
        assert command in done.stdout


def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['typer'] = None; from lowrank_optax.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "in a checkout pip install '.[cli]'" in done.stderr


def test_diff_compares_the_magnitudes_of_dora(tmp_path):
    config = PeftConfig.of({"q": 3}, {"q": 2.0}, use_dora=True)
    one = pair(0)
    for name, factor in (("one", 1.0), ("two", 4.0)):
        magnitudes = {"q": jnp.full(8, factor)}
        write_peft(tmp_path / name, config, {"q": one}, {}, magnitudes=magnitudes)
    code, output = run("diff", tmp_path / "one", tmp_path / "two", "--json")
    assert code == 0, output
    found = json.loads(output)["modules"]["q"]
    assert found["distance"] < 1e-6
    assert found["magnitudes"] == pytest.approx(3.0)
    code, output = run("diff", tmp_path / "one", tmp_path / "two")
    assert "‖m₁ − m₂‖" in output
