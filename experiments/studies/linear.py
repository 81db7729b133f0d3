"""Linear: the synthetic task of the OPLoRA paper, stochastic and deterministic.

    python -m experiments run linear

A random 200x600 matrix is fitted at rank 8 from batches of its rows, with momentum 0.75, ridge 1e-3
and constant learning rates, as in the released code. "Loss" is the excess over the best rank-8
loss, relative to it. Full fine-tuning fits the matrix exactly, so SVDLoRA is the reference here.
The variant `released` has the learning rates of the released script, and an epoch's steps (four)
between evaluations.

Cost: 270 runs, about 20 minutes on 2 CPU cores that were shared with other work, much of it for
SVDLoRA (set OPENBLAS_NUM_THREADS=1 where cores are shared). What to expect: from mini-batches
OPLoRA ends below SVDLoRA, and both below LoRA with AdamW or SGD.
"""

from experiments.schema import Plan
from experiments.study import Study

STEP = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAM = (3e-3, 1e-2, 3e-2, 0.1, 0.3)
OPLORA = {"momentum": 0.75, "lmbd": 1e-3}

STUDY = Study(
    task="linear",
    plan=Plan(steps=400, eval_every=20, warmup_fraction=0.0, decay="none", head_learning_rate=1e-3),
    learning_rates={
        "adamw": ADAM,
        "lora-plus": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "sgd": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "svd-lora": STEP,
        "altlora": STEP,
        "altlora-simultaneous": STEP,
        "altlora-sequential": STEP,
        "altlora-plus": ADAM,
        "altlora-plus-simultaneous": ADAM,
        "altlora-plus-sequential": ADAM,
        "preconditioned": STEP,
        "oplora": STEP,
        "oplora-2": STEP,
        "oplora-proj": STEP,
        "scaled-oplora": STEP,
        "sds-lora": ADAM,
        "sds-lora-no-warmup": ADAM,
    },
    method_options={
        "sgd": {"momentum": 0.75},
        "svd-lora": {"momentum": 0.75},
        "preconditioned": {"momentum": 0.75, "damping": 1e-3},
        "oplora": OPLORA,
        "oplora-2": OPLORA,
        "oplora-proj": OPLORA,
        "scaled-oplora": {"b1": 0.75, "lmbd": 1e-3},
    },
    seeds=(0, 1, 2),
    variants={
        "stochastic": {},
        "deterministic": {
            "task_options.batch_size": 200,
            "plan.steps": 200,
            "plan.eval_every": 10,
        },
        "released": {
            "plan.eval_every": 4,
            "learning_rates": {
                "adamw": (0.05,),
                "sgd": (0.002,),
                "svd-lora": (0.1,),
                "preconditioned": (0.1,),
                "oplora": (0.1,),
                "oplora-2": (0.1,),
                "oplora-proj": (0.1,),
            },
        },
    },
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 4,
    "task_options.n_in": 20,
    "task_options.n_out": 30,
    "task_options.batch_size": 8,
    "learning_rates": {"adamw": [0.03], "svd-lora": [0.1], "oplora": [0.1]},
    "seeds": [0],
}
