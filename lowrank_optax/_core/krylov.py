r"""The block-Krylov bases through which an optimizer sees a full gradient that is never formed.

With G the gradient of the loss in the product a b (s times the gradient in the kernel), the
backward pass of a layer can form `G Lᵀ` and `Rᵀ G` for any narrow L and R from what it has at hand:
its input x and the gradient of its output. Starting from the factors of the adapter and of the
optimizer's momentum, it builds two bases:

    A₀ = [a, m_a]    Aᵢ₊₁ = G Bᵢᵀ          B₀ = [b; m_b]    Bᵢ₊₁ = Aᵢᵀ G

A₁ and B₁ are the gradients of the four factors. The further elements that `iterations` k of LoRSum
need, B₂ … B₂ₖ and A₂ … A₂ₖ₋₁, arrive as the gradients of two leaves of zeros, `krylov_b` and
`krylov_a`. They are concatenated along the rank axis, so that they are sharded like the factors.

A step in a metric, diagonals D_in and D_out, divides each product with G by the metric. The
momentum is kept without metric, so there is one block more, which is not divided:

    A₀ = [a, D_in⁻¹ m_a, m_a]    Aᵢ₊₁ = G Bᵢᵀ, all columns except the last block divided by D_in

The metric is of the same backward pass: statistics of x and of the output's gradient arrive as the
gradients of `d_in` and `d_out`, and `D = (β₂ d + (1 − β₂) statistic + damping)^power`.

An element with index i is of degree i in the gradient: twice the gradient gives 2ⁱ times the
element. So the sum over micro-batches is right for degree 1 only. The gradient of `checksum` holds
sums over A₁ and B₁, and squares of the latter. After gradients are summed or scaled, the squares no
longer match; after something is added to them, as an L2 term, the sums do not. `is_untouched` sees
both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._core import meshes
from lowrank_optax._core.linalg import LONG_AXIS, RANK_AXIS, SIDES, Side, weigh

Basis = dict[Side, list[jax.Array]]


class MetricValues(NamedTuple):
    """The diagonal metric of one backward pass, which layer and optimizer compute alike.

    Args:
        averages: the running averages, this pass included, (..., in) and (..., out) by side.
        weights: the diagonals D_in and D_out by side.
        columns: how many columns, from the first, the metric divides.
    """

    averages: dict[Side, jax.Array]
    weights: dict[Side, jax.Array]
    columns: int

    def divide(self, side: Side, x: jax.Array) -> jax.Array:
        """Divides a product with the gradient by the metric, the momentum's block excepted."""
        step, momentum = split_rank(side, x, self.columns)
        return concat_rank(side, weigh(side, step, 1 / self.weights[side]), momentum)


def has_metric(pair: Any) -> bool:
    """Says whether a `ShadowedPair` has a metric.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, Metric, shadow
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4)))
        >>> has_metric(shadow(pair, jax.random.key(0), metric=Metric("shampoo")))
        True
    """
    return pair.kfac is not None or pair.shampoo is not None


def metric_of(pair: Any, statistics: Any) -> MetricValues | None:
    """Computes the metric of one backward pass.

    Args:
        pair: the parameters.
        statistics: a node with the statistics in `d_in` and `d_out`, as the gradient has them.

    Returns:
        The metric, or None where the node has none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, Metric, shadow
        >>> pair = LoRAPair(jnp.ones((2, 1)), jnp.zeros((1, 2)))
        >>> node = shadow(pair, jax.random.key(0), metric=Metric(b2=0.5, damping=2.0))
        >>> metric_of(node, node._replace(d_in=jnp.array([3.0, 27.0]))).weights["a"].tolist()
        [2.0, 4.0]
    """
    if not has_metric(pair):
        return None
    settings = pair.shampoo if pair.kfac is None else pair.kfac
    b2, damping, power = jnp.split(settings, 3, axis=-1)
    averages: dict[Side, jax.Array] = {
        "a": b2 * pair.d_in + (1 - b2) * statistics.d_in,
        "b": b2 * pair.d_out + (1 - b2) * statistics.d_out,
    }
    weights: dict[Side, jax.Array] = {s: (averages[s] + damping) ** power for s in SIDES}
    return MetricValues(averages, weights, pair.a.shape[-1] + momentum_rank(pair))


def momentum_rank(pair: Any) -> int:
    """Returns q, the rank of a node's momentum, 0 for none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, shadow
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4)))
        >>> momentum_rank(shadow(pair, jax.random.key(0), momentum_rank=1))
        1
    """
    return 0 if pair.m_a is None else pair.m_a.shape[-1]


def width(pair: Any) -> int:
    """Returns R, how many rank components an element of the bases has.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, shadow
        >>> width(shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0)))
        4
    """
    q = momentum_rank(pair)
    return pair.a.shape[-1] + (2 * q if has_metric(pair) else q)


