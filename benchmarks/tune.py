"""The part "tune": a decoder is pretrained on books, then adapted to GSM8K by three methods.

What it needs beyond the other parts' packages is imported where it is used.
"""

import functools
import importlib.util
import itertools
import json
import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.devices import jax_option
from benchmarks.record import Item, LeftOutError, Part
from benchmarks.sizes import Call, Sizes

if TYPE_CHECKING:
    from experiments.schema import RunResult
    from experiments.tasks.books import Books, BooksOptions
    from experiments.trainer import Trainer

TUNED = ("adamw", "polora-start", "altlora-plus-simultaneous")
NEAREST_FIRST = (2, 1, 3, 0, 4)
SEED = 0
FIRST_RUN_S = 30.0
"""Seconds that the first run may take: most of them compiling."""

NEEDED = ("datasets", "pydantic", "safetensors", "tokenizers")


def tune(call: Call) -> Part:
    """Pretrains a decoder, then adapts it to GSM8K, every method at the rate of its rule first."""
    from experiments.schema import Plan
    from experiments.tasks.books import BooksOptions
    from experiments.tasks.gsm8k import GSM8K, GSM8KOptions

    sizes, decoder = call.sizes, BooksOptions(**call.sizes.decoder)
    options = GSM8KOptions(
        model=str(call.decoder.absolute()),
        max_length=sizes.length,
        batch_size=sizes.batch_size,
        eval_limit=sizes.eval_limit,
        dtype="float32",
    )
    every = max(1, sizes.tune_steps // 10)
    plan = Plan(steps=sizes.tune_steps, eval_every=every, head_learning_rate=1e-3)
    task = functools.cache(lambda: GSM8K(options, call.data_dir))
    trainer = functools.cache(lambda method: make_trainer(task(), method, plan))

    def adapt(method: str, rate: float) -> dict[str, Any]:
        if not call.decoder.is_dir():
            raise LeftOutError(
                f"{call.decoder}, the decoder, is not there (any more): another --out makes one"
            )
        run = trainer(method).run(rate, SEED, call.require_time).result
        if run.status == "failed":
            raise RuntimeError(run.error)
        return kept_of(run)

    rates = {method: rates_around_rule(method, decoder, options.rank) for method in TUNED}
    make = functools.partial(pretrained, call, decoder)
    items = [Item("decoder", make, "decoder", sizes.pretrain_s)]
    for at, method in itertools.product(NEAREST_FIRST, TUNED):
        kind = "first run" if at == NEAREST_FIRST[0] else "run"
        find = functools.partial(adapt, method, rates[method][at])
        items.append(Item(f"{method}, {rates[method][at]:g}", find, kind, FIRST_RUN_S))
    content = {
        "note": "not a comparison: one seed",
        "seed": SEED,
        "rates_by_rule": {method: found[NEAREST_FIRST[0]] for method, found in rates.items()},
        "matmul_precision": jax_option("jax_default_matmul_precision") or "default",
    }
    return Part(content, items, ("status", "loss", "steps_done", "median_step_seconds"))


def pretrained(call: Call, options: "BooksOptions") -> dict[str, Any]:
    """Pretrains the decoder unless it is there, in about `pretrain_s` with the host's work."""
    from experiments.decoder import RECORD_FILE, make_decoder
    from experiments.errors import ExperimentError
    from experiments.schema import RunResult
    from experiments.tasks.books import Books

    if not call.decoder.is_dir():
        end, on_step = time.monotonic() + call.sizes.pretrain_s, call.require_time
        books, rate = Books(options, call.data_dir), 0.4 / options.width
        steps = steps_until(end, books, rate, call.sizes)
        make_decoder(books, call.decoder, steps=steps, learning_rate=rate, on_step=on_step)
    run = RunResult.model_validate_json((call.decoder / RECORD_FILE).read_text())
    if run.config.task_options != options.model_dump(mode="json"):
        raise ExperimentError(f"{call.decoder} is of other sizes: pass another --out")
    return kept_of(run)


def kept_of(run: "RunResult") -> dict[str, Any]:
    """Returns what a record keeps of a run, by way of text, in which infinities survive."""
    stored = json.loads(run.model_dump_json(exclude={"environment", "error"}))
    return {"loss": run.final["validation"].loss, **stored}


def steps_until(end: float, task: "Books", rate: float, sizes: Sizes) -> int:
    """Measures how many steps of the pretraining fit; most often all that are wanted.

    The plan is that of `make_decoder` for all of them, whose program is then compiled already; for
    fewer it is compiled anew.
    """
    from experiments.schema import Plan
    from experiments.trainer import Trainer

    wanted = sizes.pretrain_steps
    plan = Plan(steps=wanted, eval_every=wanted, head_learning_rate=rate)
    clock = Trainer(task, "full-adamw", plan).stopwatch()
    times = [next(clock) for _ in range(6)]
    # A fifth is for the scores; and however slow the host was, a decoder needs some steps.
    left = max(0.8 * (end - time.monotonic()), 0.2 * sizes.pretrain_s)
    return max(1, min(wanted, int(left / statistics.median(times[1:]))))


def make_trainer(task: Any, method: str, plan: Any) -> "Trainer":
    """Makes a trainer that computes a start from the gradient once, and not for every rate."""
    from experiments.trainer import Trainer

    trainer = Trainer(task, method, plan)
    trainer.build_model = functools.cache(trainer.build_model)  # type: ignore[method-assign]
    return trainer


def rates_around_rule(method: str, decoder: "BooksOptions", rank: int) -> list[float]:
    """Returns five learning rates, a factor of three apart, around that of the method's rule.

    Args:
        method: Name of the method.
        decoder: Sizes of the decoder, all of whose linear maps are adapted.
        rank: r of the adapters.
    """
    from experiments.rules import RULES, Layers

    width, mlp_width = decoder.width, decoder.shape.mlp_width
    mean = (4 * width + 3 * (width * mlp_width) ** 0.5) / 7
    middle = RULES[method].rate(Layers(7 * decoder.depth, mean), rank)
    return [float(f"{middle * 3.0**power:.2g}") for power in range(-2, 3)]


def why_not_tuned(call: Call) -> str:
    """Says what "tune" lacks, before anything that takes long."""
    missing = " ".join(name for name in NEEDED if importlib.util.find_spec(name) is None)
    if missing:
        return f"packages are missing: pip install {missing} (without internet, from their wheels)"
    try:
        from experiments.schema import current_environment
        from experiments.tasks.books import SOURCES, TEXT_FILE
        from experiments.tasks.gsm8k import DATA
        from experiments.tasks.windows import require_file

        require_file("books", call.data_dir, TEXT_FILE, SOURCES)
        DATA.load(call.data_dir)
        current_environment()  # every run's record has it
        tune(call)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
