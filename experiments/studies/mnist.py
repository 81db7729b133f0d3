"""MNIST: LeNet-5 from a random start with rank 8 adapters in its linear layers (OPLoRA's setting).

    python -m experiments run mnist --variant peers --data-dir ../shared/data --jobs 2

Kernels of the linear layers stay random and adapters learn beside them; convolutions and biases are
trained by AdamW at 1e-3 in every method. 200 steps of 64 images; learning rates are chosen on 1,000
training images that were split off, and 2,000 test images are only reported.

Cost: `peers` 6 minutes with --jobs 2; `papers` 45 minutes on slower cores. Expect full fine-tuning
ahead of LoRA with AdamW, SDS-LoRA and SVDLoRA, between which there is no difference, and these
ahead of the others.
"""

from experiments.hunt import attempts
from experiments.peers import peers
from experiments.schema import Plan
from experiments.study import Study

ADAM = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
STEP = (0.01, 0.03, 0.1, 0.3, 1.0)

PAPERS = {
    "adamw": ADAM,
    "lora-plus": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "full-adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "svd-lora": STEP,
    "altlora": STEP,
    "altlora-plus": ADAM,
    "preconditioned": STEP,
    "oplora": STEP,
    "oplora-2": STEP,
    "oplora-proj": STEP,
    "scaled-oplora": STEP,
    "sds-lora": ADAM,
    "sds-lora-no-warmup": ADAM,
}

STUDY = Study(
    task="mnist",
    task_options={"validation_size": 1000, "test_limit": 2000},
    plan=Plan(steps=200, eval_every=10, head_learning_rate=1e-3),
    learning_rates=peers(adamw=3e-2, polora=1.0),
    seeds=(0, 1, 2, 3, 4),
    variants={
        "peers": {},
        "papers": {"plan.eval_every": 25, "seeds": (0, 1, 2), "learning_rates": PAPERS},
        **attempts(peers(adamw=3e-2, polora=1.0, count=3)),
    },
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 6,
    "task_options.batch_size": 8,
    "learning_rates": {"adamw": [1e-2], "full-adamw": [1e-3], "oplora": [0.1]},
    "seeds": [0],
}
