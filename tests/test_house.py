"""The house: who imports whom, how long a file may be, what is public, what help() shows."""

import ast
import importlib
import math
import pathlib
import pydoc
import re
import subprocess
import sys
import zipfile

import pytest

import lowrank_optax

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lowrank_optax"
PUBLIC_MODULES = {
    "adapters",
    "checkpoints",
    "diagnostics",
    "engine",
    "integrations",
    "methods",
    "nn",
    "plots",
    "sharding",
    "specs",
}

# What each part may import of this package. Files of `_core` stand in order, each may import the
# ones before it.
CORE = (
    "arguments",
    "meshes",
    "decompositions",
    "linalg",
    "moments",
    "roots",
    "nodes",
    "names",
    "layouts",
    "readings",
    "suspects",
    "pairing",
    "requirements",
    "scales",
    "states",
    "batching",
    "notices",
    "verbs",
    "restart",
    "projection",
    "equivalent",
    "frames",
    "reframing",
    "sketch",
    "lorsum",
    "krylov",
    "seals",
    "shadow_layer",
    "shadows",
    "gradient_scaling",
)
ALLOWED = {
    "engine": {"_core"},
    "methods": {"_core", "engine"},
    "nn": {"_core", "nn"},
    "sharding": {"_core", "sharding"},
    "checkpoints": {"_core", "checkpoints"},
    "diagnostics": {"_core"},
    "adapters": {"_core", "adapters", "nn"},
    "specs": {"_core"},
    "integrations": {"_core", "engine", "nn", "integrations", "specs"},
    "plots": {"adapters"},
    "_command_line": {"adapters", "plots"},
    "__main__": {"_command_line"},
}
THIRD_PARTY = {"jax", "optax", "numpy"}
OF_PART = {
    "nn": {"flax", "rich"},
    "adapters": {"flax"},
    "checkpoints": {"orbax"},
    "specs": {"flax"},
    "integrations": {"flax", "keras", "qwix"},
    "plots": {"matplotlib"},
    "_command_line": {"rich", "safetensors", "typer"},
}

METHODS = [
    "altlora",
    "altlora_plus",
    "lora_fa",
    "lora_muon",
    "lora_plus",
    "lora_pro",
    "lora_pro_efficient",
    "lora_rite",
    "lora_soap",
    "oplora",
    "oplora_proj",
    "pair_of_delta",
    "polora",
    "reflora",
    "scale_by_inverse_sqrt_gram",
    "scaled_adamw",
    "scaled_oplora",
    "sds_lora",
    "svd_lora",
]
LINES, COLUMNS = 60, 100  # of a screen; Python 3.13 shows one parameter a line


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


def parts_of(file):
    return file.relative_to(PACKAGE).with_suffix("").parts


def modules():
    return [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]


each_module = pytest.mark.parametrize("file", modules(), ids=lambda f: "/".join(parts_of(f)))


@each_module
def test_import_direction(file):
    part, *rest = parts_of(file)
    for name in imports(file):
        if not name.startswith("lowrank_optax."):
            continue
        _, target, *below = name.split(".")
        if part == "_core" and rest != ["__init__"]:
            assert target == "_core", f"{file.name} must not import {name}"
            assert CORE.index(below[0]) < CORE.index(rest[0]), f"{file.name} imports {name}"
        else:
            assert target in ALLOWED[part], f"{file.name} must not import {name}"


@each_module
def test_third_party_imports(file):
    allowed = THIRD_PARTY | OF_PART.get(parts_of(file)[0], set())
    for name in imports(file):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top != "lowrank_optax":
            assert top in allowed, f"{file.name} must not import {name}"


@each_module
def test_files_are_short(file):
    lines = len(file.read_text().splitlines())
    assert lines <= (250 if parts_of(file)[0] == "methods" else 400)


@each_module
def test_nobody_asks_for_the_kind_of_a_pair_but_its_own_file(file):
    """What a pair does it says itself; `scale_gradients` is about shadows alone."""
    homes = {"FramedPair": "frames", "ShadowedPair": "gradient_scaling"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            for kind in names & set(homes):
                assert parts_of(file)[-1] == homes[kind], f"{file.name} asks for a {kind}"


def test_what_is_not_public_is_private_by_name():
    names = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in modules()}
    assert {name for name in names if not name.startswith("_")} == PUBLIC_MODULES
    for name in lowrank_optax.__all__:
        assert hasattr(lowrank_optax, name)
    for name in ("engine", "nn", "sharding"):
        module = importlib.import_module(f"lowrank_optax.{name}")
        assert all(hasattr(module, public) for public in module.__all__)


@pytest.mark.parametrize("name", METHODS)
def test_help_fits_a_screen(name):
    text = pydoc.plain(pydoc.render_doc(getattr(lowrank_optax, name)))
    wrapped = sum(max(1, math.ceil(len(line) / COLUMNS)) for line in text.splitlines())
    assert wrapped <= LINES


def test_the_list_of_methods_is_complete():
    public = {name for name in lowrank_optax.__all__ if name[0].islower()}
    made_by_methods = {
        name
        for name in public
        if getattr(getattr(lowrank_optax, name), "__module__", "").startswith(
            "lowrank_optax.methods"
        )
    }
    assert made_by_methods == set(METHODS)


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


def test_the_version_is_the_same_everywhere():
    """The wheel takes it from the package; the citation and the changelog repeat it."""
    version = lowrank_optax.__version__
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version
    released = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == version
    assert f"The version is {version}." in (ROOT / "README.md").read_text()
