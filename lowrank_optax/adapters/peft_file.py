"""PEFT's files: `adapter_model.safetensors` and `adapter_config.json` in one folder."""

import contextlib
import importlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core.nodes import LoRAPair
from lowrank_optax.adapters.peft_config import PeftConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.weight)?")
_WHOLE = re.compile(r"(?!.*lora_).+\.(?:weight|bias)")
_MAX_CONFIG = 1 << 20


class PeftAdapter(NamedTuple):
    """What a folder of PEFT holds.

    Args:
        config: the settings.
        pairs: plain pairs (in, r) and (r, out) by module name.
        others: whole weights by name: of `modules_to_save`, and of adapted embeddings and heads and
            of those of a resized vocabulary, which PEFT stores too.
        embeddings: the modules that are embeddings, whose factors have keys of their own.
        windows: the modules that are convolutions, and their windows (k₁, …, k_d). A pair's in axis
            then stands for c·k₁⋯k_d inputs, channels before places, as in our own layers.
        magnitudes: DoRA's, (out,), by module name; empty without DoRA.
    """

    config: PeftConfig
    pairs: dict[str, LoRAPair]
    others: dict[str, jax.Array]
    embeddings: frozenset[str] = frozenset()
    windows: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    magnitudes: Mapping[str, jax.Array] = MappingProxyType({})

    @property
    def scales(self) -> dict[str, float]:
        """The forward scales by module name."""
        return {name: self.config.scale(name) for name in self.pairs}


def read_peft(folder: str | os.PathLike[str]) -> PeftAdapter:
    """Reads an adapter that PEFT, or `save_peft`, has written.

    Args:
        folder: with `adapter_model.safetensors` and `adapter_config.json`.

    Returns:
        The adapter.

    Raises:
        FileNotFoundError: a file is missing. `adapter_model.bin` is a pickle and is not read.
        ValueError: a file is damaged, of another kind than plain LoRA, or does not fit the other;
            the message names the file and the tensor or setting.
        ImportError: `safetensors` is not installed.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> from lowrank_optax.adapters import save_peft
        >>> folder = tempfile.mkdtemp() + "/adapter"
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> _ = save_peft(folder, {"layers": {"q": pair}}, scale=4.0)
        >>> found = read_peft(folder)
        >>> found.pairs["layers.q"].a.shape, found.scales
        ((6, 2), {'layers.q': 4.0})

    Source: the layout of Hugging Face PEFT 0.21.
    """
    with open_peft(folder) as file:
        pairs = {name: file.pair(name) for name in file.modules}
        others = {name: file.other(name) for name in file.others}
        embeddings = frozenset(file.embeddings)
        magnitudes = {name: file.magnitude(name) for name in file.magnitudes}
        return PeftAdapter(file.config, pairs, others, embeddings, file.windows, magnitudes)


