"""PEFT's files of what is no plain linear layer: convolutions, embeddings, DoRA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lowrank_optax import LoRAPair, nn
from lowrank_optax.adapters import load_peft, read_peft, save_peft
from lowrank_optax.adapters.peft_file import CONFIG, WEIGHTS

NORMAL = jax.nn.initializers.normal(1.0)
TOKENS = jnp.array([[3, 0, 3, 1]])


class Model(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.conv = nnx.Conv(6, 5, (3,), rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, tokens):
        return self.head(jnp.tanh(self.conv(self.embed(tokens))))


def adapted(seed, targets="embed|conv|head", **options):
    model = Model(0)
    config = nn.LoRAConfig(rank=2, b_init=NORMAL, **options)
    nn.add_lora(model, targets, config, rngs=nnx.Rngs(seed))
    return model


def test_a_model_of_all_kinds_goes_there_and_back(tmp_path):
    model, other = adapted(1), adapted(2)
    save_peft(tmp_path / "one", model)
    found = read_peft(tmp_path / "one")
    assert found.embeddings == {"embed"}
    assert found.windows == {"conv": (3,)}
    assert float(jnp.abs(other(TOKENS) - model(TOKENS)).max()) > 0.1
    load_peft(tmp_path / "one", other)
    np.testing.assert_allclose(other(TOKENS), model(TOKENS), rtol=1e-6)


def test_a_linen_tree_says_what_its_pairs_adapt(tmp_path):
    class LinenModel(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(7, 6, name="embed")(tokens)
            return linen.Conv(5, (3,), name="conv")(x)

    config = nn.LoRAConfig(rank=2, b_init=NORMAL)
    with nn.lora_interceptor("embed|conv", config):
        lora = LinenModel().init(jax.random.key(0), TOKENS)["lora"]
    kinds = {"embeddings": ["embed"], "windows": {"conv": (3,)}}
    save_peft(tmp_path / "one", lora, scale=config.scale, **kinds)
    found = read_peft(tmp_path / "one")
    assert (found.embeddings, found.windows) == ({"embed"}, {"conv": (3,)})
    zeros = jax.tree.map(jnp.zeros_like, lora)
    loaded = load_peft(tmp_path / "one", zeros, scale=config.scale)
    jax.tree.map(np.testing.assert_array_equal, loaded, lora)
    with pytest.raises(ValueError, match="name no pair: embedding; the pairs are conv, embed"):
        save_peft(tmp_path / "two", lora, scale=config.scale, embeddings=["embedding"])
    with pytest.raises(ValueError, match="an NNX model knows"):
        save_peft(tmp_path / "two", adapted(1), embeddings=["embed"])


def with_magnitudes(seed, targets="conv|head"):
    model = adapted(seed, targets, dora=True)
    for name in targets.split("|"):
        magnitude = getattr(model, name).lora_magnitude
        magnitude[...] = (1.0 + seed) * magnitude[...]
    return model


def test_dora_goes_there_and_back(tmp_path):
    model, other = with_magnitudes(1), with_magnitudes(2)
    save_peft(tmp_path / "one", model)
    assert json.loads((tmp_path / "one" / CONFIG).read_text())["use_dora"] is True
    found = read_peft(tmp_path / "one")
    assert {name: x.shape for name, x in found.magnitudes.items()} == {"conv": (5,), "head": (4,)}
    load_peft(tmp_path / "one", other)
    np.testing.assert_allclose(other(TOKENS), model(TOKENS), rtol=1e-6)


def test_dora_of_a_tree_goes_there_and_back(tmp_path):
    state = nnx.to_pure_dict(nnx.state(with_magnitudes(1), nnx.LoRAParam))
    scale = 8.0
    save_peft(tmp_path / "one", state, scale=scale, windows={"conv": (3,)})
    zeros = jax.tree.map(jnp.zeros_like, state)
    loaded = load_peft(tmp_path / "one", zeros, scale=scale)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)


def test_magnitudes_go_to_the_modules_of_their_outputs_and_back(tmp_path):
    """Of a stack one row each, of modules side by side one part each."""
    shapes = {"q": ((3,), 4), "kv": ((2,), 6), "o": ((), 4)}
    tree = {
        name: {
            "lora_a": jnp.ones((*batch, 5, 2)),
            "lora_b": jnp.ones((*batch, 2, n_out)),
            "lora_magnitude": 1.0
            + jnp.arange(np.prod(batch, dtype=int) * n_out).reshape(*batch, -1),
        }
        for name, (batch, n_out) in shapes.items()
    }
    names = {"q": "layers.{}.q", "kv": ("layers.{}.k", "layers.{}.v"), "o": "o"}
    save_peft(tmp_path / "one", tree, scale=1.0, names=names)
    found = read_peft(tmp_path / "one").magnitudes
    assert {name: x.tolist() for name, x in found.items()} == {
        "layers.0.q": [1, 2, 3, 4],
        "layers.1.q": [5, 6, 7, 8],
        "layers.2.q": [9, 10, 11, 12],
        "layers.0.k": [1, 2, 3],
        "layers.0.v": [4, 5, 6],
        "layers.1.k": [7, 8, 9],
        "layers.1.v": [10, 11, 12],
        "o": [1, 2, 3, 4],
    }
    zeros = jax.tree.map(jnp.zeros_like, tree)
    loaded = load_peft(tmp_path / "one", zeros, scale=1.0, names=names)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


@pytest.mark.parametrize("window", [(3,), (3, 2)])
def test_magnitudes_of_convolutions_have_pefts_shape(window, tmp_path):
    """PEFT keeps the norms over all axes but the first, transposed: (1, out, 1, ...)."""
    from safetensors.numpy import load_file

    model = nnx.Dict(conv=nnx.Conv(2, 5, window, rngs=nnx.Rngs(0)))
    nn.add_lora(model, "conv", nn.LoRAConfig(rank=2, dora=True), rngs=nnx.Rngs(1))
    save_peft(tmp_path / "one", model)
    stored = load_file(tmp_path / "one" / WEIGHTS)["base_model.model.conv.lora_magnitude_vector"]
    assert stored.shape == (1, 5, *[1] * len(window))
    np.testing.assert_array_equal(stored.ravel(), model.conv.lora_magnitude[...])


@pytest.mark.parametrize("leaf", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_magnitudes_of_a_tree_in_pefts_layout_are_written_and_loaded(tmp_path, leaf):
    tree = {"q.lora_A.weight": jnp.ones((2, 4)), "q.lora_B.weight": jnp.ones((6, 2))}
    tree[f"q.{leaf}"] = jnp.arange(1.0, 7.0)
    save_peft(tmp_path / "one", tree, scale=1.0)
    found = read_peft(tmp_path / "one")
    np.testing.assert_array_equal(found.magnitudes["q"], tree[f"q.{leaf}"])
    zeros = jax.tree.map(jnp.zeros_like, tree)
    loaded = load_peft(tmp_path / "one", zeros, scale=1.0)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


def test_magnitudes_of_another_name_are_refused(tmp_path):
    tree = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 6)), "lora_magnitudes": jnp.ones(6)}
    with pytest.raises(ValueError, match="q: beside it are q/lora_magnitudes; magnitudes of DoRA"):
        save_peft(tmp_path / "one", {"q": tree}, scale=1.0)


def test_dora_in_some_layers_alone_is_refused(tmp_path):
    model = adapted(1, "conv")
    nn.add_lora(model, "head", nn.LoRAConfig(rank=2, dora=True), rngs=nnx.Rngs(3))
    with pytest.raises(ValueError, match="in all modules or in none, and these have none: conv"):
        save_peft(tmp_path / "one", model)
    assert not (tmp_path / "one").exists()
    save_peft(tmp_path / "plain", adapted(1, "conv|head"))
    with pytest.raises(ValueError, match=r"conv: .*use_dora=False.*LoRAConfig\(dora=False\)"):
        load_peft(tmp_path / "plain", with_magnitudes(1))
    save_peft(tmp_path / "dora", with_magnitudes(1))
    with pytest.raises(ValueError, match=r"conv: .*use_dora=True.*LoRAConfig\(dora=True\)"):
        load_peft(tmp_path / "dora", adapted(1, "conv|head"))


def test_magnitudes_that_do_not_fit_are_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    save_peft(tmp_path / "one", with_magnitudes(1))
    weights = tmp_path / "one" / WEIGHTS
    tensors, key = load_file(weights), "base_model.model.head.lora_magnitude_vector"
    save_file({**tensors, key: tensors[key][:2]}, weights)
    with pytest.raises(ValueError, match=r"head.lora_magnitude_vector has 2 numbers"):
        read_peft(tmp_path / "one")
    save_file({name: x for name, x in tensors.items() if name != key}, weights)
    with pytest.raises(ValueError, match="use_dora=True, but the file has magnitudes of conv"):
        read_peft(tmp_path / "one")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda rngs: nnx.Conv(2, 4, (3, 3), rngs=rngs), r"a convolution \(3, 3\)"),
        (lambda rngs: nnx.Linear(18, 4, rngs=rngs), "linear"),
        (lambda rngs: nnx.Embed(18, 4, rngs=rngs), "an embedding"),
    ],
)
def test_layers_of_another_kind_with_factors_of_one_shape_are_refused(make, said, tmp_path):
    config = nn.LoRAConfig(rank=2)
    model = nnx.Dict(c=nnx.Conv(2, 4, (9, 1), rngs=nnx.Rngs(0)))
    other = nnx.Dict(c=make(nnx.Rngs(0)))
    for each in (model, other):
        nn.add_lora(each, "c", config, rngs=nnx.Rngs(1))
    save_peft(tmp_path / "one", model)
    with pytest.raises(
        ValueError, match=rf"c: is {said}, but c in the file a convolution \(9, 1\)"
    ):
        load_peft(tmp_path / "one", other)


@pytest.mark.parametrize("window", [(3, 3), (0,), (2.0,), "ab"])
def test_windows_that_do_not_fit_are_named(window, tmp_path):
    tree = {"conv": LoRAPair(jnp.ones((10, 2)), jnp.ones((2, 4)))}
    with pytest.raises(ValueError, match=r"conv: `windows` has .* which is no window"):
        save_peft(tmp_path / "one", tree, scale=1.0, windows={"conv": window})
    with pytest.raises(ValueError, match="must be windows by path"):
        save_peft(tmp_path / "one", tree, scale=1.0, windows=["conv"])
    both = {"windows": {"conv": 5}, "embeddings": ["conv"]}
    with pytest.raises(ValueError, match="conv: is in `embeddings` and in `windows`"):
        save_peft(tmp_path / "one", tree, scale=1.0, **both)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_a_start_is_exported_whichever_side_is_longer(shape, tmp_path):
    model = nnx.Dict(d=nnx.Linear(*shape, rngs=nnx.Rngs(0)))
    original = nnx.clone(model)
    nn.add_lora(model, "d", nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    nn.weight_start(model, progress=False)
    model.d.lora_b[...] += 0.1
    save_peft(tmp_path / "one", model, original=original)
    found = read_peft(tmp_path / "one")
    pair = found.pairs["d"]
    kernel = original.d.kernel[...] + found.scales["d"] * pair.a @ pair.b
    nn.merge_lora(model)
    np.testing.assert_allclose(kernel, model.d.kernel[...], atol=1e-5)
