"""The rules for the learning rate, and what they are set beside."""

import math
from pathlib import Path

import pytest
from flax import nnx

from experiments.adapters import LowRank
from experiments.rules import (
    ADAPTED,
    GRID_STEP,
    RULES,
    Layers,
    Rule,
    Trial,
    best_rate,
    left_out_error,
    rules_table,
    sweeps_by_rule,
    trials,
    unseen_table,
)
from experiments.summary import summarize
from experiments.tasks import load_task
from lowrank_optax import find_pairs
from tests.experiments.samples import make_result
from tests.experiments.test_stability import Variant, sweep

ROOT = Path(__file__).parents[2]
GUIDE, README = ROOT / "docs" / "choosing.md", ROOT / "README.md"


def test_a_rule_falls_with_layers_rank_and_width():
    rule = Rule(12, 1, 0.5, 0)
    assert rule.rate(Layers(3, 100), rank=4) == pytest.approx(2.0)
    assert rule.rate(Layers(3, 999), rank=16) == pytest.approx(1.0)
    assert rule.formula == "12 / (n √r)"


def test_the_best_rate_is_the_bottom_of_a_parabola_in_logarithms():
    """log loss = (log₁₀ rate + 1.2)², sampled at 0.01, 0.03, 0.1 and 0.3."""
    loss = lambda rate: math.exp((math.log10(rate) + 1.2) ** 2)
    (summary,) = summarize(sweep({rate: loss(rate) for rate in (0.01, 0.03, 0.1, 0.3)}))
    assert best_rate(summary) == pytest.approx(10**-1.2)


def test_beside_a_diverged_run_the_best_rate_is_taken_as_it_is():
    (summary,) = summarize(sweep({0.01: 1.1, 0.03: 1.0, 0.1: None}))
    assert best_rate(summary) == 0.03


@pytest.mark.parametrize("task", ["digits", "sst2"])
def test_the_layers_of_a_task_are_those_that_its_model_has(task, tmp_path):
    """Of the tasks whose model is there without data."""
    from tests.experiments.tiny_data import write_sst2

    write_sst2(tmp_path)
    for (name, targets), layers in ADAPTED.items():
        if name != task:
            continue
        options = {"targets": targets} | ({"pretrain_steps": 1} if task == "digits" else {})
        data = None if task == "digits" else tmp_path
        model = load_task(task, options, data, lambda *_: None).build_model(0, LowRank())
        tree = nnx.as_pure(nnx.state(model, nnx.LoRAParam))
        pairs = find_pairs(tree).take(tree)
        widths = [math.sqrt(pair.a.shape[0] * pair.b.shape[1]) for pair in pairs]
        assert len(pairs) == layers.number
        assert sum(widths) / len(widths) == pytest.approx(layers.width, rel=0.01)


def test_a_rule_stands_beside_every_sweep_whose_best_rate_is_inside():
    config = {"task": "mnist", "task_options": {"rank": 8, "targets": r"linear/\d"}}
    runs = [
        run.model_copy(update={"config": run.config.model_copy(update=config)})
        for method, losses in (
            ("polora", {0.3: 1.1, 1.0: 1.0, 3.0: 1.1}),
            ("adamw", {0.01: 1.1, 0.03: 1.0}),
        )
        for run in sweep(losses, method)
    ]
    (found,) = trials({"mnist": [Variant("peers", runs)]})
    assert (found.method, found.is_fitted) == ("polora", True)
    assert found.predicted == RULES["polora"].rate(Layers(3, 116), 8)
    assert found.error == pytest.approx(math.log10(found.predicted / found.best))
    assert abs(found.error) < GRID_STEP
    (later,) = trials({"mnist": [Variant("rank-2", runs)]})
    assert not later.is_fitted


