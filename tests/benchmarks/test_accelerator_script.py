"""The script for an accelerator, small enough for a CPU: its parts, and what outlives a failure."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import accelerator, devices, train_step, tune
from benchmarks.accelerator import FIRST, TOLERANCE, difference_of_devices, products
from benchmarks.record import Item, Part, Record
from benchmarks.sizes import FULL, QUICK, Call
from benchmarks.tune import rates_around_rule
from experiments.tasks.books import BooksOptions
from lowrank_optax import FramedPair, nn
from tests.experiments.tiny_data import write_books, write_gsm8k


def invoke(*arguments):
    app = typer.Typer()
    app.command()(accelerator.main)
    hours = ("--minutes", 600)  # the machine may be busy; the last of two counts
    return CliRunner().invoke(app, [str(argument) for argument in (*hours, *arguments)])


def shown(result):
    """What stands on the screen, without the box that errors stand in and its line breaks."""
    return " ".join(result.output.replace("│", " ").split())


def call_of(folder, **changes):
    return Call(QUICK._replace(**changes), folder, folder / "record.decoder", math.inf)


def keys_of(part):
    return [item.key for item in part.items]


def always(found):
    """A part of one row."""
    return lambda call: Part({}, [Item("row", lambda: found)], ())


@pytest.fixture
def checked_pairs():
    return train_step.make_problem(layers=2, width=8, tokens=16, rank=2, dtype=jnp.float32)


def test_every_public_method_is_checked(tmp_path):
    names = {name.partition(" ")[0] for name in keys_of(accelerator.check(call_of(tmp_path)))}
    assert names == {
        *("adamw", "altlora", "altlora_plus", "lora_fa", "lora_muon", "lora_plus", "lora_pro"),
        *("lora_pro_efficient", "lora_rite", "lora_soap", "oplora", "oplora_proj", "polora"),
        *("reflora", "scaled_adamw", "scaled_oplora", "sds_lora"),
    }


@pytest.mark.parametrize("part", [accelerator.time_updates, accelerator.time_training])
def test_stacked_layers_and_the_methods_that_matter_most_come_first(tmp_path, part):
    keys = keys_of(part(call_of(tmp_path)))
    assert keys[: len(FIRST)] == [f"stacked, {name}" for name in FIRST]
    assert len(set(keys)) == len(keys)
    assert [key.partition(",")[0] for key in keys] == sorted(
        (key.partition(",")[0] for key in keys), reverse=True
    )


def test_steps_of_two_devices_differ_by_nothing_where_they_are_one(checked_pairs):
    assert difference_of_devices("polora", checked_pairs) < 1e-6


@pytest.mark.parametrize("name", ["polora", "altlora", "sds_lora"])
def test_a_device_whose_steps_are_wrong_is_seen(monkeypatch, tmp_path, name):
    """The second run has inputs that are wrong by a hundredth."""
    made, make = [], train_step.make_runner

    def wrong_the_second_time(name, pairs, batch, layout):
        made.append(name)
        return make(name, pairs, batch._replace(x=batch.x * [1.0, 1.01][len(made) - 1]), layout)

    monkeypatch.setattr(train_step, "make_runner", wrong_the_second_time)
    part = accelerator.check(call_of(tmp_path))
    (item,) = (item for item in part.items if item.key == name)
    row = item.find()
    assert row["difference"] > TOLERANCE
    assert row["wrong"]
    assert made == [name, name]


def test_signs_of_singular_vectors_make_no_difference():
    keys = jax.random.split(jax.random.key(0), 4)
    a, f_in = (jax.random.normal(key, (2, 6, 3)) for key in keys[:2])
    b, f_out = (jax.random.normal(key, (2, 3, 5)) for key in keys[2:])
    signs = jnp.array([1.0, -1.0, -1.0])
    rows = signs[:, None]
    one = FramedPair(a, b, f_in, f_out, jnp.zeros(2))
    other = FramedPair(a * signs, b * rows, f_in * signs, f_out * rows, jnp.zeros(2))
    (x,), (y,) = products(one), products([other])
    np.testing.assert_allclose(x, train_step.SCALE * (a @ f_out + f_in @ b), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x, y, rtol=1e-6)


def test_updates_and_training_steps_are_timed_beside_adamw(tmp_path):
    call = call_of(tmp_path, steps=1, calls=1)
    for part in (accelerator.time_updates(call), accelerator.time_training(call)):
        rows = {item.key: item.find() for item in part.items[:2]}
        assert rows["stacked, adamw"]["ratio"] == 1.0
        assert rows["stacked, polora"]["ratio"] > 0
        assert rows["stacked, polora"]["state_mb"] > 0
    assert part.content["width"] == 32
    assert rows["stacked, polora"]["method"] == "polora"


def test_the_rates_of_a_decoder_are_around_those_of_the_rule():
    """The full decoder: 56 layers, of 512x512 and 512x1368."""
    rates = rates_around_rule("polora-start", BooksOptions(**FULL.decoder), 8)
    width = (4 * 512 + 3 * (512 * 1368) ** 0.5) / 7
    assert rates[2] == pytest.approx(27 / (56 * width**0.5), rel=0.03)
    assert rates[4] == pytest.approx(81 * rates[0], rel=0.05)


@pytest.fixture
def data(tmp_path):
    write_books(tmp_path)
    write_gsm8k(tmp_path)
    return tmp_path


def test_a_decoder_is_pretrained_and_tuned(data, monkeypatch):
    """One method: both of its runs have the start of one gradient; a failed run has no loss."""
    starts, start = [], nn.gradient_start
    count = lambda *arguments, **options: (starts.append(1), start(*arguments, **options))
    monkeypatch.setattr("experiments.trainer.nn.gradient_start", count)
    monkeypatch.setattr(accelerator, "QUICK", QUICK._replace(length=32))
    monkeypatch.setattr(tune, "TUNED", ("polora-start",))
    monkeypatch.setattr(tune, "NEAREST_FIRST", (2, 1))
    out = data / "record.json"
    command = ["--quick", "--part", "tune", "--data-dir", data, "--out", out]
    assert invoke(*command).exit_code == 0
    tuned = json.loads(out.read_text())["parts"]["tune"]
    decoder, first, second = tuned["items"].values()
    assert 1 <= decoder["steps_done"] <= QUICK.pretrain_steps
    for run in (first, second):
        assert run["status"] == "finished"
        assert run["loss"] == run["final"]["validation"]["loss"] > 0
        assert len(run["curve"]) == QUICK.tune_steps + 1
    assert first["config"]["learning_rate"] == tuned["rates_by_rule"]["polora-start"]
    assert tuned["note"] == "not a comparison: one seed"
    assert tuned["matmul_precision"] == "default"
    assert len(starts) == 1

    # Another run needs the decoder of the first ones, which lies beside the record.
    monkeypatch.setattr(tune, "NEAREST_FIRST", (2, 1, 3))
    (data / "record.decoder").rename(data / "away")
    assert "is not there (any more)" in invoke(*command, "--resume").output
    (data / "away").rename(data / "record.decoder")
    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "SHARES", {"tune": 1.0})
        patch.setattr(accelerator, "IN_TIME", 1e6)  # a run begins, and lasts too long
        late = invoke(*command, "--resume", "--minutes", 0.001)
    assert late.exit_code == 0
    assert "the time was over after 1 of 2 steps" in late.output
    lost = lambda *arguments: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("device lost"))
    with monkeypatch.context() as patch:
        patch.setattr("experiments.trainer.Trainer._loop", lost)
        assert "FAILED: RuntimeError: device lost" in invoke(*command, "--resume").output
    assert invoke(*command, "--resume").exit_code == 0
    runs = json.loads(out.read_text())["parts"]["tune"]["items"]
    assert [run["status"] for run in runs.values()] == ["finished"] * 4
    assert runs["decoder"] == decoder


@pytest.mark.parametrize(
    ("module", "reason"),
    [("tokenizers", "pip install tokenizers"), ("", "books.txt.xz does not exist")],
)
def test_what_tune_lacks_stops_nothing_else(tmp_path, monkeypatch, module, reason):
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(accelerator.PARTS, "correct", always({"difference": 0.0}))
    out = tmp_path / "record.json"
    parts = ["--part", "tune", "--part", "correct"]
    result = invoke("--quick", *parts, "--data-dir", tmp_path, "--out", out)
    assert result.exit_code == 1, result.output  # it was asked for
    assert reason in shown(result)
    assert result.output.index("tune: left out") < result.output.index("correct, row")
    written = json.loads(out.read_text())["parts"]
    assert reason in written["tune"]["reason"]
    assert written["correct"]["items"]["row"]["difference"] == 0.0


def test_the_script_begins_without_what_experiments_need():
    code = "import sys; from benchmarks import accelerator; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_cpu_alone_is_no_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "jax_option", lambda name: "cpu")
    result = invoke("--out", tmp_path / "record.json")
    assert result.exit_code == 2
    assert "it finds the CPU alone" in shown(result)
    assert "jax[cuda13]" in shown(result)


def test_wrong_steps_end_in_an_error_after_the_other_parts(tmp_path, monkeypatch):
    rows = {"correct": {"difference": 1.0, "wrong": True}, "update": {"x": 1}}
    parts = {name: lambda call, name=name: always(rows[name])(call) for name in rows}
    monkeypatch.setattr(accelerator, "PARTS", parts)
    result = invoke("--quick", "--out", tmp_path / "record.json")
    assert result.exit_code == 1
    assert "WRONG: correct, row" in shown(result)
    assert list(json.loads((tmp_path / "record.json").read_text())["parts"]) == list(rows)
    rows["correct"] = {"difference": 0.0, "wrong": False}  # mended
    resumed = invoke("--quick", "--resume", "--out", tmp_path / "record.json")
    assert resumed.exit_code == 0, resumed.output


def test_a_record_is_gone_on_with_only_where_that_is_asked_for(tmp_path, monkeypatch):
    out, made = tmp_path / "record.json", []
    part = lambda call: Part({"rank": 4}, [Item("row", lambda: made.append(1) or {"x": 1})], ())
    monkeypatch.setattr(accelerator, "PARTS", {"update": part})
    assert invoke("--out", out, "--quick").exit_code == 0
    refused = invoke("--out", out, "--quick")
    assert refused.exit_code == 2
    assert "pass --resume to go on" in shown(refused)
    assert invoke("--out", out, "--quick", "--resume").exit_code == 0
    assert made == [1]
    record = json.loads(out.read_text())
    assert len(record["calls"]) == 2
    assert record["parts"]["update"]["items"]["row"]["call"] == 0
    of_rank_4 = part
    monkeypatch.setitem(
        accelerator.PARTS, "update", lambda call: of_rank_4(call)._replace(content={"rank": 8})
    )
    assert "another rank (4, now 8): pass another --out" in shown(
        invoke("--out", out, "--quick", "--resume")
    )
    out.write_text(json.dumps(record | {"quick": False}))
    assert "has another quick (False)" in shown(invoke("--out", out, "--quick", "--resume"))
    out.write_text(json.dumps(record | {"device": "TPU v0"}))
    assert "has another device (TPU v0)" in shown(invoke("--out", out, "--quick", "--resume"))
    assert "parts are: update" in shown(invoke("--out", out, "--quick", "--part", "all"))
    out.write_text('{"calls": [')
    assert "is not JSON" in shown(invoke("--out", out, "--quick", "--resume"))
    out.write_text("{}")
    assert "is no record of this benchmark" in shown(invoke("--out", out, "--quick", "--resume"))


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("no memory"), KeyError("no memory")])
def test_one_row_that_fails_is_no_end(tmp_path, monkeypatch, error):
    """It is written, is no end, makes the status 1, and is made again when resumed."""
    out, broken = tmp_path / "record.json", [error]

    def row():
        if broken:
            raise broken.pop()
        return {"x": 1}

    items = [Item("first", row), Item("second", lambda: {"x": float("nan")})]
    monkeypatch.setattr(accelerator, "PARTS", {"update": lambda call: Part({}, items, ["x"])})
    result = invoke("--out", out, "--quick")
    assert result.exit_code == 1
    assert "update, first: FAILED: " in result.output
    assert "update, second: x nan" in result.output
    rows = json.loads(out.read_text())["parts"]["update"]["items"]
    assert "no memory" in rows["first"]["error"]
    assert "raise broken.pop()" in rows["first"]["traceback"]
    assert invoke("--out", out, "--quick", "--resume").exit_code == 0
    rows = json.loads(out.read_text())["parts"]["update"]["items"]
    assert rows["first"]["x"] == 1
    assert rows["second"]["x"] == "nan"


def test_rows_are_on_the_disk_before_the_next_begins_and_end_in_time(tmp_path, monkeypatch):
    now, seen, out = [0.0], [], tmp_path / "record.json"
    monkeypatch.setattr("benchmarks.record.time.monotonic", lambda: now[0])

    def takes(seconds):
        def find():
            seen.append(json.loads(out.read_text())["parts"]["step"])
            now[0] += seconds
            return {}

        return find

    items = [Item(name, takes(3.0), "slow") for name in "abcd"]
    items += [Item("e", takes(0.5), "quick"), Item("f", takes(9.0), "long", seconds=9.0)]
    record = Record(out, "accelerator", 0.0, quick=True)
    record.carry_out("step", Part({"width": 1}, items, ()), until=8.0)
    assert [list(part["items"]) for part in seen] == [[], ["a"], ["a", "b"]]
    assert seen[0]["skipped"] == list("abcdef")
    part = json.loads(out.read_text())["parts"]["step"]
    assert list(part["items"]) == ["a", "b", "e"]
    assert part["skipped"] == ["c", "d", "f"]
    assert part["width"] == 1


def test_a_record_says_what_ran_and_where(tmp_path):
    Record(tmp_path / "record.json", "accelerator", 0.0).write()
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["versions"].keys() == {"jax", "jaxlib", "flax", "optax", "numpy"}
    assert record["device"] == jax.devices()[0].device_kind
    assert record["source"].startswith("sha256 ")
    assert {"git_commit", "git_dirty"} <= record.keys()
