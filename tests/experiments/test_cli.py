import contextlib
import io
import json
import re
from itertools import pairwise

import huggingface_hub
import pytest

import experiments.workers
from experiments.__main__ import main
from experiments.errors import ExperimentError
from experiments.methods import METHODS
from experiments.study import (
    expand,
    load_study,
    override,
    parse_overrides,
    select,
    study_names,
)
from tests.experiments.samples import TINY, make_result
from tests.experiments.tiny_models import BERT, LLAMA, ROBERTA

TINY_RUN = [
    "run",
    "digits",
    "--variant=peers",
    "--override=plan.eval_every=3",
    "--steps=3",
    "--seed=0",
]
NAMES = ", ".join(study_names())


def invoke(*arguments):
    """Returns the exit status, and what stands on the screen with each run of blanks as one."""
    code, output = 0, io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code or 0
    return code, re.sub(r"\s+", " ", output.getvalue())


def test_run_writes_results_and_figure_then_goes_on_from_them(tmp_path, tiny_digits, monkeypatch):
    def load_tiny(name, options, data_dir, on_step):
        assert (name, data_dir) == ("digits", None)
        return tiny_digits

    monkeypatch.setattr(experiments.workers, "load_task", load_tiny)
    options = [f"--override=task_options.{key}={value}" for key, value in TINY.items()]

    def run(*arguments):
        return invoke(*TINY_RUN, *options, "--method=adamw", "--out", tmp_path, *arguments)

    code, output = run("--learning-rate=0.01")
    assert code == 0, output
    (first,) = tmp_path.glob("*.json")
    content = first.read_bytes()
    losses = json.loads(content)["train_losses"]
    assert json.loads(content)["status"] == "finished"
    assert (tmp_path / "peers.png").stat().st_size > 10_000

    code, output = run("--learning-rate=0.01", "--learning-rate=0.001", "--resume")
    assert code == 0, output
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert first.read_bytes() == content

    first.write_text("{")
    code, output = run("--learning-rate=0.01", "--resume")
    assert code == 2
    assert "not a result of schema" in output
    assert first.read_text() == "{"
    first.unlink()
    code, output = run("--learning-rate=0.01", "--fresh")
    assert code == 0, output
    (again,) = tmp_path.glob("*.json")
    assert json.loads(again.read_bytes())["train_losses"] == losses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nonsense"], f"unknown study 'nonsense'; there are: {NAMES}"),
        (["run", "digits", "--method=adam"], "unknown method 'adam'; there are: adamw, "),
        (["run", "digits", "--method=altlora-sequential"], "pass --learning-rate"),
        (["run", "linear", "--variant=other"], "there are: stochastic, deterministic"),
        (
            ["run", "fine-tune", "--task=nothing"],
            "unknown task 'nothing'; there are: authors, books, cifar",
        ),
        (["run", "fine-tune", "--task=gsm8k"], "task_options.model: Field required"),
        (
            ["run", "digits", "--model=roberta-base"],
            "task 'digits' has a model of its own and takes no --model; these take one, as "
            "--task: cifar100, gsm8k, mnli",
        ),
        (["run", "fine-tune", "--task=mnist", "--model=x"], "task 'mnist' has a model of its own"),
        (["run", "fine-tune", "--model=./nowhere"], "--model ./nowhere: there is no such folder"),
        (["run", "linear", "--resume", "--fresh"], "pass one of the two; nothing was deleted"),
        (["run", "gsm8k"], "w128: there is no such folder; it must hold config.json"),
        (["pretrain", "--width=4"], "task_options.width: Input should be greater than or equal"),
        (["pretrain", "--learning-rate=0"], "--learning-rate: 0 is not a positive number"),
        (["runn"], "invalid choice: 'runn'"),
        (["run", "linear", "--jobs=0"], "--jobs: 0 is below 1"),
        (["run", "linear", "--jobs=two"], "argument --jobs: invalid"),
        (["run", "linear", "--other"], "unrecognized arguments: --other"),
        (["report", "--results=no/such/folder"], "no/such/folder does not exist"),
        (["run", "digits", "--override=plan.stops=3"], "unknown override 'plan.stops'"),
        (["run", "digits", "--override=task_options.size=3"], "task_options.rank"),
        (["run", "digits", "--override=task_options.rank=big"], "task_options.rank: "),
        (["run", "digits", "--override=plan.steps"], "not of the form key=value"),
        (["run", "digits", "--steps=0"], "plan.steps: Input should be greater than 0"),
        (["run", "digits", "--learning-rate=-1"], "needs positive learning rates"),
        (["run", "digits", "--data-dir=."], "take no --data-dir"),
        (["run", "glue-sst2", "--data-dir=no/such/folder"], "no/such/folder/train.tsv does not"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(
    arguments, message, tmp_path, tmp_path_factory, monkeypatch
):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # where nothing was pretrained
    out = ["--out", tmp_path] if arguments[0] == "run" else []
    code, output = invoke(*arguments, *out)
    assert code == 2
    assert message in output
    assert output.count("Error: ") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "config"), [("mnli", LLAMA), ("gsm8k", BERT), ("cifar100", ROBERTA)]
)
def test_a_model_of_another_kind_is_refused_before_anything_is_fetched_or_deleted(
    task, config, tmp_path, monkeypatch
):
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    result = make_result().write(out)
    fetched = []

    def fetch(name, allow_patterns):
        fetched.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for model in (folder, "someone/something"):
        arguments = ["--task", task, "--model", model, "--method=adamw", "--learning-rate=1"]
        code, output = invoke("run", "fine-tune", *arguments, "--fresh", "--out", out)
        assert code == 2
        assert output.startswith(
            f"Error: --model {model} for task '{task}': {folder}/config.json: "
        )
        assert f"model_type is '{config['model_type']}'; this task takes '" in output
    assert fetched == [("someone/something", ["config.json"])]
    assert result.exists()


