r"""Shadow adapters: how an optimizer gets products of the full gradient that it never sees.

With G the gradient of the loss in the product a b (s times the gradient in the kernel), the
backward pass of a layer can form ``G Lᵀ`` and ``Rᵀ G`` for any narrow L and R from what it has at
hand, its input x and the gradient of its output. Starting from the factors of the adapter and of
the optimizer's momentum, it builds the two block-Krylov bases::

    A₀ = [a, m_a]    Aᵢ₊₁ = G Bᵢᵀ          B₀ = [b; m_b]    Bᵢ₊₁ = Aᵢᵀ G

A₁ and B₁ are the gradients of the four factors. The further elements that ``iterations`` k of
LoRSum need, B₂ … B₂ₖ and A₂ … A₂ₖ₋₁, arrive as the gradients of two leaves of zeros, ``krylov_b``
and ``krylov_a``, beside each other along the rank axis, so that they are sharded as the factors.

A step in a metric, diagonals D_in and D_out, divides by the metric what is multiplied by G. The
momentum is kept without metric, so there is one block more, which is not divided::

    A₀ = [a, D_in⁻¹ m_a, m_a]    Aᵢ₊₁ = G Bᵢᵀ, its columns but for the last block over D_in

The metric is of the same backward pass: statistics of x and of the output's gradient arrive as the
gradients of ``d_in`` and ``d_out``, and ``D = (β₂ d + (1 - β₂) statistic + damping)^power``.

The elements with index i have degree i in the gradient. So a gradient that was scaled or clipped
must be scaled by :func:`scale_gradients`, and sums over micro-batches, or over several uses of one
adapter in a forward pass, are right for degree 1 only. The gradient of ``seal`` are numbers of
degree 1 and their squares. Sums and scalings break it, by which :func:`whole` finds them.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.arguments import (
    check,
    check_choice,
    check_decay,
    check_integer,
    check_positive,
)
from lowrank_optax.factors import (
    DEFAULT_SPECS,
    LoRAPair,
    PairMatcher,
    ShadowedPair,
    find_pairs,
)
from lowrank_optax.linalg import SIDES, Side, compute_dtype, weigh

Basis = dict[Side, list[jax.Array]]


class Metric(NamedTuple):
    """A diagonal metric for :func:`shadow`, with the numbers that are given to ``scaled_oplora``.

    Args:
        kind: ``"kfac"`` for the statistics mean x² and N Σ dy² over N tokens, dy the gradient of
            a mean loss in the layer's output; ``"shampoo"`` for N times the squared row and column
            norms of the kernel's gradient, which cost as much as forming that gradient.
        b2: β₂ of the running averages, in [0, 1).
        damping: added to them, positive.
        power: exponent of the sum, positive.

    Example:
        >>> Metric(power=1.0)
        Metric(kind='kfac', b2=0.99, damping=0.001, power=1.0)

    Source: arXiv 2602.16456.
    """

    kind: Literal["kfac", "shampoo"] = "kfac"
    b2: float = 0.99
    damping: float = 1e-3
    power: float = 0.5


def shadow(
    pair: LoRAPair,
    key: jax.Array,
    *,
    iterations: int = 1,
    momentum_rank: int | None = None,
    metric: Metric | None = None,
) -> ShadowedPair:
    """Adds to a pair the leaves that OPLoRA moves and reads.

    Args:
        pair: the factors, (..., in, r) and (..., r, out).
        key: of the input-side momentum factor, which starts standard normal; its partner starts 0.
        iterations: k, how many LoRSum iterations the optimizer will make; 0 for Jacobi steps.
        momentum_rank: q, rank of the momentum, r by default; 0 for none.
        metric: the metric of ``scaled_oplora``; its running averages start at 1.

    Returns:
        The node, to stand in the parameter tree where the pair stood; momentum and metric in
        float32 or better.

    Raises:
        ValueError: a number out of range.
        TypeError: iterations or a rank that is not an integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4)))
        >>> node = shadow(pair, jax.random.key(0), iterations=2, momentum_rank=1)
        >>> node.krylov_a.shape, node.krylov_b.shape  # A₂, A₃ and B₂, B₃, B₄ of r + q = 3
        ((6, 6), (9, 4))

    Source: OPLoRA, arXiv 2509.19977, for the start of the momentum.
    """
    *batch, n_in, rank = pair.a.shape
    n_out = pair.b.shape[-1]
    q = rank if momentum_rank is None else momentum_rank
    check_integer("iterations", iterations, least=0)
    check_integer("momentum_rank", q, least=0)
    fits = f"must lie between 0 and min(in, out) = {min(n_in, n_out)}"
    check("momentum_rank", q, lambda q: q <= min(n_in, n_out), fits)
    dtype = compute_dtype(pair.a, pair.b)
    node = ShadowedPair(pair.a, pair.b)
    if q:
        m_a = jax.random.normal(key, (*batch, n_in, q), dtype)
        node = node._replace(m_a=m_a, m_b=jnp.zeros((*batch, q, n_out), dtype))
    if metric is not None:
        check_choice("metric.kind", metric.kind, ("kfac", "shampoo"))
        check_decay("metric.b2", metric.b2)
        check_positive("metric.damping", metric.damping)
        check_positive("metric.power", metric.power)
        settings = jnp.broadcast_to(jnp.array(metric[1:], dtype), (*batch, 3))
        d_in, d_out = jnp.ones((*batch, n_in), dtype), jnp.ones((*batch, n_out), dtype)
        node = node._replace(d_in=d_in, d_out=d_out, **{metric.kind: settings})
    width, degrees = _width(node), _degrees(node, iterations)
    if degrees["a"]:
        krylov_a = jnp.zeros((*batch, n_in, width * len(degrees["a"])), dtype)
        node = node._replace(krylov_a=krylov_a)
    if degrees["b"]:
        krylov_b = jnp.zeros((*batch, width * len(degrees["b"]), n_out), dtype)
        node = node._replace(krylov_b=krylov_b, seal=jnp.zeros((*batch, width, 2), dtype))
    return node


def iterations_of(pair: ShadowedPair) -> int:
    """Reads from the shapes for how many iterations a node is made.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4)))
        >>> iterations_of(shadow(pair, jax.random.key(0), iterations=3))
        3
    """
    products = 0 if pair.krylov_b is None else pair.krylov_b.shape[-2] // _width(pair)
    return (_first_packed(pair) + products) // 2


def has_metric(pair: ShadowedPair) -> bool:
    """Says whether a node has a metric.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4)))
        >>> has_metric(shadow(pair, jax.random.key(0), metric=Metric("shampoo")))
        True
    """
    return pair.kfac is not None or pair.shampoo is not None


class Scaling(NamedTuple):
    """The metric of one backward pass, which layer and optimizer compute alike.

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
        step, momentum = split(side, x, self.columns)
        return beside(side, weigh(side, step, 1 / self.weights[side]), momentum)


