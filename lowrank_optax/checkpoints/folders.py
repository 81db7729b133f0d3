"""The folder of a run, a folder in it for each step; all that is known of orbax.

The folder of a step has two items of orbax: `arrays`, a flat dict of arrays by path, and
`manifest`, a JSON file of what each of them is. No types of trees are written, so that a checkpoint
can be read without the code that wrote it.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_optax._core.arguments import check_integer
from lowrank_optax._core.names import listed
from lowrank_optax.checkpoints.leaves import Kind, loaded_form

_MANIFEST = "manifest"  # the item of orbax that tells a step of ours from any other folder
MANY = 8  # names that a message lists


def write(
    folder: str | os.PathLike[str],
    step: int,
    stored: Mapping[str, Any],
    kinds: Mapping[str, Kind],
    keep: int | None,
) -> Path:
    """Writes a step, and removes older ones; see `checkpoints.save`.

    Args:
        folder: of the run.
        step: which.
        stored: the arrays by path, but for empty ones.
        kinds: of all leaves by path.
        keep: how many steps up to this one stay.

    Returns:
        The folder of the step.

    Raises:
        FileExistsError: the step is there.
        NotADirectoryError: the folder is a file.
        ImportError: orbax is not installed.
    """
    ocp, folder = _orbax(), _absolute(folder)
    with _manager(folder, writes=True) as manager:
        if (folder / str(step)).exists():
            raise FileExistsError(
                f"{folder / str(step)} exists and is not overwritten; save another step, give"
                " another folder, or remove it."
            )
        manifest = {name: kind._asdict() for name, kind in kinds.items()}
        args = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave(dict(stored)), **{_MANIFEST: ocp.args.JsonSave(manifest)}
        )
        manager.save(step, args=args, force=True)  # else orbax skips steps before the last one
        if keep is not None:
            earlier = [found for found in _own_steps(manager) if found < step]
            for old in earlier[: max(0, len(earlier) + 1 - keep)]:
                manager.delete(old)
    return folder / str(step)


def whole_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Lists the steps that are whole; see `checkpoints.steps`."""
    folder = _absolute(folder)
    if not folder.is_dir():
        return []
    with _manager(folder, writes=False) as manager:
        return _own_steps(manager)


@contextlib.contextmanager
def opened(folder: str | os.PathLike[str], step: int | None) -> Iterator["Step"]:
    """Opens a step, or the highest one.

    Raises:
        FileNotFoundError: there is none.
        NotADirectoryError: the folder is a file.
        TypeError: the step is no integer.
        ValueError: its manifest cannot be read.
        ImportError: orbax is not installed.
    """
    folder = _absolute(folder)
    if step is not None:
        check_integer("step", step, least=0)
    if not (found := whole_steps(folder)):
        raise FileNotFoundError(
            f"{folder} has no checkpoint that `checkpoints.save` wrote; give the folder that it"
            " was given."
        )
    if step is not None and step not in found:
        raise FileNotFoundError(
            f"{folder} has no checkpoint of step {step}; there are {listed(map(str, found), MANY)}."
        )
    with _manager(folder, writes=False) as manager:
        yield Step(manager, found[-1] if step is None else int(step))


class Step:
    """A step that is open.

    Args:
        manager: of orbax.
        step: which.

    Attributes:
        step: which.
        path: its folder.
        kinds: what it holds by path.
    """

    def __init__(self, manager: Any, step: int) -> None:
        self.step = step
        self.path = Path(manager.directory) / str(step)
        self._manager = manager
        args = _orbax().args
        with self._explained():
            item = args.Composite(**{_MANIFEST: args.JsonRestore()})
            manifest = manager.restore(step, args=item)[_MANIFEST]
            self.kinds = {
                name: Kind(kind["dtype"], tuple(kind["shape"]), kind["impl"])
                for name, kind in manifest.items()
            }

    def values(self, shardings: Mapping[str, Any]) -> dict[str, Any]:
        """Reads all leaves.

        Args:
            shardings: of those that are to be arrays of JAX, of which each process reads its part;
                the others are arrays of NumPy. Not of typed keys, which are keys.

        Returns:
            The leaves by path.

        Raises:
            ValueError: they cannot be read.
        """
        ocp = _orbax()
        plain = ocp.RestoreArgs(restore_type=np.ndarray)
        like = {
            name: ocp.ArrayRestoreArgs(sharding=shardings[name]) if name in shardings else plain
            for name, kind in self.kinds.items()
            if kind.size
        }
        arrays = ocp.args.PyTreeRestore(item=dict.fromkeys(like, 0), restore_args=like)
        with self._explained():
            item = ocp.args.Composite(arrays=arrays)
            stored = self._manager.restore(self.step, args=item)["arrays"]
            return {name: loaded_form(kind, stored.get(name)) for name, kind in self.kinds.items()}

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds
            others = [str(step) for step in _own_steps(self._manager) if step != self.step]
            raise ValueError(
                f"{self.path} cannot be read: a file of it is damaged or missing, or a sharding"
                " does not fit. Nothing was restored. Other steps there:"
                f" {listed(others, MANY) or 'none'}."
            ) from error


def _absolute(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; give the folder of the run.")
    return path


def _own_steps(manager: Any) -> list[int]:
    """The steps that `write` wrote, ascending; to orbax each folder named by a number is one."""
    folder = Path(manager.directory)
    return sorted(step for step in manager.all_steps() if (folder / f"{step}/{_MANIFEST}").is_dir())


def _manager(folder: Path, *, writes: bool) -> Any:
    """Opens a folder; one that writes makes it, and removes what killed saves have left."""
    ocp = _orbax()
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=writes, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(folder, options=options)


def _orbax() -> Any:
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError("checkpoints need orbax: pip install orbax-checkpoint") from error
