"""PEFT import and export of models and parameter trees."""

import os
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowrank_optax._core.layouts import PairMatcher
from lowrank_optax._core.linalg import SIDES, widened
from lowrank_optax._core.names import in_words, join_keys
from lowrank_optax._core.nodes import LoRAPair
from lowrank_optax._core.pairing import find_pairs
from lowrank_optax.adapters.name_maps import Module, Names, joined, modules_of
from lowrank_optax.adapters.pairs import compress, plain_pair
from lowrank_optax.adapters.peft_config import PeftConfig
from lowrank_optax.adapters.peft_entries import Entry, entries
from lowrank_optax.adapters.peft_file import PeftAdapter, read_peft, write_peft
from lowrank_optax.nn.nnx_bases import kernel_name, kernel_of
from lowrank_optax.nn.nnx_surgery import find_lora_layers, lora_layers
from lowrank_optax.nn.starts import write_node

# A framed pair at the end of its run has rank r up to rounding: then r is enough.
_EXACT = 1e-6


def save_peft(
    folder: str | os.PathLike[str],
    source: Any,
    *,
    names: Names = None,
    scale: Any = None,
    specs: Sequence[PairMatcher] | None = None,
    embeddings: Collection[str] = (),
    windows: Mapping[str, Sequence[int]] = MappingProxyType({}),
    rank: int | None = None,
    dtype: Any = None,
    base_model: str = "",
    use_rslora: bool = False,
    modules_to_save: Mapping[str, Any] | None = None,
    original: nnx.Module | None = None,
) -> dict[str, float]:
    """Writes adapters as Hugging Face PEFT does, for torch, vLLM and others.

    Args:
        folder: where; it must not exist. Both files are written, or none.
        source: an NNX model with LoRA layers, or a tree of parameters with pairs, such as the
            `'lora'` collection of a Linen model.
        names: from a pair's path to its module name in the base model: a function, or a mapping,
            perhaps with wildcards, such as those of `adapters.name_maps`. For layers that are
            stacked in one pair `"model.layers.{}.self_attn.q_proj"`, with `{}` for the index; for
            modules whose kernels lie side by side in one a tuple of their names. By default the
            path with dots.
        scale: of a tree, the forward scales: a number, a callable from a path, or numbers by path.
            An NNX model knows its own.
        specs: of a tree, the layouts of its pairs.
        embeddings: of a tree, the paths of the pairs that adapt embeddings.
        windows: of a tree, the windows (k₁, …, k_d) of the convolutions, by path of the pair.
        rank: cut every pair to the nearest one of this rank. By default a framed pair is written at
            rank r where that is exact, and at 2r where not; others as they are.
        dtype: of the written factors. By default that of the parameters, and float32 (or float64)
            for factors that are computed: of frames, and with `rank` or `original`.
        base_model: name or path of the base model, for PEFT to load.
        use_rslora: whether alphas are written for rsLoRA's scales.
        modules_to_save: whole weights to write beside, such as those of a head, by their name in
            the base model (`"classifier.weight"`), in torch's layout.
        original: of an NNX model whose kernels were changed, as by `nn.weight_start`, or by a
            gradient start with `keep_function=True`: the model as it was, with adapters or without.
            What its kernels differ by is written too, as r further components of each pair. The
            model itself writes the pairs alone, which then need its kernels as their base.

    Returns:
        The relative error of each written pair by module name; 0 where nothing was cut. With
        `original`, that of the kernels' difference.

    Raises:
        FileExistsError: the folder exists.
        ValueError: no pairs, two pairs of one name, a stacked pair whose name has no `{}`, a scale
            that is missing, DoRA in some layers alone, a rank above a pair's, an original of
            another structure, merged layers with `original`, kernels that a start has changed
            without it, a whole weight of an adapted module or without a module.
        ImportError: `safetensors` is not installed.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> folder = tempfile.mkdtemp() + "/adapter"
        >>> stacked = {"q": LoRAPair(jnp.ones((3, 6, 2)), jnp.ones((3, 2, 4)))}
        >>> errors = save_peft(folder, stacked, scale=2.0, names={"q": "layers.{}.q_proj"})
        >>> list(errors)
        ['layers.0.q_proj', 'layers.1.q_proj', 'layers.2.q_proj']
    """
    pairs: dict[str, LoRAPair] = {}
    found_scales, errors = {}, {}
    as_embeddings, as_windows, magnitudes = set(), {}, {}
    if original is None:
        _require_uncorrected(source, "give `original`, the model as it was before the start")
    for entry in entries(source, specs, scale, embeddings, windows):
        change = None if original is None else _change(source, original, entry.path)
        pair, error = _written_pair(entry, rank, change)
        for module in modules_of(entry.path, pair, names):
            name = module.name
            if name in pairs:
                raise ValueError(f"{entry.path}: {name!r} is also the name of another pair")
            pairs[name] = jax.tree.map(lambda x: x.astype(dtype or x.dtype), module.of(pair))
            found_scales[name] = float(entry.scale)
            if entry.is_embedding:
                as_embeddings.add(name)
            if entry.window:
                as_windows[name] = entry.window
            if entry.magnitude is not None:
                magnitudes[name] = module.of_outputs(entry.magnitude)
            errors[name] = float(error[module.at])
    others = dict(modules_to_save or {})
    config = PeftConfig.of(
        {name: pair.a.shape[-1] for name, pair in pairs.items()},
        found_scales,
        use_rslora=use_rslora,
        base_model=base_model,
        use_dora=bool(magnitudes),
        modules_to_save=sorted({_module_to_save(name, pairs) for name in others}),
    )
    if magnitudes and (without := sorted(pairs.keys() - magnitudes.keys())):
        raise ValueError(
            f"PEFT has DoRA in all modules or in none, and these have none: {', '.join(without)}"
        )
    write_peft(folder, config, pairs, others, as_embeddings, as_windows, magnitudes)
    return errors


