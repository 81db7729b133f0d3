"""Scaling: what grows with the width of a decoder, with the rank and with the length of training.

    for WIDTH in 128 256 448; do python -m experiments pretrain --width $WIDTH --data-dir DATA; done
    python -m experiments run scaling --data-dir DATA --jobs 2

Decoders of three widths and four layers, of 1.3, 4.2 and 11.5 million parameters, are pretrained on
English books by the first command and adapted to Shakespeare by the second. Around the middle
(width 128, rank 8, 800 steps) one of width, rank and steps changes at a time. The scale stays 2,
and every sweep begins around the learning rate that the method's rule gives.

Cost: 16 minutes of pretraining at width 128; of runs 23 to 26 minutes a variant of 800 steps there,
53 beside other work at rank 128, 9 of 200 steps, 76 of 3,200 for four methods; on two CPU cores
with --jobs 2. Widths 256 and 448 did not run.
"""

from typing import Any

from experiments.rules import DECODERS, sweeps_by_rule
from experiments.schema import Plan
from experiments.study import Study


def _variant(width: int = 128, rank: int = 8, steps: int = 800) -> dict[str, Any]:
    methods = ("adamw", "lora-plus-4", "lora-plus", "adamw-start", "polora-start")
    return {
        "task_options.model": f"./build/decoders/w{width}",
        "task_options.width": width,
        "task_options.rank": rank,
        "task_options.alpha": 2.0 * rank,
        "plan.steps": steps,
        "plan.eval_every": steps // 20,
        "learning_rates": sweeps_by_rule(DECODERS[width], rank, methods),
    }


VARIANTS = {
    "middle": _variant(),
    "width-256": _variant(width=256),
    "width-448": _variant(width=448),
    "rank-2": _variant(rank=2),
    "rank-32": _variant(rank=32),
    "rank-128": _variant(rank=128),
    "steps-200": _variant(steps=200),
    "steps-3200": _variant(steps=3200),
}

STUDY = Study(
    task="shakespeare",
    task_options={"depth": 4, "batch_size": 8, "length": 64, "eval_limit": 128},
    plan=Plan(steps=800, eval_every=40, head_learning_rate=1e-3),
    learning_rates=VARIANTS["middle"]["learning_rates"],
    seeds=(0, 1, 2),
    variants=VARIANTS,
)

SMOKE = {
    "task_options.width": None,
    "task_options.depth": None,
    "task_options.rank": 2,  # of so few tokens the gradient has a low rank
    "plan.steps": 12,
    "plan.eval_every": 6,
    "task_options.batch_size": 2,
    "task_options.length": 8,
    "task_options.eval_limit": 4,
    "learning_rates": {"adamw": [3e-3], "polora-start": [0.1]},
    "seeds": [0],
}
