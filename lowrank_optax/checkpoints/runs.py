"""What users call: `save`, `restore`, `read` and `steps`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lowrank_optax._core.arguments import check_integer
from lowrank_optax._core.names import listed
from lowrank_optax.checkpoints import folders
from lowrank_optax.checkpoints.leaves import (
    Kind,
    named,
    place,
    require_equal_in_all_processes,
    sharding_of,
    stored_form,
)


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Args:
        step: the step after which it was saved.
        params: from `restore`, trees as the targets; from `read`, arrays by path.
        opt_state: likewise.
        rngs: likewise; None or empty if none were saved.
    """

    step: int
    params: Any
    opt_state: Any
    rngs: Any


def save(
    folder: str | os.PathLike[str],
    step: int,
    *,
    params: Any,
    opt_state: Any,
    rngs: Any = None,
    keep: int | None = None,
) -> Path:
    """Writes a checkpoint, the whole or nothing, and returns when it is written.

    It becomes visible in one move, when all of it is written. A save that is killed leaves the
    checkpoints that were there, and a temporary folder that the next save removes. Only one run may
    write to a folder at a time. In a run of many processes all of them call this together.

    Args:
        folder: of the run, which all processes see; it is made if needed. Each step is a folder
            in it. Other folders in it stay as they are.
        step: how many steps are done, not negative.
        params: the trained leaves, pairs with their auxiliary leaves: `nnx.state(model,
            nnx.LoRAParam)`, Linen's `'lora'` collection, or any other tree of arrays and numbers of
            any shapes and dtypes. Arrays may be sharded over devices and processes. An array that
            belongs to one process must be the same in all.
        opt_state: the optimizer's state, such a tree: of optax, or `nnx.state(optimizer)`.
        rngs: the random state, such a tree, also of typed keys: `nnx.state(model, nnx.RngState)`.
        keep: how many checkpoints to keep, this and the last ones before it. Older ones are removed
            after this one is written. None keeps all.

    Returns:
        The folder of the step.

    Raises:
        FileExistsError: the step was saved before, or a folder of its name is there.
        NotADirectoryError: the folder is a file.
        ValueError: there is nothing to save, two leaves have the same path, or an array differs
            between processes.
        TypeError: a leaf is no array and no number, or is traced; a step that is no integer.
        ImportError: orbax is not installed.

    Example:
        >>> import jax.numpy as jnp, optax, tempfile
        >>> from lowrank_optax import LoRAPair, altlora
        >>> params = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))}
        >>> folder, state = tempfile.mkdtemp(), altlora(0.1).init(params)
        >>> for step in (10, 20, 30):
        ...     path = save(folder, step, params=params, opt_state=state, keep=2)
        >>> path.name, steps(folder)
        ('30', [20, 30])
    """
    check_integer("step", step, least=0)
    if keep is not None:
        check_integer("keep", keep, least=1)
    leaves = named({"params": params, "opt_state": opt_state, "rngs": rngs})
    kinds = {name: Kind.of(name, leaf, jax.Array) for name, leaf in leaves.items()}
    if not any(kind.size for name, kind in kinds.items() if name.split("/")[0] == "params"):
        raise ValueError(
            "`params` holds no numbers, so there is nothing to save: give the adapters, such as"
            " `nnx.state(model, nnx.LoRAParam)` after `nn.add_lora`."
        )
    stored = {name: stored_form(leaf) for name, leaf in leaves.items() if kinds[name].size}
    require_equal_in_all_processes(stored)
    return folders.write(folder, int(step), stored, kinds, keep)


