"""A table of the adapters of a model."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from lowrank_optax._core.layouts import PairMatcher
from lowrank_optax._core.names import MAGNITUDE
from lowrank_optax._core.pairing import Pairing, find_pairs
from lowrank_optax._core.scales import scales
from lowrank_optax.nn.nnx_surgery import find_lora_layers

_WIDTH = 100
_SHOWN = 6
_HTML = '<pre style="line-height:1.2">{code}</pre>'


class AdapterSummary(NamedTuple):
    """One row of `lora_summary`.

    Attributes:
        path: '/'-joined path of what holds the factors.
        kind: name of the kind of pair, such as `'LoRAPair'`.
        a: shape of the input-side factor, (..., in, r).
        b: shape of the output-side factor, (..., r, out).
        rank: r.
        scale: the forward scale s, or None if it is not known.
        trained: how many numbers the two factors have.
    """

    path: str
    kind: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    rank: int
    scale: Any
    trained: int


class LoRASummary:
    """The adapters of a model, shown as a table in a terminal and in a notebook.

    Attributes:
        rows: one `AdapterSummary` for each adapter.
        trained: how many numbers all factors have.
        fallback: how many numbers every other leaf has, by path: of a model DoRA's magnitudes.
    """

    def __init__(
        self, rows: Sequence[AdapterSummary], fallback: Mapping[str, int] | None = None
    ) -> None:
        self.rows = tuple(rows)
        self.trained = sum(row.trained for row in self.rows)
        self.fallback = dict(fallback or {})

    def __rich__(self) -> Table:
        """Makes the table."""
        table = Table(
            title=self._title,
            title_justify="left",
            caption=self._caption,
            caption_justify="left",
        )
        for name in ("path", "kind"):
            table.add_column(name, overflow="fold")
        for name in ("a", "b", "rank", "scale", "trained"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            a, b = ("×".join(map(str, shape)) for shape in (row.a, row.b))
            scale = "?" if row.scale is None else f"{row.scale:g}"
            table.add_row(row.path or "·", row.kind, a, b, str(row.rank), scale, f"{row.trained:,}")
        return table

    def __repr__(self) -> str:
        """Renders the table as text."""
        console = Console(width=_WIDTH, color_system=None)
        with console.capture() as capture:
            console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def _repr_html_(self) -> str:
        """Renders the table for a notebook."""
        console = Console(width=_WIDTH, record=True, file=io.StringIO())
        console.print(self.__rich__())
        return console.export_html(inline_styles=True, code_format=_HTML)

    @property
    def _title(self) -> str:
        adapters = "1 adapter" if len(self.rows) == 1 else f"{len(self.rows)} adapters"
        return f"{adapters}, {self.trained:,} trained parameters"

    @property
    def _caption(self) -> str | None:
        if not self.fallback:
            return None
        names = list(self.fallback)
        shown = ", ".join(names[:_SHOWN]) + ", …" * (len(names) > _SHOWN)
        leaves = "leaf goes" if len(names) == 1 else "leaves go"
        numbers = sum(self.fallback.values())
        return f"{len(names)} other {leaves} to the fallback, {numbers:,} parameters: {shown}"


def lora_summary(model: Any, scale: Any = None) -> LoRASummary:
    """Lists the adapters of a model: path, kind, shapes, rank, scale, trained parameters.

    Args:
        model: an NNX model, or any tree of parameters with pairs, such as the `'lora'` collection
            of a Linen model.
        scale: for a tree, the forward scales: a number, a callable from a path, or numbers by path;
            not known by default. An NNX model knows its own.

    Returns:
        The summary, which prints as a table.

    Raises:
        ValueError: scales for an NNX model; pairs that do not fit, as from `find_pairs`.

    Example:
        >>> from flax import nnx
        >>> from lowrank_optax import nn
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> _ = nn.add_lora(model, 'layers/0', nn.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> nn.lora_summary(model)
        1 adapter, 24 trained parameters
        ┏━━━━━━━━━━┳━━━━━━━━━━┳━━━━━┳━━━━━┳━━━━━━┳━━━━━━━┳━━━━━━━━━┓
        ┃ path     ┃ kind     ┃   a ┃   b ┃ rank ┃ scale ┃ trained ┃
        ┡━━━━━━━━━━╇━━━━━━━━━━╇━━━━━╇━━━━━╇━━━━━━╇━━━━━━━╇━━━━━━━━━┩
        │ layers/0 │ LoRAPair │ 4×2 │ 2×8 │    2 │     8 │      24 │
        └──────────┴──────────┴─────┴─────┴──────┴───────┴─────────┘
    """
    if isinstance(model, nnx.Module):
        if scale is not None:
            raise ValueError("an NNX model knows its forward scales; leave `scale` out")
        layers = dict(find_lora_layers(model))
        pairs = [(path, layer.pair, layer.scale) for path, layer in layers.items()]
        magnitudes = {
            f"{path}/{MAGNITUDE}": layer.lora_magnitude.size
            for path, layer in layers.items()
            if layer.lora.dora
        }
        return LoRASummary(
            [_row(path, type(x), tuple(x.a.shape), tuple(x.b.shape), s) for path, x, s in pairs],
            magnitudes,
        )
    return LoRASummary(_rows(find_pairs(model), model, scale))


def describe(
    params: Any, specs: Sequence[PairMatcher] | None = None, scale: Any = None
) -> LoRASummary:
    """Lists what an optimizer of this library makes of a parameter tree.

    Args:
        params: the parameters: arrays, shapes or Flax variables.
        specs: layouts of the pairs (`PairSpec`), `DEFAULT_SPECS` by default.
        scale: the forward scales, as for an optimizer; not known by default.

    Returns:
        The summary, which prints as a table: the pairs with in, out, rank and scale, and what goes
        to the fallback.

    Raises:
        ValueError: as from the optimizer's `init`: pairs that do not fit, scales that lack one.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import describe
        >>> q = {"w_lora_a": jnp.ones((16, 4)), "w_lora_b": jnp.ones((4, 2, 8))}
        >>> describe({"q": q, "bias": jnp.ones(8)}, scale=2.0)
        1 adapter, 128 trained parameters
        ┏━━━━━━┳━━━━━━━━━━┳━━━━━━┳━━━━━━┳━━━━━━┳━━━━━━━┳━━━━━━━━━┓
        ┃ path ┃ kind     ┃    a ┃    b ┃ rank ┃ scale ┃ trained ┃
        ┡━━━━━━╇━━━━━━━━━━╇━━━━━━╇━━━━━━╇━━━━━━╇━━━━━━━╇━━━━━━━━━┩
        │ q/w  │ LoRAPair │ 16×4 │ 4×16 │    4 │     2 │     128 │
        └──────┴──────────┴──────┴──────┴──────┴───────┴─────────┘
        1 other leaf goes to the fallback, 8 parameters: bias
    """
    found = find_pairs(params, specs)
    rest = jax.tree.leaves(found.rest(params))
    sizes = {
        path: math.prod(np.shape(leaf)) for path, leaf in zip(found.unpaired, rest, strict=True)
    }
    return LoRASummary(_rows(found, params, scale), sizes)


def _rows(found: Pairing, params: Any, scale: Any) -> list[AdapterSummary]:
    known = [None] * len(found.pairs) if scale is None else scales(found, scale)
    leaves = found.treedef.flatten_up_to(params)
    pairs = zip(found.pairs, known, strict=True)
    return [_row(at.path, at.kind, *at.shapes(leaves), s) for at, s in pairs]


def _row(
    path: str, kind: type, a: tuple[int, ...], b: tuple[int, ...], scale: Any
) -> AdapterSummary:
    trained = math.prod(a) + math.prod(b)
    return AdapterSummary(path, kind.__name__, a, b, a[-1], scale, trained)
