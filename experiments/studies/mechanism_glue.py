"""Mechanism on SST-2: what happens to gradients and steps when MiniLM-L6 is adapted.

    python -m experiments run mechanism-glue --data-dir ../shared/data --jobs 2

The task of the variant `papers-query-value` of `glue-sst2`, each method at the best learning rate
found there, three seeds, and every 20 steps the probes of the study `mechanism`.

Cost: 10 minutes on 2 CPU cores of 100 GFLOP/s each in single precision, with --jobs 2.
Expect what `mechanism` finds, docs/results/mechanism-glue.md.
"""

from experiments.studies import glue_sst2

STUDY = glue_sst2.STUDY.model_copy(
    update={
        "plan": glue_sst2.STUDY.plan.model_copy(update={"eval_every": 100, "probe_every": 20}),
        "learning_rates": {
            "adamw": (2e-3,),
            "altlora": (0.1,),
            "altlora-plus": (6e-3,),
            "oplora": (0.01,),
            "sds-lora": (6e-4,),
        },
        "variants": {},
    }
)

SMOKE = glue_sst2.SMOKE | {"plan.probe_every": 6, "learning_rates": {"adamw": [2e-3]}}
