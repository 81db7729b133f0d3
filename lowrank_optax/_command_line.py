"""The command line: what is in an adapter file, and what can be made of it."""

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lowrank_optax import adapters, plots
from lowrank_optax.adapters import PeftAdapter, PeftConfig, Spectrum

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Looks into LoRA adapters in Hugging Face PEFT's format, and makes others of them.",
)
_OUT, _ERR = Console(), Console(stderr=True)
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_MISTAKES = (ValueError, OSError, ImportError)

Adapter = Annotated[
    Path, typer.Argument(help="Folder with adapter_model.safetensors and adapter_config.json.")
]
Out = Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Makes a command whose mistakes are one line and the exit code 2."""

    @app.command()
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except _MISTAKES as error:
            _ERR.print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error

    return run


@_command
def inspect(
    adapter: Adapter,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the singular values into this file.")
    ] = None,
) -> None:
    """Shows ranks, scales, norms, effective ranks and conditions of every pair."""
    found = dict(_spectra(adapter))
    if plot is not None:
        _draw(found, plot)
    if as_json:
        typer.echo(json.dumps({name: _numbers(each) for name, each in found.items()}, indent=2))
        return
    table = _table(
        f"{len(found)} pairs", "in → out", "r", "s", "‖ΔK‖₂", "eff. r", "cond a", "cond b"
    )
    for name, each in found.items():
        table.add_row(
            name,
            f"{each.n_in} → {each.n_out}",
            str(each.rank),
            f"{each.scale:g}",
            f"{each.norm:.2g}",
            f"{each.effective_rank:.1f}",
            f"{each.condition_a:.0e}",
            f"{each.condition_b:.0e}",
        )
    _OUT.print(table)


@_command
def diff(one: Adapter, two: Adapter, as_json: AsJson = False) -> None:
    """Compares two adapters: principal angles of their spaces, and the distance of their ΔK."""
    found: dict[str, dict[str, Any]] = {}
    with adapters.open_peft(one) as first, adapters.open_peft(two) as second:
        shared = [name for name in first.modules if name in second.modules]
        alone = sorted(set(first.modules) ^ set(second.modules))
        for name in track(shared, "comparing", console=_ERR, transient=True):
            x, y = first.pair(name), second.pair(name)
            _shape_of_all(name, [x, y])
            of_a, of_b = adapters.principal_angles(x, y)
            scales = first.config.scale(name), second.config.scale(name)
            found[name] = {
                "angle_a": _largest(of_a),
                "angle_b": _largest(of_b),
                "distance": _distance(x, y, *scales),
                "magnitudes": _apart(first, second, name),
            }
    if as_json:
        for each in found.values():
            each["distance"] = _finite(each["distance"])
        typer.echo(json.dumps({"modules": found, "in_one_alone": alone}, indent=2))
        return
    has_dora = any(each["magnitudes"] is not None for each in found.values())
    headings = ["of a", "of b", "‖ΔK₁ − ΔK₂‖ / ‖ΔK₁‖", *["‖m₁ − m₂‖ / ‖m₁‖"] * has_dora]
    table = _table("largest principal angles, in degrees", *headings)
    for name, each in found.items():
        cells = [f"{each['angle_a']:.1f}", f"{each['angle_b']:.1f}", f"{each['distance']:.3g}"]
        apart = each["magnitudes"]
        cells += ["in one alone" if apart is None else f"{apart:.3g}"] * has_dora
        table.add_row(name, *cells)
    _OUT.print(table)
    if alone:
        _OUT.print(f"in one of them alone: {', '.join(alone)}", markup=False)


@_command
def convert(
    adapter: Adapter,
    out: Out,
    rank: Annotated[int | None, typer.Option(help="Cut every pair to this rank.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    rslora: Annotated[bool, typer.Option(help="Write alphas for rsLoRA's scales.")] = False,
) -> None:
    """Writes an adapter again, with another rank, dtype or rule of scales."""
    found = adapters.read_peft(adapter)
    pairs, errors = dict(found.pairs), {}
    for name, pair in track(found.pairs.items(), "converting", console=_ERR, transient=True):
        if rank is not None:
            largest = min(*pair.a.shape, pair.b.shape[1])
            pairs[name], errors[name] = adapters.compress(pair, min(rank, largest))
        wanted = _dtype(dtype) or pair.a.dtype
        pairs[name] = jax.tree.map(lambda x, wanted=wanted: x.astype(wanted), pairs[name])
    _write(out, pairs, found.scales, found, use_rslora=rslora)
    _tell(out, pairs, errors)


@_command
def combine(
    out: Out,
    adapter: Annotated[list[Path], typer.Argument(help="Adapters of one base model.")],
    rank: Annotated[int, typer.Option(help="Rank of the result.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of each adapter, in order; 1 by default.")
    ] = None,
) -> None:
    """Writes the adapter of a rank that is nearest to a weighted sum of adapters."""
    weights = list(weight or [1.0] * len(adapter))
    if len(weights) != len(adapter):
        raise ValueError(f"{len(adapter)} adapters need as many --weight, got {len(weights)}")
    found = [adapters.read_peft(path) for path in adapter]
    everywhere = set.intersection(*(set(each.pairs) for each in found))
    if partly := set.union(*(set(each.pairs) for each in found)) - everywhere:
        raise ValueError(f"not in all adapters: {', '.join(sorted(partly))}")
    _require_same_others(found)
    if any(each.config.use_dora for each in found):
        raise ValueError("adapters with DoRA have no sum: their outputs are not linear in ΔK")
    pairs, errors = {}, {}
    for name in track(found[0].pairs, "combining", console=_ERR, transient=True):
        scaled = [w * each.config.scale(name) for w, each in zip(weights, found, strict=True)]
        nodes = [each.pairs[name] for each in found]
        n_in, n_out = _shape_of_all(name, nodes)
        largest = min(n_in, n_out, sum(node.a.shape[1] for node in nodes))
        if not 1 <= rank <= largest:
            raise ValueError(f"{name}: --rank must be from 1 to {largest} here, got {rank}")
        pairs[name], errors[name] = adapters.combine(nodes, scaled, rank)
    transposed = any(each.config.fan_in_fan_out for each in found)
    config = dataclasses.replace(found[0].config, fan_in_fan_out=transposed)
    _write(out, pairs, dict.fromkeys(pairs, 1.0), found[0]._replace(config=config))
    _tell(out, pairs, errors)


@_command
def merge(
    adapter: Adapter,
    base: Annotated[Path, typer.Argument(help="Folder of the base model's safetensors files.")],
    out: Out,
) -> None:
    """Adds an adapter to the weights of its base model, file by file; all else stays as it is."""
    if out.exists():
        raise FileExistsError(f"{out} exists; give another folder, or remove it")
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{base} holds no safetensors file")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    with adapters.open_peft(adapter) as source:
        if source.others:
            raise ValueError(
                f"{adapter} holds whole weights too ({', '.join(source.others)}), which `merge`"
                " does not place; merge it with PEFT"
            )
        if source.config.fan_in_fan_out:
            raise ValueError(
                f"{adapter} has fan_in_fan_out=True: its base model may keep weights as (in, out),"
                " to which `merge` would add ΔK transposed; merge it with PEFT"
            )
        left = set(source.modules)
        temporary.mkdir(parents=True)
        try:
            for path in track(files, "merging", console=_ERR, transient=True):
                shutil.copyfile(path, temporary / path.name)
                left -= _merge_into(temporary / path.name, path, source)
            if left:
                raise ValueError(f"{base} has no weight of {', '.join(sorted(left))}")
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _OUT.print(f"written to {out}", markup=False)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("module", overflow="fold", min_width=20)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _spectra(folder: Path) -> Iterator[tuple[str, Spectrum]]:
    with adapters.open_peft(folder) as file:
        for name in track(file.modules, "reading", console=_ERR, transient=True):
            yield name, adapters.spectrum(file.pair(name), file.config.scale(name))


def _numbers(found: Spectrum) -> dict[str, Any]:
    return {
        "in": found.n_in,
        "out": found.n_out,
        "rank": found.rank,
        "scale": found.scale,
        "norm": found.norm,
        "frobenius": found.frobenius,
        "effective_rank": found.effective_rank,
        "condition_a": _finite(found.condition_a),
        "condition_b": _finite(found.condition_b),
        "singular_values": [float(value) for value in found.values],
    }


def _finite(x: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return x if math.isfinite(x) else None


def _draw(found: dict[str, Spectrum], path: Path) -> None:
    figure = plots.spectra(found).figure
    figure.savefig(path, dpi=150)


def _largest(angles: np.ndarray) -> float:
    return float(np.max(angles, initial=0.0))


def _apart(first: Any, second: Any, name: str) -> float | None:
    """The distance of DoRA's magnitudes, relative to the first; None where one has none."""
    if name not in first.magnitudes or name not in second.magnitudes:
        return None
    one, two = (np.asarray(file.magnitude(name), float) for file in (first, second))
    return float(np.linalg.norm(one - two) / np.linalg.norm(one))


