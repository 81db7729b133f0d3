"""Mechanism of PoLoRA: its steps beside AdamW's on stories260K, with and without the start.

    python -m experiments run mechanism-polora --data-dir ../shared/data --jobs 2

The `lm` study's task and plan, each method at the best learning rate of its variant `peers`, three
seeds. Every 10 steps the full gradient of every adapted kernel is formed beside the training: how
well the step of ΔK points along it, the effective ranks of the step and of ΔK, and the step's
length in the spectral norm.

Cost: 4 minutes on two CPU cores with --jobs 2. Expect PoLoRA's steps shorter than AdamW's and
nearer to the full gradient: docs/results/mechanism-polora.md.
"""

from experiments.studies import lm, mechanism

STUDY = mechanism.STUDY.model_copy(
    update={
        "learning_rates": {
            "adamw": (1e-2,),
            "adamw-start": (1e-2,),
            "polora": (0.1,),
            "polora-start": (0.1,),
            "altlora-plus-simultaneous": (3e-3,),
        },
    }
)

SMOKE = lm.SMOKE | {
    "plan.probe_every": 6,
    "learning_rates": {"adamw": [1e-2], "polora": [0.1]},
}
