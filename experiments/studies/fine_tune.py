"""Fine-tune: any model of the Hugging Face hub on the tasks of the papers.

    python -m experiments run fine-tune --task mnli --model roberta-base
    python -m experiments run fine-tune --task gsm8k --model meta-llama/Llama-3.2-1B
    python -m experiments run fine-tune --task cifar100 --model google/vit-base-patch16-224

`--model` may be a folder with `config.json` and safetensors, `--data-dir` one with files of data.
Learning rates around those that the papers use; a GPU is needed for models of this size.

Cost: 1,000 steps a run, not measured: neither hub nor such models were at hand.
"""

from experiments.schema import Plan
from experiments.study import Study

ADAM = (6e-5, 2e-4, 6e-4, 2e-3, 6e-3)
STEP = (0.01, 0.03, 0.1, 0.3, 1.0)

STUDY = Study(
    task="mnli",
    task_options={"model": "roberta-base"},
    plan=Plan(steps=1000, eval_every=100, head_learning_rate=1e-3),
    learning_rates={
        "adamw": ADAM,
        "lora-plus": (2e-5, 6e-5, 2e-4, 6e-4, 2e-3),
        "altlora": STEP,
        "altlora-plus": ADAM,
        "oplora": STEP,
        "sds-lora": ADAM,
    },
    seeds=(0, 1, 2),
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 12,
    "task_options.rank": 2,
    "task_options.batch_size": 2,
    "task_options.eval_limit": 4,
    "learning_rates": {"adamw": [2e-4], "oplora": [0.1]},
    "seeds": [0],
}
