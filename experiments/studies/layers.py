"""Layers: how the best learning rate falls with the number of adapted layers, on stories260K.

    python -m experiments run layers --data-dir ../shared/data --jobs 2

The `lm` study's task and steps, with adapters in one, two or all five blocks of the decoder. The
layers of all blocks have the same sizes, so that nothing but their number changes. One seed: what
is looked for is the best rate.

Cost: 8 minutes on two CPU cores with --jobs 2. Expect best rates about three times lower with five
times as many layers: docs/results/layers.md.
"""

from typing import Any

from experiments.studies import lm

LAYERS = {
    7: r"layers/2/(attention|mlp)/.*",
    14: r"layers/[13]/(attention|mlp)/.*",
    35: "query|key|value|out|gate|up|down",
}
"""Targets by the number of layers that they adapt."""


def _variant(number: int) -> dict[str, Any]:
    return {"task_options.targets": LAYERS[number]}


STUDY = lm.STUDY.model_copy(
    update={
        "task_options": {"eval_limit": 64},
        "plan": lm.STUDY.plan.model_copy(update={"eval_every": 30}),
        "learning_rates": {
            "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
            "polora": (0.03, 0.1, 0.3, 1.0),
            "sds-lora": (3e-4, 1e-3, 3e-3, 1e-2),
            "oplora": (0.01, 0.03, 0.1, 0.3),
        },
        "seeds": (0,),
        "variants": {f"layers-{number}": _variant(number) for number in LAYERS},
        "variant_axis": "number of adapted layers",
    }
)

SMOKE = lm.SMOKE | {
    "task_options.targets": "query|value",
    "learning_rates": {"adamw": [1e-2], "polora": [0.1]},
}
