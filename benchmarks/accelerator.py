"""All that is to be measured on a GPU or TPU, in one call of about eight minutes.

``python -m benchmarks.accelerator --data-dir DATA --out RECORD.json`` runs four parts:

- "correct": three steps of every method of `train_step`, against the same steps on the CPU.
- "update": time of an update at Llama-3-8B's full width, beside `optax.adamw`.
- "step": time and memory of a training step of layers of that width, in bfloat16.
- "tune": pretrains a decoder on books for a minute, then adapts it to GSM8K by AdamW, PoLoRA and
  AltLoRA+, with five learning rates each around those of their rules.

The record is on the disk after every method and run. What fails stands there with its error, what
there was no time for under "skipped"; ``--resume`` does both, with the decoder beside the record.
The exit status is 1 if anything failed, if steps differ from the CPU's, or if "tune" was asked for
by ``--part`` and left out. No row begins that would end too late, as far as the rows before it say.

A bare checkout will do; "tune" alone needs what `experiments` imports. ``JAX_PLATFORMS=cuda,cpu``
is set where nothing is: the CPU is needed too. ``--quick`` is small enough for a CPU.
"""

import functools
import importlib.util
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer

from benchmarks import train_step, update_step
from benchmarks.timing import (
    BesideAdamW,
    Item,
    LeftOutError,
    Part,
    Record,
    environment,
    jax_option,
    programs_kept,
    use_accelerator,
)
from lowrank_optax import find_pairs, nn

if TYPE_CHECKING:  # these need packages that the other parts can do without
    from experiments.schema import RunResult
    from experiments.tasks.books import Books, BooksOptions
    from experiments.trainer import Trainer

CHECKED = [name for name in train_step.METHODS if "," not in name]
FIRST = ("adamw", "polora", "polora two-sided", "altlora_plus")
TUNED = ("adamw", "polora-start", "altlora-plus-simultaneous")
NEAREST_FIRST = (2, 1, 3, 0, 4)
SEED = 0
TOLERANCE = 3e-3
"""Of the largest move of a ΔK: both devices compute in float32, in another order. When the inputs
change by a unit of rounding, AltLoRA's steps change by 2e-4, the others' by less."""

SHARES = {"correct": 0.25, "update": 0.2, "step": 0.15, "tune": 0.4}
"""Of the time of the chosen parts; what one leaves goes to the next."""

IN_TIME = 0.95
"""Of the time; the rest is for what still runs then."""

FIRST_S = {"stacked": 5.0, "separate": 20.0, "run": 30.0}
"""Seconds that the first of its kind may take: most of them compiling."""

NEEDED = ("datasets", "pydantic", "safetensors", "tokenizers")
TIMES = ("median_ms", "ratio")


class Sizes(NamedTuple):
    """How large the parts are."""

    width: float = 1.0
    rank: int = 16
    layers: int = 4
    tokens: int = 8192
    steps: int = 20
    updates: int = 100
    calls: int = 5
    pretrain_s: float = 60.0
    pretrain_steps: int = 1500
    decoder: Mapping[str, Any] = MappingProxyType(
        {"width": 512, "depth": 8, "head_width": 64, "batch_size": 64, "length": 256}
    )
    tune_steps: int = 200
    length: int = 384
    batch_size: int = 16
    eval_limit: int = 256


FULL = Sizes()
QUICK = Sizes(
    width=1 / 128,
    rank=2,
    layers=2,
    tokens=32,
    steps=2,
    updates=2,
    calls=2,
    pretrain_s=2.0,
    pretrain_steps=20,
    decoder={"width": 32, "depth": 1, "head_width": 8, "vocabulary": 300}
    | {"batch_size": 2, "length": 16, "eval_limit": 4},
    tune_steps=2,
    length=1024,  # few tokens make long texts
    batch_size=2,
    eval_limit=2,
)


class Call(NamedTuple):
    """What a part is given: the sizes, the data, where the decoder is or will be, and the end."""

    sizes: Sizes
    data_dir: pathlib.Path | None
    decoder: pathlib.Path
    end: float

    def require_time(self, done: int, total: int) -> None:
        """Stops a training, which may be slower than was expected, when all time is over."""
        if time.monotonic() > self.end:
            raise LeftOutError(f"the time was over after {done} of {total} steps")


def in_order(names: Iterable[str]) -> list[str]:
    """Puts the methods that matter most first."""
    return [*FIRST, *(name for name in names if name not in FIRST)]


def check(call: Call) -> Part:
    """Compares three steps of every method with the CPU's."""
    pairs, batch = train_step.make_problem(3, width=32, tokens=64, rank=4, dtype=jnp.float32)
    # A far target makes long steps, in which the rounding of the factors themselves is small.
    problem = pairs, batch._replace(target=10 * batch.target)

    def find(name: str) -> dict[str, Any]:
        difference = difference_of_devices(name, problem)
        return {"difference": difference, "wrong": not difference < TOLERANCE}

    items = [Item(name, functools.partial(find, name)) for name in in_order(CHECKED)]
    content = {"tolerance": TOLERANCE, "matmul_precision": "highest"}
    return Part(content, items, ("difference",))


