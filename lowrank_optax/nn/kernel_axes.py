"""The matrix that LoRA sees in a kernel of any shape.

LoRA factors are always flat: `a` (batch..., in, r) and `b` (batch..., r, out), where *in* is
the product of the contracted kernel axes, *out* that of the output axes, and *batch* are axes that
input, kernel and output share (experts).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """The role of every axis of a kernel.

    Axes are counted from the end, so a kernel that gains leading axes (layers stacked by
    `nnx.vmap` or `nn.scan`) keeps its description; the leading axes count as batch.

    Attributes:
        batch: negative positions of the batch axes.
        contracted: negative positions of the axes contracted with the input.
        out: negative positions of the output axes.

    Example:
        >>> import jax.numpy as jnp
        >>> axes = KernelAxes.in_order(0, 1, 2)
        >>> axes.to_matrix(jnp.zeros((4, 2, 3))).shape
        (4, 6)
    """

    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    out: tuple[int, ...]

    @classmethod
    def in_order(cls, n_batch: int, n_contracted: int, n_out: int) -> "KernelAxes":
        """Describes a kernel laid out as (batch..., contracted..., out...), as Dense kernels are.

        Args:
            n_batch: number of batch axes.
            n_contracted: number of contracted axes.
            n_out: number of output axes.

        Returns:
            The description.

        Example:
            >>> KernelAxes.in_order(0, 1, 1)
            KernelAxes(batch=(), contracted=(-2,), out=(-1,))
        """
        ndim = n_batch + n_contracted + n_out
        axes = tuple(range(-ndim, 0))
        return cls(axes[:n_batch], axes[n_batch : n_batch + n_contracted], axes[ndim - n_out :])

    def sizes(self, kernel_shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """Returns the sizes that the factors of a kernel need.

        Args:
            kernel_shape: shape of the kernel.

        Returns:
            The batch shape (stacking axes first), the size of *in* and the size of *out*.

        Raises:
            ValueError: if the kernel has fewer axes than described.

        Example:
            >>> KernelAxes.in_order(0, 1, 2).sizes((12, 4, 2, 3))
            ((12,), 4, 6)
        """
        shape = tuple(kernel_shape)
        stack = self.stack_shape(shape)
        batch = tuple(shape[i] for i in self.batch)
        n_in = math.prod(shape[i] for i in self.contracted)
        n_out = math.prod(shape[i] for i in self.out)
        return stack + batch, n_in, n_out

    def stack_shape(self, kernel_shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the leading sizes of a kernel that the description does not cover.

        Args:
            kernel_shape: shape of the kernel.

        Returns:
            The sizes, empty for a layer that is not stacked.

        Raises:
            ValueError: if the kernel has fewer axes than described.

        Example:
            >>> KernelAxes.in_order(0, 1, 2).stack_shape((12, 4, 2, 3))
            (12,)
        """
        shape = tuple(kernel_shape)
        described = len(self.batch) + len(self.contracted) + len(self.out)
        if len(shape) < described:
            raise ValueError(f"kernel of shape {shape} has fewer than {described} axes")
        return shape[: len(shape) - described]

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """Lays a kernel out as a stack of matrices.

        Args:
            kernel: the kernel, with the described axes last.

        Returns:
            The same numbers as (batch..., in, out).

        Raises:
            ValueError: if the kernel has fewer axes than described.
        """
        batch, n_in, n_out = self.sizes(kernel.shape)
        return jnp.transpose(kernel, self._order(kernel.shape)).reshape(*batch, n_in, n_out)

    def from_matrix(self, matrix: jax.Array, kernel_shape: Sequence[int]) -> jax.Array:
        """Undoes `to_matrix`.

        Args:
            matrix: (batch..., in, out).
            kernel_shape: shape of the kernel to return.

        Returns:
            The same numbers in the kernel's layout.

        Raises:
            ValueError: if the sizes do not fit.
        """
        shape = tuple(kernel_shape)
        batch, n_in, n_out = self.sizes(shape)
        if matrix.shape != (*batch, n_in, n_out):
            raise ValueError(
                f"a matrix of shape {matrix.shape} does not fit a kernel of shape {shape}, "
                f"which needs {(*batch, n_in, n_out)}"
            )
        order = self._order(shape)
        ordered = matrix.reshape([shape[i] for i in order])
        return jnp.transpose(ordered, _inverse(order))

    def _order(self, shape: tuple[int, ...]) -> list[int]:
        stacked = range(len(self.stack_shape(shape)))
        return [*stacked, *(i + len(shape) for i in (*self.batch, *self.contracted, *self.out))]


def _inverse(order: list[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]
