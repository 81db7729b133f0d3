"""The linear task of the OPLoRA paper against what the released code measures."""

import json
import pathlib

import numpy as np
import pytest

from benchmarks.linear_task import METHODS, run

RECORD = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "linear_task.json"
EPOCHS = (1, 5, 10, 100)

# Relative excess loss after EPOCHS: smallest and largest of seeds 0 and 1, by the released code
# (zeligism/PSI-LoRA, 9cb3fa6), with the learning rates of its
# scripts/run_compare_methods_linear_stochastic.sh. Its random numbers are not ours, so the
# comparison is of magnitudes.
RELEASED = {
    "SVDLoRA (SGD)": [(0.036, 0.036), (0.0058, 0.0058), (0.0018, 0.0021), (3.5e-4, 3.6e-4)],
    "OPLoRA k=1": [(0.072, 0.072), (0.014, 0.014), (0.007, 0.008), (1.3e-4, 1.7e-4)],
    "OPLoRA k=2": [(0.056, 0.058), (0.008, 0.008), (0.0044, 0.0050), (0.9e-4, 2.2e-4)],
    "OPLoRA-proj k=1": [(0.039, 0.039), (0.018, 0.018), (0.009, 0.010), (5.9e-4, 7.0e-4)],
    "preconditioned SGD": [(0.110, 0.121), (0.022, 0.022), (0.011, 0.011), (7.3e-4, 9.0e-4)],
    "LoRA AdamW": [(0.088, 0.088), (0.033, 0.033), (0.015, 0.015), (8.6e-4, 9.2e-4)],
    "LoRA SGD": [(0.098, 0.098), (0.075, 0.075), (0.026, 0.026), (9.5e-4, 9.5e-4)],
}


@pytest.fixture(scope="module")
def curves():
    """Ten epochs of all methods, from one seed."""
    return {name: run(name, seed=0, epochs=10) for name in METHODS}


@pytest.fixture(scope="module")
def recorded():
    """The committed record: excess after 100 epochs by method, of all seeds."""
    rows = json.loads(RECORD.read_text())["rows"]
    return {
        name: [row["excess"]["100"] for row in rows if row["method"] == name] for name in METHODS
    }


def assert_near(excess, name, epoch, factor):
    low, high = RELEASED[name][EPOCHS.index(epoch)]
    assert low / factor < excess < high * factor, f"{name}, epoch {epoch}"


# Seeds differ the more the longer they train: on 20 seeds by up to 10 % of their median after the
# first epoch and 35 % after ten.
@pytest.mark.parametrize(("epoch", "factor"), [(1, 1.2), (5, 1.5), (10, 1.5)])
@pytest.mark.parametrize("name", METHODS)
def test_excess_loss_is_that_of_the_released_code(curves, name, epoch, factor):
    assert_near(curves[name][epoch - 1], name, epoch, factor)


def test_methods_rank_as_in_the_released_code_after_ten_epochs(curves):
    after_ten = {name: curve[-1] for name, curve in curves.items()}
    ladder = [
        "SVDLoRA (SGD)",
        "OPLoRA k=2",
        "OPLoRA k=1",
        "preconditioned SGD",
        "LoRA AdamW",
        "LoRA SGD",
    ]
    assert [after_ten[name] for name in ladder] == sorted(after_ten[name] for name in ladder)
    assert after_ten["OPLoRA k=2"] < after_ten["OPLoRA-proj k=1"] < after_ten["preconditioned SGD"]


def test_momentum_of_oplora_does_not_go_stale():
    """Without `momentum_damping` the excess rises again after epoch 50, to 0.016."""
    curve = run("OPLoRA k=1", seed=0, epochs=100)
    assert_near(curve[-1], "OPLoRA k=1", epoch=100, factor=1.5)


@pytest.mark.parametrize("name", METHODS)
def test_recorded_excess_loss_is_that_of_the_released_code(recorded, name):
    """The median: after 100 epochs, single seeds of LoRA SGD differ by a factor 3."""
    assert len(recorded[name]) == 5
    assert_near(np.median(recorded[name]), name, epoch=100, factor=2)


def test_only_oplora_gets_below_svd_lora_in_the_record(recorded):
    """As in the released table: the momentum of SVDLoRA is not projected, that of OPLoRA is."""
    best = np.median(recorded["SVDLoRA (SGD)"])
    below = {name for name in METHODS if np.median(recorded[name]) < best}
    assert below == {"OPLoRA k=1", "OPLoRA k=2"}


def test_record_begins_as_the_code_does_now(curves):
    rows = json.loads(RECORD.read_text())["rows"]
    for row in rows:
        if row["seed"] == 0:
            expected = row["excess"]["5"]
            np.testing.assert_allclose(curves[row["method"]][4], expected, rtol=0.05)
