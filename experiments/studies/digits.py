"""Digits: adapt a small ViT from the digits 0-4 to 5-9.

    python -m experiments demo            # four methods of `peers` (`make demo`)
    python -m experiments run digits --variant peers --jobs 2

The variant `peers` compares 24 methods with ten seeds, `papers` AdamW with AltLoRA and AltLoRA+ in
the alternating order with three. No download: the images come with scikit-learn. Learning rates are
chosen on the validation split, which is small, so by the mean of three seeds; the test is only
reported.

Cost with --jobs 2, half the sum of the runs: `peers` 22 minutes, `constant` 5, `papers` 2, the
attempts of the hunt 1 each. Expect PoLoRA ahead of AdamW, full fine-tuning ahead of both, and
AltLoRA behind: docs/results/digits.md.
"""

from experiments.hunt import attempts
from experiments.peers import highlights, others, peers
from experiments.schema import Plan
from experiments.study import Study

PAPERS = {
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "altlora": (0.01, 0.03, 0.1, 0.3, 1.0),
    "altlora-plus": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}

STUDY = Study(
    task="digits",
    plan=Plan(steps=150, eval_every=5, head_learning_rate=3e-3),
    learning_rates=peers(adamw=1e-2, polora=0.3) | others(adamw=1e-2, polora=0.3),
    seeds=tuple(range(10)),  # its validation split is small
    sweep_seeds=3,
    variants={
        "peers": {},
        "constant": {
            "plan.decay": "none",
            "learning_rates": highlights(adamw=3e-3, polora=0.1, count=3),
        },
        "papers": {"plan.eval_every": 15, "seeds": (0, 1, 2), "learning_rates": PAPERS},
        **attempts(peers(adamw=1e-2, polora=0.3, count=3)),
    },
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 6,
    "task_options.depth": 1,
    "task_options.targets": "query|value",
    "task_options.pretrain_steps": 20,
    "learning_rates": {
        "adamw": [3e-3],
        "polora-start": [0.1],
        "altlora-plus-simultaneous": [1e-2],
        "sds-lora": [1e-3],
    },
    "seeds": [0],
}
