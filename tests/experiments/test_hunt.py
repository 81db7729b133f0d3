"""The hunt: its table and its attempts."""

import pytest

from experiments.hunt import ATTEMPTS, attempts, hunt_table
from experiments.methods import get_method
from experiments.peers import peers
from experiments.report import Variant, index_block, study_page
from experiments.schema import Plan
from experiments.study import Study, expand, load_study
from tests.experiments.samples import with_curve


def hunted(curves, *losses):
    """A study whose variant `peers` has these curves, and one attempt a curve of these losses."""
    plan = Plan(steps=2, eval_every=2, head_learning_rate=1e-3)
    sweeps = {"adamw": (1e-3,), "lora-plus": (1e-3,), "polora-start": (0.01, 0.1, 1.0)}
    study = Study(task="digits", plan=plan, learning_rates=sweeps, seeds=(0, 1))
    own = {"polora-start": sweeps["polora-start"]}
    attempt = study.model_copy(update={"learning_rates": own})
    run = lambda loss, rate, seed=0: with_curve(
        4.0, 3.0, 2.0, loss, method="polora-start", learning_rate=rate, seed=seed
    )
    runs = [run(0.9, 0.01), run(losses[0], 0.1), run(0.9, 1.0), run(losses[1], 0.1, seed=1)]
    return [Variant("peers", study, curves), Variant("hunt-shorter-momentum", attempt, runs)]


def test_the_hunt_has_a_row_for_each_attempt_beside_the_unchanged_method(curves):
    rows = hunt_table({"digits": hunted(curves, 0.2, 0.3)}).splitlines()
    assert len(rows) == 4
    assert rows[2].startswith("| digits | none | 0.1 | 1.42× ± 0.35 | 0.7 ± 0.28 | –")
    assert rows[3].startswith("| digits | b1 = 0.8, not 0.9 | 0.1 | 0.80×")
    assert "0.25 ± 0.071 | -0.45 ± 0.2 (-2.2): better | -0.45 ± 0.2 (-2.2): better |" in rows[3]
    assert hunt_table({"digits": hunted(curves, 0.2, 0.3)[:1]}) == ""
    assert hunt_table({"digits": hunted(curves, 0.2, 0.3)[1:]}) == ""


def test_an_attempt_for_adamw_is_compared_with_adamw(curves):
    peers_variant, _ = hunted(curves, 0.2, 0.3)
    changed = [run for run in curves if run.config.method == "adamw"]
    of_adamw = peers_variant.study.model_copy(update={"learning_rates": {"adamw": (1e-3,)}})
    attempt = Variant("hunt-adamw-b2-99", of_adamw, changed)
    row = hunt_table({"digits": [peers_variant, attempt]}).splitlines()[3]
    assert row.startswith("| digits | AdamW: b2 = 0.99, not 0.999 | 0.001 | 1 of 2 reach it |")
    assert row.count("+0 ± ") == 2


def test_the_hunt_compares_with_the_first_variant_of_the_peers(curves):
    peers, attempt = hunted(curves, 0.2, 0.3)
    first = Variant("peers-query-value", peers.study, curves)
    second = Variant("peers-all-linear", peers.study, curves[:1])
    found = hunt_table({"digits": [first, second, attempt]})
    assert found == hunt_table({"digits": [peers, attempt]})


def test_an_attempt_is_compared_with_the_variant_that_it_names(curves):
    peers, attempt = hunted(curves, 0.2, 0.3)
    long = Variant("long", peers.study, curves)
    near = Variant("long-rank-32", peers.study, curves[:1])
    named = Variant("long-hunt-shorter-momentum", attempt.study, attempt.results)
    found = hunt_table({"lm": [near, peers, attempt, long, named]}).splitlines()
    assert [row.split(" | ")[0] for row in found[2:]] == ["| lm"] * 2 + ["| lm:long"] * 2
    assert [row.split(" | ")[1:] for row in found[2:4]] == [
        row.split(" | ")[1:] for row in found[4:]
    ]
    assert hunt_table({"lm": [near, peers, named]}) == ""
    lm = expand(load_study("lm").study, {}, ["long", "long-hunt-shorter-momentum"])
    assert lm["long-hunt-shorter-momentum"].plan == lm["long"].plan


def test_attempts_change_what_their_reference_changes():
    rates = peers(adamw=1e-2, polora=0.3)
    variant = attempts(rates, {"task_options.rank": 4})["hunt-no-momentum"]
    assert variant["task_options.rank"] == 4
    assert variant["learning_rates"] == {"polora-start": rates["polora-start"]}


def test_attempts_are_no_comparisons_and_have_a_page_of_their_own(curves):
    variants = hunted(curves, 0.2, 0.3)
    of_adamw = variants[0].study.model_copy(update={"learning_rates": {"adamw": (1e-3,)}})
    variants.append(Variant("hunt-adamw-b2-99", of_adamw, curves[:3]))
    assert "hunt" not in index_block({"digits": variants})
    variants.append(Variant("long-hunt-adamw-b2-99", of_adamw, curves[:3]))
    file = load_study("digits")
    assert "hunt" not in study_page(file, variants)


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempts_change_the_options_of_one_method_alone(name):
    rates, method = peers(adamw=1e-2, polora=0.3), ATTEMPTS[name].method
    variant = attempts(rates)[f"hunt-{name}"]
    of = "polora-start" if method == "polora-ablated-start" else method
    assert variant["learning_rates"] == {method: rates[of]}
    assert set(variant) == {"learning_rates", f"method_options.{method}"}
    changed = variant[f"method_options.{method}"]
    parts = dict.fromkeys(("polar", "bounded", "diagonal", "nesterov"), True)
    known = {**get_method(method).options, **parts, "b1": 0.9, "delta": 1e-4}
    known |= {"b2": 0.99 if "polora" in method else 0.999, "radius": "exact"}
    known |= {"start": get_method(method).options.get("start", "none")}
    assert changed
    assert all(known[key] != value for key, value in changed.items())
    study = expand(load_study("digits").study, {}, [f"hunt-{name}"])[f"hunt-{name}"]
    assert study.method_options == {method: changed}
