"""Pretrained weights of the Hugging Face form (`config.json`, safetensors) for NNX modules."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experiments.errors import ExperimentError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Tensor = np.ndarray | jax.Array
ModuleT = TypeVar("ModuleT", bound=nnx.Module)
ShapeT = TypeVar("ShapeT", bound="Shape")


class Shape(BaseModel):
    """Base of the sizes of a model, which `config.json` gives under the fields' aliases.

    Attributes:
        model_types: The `model_type`s of `config.json` that the model covers.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    model_types: ClassVar[tuple[str, ...]] = ()

    def config(self) -> dict[str, Any]:
        """Returns the sizes under the names of `config.json`."""
        fields = type(self).model_fields
        return {
            str(fields[name].validation_alias or name): value
            for name, value in self.model_dump(mode="json").items()
        }


@dataclass(frozen=True)
class Checkpoint:
    """The named tensors of a pretrained model, each read when it is asked for.

    Attributes:
        source: File or folder they come from, for messages.
        readers: For every tensor's name a function that reads it.
    """

    source: Path
    readers: Mapping[str, Callable[[], Tensor]]

    def rename(self, rule: Callable[[str], str]) -> "Checkpoint":
        """Returns the checkpoint with `rule(name)` in place of every name."""
        return Checkpoint(self.source, {rule(name): read for name, read in self.readers.items()})

    def read(self, name: str) -> Tensor:
        """Reads one tensor.

        Raises:
            ExperimentError: There is none of that name, or its bytes are damaged.
        """
        if name not in self.readers:
            raise ExperimentError(
                f"{self.source} has no tensor {name!r}: it is not a model of this shape"
            )
        try:
            return self.readers[name]()
        except (SafetensorError, OSError, ValueError) as error:
            raise ExperimentError(
                f"{self.source}: {name!r} cannot be read ({error}); fetch the file again"
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ExperimentError: The file is missing or holds no JSON object.
    """
    if not path.is_file():
        raise ExperimentError(
            f"{path} does not exist; a folder in the Hugging Face form is needed: {CONFIG_FILE}, "
            f"{WEIGHTS_FILE} (or {INDEX_FILE} and its shards) and, for text, tokenizer.json"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExperimentError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ExperimentError(f"{path} holds no JSON object; fetch it again")
    return content


def read_shape(model_dir: Path, shape: type[ShapeT]) -> ShapeT:
    """Reads the sizes of a model from its `config.json`.

    Args:
        model_dir: Folder in the Hugging Face form.
        shape: The model's `Shape`.

    Returns:
        The sizes.

    Raises:
        ExperimentError: The file is missing or damaged, or describes another architecture.
    """
    path = model_dir / CONFIG_FILE
    config = read_json(path)
    if config.get("model_type") not in shape.model_types:
        raise ExperimentError(
            f"{path}: model_type is {config.get('model_type')!r}; "
            f"this task takes {' or '.join(map(repr, shape.model_types))}"
        )
    try:
        return shape.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ExperimentError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error


def open_safetensors(model_dir: Path) -> Checkpoint:
    """Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        ExperimentError: A file is missing or cannot be read.
    """
    files = [model_dir / WEIGHTS_FILE]
    index = model_dir / INDEX_FILE
    if not files[0].is_file() and index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ExperimentError(f"{index} lists no shards under 'weight_map'; fetch it again")
        files = [model_dir / name for name in sorted(set(weight_map.values()))]
    readers: dict[str, Callable[[], Tensor]] = {}
    for path in files:
        if not path.is_file():
            raise ExperimentError(f"{path} does not exist; the model's weights are needed")
        try:
            # Of the framework's types, numpy lacks bfloat16.
            opened = safe_open(path, framework="flax")
            readers |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ExperimentError(
                f"{path} cannot be read as safetensors ({error}); fetch it again"
            ) from error
    return Checkpoint(model_dir, readers)


def fill(build: Callable[[], ModuleT], checkpoint: Checkpoint, names: Mapping[str, str]) -> ModuleT:
    """Builds a module with the weights of a checkpoint, without drawing any of its own.

    Matrices are stored (out, in...) by torch, kernels here are (in, out); of a convolution whose
    stride is its size, *in* is channels x height x width.

    Args:
        build: Makes the module.
        checkpoint: The weights.
        names: Name in the checkpoint of every parameter, by its '/'-joined path in the module.

    Returns:
        The module, with the dtypes that `build` gives its parameters.

    Raises:
        ExperimentError: A tensor is missing or has another shape than the module's.
    """
    graph, state = nnx.split(nnx.eval_shape(build))
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        name = names["/".join(map(str, path))]
        tensor = checkpoint.read(name)
        if path[-1] == "kernel":
            tensor = tensor.reshape(tensor.shape[0], -1).T
        if tensor.shape != variable.shape:
            raise ExperimentError(
                f"{checkpoint.source}: {name!r} gives shape {tensor.shape}, "
                f"{variable.shape} is expected"
            )
        leaves.append((path, variable.replace(jnp.asarray(tensor, dtype=variable.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def write_model(
    model: nnx.Module, folder: Path, config: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Writes `config.json` and `model.safetensors`, as `fill` reads them.

    Args:
        model: The module; its kernels are (in, out).
        folder: Where to write; it must exist.
        config: The model's sizes, as `config.json` gives them.
        names: Name in the checkpoint of every parameter, by its '/'-joined path in the module.
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...])
        value = value.T if path[-1] == "kernel" else value
        tensors[names["/".join(map(str, path))]] = np.ascontiguousarray(value)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def linear_names(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    """Yields (path in the module, tensor name) for the kernel and the bias of a linear map."""
    yield f"{ours}/kernel", f"{theirs}.weight"
    yield f"{ours}/bias", f"{theirs}.bias"


def layer_norm_names(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    """Yields (path in the module, tensor name) for the scale and the bias of a layer norm."""
    yield f"{ours}/scale", f"{theirs}.weight"
    yield f"{ours}/bias", f"{theirs}.bias"


def layer_names(
    tensors: Iterable[tuple[str, str]], ours: str = "", theirs: str = ""
) -> dict[str, str]:
    """Makes the names with which an adapter's file fits a Hugging Face model.

    Args:
        tensors: (path in the module, tensor name) for every parameter, as `tensor_names` of a
            model yields them.
        ours: What stands before the paths, as `"encoder/"` in a classifier.
        theirs: What stands before the tensors' names, as `"roberta."` in a classifier.

    Returns:
        The module name of each linear layer by its path, for `adapters.save_peft` and `load_peft`.
    """
    kernel = "/kernel"
    return {
        f"{ours}{path.removesuffix(kernel)}": f"{theirs}{name.removesuffix('.weight')}"
        for path, name in tensors
        if path.endswith(kernel)
    }
