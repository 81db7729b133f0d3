import pytest

from experiments.schema import Plan, RunResult
from experiments.tasks.digits import Digits, DigitsOptions
from tests.experiments.samples import TINY, with_curve


@pytest.fixture(scope="session")
def tiny_digits() -> Digits:
    return Digits(DigitsOptions(**TINY))


@pytest.fixture(scope="session")
def plan() -> Plan:
    return Plan(steps=30, eval_every=10, head_learning_rate=1e-2)


@pytest.fixture
def curves() -> list[RunResult]:
    """AdamW's mean curve is lowest at step 20, with 1.5."""
    return [
        with_curve(4.0, 2.0, 1.0, 1.5, method="adamw"),
        with_curve(4.0, 3.0, 2.0, 2.5, method="adamw", seed=1),
        with_curve(4.0, 3.0, 2.5, 2.2, method="lora-plus"),
        with_curve(4.0, 3.9, 3.9, 3.9, method="polora-start", learning_rate=0.01),
        with_curve(4.0, 1.5, 1.0, 0.5, method="polora-start", learning_rate=0.1),
        with_curve(4.0, 2.0, 1.0, 0.9, method="polora-start", learning_rate=0.1, seed=1),
        with_curve(4.0, 1.0, 0.9, 0.9, method="polora-start", learning_rate=1.0),
    ]
