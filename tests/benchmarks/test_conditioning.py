"""The convergence claim of the SDS-LoRA paper, by the conditioning benchmark."""

import numpy as np
import pytest

from benchmarks import conditioning
from experiments.tasks.conditioning import make_problem


@pytest.mark.parametrize("kind", ["factorization", "adapter"])
def test_convergence_does_not_depend_on_the_condition_number_of_the_factors(x64, kind):
    """Both problems of the benchmark; LoRA's rate falls with the square of the condition number."""
    conditions = (1.0, 1e2, 1e4)
    problems = [make_problem(kind, condition) for condition in conditions]
    rates = {
        method: [conditioning.descend(method, problem, steps=400).rate for problem in problems]
        for method in conditioning.METHODS
    }
    best = 2 * np.log(3)  # eigenvalues s² and 2 s² at the step 2 / 3 s²
    np.testing.assert_allclose(rates["SDS-LoRA"], best, rtol=0.01)
    fast, slow, slowest = rates["LoRA"]
    assert 0 < slowest < slow / 100 < fast / 1000