class PeftFile:
    """An open adapter, of which one pair at a time is in memory.

    Args:
        path: the safetensors file, for messages.
        config: the settings.
        file: the open safetensors file.

    Attributes:
        config: the settings.
        modules: the keys of the factors, by module and side.
        others: the keys of the whole weights, by name.
        embeddings: the modules that are embeddings.
        windows: the windows of the modules that are convolutions.
        magnitudes: the keys of DoRA's magnitudes, by module.
    """

    def __init__(self, path: Path, config: PeftConfig, file: Any) -> None:
        self.config = config
        self.modules: dict[str, dict[str, str]] = {}
        self.others: dict[str, str] = {}
        self.embeddings: set[str] = set()
        self.magnitudes: dict[str, str] = {}
        self._path, self._file = path, file
        for key in list(file.keys()):
            self._sort(key)
        if not self.modules:
            raise ValueError(f"{path} holds no factor of LoRA")
        for name, sides in self.modules.items():
            if set(sides) != {"A", "B"}:
                raise ValueError(f"{path}: {name} has a factor {next(iter(sides))} alone")
        if set(self.magnitudes) != (set(self.modules) if config.use_dora else set()):
            raise ValueError(
                f"{path}: {CONFIG} says use_dora={config.use_dora}, but the file has magnitudes of"
                f" {', '.join(sorted(self.magnitudes)) or 'no module'}"
            )
        shapes = {name: self._shape(sides["A"]) for name, sides in self.modules.items()}
        self.windows = {name: shape[2:] for name, shape in shapes.items() if len(shape) > 2}

    def pair(self, module: str) -> LoRAPair:
        """Reads the pair of a module.

        Raises:
            ValueError: its factors are not what they have to be.
        """
        stored = [self._read(self.modules[module][side]) for side in ("A", "B")]
        said = " and ".join(str(tuple(x.shape)) for x in stored)
        rank, window = self.config.rank(module), self.windows.get(module, ())
        if [x.shape[2:] for x in stored] != [window, (1,) * len(window)] or any(
            x.ndim < 2 for x in stored
        ):
            raise ValueError(
                f"{self._path}: {module} has factors of shapes {said}: no LoRA of PEFT"
            )
        a, b = (x.reshape(len(x), -1).T for x in stored)
        if not a.shape[-1] == b.shape[-2] == rank:
            raise ValueError(
                f"{self._path}: {module} has factors of shapes {said}, but the rank {rank} in"
                f" {CONFIG}"
            )
        base = self.others.get(f"{module}.weight")
        shape = None if base is None else self._shape(base)
        if shape and sorted((shape[0], math.prod(shape[1:]))) != sorted((len(a), b.shape[1])):
            raise ValueError(
                f"{self._path}: {module} has factors of shapes {said}, but {base} the shape"
                f" {shape}; this is not plain LoRA"
            )
        return LoRAPair(a, b)

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def magnitude(self, module: str) -> jax.Array:
        """Reads DoRA's magnitudes of a module, (out,).

        Raises:
            ValueError: they do not fit the module's pair.
        """
        value = self._read(self.magnitudes[module]).ravel()
        if value.shape != self._shape(self.modules[module]["B"])[:1]:
            raise ValueError(
                f"{self._path}: {self.magnitudes[module]} has {value.size} numbers, which are not"
                " one for each output"
            )
        return value

    def other(self, name: str) -> jax.Array:
        """Reads a whole weight, which may be of integers, as a count of batches."""
        return self._read(self.others[name], jnp.number)

    def _read(self, key: str, kind: Any = jnp.floating) -> jax.Array:
        try:
            value: jax.Array = self._file.get_tensor(key)
        except Exception as error:  # safetensors raises its own, and those of JAX for odd dtypes
            raise ValueError(f"{self._path}: {key} is not readable: {error}") from error
        if not jnp.issubdtype(value.dtype, kind):
            raise ValueError(f"{self._path}: {key} is of {value.dtype}; weights must be floating")
        if not jnp.all(jnp.isfinite(value)):
            raise ValueError(f"{self._path}: {key} holds numbers that are not finite")
        return value

    def _sort(self, key: str) -> None:
        """Takes a key for a factor or for a whole weight."""
        name = key.removeprefix(_PREFIX)
        if name == key:
            raise ValueError(
                f"{self._path}: {key} does not begin with {_PREFIX!r}, as PEFT's names do"
            )
        if found := _FACTOR.fullmatch(name):
            sides = self.modules.setdefault(found["module"], {})
            if found["side"] in sides:
                raise ValueError(f"{self._path}: {found['module']} has two factors {found['side']}")
            sides[found["side"]] = key
            if found["kind"]:
                self.embeddings.add(found["module"])
        elif found := _MAGNITUDE.fullmatch(name):
            self.magnitudes[found["module"]] = key
        elif any(f".{module}." in f".{name}" for module in self.config.modules_to_save):
            self.others[name] = key
        elif ".base_layer." in name:
            self.others[name.replace(".base_layer.", ".")] = key
        elif _WHOLE.fullmatch(name):
            self.others[name] = key
        else:
            raise ValueError(
                f"{self._path}: {key} is neither a factor of LoRA nor a whole weight; it is of"
                " another kind of adapter"
            )


