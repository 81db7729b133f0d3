"""Convolutions as LoRA sees them: a kernel that meets every patch of its input.

A patch holds the c channels of the input under one window of k₁ × … × k_d places. With patches as
inputs, the kernel (k₁, …, k_d, c, out) is a matrix (c·k₁⋯k_d, out), and its adapter is a pair like
any other: the gradients of a and b are s G bᵀ and s aᵀ G, with the gradient G of that matrix. Rows
stand in torch's order, channels before places.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lowrank_optax.nn.kernel_axes import KernelAxes

# How `jnp.pad` calls the paddings that repeat the input.
_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


@dataclasses.dataclass(frozen=True)
class Convolution:
    """How a convolution slides its kernel over the input, (batch..., k₁-sized axes..., channels).

    Attributes:
        window: the kernel's places along each axis, (k₁, …, k_d).
        strides: the window's steps.
        padding: `"SAME"`, `"VALID"`, `"SAME_LOWER"`, `"CIRCULAR"`, `"REFLECT"`, `"CAUSAL"`, or
            numbers of zeros before and after each axis.
        input_dilation: steps between the input's entries, the gaps filled with zeros.
        kernel_dilation: steps between the window's places.

    Example:
        >>> import jax.numpy as jnp
        >>> by_two = Convolution((2,), (1,), "VALID", (1,), (1,))
        >>> by_two.patches(jnp.arange(4.0)[None, :, None]).tolist()
        [[[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]]
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]

    @classmethod
    def of(cls, layer: Any) -> "Convolution":
        """Reads the settings of a `Conv` of Flax, NNX or Linen.

        Raises:
            ValueError: the layer has groups or a mask.

        Example:
            >>> from flax import nnx
            >>> Convolution.of(nnx.Conv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))).strides
            (2, 2)
        """
        size = layer.kernel_size
        window = (size,) if isinstance(size, int) else tuple(size)
        if layer.feature_group_count != 1:
            raise ValueError(
                f"a convolution with feature_group_count={layer.feature_group_count} has a kernel"
                " for each group, which one pair of factors cannot adapt; leave it out of the"
                " targets"
            )
        if layer.mask is not None:
            raise ValueError(
                "a convolution with a mask cannot be adapted: the adapter would fill what the mask"
                " leaves out; leave it out of the targets"
            )
        each = lambda x: (1 if x is None else x,) * len(window) if np.ndim(x) == 0 else tuple(x)
        padding = layer.padding
        if not isinstance(padding, str):
            pairs = (padding,) * len(window) if isinstance(padding, int) else padding
            padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in pairs)
        dilations = each(layer.input_dilation), each(layer.kernel_dilation)
        return cls(window, each(layer.strides), padding, *dilations)

    @property
    def kernel_axes(self) -> KernelAxes:
        """The roles of the kernel's axes: channels, then places, are contracted."""
        places = range(-len(self.window) - 2, -2)
        return KernelAxes(batch=(), contracted=(-2, *places), out=(-1,))

    def adapt(
        self,
        apply: Callable[[jax.Array, Any], jax.Array],
        x: jax.Array,
        pair: Any,
        dtype: DTypeLike,
        kernel_shape: Sequence[int],
    ) -> jax.Array:
        """Applies a pair of flat factors to every patch; see `Contraction.adapt`.

        The backward pass cuts the patches anew: they take as much memory as k₁⋯k_d inputs.
        """
        of_patches = jax.checkpoint(lambda x, pair: apply(self.patches(x), pair))
        return of_patches(x.astype(dtype), pair)

    def flatten_bias(self, bias: jax.Array, kernel_shape: Sequence[int]) -> jax.Array:
        """Returns the bias, which is flat; see `Contraction.flatten_bias`."""
        return bias

    def patches(self, x: jax.Array) -> jax.Array:
        """Cuts an input into patches.

        Args:
            x: (batch..., axes..., c).

        Returns:
            (batch..., places of the window..., c·k₁⋯k_d).
        """
        d = len(self.window)
        batch, channels = x.shape[: -d - 1], x.shape[-1]
        x = self._padded(x.reshape(-1, *x.shape[-d - 1 :]))
        limits = np.array(x.shape[1:-1]) - self._spans()
        counts = np.maximum(limits // np.array(self.strides) + 1, 0)
        if not counts.all():  # the window fits nowhere
            return jnp.zeros((*batch, *counts, channels * math.prod(self.window)), x.dtype)

        def at(place: tuple[int, ...]) -> jax.Array:
            first = np.array(place) * self.kernel_dilation
            last = first + (counts - 1) * self.strides + 1
            return jax.lax.slice(
                x, (0, *first, 0), (x.shape[0], *last, channels), (1, *self.strides, 1)
            )

        stacked = jnp.stack([at(place) for place in np.ndindex(*self.window)], axis=-1)
        return stacked.reshape(*batch, *counts, channels * math.prod(self.window))

    def _spans(self) -> np.ndarray:
        """How far the window reaches along each axis."""
        return (np.array(self.window) - 1) * np.array(self.kernel_dilation) + 1

    def _padded(self, x: jax.Array) -> jax.Array:
        """Pads (n, axes..., c) as the layer does, so that the window fits everywhere."""
        spans, named = [int(span) for span in self._spans()], self.padding
        pads: Sequence[tuple[int, int]]
        if not isinstance(named, str):
            pads = named
        elif named in _MODES:
            around = [((span - 1) // 2, span // 2) for span in spans]
            x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode=_MODES[named])
            pads = [(0, 0)] * len(spans)
        elif named == "CAUSAL":
            pads = [(span - 1, 0) for span in spans]
        else:
            pads = jax.lax.padtype_to_pads(x.shape[1:-1], spans, self.strides, named)
        gaps = [step - 1 for step in self.input_dilation]
        edges = [(int(low), int(high), gap) for (low, high), gap in zip(pads, gaps, strict=True)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
