"""Scaling and clipping of gradients that hold OPLoRA's products: each by its own power."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import krylov
from lowrank_optax._core.arguments import check_positive
from lowrank_optax._core.layouts import PairMatcher
from lowrank_optax._core.linalg import SIDES, widened
from lowrank_optax._core.names import in_words
from lowrank_optax._core.pairing import find_pairs
from lowrank_optax._core.shadows import ShadowedPair


def scale_gradients(grads: Any, factor: Any, specs: Sequence[PairMatcher] | None = None) -> Any:
    """Scales gradients as if the loss had been scaled: each product by the factor's power.

    For loss scaling: multiply the loss, then scale the gradients by the reciprocal.

    Args:
        grads: gradients of a parameter tree.
        factor: a scalar.
        specs: layouts of the pairs (`PairSpec`).

    Returns:
        The scaled tree.

    Raises:
        ValueError: pairs that do not fit; pairs with a metric for iterations from 1, whose products
            hold the metric of the unscaled gradient.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, shadow
        >>> grads = shadow(LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4))), jax.random.key(0))
        >>> grads = grads._replace(krylov_b=jnp.ones((4, 4)))
        >>> half = scale_gradients(grads, 0.5)
        >>> half.a[0, 0].item(), half.krylov_b[0, 0].item()
        (0.5, 0.25)
    """
    found = find_pairs(grads, specs)
    times = lambda tree: jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)

    def scaled(path: str, pair: Any) -> Any:
        return _scaled(path, pair, factor) if isinstance(pair, ShadowedPair) else times(pair)

    pairs = [scaled(at.path, pair) for at, pair in zip(found.pairs, found.take(grads), strict=True)]
    return found.merge(found.put(pairs, grads), times(found.rest(grads)))


def _scaled(path: str, pair: ShadowedPair, factor: Any) -> ShadowedPair:
    iterations = krylov.iterations_of(pair)
    if krylov.has_metric(pair) and iterations:
        raise ValueError(
            f"{in_words(path)}: the products of a pair with a metric cannot be scaled afterwards,"
            " for they hold the metric of the unscaled gradient. Scale the loss instead, or use"
            " `iterations=0`."
        )
    by = lambda x, p: (p * x).astype(x.dtype)
    scaled = jax.tree.map(lambda x: by(x, factor), pair)
    degrees = krylov.degrees(pair, iterations)
    repeated = {
        side: [n for n in of for _ in range(krylov.width(pair))] for side, of in degrees.items()
    }
    if pair.krylov_a is not None:
        krylov_a = by(pair.krylov_a, _powers(factor, repeated["a"], pair.krylov_a.ndim, -1))
        scaled = scaled._replace(krylov_a=krylov_a)
    if pair.krylov_b is not None:
        krylov_b = by(pair.krylov_b, _powers(factor, repeated["b"], pair.krylov_b.ndim, -2))
        scaled = scaled._replace(krylov_b=krylov_b)
    if pair.checksum is not None:
        checksum = by(pair.checksum, _powers(factor, [1, 2, 1], pair.checksum.ndim, -1))
        scaled = scaled._replace(checksum=checksum)
    if krylov.has_metric(pair):
        of_inputs = pair.d_in if pair.shampoo is None else factor**2 * pair.d_in
        scaled = scaled._replace(d_in=of_inputs, d_out=factor**2 * pair.d_out)
    return scaled


def _powers(factor: Any, degrees: Sequence[int], ndim: int, axis: int) -> jax.Array:
    """Powers of a factor along one of so many axes, without a promotion of types or ranks."""
    shape = [1] * ndim
    shape[axis] = len(degrees)
    factor = jnp.asarray(factor)
    return jnp.stack([factor**n for n in degrees]).reshape(shape)


def clip_by_global_norm(
    max_norm: Any, specs: Sequence[PairMatcher] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm of the gradients of trained leaves, OPLoRA's products consistently.

    `optax.clip_by_global_norm` counts the shadows into the norm and scales all products alike,
    which OPLoRA finds inconsistent; put this before it instead.

    Args:
        max_norm: the largest norm, positive.
        specs: layouts of the pairs (`PairSpec`).

    Returns:
        The transformation, stateless. Its `update` raises as `scale_gradients` does. Inside
        `shard_map` it takes `param_specs`, a `PartitionSpec` for each parameter, and sums the norm
        over the devices.

    Raises:
        ValueError: a norm that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair
        >>> tx = clip_by_global_norm(1.0)
        >>> grads = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 2)))}
        >>> tx.update(grads, tx.init(grads))[0]["q"].a[0, 0].item()
        0.25
    """
    check_positive("max_norm", max_norm)

    def update(
        updates: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        param_specs: Any = None,
        **extra_args: Any,
    ) -> Any:
        del params, extra_args
        norm = _global_norm(updates, specs, param_specs)
        factor = max_norm / jnp.maximum(norm, max_norm)
        return scale_gradients(updates, factor, specs), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _global_norm(updates: Any, specs: Any, param_specs: Any) -> jax.Array:
    """The norm of all leaves but the products beside factors, whole ones inside `shard_map`."""
    found = find_pairs(updates, specs)
    beside = {i for pair in found.pairs for role, i in pair.leaves.items() if role not in SIDES}
    placed = found.by_leaf(jax.P() if param_specs is None else param_specs, "param_specs")
    total: Any = 0.0
    for i, (x, spec) in enumerate(zip(jax.tree.leaves(updates), placed, strict=True)):
        if i in beside:
            continue
        squares = jnp.sum(jnp.square(widened(x)))  # float16 ends at 65,504
        axes = tuple(name for entry in spec for name in jax.tree.leaves(entry))
        total += jax.lax.psum(squares, axes) if axes else squares
    return jnp.sqrt(total)