def lengths(iterations: int) -> dict[Side, int]:
    """Counts the products with the gradient that LoRSum needs: A₁, A₂, … and B₁, B₂, ….

    Example:
        >>> lengths(2)
        {'a': 3, 'b': 4}
    """
    return {"a": max(2 * iterations - 1, 1), "b": max(2 * iterations, 1)}


def degrees(pair: Any, iterations: int) -> dict[Side, range]:
    """Returns the degrees in the gradient of the products in `krylov_a` and `krylov_b`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, shadow
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> degrees(node, 2)
        {'a': range(2, 4), 'b': range(2, 5)}
    """
    number, first = lengths(iterations), _first_packed(pair)
    return {side: range(1 + first, number[side] + 1) for side in SIDES}


def iterations_of(pair: Any) -> int:
    """Reads from the shapes for how many iterations a node is made.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, shadow
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4)))
        >>> iterations_of(shadow(pair, jax.random.key(0), iterations=3))
        3
    """
    products = 0 if pair.krylov_b is None else pair.krylov_b.shape[-2] // width(pair)
    return (_first_packed(pair) + products) // 2


def first_elements(pair: Any, metric: MetricValues | None) -> dict[Side, jax.Array]:
    """Forms A₀ and B₀.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, shadow
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> first_elements(node, None)["a"].shape
        (6, 4)
    """
    sides: dict[Side, Any] = {"a": (pair.a, pair.m_a), "b": (pair.b, pair.m_b)}
    elements: dict[Side, jax.Array] = {}
    for side, (x, m) in sides.items():
        step = x
        if metric is not None and m is not None:
            step = concat_rank(side, x, weigh(side, m, 1 / metric.weights[side]))
        elements[side] = concat_rank(side, step, m)
    return elements


def pack(pair: Any, products: Basis) -> dict[str, jax.Array]:
    """Lays products with the gradient out in the auxiliary leaves.

    Args:
        pair: the node.
        products: A₁, A₂, … and B₁, B₂, … before any division, as many as `lengths` says.

    Returns:
        The gradients of `krylov_a`, `krylov_b` and `checksum`, as far as the node has them. Without
        a metric A₁ and B₁ are left out, for they are the gradients of the factors.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, shadow
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> leaves = pack(node, {"a": [jnp.ones((6, 4))], "b": 2 * [jnp.ones((4, 4))]})
        >>> {name: x.shape for name, x in leaves.items()}
        {'krylov_b': (4, 4), 'checksum': (4, 3)}
    """
    first = _first_packed(pair)
    leaves = {}
    if further := products["a"][first:]:
        leaves["krylov_a"] = jnp.concatenate(further, axis=-1)
    if further := products["b"][first:]:
        leaves["krylov_b"] = jnp.concatenate(further, axis=-2)
    if pair.checksum is not None:
        leaves["checksum"] = checksum(products["a"][0], products["b"][0])
    return leaves


def unpack(pair: Any, grads: Any) -> tuple[Basis, MetricValues | None]:
    """Reads the bases from a node and its gradient.

    Args:
        pair: the parameters.
        grads: what the backward pass returned for them.

    Returns:
        `{"a": [A₀, A₁, ...], "b": [B₀, B₁, ...]}`, and the metric they are divided by, or None.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lowrank_optax import LoRAPair, shadow
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> {side: len(elements) for side, elements in unpack(node, node)[0].items()}
        {'a': 2, 'b': 3}
    """
    metric = metric_of(pair, grads)
    products: Basis = {
        "a": [concat_rank("a", grads.a, grads.m_a)],
        "b": [concat_rank("b", grads.b, grads.m_b)],
    }
    first = _first_packed(pair)
    if pair.krylov_a is not None:
        number = pair.krylov_a.shape[-1] // width(pair)
        products["a"][first:] = jnp.split(grads.krylov_a, number, axis=-1)
    if pair.krylov_b is not None:
        number = pair.krylov_b.shape[-2] // width(pair)
        products["b"][first:] = jnp.split(grads.krylov_b, number, axis=-2)
    divide = (lambda side, x: x) if metric is None else metric.divide
    begin = first_elements(pair, metric)
    elements: Basis = {
        side: [begin[side], *(divide(side, x) for x in products[side])] for side in SIDES
    }
    return elements, metric


def _first_products(pair: Any, grads: Any) -> Basis:
    """Reads A₁ and B₁ before any division, each as parts beside each other on the rank axis."""
    if not has_metric(pair):
        parts = {"a": [grads.a, grads.m_a], "b": [grads.b, grads.m_b]}
        return {side: [x for x in parts[side] if x is not None] for side in SIDES}
    first = width(pair)
    return {"a": [grads.krylov_a[..., :first]], "b": [grads.krylov_b[..., :first, :]]}


