"""Authors: which of ten authors wrote a paragraph? A task that no default was chosen on.

    python -m experiments run authors --data-dir ../shared/data --jobs 2

MiniLM-L6 in place of a larger encoder, rank 8 in query and value, a new linear head by AdamW at
2e-3 in every method, 200 steps of 16 paragraphs cut at 48 tokens. Every sweep begins around the
learning rate that the method's rule gives: docs/results/rates.md.

Cost: not run yet.
"""

from experiments.peers import around
from experiments.rules import ADAPTED, sweeps_by_rule
from experiments.schema import Plan
from experiments.study import Study

STUDY = Study(
    task="authors",
    task_options={"batch_size": 16, "max_length": 48},
    plan=Plan(steps=200, eval_every=10, head_learning_rate=2e-3),
    learning_rates={
        **sweeps_by_rule(ADAPTED["authors", "query|value"], 8),
        "full-adamw": around(1e-4, 3),
    },
    seeds=(0, 1, 2),
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 12,
    "task_options.batch_size": 4,
    "task_options.max_length": 8,
    "task_options.eval_limit": 16,
    "learning_rates": {"adamw": [2e-3], "polora": [0.1]},
    "seeds": [0],
}
