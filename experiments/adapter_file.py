"""What a run has trained, as one safetensors file beside its result.

| tensor | what it is |
|---|---|
| `pairs/PATH/a`, `pairs/PATH/b` | the plain pair of the layer at PATH: its kernel grows by s a b |
| `weights/PATH` | any other trained variable as it is: of the task's head, or of a whole model |

Framed pairs are stored as the plain pairs that they equal, of rank 2r, and SVDLoRA's dense changes
as pairs of the rank that it cuts them to. A method that trains the whole model has no pairs: its
file holds every weight. The metadata are texts: `method`, `rank` (r of the method), `scales` (JSON:
s by PATH), `format`, and `result`, the name of the JSON file with all settings.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from experiments.adapters import DenseLayer
from experiments.errors import ExperimentError
from experiments.schema import RunResult
from lowrank_optax import LoRAPair, nn, pair_of_delta
from lowrank_optax.adapters import plain_pair

FORMAT = "lowrank-optax adapter 1"


class SavedAdapter(NamedTuple):
    """What a file holds.

    Attributes:
        metadata: See this module.
        pairs: Plain pairs by path of the layer.
        scales: Their forward scales.
        weights: The other trained variables by path.
    """

    metadata: Mapping[str, str]
    pairs: dict[str, LoRAPair]
    scales: dict[str, float]
    weights: dict[str, jax.Array]


def require_no_file(path: Path) -> None:
    """Refuses to write over an adapter.

    Raises:
        ExperimentError: The file exists.
    """
    if path.exists():
        raise ExperimentError(f"{path} exists, without its result: move it away")


def save_adapter(
    path: Path, model: nnx.Module, trained: nnx.filterlib.Filter, result: RunResult
) -> None:
    """Writes what was trained, in one atomic step.

    Args:
        path: Where; the folder is made if it does not exist.
        model: The trained model.
        trained: Which of its variables were trained.
        result: The run's result, for the metadata.

    Raises:
        ExperimentError: The file exists, or the disk is full or not writable.
    """
    require_no_file(path)
    rank = result.config.task_options["rank"]
    pairs, scales = _pairs_of(model, rank)
    tensors = {f"pairs/{at}/{side}": getattr(pairs[at], side) for at in pairs for side in "ab"}
    for keys, variable in nnx.to_flat_state(nnx.state(model, trained)):
        if _joined(keys[:-1]) not in pairs:
            tensors[f"weights/{_joined(keys)}"] = variable[...]
    metadata = {
        "format": FORMAT,
        "method": result.config.method,
        "rank": str(rank),
        "scales": json.dumps(scales),
        "result": result.config.file_name(),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise ExperimentError(f"cannot write {path}: {error}") from error


def _pairs_of(model: nnx.Module, rank: int) -> tuple[dict[str, LoRAPair], dict[str, float]]:
    pairs, scales = {}, {}
    for keys, module in nnx.iter_modules(model):
        at = _joined(keys)
        if isinstance(module, nn.LoRALayer):
            pairs[at], scales[at] = plain_pair(module.pair), module.scale
        elif isinstance(module, DenseLayer):
            pairs[at], scales[at] = pair_of_delta(module.delta[...], rank), 1.0
    return pairs, scales


def _joined(keys: tuple[Any, ...]) -> str:
    return "/".join(map(str, keys))


def read_adapter(path: Path) -> SavedAdapter:
    """Reads what `save_adapter` wrote.

    Raises:
        ExperimentError: The file is missing, damaged or of another kind.
    """
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ExperimentError(f"cannot read {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ExperimentError(f"{path} was not written by --save-adapter")
    scales = json.loads(metadata["scales"])
    pairs = {at: LoRAPair(*(tensors[f"pairs/{at}/{side}"] for side in "ab")) for at in scales}
    weights = {
        name.removeprefix("weights/"): value
        for name, value in tensors.items()
        if name.startswith("weights/")
    }
    return SavedAdapter(metadata, pairs, scales, weights)


def add_saved(model: nnx.Module, saved: SavedAdapter) -> None:
    """Puts a saved adapter into the pretrained model that it was trained for, in place.

    Args:
        model: The model without adapters; its head is overwritten.
        saved: What `read_adapter` returned.
    """
    state = nnx.state(model)
    flat = {_joined(keys): variable for keys, variable in nnx.to_flat_state(state)}
    for at, value in saved.weights.items():
        flat[at][...] = value
    nnx.update(model, state)
    for at in saved.pairs:
        _add_pair(model, at, saved.pairs[at], saved.scales[at])


def _add_pair(model: nnx.Module, at: str, pair: LoRAPair, scale: float) -> None:
    rank = pair.a.shape[-1]
    config = nn.LoRAConfig(
        rank=rank,
        alpha=scale * rank,
        a_init=lambda key, shape, dtype: pair.a.astype(dtype),
        b_init=lambda key, shape, dtype: pair.b.astype(dtype),
    )
    nn.add_lora(model, lambda path, module: path == at, config, rngs=nnx.Rngs(0))
