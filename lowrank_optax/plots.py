"""Figures of adapters and of training runs, by matplotlib: the extra `plots`.

Each function draws into the axes that it is given, or into new ones, and returns them. New axes get
a legend. Colours and backgrounds are matplotlib's, so that a style of yours holds. `styles` gives
properties of lines, such as a colour, by name.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_optax.adapters import Spectrum

__all__ = ["conditions", "effective_ranks", "spectra", "sweeps"]


def spectra(found: Mapping[str, Spectrum], axes: Any = None, **style: Any) -> Any:
    """Draws the singular values of every pair's ΔK, relative to the first.

    Args:
        found: by name, of `adapters.spectrum`.
        axes: of matplotlib; new ones by default.
        style: properties of all lines; a `label` names them together.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from lowrank_optax import LoRAPair
        >>> from lowrank_optax.adapters import spectrum
        >>> pair = LoRAPair(np.eye(4, 2), np.diag([3.0, 1.0]))
        >>> spectra({"q": spectrum(pair, 1.0)}).get_title(loc="left")
        '1 pair'
    """
    axes = _axes(axes)
    style = {"color": "tab:blue", "alpha": 0.4, "lw": 1, **style}
    for each in found.values():
        shares = each.values / max(each.norm, np.finfo(float).tiny)
        axes.plot(range(1, len(shares) + 1), shares, **style)
        style.pop("label", None)
    axes.set_xlabel("index")
    axes.set_ylabel("σᵢ / σ₁ of ΔK")
    axes.set_title(f"{len(found)} pair{'s' * (len(found) != 1)}", loc="left")
    axes.set_ylim(0, 1.05)
    return axes


def conditions(found: Mapping[str, Spectrum], axes: Any = None) -> Any:
    """Draws the condition numbers of the factors' Gram matrices, a row for each pair.

    Args:
        found: by name, of `adapters.spectrum`; infinite conditions are left out.
        axes: of matplotlib; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from lowrank_optax import LoRAPair
        >>> from lowrank_optax.adapters import spectrum
        >>> pair = LoRAPair(np.eye(4, 2), np.diag([3.0, 1.0]))
        >>> [label.get_text() for label in conditions({"q": spectrum(pair, 1.0)}).get_yticklabels()]
        ['q']
    """
    is_new, axes = axes is None, _axes(axes, height=max(2.0, 0.22 * len(found) + 1))
    rows = range(len(found))
    for side, marker in (("a", "o"), ("b", "x")):
        values = np.array([getattr(each, f"condition_{side}") for each in found.values()])
        label = {"a": "aᵀ a", "b": "b bᵀ"}[side]
        axes.plot(np.where(np.isfinite(values), values, np.nan), rows, marker, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("condition number of the Gram matrix")
    axes.set_yticks(list(rows), list(found), fontsize="small")
    axes.invert_yaxis()
    return _with_legend(axes, is_new)


def effective_ranks(
    steps: Sequence[int],
    ranks: Mapping[str, Sequence[float]],
    axes: Any = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Draws effective ranks over training, such as those of ΔK or of the factors' gradients.

    Args:
        steps: at which they were measured.
        ranks: of each curve, one number a step, of `diagnostics.effective_rank`.
        axes: of matplotlib; new ones by default.
        styles: properties of the lines, by curve.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a curve with another number of values than steps.

    Example:
        >>> len(effective_ranks([0, 10], {"a": [1.0, 2.5], "b": [1.0, 2.0]}).lines)
        2
    """
    is_new, axes = axes is None, _axes(axes)
    for name, values in ranks.items():
        if len(values) != len(steps):
            raise ValueError(f"{name!r} has {len(values)} values for {len(steps)} steps")
        axes.plot(steps, values, **{"label": name, **(styles or {}).get(name, {})})
    axes.set_xlabel("step")
    axes.set_ylabel("effective rank")
    axes.set_ylim(bottom=0)
    return _with_legend(axes, is_new)


def sweeps(
    losses: Mapping[str, Mapping[float, float]],
    baseline: str | None = None,
    axes: Any = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Draws the final loss against the learning rate, a curve for each optimizer.

    The best rate of each has a dot. Losses that are not finite are marked at the upper edge.

    Args:
        losses: by optimizer and learning rate.
        baseline: the optimizer to draw in black, with a line at its best loss.
        axes: of matplotlib; new ones by default.
        styles: properties of the lines, by optimizer.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the baseline is not among the optimizers.

    Example:
        >>> losses = {"adamw": {1e-3: 0.4, 3e-3: 0.3}, "polora": {0.1: 0.2, 0.3: float("inf")}}
        >>> sweeps(losses, baseline="adamw").get_xscale()
        'log'
    """
    if baseline is not None and baseline not in losses:
        raise ValueError(f"{baseline!r} is not among {', '.join(losses)}")
    is_new, axes = axes is None, _axes(axes)
    colors = iter([f"C{i}" for i in range(len(losses))])
    for name, by_rate in losses.items():
        color = "black" if name == baseline else next(colors)
        style = {"color": color, "label": name, **(styles or {}).get(name, {})}
        rates = np.array(sorted(by_rate))
        values = np.array([by_rate[rate] for rate in rates], float)
        finite = np.isfinite(values)
        [line] = axes.plot(rates[finite], values[finite], **style)
        same = {"color": line.get_color(), "zorder": line.get_zorder()}
        if not finite.all():
            at_the_edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(rates[~finite], np.ones(sum(~finite)), "x", **same, **at_the_edge)
        if finite.any():
            best = np.nanargmin(np.where(finite, values, np.nan))
            axes.plot(rates[best], values[best], "o", **same)
            if name == baseline:
                axes.axhline(values[best], lw=0.8, ls=":", **same)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("final loss")
    return _with_legend(axes, is_new)


def _axes(axes: Any, height: float = 4.0) -> Any:
    if axes is not None:
        return axes
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    return pyplot.subplots(figsize=(7, height), layout="constrained")[1]


def _with_legend(axes: Any, is_new: bool) -> Any:
    if is_new:
        axes.legend()
    return axes