def load_peft(
    folder: str | os.PathLike[str],
    target: Any,
    *,
    names: Names = None,
    scale: Any = None,
    specs: Sequence[PairMatcher] | None = None,
    ignore_others: bool = False,
) -> Any:
    """Loads a PEFT adapter into adapters of the same ranks and scales.

    Args:
        folder: as PEFT, or `save_peft`, wrote it.
        target: an NNX model with LoRA layers, changed in place, or a tree of parameters with pairs.
            `PeftConfig` (`read_peft(folder).config`) tells the ranks and alphas to make them with.
        names: as in `save_peft`.
        scale: as in `save_peft`.
        specs: as in `save_peft`.
        ignore_others: whether to leave out the whole weights of the file, such as those of a head.
            `read_peft(folder).others` has them, in torch's layout.

    Returns:
        The model itself, or a new tree.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_peft`. ValueError too for modules of
            the file that have no pair and pairs that are not in the file, both listed, for whole
            weights, other shapes or scales, layers that are merged, or whose kernel a start has
            changed; nothing is changed then.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> folder = tempfile.mkdtemp() + "/adapter"
        >>> trained = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))}
        >>> _ = save_peft(folder, trained, scale=2.0)
        >>> zeros = {"q": LoRAPair(jnp.zeros((6, 2)), jnp.zeros((2, 4)))}
        >>> load_peft(folder, zeros, scale=2.0)["q"].b.sum().item()
        8.0
    """
    adapter = read_peft(folder)
    if adapter.others and not ignore_others:
        raise ValueError(
            f"{folder} holds whole weights too: {', '.join(sorted(adapter.others))}. Put those of"
            " `read_peft(folder).others` into the model yourself, and load the pairs with"
            " `ignore_others=True`"
        )
    found_entries = list(entries(target, specs, scale))
    layers = lora_layers(target) if isinstance(target, nnx.Module) else {}
    for path, layer in layers.items():
        _require_unmerged(path, layer)
        _require_kept(path, layer)
    for entry in found_entries if not isinstance(target, nnx.Module) else ():
        _require_plain(entry)
    _require_uncorrected(target, "load into a model with its own kernels")
    modules = [modules_of(entry.path, entry.node, names) for entry in found_entries]
    wanted = {module.name for each in modules for module in each}
    _require_same_names(folder, wanted, set(adapter.pairs))
    each = list(zip(found_entries, modules, strict=True))
    loaded = [_loaded(entry, of_entry, adapter) for entry, of_entry in each]
    magnitudes = [_loaded_magnitude(folder, entry, of_entry, adapter) for entry, of_entry in each]
    if isinstance(target, nnx.Module):
        for entry, pair, magnitude in zip(found_entries, loaded, magnitudes, strict=True):
            _put_into(layers[entry.path], pair, magnitude)
        return target
    found = find_pairs(target, specs)
    leaves = found.treedef.flatten_up_to(found.merge(found.put(loaded, target), found.rest(target)))
    for entry, magnitude in zip(found_entries, magnitudes, strict=True):
        if magnitude is not None:
            leaves[found.paths.index(entry.magnitude_at)] = magnitude
    return found.treedef.unflatten(leaves)


