"""GSM8K: a small decoder, pretrained here on books, adapted to worked answers.

    python -m experiments pretrain --width 128 --data-dir ../shared/data
    python -m experiments run gsm8k --data-dir ../shared/data --jobs 2

A decoder of 1.3 million parameters in place of a Llama, rank 8 in all seven linear maps, 160 steps
of 4 problems of up to 320 tokens. No default was chosen on it: every sweep begins around the
learning rate that the method's rule gives, docs/results/rates.md. Answers to 32 test problems are
generated at the end; a decoder of this size may solve none.

Cost: 16 minutes of pretraining, and 88 for all methods, on two CPU cores with --jobs 2.
"""

from experiments.peers import around
from experiments.rules import DECODERS, sweeps_by_rule
from experiments.schema import Plan
from experiments.study import Study

STUDY = Study(
    task="gsm8k",
    task_options={
        "model": "./build/decoders/w128",
        "batch_size": 4,
        "max_length": 320,
        "eval_limit": 48,
        "solve_limit": 32,
        "dtype": "float32",
    },
    plan=Plan(steps=160, eval_every=8, head_learning_rate=1e-3),
    learning_rates={**sweeps_by_rule(DECODERS[128], 8), "full-adamw": around(1e-3, 3)},
    seeds=(0, 1, 2),
)

SMOKE = {
    "plan.steps": 4,
    "plan.eval_every": 4,
    "task_options.batch_size": 2,
    "task_options.eval_limit": 4,
    "task_options.solve_limit": 2,
    "learning_rates": {"adamw": [1e-3], "polora": [0.1]},
    "seeds": [0],
}
