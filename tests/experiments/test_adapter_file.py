import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

import experiments.workers
from experiments.adapter_file import add_saved, read_adapter, save_adapter
from experiments.adapters import WholeModel
from experiments.errors import ExperimentError
from experiments.schema import Plan
from experiments.study import Study
from experiments.sweep import adapter_path, plan_jobs, read_results
from experiments.trainer import Trainer
from tests.experiments.samples import TINY, make_result
from tests.experiments.test_cli import TINY_RUN, invoke

RANK, LAYERS = TINY["rank"], 6
KINDS = [  # one or more for every kind of pair, and for what has none
    "adamw",
    "polora-start",
    "oplora-2",
    "scaled-oplora",
    "sds-lora",
    "svd-lora",
    "full-adamw",
]
PLAN = Plan(steps=12, eval_every=12, head_learning_rate=1e-2)


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """Trains by a method, once; gives the model and the file."""
    folder = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def train(method):
        trainer = Trainer(tiny_digits, method, PLAN)
        run = trainer.run(1e-2, seed=0)
        wanted = nnx.Any(tiny_digits.head, trainer.method.adapters.trained)
        save_adapter(folder / f"{method}.safetensors", run.model, wanted, run.result)
        return run.model, folder / f"{method}.safetensors"

    return train


def outputs(task, model):
    return np.concatenate([model(batch["image"]) for batch in task.eval_batches("test")])


@pytest.mark.parametrize("method", KINDS)
def test_the_pretrained_model_with_the_file_is_the_trained_model(method, tiny_digits, trained):
    model, path = trained(method)
    saved = read_adapter(path)
    base = tiny_digits.build_model(seed=0, adapters=WholeModel())
    before = outputs(tiny_digits, base)
    add_saved(base, saved)
    after = outputs(tiny_digits, model)
    assert np.abs(after - before).max() > 0.1
    tolerance = 1e-5 * np.abs(after).max()
    np.testing.assert_allclose(outputs(tiny_digits, base), after, atol=tolerance)
    assert saved.metadata["method"] == method
    assert saved.metadata["rank"] == str(RANK)
    assert saved.metadata["result"].endswith(".json")


def test_pairs_are_plain_and_at_their_exact_rank(tiny_digits, trained):
    ranks, scales = {}, {}
    for method in ("adamw", "oplora-2", "sds-lora", "svd-lora", "full-adamw"):
        _, path = trained(method)
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            scales[method] = set(json.loads(file.metadata()["scales"]).values())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
        sides = [name for name in names if name.startswith("pairs/")]
        assert {name.rpartition("/")[2] for name in sides} <= {"a", "b"}
        ranks[method] = {shapes[name][1 if name.endswith("a") else 0] for name in sides}
        rest = {name for name in names if name not in sides}
        if method == "full-adamw":
            assert sides == []
            whole = nnx.state(tiny_digits.build_model(0, WholeModel()), nnx.Param)
            assert len(rest) == len(jax.tree.leaves(whole))
        else:
            assert len(sides) == 2 * LAYERS
            assert rest == {"weights/head/bias", "weights/head/kernel"}
            assert "pairs/blocks/0/attention/query/a" in sides
    assert ranks["adamw"] == ranks["oplora-2"] == ranks["svd-lora"] == {RANK}
    assert ranks["sds-lora"] == {2 * RANK}
    scale = tiny_digits.options.alpha / RANK
    assert scales["adamw"] == scales["oplora-2"] == {scale}
    assert list(scales["sds-lora"]) == [pytest.approx(scale * RANK**0.5)]
    assert scales["svd-lora"] == {1.0}


