"""What a method wants added to the targeted layers of a model: the seam of methods and tasks.

A task says where adapters go and how large they are, a method which kind it can train.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import jax
from flax import nnx

from experiments.errors import ExperimentError
from lowrank_optax import nn


class Adapters(ABC):
    """A kind of adapters."""

    @property
    @abstractmethod
    def trained(self) -> nnx.filterlib.Filter:
        """Which variables of a model with these adapters the method moves."""

    @abstractmethod
    def add_to(
        self, model: nnx.Module, targets: str, config: nn.LoRAConfig, *, rngs: nnx.Rngs
    ) -> None:
        """Adds the adapters to a model, in place.

        Args:
            model: The model with its pretrained weights.
            targets: Regular expression of the layers to adapt, as in `nn.add_lora`.
            config: Rank, scale and start of every adapter.
            rngs: Draws the factors, the same for all kinds.
        """


@dataclass(frozen=True)
class LowRank(Adapters):
    """Pairs of factors, with what OPLoRA (shadows) or SDS-LoRA (frames) needs beside them."""

    extra: nn.Extra | None = None

    @property
    def trained(self) -> nnx.filterlib.Filter:
        """The factors, their shadows and their frames."""
        return nnx.LoRAParam

    def add_to(
        self, model: nnx.Module, targets: str, config: nn.LoRAConfig, *, rngs: nnx.Rngs
    ) -> None:
        """Adds pairs; see the base class."""
        nn.add_lora(model, targets, replace(config, extra=self.extra), rngs=rngs)


class WholeModel(Adapters):
    """None: the method trains every parameter of the model."""

    @property
    def trained(self) -> nnx.filterlib.Filter:
        """All parameters."""
        return nnx.Param

    def add_to(
        self, model: nnx.Module, targets: str, config: nn.LoRAConfig, *, rngs: nnx.Rngs
    ) -> None:
        """Adds nothing."""


class Dense(Adapters):
    """A dense change ΔK of every targeted kernel, which SVDLoRA keeps at the rank."""

    @property
    def trained(self) -> nnx.filterlib.Filter:
        """The changes."""
        return nnx.LoRAParam

    def add_to(
        self, model: nnx.Module, targets: str, config: nn.LoRAConfig, *, rngs: nnx.Rngs
    ) -> None:
        """Adds changes that start at s a b of the pairs that `LowRank` would add."""
        nn.add_lora(model, targets, config, rngs=rngs)
        nn.replace_lora(model, _dense)


class DenseLayer(nnx.Module):
    """An `nnx.Linear` with a trainable matrix beside its frozen kernel.

    Args:
        base: The layer.
        delta: ΔK at the start, shaped as the kernel.
    """

    def __init__(self, base: nnx.Linear, delta: jax.Array) -> None:
        self.base = base
        self.delta = nnx.LoRAParam(delta)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer with the kernel K + ΔK."""
        return self.base(x) + x @ self.delta[...]


def _dense(path: str, layer: nn.LoRALayer) -> DenseLayer:
    if not isinstance(layer.base, nnx.Linear):
        raise ExperimentError(f"{path} is no nnx.Linear, which a dense change needs")
    return DenseLayer(layer.base, nn.lora_delta(layer.pair, layer.scale))
