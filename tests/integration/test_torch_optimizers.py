"""The LoRA optimizers of torch against ours: the same steps in float64 from the same gradients.

Ten steps on pairs of two shapes; both are fed the same random gradients. Our a is the transposed
lora_A, our b the transposed lora_B. Hugging Face PEFT's LoRA+, LoRA-FA and Riemannian optimizer and
pytorch_optimizer's LoRA-RITE do what ours do, except for what follows, each with its test:

- LoRA+: nothing.
- LoRA-FA: PEFT shrinks the b that has moved, ours the old b, as AdamW does. It projects float32
  gradients in bfloat16, by `torch.autocast`; gradients in float64 stay as they are.
- Riemannian: PEFT leaves Adam to torch, which adds ε to √(v / (1 − β₂ᵗ)). `scaled_adamw` adds ε to
  √v, as the paper's released code does. PEFT with ε / √(1 − β₂ᵗ) in step t takes our steps.
- LoRA-RITE: pytorch_optimizer clips all pairs by one norm, ours each pair by its own. It whitens by
  1 / (√(λ + ε²) + ε), ours by 1 / (√λ + ε): the same to O(ε² / λ). It takes no step from gradients
  with root mean square above `update_skipping` = 1, which ours does not have.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax
from lowrank_optax import LoRAPair, lora_plus, lora_rite, scaled_adamw

WHY = "`make integration` has an environment with it"
peft = pytest.importorskip("peft", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
of_peft = pytest.importorskip("peft.optimizers", reason=WHY)
pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason=WHY)

pytestmark = [
    pytest.mark.libraries("peft", "torch", "pytorch_optimizer"),
    pytest.mark.usefixtures("x64"),
]

RANK, ALPHA, STEPS, RATE = 4, 6.0, 10, 1e-2
SIZES = {"up": (12, 20), "down": (20, 7)}
TINY = 1e-30  # no ε, as far as these numbers go


def adapted():
    """A torch model with two adapted maps, in float64, both factors drawn."""
    torch.manual_seed(0)
    maps = {name: torch.nn.Linear(*size, bias=False) for name, size in SIZES.items()}
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(SIZES), init_lora_weights=False
    )
    return peft.get_peft_model(torch.nn.ModuleDict(maps), config).double()


def factors(model):
    """The torch factors by map, lora_A first."""
    layers = {name: model.base_model.model[name] for name in SIZES}
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in layers.items()
    }


def to_jax(x):
    return jnp.asarray(x.detach().numpy().T)


def pairs(model):
    return {name: LoRAPair(*map(to_jax, both)) for name, both in factors(model).items()}


def gradients(seed, size=1.0):
    """One for each factor, of a root mean square of this size, as torch lays them out."""
    rng = np.random.default_rng(seed)
    return {
        name: (size * rng.normal(size=(RANK, n_in)), size * rng.normal(size=(n_out, RANK)))
        for name, (n_in, n_out) in SIZES.items()
    }


def largest_difference(model, theirs, ours, *, size=1.0, before_step=lambda step: None):
    """Takes the steps with both; returns the largest difference of a factor over its change."""
    params = start = pairs(model)
    state = ours.init(params)
    for step in range(STEPS):
        grads = gradients(step, size)
        for name, both in factors(model).items():
            for parameter, grad in zip(both, grads[name], strict=True):
                parameter.grad = torch.from_numpy(grad.copy())
        before_step(step)
        theirs.step()
        tree = {name: LoRAPair(*(jnp.asarray(g.T) for g in both)) for name, both in grads.items()}
        updates, state = ours.update(tree, state, params)
        params = optax.apply_updates(params, updates)
    largest = lambda x, y: max(jnp.max(jnp.abs(u - v)).item() for u, v in zip(x, y, strict=True))
    ends = [jax.tree.leaves(tree) for tree in (params, pairs(model), start)]
    assert largest(ends[1], ends[2]) > 1e-3
    return largest(ends[0], ends[1]) / largest(ends[1], ends[2])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_plus_is_that_of_peft(weight_decay):
    """PEFT's LoRA+ by torch's AdamW, with weight decay and without: `lora_plus`."""
    model = adapted()
    theirs = of_peft.create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=RATE,
        loraplus_lr_ratio=8.0,
        loraplus_weight_decay=weight_decay,
        eps=1e-4,
    )
    ours = lora_plus(RATE, ratio=8.0, eps=1e-4, weight_decay=weight_decay)
    assert largest_difference(model, theirs, ours) < 1e-12


def riemannian(model, eps, weight_decay=0.0):
    return of_peft.create_riemannian_optimizer(
        model, torch.optim.AdamW, lr=RATE, reg=1e-2, eps=eps, weight_decay=weight_decay
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_scaled_adamw_is_the_riemannian_optimizer_of_peft(weight_decay):
    """PEFT's Riemannian optimizer around torch's AdamW: `scaled_adamw`, apart from ε."""
    model = adapted()
    ours = scaled_adamw(RATE, eps=TINY, damping=1e-2, weight_decay=weight_decay)
    assert largest_difference(model, riemannian(model, TINY, weight_decay), ours) < 1e-12


def test_the_riemannian_optimizer_corrects_the_moment_before_eps():
    """Where its ε is divided by √(1 − β₂ᵗ) in each step, PEFT's takes our steps again."""
    eps, model = 1e-2, adapted()
    ours = scaled_adamw(RATE, eps=eps, damping=1e-2)
    assert largest_difference(model, riemannian(model, eps), ours) > 1e-3
    model = adapted()
    theirs = riemannian(model, eps)

    def correct(step):
        theirs.param_groups[0]["eps"] = eps / np.sqrt(1 - 0.999 ** (step + 1))

    assert largest_difference(model, theirs, ours, before_step=correct) < 1e-12


