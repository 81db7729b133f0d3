"""Figures: what is drawn is what was given."""

import sys

import matplotlib as mpl
import numpy as np
import pytest

from lowrank_optax import LoRAPair, plots
from lowrank_optax.adapters import spectrum

mpl.use("Agg")


@pytest.fixture
def found():
    normal = np.random.default_rng(0).standard_normal
    pairs = {f"layers/{i}": LoRAPair(normal((12, 4)), normal((4, 8))) for i in range(3)}
    pairs["zero"] = LoRAPair(normal((12, 4)), np.zeros((4, 8)))
    return {name: spectrum(pair, 2.0) for name, pair in pairs.items()}


def test_spectra_are_relative_to_the_first_value(found):
    axes = plots.spectra(found)
    assert axes.get_title(loc="left") == "4 pairs"
    for line, each in zip(axes.lines, found.values(), strict=True):
        wanted = each.values / each.norm if each.norm else np.zeros(4)
        np.testing.assert_allclose(line.get_ydata(), wanted)


def test_conditions_have_a_row_a_pair_and_leave_out_infinite_ones(found):
    axes = plots.conditions(found)
    of_a, of_b = (line.get_xdata() for line in axes.lines)
    np.testing.assert_allclose(of_a, [each.condition_a for each in found.values()])
    assert np.isnan(of_b[-1])
    assert np.isfinite(of_b[:-1]).all()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(found)


def test_effective_ranks_over_training():
    axes = plots.effective_ranks([0, 5], {"a": [1.0, 2.0]})
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 1], [5, 2]])
    with pytest.raises(ValueError, match="'a' has 1 values for 2 steps"):
        plots.effective_ranks([0, 5], {"a": [1.0]})


def test_sweeps_mark_the_best_rate_and_what_diverged():
    losses = {"adamw": {1e-3: 0.4, 1e-2: 0.3, 1e-1: np.nan}, "polora": {0.3: 0.2, 0.1: 0.25}}
    axes = plots.sweeps(losses, baseline="adamw")
    curve, diverged, best, level, other, *_ = axes.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1e-3, 0.4], [1e-2, 0.3]])
    assert diverged.get_xdata().tolist() == [0.1]
    assert best.get_xydata().tolist() == [[0.01, 0.3]]
    assert level.get_ydata()[0] == 0.3
    assert curve.get_color() == best.get_color() == "black"
    np.testing.assert_array_equal(other.get_xydata(), [[0.1, 0.25], [0.3, 0.2]])
    with pytest.raises(ValueError, match="'sgd' is not among adamw, polora"):
        plots.sweeps(losses, baseline="sgd")


def test_axes_that_are_given_are_drawn_into(found):
    axes = plots.spectra(found)
    assert plots.spectra(found, axes) is axes
    assert len(axes.lines) == 8


def test_a_missing_matplotlib_names_the_extra(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.spectra(found)
