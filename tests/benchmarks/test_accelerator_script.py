"""The script for an accelerator, small enough for a CPU: its parts, and what outlives a failure."""

import json

import jax
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import accelerator
from benchmarks.accelerator import (
    CHECKED,
    FULL,
    QUICK,
    TUNED,
    Setting,
    difference_of_devices,
    rates_around_rule,
)
from benchmarks.train_step import make_problem
from experiments.errors import ExperimentError
from tests.experiments.tiny_data import write_books, write_gsm8k


def invoke(*arguments):
    app = typer.Typer()
    app.command()(accelerator.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def shown(result):
    """What stands on the screen, without the box that errors stand in and its line breaks."""
    return " ".join(result.output.replace("│", " ").split())


def test_every_public_method_is_checked():
    names = {name.partition(" ")[0] for name in CHECKED}
    assert names >= {
        *("adamw", "altlora", "altlora_plus", "lora_fa", "lora_muon", "lora_plus", "lora_pro"),
        *("lora_pro_efficient", "lora_rite", "lora_soap", "oplora", "oplora_proj", "polora"),
        *("reflora", "scaled_adamw", "scaled_oplora", "sds_lora"),
    }


def test_steps_of_two_devices_are_compared_by_how_far_they_move(monkeypatch):
    problem = make_problem(layers=2, width=8, tokens=16, rank=2, dtype=jax.numpy.float32)
    assert difference_of_devices("polora", problem) < 1e-5
    found = dict.fromkeys(CHECKED, 0.0) | {"polora": 0.5}
    monkeypatch.setattr(accelerator, "difference_of_devices", lambda name, problem: found[name])
    assert accelerator.check(Setting(QUICK, None, Console()))["wrong"] == ["polora"]


def test_wrong_steps_end_in_an_error_after_the_other_parts(tmp_path, monkeypatch):
    parts = {"correct": lambda setting: {"wrong": ["polora"]}, "update": lambda setting: {"x": 1}}
    monkeypatch.setattr(accelerator, "PARTS", parts)
    result = invoke("--out", tmp_path / "record.json")
    assert result.exit_code == 1
    assert "Steps differ from the CPU's: polora" in shown(result)
    assert list(json.loads((tmp_path / "record.json").read_text())["parts"]) == list(parts)


def test_the_rates_of_a_decoder_are_around_those_of_the_rule():
    """The full decoder: 56 layers, of 512x512 and 512x1368."""
    rates = rates_around_rule("polora-start", FULL.decoder, 8)
    width = (4 * 512 + 3 * (512 * 1368) ** 0.5) / 7
    assert rates[2] == pytest.approx(27 / (56 * width**0.5), rel=0.03)
    assert rates[4] == pytest.approx(81 * rates[0], rel=0.05)


def test_updates_that_there_is_no_time_for_are_listed():
    setting = Setting(QUICK._replace(update_s=0.0, steps=1), None, Console(quiet=True))
    found = accelerator.time_updates(setting)
    for layout in ("separate", "stacked"):
        assert list(found[layout]["rows"]) == ["adamw"]
        assert found[layout]["skipped"][0] == "altlora"


def test_training_steps_are_timed_against_adamw():
    setting = Setting(QUICK._replace(step_s=0.0, steps=1), None, Console(quiet=True))
    found = accelerator.time_training(setting)
    (row,) = found["stacked"]["rows"]
    assert row["ratio"] == 1.0
    assert found["width"] == 32


def test_a_decoder_is_pretrained_and_tuned_at_every_rate(tmp_path):
    write_books(tmp_path)
    write_gsm8k(tmp_path)
    sizes = QUICK._replace(pretrain_s=0.05)
    found = accelerator.tune(Setting(sizes, tmp_path, Console(quiet=True)))
    assert found["pretraining_steps"] >= 1
    assert {name: len(runs) for name, runs in found["methods"].items()} == dict.fromkeys(TUNED, 5)
    for runs in found["methods"].values():
        assert all(run["validation"] > 0 for run in runs.values())


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("device lost"), ExperimentError("device lost")]
)
def test_finished_parts_outlive_a_device_that_goes_away(tmp_path, monkeypatch, error):
    calls = []

    def fine(setting):
        calls.append("fine")
        return {"value": 1}

    def lost(setting):
        raise error

    out = tmp_path / "record.json"
    monkeypatch.setattr(accelerator, "PARTS", {"first": fine, "second": lost})
    result = invoke("--out", out, "--quick")
    assert result.exit_code == 1
    assert "Part 'second' failed: device lost" in shown(result)
    assert "record.json: first. Go on with --resume." in shown(result)
    assert list(json.loads(out.read_text())["parts"]) == ["first"]
    refused = invoke("--out", out)
    assert refused.exit_code == 2
    assert "pass --resume to go on" in shown(refused)
    monkeypatch.setattr(accelerator, "PARTS", {"first": fine, "second": fine})
    assert invoke("--out", out, "--quick", "--resume").exit_code == 0
    record = json.loads(out.read_text())
    assert [part["value"] for part in record["parts"].values()] == [1, 1]
    assert calls == ["fine", "fine"]
    assert "is of other sizes" in shown(invoke("--out", out, "--resume"))
    out.write_text(json.dumps(record | {"device": "another"}))
    assert "is of another device" in shown(invoke("--out", out, "--resume"))