def scaling(pair: ShadowedPair, statistics: ShadowedPair) -> Scaling | None:
    """Computes the metric of one backward pass.

    Args:
        pair: the parameters.
        statistics: a node with the statistics in ``d_in`` and ``d_out``, as the gradient has them.

    Returns:
        The metric, or None where the node has none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pair = LoRAPair(jnp.ones((2, 1)), jnp.zeros((1, 2)))
        >>> node = shadow(pair, jax.random.key(0), metric=Metric(b2=0.5, damping=2.0))
        >>> scaling(node, node._replace(d_in=jnp.array([3.0, 27.0]))).weights["a"].tolist()
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
    q = 0 if pair.m_a is None else pair.m_a.shape[-1]
    return Scaling(averages, weights, pair.a.shape[-1] + q)


def start(pair: ShadowedPair, metric: Scaling | None) -> dict[Side, jax.Array]:
    """Puts A₀ and B₀ together.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> start(node, None)["a"].shape
        (6, 4)
    """
    sides: dict[Side, Any] = {"a": (pair.a, pair.m_a), "b": (pair.b, pair.m_b)}
    elements: dict[Side, jax.Array] = {}
    for side, (x, m) in sides.items():
        step = x
        if metric is not None and m is not None:
            step = beside(side, x, weigh(side, m, 1 / metric.weights[side]))
        elements[side] = beside(side, step, m)
    return elements


def beside(side: Side, x: Any, m: Any) -> jax.Array:
    """Puts two factors of one side beside each other along the rank axis; the second may be None.

    Example:
        >>> import jax.numpy as jnp
        >>> beside("b", jnp.ones((2, 5)), jnp.ones((1, 5))).shape
        (3, 5)
    """
    return x if m is None else jnp.concatenate([x, m], axis=-1 if side == "a" else -2)


def split(side: Side, x: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Takes what :func:`beside` joined apart after so many rank components.

    Example:
        >>> import jax.numpy as jnp
        >>> [part.shape for part in split("b", jnp.ones((3, 5)), 2)]
        [(2, 5), (1, 5)]
    """
    return (x[..., :rank], x[..., rank:]) if side == "a" else (x[..., :rank, :], x[..., rank:, :])


