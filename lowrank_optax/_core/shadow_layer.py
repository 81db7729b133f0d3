"""The layer of a shadowed pair, whose backward pass returns products of the full gradient."""

import functools
import math
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import krylov, meshes
from lowrank_optax._core.linalg import transposed
from lowrank_optax._core.nodes import AxisName

# Width of the blocks of the kernel's gradient that Shampoo's statistics are summed over.
_BLOCK = 128


def apply_shadowed(x: jax.Array, node: Any, scale: Any, axis_name: AxisName = None) -> jax.Array:
    r"""Applies a shadowed pair: forward $y = s (x a) b$, backward the block-Krylov bases.

    Args:
        x: input: any leading axes if the factors have no batch axes, else (batch..., tokens, in).
        node: the pair with its krylov.
        scale: forward scale s.
        axis_name: axes of `pmap`, or of `shard_map` without `check_vma`, over which the tokens
          are spread, where each device's loss is the mean over its own.

    Returns:
        y, (..., out), in at least float32.

    Raises:
        ValueError: if the input's leading axes do not fit the factors' batch axes, or the factors
          differ between devices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, shadow
        >>> node = shadow(LoRAPair(jnp.ones((3, 1)), jnp.ones((1, 2))), jax.random.key(0))
        >>> grads = jax.grad(lambda node: apply_shadowed(jnp.eye(3), node, 2.0).sum())(node)
        >>> grads.krylov_b.tolist()  # G = 2 everywhere, so A₁ = [4, 0] and B₂ = A₁ᵀ G
        [[24.0, 24.0], [0.0, 0.0]]
    """
    batch = node.a.shape[:-2]
    if batch and x.shape[:-2] != batch:
        raise ValueError(
            f"an input of shape {x.shape} does not fit factors with batch axes {batch}: give"
            f" (*{batch}, tokens, in), so that each batch entry sees its own tokens."
        )
    if axes := meshes.varying(node.a) | meshes.varying(node.b):
        raise ValueError(
            f"the factors of a shadowed pair differ along the mesh axes {sorted(axes)}; inside"
            " `shard_map` they must be replicated. Shard them by `jit` on a mesh instead."
        )
    return _apply(axis_name, x, node, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(axis_name: AxisName, x: jax.Array, node: Any, scale: Any) -> jax.Array:
    narrow = scale * _matmul(x, node.a, like=x)
    return _matmul(narrow, node.b, like=x)


def _forward(axis_name: AxisName, x: jax.Array, node: Any, scale: Any) -> tuple[jax.Array, Any]:
    return _apply(axis_name, x, node, scale), (x, node, scale)


def _backward(
    axis_name: AxisName, residuals: Any, dy: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    x, node, scale = residuals
    tokens = _Tokens.of(axis_name, x, dy)
    dy *= jnp.asarray(tokens.share, dy.dtype)
    matmul = functools.partial(_matmul, like=x)
    over_tokens = functools.partial(_over_tokens, like=x, tokens=tokens)

    statistics = node._replace(**_statistics(x, dy, node, tokens))
    metric = krylov.metric_of(node, statistics)
    element = krylov.first_elements(node, metric)
    products: krylov.Basis = {"a": [], "b": []}
    lengths = krylov.lengths(krylov.iterations_of(node))
    low = []
    while len(products["b"]) < lengths["b"]:
        narrow = {"a": matmul(x, element["a"]), "b": matmul(dy, transposed(element["b"]))}
        low.append(narrow["b"][..., : node.a.shape[-1]])
        element = {"b": scale * over_tokens(narrow["a"], dy, node.b)}  # aᵀ G with G = s xᵀ dy
        if len(products["a"]) < lengths["a"]:
            # (G bᵀ)ᵀ: with the wide factor last, this product is three times as fast on CPUs.
            flat = scale * over_tokens(narrow["b"], x, transposed(node.a))
            element["a"] = transposed(jax.lax.optimization_barrier(flat))
        for side, product in element.items():
            products[side].append(product)
        if metric is not None:
            element = {side: metric.divide(side, y) for side, y in element.items()}

    rank, last = node.a.shape[-1], products["a"][0].shape[-1]
    q = krylov.momentum_rank(node)
    grads = jax.tree.map(jnp.zeros_like, statistics)._replace(
        a=products["a"][0][..., :rank],
        b=products["b"][0][..., :rank, :],
        **krylov.pack(node, products),
        d_in=statistics.d_in,
        d_out=statistics.d_out,
    )
    if q:
        m_a, m_b = products["a"][0][..., last - q :], products["b"][0][..., last - q :, :]
        grads = grads._replace(m_a=m_a, m_b=m_b)
    grads = jax.tree.map(
        lambda g, leaf: meshes.reshard_like(g.astype(leaf.dtype), leaf), grads, node
    )

    a = _after(node.a, (products, statistics.d_in, statistics.d_out))
    dx = scale / tokens.share * matmul(low[0], transposed(a))  # the first is dy bᵀ
    d_scale = tokens.total(jnp.sum(matmul(scale * matmul(x, node.a), node.b) * dy)) / scale
    return meshes.reshard_like(dx.astype(x.dtype), x), grads, d_scale


_apply.defvjp(_forward, _backward)


class _Tokens(NamedTuple):
    """Over which devices of `pmap` or `shard_map` the tokens are spread.

    Args:
        axes: the mesh axes.
        devices: how many devices share the tokens.
        share: what to multiply a device's gradient by, so that their sum is the whole gradient.
    """

    axes: tuple[str, ...]
    devices: int
    share: float

    @classmethod
    def of(cls, axis_name: AxisName, x: jax.Array, dy: jax.Array) -> "_Tokens":
        # Where shard_map tracks what differs, JAX sums gradients of replicated parameters itself.
        known = tuple(sorted(meshes.varying(x) | meshes.varying(dy)))
        named = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
        devices = math.prod(jax.lax.axis_size(name) for name in known or named)
        return cls(known or named, devices, 1.0 if known else 1.0 / devices)

    def total(self, part: jax.Array) -> jax.Array:
        """Sums what each device has of its own tokens."""
        return jax.lax.psum(part, self.axes) if self.axes else part


def _statistics(x: jax.Array, dy: jax.Array, node: Any, tokens: _Tokens) -> dict[str, jax.Array]:
    """Computes what the metric averages, by field of the node."""
    over = tuple(range(node.a.ndim - 2, x.ndim - 1))
    number = tokens.devices * math.prod(x.shape[axis] for axis in over)
    if node.kfac is not None:
        square = lambda y: tokens.total(jnp.sum(jnp.square(_wide(y)), axis=over))
        found = {"d_in": square(x) / number, "d_out": number * square(dy)}
    elif node.shampoo is not None:
        rows, columns = _squared_norms(x, dy, node, tokens)
        found = {"d_in": number * rows, "d_out": number * columns}
    else:
        return {}
    # Activations may be sharded otherwise than the factors, as under FSDP.
    return {name: meshes.reshard_like(y, getattr(node, name)) for name, y in found.items()}


def _squared_norms(
    x: jax.Array, dy: jax.Array, node: Any, tokens: _Tokens
) -> tuple[jax.Array, jax.Array]:
    """Computes squared row and column norms of `xᵀ dy`, which never exists as a whole."""
    if not _features_are_sharded(dy):
        return _norms_by_blocks(x, dy, node.a, tokens)
    if not _features_are_sharded(x):
        columns, rows = _norms_by_blocks(dy, x, transposed(node.b), tokens)
        return rows, columns
    raise ValueError(
        "Shampoo's metric goes through blocks of input or output features, and both are sharded on"
        " an Explicit mesh; use an Auto mesh, replicate one of them, or take K-FAC's metric."
    )


def _features_are_sharded(x: jax.Array) -> bool:
    spec = meshes.spec_of(x)
    return spec is not None and spec[-1] is not None


def _norms_by_blocks(
    x: jax.Array, y: jax.Array, leaf: jax.Array, tokens: _Tokens
) -> tuple[jax.Array, jax.Array]:
    """Squared row and column norms of `xᵀ y`, by blocks of the columns; rows lie as the leaf's."""

    def of_block(rows: jax.Array, start: Any, width: int) -> tuple[jax.Array, jax.Array]:
        block = jax.lax.dynamic_slice_in_dim(y, start, width, axis=-1)
        square = jnp.square(_over_tokens(x, block, leaf, like=x, tokens=tokens))
        return rows + jnp.sum(square, axis=-1), jnp.sum(square, axis=-2)

    batch = leaf.shape[:-2]
    width = min(_BLOCK, y.shape[-1])
    number, remainder = divmod(y.shape[-1], width)
    rows = jnp.zeros_like(leaf[..., 0], _wide(x).dtype)  # sharded like the blocks' rows
    rows, columns = jax.lax.scan(
        lambda rows, i: of_block(rows, i * width, width), rows, jnp.arange(number)
    )
    columns = jnp.moveaxis(columns, 0, -2).reshape(*batch, number * width)
    if remainder:
        rows, last = of_block(rows, number * width, remainder)
        columns = jnp.concatenate([columns, last], axis=-1)
    return rows, columns


def _after(x: jax.Array, signals: Any) -> jax.Array:
    """Returns x, but not before the signals are computed.

    What a layer computes for its node needs its input and output gradient. Computing it early frees
    those arrays; XLA's schedulers would otherwise keep them.
    """

    def by_dependence(x: jax.Array, signals: Any) -> jax.Array:
        # XLA drops barriers before it schedules for CPUs; it does not see that this sum is zero.
        # Maxima, for no single entry of a sharded axis can be taken on an Explicit mesh.
        maxima = [jnp.max(y).astype(jnp.float32) for y in jax.tree.leaves(signals)]
        bits = jax.lax.bitcast_convert_type(jnp.stack(maxima), jnp.int32)
        return x + jnp.sum(jnp.minimum(jnp.maximum(bits, 0), 0)).astype(x.dtype)

    def by_barrier(x: jax.Array, signals: Any) -> jax.Array:
        return jax.lax.optimization_barrier((x, signals))[0]

    return jax.lax.platform_dependent(x, signals, cpu=by_dependence, default=by_barrier)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _matmul(x: jax.Array, y: jax.Array, like: jax.Array) -> jax.Array:
    """Multiplies in the dtype of `like`, accumulating in at least float32."""
    accumulate = jnp.promote_types(like.dtype, jnp.float32)
    return meshes.matmul(x.astype(like.dtype), y.astype(like.dtype), accumulate)


def _over_tokens(
    x: jax.Array, y: jax.Array, leaf: jax.Array, like: jax.Array, tokens: _Tokens
) -> jax.Array:
    """Computes `xᵀ y` over all tokens as `_matmul` would, sharded as the leaf is."""
    batch = string.ascii_lowercase[: leaf.ndim - 2]
    axes = string.ascii_uppercase[: x.ndim - 1 - len(batch)]
    # Without a transposed operand: XLA fuses it into bfloat16 dots that its CPU backend lacks.
    part = jnp.einsum(
        f"{batch}{axes}y,{batch}{axes}z->{batch}yz",
        x.astype(like.dtype),
        y.astype(like.dtype),
        preferred_element_type=jnp.promote_types(like.dtype, jnp.float32),
        out_sharding=meshes.sharding_like(leaf, x, y),
    )
    return tokens.total(part)
