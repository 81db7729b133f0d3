"""All that is to be measured on a GPU or TPU, in one call of at most eight minutes.

``python -m benchmarks.accelerator --data-dir DATA --out RECORD.json`` runs four parts:

- "correct": three steps of every method, against the same steps on the CPU. Where one differs the
  other parts run all the same, and the exit status is 1.
- "update": time of an update at Llama-3-8B's full width, against `optax.adamw`.
- "step": time and memory of a training step of layers of that width, in bfloat16.
- "tune": pretrains a decoder on novels for three minutes, then adapts it to GSM8K by AdamW, PoLoRA
  and AltLoRA+, with five learning rates each around those of their rules.

Each part is written before the next begins, and has a limit of time: what does not fit is listed
under "skipped". After a failure ``--resume`` goes on with the parts that are not there.
``--quick`` is small enough for a CPU.
"""

import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import train_step, update_step
from benchmarks.timing import Runner, environment, time_in_turn, write_record
from experiments.decoder import make_decoder
from experiments.errors import ExperimentError
from experiments.rules import RULES, Layers
from experiments.schema import Plan
from experiments.tasks.books import Books, BooksOptions
from experiments.tasks.gsm8k import GSM8K, GSM8KOptions
from experiments.trainer import Trainer

CHECKED = [name for name in train_step.METHODS if "," not in name]
TUNED = ("adamw", "polora-start", "altlora-plus-simultaneous")
TOLERANCE = 1e-3
"""Of the largest move of a leaf: both devices compute in float32, in another order."""


class Sizes(NamedTuple):
    """How large the parts are, and how many seconds each but the first may take."""

    width: float
    rank: int
    layers: int
    tokens: int
    steps: int
    update_s: float
    step_s: float
    pretrain_s: float
    decoder: BooksOptions
    tuning: Plan
    length: int
    batch_size: int
    eval_limit: int


FULL = Sizes(
    width=1.0,
    rank=16,
    layers=4,
    tokens=8192,
    steps=20,
    update_s=100.0,
    step_s=60.0,
    pretrain_s=180.0,
    decoder=BooksOptions(width=512, depth=8, head_width=64, batch_size=64, length=256),
    tuning=Plan(steps=200, eval_every=50, head_learning_rate=1e-3),
    length=384,
    batch_size=16,
    eval_limit=256,
)
QUICK = Sizes(
    width=1 / 128,
    rank=2,
    layers=2,
    tokens=32,
    steps=2,
    update_s=1.0,
    step_s=1.0,
    pretrain_s=2.0,
    decoder=BooksOptions(
        width=32, depth=1, head_width=8, vocabulary=300, batch_size=2, length=16, eval_limit=4
    ),
    tuning=Plan(steps=2, eval_every=2, head_learning_rate=1e-3),
    length=1024,  # few tokens make long texts
    batch_size=2,
    eval_limit=2,
)


class Setting(NamedTuple):
    """What a part is given."""

    sizes: Sizes
    data_dir: pathlib.Path | None
    console: Console


def check(setting: Setting) -> dict[str, Any]:
    """Compares three steps of every method with the CPU's."""
    problem = train_step.make_problem(layers=3, width=32, tokens=64, rank=4, dtype=jnp.float32)
    errors = {name: difference_of_devices(name, problem) for name in CHECKED}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    return {"difference": errors, "tolerance": TOLERANCE, "wrong": list(wrong)}


def difference_of_devices(name: str, problem: Any, steps: int = 3) -> float:
    """Runs a method on the CPU and on the default device.

    Args:
        name: A key of `train_step.METHODS`.
        problem: What `train_step.make_problem` gives.
        steps: How many.

    Returns:
        The largest difference of a parameter, relative to how far the CPU moved its leaf.
    """

    def run(device: jax.Device) -> tuple[Any, Any]:
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            pairs, batch = jax.device_put(problem, device)
            runner = train_step.make_runner(name, pairs, batch, "separate")
            start = jax.tree.map(np.array, runner.carry[0])
            for _ in range(steps):
                runner.run()
            return start, jax.tree.map(np.array, runner.carry[0])

    start, want = run(jax.devices("cpu")[0])
    _, got = run(jax.devices()[0])
    return train_step.relative_difference(got, want, start)


def time_updates(setting: Setting) -> dict[str, Any]:
    """Times the update of every method, layers separate and stacked."""
    sizes, found = setting.sizes, {}
    for layout in train_step.LAYOUTS:
        params = update_step.make_params(sizes.rank, sizes.width, stacked=layout == "stacked")
        compile_update = functools.partial(_compile_update, params=params)
        runners, skipped = within(sizes.update_s / 2, list(update_step.METHODS), compile_update)
        time_in_turn(runners, sizes.steps, setting.console)
        rows = {
            name: update_step.result_of(runner, runners["adamw"])
            for name, runner in runners.items()
        }
        found[layout] = {"rows": rows, "skipped": skipped}
    return {"rank": sizes.rank, "width": sizes.width, **found}


def _compile_update(name: str, params: Any) -> Runner:
    return update_step.make_runner(update_step.METHODS[name](), params)


def time_training(setting: Setting) -> dict[str, Any]:
    """Times a training step of every method, layers separate and stacked."""
    sizes, found = setting.sizes, {}
    width = int(4096 * sizes.width)
    pairs, batch = train_step.make_problem(
        sizes.layers, width, sizes.tokens, sizes.rank, jnp.bfloat16
    )
    for layout in train_step.LAYOUTS:
        compile_step = functools.partial(
            train_step.make_runner, pairs=pairs, batch=batch, layout=layout
        )
        runners, skipped = within(sizes.step_s / 2, CHECKED, compile_step)
        time_in_turn(runners, sizes.steps, setting.console)
        rows = train_step.rows_of(runners, layout)
        found[layout] = {"rows": rows, "skipped": skipped}
    return {"layers": sizes.layers, "width": width, "tokens": sizes.tokens, **found}


