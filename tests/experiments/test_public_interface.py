"""Experiments, examples and benchmarks use the library as any user would: public names only."""

import ast
import pathlib
import re
import types

import pytest

import lowrank_optax

ROOT = pathlib.Path(__file__).parents[2]
INTEGRATIONS = ROOT / "lowrank_optax" / "integrations"
FILES = [
    file
    for folder in ("experiments", "examples", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
]

# What typing.NamedTuple documents, although it begins with an underscore.
OF_NAMED_TUPLES = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}


# Methods of `nn.gradient_start`.
STARTS = {"lora_one", "lora_ga"}
# Modules of PEFT in torch, which `benchmarks/peers_torch.py` makes by hand.
OF_PEFT = {"lora_A", "lora_B"}


def violations(source):
    """What a file uses that is not public, and the names of leaves that it spells out itself."""
    tree = ast.parse(source)
    used, stands_for = imports(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, *path = chain(node)
            used |= {".".join([name, *path]) for name in stands_for.get(root, ())}
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if is_private(node.attr) and not own:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used |= set(re.findall(r"\blowrank_optax(?:\.\w+)+", node.value))
            found += [
                f"line {node.lineno}: the key {key!r}"
                for key in re.findall(r"\blora_\w*", node.value)
                if key not in {*lowrank_optax.__all__, *lowrank_optax.nn.__all__, *STARTS, *OF_PEFT}
            ]
    return found + sorted(name for name in used if not is_public(name))


def imports(tree):
    """What is imported of the library, as dotted paths, and the paths that a local name stands for.

    These are several where a name is imported twice.
    """
    imported, stands_for = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                if top == "lowrank_optax":
                    imported.add(alias.name)
                    path = alias.name if alias.asname else top
                    stands_for.setdefault(alias.asname or top, set()).add(path)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                if path.partition(".")[0] == "lowrank_optax":
                    imported.add(path)
                    stands_for.setdefault(alias.asname or alias.name, set()).add(path)
    return imported, stands_for


def chain(node):
    """The names of a dotted expression; the root is none if it is no name."""
    path = []
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    return [node.id if isinstance(node, ast.Name) else "", *reversed(path)]


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name not in OF_NAMED_TUPLES


def public_names_of(file):
    """The `__all__` of a file, which is not imported: its library may not be installed."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def is_public(dotted):
    """Whether each name is in the `__all__` of the module it is taken from, and none is private."""
    if found := re.fullmatch(r"lowrank_optax\.integrations\.(\w+)\.(\w+)", dotted):
        return found[2] in public_names_of(INTEGRATIONS / f"{found[1]}.py")
    value = lowrank_optax
    for name in dotted.split(".")[1:]:
        is_module = isinstance(value, types.ModuleType)
        if is_private(name) or (is_module and name not in getattr(value, "__all__", dir(value))):
            return False
        value = getattr(value, name) if is_module else None  # what classes hold is not listed
    return True


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_public_names_are_used(file):
    assert not violations(file.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "from lowrank_optax._core import linalg",
        "from lowrank_optax._core.linalg import gram",
        "import lowrank_optax._core.linalg",
        "import lowrank_optax.nn.config",
        "from lowrank_optax import integrations; integrations.qwix._pair",
        "from lowrank_optax import integrations; integrations.qwix.flax_util",
        "import lowrank_optax.nn.config as settings",
        "from lowrank_optax.nn.config import Initializer",
        "from lowrank_optax.nn import config",
        "from lowrank_optax import methods",
        "from lowrank_optax import *",
        "from lowrank_optax import nn\nx = nn.config.Initializer",
        "from lowrank_optax import nn as layers\nx = layers.summary",
        "import lowrank_optax as lo\nlo.engine.pairing.find_pairs(x)",
        "def f():\n    import lowrank_optax\n    return lowrank_optax._core",
        "from lowrank_optax import find_pairs\nfind_pairs(x)._paired",
        "from lowrank_optax import LoRAPair\nLoRAPair._secret",
        "import importlib\nimportlib.import_module('lowrank_optax._core')",
        "x = params['lora_a']",
        "x = f'lora_{side}'",
    ],
)
def test_other_names_are_found(source):
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "from lowrank_optax import nn\nx: nn.Initializer",
        "import lowrank_optax as lo\nlo.nn.LoRAConfig(rank=2).scale",
        "import lowrank_optax.engine\nlowrank_optax.engine.lift",
        "from lowrank_optax.sharding import fsdp",
        "from lowrank_optax import LoRAPair\nLoRAPair(1, 2)._replace(a=3)",
        "x = METHODS['lora_plus']",
        "import other\nother.config",
    ],
)
def test_public_names_are_not(source):
    assert not violations(source)
