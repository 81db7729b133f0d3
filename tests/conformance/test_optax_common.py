"""The installed optax's own suite for contributed optimizers, run on this library's aliases.

Its targets hold no LoRA pairs: this is the promise that the aliases serve any parameter tree.
"""

import importlib.util
import pathlib

import optax.contrib

import lowrank_optax

OPTIMIZERS = tuple(
    {"opt_name": name, "opt_kwargs": kwargs, "wrapper_name": None, "wrapper_kwargs": None}
    for name, kwargs in [
        ("altlora", {"learning_rate": 1e-2}),
        ("altlora", {"learning_rate": 1e-2, "order": "simultaneous"}),
        ("altlora_plus", {"learning_rate": 1e-2}),
        ("altlora_plus", {"learning_rate": 1e-2, "order": "sequential"}),
        ("oplora", {"learning_rate": 1e-2}),
        ("oplora_proj", {"learning_rate": 1e-2}),
        ("scaled_oplora", {"learning_rate": 1e-2}),
        ("sds_lora", {"inner": 1e-2}),
    ]
)
TABLES = "_MAIN_OPTIMIZERS_UNDER_TEST = _ALL_OPTIMIZERS_UNDER_TEST = OPTIMIZERS"


def factory(name):
    """An alias; the suite injects every number, and some of these must be static."""
    alias = getattr(lowrank_optax, name)
    if name == "sds_lora":
        return lambda inner: alias(inner, total_steps=1000)
    if "oplora" in name:
        return lambda learning_rate, momentum=0.9: alias(learning_rate, momentum)
    return alias


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