def within(
    seconds: float, names: Sequence[str], make: Callable[[str], Runner]
) -> tuple[dict[str, Runner], list[str]]:
    """Compiles steps for so long; the first in any case.

    Returns:
        The steps, and the names of those that there was no time for.
    """
    begin, made = time.perf_counter(), dict[str, Runner]()
    for name in names:
        if made and time.perf_counter() - begin > seconds:
            break
        made[name] = make(name)
    return made, list(names)[len(made) :]


def tune(setting: Setting) -> dict[str, Any]:
    """Pretrains a decoder, then adapts it to GSM8K."""
    sizes = setting.sizes
    with tempfile.TemporaryDirectory() as folder, Progress(console=setting.console) as progress:
        bar = progress.add_task("pretraining", total=None)
        advance = lambda done, total: progress.update(bar, completed=done, total=total)
        decoder, novels = pathlib.Path(folder) / "decoder", Books(sizes.decoder, setting.data_dir)
        pretraining = make_decoder(
            novels,
            decoder,
            steps=steps_in(sizes.pretrain_s, novels),
            learning_rate=0.4 / sizes.decoder.width,
            on_step=advance,
        )
        options = GSM8KOptions(
            model=str(decoder),
            max_length=sizes.length,
            batch_size=sizes.batch_size,
            eval_limit=sizes.eval_limit,
            dtype="float32",
        )
        task, losses = GSM8K(options, setting.data_dir), {}
        for method in TUNED:
            rates = rates_around_rule(method, sizes.decoder, options.rank)
            trainer = Trainer(task, method, sizes.tuning)
            bar = progress.add_task(method, total=None)
            runs = [trainer.run(rate, 0, advance).result for rate in rates]
            losses[method] = {
                f"{run.config.learning_rate:g}": {
                    "status": run.status,
                    "validation": run.final["validation"].loss,
                    "curve": [(p.step, p.validation.loss) for p in run.curve],
                    "step_ms": run.median_step_seconds and 1e3 * run.median_step_seconds,
                }
                for run in runs
            }
    return {
        "parameters": pretraining.trainable_parameters,
        "pretraining_steps": pretraining.steps_done,
        "pretraining_loss": pretraining.final["test"].loss,
        "steps": sizes.tuning.steps,
        "methods": losses,
    }


def rates_around_rule(method: str, decoder: BooksOptions, rank: int) -> list[float]:
    """Returns five learning rates, a factor of three apart, around that of the method's rule.

    Args:
        method: Name of the method.
        decoder: Sizes of the decoder, all of whose linear maps are adapted.
        rank: r of the adapters.
    """
    width, mlp_width = decoder.width, decoder.shape.mlp_width
    mean = (4 * width + 3 * (width * mlp_width) ** 0.5) / 7
    middle = RULES[method].rate(Layers(7 * decoder.depth, mean), rank)
    return [float(f"{middle * 3.0**power:.2g}") for power in range(-2, 3)]


def steps_in(seconds: float, task: Books) -> int:
    """Measures how many steps of a pretraining fit in a time."""
    plan = Plan(steps=1, eval_every=1, head_learning_rate=1e-3)
    clock = Trainer(task, "full-adamw", plan).stopwatch()
    times = [next(clock) for _ in range(6)]
    return max(1, int(seconds / statistics.median(times[1:])))


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "correct": check,
    "update": time_updates,
    "step": time_training,
    "tune": tune,
}


def main(
    out: Annotated[pathlib.Path, typer.Option(help="JSON file to write.")],
    data_dir: Annotated[
        pathlib.Path | None, typer.Option(help="Folder that holds `books` and `gsm8k`.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small enough for a CPU.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the parts that are not there.")
    ] = False,
) -> None:
    """Measures on the accelerator, and writes each part as it ends."""
    console = Console()
    setting = Setting(QUICK if quick else FULL, data_dir, console)
    done = _parts_there(out, quick, resume)
    for name, part in PARTS.items():
        if name in done:
            continue
        begin = time.perf_counter()
        try:
            found = part(setting)
        except (jax.errors.JaxRuntimeError, ExperimentError) as error:
            kept = f"finished and in {out}: {', '.join(done)}" if done else "nothing is written yet"
            text = f"Part {name!r} failed: {error}\n{kept}. Go on with --resume."
            console.print(text, markup=False, soft_wrap=True)
            raise typer.Exit(1) from error
        done[name] = {"seconds": time.perf_counter() - begin, **found}
        write_record(out, "accelerator", console, quick=quick, parts=done)
    if wrong := done.get("correct", {}).get("wrong"):
        console.print(f"Steps differ from the CPU's: {', '.join(wrong)}", markup=False)
        raise typer.Exit(1)


def _parts_there(out: pathlib.Path, quick: bool, resume: bool) -> dict[str, Any]:
    if not out.exists():
        return {}
    if not resume:
        raise typer.BadParameter(f"{out} exists; pass --resume to go on, or another --out")
    record = json.loads(out.read_text())
    if record["device"] != environment()["device"]:
        raise typer.BadParameter(
            f"{out} is of another device ({record['device']}): pass another --out"
        )
    if record["quick"] != quick:
        raise typer.BadParameter(f"{out} is of other sizes (--quick): pass another --out")
    return dict(record["parts"])


if __name__ == "__main__":
    typer.run(main)
