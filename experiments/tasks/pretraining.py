"""A base for tasks that make their own: all weights of a model, trained on another task."""

from typing import Any

from experiments.errors import ExperimentError
from experiments.schema import Plan
from experiments.task import OnStep, Task
from experiments.trainer import Outcome, Trainer


def pretrain(
    task: Task[Any], *, steps: int, learning_rate: float, seed: int, on_step: OnStep
) -> Outcome:
    """Trains all weights of a task's model by AdamW.

    Args:
        task: What to train.
        steps: How many updates.
        learning_rate: Peak learning rate.
        seed: Fixes the start and the order of the data.
        on_step: Called after each step.

    Returns:
        The run, with its model.

    Raises:
        ExperimentError: The run did not finish.
    """
    plan = Plan(steps=steps, eval_every=steps, head_learning_rate=learning_rate)
    run = Trainer(task, "full-adamw", plan).run(learning_rate, seed, on_step)
    if run.result.status != "finished":
        why = f": {run.result.error}" if run.result.error else ""
        raise ExperimentError(f"the pretraining, task {task.name!r}, {run.result.status}{why}")
    return run
