"""How a kernel of any shape contracts with its input.

`KernelAxes` describes the weight side of a layer, `Contraction` the activation side.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.nn.kernel_axes import KernelAxes

_ELLIPSIS = "..."


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Which axes of the input, the kernel and the output belong together.

    A label that stands in input and kernel only is contracted, one in kernel and output only is an
    output axis, one in all three is a batch axis, one in input and output only is a token axis.
    `'...'` in input and output stands for any number of token axes.

    Attributes:
        x: labels of the input's axes.
        kernel: labels of the kernel's axes.
        y: labels of the output's axes.

    Raises:
        ValueError: if the labels do not describe a linear layer of that kind.

    Example:
        >>> Contraction.from_einsum('BTD,NDH->BTNH').kernel_axes
        KernelAxes(batch=(), contracted=(-2,), out=(-3, -1))
    """

    x: tuple[str, ...]
    kernel: tuple[str, ...]
    y: tuple[str, ...]

    def __post_init__(self) -> None:
        x, kernel, y = set(self.x), set(self.kernel), set(self.y)
        problems = {
            "labels that occur twice in one operand": {
                label
                for labels in (self.x, self.kernel, self.y)
                for label in labels
                if labels.count(label) > 1
            },
            "an ellipsis in the kernel": kernel & {_ELLIPSIS},
            "kernel labels that are summed out": kernel - x - y,
            "input labels that are summed out": x - kernel - y,
            "output labels that come from nowhere": y - x - kernel,
        }
        for problem, labels in problems.items():
            if labels:
                raise ValueError(f"{self}: LoRA cannot adapt {problem}: {sorted(labels)}")
        if not (x & kernel) - y or not (kernel & y) - x:
            raise ValueError(f"{self}: LoRA needs a contracted axis and an output axis")

    def __str__(self) -> str:
        """Writes the contraction the way einsum does."""
        return f"'{''.join(self.x)},{''.join(self.kernel)}->{''.join(self.y)}'"

    @classmethod
    def from_einsum(cls, einsum_str: str) -> "Contraction":
        """Reads a contraction from an einsum string with the input first and the kernel second.

        Args:
            einsum_str: such as `'BTD,NDH->BTNH'` or `'...d,df->...f'`; spaces are ignored.

        Returns:
            The contraction.

        Raises:
            ValueError: if the string is not of the form `'x,kernel->y'` or is no linear layer.

        Example:
            >>> Contraction.from_einsum('...d, df -> ...f').x
            ('...', 'd')
        """
        text = einsum_str.replace(" ", "")
        inputs, arrow, output = text.partition("->")
        operands = inputs.split(",")
        if not arrow or len(operands) != 2:
            raise ValueError(f"einsum string {einsum_str!r} is not of the form 'x,kernel->y'")
        return cls(_labels(operands[0]), _labels(operands[1]), _labels(output))

    @classmethod
    def from_dense_general(
        cls, ndim: int, axis: Sequence[int], batch_axes: Sequence[int], n_out: int
    ) -> "Contraction":
        """Describes what `DenseGeneral` and `LinearGeneral` do to an input of `ndim` axes.

        Args:
            ndim: number of axes of the input.
            axis: contracted axes of the input; flax takes them in increasing order.
            batch_axes: batch axes of the input.
            n_out: number of output axes; they come last in the output, batch axes first.

        Returns:
            The contraction.

        Example:
            >>> print(Contraction.from_dense_general(3, axis=(-1,), batch_axes=(), n_out=2))
            'x0x1x2,x2o0o1->x0x1o0o1'
        """
        x = tuple(f"x{i}" for i in range(ndim))
        contracted = tuple(x[i] for i in sorted(i % ndim for i in axis))
        batch = tuple(x[i] for i in sorted(i % ndim for i in batch_axes))
        tokens = tuple(label for label in x if label not in contracted + batch)
        out = tuple(f"o{i}" for i in range(n_out))
        return cls(x, batch + contracted + out, batch + tokens + out)

    def kernel_among(self, shapes: Mapping[str, Sequence[int]], *, stacked: bool) -> list[str]:
        """Names the parameters that can be the kernel; others may be biases beside it.

        Args:
            shapes: of a layer's parameters by name.
            stacked: whether they may have further leading axes.

        Returns:
            The names of those that have the kernel's axes, and so many numbers that each of the
            others may be a bias.

        Example:
            >>> by_heads = Contraction.from_einsum("btd,dnh->btnh")
            >>> shapes = {"w": (4, 2, 3), "bias": (1, 2, 3), "scale": ()}
            >>> by_heads.kernel_among(shapes, stacked=False)
            ['w']
        """
        axes, found = len(self.kernel), []
        for name, shape in shapes.items():
            if len(shape) < axes or (len(shape) > axes and not stacked):
                continue
            _, n_in, _ = self.kernel_axes.sizes(shape)
            others = [math.prod(other) for key, other in shapes.items() if key != name]
            if all(size * n_in <= math.prod(shape) for size in others):
                found.append(name)
        return found

    def require_sizes(self, x_shape: Sequence[int], kernel_shape: Sequence[int]) -> None:
        """Refuses an input that this contraction cannot contract with the kernel.

        Raises:
            ValueError: a label has two sizes, as where the string has the kernel first.

        Example:
            >>> Contraction.from_einsum("bd,df->bf").require_sizes((5, 4), (4, 3))
        """
        labels = self._input_roles(len(x_shape))[0]
        sizes = dict(zip(labels, x_shape, strict=True))
        of_kernel = tuple(kernel_shape)[-len(self.kernel) :]
        for label, size in zip(self.kernel, of_kernel, strict=True):
            if sizes.get(label, size) != size:
                raise ValueError(
                    f"{self}: {label} is {sizes[label]} in the input {tuple(x_shape)} and {size} in"
                    f" the kernel {tuple(kernel_shape)}; the string must have the input first and"
                    " the kernel second"
                )

    @property
    def kernel_axes(self) -> KernelAxes:
        """The roles of the kernel's axes, each in the order of the kernel."""
        roles: dict[tuple[bool, bool], list[int]] = {}
        for position, label in enumerate(self.kernel, start=-len(self.kernel)):
            roles.setdefault((label in self.x, label in self.y), []).append(position)
        return KernelAxes(
            batch=tuple(roles.get((True, True), ())),
            contracted=tuple(roles[True, False]),
            out=tuple(roles[False, True]),
        )

    def adapt(
        self,
        apply: Callable[[jax.Array, Any], jax.Array],
        x: jax.Array,
        pair: Any,
        dtype: DTypeLike,
        kernel_shape: Sequence[int],
    ) -> jax.Array:
        """Applies a pair of flat factors where the layer applies its kernel.

        Args:
            apply: what the pair makes of a flat input (..., in), (..., out).
            x: the layer's input.
            pair: the flat factors.
            dtype: of the layer's output.
            kernel_shape: shape of the layer's kernel.

        Returns:
            What is to be added to the layer's output, in its layout.

        Raises:
            ValueError: the input does not fit the kernel.
        """
        self.require_sizes(x.shape, kernel_shape)
        flat = apply(self.flatten_input(x.astype(dtype)), pair)
        return self.unflatten_output(flat, x.shape, kernel_shape)

    def flatten_bias(self, bias: jax.Array, kernel_shape: Sequence[int]) -> jax.Array:
        """Lays a layer's bias, which stands in the order of its output, out as flat columns.

        Args:
            bias: of as many numbers as the kernel has batch and output entries.
            kernel_shape: shape of the kernel.

        Returns:
            (batch..., out).

        Example:
            >>> heads = Contraction.from_einsum("td,ndh->htn")
            >>> heads.flatten_bias(jnp.arange(6.0).reshape(3, 2), (2, 4, 3)).tolist()
            [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
        """
        sizes = dict(zip(self.kernel, kernel_shape, strict=True))
        stands = [label for label in self.y if label in sizes]
        batch = [label for label in self.kernel if label in self.y and label in self.x]
        out = [label for label in self.kernel if label in self.y and label not in self.x]
        bias = bias.reshape([sizes[label] for label in stands])
        ordered = jnp.transpose(bias, [stands.index(label) for label in (*batch, *out)])
        return ordered.reshape(*(sizes[label] for label in batch), -1)

    def flatten_input(self, x: jax.Array) -> jax.Array:
        """Lays the input out so that a matmul with flat factors is right.

        Args:
            x: the layer's input.

        Returns:
            (tokens..., in) without batch axes, else (batch..., tokens, in) with one token axis.

        Raises:
            ValueError: if the input has too few axes.
        """
        labels, batch, tokens, contracted = self._input_roles(x.ndim)
        order = [labels.index(label) for label in (*batch, *tokens, *contracted)]
        shape = dict(zip(labels, x.shape, strict=True))
        sizes = lambda labels: [shape[label] for label in labels]
        # Twice, for on an Explicit mesh a reshape may merge axes in one place only.
        leading = (*sizes(batch), *_token_shape(shape, batch, tokens))
        x = jnp.transpose(x, order).reshape(*leading, *sizes(contracted))
        return x.reshape(*leading, math.prod(sizes(contracted)))

    def unflatten_output(
        self, y: jax.Array, x_shape: Sequence[int], kernel_shape: Sequence[int]
    ) -> jax.Array:
        """Brings the product of a flattened input with flat factors to the layer's output layout.

        Args:
            y: (tokens..., out) or (batch..., tokens, out): a flattened input times flat factors.
            x_shape: shape of the layer's input.
            kernel_shape: shape of the layer's kernel.

        Returns:
            The layer's output layout.
        """
        labels, batch, tokens, _ = self._input_roles(len(x_shape))
        shape = dict(zip(labels, x_shape, strict=True))
        out = tuple(label for label in self.kernel if label in self.y and label not in self.x)
        shape |= {label: kernel_shape[self.kernel.index(label)] for label in out}
        ordered = (*batch, *tokens, *out)
        target = _expand(self.y, tuple(label for label in labels if label.startswith(_ELLIPSIS)))
        y = y.reshape(*y.shape[:-1], *(shape[label] for label in out))  # see `flatten_input`
        return jnp.transpose(
            y.reshape([shape[label] for label in ordered]),
            [ordered.index(label) for label in target],
        )

    def _input_roles(self, ndim: int) -> tuple[tuple[str, ...], ...]:
        """Returns the labels of an input of `ndim` axes: all, batch, tokens, contracted."""
        unnamed = ndim - len([label for label in self.x if label != _ELLIPSIS])
        if unnamed < 0 or (unnamed and _ELLIPSIS not in self.x):
            raise ValueError(f"{self}: the input has {ndim} axes")
        labels = _expand(self.x, tuple(f"{_ELLIPSIS}{i}" for i in range(unnamed)))
        batch = tuple(k for k in self.kernel if k in self.x and k in self.y)
        contracted = tuple(k for k in self.kernel if k in self.x and k not in self.y)
        tokens = tuple(label for label in labels if label not in self.kernel)
        return labels, batch, tokens, contracted


def _labels(term: str) -> tuple[str, ...]:
    """Splits an einsum term into letters, an ellipsis counting as one."""
    head, ellipsis, tail = term.partition(_ELLIPSIS)
    return (*head, *([_ELLIPSIS] if ellipsis else []), *tail)


def _expand(labels: tuple[str, ...], unnamed: tuple[str, ...]) -> tuple[str, ...]:
    """Puts the unnamed axes in the place of the ellipsis."""
    if _ELLIPSIS not in labels:
        return labels
    at = labels.index(_ELLIPSIS)
    return labels[:at] + unnamed + labels[at + 1 :]


def _token_shape(
    shape: dict[str, int], batch: tuple[str, ...], tokens: tuple[str, ...]
) -> tuple[int, ...]:
    """Keeps token axes apart unless batch axes force matmul to see a single one."""
    sizes = tuple(shape[label] for label in tokens)
    return (math.prod(sizes),) if batch else sizes
