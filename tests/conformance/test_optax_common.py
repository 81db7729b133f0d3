"""The installed optax's own suite for contributed optimizers, run on this library's aliases.

Its targets hold no LoRA pairs: this is the promise that the aliases serve any parameter tree. There
other forms of an alias do the same.
"""

import importlib.util
import pathlib

import optax.contrib

from tests.conformance.methods import FIRST_FORMS

ALIASES = {method.name: method for method in FIRST_FORMS if method.is_alias}
OPTIMIZERS = tuple(
    {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": 1e-2},
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    for name in ALIASES
)
TABLES = "_MAIN_OPTIMIZERS_UNDER_TEST = _ALL_OPTIMIZERS_UNDER_TEST = OPTIMIZERS"


def factory(name):
    """A row as the suite wants it: a function of what it injects."""

    def make(learning_rate):
        return ALIASES[name](learning_rate, allow_no_pairs=True)

    return make


def load_suite():
    """Executes optax's test module with its table of optimizers replaced by ours."""
    path = pathlib.Path(optax.contrib.__file__).parent / "_common_test.py"
    source = path.read_text()
    assert source.count("\nclass ContribTest(") == 1
    assert source.count("\ndef _setup_parabola(") == 1
    source = source.replace("\nclass ContribTest(", f"\n{TABLES}\n\nclass ContribTest(")
    source = source.replace(
        "\ndef _setup_parabola(", "\n_get_opt_factory = FACTORY\n\ndef _setup_parabola("
    )
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("optax_suite", None))
    module.__dict__.update(OPTIMIZERS=OPTIMIZERS, FACTORY=factory)
    exec(compile(source, path, "exec"), module.__dict__)
    return module


ContribTest = load_suite().ContribTest


def test_the_suite_runs_our_aliases():
    names = [name for name in dir(ContribTest) if name.startswith("test_")]
    assert len(names) >= 8 * len(OPTIMIZERS)
