"""A table of the adapters of a model."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx
from rich.console import Console
from rich.table import Table

from lowrank_optax._core.linalg import SIDES
from lowrank_optax._core.pairing import find_pairs
from lowrank_optax._core.scales import scales
from lowrank_optax.nn.nnx_surgery import find_lora_layers

_WIDTH = 100
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
    """

    def __init__(self, rows: Sequence[AdapterSummary]) -> None:
        self.rows = tuple(rows)
        self.trained = sum(row.trained for row in self.rows)

    def __rich__(self) -> Table:
        """Makes the table."""
        table = Table(title=self._title, title_justify="left")
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


def lora_summary(model: Any, scale: Any = None) -> LoRASummary:
    """Lists the adapters of a model: path, kind, shapes, rank, scale, trained parameters.

    Args:
        model: an NNX model, or any tree of parameters with pairs, such as the `'lora'` collection
            of a Linen model.
        scale: for a tree, the forward scales: a number, a callable from a path, or numbers by path;
            not known by default. An NNX model knows its own.

    Returns:
        The summary, which prints as a table.

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
        return LoRASummary(
            [_row(path, layer.pair, layer.scale) for path, layer in find_lora_layers(model)]
        )
    found = find_pairs(model)
    known = [None] * len(found.pairs) if scale is None else scales(found, scale)
    pairs = zip(found.pairs, found.take(model), known, strict=True)
    return LoRASummary([_row(leaves.path, pair, s) for leaves, pair, s in pairs])


def _row(path: str, pair: Any, scale: Any) -> AdapterSummary:
    a, b = (getattr(pair, side) for side in SIDES)
    kind = type(pair).__name__
    return AdapterSummary(
        path, kind, tuple(a.shape), tuple(b.shape), a.shape[-1], scale, a.size + b.size
    )
