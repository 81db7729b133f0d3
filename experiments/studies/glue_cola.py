"""GLUE CoLA: MiniLM-L6 in place of RoBERTa-base, adapters in all linear maps.

    python -m experiments run glue-cola --data-dir ../shared/data --jobs 2
    python -m experiments run glue-cola --method adamw --learning-rate 6e-4 --steps 600

Rank 8, a new linear head by AdamW at 2e-3 in every method, 360 steps of 16 sentences cut at 24
tokens. "Validation" is the in-domain dev set, on which learning rates are chosen; the out-of-domain
dev set is only reported, as "test". CoLA's score is Matthews' correlation.

With adapters in query and value alone LoRA with AdamW does not leave the loss of the classes'
frequencies (0.61) in 600 steps, so this study adapts all linear maps, as `glue-sst2` does query and
value. AltLoRA moves both factors in every step, as the guide advises.

Cost: 240 s a run on one of 2 CPU cores, an hour in all with --jobs 2. Expect SDS-LoRA beside AdamW,
a little below the loss of the classes' frequencies, and the others at it: 360 steps are too few to
learn CoLA, docs/results/glue-cola.md.
"""

from experiments.studies import glue_sst2

ADAM = (6e-5, 2e-4, 6e-4, 2e-3, 6e-3)

STUDY = glue_sst2.STUDY.model_copy(
    update={
        "task": "cola",
        "task_options": {
            "max_length": 24,
            "batch_size": 16,
            "targets": "query|key|value|out|mlp_in|mlp_out",
        },
        "plan": glue_sst2.STUDY.plan.model_copy(update={"steps": 360, "eval_every": 180}),
        "learning_rates": {
            "adamw": ADAM,
            "sds-lora": ADAM,
            "altlora-simultaneous": (0.01, 0.03, 0.1, 0.3, 1.0),
            "oplora": (1e-3, 3e-3, 1e-2, 3e-2, 0.1),
        },
        "extensions": 2,
        "variants": {},
    }
)

SMOKE = glue_sst2.SMOKE | {"learning_rates": {"adamw": [2e-3]}}