def lengths(iterations: int) -> dict[Side, int]:
    """Counts the products with the gradient: A₁, A₂, … and B₁, B₂, ….

    Example:
        >>> lengths(2)
        {'a': 3, 'b': 4}
    """
    return {"a": max(2 * iterations - 1, 1), "b": max(2 * iterations, 1)}


def pack(pair: ShadowedPair, products: Basis) -> dict[str, jax.Array]:
    """Lays products with the gradient out in the auxiliary leaves.

    Args:
        pair: the node.
        products: A₁, A₂, … and B₁, B₂, … before any division, as many as :func:`lengths` says.

    Returns:
        The gradients of ``krylov_a``, ``krylov_b`` and ``seal``, as far as the node has them.
        Without a metric A₁ and B₁ are left out, for they are the gradients of the factors.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> leaves = pack(node, {"a": [jnp.ones((6, 4))], "b": 2 * [jnp.ones((4, 4))]})
        >>> {name: x.shape for name, x in leaves.items()}
        {'krylov_b': (4, 4), 'seal': (4, 2)}
    """
    first = _first_packed(pair)
    leaves = {}
    if further := products["a"][first:]:
        leaves["krylov_a"] = jnp.concatenate(further, axis=-1)
    if further := products["b"][first:]:
        leaves["krylov_b"] = jnp.concatenate(further, axis=-2)
        leaves["seal"] = seal(products["b"][0])
    return leaves


def bases(pair: ShadowedPair, grads: ShadowedPair) -> tuple[Basis, Scaling | None]:
    """Reads the block-Krylov bases from a node and its gradient.

    Args:
        pair: the parameters.
        grads: what the backward pass returned for them.

    Returns:
        ``{"a": [A₀, A₁, ...], "b": [B₀, B₁, ...]}``, and the metric they are divided by, or None.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> node = shadow(LoRAPair(jnp.ones((6, 2)), jnp.zeros((2, 4))), jax.random.key(0))
        >>> {side: len(elements) for side, elements in bases(node, node)[0].items()}
        {'a': 2, 'b': 3}
    """
    metric = scaling(pair, grads)
    products: Basis = {
        "a": [beside("a", grads.a, grads.m_a)],
        "b": [beside("b", grads.b, grads.m_b)],
    }
    first, width = _first_packed(pair), _width(pair)
    if pair.krylov_a is not None:
        number = pair.krylov_a.shape[-1] // width
        products["a"][first:] = jnp.split(grads.krylov_a, number, axis=-1)
    if pair.krylov_b is not None:
        number = pair.krylov_b.shape[-2] // width
        products["b"][first:] = jnp.split(grads.krylov_b, number, axis=-2)
    divide = (lambda side, x: x) if metric is None else metric.divide
    begin = start(pair, metric)
    elements: Basis = {
        side: [begin[side], *(divide(side, x) for x in products[side])] for side in SIDES
    }
    return elements, metric


def seal(b: jax.Array) -> jax.Array:
    """Makes the columns by which :func:`whole` knows the products of one backward pass.

    Args:
        b: B₁, (..., R, out).

    Returns:
        (..., R, 2): the sums over the rows, and their squares.

    Example:
        >>> import jax.numpy as jnp
        >>> seal(jnp.ones((1, 3))).tolist()
        [[3.0, 9.0]]
    """
    sums = jnp.sum(b, axis=-1, keepdims=True)
    return jnp.concatenate([sums, sums**2], axis=-1)


def whole(columns: jax.Array) -> jax.Array:
    """Says which pairs have the products of one backward pass, for a ``Batched`` request.

    Args:
        columns: the seal as it arrived, (n, R, 2).

    Returns:
        (n, 1, 1), 1 where the squares are right to 1e-5, else NaN. Micro-batches are told apart if
        their sums differ by more than 0.6 %; below that their mean products are nearly right.

    Example:
        >>> import jax.numpy as jnp
        >>> one, other = seal(jnp.ones((1, 1, 3))), seal(jnp.full((1, 1, 3), 1.05))
        >>> whole(one).item(), whole((one + other) / 2).item()
        (1.0, nan)
    """
    first, second = columns[..., :1], columns[..., 1:]
    size = lambda x: jnp.sum(jnp.abs(x), axis=-2, keepdims=True)
    tolerance = 1e-5 * size(first**2) + jnp.finfo(first.dtype).tiny
    return jnp.where(size(second - first**2) <= tolerance, 1, jnp.nan)


