"""Any module of the experiments may be the first to be imported: none is in a circle."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

# One process for all, which forgets the modules of the experiments but not the slow ones of others.
IMPORT_EACH_FIRST = """
import importlib, pkgutil, sys, traceback
import experiments

names = [module.name for module in pkgutil.walk_packages(experiments.__path__, "experiments.")]
assert "experiments.trainer" in names
failed = []
for name in names:
    for loaded in [each for each in sys.modules if each.partition(".")[0] == "experiments"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except ImportError:
        failed.append(name)
        traceback.print_exc()
sys.exit(f"cannot be imported first: {', '.join(failed)}" if failed else 0)
"""


def test_any_module_may_be_imported_first():
    command = [sys.executable, "-c", IMPORT_EACH_FIRST]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
