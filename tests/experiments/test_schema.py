import os

import pytest

from experiments.errors import ExperimentError
from experiments.schema import current_environment, read_result
from tests.experiments.samples import make_result


def test_a_result_is_not_overwritten(tmp_path):
    path = make_result(loss=0.5).write(tmp_path)
    with pytest.raises(ExperimentError, match="--fresh"):
        make_result(loss=0.4).write(tmp_path)
    assert read_result(path).final["validation"].loss == 0.5


def test_a_failed_run_makes_room(tmp_path):
    make_result(status="failed").write(tmp_path)
    path = make_result(loss=0.4).write(tmp_path)
    assert read_result(path).status == "finished"
    assert list(tmp_path.iterdir()) == [path]


def test_file_names_differ_when_configurations_do():
    config = make_result().config
    changed = [
        config.model_copy(update={"task_options": {"rank": 8}}),
        config.model_copy(update={"method_options": {"order": "sequential"}}),
        config.model_copy(update={"data": {"source": "other"}}),
        config.model_copy(update={"seed": 1}),
        config.model_copy(update={"learning_rate": 1.0000001e-3}),
        config.model_copy(update={"plan": config.plan.model_copy(update={"steps": 3})}),
    ]
    assert len({c.file_name() for c in [config, *changed]}) == 7
    assert config.file_name() == make_result(loss=0.1).config.file_name()


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_failed_write_leaves_nothing_behind(step, tmp_path, monkeypatch):
    earlier = make_result(seed=1).write(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    owner = os if step == "replace" else type(tmp_path)
    monkeypatch.setattr(owner, step, full)
    with pytest.raises(ExperimentError, match="No space left"):
        make_result().write(tmp_path)
    assert list(tmp_path.iterdir()) == [earlier]


def test_a_corrupted_result_is_an_error(tmp_path):
    path = make_result().write(tmp_path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(ExperimentError, match=r"adamw.*not a result of schema 2"):
        read_result(path)


def test_a_result_of_another_schema_is_an_error(tmp_path):
    path = make_result().write(tmp_path)
    path.write_text(path.read_text().replace('"schema_version":2', '"schema_version":0'))
    with pytest.raises(ExperimentError, match="schema_version"):
        read_result(path)


def test_an_edited_configuration_is_an_error(tmp_path):
    path = make_result().write(tmp_path)
    path.write_text(path.read_text().replace('"learning_rate":0.001', '"learning_rate":0.01'))
    with pytest.raises(ExperimentError, match="it was renamed or edited"):
        read_result(path)


def test_the_environment_names_versions_and_device():
    environment = current_environment()
    assert set(environment.packages) >= {"jax", "jaxlib", "flax", "optax", "numpy"}
    assert environment.device
    assert environment.git_commit is None or len(environment.git_commit) == 40
