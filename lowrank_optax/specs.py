"""Layouts of pairs that a library says itself."""

from typing import Any

from flax import nnx

from lowrank_optax._core.layouts import DEFAULT_SPECS, Layout, PairMatcher, PairSpec
from lowrank_optax._core.names import join_keys

__all__ = ["from_qwix"]

_EINSUM = "_lora_einsum_str"
KERNEL_AXES = "_lora_kernel_axes"  # beside each pair of `integrations.qwix.LoRAProvider`


def from_qwix(model: nnx.Module) -> tuple[PairMatcher, ...]:
    """Reads the layouts of a model that `qwix.apply_lora_to_model` has adapted.

    qwix keeps, beside each einsum's weight, the einsum of its factors. Those of
    `integrations.qwix.LoRAProvider` are flat, which it says beside each weight. Shapes alone tell
    the same but for coincidences, such as an axis of the rank's length.

    Args:
        model: the NNX model.

    Returns:
        A spec for each such weight, and after them `DEFAULT_SPECS`, for an optimizer's `specs`.

    Example:
        >>> from flax import nnx
        >>> class Einsum(nnx.Module):
        ...     def __init__(self):
        ...         self.w_lora_einsum_str = "btd,dr,rnh->btnh"
        >>> from_qwix(nnx.List([Einsum()]))[0].a
        '0/w_lora_a'

    Source: qwix 0.1.8, whose factors have the rank last in a and first in b.
    """
    found = []
    for path, module in nnx.iter_graph(model):
        if not isinstance(module, nnx.Module):
            continue
        for name, value in vars(module).items():
            if name.endswith(_EINSUM):
                found.append(_spec(join_keys([*path, name.removesuffix(_EINSUM)]), value))
            elif name.endswith(KERNEL_AXES):
                found.append(_flat_spec(join_keys([*path, name.removesuffix(KERNEL_AXES)])))
    return (*found, *DEFAULT_SPECS)


def _flat_spec(weight: str) -> PairSpec:
    a, b, auxiliary = (f"{weight}_lora_{name}" for name in ("a", "b", "{}"))
    return PairSpec(a, b, auxiliary, **Layout()._asdict())


def _spec(weight: str, equation: Any) -> PairSpec:
    operands, _, _ = equation.replace(" ", "").partition("->")
    _, a, b = operands.split(",")
    return PairSpec(
        f"{weight}_lora_a",
        f"{weight}_lora_b",
        a_in=tuple(range(len(a) - 1)),
        a_rank=len(a) - 1,
        b_rank=0,
        b_out=tuple(range(1, len(b))),
    )
