"""The tables of why PoLoRA works, on made-up results."""

from experiments.schema import ProbePoint
from experiments.why import parts_table, steps_table
from tests.experiments.samples import make_result
from tests.experiments.test_stability import Variant


def runs(method, loss):
    return [make_result(method=method, seed=seed, loss=loss + 0.01 * seed) for seed in range(3)]


def test_a_row_for_each_part_left_out():
    whole = Variant("peers", [*runs("polora-start", 0.5), *runs("polora", 0.9)])
    changed = [
        Variant("hunt-no-polar", runs("polora-ablated-start", 0.7)),
        Variant("hunt-no-momentum", runs("polora-start", 0.501)),
    ]
    table = parts_table({"digits": [whole, *changed], "lm": [whole]})
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert rows[0] == ["left out", "digits: loss 0.51 becomes", "lm: loss 0.51 becomes"]
    cells = {row[0]: row[1:] for row in rows[2:]}
    on_both = lambda loss, found: [f"{loss}; {found}. Validation: {found}", "–"]
    assert cells["the polar factors"] == on_both("0.71 ± 0.01", "+0.2 ± 0.008 (+24.5): worse")
    within = "+0.001 ± 0.008 (+0.1): within noise"
    assert cells["the momentum"] == on_both("0.511 ± 0.01", within)
    assert [cell.split(": ")[-1] for cell in cells["the start from the gradient"]] == ["worse"] * 2
    assert parts_table({"digits": [whole]}) == ""


def test_a_column_for_each_method_of_the_mechanism():
    probes = dict.fromkeys(ProbePoint.model_fields, 2.0) | {"step": 1}
    points = [ProbePoint(**probes), ProbePoint(**probes | {"step": 2, "step_rank": 4.0})]
    made = [run.model_copy(update={"probes": points}) for run in runs("polora", 0.9)]
    rows = steps_table([Variant("", made)]).splitlines()
    assert rows[0] == "|  | polora |"
    assert "| effective rank of the step of ΔK | 3 ± 0 |" in rows
    assert rows[-1] == "| test loss | 0.91 ± 0.01 |"
    assert steps_table([]) == ""
