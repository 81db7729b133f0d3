"""MiniLM-L6 on SST-2 (in place of RoBERTa-base): AdamW against AltLoRA and AltLoRA+.

    python -m experiments run minilm-sst2 --data-dir ../shared/data/sst2
    python -m experiments run minilm-sst2 --method adamw --learning-rate 2e-3   # one run

Without `--data-dir` the data come from the Hugging Face hub. LoRA of rank 8 on query and value, a
new linear head by AdamW at 2e-3 in every method, batch 32, 48 tokens. "Validation" is GLUE's dev
set, on which learning rates are chosen; the labelled test set is only reported.

Cost: a step takes 0.4 to 0.5 s on 2 free CPU cores (1 s and more when they are shared), so one run
of 400 steps with its evaluations 4 to 10 minutes and the sweep of 15 runs one to two hours.

What to expect on the dev set, one seed, from `experiments/results/minilm_sst2`: AdamW at 2e-3
84.7 %, AltLoRA+ at 6e-3 83.4 %, AltLoRA at 0.1 79.8 % and at 0.3 77.8 %. Those runs are no full
sweep: AltLoRA+ was tried at three learning rates for 60 steps only, AltLoRA at 0.03 too.
"""

from experiments.schema import Plan
from experiments.study import Study

STUDY = Study(
    task="sst2",
    plan=Plan(steps=400, eval_every=100, head_learning_rate=2e-3),
    learning_rates={
        "adamw": (2e-4, 6e-4, 2e-3, 6e-3, 2e-2),
        "altlora": (0.01, 0.03, 0.1, 0.3, 1.0),
        "altlora-plus": (2e-4, 6e-4, 2e-3, 6e-3, 2e-2),
    },
    seeds=(0,),
)

SMOKE = {
    "plan.steps": 4,
    "plan.eval_every": 2,
    "task_options.eval_limit": 64,
    "learning_rates": {"adamw": [2e-3], "altlora": [0.1], "altlora-plus": [2e-3]},
    "seeds": [0],
}
