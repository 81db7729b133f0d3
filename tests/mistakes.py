"""Mistakes that users make, as code; `python -m tests.mistakes` writes what each of them says.

The page docs/errors.md shows the first line of every message, so that people read them. A test
compares the page with what the code says now.
"""

import warnings
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"

SETUP = """
import jax, jax.numpy as jnp, optax
from flax import linen, nnx
from lowrank_optax import *
from lowrank_optax import adapters, nn
pair = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 5)))
params = {"q": pair}
rank_one = LoRAPair(pair.a[:, :1], pair.b[:1])
key = jax.random.key(0)
config = nn.LoRAConfig(rank=2)
class Model(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(6, 5, rngs=nnx.Rngs(1))
    def __call__(self, x):
        return self.down(self.up(x))
model = Model()
adapted = Model()
nn.add_lora(adapted, "up", config, rngs=nnx.Rngs(2))
other = nnx.Dict(
    grouped=nnx.Conv(4, 8, (3,), feature_group_count=2, rngs=nnx.Rngs(0)),
    embed=nnx.Embed(9, 6, rngs=nnx.Rngs(0)),
    zeros=nnx.Linear(6, 5, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)),
)
loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
dense = linen.Dense(5)
"""

MISTAKES = {
    "Adapters": [
        "nn.LoRAConfig(rank=4.0)",
        'nn.LoRAConfig(rank="8")',
        "nn.LoRAConfig(rank=0)",
        'nn.LoRAConfig(rank=4, alpha="16")',
        "nn.LoRAConfig(rank=4, alpha=0)",
        "nn.LoRAConfig(rank=4, dropout=1.0)",
        "nn.LoRAConfig(rank=4, shadows=True)",
        "nn.LoRAConfig(rank=4, extra=True)",
        "nn.LoRAConfig(rank=4, extra=nn.Shadows)",
        "nn.Shadows(iterations=1.0)",
        "nn.Shadows(metric=True)",
        'nn.add_lora(model, "up", 8, rngs=nnx.Rngs(0))',
        'nn.add_lora(model, "up", config, rngs=0)',
        'nn.add_lora(model, "*up", config, rngs=nnx.Rngs(0))',
        'nn.add_lora(model, "query", config, rngs=nnx.Rngs(0))',
        "nn.add_lora(model, None, config, rngs=nnx.Rngs(0))",
        "nn.add_lora(model, [], config, rngs=nnx.Rngs(0))",
        'nn.add_lora(adapted, "up", config, rngs=nnx.Rngs(0))',
        'nn.add_lora(model, "up", nn.LoRAConfig(rank=7), rngs=nnx.Rngs(0))',
        'nn.add_lora(other, "grouped", config, rngs=nnx.Rngs(0))',
        'nn.add_lora(other, "embed", nn.LoRAConfig(rank=2, dropout=0.1), rngs=nnx.Rngs(0))',
        'nn.add_lora(other, "embed", nn.LoRAConfig(rank=2, extra=nn.Shadows()), rngs=nnx.Rngs(0))',
        'nn.add_lora(other, "embed", nn.LoRAConfig(rank=2, dora=True), rngs=nnx.Rngs(0))',
        'nn.add_lora(other, "zeros", nn.LoRAConfig(rank=2, dora=True), rngs=nnx.Rngs(0))',
        "nn.merge_lora(model)",
        "nn.gradient_start(model, loss_fn, [jnp.ones((2, 6))])",
        "nn.gradient_start(adapted, loss_fn, [])",
        "nn.gradient_start(adapted, loss_fn, jnp.ones((2, 6)))",
        "nn.gradient_start(adapted, lambda model, x: 0.0 * loss_fn(model, x), [jnp.ones((2, 6))])",
        "nn.gradient_start(adapted, loss_fn, [jnp.ones((2, 6))], gamma=0)",
        'nn.gradient_start(adapted, loss_fn, [jnp.ones((2, 6))], method="pissa")',
        "nn.weight_start(model)",
        'nn.weight_start(adapted, "svd")',
        "adapted.up.kernel[...] = jnp.ones((6, 6)); nn.weight_start(adapted)",
        "nn.weight_start(adapted); nn.remove_lora(adapted)",
        'nn.weight_start(adapted); adapters.save_peft("folder", adapted)',
        "nn.split_kernel(jnp.ones((6, 5)), 6)",
        'with nn.lora_interceptor("query", config): dense.init(key, jnp.ones((1, 4)))',
        "frame(LoRAPair(jnp.ones((2, 4)), jnp.ones((4, 3))), key)",
        "shadow(pair, key, momentum_rank=9)",
    ],
    "Pairs": [
        'find_pairs({"q": {"lora_a": jnp.ones((6, 2))}})',
        'find_pairs({"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((3, 5))}})',
        'find_pairs({"q": {"lora_a": jnp.ones((6, 7)), "lora_b": jnp.ones((7, 9))}})',
        'find_pairs({"q": {"lora_a": jnp.ones((6, 2), int), "lora_b": jnp.ones((2, 5), int)}})',
        'find_pairs({"q": {"lora_A_w": jnp.ones((2, 6)), "lora_B_w": jnp.ones((5, 2))}})',
        'find_pairs(params, PairSpec("down", "up"))',
        'find_pairs(params, ["lora_a"])',
        'find_pairs({"q": {"d": jnp.ones((2, 6)), "u": jnp.ones((4, 2))}}, [PairSpec("d", "u")])',
        'altlora(0.1).init({"w": jnp.ones(3)})',
        "nnx.Optimizer(model, altlora(0.1), wrt=nnx.LoRAParam)",
    ],
    "Hyperparameters": [
        "altlora(None)",
        'altlora("1e-3")',
        "altlora(-1e-3)",
        "altlora(1e-3, 1.0)",
        "altlora(1e-3, 0.9, 0.99)",
        "altlora(1e-3, damping=0.0)",
        "altlora(1e-3, weight_decay=-0.1)",
        'altlora(1e-3, order="both")',
        "altlora(1e-3, switch_every=3)",
        "lora_plus(1e-3, ratio=0)",
        "polora(0.1, delta=0)",
        'polora(0.1, partner="none")',
        "oplora(0.1, iterations=1.0)",
        "sds_lora(0.1, total_steps=10)",
        "sds_lora(0.1)",
    ],
    "Scales and masks": [
        'altlora(0.1, scale="2").update(params, altlora(0.1).init(params), params)',
        "altlora(0.1, scale=None).update(params, altlora(0.1).init(params), params)",
        "altlora(0.1, scale=0).update(params, altlora(0.1).init(params), params)",
        'altlora(0.1, scale={"k": 2.0}).update(params, altlora(0.1).init(params), params)',
        "altlora(0.1, scale={}).update(params, altlora(0.1).init(params), params)",
        'altlora(0.1, weight_decay=0.1, mask={"k": True}).init(params)',
    ],
    "Kinds of pairs": [
        "oplora(0.1).init(params)",
        "sds_lora(0.1, total_steps=20).init(params)",
        'altlora(0.1).init({"q": frame(pair)})',
        'altlora(0.1).init({"q": shadow(pair, key)})',
        'sds_lora(altlora(0.1), total_steps=20).init({"q": frame(pair)})',
        'sds_lora(0.1, total_steps=20, warmup_steps=0).init({"q": frame(pair)})',
        'sds_lora(0.1, total_steps=20).init({"q": frame(pair, key)})',
    ],
    "States and gradients": [
        "altlora(0.1).update(params, altlora(0.1).init(params))",
        "altlora_plus(0.1).update(params, altlora(0.1).init(params), params)",
        "altlora(0.1).update(params, optax.adamw(0.1).init(params), params)",
        "altlora(0.1).update(params, altlora(0.1).init(params)._asdict(), params)",
        'altlora(0.1).update(params, altlora(0.1).init({"q": rank_one}), params)',
        'altlora(0.1).update({"k": pair}, altlora(0.1).init(params), params)',
        'altlora(0.1).update({"q": LoRAPair(None, pair.b)}, altlora(0.1).init(params), params)',
        "skipped(optax.adamw(0.1).init(params))",
    ],
}


def message_of(code: str) -> str:
    """Returns the first line of what a mistake says: its error, or else its warning."""
    scope: dict = {}
    exec(SETUP, scope)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            exec(code, scope)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"Warning: {given[0].message}" if given else "nothing"


def page() -> str:
    """Writes the page."""
    parts = [
        "# What mistakes say\n",
        "The first line of the message of each mistake, written by `python -m tests.mistakes`.\n",
    ]
    for title, codes in MISTAKES.items():
        rows = [f"| `{code}` | {message_of(code)} |" for code in codes]
        parts.append(
            "\n".join([f"## {title}\n", "| mistake | message |", "|---|---|", *rows]) + "\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
