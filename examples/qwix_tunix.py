"""Adapts tunix's Llama 3 by qwix, trains it in tunix's `PeftTrainer`, and saves it for PEFT.

The model is tunix's own class at a size that a CPU trains in seconds, with random weights; the task
is to count. For a real model take tunix's loader of weights and batches of your own. The adapter is
saved under Hugging Face's names, as PEFT reads it::

    python -m examples.qwix_tunix --out outputs/llama-adapter

It needs ``pip install qwix google-tunix '.[cli]'`` in a checkout.
"""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from rich.progress import track

from lowrank_optax import adapters, describe, polora

TARGETS = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
VOCABULARY, LENGTH, BATCH = 32, 16, 16
POSITIONS = (np.arange(LENGTH)[None], None, np.tri(LENGTH, dtype=bool)[None])  # no cache; causal
OUT = pathlib.Path("outputs/qwix_tunix")


def batches(steps: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Draws sequences that count by ones, from any number; shows how far training is."""
    rng = np.random.default_rng(seed)
    for _ in track(range(steps), "training"):
        starts = rng.integers(0, VOCABULARY, (BATCH, 1))
        yield {"tokens": (starts + np.arange(LENGTH)) % VOCABULARY}


def loss_fn(model: Any, tokens: Any) -> jax.Array:
    """Mean cross-entropy of the next token."""
    logits, _ = model(tokens, *POSITIONS)
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(logits[:, :-1].astype(jnp.float32), tokens[:, 1:]).mean()


def main(
    steps: Annotated[int, typer.Option(help="Updates.")] = 300,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak; bounds an update's norm.")] = 0.1,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the adapter.")] = OUT,
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is there.")] = False,
) -> tuple[float, float]:
    """Adapts a small Llama 3, and saves the adapter under Hugging Face's names."""
    if out.exists() and not (overwrite and (out / "adapter_config.json").exists()):
        raise typer.BadParameter(f"{out} exists. --overwrite replaces it if it is an adapter.")
    try:
        import qwix
        from tunix.models.llama3 import model as llama
        from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

        from lowrank_optax.integrations.qwix import scales_of
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: pip install qwix google-tunix")
        raise typer.Exit(1) from error

    # tunix's model. For Llama 3.2 take `ModelConfig.llama3p2_1b()` and tunix's loader of weights.
    sizes = {"num_layers": 2, "vocab_size": VOCABULARY, "embed_dim": 64, "hidden_dim": 128}
    sizes |= {"num_heads": 4, "head_dim": 16, "num_kv_heads": 2}
    config = llama.ModelConfig(**sizes, rope_theta=10_000, norm_eps=1e-5)
    model = llama.Llama3(config, rngs=nnx.Rngs(0))

    # qwix puts adapters where a rule matches, and `scales_of` reads their scales from the rules.
    provider = qwix.LoraProvider(module_path=TARGETS, rank=rank, alpha=2.0 * rank)
    test = (np.arange(VOCABULARY)[:, None] + np.arange(LENGTH)) % VOCABULARY
    model = qwix.apply_lora_to_model(model, provider, test, *POSITIONS, rngs=nnx.Rngs(1))
    scale = scales_of(provider)
    print(describe(nnx.state(model, nnx.LoRAParam), scale=scale))

    # tunix's trainer takes the optimizer as it takes any of optax, and trains the adapters alone.
    before = float(loss_fn(model, test))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    settings = TrainingConfig(eval_every_n_steps=steps + 1, max_steps=steps)
    trainer = PeftTrainer(model, polora(schedule, scale=scale), settings)
    trainer = trainer.with_loss_fn(loss_fn).with_gen_model_input_fn(lambda batch: batch)
    trainer.train(batches(steps, seed=1))
    after = float(loss_fn(model, test))
    print(f"loss: {before:.3f} before, {after:.3f} after")

    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    names = adapters.name_maps.TUNIX_LLAMA3
    adapters.save_peft(out, nnx.state(model, nnx.LoRAParam), scale=scale, names=names)
    print(f"The adapter is in {out}. Next: in torch PeftModel.from_pretrained(base, ...) reads it,")
    print("and `python -m lowrank_optax inspect` looks into it.")
    return before, after


if __name__ == "__main__":
    typer.run(main)
