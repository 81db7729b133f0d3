"""Each example in a small form: its loss falls, its adapter reads back, nothing is replaced."""

import contextlib
import importlib
import importlib.util
import io
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lowrank_optax import adapters, checkpoints

typer = pytest.importorskip("typer", reason="the examples need typer")

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
    "nnx_classification": {"steps": 60},
    "linen_frozen_base": {"steps": 60},
    "multi_device": {"steps": 30},
    "qwix_tunix": {"steps": 100, "rank": 4},
}
MODULES = {
    "nnx_classification": {"first", "second", "head"},
    "linen_frozen_base": {"first", "second", "head"},
    "multi_device": {"up", "down"},
    "qwix_tunix": {
        f"model.layers.{layer}.{name}_proj"
        for layer in (0, 1)
        for name in ("mlp.down", "mlp.gate", "mlp.up", *(f"self_attn.{x}" for x in "qkvo"))
    },
}
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def example(name):
    """Imports an example, or says why it does not run here."""
    needed = {"qwix_tunix": ["qwix", "tunix"]}.get(name, ["sklearn"])
    missing = [library for library in needed if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"examples/{name}.py not run: {', '.join(missing)} is not installed")
    return importlib.import_module(f"examples.{name}")


@pytest.mark.parametrize("name", SMALL)
def test_an_example(name, tmp_path, capsys):
    module, out = example(name), tmp_path / "adapter"
    before, after = module.main(**SMALL[name], out=out)
    assert after < (0.97 if name == "qwix_tunix" else 0.5) * before
    assert set(adapters.read_peft(out).pairs) == MODULES[name]
    printed = capsys.readouterr().out
    assert f"{before:.3f}"[:4] in printed
    assert "Next:" in printed
    assert "100%" in printed  # the progress bar's last line


@pytest.mark.parametrize("name", SMALL)
def test_an_adapter_is_replaced_only_on_demand(name, tmp_path, capsys):
    module, out = example(name), tmp_path / "adapter"
    out.mkdir()
    (out / "mine").touch()
    for overwrite in (False, True):  # what is no adapter, stays
        with pytest.raises(typer.BadParameter, match="exists"):
            module.main(out=out, overwrite=overwrite)
    assert (out / "mine").exists()
    if name == "linen_frozen_base":
        (out / "adapter_config.json").touch()
        module.main(steps=2, out=out, overwrite=True)
        assert not (out / "mine").exists()
        assert adapters.read_peft(out).pairs


def test_the_language_model_resumes_bit_by_bit(tmp_path, monkeypatch, capsys):
    """A run that dies within an accumulation, and one whose last act was not the adapter."""
    from examples import nnx_language_model

    text = tmp_path / "text"
    text.write_text("Grüße, und noch einmal. " * 200, encoding="utf-8")
    sizes = {"text": text, "steps": 22, "accumulate": 4, "base_steps": 10, "every": 6}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    losses = nnx_language_model.main(**sizes, folder=whole)
    assert losses[1] < 0.97 * losses[0]

    save = checkpoints.save

    def save_and_die(folder, step, **trees):
        save(folder, step, **trees)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(nnx_language_model.checkpoints, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            nnx_language_model.main(**sizes, folder=resumed)
    assert not (resumed / "adapter").exists()
    assert nnx_language_model.main(**sizes, folder=resumed) == losses
    assert "goes on after 6 of 22" in capsys.readouterr().out
    assert checkpoints.steps(resumed / "checkpoints") == [18, 22]
    one, other = (adapters.read_peft(run / "adapter").pairs for run in (whole, resumed))
    assert len(one) == 12
    assert one.keys() == other.keys()
    for name, pair in one.items():
        np.testing.assert_array_equal(pair.a, other[name].a)
        np.testing.assert_array_equal(pair.b, other[name].b)
        assert np.any(pair.b)
    with pytest.raises(typer.BadParameter, match="complete"):
        nnx_language_model.main(**sizes, folder=resumed)
    assert "def parse_args" in nnx_language_model.SOURCE.read_text()  # the text by default


@pytest.mark.parametrize("name", NAMES)
def test_help(name):
    """The options are those of `main`, each in the help."""
    module = example(name)
    printed = io.StringIO()
    app = typer.Typer()
    app.command()(module.main)
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        app(["--help"])
    assert ended.value.code == 0
    for option in typer.main.get_command(app).params:
        assert option.opts[0][:12] in printed.getvalue()
    assert f"python -m examples.{name} " in module.__doc__


def test_from_the_command_line(tmp_path):
    """As a reader starts it, with virtual devices."""
    line = [sys.executable, "-m", "examples.multi_device", "--devices", "4", "--steps", "20"]
    line += ["--out", str(tmp_path / "adapter")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 devices of the kind cpu" in done.stdout
    assert "on each device (64, 1024)" in done.stdout
    assert set(adapters.read_peft(tmp_path / "adapter").pairs) == {"up", "down"}