def rite(model, **options):
    both = [factor for pair in factors(model).values() for factor in pair]
    options = {"eps": 1e-12, "clip_unmagnified_grad": 0.0, "update_skipping": 0.0, **options}
    return pytorch_optimizer.LoRARite(both, lr=RATE, **options)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_rite_is_that_of_pytorch_optimizer(weight_decay):
    """pytorch_optimizer's LoRA-RITE without clip and skipping: `lora_rite`."""
    model = adapted()
    ours = lora_rite(RATE, eps=1e-12, clip_unmagnified_grad=None, weight_decay=weight_decay)
    assert largest_difference(model, rite(model, weight_decay=weight_decay), ours) < 1e-12


def test_lora_rite_clips_each_pair_by_itself():
    """pytorch_optimizer's LoRA-RITE clips all pairs by one norm, ours each: equal on each alone."""
    clip = {"clip_unmagnified_grad": 1.0}
    ours = lora_rite(RATE, eps=1e-12, **clip)
    model = adapted()
    assert largest_difference(model, rite(model, **clip), ours) > 1e-3
    model = adapted()
    of_each = [
        pytorch_optimizer.LoRARite(
            pair, lr=RATE, eps=1e-12, clip_unmagnified_grad=1.0, update_skipping=0.0
        )
        for pair in factors(model).values()
    ]

    class Each:
        def step(self):
            for one in of_each:
                one.step()

    assert largest_difference(model, Each(), ours) < 1e-12


def test_lora_rite_takes_steps_from_large_gradients():
    """pytorch_optimizer's LoRA-RITE leaves large gradients out by `update_skipping`, ours not."""
    ours = lora_rite(RATE, eps=1e-12, clip_unmagnified_grad=None)
    for size, same in ((1e-3, True), (100.0, False)):
        model = adapted()
        theirs = rite(model, update_skipping=1.0)
        if same:
            assert largest_difference(model, theirs, ours, size=size) < 1e-12
            continue
        with pytest.raises(AssertionError):  # theirs does not move at all
            largest_difference(model, theirs, ours, size=size)


def test_lora_fa_is_that_of_peft():
    """PEFT's LoRA-FA, which freezes a and projects the gradient of b: `lora_fa`."""
    model = adapted()
    theirs = of_peft.create_lorafa_optimizer(model, RANK, ALPHA, RATE)
    settings = {"eps": 1e-6, "scale": ALPHA / RANK}
    ours = lowrank_optax.lora_fa(RATE, **settings)
    assert largest_difference(model, theirs, ours) < 1e-12
    model = adapted()
    theirs = of_peft.create_lorafa_optimizer(model, RANK, ALPHA, RATE, weight_decay=0.1)
    ours = lowrank_optax.lora_fa(RATE, **settings, weight_decay=0.1)
    assert 1e-5 < largest_difference(model, theirs, ours) < 1e-2
