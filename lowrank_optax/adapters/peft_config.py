"""PEFT's `adapter_config.json`: what of it matters to the factors and their scales."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Settings that change what the factors mean, and which of their values change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# Starts that change the base model's weights, by which the factors alone are not the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    r"""Ranks and scales of a PEFT adapter, by module name.

    $$s = \alpha / r \qquad \text{or, with rsLoRA,} \qquad s = \alpha / \sqrt r$$

    Args:
        r: the rank of a module without its own.
        alpha: its alpha.
        rank_pattern: other ranks, by regular expression of the tail of a module's name.
        alpha_pattern: other alphas, likewise.
        use_rslora: whether scales are those of rsLoRA.
        base_model: name of the base model.
        target_modules: names of the adapted modules.
        modules_to_save: names of modules that are stored whole.
        fan_in_fan_out: whether the base model keeps its weights as (in, out), as GPT-2's Conv1D
            does. The factors are the same.
        use_dora: whether every module has DoRA's magnitudes.

    Example:
        >>> config = PeftConfig(r=8, alpha=16.0, rank_pattern={"layers.0.q": 4})
        >>> config.scale("layers.0.q"), config.scale("layers.1.q")
        (4.0, 2.0)

    Source: Hugging Face PEFT, LoraConfig.
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    base_model: str = ""
    target_modules: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    fan_in_fan_out: bool = False
    use_dora: bool = False

    def rank(self, module: str) -> int:
        """Returns the rank of a module."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Returns the forward scale of a module."""
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @classmethod
    def of(
        cls, ranks: Mapping[str, int], scales: Mapping[str, float], **others: Any
    ) -> "PeftConfig":
        """Makes the settings of given modules, the most common rank and alpha being the default.

        Args:
            ranks: by module name.
            scales: by module name.
            others: `use_rslora`, `base_model`, `modules_to_save`, `fan_in_fan_out`, `use_dora`.

        Raises:
            ValueError: a name that no pattern of PEFT tells from the others.
        """
        root = math.sqrt if others.get("use_rslora") else float
        alphas = {name: _alpha(scales[name], root(rank)) for name, rank in ranks.items()}
        [(r, _)] = Counter(ranks.values()).most_common(1)
        [(alpha, _)] = Counter(alphas.values()).most_common(1)
        tails = {tail for name in ranks for tail in _tails(name)}
        anchored = lambda name: ("^" if name in tails else "") + re.escape(name)
        differing = lambda values, common: {
            anchored(name): value for name, value in values.items() if value != common
        }
        config = cls(
            r=r,
            alpha=alpha,
            rank_pattern=differing(ranks, r),
            alpha_pattern=differing(alphas, alpha),
            target_modules=sorted(ranks),
            **others,
        )
        for name, rank in ranks.items():
            same_scale = math.isclose(config.scale(name), scales[name], rel_tol=1e-12)
            if config.rank(name) != rank or not same_scale:
                raise ValueError(
                    f"{name!r}: PEFT's patterns give it the rank or scale of another module; give"
                    " it another name"
                )
        return config

    @classmethod
    def parse(cls, text: str) -> "PeftConfig":
        """Reads the text of an `adapter_config.json`.

        Raises:
            ValueError: the text is not one, or its adapter is not plain LoRA; the message names the
                setting.
        """
        try:
            values = json.loads(text, object_pairs_hook=_without_duplicates)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError("holds no settings")
        if values.get("peft_type") != "LORA":
            raise ValueError(f"is of peft_type {values.get('peft_type')!r}, not 'LORA'")
        for name, harmless in _UNSUPPORTED.items():
            if values.get(name) not in harmless:
                raise ValueError(f"has {name}={values[name]!r}, which is not supported")
        start = values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"has init_lora_weights={start!r}, which changes the base model; convert it to"
                " plain LoRA with PEFT's `path_initial_model_for_weight_conversion`"
            )
        return cls(
            r=_number(values, "r", whole=True),
            alpha=_number(values, "lora_alpha"),
            rank_pattern=_patterns(values, "rank_pattern", whole=True),
            alpha_pattern=_patterns(values, "alpha_pattern"),
            use_rslora=values.get("use_rslora") is True,
            base_model=str(values.get("base_model_name_or_path") or ""),
            target_modules=_names(values, "target_modules"),
            modules_to_save=_names(values, "modules_to_save"),
            fan_in_fan_out=values.get("fan_in_fan_out") is True,
            use_dora=values.get("use_dora") is True,
        )

    def text(self) -> str:
        """Writes the text of an `adapter_config.json`."""
        values = {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base_model or None,
            "task_type": None,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.alpha,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "target_modules": list(self.target_modules),
            "modules_to_save": list(self.modules_to_save) or None,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "init_lora_weights": True,
        }
        return json.dumps(values, indent=2) + "\n"


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"has the setting {twice!r} twice")
    return values


def _tails(name: str) -> list[str]:
    """What stands behind each dot of a name."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _alpha(scale: float, root: float) -> float | int:
    """The alpha of a scale, with few digits where these give the scale back."""
    rounded = float(f"{scale * root:.6g}")
    if not math.isclose(rounded / root, scale, rel_tol=1e-12):
        return scale * root
    return int(rounded) if rounded.is_integer() else rounded


def _number(values: Mapping[str, Any], name: str, whole: bool = False) -> Any:
    if name not in values:
        raise ValueError(f"lacks {name!r}")
    return _checked(values[name], name, whole)


def _checked(value: Any, name: str, whole: bool) -> Any:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        what = "positive integer" if whole else "positive number"
        raise ValueError(f"has {name}={value!r}, which is no {what}")
    return value


def _patterns(values: Mapping[str, Any], name: str, whole: bool = False) -> dict[str, Any]:
    patterns = values.get(name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"has {name}={patterns!r}, which is no mapping")
    for pattern, value in patterns.items():
        _checked(value, f"{name}[{pattern!r}]", whole)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"has {name}[{pattern!r}], which is no pattern: {error}") from error
    return patterns


def _names(values: Mapping[str, Any], name: str) -> list[str]:
    names = values.get(name) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise ValueError(f"has {name}={names!r}, which is no list of names")
    return names
