"""Convolutions, embeddings and DoRA: outputs and gradients equal to those of PEFT in torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lowrank_optax import nn
from lowrank_optax.adapters import load_peft, read_peft, save_peft

WHY = "`make integration` has an environment with it"
peft = pytest.importorskip("peft", reason=WHY)
torch: Any = pytest.importorskip("torch", reason=WHY)

pytestmark = pytest.mark.libraries("peft", "torch")

TOKENS = np.array([[3, 0, 6, 2, 5, 1], [4, 4, 0, 2, 1, 6]])
NORMAL = jax.nn.initializers.normal(0.5)


class Ours(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.conv = nnx.Conv(6, 5, (2, 3), strides=(1, 2), padding="VALID", rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, tokens):
        image = self.embed(tokens)[:, None].repeat(3, axis=1)
        return self.head(jnp.tanh(self.conv(image)))


class Theirs(torch.nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 6)
        self.conv = torch.nn.Conv2d(6, 5, (2, 3), stride=(1, 2))
        self.head = torch.nn.Linear(5, 4)
        kernel = np.transpose(ours.conv.kernel[...], (3, 2, 0, 1))
        weights = {
            "embed.weight": ours.embed.embedding[...],
            "conv.weight": kernel,
            "conv.bias": ours.conv.bias[...],
            "head.weight": ours.head.kernel[...].T,
            "head.bias": ours.head.bias[...],
        }
        self.load_state_dict({name: torch.tensor(np.array(x)) for name, x in weights.items()})

    def forward(self, tokens):
        image = self.embed(tokens)[:, None].repeat(1, 3, 1, 1).permute(0, 3, 1, 2)
        return self.head(torch.tanh(self.conv(image)).permute(0, 2, 3, 1))


def adapted(base, targets, seed, **options):
    model = nnx.clone(base)
    config = nn.LoRAConfig(rank=2, alpha=3.0, b_init=NORMAL, **options)
    nn.add_lora(model, targets, config, rngs=nnx.Rngs(seed))
    for path in nn.lora_scales(model):
        layer = getattr(model, path)
        if config.dora:
            layer.lora_magnitude[...] = layer.lora_magnitude[...] * jnp.linspace(
                0.5, 2, layer.axes.sizes(layer.kernel.shape)[2]
            )
    return model


CASES = {"plain": ("embed|conv|head", {}), "DoRA": ("conv|head", {"dora": True})}
each = pytest.mark.parametrize(("targets", "options"), CASES.values(), ids=CASES)


@each
def test_peft_reads_our_layers(targets, options, tmp_path):
    """PEFT loads our convolutions, embeddings and DoRA: equal outputs, merged and not."""
    base = Ours(nnx.Rngs(0))
    model = adapted(base, targets, 1, **options)
    save_peft(tmp_path / "out", model)
    expected = torch.tensor(np.array(model(TOKENS)))
    tokens = torch.tensor(TOKENS)
    loaded = peft.PeftModel.from_pretrained(Theirs(base), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), expected, rtol=1e-4, atol=1e-5)
        assert (expected - torch.tensor(np.array(base(TOKENS)))).abs().max() > 1e-2
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens), expected, rtol=1e-4, atol=1e-5)


@each
def test_we_read_their_layers(targets, options, tmp_path):
    """We load PEFT's convolutions, embeddings and DoRA: equal outputs and gradients."""
    torch.manual_seed(0)
    base = Ours(nnx.Rngs(0))
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=targets.split("|"),
        init_lora_weights=False,
        use_dora=bool(options),
    )
    theirs = peft.get_peft_model(Theirs(base), settings)
    theirs.save_pretrained(tmp_path)
    model = load_peft(tmp_path, adapted(base, targets, 2, **options), ignore_others=True)
    y = theirs(torch.tensor(TOKENS))
    np.testing.assert_allclose(model(TOKENS), y.detach(), rtol=1e-4, atol=1e-5)
    y.sin().sum().backward()
    loss = lambda model: jnp.sin(model(TOKENS)).sum()
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    found = read_peft(tmp_path)
    for name in targets.split("|"):
        module = theirs.base_model.model.get_submodule(name)
        pair = module.lora_embedding_A if name in found.embeddings else module.lora_A
        other = module.lora_embedding_B if name in found.embeddings else module.lora_B
        factors = [x["default"] for x in (pair, other)]
        of_a, of_b = (getattr(x, "weight", x).grad for x in factors)
        ours = grads[name]
        flat = lambda g: np.asarray(g.reshape(len(g), -1).T)
        np.testing.assert_allclose(ours["lora_a"][...], flat(of_a), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(ours["lora_b"][...], flat(of_b), rtol=1e-3, atol=1e-5)
        if options:
            magnitude = module.lora_magnitude_vector["default"].weight.grad.ravel()
            np.testing.assert_allclose(ours["lora_magnitude"][...], magnitude, rtol=1e-3, atol=1e-5)
