"""Mechanism: what happens to gradients and steps on stories260K, the figures of the SDS-LoRA paper.

    python -m experiments run mechanism --data-dir ../shared/data --jobs 2

The `lm` study's task and plan, each method at the best learning rate that study found, three seeds.
Every 10 steps the full gradient of every adapted kernel is formed beside the training: effective
rank of the factors' gradients, cosine of the full gradient with what a step along them does to ΔK,
and with what the optimizer did.

Cost: 11 minutes on 2 CPU cores with --jobs 2.
"""

from experiments.studies import lm

STUDY = lm.STUDY.model_copy(
    update={
        "task_options": {"eval_limit": 64},
        "plan": lm.STUDY.plan.model_copy(update={"eval_every": 30, "probe_every": 10}),
        "learning_rates": {
            "adamw": (1e-2,),
            "altlora": (0.1,),
            "altlora-simultaneous": (0.3,),
            "altlora-plus": (3e-3,),
            "oplora": (0.03,),
            "sds-lora": (1e-3,),
            "sds-lora-no-warmup": (1e-3,),
        },
        "variants": {},
    }
)

SMOKE = lm.SMOKE | {
    "plan.probe_every": 6,
    "learning_rates": {"adamw": [1e-2], "oplora": [0.1], "sds-lora": [1e-2]},
}
