"""GLUE CoLA: MiniLM-L6 in place of RoBERTa-base, adapters in all linear maps.

    python -m experiments run glue-cola --variant peers --data-dir ../shared/data --jobs 2

Rank 8, a new linear head by AdamW at 2e-3 in every method, 800 steps of 16 sentences cut at 24
tokens, an epoch and a half. "Validation" is the in-domain dev set, on which learning rates are
chosen; the out-of-domain dev set is only reported, as "test". The score is Matthews' correlation.

With adapters in query and value alone LoRA with AdamW does not leave the loss of the classes'
frequencies (0.61) in 600 steps, so this study adapts all linear maps, as `glue-sst2` does query and
value. AltLoRA+ moves both factors in every step, as the guide advises.

Cost: `peers` 2.2 minutes a run with --jobs 2 on two CPU cores (AMD EPYC), 77 runs; `papers` 80
minutes on two of 100 GFLOP/s each in single precision. Expect PoLoRA with the start ahead of
AdamW, and of the papers' methods no difference from it out of the domain:
docs/results/glue-cola.md.
"""

from experiments.peers import peers
from experiments.studies import glue_sst2

PAPERS = {
    "adamw": (6e-5, 2e-4, 6e-4, 2e-3, 6e-3),
    "sds-lora": (6e-6, 2e-5, 6e-5, 2e-4, 6e-4),
    "altlora-plus-simultaneous": (6e-5, 2e-4, 6e-4, 2e-3, 6e-3),
    "oplora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "lora-plus": (2e-5, 6e-5, 2e-4, 6e-4, 2e-3),
    "full-adamw": (6e-6, 2e-5, 6e-5, 2e-4, 6e-4),
}

STUDY = glue_sst2.STUDY.model_copy(
    update={
        "task": "cola",
        "task_options": {
            "max_length": 24,
            "batch_size": 16,
            "targets": glue_sst2.ALL_LINEAR,
        },
        "plan": glue_sst2.STUDY.plan.model_copy(update={"steps": 800, "eval_every": 40}),
        "learning_rates": peers(adamw=1e-3, polora=0.03, count=3),
        "variants": {
            "peers": {},
            "papers": {"plan.eval_every": 200, "extensions": 2, "learning_rates": PAPERS},
        },
    }
)

SMOKE = glue_sst2.SMOKE | {"learning_rates": {"adamw": [2e-3]}}
