"""Defaults, again: the options that mattered in the study `defaults`, on stories260K.

    python -m experiments run defaults-lm --data-dir ../shared/data --jobs 2

The task and the plan of the study `lm`, which has most of the methods with the options of the
aliases; those it lacks are the variant `as-is`.

Cost: 16 minutes on such cores as `defaults` names. Expect the same: docs/results/defaults.md.
"""

from experiments.studies import defaults, lm

ADAM = lm.ADAM
SHARED = (
    "more-damping",
    "no-momentum",
    "more-damping-simultaneous",
    "no-momentum-simultaneous",
)

STUDY = lm.STUDY.model_copy(
    update={
        "task_options": {"eval_limit": 64},
        "plan": lm.STUDY.plan.model_copy(update={"eval_every": 30}),
        "learning_rates": defaults.STUDY.learning_rates,
        "variants": {
            "as-is": {
                "learning_rates": {
                    "adamw": ADAM,
                    "altlora-plus-simultaneous": ADAM,
                    "altlora-plus-sequential": ADAM,
                },
            },
            **{name: defaults.STUDY.variants[name] for name in SHARED},
        },
    }
)

SMOKE = lm.SMOKE | {"learning_rates": {"adamw": [1e-2], "altlora-plus": [1e-2]}}
