"""The stored outputs of torch, checked against torch itself where it is installed."""

import numpy as np
import pytest

from tests.experiments.parity import REFERENCE, torch_outputs


def test_stored_outputs_are_those_of_torch(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
    pytest.importorskip("transformers", reason="transformers is not installed: see above")
    stored = np.load(REFERENCE)
    outputs = torch_outputs(tmp_path)
    assert set(outputs) == set(stored) - {"versions"}
    for name, values in outputs.items():
        np.testing.assert_allclose(values, stored[name], rtol=0, atol=1e-5, err_msg=name)
        assert np.ptp(values) > 0.1, f"{name}: outputs all alike would prove nothing"
