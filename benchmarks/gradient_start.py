"""Memory of a gradient start, beside that of the dense gradients it is about.

``python -m benchmarks.gradient_start`` compiles the gradient of a stack of wide linear layers, once
in the adapters, as `nn.gradient_triplets` takes it, and once in the kernels, and asks the compiled
program for its memory. No number is ever computed.
"""

import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from lowrank_optax import LoRAPair, nn


def _bytes(loss: Any, *arguments: Any) -> int:
    """Returns the bytes of the results and the temporaries of a gradient in its first argument."""
    memory: Any = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
    return int(memory.output_size_in_bytes + memory.temp_size_in_bytes)


def measure(layers: int, width: int, rank: int, tokens: int) -> dict[str, int]:
    """Returns the bytes of both gradients, in float32.

    Args:
        layers: linear layers, each followed by tanh.
        width: in and out of each.
        rank: of the adapters.
        tokens: rows of the batch.
    """
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    kernels = [of(width, width)] * layers
    pairs = [LoRAPair(of(width, rank), of(rank, width))] * layers

    def loss(pairs: Any, kernels: Any, x: jax.Array) -> jax.Array:
        for pair, kernel in zip(pairs, kernels, strict=True):
            x = jnp.tanh(x @ kernel + nn.lora_apply(x, pair))
        return jnp.mean(x**2)

    def dense_loss(kernels: Any, x: jax.Array) -> jax.Array:
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    return {
        "kernels": 4 * layers * width**2,
        "start": _bytes(loss, pairs, kernels, of(tokens, width)),
        "dense": _bytes(dense_loss, kernels, of(tokens, width)),
    }


def main(
    layers: Annotated[int, typer.Option(help="Linear layers.")] = 8,
    width: Annotated[list[int] | None, typer.Option(help="In and out of each.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    tokens: Annotated[int, typer.Option(help="Rows of the batch.")] = 512,
    out: Annotated[pathlib.Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measures and prints; writes JSON with --out."""
    console = Console()
    table = Table("width", "kernels, MB", "gradient start, MB", "dense gradients, MB")
    rows = []
    for each in width or [1024, 4096]:
        found = measure(layers, each, rank, tokens)
        rows.append({"layers": layers, "width": each, "rank": rank, "tokens": tokens, **found})
        table.add_row(
            str(each), *(f"{found[name] / 1e6:.0f}" for name in ("kernels", "start", "dense"))
        )
    console.print(table)
    if out is not None:
        write_record(out, "gradient_start", console, rows=rows)


if __name__ == "__main__":
    typer.run(main)