def _distance(one: Any, two: Any, scale_one: float, scale_two: float) -> float:
    """‖ΔK₁ − ΔK₂‖ / ‖ΔK₁‖ in the Frobenius norm, from the factors alone; infinite for ΔK₁ = 0."""
    wide = lambda x: np.asarray(x, float)
    side_by_side = type(one)(
        np.concatenate([scale_one * wide(one.a), -scale_two * wide(two.a)], axis=1),
        np.concatenate([wide(one.b), wide(two.b)], axis=0),
    )
    size = adapters.spectrum(one, scale_one).frobenius
    apart = adapters.spectrum(side_by_side, 1.0).frobenius
    return apart / size if size else math.inf if apart else 0.0


def _shape_of_all(name: str, pairs: list[Any]) -> tuple[int, int]:
    """The (in, out) of a module, which must be one in all adapters."""
    shapes = [(pair.a.shape[0], pair.b.shape[1]) for pair in pairs]
    if len(set(shapes)) > 1:
        said = " and ".join(f"{n_in} → {n_out}" for n_in, n_out in dict.fromkeys(shapes))
        raise ValueError(f"{name} is {said} in these adapters, which are not of one base model")
    return shapes[0]


def _require_same_others(found: list[PeftAdapter]) -> None:
    """Raises if adapters hold other whole weights, of which there is no sum of low rank."""
    first = found[0].others
    for name in sorted(set().union(*(each.others for each in found))):
        values = [each.others.get(name) for each in found]
        if any(x is None or not jnp.array_equal(x, first[name]) for x in values):
            raise ValueError(
                f"{name} is a whole weight that is not the same in all adapters; `combine` takes"
                " sums of pairs alone"
            )


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {name}")
    return jnp.dtype(name)