def _change(model: Any, original: nnx.Module, path: str) -> jax.Array:
    """By how much the kernel of a layer differs from the original's, (..., in, out)."""
    if not isinstance(model, nnx.Module):
        raise ValueError("`original` is for NNX models; a tree does not hold the kernels")
    layer = lora_layers(model)[path]
    _require_unmerged(path, layer)
    modules = {join_keys(keys): module for keys, module in nnx.iter_graph(original)}
    before: Any = modules.get(path)
    _require_unmerged(f"{in_words(path, 'the layer')} of `original`", before)
    base = getattr(before, "base", before)
    kernel = None if kernel_name(base) is None else kernel_of(base)
    if kernel is None or kernel.shape != layer.kernel.shape:
        raise ValueError(
            f"{in_words(path, 'the layer')}: `original` has no such layer with a kernel of this"
            " shape"
        )
    wide = lambda x: layer.axes.to_matrix(widened(x[...]))
    return wide(layer.kernel) - wide(kernel)


def _module_to_save(name: str, adapted: Collection[str]) -> str:
    """The full name of a whole weight's module: PEFT takes every module that ends with it."""
    module = name.rpartition(".")[0]
    if not module:
        raise ValueError(
            f"modules_to_save: {name!r} is no weight of a module; name the parameter too, as in"
            f" '{name}.weight'"
        )
    for other in adapted:
        if f".{module}." in f".{other}.":
            raise ValueError(
                f"modules_to_save: {name!r} is a weight of {module}, which is adapted or holds"
                f" {other}, which is; PEFT stores a module whole or adapts it"
            )
    return module


def _require_unmerged(path: str, layer: Any) -> None:
    if getattr(layer, "merged", False):
        raise ValueError(
            f"{in_words(path, 'the layer')}: its kernel contains the adapter already; call"
            " nn.unmerge_lora first"
        )


def _require_kept(path: str, layer: Any) -> None:
    extra = layer.lora.extra
    if extra is not None and not extra.keeps_product:
        raise ValueError(
            f"{in_words(path, 'the layer')}: an adapter with {extra} starts with factors of its"
            " own; make it with Frames() to load others"
        )


def _require_plain(entry: Entry) -> None:
    if not isinstance(entry.node, LoRAPair):
        raise ValueError(
            f"{in_words(entry.path)}: is a {type(entry.node).__name__}; load into a LoRAPair, and"
            " add frames or shadows to that"
        )


def _require_uncorrected(model: Any, remedy: str) -> None:
    for path, layer in find_lora_layers(model) if isinstance(model, nnx.Module) else ():
        if layer.corrected:
            raise ValueError(
                f"{in_words(path, 'the layer')}: a start has changed its kernel, and a pair alone"
                f" does not fit the kernel that it was; {remedy}"
            )


