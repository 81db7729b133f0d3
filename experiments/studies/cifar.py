"""CIFAR: PatchMLP from a random start with rank 16 adapters, on CIFAR-10 in place of CIFAR-100.

    python -m experiments run cifar --variant papers --data-dir ../shared/data --jobs 2

The network of the OPLoRA paper (32x32, patches of 4, width 256, depth 4) on CIFAR-10 as JPEG.
Kernels of the four residual layers stay random and adapters learn beside them; the rest is trained
by AdamW at 1e-3 in every method. 200 steps of 32 of 10,000 images; 1,000 further ones choose the
learning rates, 2,000 test images are only reported.

Cost: 50 s a run on one of 2 CPU cores; `peers` 35 minutes with --jobs 2, `papers` half an hour.
Expect PoLoRA ahead of LoRA+, and LoRA+ ahead of full fine-tuning: docs/results/cifar.md.
"""

from experiments.peers import peers
from experiments.schema import Plan
from experiments.study import Study

ADAM = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
STEP = (0.01, 0.03, 0.1, 0.3, 1.0)

PAPERS = {
    "adamw": ADAM,
    "lora-plus": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "full-adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "altlora": STEP,
    "altlora-plus": ADAM,
    "preconditioned": STEP,
    "oplora": STEP,
    "scaled-oplora": STEP,
    "sds-lora": ADAM,
    "sds-lora-no-warmup": ADAM,
}

STUDY = Study(
    task="cifar",
    task_options={
        "train_limit": 11_000,
        "validation_size": 1000,
        "test_limit": 2000,
        "batch_size": 32,
    },
    plan=Plan(steps=200, eval_every=10, head_learning_rate=1e-3),
    learning_rates=peers(adamw=3e-3, polora=0.3, count=3),
    seeds=(0, 1, 2),
    variants={
        "peers": {},
        "papers": {"plan.eval_every": 50, "learning_rates": PAPERS},
    },
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 6,
    "task_options.width": 16,
    "task_options.depth": 1,
    "task_options.rank": 2,
    "task_options.batch_size": 4,
    "learning_rates": {"adamw": [1e-2], "altlora": [0.1], "oplora": [0.1]},
    "seeds": [0],
}
