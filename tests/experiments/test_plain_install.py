"""What works, and what is said, where only `pip install .` was run."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments.errors import EXTRA, INSTALL
from experiments.methods import METHODS
from experiments.start import Start, parse_start
from experiments.study import load_study, study_names
from experiments.tasks import TASKS, check_task

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS_ONLY = {"typer"}  # of benchmarks and examples

# None in sys.modules makes an import fail as that of a package which is not installed.
COMMAND = """
import atexit, sys
missing, *arguments = sys.argv[1:]
sys.modules |= dict.fromkeys(missing.split(","))
atexit.register(lambda: print("jax was imported" if "jax" in sys.modules else "no jax"))
from experiments.__main__ import main
main(arguments)
"""
ALL = ",".join([*EXTRA, *SCRIPTS_ONLY])


def run_without(missing, *arguments):
    command = [sys.executable, "-c", COMMAND, missing, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def names(requirements):
    return {re.match(r"[\w-]+", requirement).group() for requirement in requirements}


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["run", "--help"], ["demo", "--help"], ["report", "--help"]]
)
def test_help_needs_neither_extras_nor_jax(arguments):
    done = run_without(ALL, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m experiments")
    assert done.stdout.endswith("no jax\n")


def test_list_needs_neither_extras_nor_jax():
    done = run_without(ALL, "list")
    assert (done.returncode, done.stderr) == (0, "")
    for name in study_names():
        title = load_study(name).description.splitlines()[0]
        assert f"  {name:28}{title}\n" in done.stdout
    for name, method in METHODS.items():
        assert f"  {name:28}{method.summary}\n" in done.stdout
    assert done.stdout.endswith("no jax\n")


@pytest.mark.parametrize(
    ("missing", "package", "arguments"),
    [
        (ALL, "matplotlib", ["demo"]),
        (ALL, "matplotlib", ["report"]),
        ("pydantic", "pydantic", ["run", "linear"]),
        ("sklearn", "scikit-learn", ["run", "digits"]),
        ("gguf", "gguf", ["run", "lm"]),
    ],
)
def test_a_missing_extra_names_the_command_that_installs_it(missing, package, arguments, tmp_path):
    out = [] if arguments == ["report"] else ["--out", tmp_path]
    done = run_without(missing, *arguments, *out)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"Error: {package} is not installed; ")
    assert done.stderr.endswith(f": {INSTALL}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_task_needs_only_its_own_packages(tmp_path):
    arguments = ["run", "linear", "--smoke", "--method=adamw", "--variant=stochastic"]
    done = run_without("datasets,tokenizers,gguf", *arguments, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_other_missing_modules_are_mistakes_in_the_code():
    done = run_without("statistics", "run", "linear")
    assert "Traceback" in done.stderr


def test_the_extra_is_what_the_experiments_import():
    extra = names(PROJECT["optional-dependencies"]["experiments"])
    assert extra == {*EXTRA.values()} | SCRIPTS_ONLY
    of_core = names(PROJECT["dependencies"]) | {"numpy"}  # which JAX brings
    imported = set()
    for file in (ROOT / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"experiments", "lowrank_optax"} - of_core
    assert others == set(EXTRA)
    assert INSTALL == "pip install '.[experiments]'"


def test_tables_that_import_nothing_say_what_is_there():
    for name in TASKS:
        if name not in ("cifar100", "gsm8k", "mnli", "shakespeare"):  # they need a model
            check_task(name, {})
    start = METHODS["adamw-start"].options["start"]
    assert Start().model_dump() == start
    for method in METHODS.values():
        options = method.options.get("start", start)
        assert parse_start(options).model_dump() == options