def scale_gradients(grads: Any, factor: Any, specs: Sequence[PairMatcher] = DEFAULT_SPECS) -> Any:
    """Scales gradients as if the loss had been scaled: each product by the factor's power.

    For loss scaling: multiply the loss, then scale the gradients by the reciprocal.

    Args:
        grads: gradients of a parameter tree.
        factor: a scalar.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The scaled tree.

    Raises:
        ValueError: pairs that do not fit; pairs with a metric for iterations from 1, whose products
            hold the metric of the unscaled gradient.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> grads = shadow(LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4))), jax.random.key(0))
        >>> grads = grads._replace(krylov_b=jnp.ones((4, 4)))
        >>> half = scale_gradients(grads, 0.5)
        >>> half.a[0, 0].item(), half.krylov_b[0, 0].item()
        (0.5, 0.25)
    """
    pairing = find_pairs(grads, specs)
    times = lambda tree: jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)

    def scale(pair: Any) -> Any:
        scaled = times(pair)
        if not isinstance(pair, ShadowedPair):
            return scaled
        powers = {
            side: factor ** jnp.repeat(jnp.array(degrees), _width(pair))
            for side, degrees in _degrees(pair, iterations_of(pair)).items()
        }
        by_powers = lambda x, p: (p * x).astype(x.dtype)
        if pair.krylov_a is not None:
            scaled = scaled._replace(krylov_a=by_powers(pair.krylov_a, powers["a"]))
        if pair.krylov_b is not None:
            krylov_b = by_powers(pair.krylov_b, powers["b"][:, None])
            both = by_powers(pair.seal, factor ** jnp.array([1, 2]))
            scaled = scaled._replace(krylov_b=krylov_b, seal=both)
        if has_metric(pair):
            of_inputs = pair.d_in if pair.shampoo is None else factor**2 * pair.d_in
            scaled = scaled._replace(d_in=of_inputs, d_out=factor**2 * pair.d_out)
        return scaled

    pairs = pairing.take(grads)
    for leaves, pair in zip(pairing.pairs, pairs, strict=True):
        if isinstance(pair, ShadowedPair) and has_metric(pair) and iterations_of(pair):
            raise ValueError(
                f"{leaves.path}: the products of a pair with a metric cannot be scaled afterwards,"
                " for they hold the metric of the unscaled gradient. Scale the loss instead, or use"
                " `iterations=0`."
            )
    scaled = pairing.put([scale(pair) for pair in pairs], grads)
    return pairing.merge(scaled, times(pairing.rest(grads)))


def clip_by_global_norm(
    max_norm: Any, specs: Sequence[PairMatcher] = DEFAULT_SPECS
) -> optax.GradientTransformation:
    """Clips the global norm of the gradients of trained leaves, Krylov products consistently.

    ``optax.clip_by_global_norm`` counts the shadows into the norm and scales all products alike,
    which OPLoRA finds inconsistent; put this before it instead.

    Args:
        max_norm: the largest norm, positive.
        specs: layouts of the pairs (``factors.PairSpec``).

    Returns:
        The transformation, stateless. Its ``update`` raises as :func:`scale_gradients` does.

    Raises:
        ValueError: a norm that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx = clip_by_global_norm(1.0)
        >>> grads = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 2)))}
        >>> tx.update(grads, tx.init(grads))[0]["q"].a[0, 0].item()
        0.25
    """
    check_positive("max_norm", max_norm)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> Any:
        del params
        pairing = find_pairs(updates, specs)
        trained = [(pair.a, pair.b) for pair in pairing.take(updates)]
        norm = optax.tree.norm((trained, pairing.rest(updates)))
        factor = max_norm / jnp.maximum(norm, max_norm)
        return scale_gradients(updates, factor, specs), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _width(pair: ShadowedPair) -> int:
    """R, how many rank components an element of the bases has."""
    q = 0 if pair.m_a is None else pair.m_a.shape[-1]
    return pair.a.shape[-1] + (2 * q if has_metric(pair) else q)


def _first_packed(pair: ShadowedPair) -> int:
    """How many products of each side are left out: A₁ and B₁ where they are the gradients."""
    return 0 if has_metric(pair) else 1


def _degrees(pair: ShadowedPair, iterations: int) -> dict[Side, range]:
    """The degrees in the gradient of the further products, for so many iterations."""
    number, first = lengths(iterations), _first_packed(pair)
    return {side: range(1 + first, number[side] + 1) for side in SIDES}
