"""Conditioning: a perfectly conditioned matrix in ever worse factors, the theory of the papers.

    python -m experiments run conditioning

Gradient methods without momentum on ½‖ΔK - T‖², 300 steps at a constant rate, from factors of
condition number κ = 1 to 1000 whose product is perfectly conditioned. "Loss" is relative to the
start. `benchmarks/conditioning.py` measures rates of convergence on the same problem in float64.

Cost: 307 runs, 1.5 minutes on 2 CPU cores. What to expect: gradient descent and AdamW on the
factors get slower with κ; AltLoRA, OPLoRA and preconditioned LoRA do not; SDS-LoRA does, by its
warm-up, which is ordinary LoRA.
"""

from experiments.schema import Plan
from experiments.study import Study

STEP = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)

STUDY = Study(
    task="conditioning",
    plan=Plan(steps=300, eval_every=15, warmup_fraction=0.0, decay="none", head_learning_rate=1e-3),
    learning_rates={
        "adamw": ADAM,
        "lora-plus": ADAM,
        "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 0.1),
        "svd-lora": STEP,
        "altlora": STEP,
        "altlora-sequential": STEP,
        "preconditioned": STEP,
        "oplora": STEP,
        "oplora-proj": STEP,
        "sds-lora-sgd": STEP,
    },
    method_options={
        "sgd": {"momentum": 0.0},
        "svd-lora": {"momentum": 0.0},
        "altlora": {"b1": 0.0},
        "altlora-sequential": {"b1": 0.0},
        "preconditioned": {"damping": 1e-6},
        "oplora": {"momentum": 0.0, "lmbd": 1e-6},
        "oplora-proj": {"momentum": 0.0, "lmbd": 1e-6},
        "sds-lora-sgd": {"momentum": 0.0},
    },
    seeds=(0, 1, 2),
    extensions=8,
    variant_axis="condition number κ of the factors",
    variants={
        "kappa-1": {},
        "kappa-10": {"task_options.condition": 10.0},
        "kappa-100": {"task_options.condition": 100.0},
        "kappa-1000": {"task_options.condition": 1000.0},
    },
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 4,
    "learning_rates": {"adamw": [0.03], "altlora": [0.3], "sds-lora-sgd": [0.03]},
    "seeds": [0],
}
