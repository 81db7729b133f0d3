"""CIFAR transfer: PatchMLP pretrained on five classes of CIFAR-10, adapted to the other five.

    python -m experiments run cifar-transfer --variant peers --data-dir ../shared/data --jobs 2

All weights are first trained on the classes 0-4 for 600 steps; then rank 16 adapters in the four
residual layers and a new classifier on the classes 5-9, for 200 steps of 32 images. Learning rates
are chosen on 1,000 training images that were split off, 2,000 test images are only reported.

Cost: `papers` as the study `cifar`, and 600 steps of pretraining: 41 minutes with --jobs 2; `peers`
an hour beside other work, `rank-32` half an hour, two methods left out. Expect PoLoRA ahead of
LoRA+, and LoRA+ ahead of AdamW: docs/results/cifar-transfer.md.
"""

from experiments.peers import others, peers
from experiments.studies import cifar

STUDY = cifar.STUDY.model_copy(
    update={
        "task": "cifar-transfer",
        "task_options": {**cifar.STUDY.task_options, "pretrain_steps": 600},
        "learning_rates": peers(adamw=1e-2, polora=0.3, count=3)
        | others(adamw=1e-2, polora=0.3, count=3),
        "variants": {
            "peers": {},
            "rank-32": {
                "task_options.rank": 32,
                "task_options.alpha": 64.0,
                "learning_rates": peers(adamw=3e-3, polora=0.3, count=3),
            },
            "papers": cifar.STUDY.variants["papers"],
        },
    }
)

SMOKE = cifar.SMOKE | {"task_options.pretrain_steps": 12}
