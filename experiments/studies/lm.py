"""LM: stories260K, a real Llama pretrained on children's stories, adapted to Shakespeare.

    python -m experiments run lm --variant peers --data-dir ../shared/data --jobs 2

In place of the papers' Llama and Gemma models. Rank 8 in all seven linear maps, batches of 8
windows of 128 tokens, 150 steps; learning rates are chosen on 128 validation windows, as many test
windows are only reported (64 in `papers`). Loss in nats a token, of a vocabulary of 512.

Cost: `peers` an hour with --jobs 2 beside other work, `papers` 52 minutes, `rank-32` 45, `constant`
11, `long` an hour, `long-rank-32` 25, the attempts of the hunt 2 each, of `long-hunt` 12. Expect
PoLoRA and AdamW ahead with a start from the gradient in 150 steps and not in 1,500 at rank 8,
SDS-LoRA beside AdamW: docs/results/lm.md.
"""

from experiments.hunt import attempts
from experiments.peers import around, highlights, others, peers
from experiments.schema import Plan
from experiments.study import Study

LONG = {"plan.steps": 1500, "plan.eval_every": 50}

ADAM = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
STEP = (0.01, 0.03, 0.1, 0.3, 1.0)

PAPERS = {
    "adamw": ADAM,
    "altlora": STEP,
    "oplora": STEP,
    "sds-lora": ADAM,
    "altlora-plus": ADAM,
    "lora-plus": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "full-adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "sds-lora-no-warmup": ADAM,
    "preconditioned": STEP,
    "scaled-oplora": STEP,
    "oplora-2": STEP,
    "oplora-proj": STEP,
    "altlora-simultaneous": STEP,
    "altlora-sequential": STEP,
    "svd-lora": STEP,
}

STUDY = Study(
    task="lm",
    task_options={"eval_limit": 128},
    plan=Plan(steps=150, eval_every=6, head_learning_rate=1e-3),
    learning_rates=peers(adamw=1e-2, polora=0.1) | others(adamw=1e-2, polora=0.1),
    seeds=(0, 1, 2),
    variants={
        "peers": {},
        "rank-32": {
            "task_options.rank": 32,
            "task_options.alpha": 64.0,
            "learning_rates": peers(adamw=3e-3, polora=0.1),
        },
        "long": {
            **LONG,
            "learning_rates": highlights(adamw=3e-3, polora=0.1, count=3),
        },
        "long-rank-32": {
            **LONG,
            "task_options.rank": 32,
            "task_options.alpha": 64.0,
            "learning_rates": {"adamw": around(3e-3, 3), "polora-start": around(0.1, 3)},
        },
        "constant": {
            "plan.decay": "none",
            "learning_rates": highlights(adamw=3e-3, polora=0.03, count=3),
        },
        "papers": {
            "plan.eval_every": 30,
            "task_options.eval_limit": 64,
            "learning_rates": PAPERS,
        },
        **attempts(peers(adamw=1e-2, polora=0.1, count=3)),
        **attempts(
            highlights(adamw=3e-3, polora=0.1, count=3),
            LONG,
            named="long",
            names=("shorter-momentum", "longer-momentum", "larger-start"),
        ),
    },
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 6,
    "task_options.rank": 2,
    "task_options.batch_size": 2,
    "task_options.length": 16,
    "task_options.eval_limit": 4,
    "learning_rates": {"adamw": [1e-2], "altlora": [0.1], "sds-lora": [1e-2]},
    "seeds": [0],
}