def restore(
    folder: str | os.PathLike[str],
    *,
    params: Any,
    opt_state: Any,
    rngs: Any = None,
    step: int | None = None,
) -> Checkpoint:
    """Reads a checkpoint into trees like the targets, bit by bit as it was saved.

    The number of devices and of processes may have changed, and so may the shardings. All is
    compared before anything is read, so that nothing is restored in part.

    Args:
        folder: of the run.
        params: the target, a tree as given to `save`, after `nn.add_lora` and with the paths,
            shapes and dtypes that were saved. Its leaves are arrays, which are not changed, or
            `jax.ShapeDtypeStruct`. A result has the sharding of its target; if the target has none,
            or is a JAX array that is committed to no device, so is the result.
        opt_state: likewise, such as `tx.init(params)`, `jax.eval_shape(tx.init, params)` or
            `nnx.state(optimizer)`.
        rngs: likewise; needed if and only if it was saved.
        step: which one, the highest one by default.

    Returns:
        The step, and trees of the types of the targets. For NNX give each to `nnx.update`.

    Raises:
        FileNotFoundError: there is no checkpoint, or none of this step.
        NotADirectoryError: the folder is a file.
        ValueError: the checkpoint and the targets have other paths, shapes or dtypes, of which the
            message lists both sides; or the checkpoint cannot be read, as a file of it is damaged.
        TypeError: a leaf of the targets is no array and no number.
        ImportError: orbax is not installed.

    Example:
        >>> import jax, jax.numpy as jnp, tempfile
        >>> from lowrank_optax import LoRAPair, altlora
        >>> params, tx = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))}, altlora(0.1)
        >>> folder, key = tempfile.mkdtemp(), jax.random.key(7)
        >>> _ = save(folder, 10, params=params, opt_state=tx.init(params), rngs=key)
        >>> fresh = jax.tree.map(jnp.zeros_like, params)
        >>> found = restore(
        ...     folder, params=fresh, opt_state=tx.init(fresh), rngs=jax.random.key(0)
        ... )
        >>> found.step, found.params["q"].a[0].tolist(), found.rngs == key
        (10, [1.0, 1.0], Array(True, dtype=bool))
    """
    targets = {"params": params, "opt_state": opt_state, "rngs": rngs}
    leaves, arrays = named(targets), jax.Array | jax.ShapeDtypeStruct
    kinds = {name: Kind.of(name, leaf, arrays) for name, leaf in leaves.items()}
    lies = {name: sharding_of(leaf) for name, leaf in leaves.items()}
    with folders.opened(folder, step) as found:
        _require_same(found, kinds)
        # Keys are small; they are put where they belong afterwards, as keys.
        values = found.values({n: x for n, x in lies.items() if x and not kinds[n].is_key})
    placed = [place(values[name], leaf, lies[name]) for name, leaf in leaves.items()]
    return Checkpoint(found.step, **jax.tree.unflatten(jax.tree.structure(targets), placed))


def read(folder: str | os.PathLike[str], step: int | None = None) -> Checkpoint:
    """Reads a checkpoint without targets, as plain dicts.

    Pairs are found in such a dict by their names, as in any tree, and `flax.traverse_util.
    unflatten_dict(found.params, sep="/")` makes a nested one, which `nnx.replace_by_pure_dict`
    takes.

    Args:
        folder: of the run.
        step: which one, the highest one by default.

    Returns:
        The step and three dicts of arrays by path, the paths of messages and of `describe`. NumPy
        arrays as they were saved, whole in every process; typed keys are keys of JAX.

    Raises:
        FileNotFoundError: there is no checkpoint, or none of this step.
        NotADirectoryError: the folder is a file.
        ValueError: the checkpoint cannot be read, as a file of it is damaged.
        ImportError: orbax is not installed.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from lowrank_optax import LoRAPair
        >>> folder = tempfile.mkdtemp()
        >>> params = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))}
        >>> _ = save(folder, 10, params=params, opt_state=())
        >>> {path: array.shape for path, array in read(folder).params.items()}
        {'q/a': (6, 2), 'q/b': (2, 4)}
    """
    with folders.opened(folder, step) as found:
        values = found.values({})
    trees: dict[str, dict[str, Any]] = {"params": {}, "opt_state": {}, "rngs": {}}
    for name, value in values.items():
        tree, _, path = name.partition("/")
        trees[tree][path] = value
    return Checkpoint(found.step, **trees)


def steps(folder: str | os.PathLike[str]) -> list[int]:
    """Lists the steps of which there is a whole checkpoint.

    Args:
        folder: of the run; it need not exist.

    Returns:
        The steps, ascending.

    Raises:
        NotADirectoryError: the folder is a file.
        ImportError: orbax is not installed.

    Example:
        >>> steps("a/folder/that/is/not/there")
        []
    """
    return folders.whole_steps(folder)


def _require_same(found: folders.Step, kinds: Mapping[str, Kind]) -> None:
    """Raises unless the targets are what the checkpoint holds."""
    unknown = found.kinds.keys() - kinds.keys()
    missing = kinds.keys() - found.kinds.keys()
    others = [
        f"{name} is {kind} there and {kinds[name]} in the targets"
        for name, kind in found.kinds.items()
        if name in kinds and kind[:2] != kinds[name][:2]
    ]
    parts = [
        ("only in the checkpoint: ", sorted(unknown)),
        ("only in the targets: ", sorted(missing)),
        ("", others),
    ]
    problems = [f"{text}{listed(names, folders.MANY)}" for text, names in parts if names]
    if problems:
        raise ValueError(
            f"{found.path} does not fit the targets; {'; '.join(problems)}. Nothing was restored."
            " Give targets from the same `nn.add_lora` and optimizer, `rngs` if it was saved, or"
            " take what you need from `checkpoints.read`."
        )
