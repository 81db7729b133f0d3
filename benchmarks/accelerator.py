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
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from benchmarks import train_step, update_step
from benchmarks.devices import programs_kept, use_accelerator
from benchmarks.record import Item, Part, Record, environment
from benchmarks.sizes import FULL, QUICK, Call
from benchmarks.timing import BesideAdamW
from benchmarks.tune import tune, why_not_tuned
from lowrank_optax import find_pairs, nn

CHECKED = [name for name in train_step.METHODS if "," not in name]
FIRST = ("adamw", "polora", "polora two-sided", "altlora_plus")
TOLERANCE = 3e-3
"""Of the largest move of a ΔK: both devices compute in float32, in another order. When the inputs
change by a unit of rounding, AltLoRA's steps change by 2e-4, the others' by less."""

SHARES = {"correct": 0.25, "update": 0.2, "step": 0.15, "tune": 0.4}
"""Of the time of the chosen parts; what one leaves goes to the next."""

IN_TIME = 0.95
"""Of the time; the rest is for what still runs then."""

FIRST_S = {"stacked": 5.0, "separate": 20.0}
"""Seconds that the first of its layout may take: most of them compiling."""

TIMES = ("median_ms", "ratio")


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


PARTS: dict[str, Callable[[Call], Part]] = {
    "correct": check,
    "update": time_updates,
    "step": time_training,
    "tune": tune,
}


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