def difference_of_devices(name: str, problem: Any, steps: int = 3) -> float:
    """Runs a method on the CPU and on the default device.

    Args:
        name: A key of `train_step.METHODS`.
        problem: What `train_step.make_problem` gives.
        steps: How many.

    Returns:
        The largest difference of a ΔK, relative to how far the CPU moved it.
    """

    def run(device: jax.Device) -> tuple[Any, Any]:
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            pairs, batch = jax.device_put(problem, device)
            runner = train_step.make_runner(name, pairs, batch, "stacked")
            start = products(runner.carry[0])
            for _ in range(steps):
                runner.run()
            return start, products(runner.carry[0])

    start, want = run(jax.devices("cpu")[0])
    _, got = run(jax.devices()[0])
    return train_step.relative_difference(got, want, start)


def products(params: Any) -> list[np.ndarray]:
    """Computes ΔK of every pair, on the CPU.

    Factors are compared by it: of two that only differ in signs, as those of SDS-LoRA do with
    whose singular vectors they are, neither is wrong.
    """
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        params = jax.tree.map(jnp.asarray, jax.device_get(params))
        nodes = find_pairs(params).take(params)
        inputs = [jnp.eye(node.a.shape[-2]) + jnp.zeros_like(node.a[..., :1]) for node in nodes]
        pairs = zip(inputs, nodes, strict=True)
        return [np.asarray(nn.lora_apply(*each, train_step.SCALE)) for each in pairs]


def time_updates(call: Call) -> Part:
    """Times the update of every method of plain pairs, layers stacked and separate."""
    sizes, items = call.sizes, list[Item]()
    params = functools.cache(functools.partial(update_step.make_params, sizes.rank, sizes.width))
    describe = lambda name, runner, base: update_step.result_of(runner, base)
    for layout in reversed(train_step.LAYOUTS):
        make = lambda name, layout=layout: update_step.make_runner(
            update_step.METHODS[name](), params(layout == "stacked"), sizes.updates
        )
        bench = BesideAdamW(make, describe, sizes.calls)
        items += bench.items(in_order(update_step.METHODS), layout, FIRST_S[layout])
    content = {"rank": sizes.rank, "width": sizes.width, "updates_a_call": sizes.updates}
    return Part(content, items, TIMES)


def time_training(call: Call) -> Part:
    """Times a training step of every method, layers stacked and separate."""
    sizes, items = call.sizes, list[Item]()
    width = int(4096 * sizes.width)
    shape = {"layers": sizes.layers, "width": width, "tokens": sizes.tokens, "rank": sizes.rank}
    problem = functools.cache(lambda: train_step.make_problem(**shape, dtype=jnp.bfloat16))
    for layout in reversed(train_step.LAYOUTS):
        make = lambda name, layout=layout: train_step.make_runner(name, *problem(), layout)
        describe = lambda name, runner, base, layout=layout: train_step.rows_of(
            {"adamw": base, name: runner}, layout
        )[-1]
        bench = BesideAdamW(make, describe, sizes.steps)
        items += bench.items(in_order(CHECKED), layout, FIRST_S[layout])
    return Part(shape | {"dtype": "bfloat16"}, items, TIMES)


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
        items.append(Item(f"{method}, {rates[method][at]:g}", find, kind, FIRST_S["run"]))
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


PARTS: dict[str, Callable[[Call], Part]] = {
    "correct": check,
    "update": time_updates,
    "step": time_training,
    "tune": tune,
}


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


def main(
    out: Annotated[pathlib.Path, typer.Option(help="JSON file to write.")],
    data_dir: Annotated[pathlib.Path | None, typer.Option(help="Has books and gsm8k.")] = None,
    minutes: Annotated[float, typer.Option(help="When to end.")] = 8.0,
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small enough for a CPU.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what is not there, or failed.")
    ] = False,
) -> None:
    """Measures on the accelerator, and writes each number when it is there."""
    begin = time.monotonic()
    if part and not set(part) <= set(PARTS):
        raise typer.BadParameter(f"parts are: {', '.join(PARTS)}")
    if not quick and (problem := use_accelerator()):
        raise typer.BadParameter(problem)
    sizes, end = QUICK if quick else FULL, begin + 60 * minutes
    call = Call(sizes, data_dir, out.with_suffix(".decoder"), end)
    if not resume and (there := [path for path in (out, call.decoder) if path.exists()]):
        raise typer.BadParameter(f"{there[0]} exists; pass --resume to go on, or another --out")
    chosen = [name for name in PARTS if not part or name in part]
    reason = why_not_tuned(call) if "tune" in chosen else ""
    parts = {name: PARTS[name](call) for name in chosen if name != "tune" or not reason}
    try:
        record = Record(out, "accelerator", begin, quick=quick)
        for name, its in parts.items():
            record.require_same(name, its)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    record.say(f"{environment()['device']}, {', '.join(chosen)}, {minutes:g} minutes")
    if reason:
        record.leave_out("tune", reason)
        chosen.remove("tune")
    shares = list(itertools.accumulate(SHARES[name] for name in chosen))
    for name, share in zip(chosen, shares, strict=True):
        until = begin + (end - begin) * IN_TIME * share / shares[-1]
        with programs_kept(name == "tune"):  # the other parts say how long compiling takes
            record.carry_out(name, parts[name], until)
    if not record.is_fine() or (reason and part):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
