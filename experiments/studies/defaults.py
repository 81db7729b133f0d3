"""Defaults: what AltLoRA, AltLoRA+, OPLoRA and SDS-LoRA gain or lose by other options, on digits.

    python -m experiments run defaults --jobs 2

The task and the plan of the study `digits`. The variant `as-is` has the options of the aliases, and
AltLoRA and AltLoRA+ in their three orders; each other variant changes one kind of option, and every
method is swept again with it, by one seed.

Cost: 7 minutes with --jobs 2 on two CPU cores of 100 GFLOP/s each in single precision. Expect the
order to matter most, and momentum to hurt the alternating one: docs/results/defaults.md.
"""

from experiments.studies import digits

ADAM = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STEP = (0.01, 0.03, 0.1, 0.3, 1.0)
ALTLORA = {"altlora": STEP, "altlora-plus": ADAM}
SIMULTANEOUS = {"altlora-simultaneous": STEP, "altlora-plus-simultaneous": ADAM}
OPLORA = {"oplora": STEP}
SDS_LORA = {"sds-lora": ADAM}

STUDY = digits.STUDY.model_copy(
    update={
        "plan": digits.STUDY.plan.model_copy(update={"eval_every": 15}),
        "seeds": (0, 1, 2),
        "sweep_seeds": 1,
        "learning_rates": {
            "adamw": ADAM,
            **ALTLORA,
            **SIMULTANEOUS,
            "altlora-sequential": STEP,
            "altlora-plus-sequential": ADAM,
            **OPLORA,
            **SDS_LORA,
        },
        "variants": {
            "as-is": {},
            "less-damping": {
                "learning_rates": {**ALTLORA, **OPLORA},
                "method_options.altlora": {"damping": 1e-9},
                "method_options.altlora-plus": {"damping": 1e-9},
                "method_options.oplora": {"lmbd": 1e-4},
            },
            "more-damping": {
                "learning_rates": {**ALTLORA, **OPLORA},
                "method_options.altlora": {"damping": 1e-3},
                "method_options.altlora-plus": {"damping": 1e-3},
                "method_options.oplora": {"lmbd": 1.0},
            },
            "no-momentum": {
                "learning_rates": {**ALTLORA, **OPLORA},
                "method_options.altlora": {"b1": 0.0},
                "method_options.altlora-plus": {"b1": 0.0},
                "method_options.oplora": {"momentum": 0.0},
            },
            "long-momentum": {
                "learning_rates": {**ALTLORA, **OPLORA},
                "method_options.altlora": {"b1": 0.97},
                "method_options.altlora-plus": {"b1": 0.97},
                "method_options.oplora": {"momentum": 0.97},
            },
            "more-damping-simultaneous": {
                "learning_rates": SIMULTANEOUS,
                "method_options.altlora-simultaneous": {"damping": 1e-3},
                "method_options.altlora-plus-simultaneous": {"damping": 1e-3},
            },
            "no-momentum-simultaneous": {
                "learning_rates": SIMULTANEOUS,
                "method_options.altlora-simultaneous": {"b1": 0.0},
                "method_options.altlora-plus-simultaneous": {"b1": 0.0},
            },
            "short-second-moment": {
                "learning_rates": {"altlora-plus": ADAM},
                "method_options.altlora-plus": {"b2": 0.99},
            },
            "one-phase": {
                "learning_rates": SDS_LORA,
                "method_options.sds-lora": {"phases": 1},
            },
            "twenty-phases": {
                "learning_rates": SDS_LORA,
                "method_options.sds-lora": {"phases": 20},
            },
        },
    }
)

SMOKE = digits.SMOKE | {"learning_rates": {"adamw": [1e-2], "altlora-plus": [1e-2]}}
