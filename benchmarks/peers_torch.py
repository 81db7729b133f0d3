"""Cost of one optimizer step beside the LoRA optimizers of torch, each in a process of its own.

``build/integration/peft/bin/python -m benchmarks.peers_torch`` times `scaled_adamw` against PEFT's
Riemannian optimizer, `lora_rite` against pytorch_optimizer's, and `optax.adamw` against torch's
fused AdamW, on the 224 pairs of `benchmarks.update_step`. `make build/integration/peft/.ready`
makes that environment. JAX's steps are update + apply under jit with donation, torch's are
`optimizer.step()`; neither has a backward pass. The processes run in turn, one at a time, for two
libraries in one process would share their threads. Torch compiles nothing: its times are eager.
"""

import importlib
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import optax
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from benchmarks.timing import WARM_UP
from benchmarks.update_step import LLAMA_3_8B, N_LAYERS, make_params, make_runner
from lowrank_optax import lora_rite, scaled_adamw

LIBRARIES = ("torch", "peft", "pytorch_optimizer")
RATE = 1e-3

OURS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.adamw": lambda: optax.adamw(RATE),
    "scaled_adamw": lambda: scaled_adamw(RATE),
    "lora_rite": lambda: lora_rite(RATE),
}


def _fused_adamw(torch: Any, model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)


def _riemannian(torch: Any, model: Any) -> Any:
    make = importlib.import_module("peft.optimizers").create_riemannian_optimizer
    return make(model, torch.optim.AdamW, lr=RATE, fused=True)


def _rite(torch: Any, model: Any) -> Any:
    return importlib.import_module("pytorch_optimizer").LoRARite(model.parameters(), lr=RATE)


THEIRS: dict[str, Callable[[Any, Any], Any]] = {
    "torch AdamW, fused": _fused_adamw,
    "PEFT Riemannian": _riemannian,
    "pytorch_optimizer LoRA-RITE": _rite,
}
BESIDE = dict(zip(OURS, THEIRS, strict=True))


def times_of_ours(name: str, rank: int, width: float, steps: int) -> list[float]:
    """Times steps of one of `OURS`, in seconds."""
    runner = make_runner(OURS[name](), make_params(rank, width, stacked=False))
    for _ in range(WARM_UP + steps):
        runner.run()
    return runner.times[WARM_UP:]


def times_of_theirs(name: str, rank: int, width: float, steps: int) -> list[float]:
    """Times steps of one of `THEIRS`, in seconds, on factors laid out as torch has them."""
    torch = importlib.import_module("torch")
    factor = lambda x: torch.nn.Parameter(torch.from_numpy(np.array(x.T)))
    model, pairs = torch.nn.Module(), make_params(rank, width, stacked=False)
    for index, pair in enumerate(pair for layer in pairs for pair in layer):
        # PEFT finds pairs by these names; the kernels between them take no part in a step.
        layer = torch.nn.Module()
        for kind, x in (("lora_A", pair.a), ("lora_B", pair.b)):
            layer.add_module(kind, torch.nn.ParameterDict({"default": factor(x)}))
        model.add_module(f"layer{index}", layer)
    optimizer, times = THEIRS[name](torch, model), []
    grads = [0.1 * parameter.detach() + 0.01 for parameter in model.parameters()]
    for _ in range(WARM_UP + steps):
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad.clone()  # PEFT's overwrites the gradients
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


def in_a_process(name: str, *numbers: float) -> list[float]:
    """Times one optimizer in a new process."""
    command = [sys.executable, "-m", "benchmarks.peers_torch", "--row", name]
    options = [
        f"--{option}={n}" for option, n in zip(("rank", "width", "steps"), numbers, strict=True)
    ]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    return [float(each) for each in json.loads(done.stdout)]


def main(
    rank: Annotated[int, typer.Option(help="Rank of the pairs.")] = 16,
    width: Annotated[float, typer.Option(help="Fraction of Llama-3-8B's width.")] = 0.25,
    steps: Annotated[int, typer.Option(help="Timed steps of each process.")] = 10,
    rounds: Annotated[int, typer.Option(help="Processes of each optimizer, in turn.")] = 3,
    row: Annotated[str | None, typer.Option(help="Time this one here, print its times.")] = None,
    out: Annotated[pathlib.Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measures and prints; writes JSON with --out."""
    if row is not None:
        timed = times_of_ours if row in OURS else times_of_theirs
        print(json.dumps(timed(row, rank, width, steps)))
        return
    console = Console()
    times: dict[str, list[float]] = {name: [] for name in (*OURS, *THEIRS)}
    for _ in range(rounds):
        for name, found in times.items():
            found.extend(in_a_process(name, rank, width, steps))
    medians = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    table, rows = Table("ours", "ms", "of torch", "ms", "ours / theirs"), []
    for ours, theirs in BESIDE.items():
        ratio = medians[ours] / medians[theirs]
        table.add_row(
            ours, f"{medians[ours]:.1f}", theirs, f"{medians[theirs]:.1f}", f"{ratio:.2f}"
        )
        rows.append(
            {
                "ours": ours,
                "theirs": theirs,
                "ours_ms": medians[ours],
                "theirs_ms": medians[theirs],
                "ratio": ratio,
            }
        )
    console.print(table)
    if out is not None:
        versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
        content = {"rank": rank, "width": width, "pairs": N_LAYERS * len(LLAMA_3_8B)}
        write_record(out, "peers_torch", console, torch_versions=versions, **content, rows=rows)


if __name__ == "__main__":
    typer.run(main)
