r"""SVDLoRA: dense training projected to low rank after each step (arXiv 2509.19977).

The parameter is the dense ΔK itself. With u the update of any inner optimizer and Π_r the truncated
singular value decomposition, the nearest matrix of rank r:

    ΔK ← Π_r(ΔK + u)

It needs the memory and time of dense matrices. It is the reference that OPLoRA approaches, for
measurements and for small layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import meshes
from lowrank_optax._core.arguments import check_integer
from lowrank_optax._core.decompositions import svd
from lowrank_optax._core.linalg import compute_dtype, product, widened
from lowrank_optax._core.names import path_name
from lowrank_optax._core.nodes import LoRAPair, is_node

_LEAVE_OUT = (
    " Leave a leaf out by `optax.masked`, or give it to another optimizer by `optax.partition`."
)


class SVDLoRAState(NamedTuple):
    """State of `svd_lora`.

    Args:
        inner: state of the inner optimizer, of dense matrices; it is not projected.
    """

    inner: Any


def svd_lora(
    inner: optax.GradientTransformation, rank: int
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps dense updates ΔK at a rank by projecting them after each step of an inner optimizer.

    $$\Delta K \leftarrow \Pi_r(\Delta K + u)$$

    Args:
        inner: the optimizer of the dense matrices, learning rate included.
        rank: r, from 1 to min(in, out) of every leaf.

    Returns:
        The transformation of a tree of leaves (..., in, out), whose leading axes are batch axes. It
        must be the last link of a chain. A parameter has rank r up to rounding in its dtype, also
        where it starts with a higher one. State: the inner optimizer's.

    Raises:
        ValueError: from `init` and `update`, a leaf without two axes or too small for the rank,
            or a LoRA pair; from `update`, no `params`.
        TypeError: a leaf that is not floating; an `inner` that is no transformation, a rank that is
            no integer.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from lowrank_optax import svd_lora
        >>> params, target = jnp.zeros((3, 4)), jnp.diag(jnp.array([3.0, 2.0, 1.0])) @ jnp.eye(3, 4)
        >>> tx = svd_lora(optax.sgd(1.0), rank=2)
        >>> updates, state = tx.update(params - target, tx.init(params), params)
        >>> jnp.linalg.svdvals(optax.apply_updates(params, updates)).round().tolist()
        [3.0, 2.0, 0.0]

    Source: arXiv 2509.19977, SVDLoRA.
    """
    check_integer("rank", rank, least=1)
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"`inner` must be an optax transformation, got {inner!r}.")
    inner = optax.with_extra_args_support(inner)

    def check_leaves(params: Any) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node):
            if is_node(leaf):
                raise ValueError(
                    f"{path_name(path)}: svd_lora works on the dense ΔK, but this is a"
                    f" {type(leaf).__name__}. Use the optimizer made for it.{_LEAVE_OUT}"
                )
            _check(path_name(path), leaf, rank, _LEAVE_OUT)

    def init(params: Any) -> SVDLoRAState:
        check_leaves(params)
        return SVDLoRAState(inner.init(params))

    def update(
        updates: Any, state: SVDLoRAState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SVDLoRAState]:
        if params is None:
            raise ValueError(
                "svd_lora projects the parameters: call `update(updates, state, params)`."
            )
        check_leaves(params)
        if "param_specs" in extra_args:
            _check_whole(params, extra_args["param_specs"])
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)

        def project(u: jax.Array, x: jax.Array) -> jax.Array:
            dtype = compute_dtype(x, u)
            left, values, right = _truncated_svd(x.astype(dtype) + u.astype(dtype), rank)
            projected = product(left * values[..., None, :], right)
            return (projected - x.astype(dtype)).astype(x.dtype)

        return jax.tree.map(project, updates, params), SVDLoRAState(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def pair_of_delta(delta: jax.Array, rank: int) -> LoRAPair:
    r"""Factors a dense update into the LoRA pair that is nearest to it.

    $$a = U_r \Sigma_r^{1/2} \qquad b = \Sigma_r^{1/2} V_r^\top$$

    Args:
        delta: ΔK, (..., in, out), floating.
        rank: r, from 1 to min(in, out).

    Returns:
        The pair, (..., in, r) and (..., r, out), in float32 or better, with equal Gram matrices
        `aᵀ a = b bᵀ`.

    Raises:
        ValueError: fewer than two axes, or a rank out of range.
        TypeError: `delta` is not floating, or the rank no integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import pair_of_delta
        >>> pair = pair_of_delta(jnp.full((3, 4), 2.0), rank=1)
        >>> (pair.a @ pair.b)[0].round().tolist()
        [2.0, 2.0, 2.0, 2.0]

    Source: arXiv 2509.19977; Eckart and Young, 1936, for the nearest matrix of a rank.
    """
    check_integer("rank", rank, least=1)
    _check("delta", delta, rank)
    left, values, right = _truncated_svd(widened(delta), rank)
    root = jnp.sqrt(values)
    return LoRAPair(left * root[..., None, :], root[..., None] * right)


def _truncated_svd(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular triplets, largest values first; Σ is NaN for a non-finite matrix."""
    left, values, right = svd(matrix)
    return left[..., :rank], values[..., :rank], right[..., :rank, :]


def _check(name: str, matrix: jax.Array, rank: int, remedy: str = "") -> None:
    """Raises unless the matrix, or each of a batch, can be projected to the rank."""
    shape = tuple(matrix.shape)
    if len(shape) < 2:
        raise ValueError(f"{name}: a matrix (..., in, out) is needed, got {shape}.{remedy}")
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(f"{name}: a floating matrix is needed, got {matrix.dtype}.{remedy}")
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(
            f"{name}: the rank must lie between 1 and min(in, out) of {shape}, got {rank}: choose"
            f" another rank.{remedy}"
        )
    if any((meshes.spec_of(matrix) or ())[-2:]):
        raise ValueError(
            f"{name}: a singular value decomposition needs whole matrices on an Explicit mesh, but"
            f" this one is sharded as {meshes.spec_of(matrix)}; replicate its last two axes, or use"
            f" an Auto mesh.{remedy}"
        )


def _check_whole(params: Any, param_specs: Any) -> None:
    """Raises if `shard_map` gives a device only part of a matrix."""
    specs = jax.tree.leaves(jax.tree.broadcast(param_specs, params))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        if any(axis is not None for axis in (*spec, *[None] * (leaf.ndim - len(spec)))[-2:]):
            raise ValueError(
                f"{path_name(path)}: a singular value decomposition needs whole matrices, but"
                f" inside `shard_map` this one is sharded as {spec}; replicate its last two axes,"
                " or use `jit` on an Auto mesh."
            )
