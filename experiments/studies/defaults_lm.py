"""Defaults, again: the options that mattered in the study `defaults`, on stories260K.

    python -m experiments run defaults-lm --data-dir ../shared/data --jobs 2

The task and the plan of the study `lm`, which has the same methods with the options of the aliases.
"""

from experiments.studies import defaults, lm

STUDY = lm.STUDY.model_copy(
    update={
        "learning_rates": {
            method: lm.STUDY.learning_rates[method]
            for method in ("adamw", "altlora", "altlora-plus", "oplora")
        },
        "variants": {
            name: defaults.STUDY.variants[name] for name in ("more-damping", "no-momentum")
        },
    }
)

SMOKE = lm.SMOKE | {"learning_rates": {"adamw": [1e-2], "altlora-plus": [1e-2]}}
