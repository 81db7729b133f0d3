"""What PEFT's export and import need to know of each pair of a model or of a tree."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import nnx

from lowrank_optax._core.layouts import PairMatcher
from lowrank_optax._core.names import MAGNITUDE, in_words, listed
from lowrank_optax._core.pairing import Pairing, find_pairs
from lowrank_optax._core.scales import scales
from lowrank_optax.nn.nnx_surgery import lora_layers

_MAGNITUDE = re.compile(rf"{MAGNITUDE}(_vector)?(/default)?(/weight)?")


class Entry(NamedTuple):
    """One pair of a source: its path, node and forward scale, and what else its layer says.

    Args:
        path: the pair's.
        node: the pair, with what it carries.
        scale: the forward scale.
        magnitude: DoRA's, if the layer has them.
        magnitude_at: the path of these in a tree.
        is_embedding: whether it adapts an embedding.
        window: of the convolution that it adapts, empty for another layer.
        knows_layer: whether the two before were read from the layer.
    """

    path: str
    node: Any
    scale: Any
    magnitude: Any = None
    magnitude_at: str = ""
    is_embedding: bool = False
    window: tuple[int, ...] = ()
    knows_layer: bool = False


def entries(
    source: Any,
    specs: Sequence[PairMatcher] | None,
    scale: Any,
    embeddings: Collection[str] = (),
    windows: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Iterator[Entry]:
    """Yields the pairs of a model or of a tree; see `save_peft` for the arguments.

    Raises:
        ValueError: no pairs, arguments that the source does not need, or that name no pair.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> [entry.window for entry in entries({"conv": pair}, None, 1.0, windows={"conv": 3})]
        [(3,)]
    """
    if isinstance(source, nnx.Module):
        if scale is not None or embeddings or windows:
            raise ValueError(
                "an NNX model knows the scales and kinds of its layers: leave `scale`, `embeddings`"
                " and `windows` out"
            )
        for path, layer in lora_layers(source).items():
            base = layer.base
            yield Entry(
                path,
                layer.pair,
                layer.scale,
                magnitude=layer.lora_magnitude[...] if layer.lora.dora else None,
                is_embedding=isinstance(base, nnx.Embed),
                window=tuple(base.kernel_size) if isinstance(base, nnx.Conv) else (),
                knows_layer=True,
            )
        return
    found: Pairing = find_pairs(source, specs)
    if not found.pairs:
        raise ValueError("the parameters hold no LoRA pairs")
    if scale is None:
        raise ValueError(
            "a tree of parameters does not hold the scales of its pairs: give `scale`, as to the"
            " optimizer"
        )
    if not isinstance(windows, Mapping):
        raise ValueError(f"`windows` must be windows by path of the pair, got {windows!r}")
    paths = {at.path for at in found.pairs}
    if unknown := sorted({*embeddings, *windows} - paths):
        raise ValueError(
            f"`embeddings` and `windows` name no pair: {', '.join(unknown)}; the pairs are"
            f" {', '.join(sorted(paths))}"
        )
    leaves = found.treedef.flatten_up_to(source)
    at_path = dict(zip(found.paths, leaves, strict=True))
    for at, node, value in zip(found.pairs, found.take(source), scales(found, scale), strict=True):
        magnitude_at = _magnitude_at(at.path, found.paths)
        window = _window(at.path, windows, node.a.shape[-2])
        if window and at.path in embeddings:
            raise ValueError(f"{at.path}: is in `embeddings` and in `windows`; it is one of them")
        yield Entry(
            at.path,
            node,
            value,
            magnitude=at_path.get(magnitude_at),
            magnitude_at=magnitude_at,
            is_embedding=at.path in embeddings,
            window=window,
        )


def _window(path: str, windows: Mapping[str, Any], n_in: int) -> tuple[int, ...]:
    """The window of a tree's pair, which must divide its inputs; empty without one."""
    given = windows.get(path, ())
    window = (given,) if isinstance(given, int) else tuple(given)
    if not all(isinstance(k, int) and k > 0 for k in window) or n_in % math.prod(window):
        raise ValueError(
            f"{path}: `windows` has {given!r}, which is no window of a convolution with {n_in}"
            " inputs a place; it needs c·k₁⋯k_d of them"
        )
    return window


def _magnitude_at(pair: str, paths: Sequence[str]) -> str:
    """Where DoRA's magnitudes of a pair stand in a tree; empty if it has none."""
    prefix = f"{pair}/" if pair else ""
    beside = [path for path in paths if path.startswith(prefix + MAGNITUDE)]
    if len(beside) > 1 or not all(
        _MAGNITUDE.fullmatch(path.removeprefix(prefix)) for path in beside
    ):
        raise ValueError(
            f"{in_words(pair)}: beside it are {listed(beside)}; magnitudes of DoRA are one leaf,"
            f" {MAGNITUDE}, or PEFT's {MAGNITUDE}_vector"
        )
    return beside[0] if beside else ""
