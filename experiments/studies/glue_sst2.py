"""GLUE SST-2: MiniLM-L6 in place of RoBERTa-base, adapters in query and value or all linear maps.

    python -m experiments run glue-sst2 --variant papers-query-value --data-dir DATA --jobs 2
    python -m experiments run glue-sst2 --variant longer

Without `--data-dir` the data come from the Hugging Face hub. Rank 8, a new linear head by AdamW at
2e-3 in every method, 200 steps of 16 sentences cut at 48 tokens. "Validation" is GLUE's dev set of
872 sentences, on which learning rates are chosen; the first 872 of the labelled test set are only
reported. The peers, which are evaluated 20 times a run, take the first 384 of each. Seeds 3 and 4
of AdamW and PoLoRA in the peers and at rank 32 are by `--override 'seeds=[0,1,2,3,4]'`. The variant
`longer` is the baseline of an independent run, 400 steps of 32: about 84 % on the dev set.

Cost: about an hour for `peers-all-linear`, 33 minutes for `rank-32`, 26 for `papers-all-linear` on
two CPU cores of 100 GFLOP/s each in single precision, 90 for `papers-query-value` on two of 30,
with --jobs 2. Expect SDS-LoRA beside AdamW, OPLoRA and AltLoRA behind, and a cliff above the best
rate: docs/results/glue-sst2.md.
"""

from experiments.hunt import attempts
from experiments.peers import highlights, others, peers
from experiments.schema import Plan
from experiments.study import Study

ADAM = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2)
STEP = (0.01, 0.03, 0.1, 0.3, 1.0)

PEERS = {"task_options.eval_limit": 384}  # of each split: with all, a run is mostly evaluation
ALL_LINEAR = "query|key|value|out|mlp_in|mlp_out"
PAPERS = {"adamw": ADAM, "altlora": STEP, "oplora": STEP, "sds-lora": ADAM}

STUDY = Study(
    task="sst2",
    task_options={"batch_size": 16, "eval_limit": 872},
    plan=Plan(steps=200, eval_every=10, head_learning_rate=2e-3),
    learning_rates=peers(adamw=3e-3, polora=0.1, count=3) | others(adamw=3e-3, polora=0.1, count=3),
    seeds=(0, 1, 2),
    variants={
        "peers-query-value": PEERS,
        "peers-all-linear": {
            **PEERS,
            "task_options.targets": ALL_LINEAR,
            "learning_rates": peers(adamw=1e-3, polora=0.03, count=3),
        },
        "rank-32": {
            **PEERS,
            "task_options.targets": ALL_LINEAR,
            "task_options.rank": 32,
            "task_options.alpha": 64.0,
            "learning_rates": highlights(adamw=1e-3, polora=0.03, count=3),
        },
        "longer": {
            "plan.steps": 400,
            "plan.eval_every": 100,
            "task_options.batch_size": 32,
            "task_options.eval_limit": None,
            "learning_rates": {"adamw": (2e-3,)},
        },
        "papers-query-value": {
            "plan.eval_every": 100,
            "learning_rates": {
                **PAPERS,
                "altlora-plus": ADAM,
                "lora-plus": (6e-5, 2e-4, 6e-4, 2e-3, 6e-3),
                "full-adamw": (6e-6, 2e-5, 6e-5, 2e-4, 6e-4),
            },
        },
        "papers-all-linear": {
            "plan.eval_every": 100,
            "task_options.targets": ALL_LINEAR,
            "learning_rates": PAPERS,
        },
        **attempts(peers(adamw=3e-3, polora=0.1, count=3), PEERS),
    },
)

SMOKE = {
    "plan.steps": 12,
    "plan.eval_every": 12,
    "task_options.batch_size": 4,
    "task_options.max_length": 8,
    "task_options.eval_limit": 16,
    "task_options.targets": "query|value",
    "learning_rates": {"adamw": [2e-3], "oplora": [0.1]},
    "seeds": [0],
}
