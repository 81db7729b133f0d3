"""qwix: the adapters of this library in any model that qwix can adapt, by the model's operations.

qwix's own `LoraProvider` needs nothing of this module: every optimizer here trains its pairs. The
provider here adds what some methods keep beside the factors, shadows and frames.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import flax.linen
import jax
from flax import nnx

from lowrank_optax._core.layouts import node_of, variables_of
from lowrank_optax._core.scales import Scales
from lowrank_optax.nn.config import LoRAConfig, require_config
from lowrank_optax.nn.contraction import Contraction
from lowrank_optax.nn.functional import add_adapter
from lowrank_optax.nn.kernel_axes import KernelAxes
from lowrank_optax.specs import KERNEL_AXES

try:
    import qwix

    # What a provider of one's own needs, qwix itself does not export.
    from qwix._src import aux_data
    from qwix._src.providers.ptq import WithAux
    from qwix._src.utils import flax_util
except ModuleNotFoundError as error:
    if error.name == "qwix":
        error.add_note("lowrank_optax.integrations.qwix needs qwix: `pip install qwix`.")
    raise

__all__ = ["LoRAProvider", "LoRARule", "scales_of"]

_ADAPTED, _CONVOLUTION = ("dot_general", "einsum"), "conv_general_dilated"  # qwix adapts both


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRARule(qwix.QuantizationRule):
    """Which modules get adapters, and of which settings.

    Attributes:
        config: settings of the adapters.
        module_path, weight_qtype, …: as of `qwix.QuantizationRule`.

    Raises:
        TypeError: `config` is no `LoRAConfig`.
        ValueError: it asks for DoRA.

    Example:
        >>> LoRARule(module_path=".*attn.*", config=LoRAConfig(rank=4)).config.scale
        4.0
    """

    config: LoRAConfig

    def __post_init__(self) -> None:
        if require_config(self.config).dora:
            raise ValueError(
                "LoRAProvider has no DoRA: a weight's use does not say what else is in the output"
            )


class LoRAProvider(qwix.PtqProvider):
    r"""Adapts the weights of matching modules by pairs of any kind.

    Factors are flat, `<weight>_lora_a` of (batch..., in, r) and `<weight>_lora_b` of
    (batch..., r, out), and what `config.extra` adds stands beside them: `<weight>_lora_m_a`, ….
    Weights may be quantized by the rule, as for QLoRA. A square weight that is transposed before
    its product is not told from the weight itself.

    On NNX `model.eval()` turns dropout off, by the attribute `deterministic` of each module. A
    Linen model always drops: evaluate one that is made with `dropout=0`.

    Args:
        rules: the first that fits a module and its operation counts; where this is a plain
            `qwix.QuantizationRule`, or there is none, the module gets no adapter.

    Raises:
        ValueError: from the model's call, a rank above min(in, out) of a weight; a weight that is
            used in two ways, as where embeddings are tied; a convolution, or an einsum of three
            operands, with a weight.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import find_pairs, nn
        >>> rule = LoRARule(config=nn.LoRAConfig(rank=2, extra=nn.Shadows()))
        >>> model, x = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0))), jnp.ones((1, 4))
        >>> provider = LoRAProvider([rule])
        >>> model = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
        >>> factors = nnx.state(model, nnx.LoRAParam)
        >>> [type(pair).__name__ for pair in find_pairs(factors).take(factors)]
        ['ShadowedPair']

    Source: qwix 0.1.8, `LoraProvider`.
    """

    def __init__(self, rules: Sequence[qwix.QuantizationRule]) -> None:
        super().__init__(rules)

    def dot_general(
        self, lhs: Any, rhs: Any, dimension_numbers: Any, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Adds the adapter to a product with a weight."""
        y = super().dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)
        contraction = _contraction(dimension_numbers, lhs.ndim, rhs.ndim)
        return self._adapted("dot_general", y, lhs, rhs, contraction)

    def einsum(self, einsum_str: str, *operands: Any, **kwargs: Any) -> jax.Array:
        """Adds the adapter to an einsum of an input and a weight."""
        if len(operands) > 2:
            self._refuse("einsum", f"the einsum {einsum_str!r}", operands)
        y = super().einsum(einsum_str, *operands, **kwargs)
        if len(operands) != 2:
            return y
        return self._adapted("einsum", y, *operands, _with_output(einsum_str))

    def conv_general_dilated(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """Refuses a convolution that a rule for adapters fits."""
        self._refuse(_CONVOLUTION, "convolutions", [rhs])
        return super().conv_general_dilated(lhs, rhs, *args, **kwargs)

    def _refuse(self, op: str, what: str, operands: Sequence[Any]) -> None:
        rule, _ = self._get_current_rule_and_op_id(op, only_rule=True)
        if not isinstance(rule, LoRARule):
            return
        for operand in operands:
            if name := flax_util.find_param(operand, WithAux):
                others = tuple(other for other in _ADAPTED if other != op)
                raise ValueError(
                    f"{_path(name)}: LoRAProvider does not adapt {what}. Leave the module out by"
                    " `module_path`, or the operation by"
                    f" `LoRARule(op_names={others}, ...)`."
                )

    def _adapted(
        self, op: str, y: jax.Array, x: Any, weight: Any, contraction: Contraction | str
    ) -> jax.Array:
        rule, _ = self._get_current_rule_and_op_id(op, repeated_call=True)
        name = flax_util.find_param(weight, WithAux) if isinstance(rule, LoRARule) else None
        if name is None:
            return y
        if isinstance(contraction, str):
            contraction = Contraction.from_einsum(contraction)
        config, shape = rule.config, weight.shape
        _require_one_use(name, contraction.kernel_axes)
        pair = _pair(name, config, *contraction.kernel_axes.sizes(shape))
        x = x.astype(y.dtype)
        if config.dropout and not _is_deterministic():
            drop = nnx.Dropout(config.dropout, deterministic=False)
            x = drop(x, rngs=flax_util.make_rng("dropout"))
        return add_adapter(y, x, pair, config, contraction, shape)


def scales_of(provider: Any) -> Scales:
    """Reads the forward scales of a provider's adapters, for an optimizer's `scale`.

    Args:
        provider: a `LoRAProvider`, or qwix's own `LoraProvider`.

    Returns:
        The scales: by rule, alpha / rank of qwix's rules and `config.scale` of this module's.

    Raises:
        TypeError: the provider has no rules for adapters. From the optimizer, ValueError for a
            pair whose module no such rule fits, or several of other scales by operation.

    Example:
        >>> provider = qwix.LoraProvider(module_path=".*attn.*", rank=4, alpha=6.0)
        >>> scales_of(provider).of("layers/0/attn/q/w")
        1.5
    """
    rules = getattr(provider, "_rules", ())
    if not any(isinstance(rule, LoRARule | qwix.LoraRule) for rule in rules):
        raise TypeError(f"`scales_of` takes a LoRAProvider or qwix.LoraProvider, got {provider!r}")

    def of(path: str) -> float:
        module = path.rpartition("/")[0]
        fitting = [rule for rule in rules if re.fullmatch(rule.module_path, module)]
        operations = (*_ADAPTED, _CONVOLUTION)
        found = {op: scale for op in operations if (scale := _scale_for(op, fitting))}
        if not found:
            raise ValueError(f"{path}: no rule for adapters of the provider fits {module!r}")
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{scale:g} for {op}" for op, scale in found.items())
            raise ValueError(
                f"{path}: the rules of the provider have other scales by operation, {listed}, and"
                " the path does not tell the operation. Give `scale=scales_from({...})`, numbers by"
                " pattern of the paths, or rules that `module_path` tells apart."
            )
        return next(iter(found.values()))

    return Scales(of)


def _scale_for(op: str, rules: Sequence[Any]) -> float | None:
    """The scale of the adapters of an operation by the first rule that fits it, if it has any."""
    rule = next((rule for rule in rules if not rule.op_names or op in rule.op_names), None)
    if isinstance(rule, LoRARule):
        return rule.config.scale if op in _ADAPTED else None
    return float(rule.alpha / rule.rank) if isinstance(rule, qwix.LoraRule) else None


def _with_output(einsum_str: str) -> str:
    """Writes out what an einsum without an arrow means, as in NumPy."""
    if "->" in einsum_str:
        return einsum_str
    dots = "..." if "..." in einsum_str else ""
    labels = [label for label in sorted(einsum_str) if label.isalpha()]
    return f"{einsum_str}->{dots}{''.join(x for x in labels if labels.count(x) == 1)}"


def _contraction(dimension_numbers: Any, x_ndim: int, weight_ndim: int) -> Contraction:
    """What `jax.lax.dot_general` does, in labels: batch axes come first in its output."""
    (x_in, weight_in), (x_batch, weight_batch) = dimension_numbers
    x = [f"x{axis}" for axis in range(x_ndim)]
    weight = [f"w{axis}" for axis in range(weight_ndim)]
    for at, like in zip([*weight_in, *weight_batch], [*x_in, *x_batch], strict=True):
        weight[at] = x[like]
    batch = [x[axis] for axis in x_batch]
    tokens = [label for axis, label in enumerate(x) if axis not in (*x_in, *x_batch)]
    out = [label for label in weight if label not in x]
    return Contraction(tuple(x), tuple(weight), (*batch, *tokens, *out))


def _path(weight: str) -> str:
    return "/".join(map(str, (*flax_util.get_current_module_path(), weight)))


def _require_one_use(weight: str, axes: KernelAxes) -> None:
    """Keeps how a weight of the current module is used, and raises if that was another way."""
    module, name = flax_util.get_current_module(), f"{weight}{KERNEL_AXES}"
    if isinstance(module, flax.linen.Module):  # frozen, and another object in each call
        found = aux_data.get(module.scope, name, None)
        aux_data.set(module.scope, name, found or axes)
    elif (found := getattr(module, name, None)) is None:
        setattr(module, name, axes)
    if found not in (None, axes):
        raise ValueError(
            f"{_path(weight)} is used in two ways, once as {found} and once as {axes}, and a pair"
            " has one. Leave the module out by `module_path`, or one of the uses by `op_names`."
        )


def _is_deterministic() -> bool:
    """Whether the current module is in evaluation; one of NNX that cannot tell now learns it."""
    module = flax_util.get_current_module()
    if isinstance(module, flax.linen.Module):
        return False
    if not hasattr(module, "deterministic"):
        module.deterministic = False
    return bool(module.deterministic)


def _pair(weight: str, config: LoRAConfig, batch: tuple[int, ...], n_in: int, n_out: int) -> Any:
    """The pair beside a weight of the current module, which gets one if it has none."""
    module = flax_util.get_current_module()

    def get(variable: str) -> Any:
        name = f"{weight}_{variable}"
        found: Any
        if isinstance(module, flax.linen.Module):
            found = module.get_variable("params", name)
        else:
            found = getattr(module, name, None)
        return None if found is None else flax_util.unbox(found)

    if get("lora_a") is None:
        config.check_rank(n_in, n_out, _path(weight))
        node = config.init_pair(flax_util.make_rng("params"), batch, n_in, n_out)
        for variable, leaf in variables_of(node).items():
            flax_util.get_or_create_param(
                f"{weight}_{variable}", lambda leaf=leaf: leaf, nnx_param_type=nnx.LoRAParam
            )
    return node_of(get)