def test_nothing_is_written_over_and_nothing_half(tiny_digits, tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.safetensors"
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ExperimentError, match=r"cannot write .*x\.safetensors: .*No space"):
            save_adapter(path, model, nnx.Param, make_result())
    assert list(path.parent.iterdir()) == []
    save_adapter(path, model, nnx.Param, make_result())
    before = path.read_bytes()
    model.kernel[...] = jnp.ones((2, 2))
    with pytest.raises(ExperimentError, match=r"x\.safetensors exists, without its result: move"):
        save_adapter(path, model, nnx.Param, make_result())
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ExperimentError, match=r"cannot read .*x\.safetensors"):
        read_adapter(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ExperimentError, match=r"cannot read .*x\.safetensors"):
        read_adapter(path)
    from safetensors.numpy import save_file

    save_file({"x": np.ones(2)}, path)
    with pytest.raises(ExperimentError, match="was not written by --save-adapter"):
        read_adapter(path)


@pytest.fixture
def run_tiny(tiny_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.workers, "load_task", lambda *arguments: tiny_digits)
    options = [f"--override=task_options.{key}={value}" for key, value in TINY.items()]
    fixed = [*TINY_RUN, *options, "--out", tmp_path, "--method=adamw"]
    return lambda *arguments: invoke(*fixed, *arguments)


def test_the_command_line_writes_adapters_beside_results(run_tiny, tmp_path, monkeypatch):
    rates = ["--learning-rate=0.01", "--learning-rate=1e6"]
    code, output = run_tiny("--learning-rate=0.01")
    assert code == 0, output
    (old,) = tmp_path.glob("*.json")
    assert not list(tmp_path.glob("*.safetensors"))

    code, output = run_tiny(*rates, "--learning-rate=0.02", "--resume", "--save-adapter")
    assert code == 0, output
    assert f"1 results in {tmp_path} have no adapter and are not run again" in output
    assert old.name in output
    by_rate = {
        r.config.learning_rate: tmp_path / r.config.file_name() for r in read_results(tmp_path)
    }
    assert [rate for rate, path in by_rate.items() if adapter_path(path).exists()] == [0.02]
    adapter = adapter_path(by_rate[0.02])
    assert read_adapter(adapter).metadata["result"] == by_rate[0.02].name
    content = adapter.read_bytes()

    by_rate[0.02].unlink()
    with monkeypatch.context() as patch:  # it is refused before anything is trained
        patch.setattr(Trainer, "run", lambda *arguments: pytest.fail("trained"))
        code, output = run_tiny("--learning-rate=0.02", "--resume", "--save-adapter")
    assert code == 2
    assert f"{adapter} exists, without its result: move it away" in output
    assert not by_rate[0.02].exists()
    assert adapter.read_bytes() == content

    adapter.rename(tmp_path / "kept")
    code, output = run_tiny("--learning-rate=0.02", "--resume", "--save-adapter")
    assert code == 0, output
    again, kept = read_adapter(adapter), read_adapter(tmp_path / "kept")
    assert jax.tree.all(jax.tree.map(np.array_equal, again[1:], kept[1:]))
    code, output = run_tiny("--learning-rate=0.02", "--fresh")
    assert code == 0, output
    assert not adapter.exists()
    assert (tmp_path / "kept").exists()


def test_a_method_without_adapters_says_what_its_file_holds(run_tiny, tmp_path):
    code, output = run_tiny("--method=full-adamw", "--learning-rate=0.01", "--save-adapter")
    assert code == 0, output
    assert "full-adamw has no adapters: its files hold all the weights that it trains" in output
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("method", ["polora-start", "polora-pissa"])
def test_a_start_that_corrects_the_kernels_is_refused_by_name(method, tmp_path):
    study = Study(
        task="digits",
        plan=PLAN,
        learning_rates={"adamw": (0.1,), method: (0.1,)},
        method_options={"polora-start": {"start": {"keep_function": True}}},
    )

    def plan(**options):
        return plan_jobs(
            "digits", {"": study}, None, tmp_path, resume=False, fresh=False, **options
        )

    assert len(plan()) == 2
    with pytest.raises(ExperimentError, match=f"the start of '{method}' corrects the kernels"):
        plan(save_adapter=True)
