"""Small configurations and made-up results that several tests use."""

from collections.abc import Sequence
from typing import Any

from experiments.schema import (
    CurvePoint,
    Plan,
    RunConfig,
    RunResult,
    Scores,
    Status,
    current_environment,
)
from experiments.start import options_of

TINY: dict[str, Any] = {
    "width": 16,
    "depth": 1,
    "heads": 2,
    "rank": 2,
    "batch_size": 16,
    "pretrain_steps": 40,
}


def make_result(
    *,
    learning_rate: float = 1e-3,
    seed: int = 0,
    loss: float = 0.5,
    status: Status = "finished",
    method: str = "adamw",
    variant: str = "",
) -> RunResult:
    """Returns a result as if a run of two steps had been made."""
    scores = Scores(loss=loss, accuracy=0.75)
    start = CurvePoint(step=0, seconds=0.0, validation=Scores(loss=1.0, accuracy=0.5))
    end = CurvePoint(step=2, seconds=0.1, validation=scores)
    return RunResult(
        config=RunConfig(
            study="digits",
            variant=variant,
            task="digits",
            task_options={"rank": 4},
            data={"source": "made up"},
            method=method,
            method_options=options_of(method, {}),
            learning_rate=learning_rate,
            plan=Plan(steps=2, eval_every=2, head_learning_rate=1e-3),
            seed=seed,
        ),
        status=status,
        environment=current_environment(),
        trainable_parameters=10,
        trained_bytes=40,
        optimizer_state_bytes=80,
        step_temporary_bytes=None,
        compile_seconds=1.0,
        wall_seconds=2.0,
        median_step_seconds=0.05,
        steps_done=2,
        losses_every=1,
        train_losses=[1.0, 0.9],
        curve=[start, end],
        best=end,
        final={"validation": scores, "test": scores},
    )


def _curve_of(losses: Sequence[float], every: int = 10) -> list[CurvePoint]:
    points = enumerate(losses)
    return [
        CurvePoint(step=every * i, seconds=0.0, validation=Scores(loss=loss)) for i, loss in points
    ]


def with_curve(*losses: float, **changes: Any) -> RunResult:
    """Returns a result with these losses at steps 0, 10, …"""
    result = make_result(loss=losses[-1], **changes)
    return result.model_copy(update={"curve": _curve_of(losses)})