@contextlib.contextmanager
def open_peft(folder: str | os.PathLike[str]) -> Iterator[PeftFile]:
    """Opens an adapter to read one pair at a time; see `read_peft`.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_peft`.

    Example:
        See `read_peft`.
    """
    folder = Path(folder)
    config_path, path = folder / CONFIG, folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise FileNotFoundError(
            f"{folder} holds adapter_model.bin, a pickle, which can run any code and is not read;"
            " save the adapter again with safe_serialization=True"
        )
    for needed in (config_path, path):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing; {folder} is no adapter of PEFT")
    if config_path.stat().st_size > _MAX_CONFIG:
        raise ValueError(f"{config_path} is larger than 1 MiB; it is no adapter_config.json")
    try:
        config = PeftConfig.parse(config_path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{config_path} {error}") from error
    library = _safetensors("safetensors")
    _require_no_duplicates(path)
    try:
        file = library.safe_open(path, framework="flax")
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    with file as opened:
        yield PeftFile(path, config, opened)


def write_peft(
    folder: str | os.PathLike[str],
    config: PeftConfig,
    pairs: Mapping[str, LoRAPair],
    others: Mapping[str, Any],
    embeddings: Collection[str] = (),
    windows: Mapping[str, Sequence[int]] = MappingProxyType({}),
    magnitudes: Mapping[str, jax.Array] = MappingProxyType({}),
) -> Path:
    """Writes an adapter as PEFT does, both files or none.

    Args:
        folder: where; it must not exist.
        config: the settings.
        pairs: by module name.
        others: whole weights by name. One of an adapted module is written as PEFT's `base_layer`.
        embeddings: the modules of `pairs` that are embeddings.
        windows: the modules of `pairs` that are convolutions, and their windows.
        magnitudes: DoRA's, (out,), of all modules or of none.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists.
        ValueError: numbers that are not finite; the message names the tensor.
        ImportError: `safetensors` is not installed.

    Example:
        See `lowrank_optax.adapters.save_peft`.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give another folder, or remove it")
    tensors = {}
    for name, value in others.items():
        module, _, parameter = name.rpartition(".")
        key = f"{module}.base_layer.{parameter}" if module in pairs else name
        tensors[f"{_PREFIX}{key}"] = jnp.asarray(value)
    for name, pair in pairs.items():
        key = "lora_embedding_{}" if name in embeddings else "lora_{}.weight"
        window = tuple(windows.get(name, ()))
        places = {"A": window, "B": (1,) * len(window)}
        for side, factor in zip("AB", pair, strict=True):
            stored = factor.T.reshape(factor.shape[1], -1, *places[side]) if window else factor.T
            tensors[f"{_PREFIX}{name}.{key.format(side)}"] = stored
    for name, value in magnitudes.items():
        window = tuple(windows.get(name, ()))
        shaped = value.reshape(1, -1, *[1] * len(window)) if window else value
        tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = shaped
    for key, value in tensors.items():
        if not jnp.all(jnp.isfinite(value)):
            raise ValueError(f"{key} holds numbers that are not finite; nothing is written")
    library = _safetensors("safetensors.flax")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        library.save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        (temporary / CONFIG).write_text(config.text(), encoding="utf-8")
        temporary.chmod(0o755)  # both are made for their owner alone
        (temporary / WEIGHTS).chmod(0o644)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "reading and writing PEFT adapters needs safetensors: pip install safetensors"
        ) from error


def _require_no_duplicates(path: Path) -> None:
    """Raises if the header names a tensor twice, of which readers would keep the last."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError(f"{path}: its header has a key twice")
        return values

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= path.stat().st_size - 8:
            raise ValueError(f"{path} is not a readable safetensors file: it is cut off")
        try:
            json.loads(file.read(size), object_pairs_hook=check)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
