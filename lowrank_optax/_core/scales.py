"""The forward scales of pairs, in every form in which a user gives them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.arguments import NUMBERS
from lowrank_optax._core.linalg import SIDES
from lowrank_optax._core.names import in_words, lies_under, listed, require_pattern
from lowrank_optax._core.pairing import Pairing


class Scales:
    """Forward scales by rule, made by `scales_from`.

    It cannot be called, so `optax.inject_hyperparams` does not take it for a schedule, as it does a
    plain callable from a path.

    Args:
        of: from a pair's path to its scale.
        unused: from the paths of all pairs to the rules that decide for none of them.
    """

    def __init__(
        self,
        of: Callable[[str], Any],
        unused: Callable[[Sequence[str]], list[str]] = lambda paths: [],
    ) -> None:
        self.of = of
        self.unused = unused


def scales_from(source: Any, names: Callable[[str], str] | None = None) -> Scales:
    r"""Makes the `scale` of an optimizer from rules, or from the settings of a PEFT adapter.

    Under `optax.inject_hyperparams` every scale that depends on the path must come from here.

    Args:
        source: a callable from a pair's path to its number. Or numbers by pattern, of which the
            first that fits counts: a pattern names the tail of a pair's path, or of a path above
            it, as in `Unpaired`; `"*"` fits all. Or an `adapters.PeftConfig`, which knows ranks,
            alphas and rsLoRA.
        names: for a `PeftConfig`, from a pair's path to its module name; the path with dots by
            default.

    Returns:
        The scales.

    Raises:
        TypeError: a source that is none of these.
        ValueError: a pattern that is a regular expression; from the optimizer, a pair that no
            pattern fits. It warns of patterns that decide for no pair, which is no error, as a
            table may serve several models or only a part of the parameters be given.

    Example:
        >>> scales_from({"attention": 2.0, "*": 1.0}).of("layers/0/attention/query")
        2.0
        >>> from lowrank_optax.adapters import PeftConfig
        >>> scales_from(PeftConfig(r=8, alpha=16.0)).of("layers/0/attention/query")
        2.0
        >>> scales_from(lambda path: 2.0 if "attention" in path else 1.0).of("mlp")
        1.0
    """
    if isinstance(source, Mapping):
        rules = dict(source)
        for pattern in rules:
            require_pattern("scales_from", pattern)
        return Scales(
            lambda path: rules[_deciding(rules, path)],
            lambda paths: sorted({*rules} - {"*", *(_deciding(rules, path) for path in paths)}),
        )
    if callable(source):
        return Scales(source)
    if not callable(getattr(source, "scale", None)):
        raise TypeError(
            "`scales_from` takes a callable from a path, numbers by pattern or an"
            f" adapters.PeftConfig, got {source!r}."
        )
    return Scales(lambda path: source.scale(names(path) if names else path.replace("/", ".")))


def _deciding(rules: Mapping[str, Any], path: str) -> str:
    for pattern in rules:
        if pattern == "*" or lies_under(pattern, path):
            return pattern
    raise ValueError(
        f"{in_words(path)}: no pattern of `scale` fits, of {_listed(list(rules))}; add one."
    )


def scales(pairing: Pairing, scale: Any) -> list[Any]:
    r"""Reads the forward scale s of every pair, $\Delta K = s\,a\,b$.

    Args:
        pairing: the pairs.
        scale: one number; a callable from a pair's path to its number; `Scales`; or a tree:
            numbers by path (`{"layers/0/q": 2.0, ...}`), or a (prefix of a) tree shaped like the
            parameters.

    Returns:
        One number per pair.

    Raises:
        ValueError: numbers by path that lack a pair, or some of which would count for nothing; a
            tree that does not fit, or gives the factors of a pair different scales; a number that
            is not positive and finite.
        TypeError: something that is no number.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, find_pairs
        >>> tree = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))}
        >>> scales(find_pairs(tree), lambda path: 16 / 2 if path == "q" else 1.0)
        [8.0]
    """
    names = [pair.path for pair in pairing.pairs]
    if isinstance(scale, Scales):
        values = [scale.of(name) for name in names]
        if names and (unused := scale.unused(names)):
            warnings.warn(
                f"patterns of `scale` that decide for no pair: {_listed(unused)}. Pairs there are"
                f" {_listed(names)}; the first pattern that fits one counts.",
                stacklevel=2,
            )
    elif callable(scale):
        values = [scale(name) for name in names]
    elif not names:
        values = []
    elif _is_number(scale):
        values = [scale] * len(names)
    elif _is_by_path(scale):
        values = _scales_by_path(scale, names)
    else:
        values = _scales_by_leaf(pairing, scale)
    for name, value in zip(map(in_words, names), values, strict=True):
        if not _is_number(value):
            raise TypeError(f"{name}: `scale` must be a number, got {value!r}.")
        if isinstance(value, jax.core.Tracer):
            continue
        if not np.asarray(value) > 0:
            raise ValueError(f"{name}: `scale` must be positive, got {value}.")
        if not np.isfinite(value):
            raise ValueError(f"{name}: `scale` must be finite, got {value}.")
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, NUMBERS) and not isinstance(value, bool) and jnp.ndim(value) == 0


def _is_by_path(scale: Any) -> bool:
    """Whether a scale maps names to numbers; it may also be a tree of one level."""
    return isinstance(scale, Mapping) and all(map(_is_number, scale.values()))


def _scales_by_path(scale: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    missing = [name for name in names if name not in scale]
    if not missing:
        return [scale[name] for name in names]
    prefixes = {name.partition("/")[0] for name in names}
    if set(scale) >= prefixes:  # a prefix of the parameter tree: one number a subtree
        if inside := [key for key in scale if "/" in key and key.partition("/")[0] in prefixes]:
            raise ValueError(
                f"`scale` has numbers of whole subtrees, so {_listed(inside)} would count for"
                " nothing; name every pair, or give `scales_from({...})`, of which the first"
                " pattern that fits counts."
            )
        return [scale[name.partition("/")[0]] for name in names]
    message = f"`scale` has no number for {_listed(missing)}; it names {_listed(list(scale))}."
    inner = {name: name.partition("/")[2] for name in missing}
    if scale and set(inner.values()) <= set(scale):
        prefix = missing[0].partition("/")[0]
        message += (
            f" The parameters are wrapped one level deeper: put {prefix!r}/ before the names."
        )
    else:
        message += " Make it of the parameters as they are, as by `nn.lora_scales(model)`."
    raise ValueError(message)


def _scales_by_leaf(pairing: Pairing, scale: Any) -> list[Any]:
    if scale is None or isinstance(scale, str):
        raise TypeError(
            f"`scale` must be a number, a callable from a pair's path, or a tree; got {scale!r}."
        )
    leaves = pairing.by_leaf(scale, "scale")
    for pair in pairing.pairs:
        a, b = (leaves[pair.leaves[side]] for side in SIDES)
        if a is not b and _differ(a, b):
            raise ValueError(
                f"{in_words(pair.path)}: `scale` differs between its two factors; give both the"
                " same."
            )
    return [leaves[pair.leaves["a"]] for pair in pairing.pairs]


def _differ(one: Any, other: Any) -> bool:
    """Whether two numbers are known to differ; of traced ones nothing is known."""
    if any(isinstance(x, jax.core.Tracer) for x in (one, other)):
        return False
    return bool(np.asarray(one) != np.asarray(other))


def _listed(names: Sequence[str]) -> str:
    return listed(map(repr, names)) or "nothing"
