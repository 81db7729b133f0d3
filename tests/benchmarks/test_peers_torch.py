"""The comparison with torch: what it times of ours, and what it writes, without torch."""

import json

import typer
from typer.testing import CliRunner

from benchmarks import peers_torch


def test_steps_of_ours_are_timed(monkeypatch):
    monkeypatch.setattr("benchmarks.update_step.N_LAYERS", 1)
    for name in peers_torch.OURS:
        times = peers_torch.times_of_ours(name, rank=2, width=1 / 64, steps=2)
        assert len(times) == 2
        assert min(times) > 0


def test_the_command_compares_medians_of_processes(tmp_path, monkeypatch):
    asked = []

    def in_a_process(name, *numbers):
        asked.append((name, *numbers))
        seconds = 2.0 if name in peers_torch.OURS else 4.0
        return [seconds, 1000.0, seconds, seconds]

    monkeypatch.setattr(peers_torch, "in_a_process", in_a_process)
    monkeypatch.setattr(peers_torch.importlib.metadata, "version", lambda library: "1")
    app = typer.Typer()
    app.command()(peers_torch.main)
    out = tmp_path / "record.json"
    result = CliRunner().invoke(app, ["--rounds", "2", "--steps", "4", "--out", str(out)])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["torch_versions"] == dict.fromkeys(peers_torch.LIBRARIES, "1")
    assert record["pairs"] == 224
    assert [(row["ratio"], row["ours_ms"]) for row in record["rows"]] == [(0.5, 2000.0)] * 3
    everyone = [(name, 16, 0.25, 4) for name in (*peers_torch.OURS, *peers_torch.THEIRS)]
    assert asked == 2 * everyone  # in turn
