"""CIFAR transfer: PatchMLP pretrained on five classes of CIFAR-10, adapted to the other five.

    python -m experiments run cifar-transfer --data-dir ../shared/data

All weights are first trained on the classes 0-4 for 600 steps; then rank 16 adapters in the four
residual layers and a new classifier on the classes 5-9, for 200 steps of 32 images. Learning rates
are chosen on 1,000 training images that were split off, 2,000 test images are only reported.

Cost: as the study `cifar`, and 600 steps of pretraining; not measured in full.
"""

from experiments.schema import Plan
from experiments.study import Study

ADAM = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
STEP = (0.01, 0.03, 0.1, 0.3, 1.0)

STUDY = Study(
    task="cifar-transfer",
    task_options={
        "train_limit": 11_000,
        "validation_size": 1000,
        "test_limit": 2000,
        "batch_size": 32,
        "pretrain_steps": 600,
    },
    plan=Plan(steps=200, eval_every=50, head_learning_rate=1e-3),
    learning_rates={
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
    },
    seeds=(0, 1, 2),
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 6,
    "task_options.width": 16,
    "task_options.depth": 1,
    "task_options.rank": 2,
    "task_options.batch_size": 4,
    "task_options.pretrain_steps": 12,
    "learning_rates": {"adamw": [1e-2], "altlora": [0.1], "oplora": [0.1]},
    "seeds": [0],
}
