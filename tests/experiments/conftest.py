import pytest

from experiments.schema import Plan
from experiments.tasks.digits import Digits, DigitsOptions
from tests.experiments.samples import TINY


@pytest.fixture(scope="session")
def tiny_digits() -> Digits:
    return Digits(DigitsOptions(**TINY))


@pytest.fixture(scope="session")
def plan() -> Plan:
    return Plan(steps=30, eval_every=10, head_learning_rate=1e-2)
