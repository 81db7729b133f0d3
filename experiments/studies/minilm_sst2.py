"""MiniLM-L6 on SST-2 (in place of RoBERTa-base): AdamW against AltLoRA and AltLoRA+.

    python -m experiments run minilm-sst2 --data-dir ../shared/data/sst2
    python -m experiments run minilm-sst2 --method adamw --learning-rate 2e-3   # one run

Without `--data-dir` the data come from the Hugging Face hub. LoRA of rank 8 on query and value, a
new linear head by AdamW at 2e-3 in every method, batch 32, 48 tokens. "Validation" is GLUE's dev
set, on which learning rates are chosen; the labelled test set is only reported.

Cost: about 4 minutes a run on 2 free CPU cores (0.4 to 0.5 s a step), so about an hour for the
whole sweep of 15 runs. What to expect: AdamW at 2e-3 reaches 84 to 85 % on the dev set.
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
