"""Inverse square roots of Gram matrices: by eigenvalues, or by matrix products alone.

``python -m benchmarks.inverse_roots`` times PoLoRA's two roots, made by eigh, beside the coupled
Newton–Schulz iteration, and measures the errors of both against float64:

- ``partner``: R = (M + δ λ_max I)^(−½) with δ = 1e-4, which whitens by the other factor;
- ``polar``: M^(−½) on the space of the eigenvalues above rounding level, for msign.

The Gram matrices have eigenvalues within a factor of ten (``even``), falling by powers down to 1e-8
of the largest (``steep``), or half of them 0 (``singular``), as of a factor with unused ranks.

The iteration is Y ← Y T, Z ← T Z with T = (3 I − Z Y) / 2, from Y = M / λ and Z = I with λ the
trace, an upper bound of λ_max; Z tends to (M / λ)^(−½). An eigenvalue far below λ grows by 9/4 in
each step, which decides how many steps are needed.
"""

import math
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from benchmarks.timing import Runner, time_in_turn, times_beside
from lowrank_optax import engine

DELTA = 1e-4
PAIRS = 224
SPECTRA: dict[str, Callable[[int], np.ndarray]] = {
    "even": lambda rank: np.linspace(0.1, 1.0, rank),
    "steep": lambda rank: np.logspace(-8, 0, rank),
    "singular": lambda rank: np.repeat([0.0, 1.0], rank // 2),
}


def gram_matrices(spectrum: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Returns matrices (count, r, r) with the given eigenvalues in random bases, in float64."""
    rank = len(spectrum)
    normal = np.random.default_rng(seed).standard_normal((count, rank, rank))
    bases, _ = np.linalg.qr(normal)
    return bases * spectrum @ np.swapaxes(bases, -1, -2)


def exact_root(matrix: np.ndarray, kind: str) -> np.ndarray:
    """Returns the root in float64; the polar one is zero on eigenvalues below float32's rounding.

    Args:
        matrix: (n, r, r), float64.
        kind: `"partner"` or `"polar"`.
    """
    values, vectors = np.linalg.eigh(matrix)
    values = np.maximum(values, 0)
    top = values[..., -1:]
    if kind == "partner":
        roots = (values + DELTA * top) ** -0.5
    else:
        seen = values > 10 * np.finfo(np.float32).eps * top
        roots = np.where(seen, np.where(seen, values, 1) ** -0.5, 0)
    return vectors * roots[..., None, :] @ np.swapaxes(vectors, -1, -2)


def by_eigenvalues(matrix: jax.Array, kind: str) -> jax.Array:
    """Returns the root as `polora` makes it."""
    if kind == "partner":
        return engine.inverse_root(matrix, DELTA, 1e-12)
    return engine.pseudo_inverse_root(matrix)


def by_newton_schulz(matrix: jax.Array, kind: str) -> jax.Array:
    """Returns the root by the coupled iteration; a polar one has nothing that leaves out zeros.

    Args:
        matrix: (n, r, r), float32.
        kind: `"partner"` or `"polar"`.
    """
    eye = jnp.broadcast_to(jnp.eye(matrix.shape[-1]), matrix.shape)
    least = DELTA if kind == "partner" else 10 * float(jnp.finfo(jnp.float32).eps)
    if kind == "partner":
        top = engine.spectral_norm(matrix @ matrix)[:, None, None]
        matrix = matrix + DELTA * top * eye
    scale = jnp.trace(matrix, axis1=-2, axis2=-1)[:, None, None]
    steps = math.ceil(math.log(matrix.shape[-1] / least) / math.log(9 / 4)) + 4

    def step(_: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y, z = pair
        t = 1.5 * eye - 0.5 * z @ y
        return y @ t, t @ z

    _, root = jax.lax.fori_loop(0, steps, step, (matrix / scale, eye))
    return root / jnp.sqrt(scale)


WAYS = {"eigh": by_eigenvalues, "Newton–Schulz": by_newton_schulz}


def largest_error(got: Any, want: np.ndarray) -> float:
    """Returns the largest relative error of a matrix, in the Frobenius norm."""
    errors = np.linalg.norm(np.asarray(got, np.float64) - want, axis=(-1, -2))
    return float(np.max(errors / np.linalg.norm(want, axis=(-1, -2))))


def measure(kind: str, rank: int, steps: int, console: Console) -> dict[str, Any]:
    """Times both ways of a root in turn, and measures their errors by spectrum.

    Args:
        kind: `"partner"` or `"polar"`.
        rank: r.
        steps: how often each is timed.
        console: where progress is shown.
    """
    grams = {name: gram_matrices(make(rank), 2 * PAIRS) for name, make in SPECTRA.items()}
    runners = {}
    for name, way in WAYS.items():
        step = lambda carry, gram, way=way: way(gram + 0 * carry, kind)
        runners[name] = Runner(step, jnp.zeros_like(grams["even"], jnp.float32), grams["even"])
    time_in_turn(runners, steps, console)
    row: dict[str, Any] = {"root": kind, "rank": rank}
    for name, way in WAYS.items():
        found = {
            spectrum: largest_error(way(jnp.float32(gram), kind), exact_root(gram, kind))
            for spectrum, gram in grams.items()
        }
        times = times_beside(runners[name], runners["eigh"])
        row[name] = {key: times[key] for key in ("median_ms", "ratio")} | {"error": found}
    return row


def main(
    rank: Annotated[list[int] | None, typer.Option(help="Ranks of the factors.")] = None,
    steps: Annotated[int, typer.Option(help="How often each is timed.")] = 30,
    out: Annotated[pathlib.Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measures and prints; writes JSON with --out."""
    console = Console()
    table = Table("root", "rank", "by", "ms", "ratio", *(f"error, {name}" for name in SPECTRA))
    rows = []
    for kind in ("partner", "polar"):
        for each in rank or [4, 16, 64]:
            row = measure(kind, each, steps, console)
            rows.append(row)
            for name in WAYS:
                found = row[name]
                errors = (f"{error:.1g}" for error in found["error"].values())
                times = f"{found['median_ms']:.2f}", f"{found['ratio']:.2f}"
                table.add_row(kind, str(each), name, *times, *errors)
    console.print(table)
    if out is not None:
        write_record(out, "inverse_roots", console, matrices=2 * PAIRS, delta=DELTA, rows=rows)


if __name__ == "__main__":
    typer.run(main)
