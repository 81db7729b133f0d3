"""CIFAR back: PatchMLP pretrained on the classes 5-9, adapted to 0-4. No default was chosen on it.

    python -m experiments run cifar-back --data-dir ../shared/data --jobs 2

The study `cifar-transfer` with the classes exchanged. Every sweep begins around the learning rate
that the method's rule gives: docs/results/rates.md.

Cost: 11 minutes on two CPU cores with --jobs 2. Expect PoLoRA far ahead at the rate of its rule:
docs/results/cifar-back.md.
"""

from experiments.peers import around
from experiments.rules import ADAPTED, sweeps_by_rule
from experiments.studies import cifar_transfer

STUDY = cifar_transfer.STUDY.model_copy(
    update={
        "task": "cifar-back",
        "learning_rates": {
            **sweeps_by_rule(ADAPTED["cifar-back", r"layers/\d"], 16),
            "full-adamw": around(1e-3, 3),
        },
        "variants": {},
    }
)

SMOKE = cifar_transfer.SMOKE
