"""What a method wants added to the targeted layers of a model: the seam of methods and tasks.

A task says where adapters go and how large they are, a method which kind it can train.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from lowrank_optax import nn


class Adapters(ABC):
    """A kind of adapters."""

    @property
    @abstractmethod
    def trained(self) -> nnx.filterlib.Filter:
        """Which variables of a model with these adapters the method moves."""

    @abstractmethod
    def add_to(
        self,
        model: nnx.Module,
        targets: str,
        *,
        rank: int,
        alpha: float,
        rngs: nnx.Rngs,
        **inits: nn.config.Initializer,
    ) -> None:
        """Adds the adapters to a model, in place.

        Args:
            model: The model with its pretrained weights.
            targets: Regular expression of the layers to adapt, as in `nn.add_lora`.
            rank: r of every adapter.
            alpha: Numerator of the forward scale.
            rngs: Draws the factors, the same for all kinds.
            **inits: `a_init` and `b_init` of `nn.add_lora`.
        """


@dataclass(frozen=True)
class LowRank(Adapters):
    """Pairs of factors, with what OPLoRA (shadows) or SDS-LoRA (frames) needs beside them."""

    shadows: nn.Shadows | None = None
    frames: nn.Frames | None = None

    @property
    def trained(self) -> nnx.filterlib.Filter:
        """The factors, their shadows and their frames."""
        return nnx.LoRAParam

    def add_to(self, model: nnx.Module, targets: str, **settings: Any) -> None:
        """Adds pairs; see the base class."""
        nn.add_lora(model, targets, shadows=self.shadows, frames=self.frames, **settings)


class WholeModel(Adapters):
    """None: the method trains every parameter of the model."""

    @property
    def trained(self) -> nnx.filterlib.Filter:
        """All parameters."""
        return nnx.Param

    def add_to(self, model: nnx.Module, targets: str, **settings: Any) -> None:
        """Adds nothing."""


class Dense(Adapters):
    """A dense change ΔK of every targeted kernel, which SVDLoRA keeps at the rank."""

    @property
    def trained(self) -> nnx.filterlib.Filter:
        """The changes."""
        return nnx.LoRAParam

    def add_to(self, model: nnx.Module, targets: str, **settings: Any) -> None:
        """Adds changes that start at s a b of the pairs that `LowRank` would add."""
        for path in nn.add_lora(model, targets, **settings):
            *parents, name = path.split("/")
            parent: Any = model
            for key in parents:
                parent = _child(parent, key)
            layer = _child(parent, name)
            _replace(parent, name, DenseLayer(layer.base, nn.lora_delta(layer.pair, layer.scale)))


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


def _child(parent: Any, name: str) -> Any:
    return getattr(parent, name) if hasattr(parent, name) else parent[int(name)]


def _replace(parent: Any, name: str, module: nnx.Module) -> None:
    if hasattr(parent, name):
        setattr(parent, name, module)
    else:
        parent[int(name)] = module
