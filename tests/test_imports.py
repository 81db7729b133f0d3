"""Who imports whom: the direction that keeps methods small and the engine ignorant of them."""

import ast
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lowrank_optax"

# What each part may import of this package; a folder stands for its files.
ALLOWED = {
    "factors": {"meshes"},
    "linalg": {"meshes"},
    "meshes": set(),
    "arguments": set(),
    "collectives": set(),
    "batching": {"meshes"},
    "pairwise": {"batching", "factors"},
    "projection": {"arguments", "batching", "factors", "linalg", "pairwise"},
    "shadows": {"arguments", "factors", "linalg"},
    "frames": {"batching", "factors", "linalg"},
    "lorsum": {"arguments", "batching", "factors", "linalg"},
    "methods": {
        "arguments",
        "batching",
        "factors",
        "frames",
        "linalg",
        "lorsum",
        "meshes",
        "pairwise",
        "projection",
        "shadows",
    },
    "nn": {"adapters", "factors", "frames", "linalg", "meshes", "nn", "shadows"},
    "sharding": {"factors", "linalg"},
    "diagnostics": {"factors", "linalg"},
    "adapters": {"factors", "frames", "linalg"},
}
THIRD_PARTY = {"jax", "optax", "numpy"}


def imports(file):
    """Absolute dotted names that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(file):
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def modules():
    return [f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", modules(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_import_direction(file):
    names = {part_of(other) for other in modules()}
    for name in imports(file):
        if name.startswith("lowrank_optax"):
            target = name.split(".")[1]
            target = target if target in names else "factors"  # re-exported by the package
            assert target in ALLOWED[part_of(file)], f"{file.name} must not import {name}"


@pytest.mark.parametrize("file", modules(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_third_party_imports(file):
    allowed = THIRD_PARTY | ({"flax"} if part_of(file) == "nn" else set())
    for name in imports(file):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top != "lowrank_optax":
            assert top in allowed, f"{file.name} must not import {name}"


def test_experiments_use_the_public_interface_only():
    for file in (ROOT / "experiments").rglob("*.py"):
        for name in imports(file):
            assert not re.match(r"lowrank_optax\.(methods|pairwise|projection|arguments)", name), (
                file
            )


def test_init_only_re_exports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    logic = (ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.Try, ast.With)
    assert not [node for node in ast.walk(tree) if isinstance(node, logic)]


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, ROOT],
        check=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "lowrank_optax/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lowrank_optax"}