def _merge_into(copy: Path, path: Path, source: Any) -> set[str]:
    """Adds ΔK to the weights in a copy of a file, in place; returns the modules that it has."""
    start, tensors = _header(path)
    here = {name for name in source.modules if f"{name}.weight" in tensors}
    with copy.open("r+b") as file:
        for name in here:
            key = f"{name}.weight"
            begin, end = tensors[key]["data_offsets"]
            file.seek(start + begin)
            data = file.read(end - begin)
            file.seek(start + begin)
            magnitude = source.magnitude(name) if name in source.magnitudes else None
            delta = _delta(source, name)
            file.write(_added(f"{path}: {key}", tensors[key], data, delta, magnitude))
    return here


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and dtype, shape and place of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def _delta(source: Any, name: str) -> np.ndarray:
    """ΔK in torch's layout: (out, in), (in, out) of an embedding, (out, c, k…) of a convolution."""
    a, b = (np.asarray(x, np.float32) for x in source.pair(name))
    delta = source.config.scale(name) * (a @ b)
    if name in source.embeddings:
        return delta
    window = source.windows.get(name)
    return delta.T.reshape(len(delta.T), -1, *window) if window else delta.T


def _added(
    name: str, info: dict[str, Any], data: bytes, delta: np.ndarray, magnitude: Any
) -> bytes:
    dtype, shape = info["dtype"], tuple(info["shape"])
    if dtype not in _FLOATS:
        raise ValueError(f"{name} is of {dtype}; merge into the weights it was made from")
    if shape != delta.shape:
        raise ValueError(f"{name} has the shape {shape}, but the adapter's is {delta.shape}")
    weight = np.frombuffer(data, _FLOATS[dtype]).reshape(shape)
    wide = np.promote_types(weight.dtype, np.float32)
    total = weight.astype(wide) + delta
    if magnitude is not None:  # DoRA's; the outputs are the first axis
        rows = total.reshape(len(total), -1)
        ratio = np.asarray(magnitude, wide) / np.linalg.norm(rows, axis=1)
        total = (ratio[:, None] * rows).reshape(total.shape)
    return total.astype(weight.dtype).tobytes()


def _write(
    out: Path,
    pairs: dict[str, Any],
    scales: dict[str, float],
    source: PeftAdapter,
    use_rslora: bool = False,
) -> None:
    """Writes new pairs of an adapter, with all else that it holds."""
    config = source.config
    new = PeftConfig.of(
        {name: pair.a.shape[-1] for name, pair in pairs.items()},
        scales,
        use_rslora=use_rslora,
        base_model=config.base_model,
        modules_to_save=list(config.modules_to_save),
        fan_in_fan_out=config.fan_in_fan_out,
        use_dora=config.use_dora,
    )
    adapters.write_peft(
        out, new, pairs, source.others, source.embeddings, source.windows, source.magnitudes
    )


def _tell(out: Path, pairs: dict[str, Any], errors: dict[str, Any]) -> None:
    worst = max((float(each) for each in errors.values()), default=0.0)
    said = f"; largest relative error of ΔK {worst:.2g}" if errors else ""
    _OUT.print(f"{len(pairs)} pairs written to {out}{said}", markup=False, highlight=False)