def checksum(a: jax.Array, b: jax.Array) -> jax.Array:
    """Makes the columns by which `is_untouched` knows the products of one backward pass.

    Args:
        a: A₁, (..., in, R).
        b: B₁, (..., R, out).

    Returns:
        (..., R, 3): the sums over b's long axis, their squares, the sums over a's.

    Example:
        >>> import jax.numpy as jnp
        >>> checksum(jnp.ones((5, 1)), jnp.ones((1, 3))).tolist()
        [[3.0, 9.0, 5.0]]
    """
    sums = jnp.sum(b, axis=-1)
    return jnp.stack([sums, sums**2, jnp.sum(a, axis=-2)], axis=-1)


def deviations(pair: Any, grads: Any, single_pass: bool) -> jax.Array:
    """Compares what arrived with its checksum.

    Args:
        pair: the parameters.
        grads: what the backward pass returned for them, or what others made of it.
        single_pass: whether sums over micro-batches will not do, so that the squares count too.

    Returns:
        (..., 2, 2) or (..., 3, 2), a row for each comparison: how far it is off, and how far
        rounding may be. Micro-batches are told apart if their sums differ by more than 0.6 %;
        below that their mean products are nearly right. (..., 1, 2) of zeros where the pair has no
        checksum, for then there is nothing that may be off.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_optax import ShadowedPair
        >>> pair = ShadowedPair(jnp.ones((5, 1)), jnp.ones((1, 3)), checksum=jnp.zeros((1, 3)))
        >>> deviations(pair, pair._replace(checksum=checksum(pair.a, pair.b)), True)[:, 0].tolist()
        [0.0, 0.0, 0.0]
    """
    if pair.checksum is None:
        return jnp.zeros([*pair.a.shape[:-2], 1, 2])
    sums, squares, sums_a = jnp.moveaxis(grads.checksum, -1, 0)
    noise = max(1e-5, float(jnp.finfo(grads.a.dtype).eps))

    def over(side: Side, of: Callable[[jax.Array], jax.Array]) -> jax.Array:
        # Summed apart: concatenated first, factors would be sent between devices.
        parts = (of(x.astype(sums.dtype)) for x in _first_products(pair, grads)[side])
        own = [jnp.sum(x, axis=LONG_AXIS[side]) for x in parts]
        return meshes.sum_over_shards(side, jnp.concatenate(own, axis=-1))

    expected: dict[Side, jax.Array] = {"b": sums, "a": sums_a}
    rows = [
        (over(side, lambda x: x) - column, noise * over(side, jnp.abs))
        for side, column in expected.items()
    ]
    rows += [(squares - sums**2, 1e-5 * sums**2)] if single_pass else []
    size = lambda x: jnp.sum(jnp.abs(x), axis=-1)
    return jnp.stack([jnp.stack([size(off), size(may)], axis=-1) for off, may in rows], axis=-2)


def marked(deviations: jax.Array, broken: jax.Array) -> jax.Array:
    """Makes deviations too large where something else is found to be wrong with a pair.

    Args:
        deviations: (..., c, 2).
        broken: booleans, (...) or a scalar.

    Returns:
        (..., c, 2).

    Example:
        >>> is_untouched(marked(jnp.zeros((2, 1, 2)), jnp.array([False, True]))).ravel().tolist()
        [1.0, nan]
    """
    too_large = jnp.array([1, 0], deviations.dtype)
    return jnp.where(broken[..., None, None], too_large, deviations)


def is_untouched(deviations: jax.Array) -> jax.Array:
    """Says which pairs have the products of a backward pass as it made them, for `Pairs.together`.

    Args:
        deviations: (n, c, 2).

    Returns:
        (n, 1, 1), 1 where all are small enough, else NaN.

    Example:
        >>> is_untouched(jnp.array([[[0.0, 1.0]], [[2.0, 1.0]]])).ravel().tolist()
        [1.0, nan]
    """
    off, may = deviations[..., 0], deviations[..., 1] + jnp.finfo(deviations.dtype).tiny
    return jnp.where(jnp.all(off <= may, axis=-1), 1, jnp.nan)[:, None, None]


def concat_rank(side: Side, x: Any, m: Any) -> jax.Array:
    """Concatenates two factors of one side along the rank axis; the second may be None.

    On an Explicit mesh the result is sharded like the first.

    Example:
        >>> import jax.numpy as jnp
        >>> concat_rank("b", jnp.ones((2, 5)), jnp.ones((1, 5))).shape
        (3, 5)
    """
    if m is None:
        return x
    return jnp.concatenate([x, meshes.reshard_like(m, x)], axis=RANK_AXIS[side])


def split_rank(side: Side, x: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Splits a factor along the rank axis after so many components.

    Example:
        >>> import jax.numpy as jnp
        >>> [part.shape for part in split_rank("b", jnp.ones((3, 5)), 2)]
        [(2, 5), (1, 5)]
    """
    return (x[..., :rank], x[..., rank:]) if side == "a" else (x[..., :rank, :], x[..., rank:, :])


def _first_packed(pair: Any) -> int:
    """How many products of each side are left out: A₁ and B₁ where they are the gradients."""
    return 0 if has_metric(pair) else 1