def test_list_names_every_study_and_method():
    code, output = invoke("list")
    assert code == 0
    for name in [*study_names(), *METHODS]:
        assert f" {name} " in output


@pytest.mark.parametrize("name", study_names())
def test_studies_are_fair_and_their_smoke_is_valid(name):
    file = load_study(name)
    assert f"python -m experiments run {name}" in file.description
    variants = expand(file.study, {}, []).values()
    beside_adamw = [(s.plan, s.task_options) for s in variants if "adamw" in s.learning_rates]
    for study in variants:
        assert (study.plan, study.task_options) in beside_adamw
        for rates in study.learning_rates.values():
            assert len(rates) == 1 or len(rates) >= 3  # given ones, or a sweep, which grows
            assert all(2.5 < b / a < 4 for a, b in pairwise(rates))
        assert len(study.seeds) >= 3 or name == "layers"  # which looks for rates, not for losses
    for study in expand(file.study, file.smoke, []).values():
        assert study.runs() <= 6


def test_overrides_are_json_or_text():
    changes = parse_overrides(["seeds=[3,4]", "task_options.targets=query|key", "plan.steps=7"])
    study = override(load_study("digits").study, changes)
    assert study.seeds == (3, 4)
    with pytest.raises(ExperimentError, match="seeds"):
        override(study, {"seeds": [-1]})
    assert study.task_options["targets"] == "query|key"
    assert study.plan.steps == 7
    assert load_study("digits").study.plan.steps != 7


def test_select_narrows_and_replaces_the_sweep():
    study = load_study("digits").study
    assert list(select(study, ["polora"], []).learning_rates) == ["polora"]
    chosen = select(study, ["altlora-sequential"], [0.5])
    assert chosen.learning_rates == {"altlora-sequential": (0.5,)}
    assert chosen.runs() == len(study.seeds)
    with pytest.raises(ExperimentError, match="unknown method"):
        select(study, ["adam"], [0.1])