def test_the_rules_stand_beside_scaling_at_all_sizes():
    config = {"task": "shakespeare", "task_options": {"rank": 8, "width": 128}}
    runs = [
        run.model_copy(update={"config": run.config.model_copy(update=config)})
        for run in sweep({0.03: 1.1, 0.1: 1.0, 0.3: 1.1}, "polora")
    ]
    for name in ("middle", "steps-200"):
        (found,) = trials({"scaling": [Variant(name, runs)]})
        assert (found.comparison, found.is_fitted) == (f"scaling, {name}", False)
    assert trials({"lm": [Variant("long", runs)]}) == []


def trial(layers, rank, best, is_fitted=True):
    return Trial("here", "polora", Layers(*layers), rank, best, is_fitted)


def test_a_left_out_rate_is_predicted_from_the_others():
    """Rates that follow 1 / n exactly, but for one that is ten times too high."""
    exact = [trial((n, 100), 8, 1 / n) for n in (2, 4, 8)]
    assert left_out_error(exact, (1, 0, 0)) == pytest.approx(0.0, abs=1e-12)
    assert left_out_error(exact, (0, 0, 0)) > 0.2
    off = [*exact, trial((16, 100), 8, 10 / 16)]
    # Left out it is missed by 1; the others by the third of a decade that it adds to their mean.
    assert left_out_error(off, (1, 0, 0)) == pytest.approx(math.sqrt((1 + 3 / 9) / 4))
    again = [*off, trial((16, 100), 8, 10 / 16)]  # the same model is left out with it
    assert left_out_error(again, (1, 0, 0)) == pytest.approx(math.sqrt((2 + 3 / 4) / 5))


def test_a_row_of_the_table():
    rate = RULES["polora"].rate
    layers = (Layers(4, 100), Layers(16, 100), Layers(4, 400))
    fitted = [trial(each, 8, rate(each, 8)) for each in layers]
    later = trial((4, 100), 8, rate(Layers(4, 100), 8) / 10, is_fitted=False)
    row = rules_table([*fitted, later]).splitlines()[2]
    assert row == (
        "| polora | 29 / (n √d) | 0.00 (0.00) | 3 of 3 | 0.00 | 0 of 1 | 1.00 | 10× (here) |"
    )


def test_a_rule_without_a_sweep_stands_beside_the_swept_adamw():
    config = {"task": "cifar-back", "task_options": {"rank": 16, "targets": r"layers/\d"}}
    rates = sweeps_by_rule(ADAPTED["cifar-back", r"layers/\d"], 16)
    low, middle, high = rates["polora"]
    runs = [
        run.model_copy(update={"config": run.config.model_copy(update=config)})
        for run in (
            *sweep(dict(zip(rates["adamw"], (1.2, 1.1, 1.3), strict=True))),
            *sweep(dict(zip(rates["lora-plus-4"], (1.2, 1.05, 1.3), strict=True)), "lora-plus-4"),
            *sweep(dict(zip(rates["lora-plus"], (1.2, 1.15, 1.3), strict=True)), "lora-plus"),
            *sweep({low: 0.9, middle: 1.0, high: 1.2}, "polora"),
        )
    ]
    rows = unseen_table({"cifar-back": [Variant("", runs)]}).splitlines()[2:]
    swept = "1.05 (lora-plus-4)"
    assert rows[-1] == (
        f"| [cifar-back](cifar-back.md) | polora | {middle:g} | 1 | {low:g} | 0.9 | {swept} |"
    )
    assert "polora" not in unseen_table({"cifar-back": [Variant("", runs, ["polora"])]})
    assert unseen_table({"cifar-back": [Variant("", runs, ["lora-plus"])]}) == ""
    assert unseen_table({}) == ""


def test_runs_of_an_unknown_task_have_no_rule():
    assert trials({"other": [Variant("peers", [make_result(method="polora")])]}) == []


def test_the_guide_states_the_rules():
    text = GUIDE.read_text()
    for method in ("polora-start", "adamw", "altlora-plus-simultaneous", "sds-lora", "oplora"):
        assert RULES[method].formula in text, method
    assert RULES["polora-start"].formula in README.read_text()