def _written_pair(
    entry: Entry, rank: int | None, change: jax.Array | None
) -> tuple[LoRAPair, jax.Array]:
    """A node as the plain pair that is written, and the error of each."""
    node = entry.node
    if change is not None and jnp.any(change):
        *batch, n_in, n_out = change.shape
        difference = change / entry.scale
        eye = jnp.broadcast_to(jnp.eye(min(n_in, n_out)), (*batch, *[min(n_in, n_out)] * 2))
        dense = LoRAPair(difference, eye) if n_out < n_in else LoRAPair(eye, difference)
        further, error = compress(dense, node.a.shape[-1])
        plain = plain_pair(node)
        side_by_side = LoRAPair(
            jnp.concatenate([plain.a, further.a], axis=-1),
            jnp.concatenate([plain.b, further.b], axis=-2),
        )
        return (side_by_side, error) if rank is None else compress(side_by_side, rank)
    if rank is not None:
        return compress(node, rank)
    plain = plain_pair(node)
    if plain.a.shape[-1] > node.a.shape[-1]:
        pair, error = compress(node, node.a.shape[-1])
        if jnp.max(error) <= _EXACT:
            return pair, error
    return plain, jnp.zeros(plain.a.shape[:-2])


def _loaded(entry: Entry, modules: Sequence[Module], adapter: PeftAdapter) -> LoRAPair:
    """The pair of an entry from those of its modules, which must fit."""
    node = entry.node
    for module in modules:
        name, found = module.name, adapter.pairs[module.name]
        _require_same_kind(entry, name, adapter)
        theirs, own = adapter.config.scale(name), float(entry.scale)
        if abs(theirs - own) > 1e-6 * own:
            raise ValueError(
                f"{entry.path}: has the scale {own:g}, but {name} in the file {theirs:g}; make the"
                " adapter with the file's alpha and rank"
            )
        for side, x, y in zip(SIDES, module.of(node), found, strict=True):
            if x.shape != y.shape:
                raise ValueError(
                    f"{entry.path}: its factor {side} is {tuple(x.shape)}, but that of {name} in"
                    f" the file {tuple(y.shape)}"
                )
    pairs = [adapter.pairs[module.name] for module in modules]
    pair = joined(entry.path, pairs, node.a.shape[:-2], modules[0].parts)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), pair, LoRAPair(node.a, node.b))


def _require_same_kind(entry: Entry, name: str, adapter: PeftAdapter) -> None:
    """Refuses a module of another kind than the layer; a tree does not know its layers."""
    if not entry.knows_layer:
        return
    said = lambda is_embedding, window: (
        "an embedding" if is_embedding else f"a convolution {window}" if window else "linear"
    )
    own = said(entry.is_embedding, entry.window)
    theirs = said(name in adapter.embeddings, tuple(adapter.windows.get(name, ())))
    if own != theirs:
        raise ValueError(f"{entry.path}: is {own}, but {name} in the file {theirs}")


def _loaded_magnitude(
    folder: Any, entry: Entry, modules: Sequence[Module], adapter: PeftAdapter
) -> jax.Array | None:
    """DoRA's magnitudes of an entry from those of its modules."""
    own = entry.magnitude
    if (own is not None) != adapter.config.use_dora:
        raise ValueError(
            f"{entry.path}: {folder} has use_dora={adapter.config.use_dora}, and this adapter has"
            f" it {own is not None}; make it with LoRAConfig(dora={adapter.config.use_dora})"
        )
    if own is None:
        return None
    parts = modules[0].parts
    flat = [adapter.magnitudes[module.name] for module in modules]
    rows = [jnp.concatenate(flat[i : i + parts]) for i in range(0, len(flat), parts)]
    return jnp.stack(rows).reshape(own.shape).astype(own.dtype)


def _put_into(layer: Any, pair: LoRAPair, magnitude: jax.Array | None) -> None:
    """Writes a pair into a layer; what the layer has beside starts anew."""
    extra = layer.lora.extra
    write_node(layer, pair if extra is None else extra.add_to(pair, jax.random.key(0)))
    if magnitude is not None:
        layer.lora_magnitude[...] = magnitude


def _require_same_names(folder: Any, wanted: set[str], there: set[str]) -> None:
    if wanted == there:
        return
    listed = lambda names: ", ".join(sorted(names)) or "none"
    raise ValueError(
        f"{folder} does not fit: pairs without a module in the file: {listed(wanted - there)};"
        f" modules of the file without a pair: {listed(there - wanted)}. Give `names`"
    )
