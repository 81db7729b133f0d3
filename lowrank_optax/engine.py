r"""The engine, for authors of methods: lifts a rule for LoRA pairs to an optax transformation.

A method is one function, its *rule*. It sees all pairs of a parameter tree as lists, one entry a
pair, and decides what is computed per pair and what is computed once for all pairs:

- `pairs.each(f, ...)` maps over lists, pair by pair. Products with the large factors go here.
- `pairs.together(f, ...)` maps a function of r×r matrices. Matrices of one shape are stacked, so
  one factorization serves all layers.
- `pairs.switch(index, branches)` is the one conditional.
- `pairs.descend(directions, params)` makes the updates: learning rate, schedule, weight decay.

What is elementwise needs no verb: `jax.tree.map` and `optax.tree.*` work on the lists. `both(f,
pair)` applies f to each side, and `swap(pair)` gives each factor what belongs to the other one.
`only(sides, pair)`, `join` and `pairs.moved` serve rules that move one factor after the other. A
method whose rule reads `pairs.scales` takes an argument `scale` and passes it to `lift`.

The engine finds the pairs, hands the other leaves to a fallback transformation, and keeps the state
in trees shaped like the parameters. A NaN or infinity in one pair never reaches another pair.

Example:
    A complete method, preconditioned LoRA with momentum:

    >>> import jax, jax.numpy as jnp, optax
    >>> from typing import Any, NamedTuple
    >>> from lowrank_optax import LoRAPair, engine
    >>> from lowrank_optax.engine import both, damped_inverse, gram, mix, swap
    >>> class State(NamedTuple):
    ...     mu: Any  # shaped like the factors, starts at zero
    >>> def preconditioned(learning_rate, b1=0.9, damping=1e-6, scale=1.0, fallback=None):
    ...     invert = lambda matrix: damped_inverse(matrix, damping)
    ...     def rule(pairs, grads, params, state):
    ...         inverses = pairs.together(invert, pairs.each(lambda p: both(gram, p), params))
    ...         steps = pairs.each(lambda g, inv: both(mix, g, swap(inv)), grads, inverses)
    ...         mu = optax.tree.update_moment(steps, state.mu, b1, 1)
    ...         return pairs.descend(mu, params), State(mu)
    ...     return engine.lift(rule, State, learning_rate=learning_rate, scale=scale,
    ...                        fallback=fallback, name="preconditioned")
    >>> params = {"q": LoRAPair(jnp.eye(4, 2), 2.0 * jnp.eye(2, 3)), "bias": jnp.ones(3)}
    >>> tx = preconditioned(0.1)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> f"{updates['q'].b[0, 0]:.3f}", updates["bias"].shape
    ('-0.020', (3,))
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import pairing
from lowrank_optax._core.arguments import (
    check,
    check_choice,
    check_decay,
    check_integer,
    check_positive,
    check_rate,
    check_schedule,
    check_whole,
    is_zero,
)
from lowrank_optax._core.decompositions import eigh
from lowrank_optax._core.layouts import PairMatcher
from lowrank_optax._core.linalg import (
    LONG_AXIS,
    RANK_AXIS,
    SIDES,
    Side,
    apply_rounded,
    compute_dtype,
    cross,
    damped,
    damped_inverse,
    dense,
    dots,
    gram,
    identity,
    largest,
    long_axis_size,
    mix,
    orthonormalizer,
    other,
    product,
    trace,
    transposed,
    weigh,
    widened,
)
from lowrank_optax._core.moments import adam_direction, adam_direction_epsilon_hat
from lowrank_optax._core.nodes import LoRAPair, both, join, only, register_node, swap
from lowrank_optax._core.requirements import (
    find_nodes,
    require_no_leaves,
    require_same_tree,
    warn_of_rest,
)
from lowrank_optax._core.roots import (
    inverse_root,
    of_eigenvalues,
    pseudo_inverse_root,
    spectral_norm,
)
from lowrank_optax._core.scales import scales
from lowrank_optax._core.states import PairwiseState, Small, StateForm
from lowrank_optax._core.verbs import Pairs, checked

__all__ = [
    "LONG_AXIS",
    "RANK_AXIS",
    "SIDES",
    "LoRAPair",
    "NoState",
    "Pairs",
    "PairwiseState",
    "Rule",
    "Side",
    "Small",
    "adam_direction",
    "adam_direction_epsilon_hat",
    "apply_rounded",
    "both",
    "check",
    "check_choice",
    "check_decay",
    "check_integer",
    "check_positive",
    "check_rate",
    "check_schedule",
    "check_whole",
    "compute_dtype",
    "cross",
    "damped",
    "damped_inverse",
    "dense",
    "dots",
    "eigh",
    "find_nodes",
    "gram",
    "identity",
    "inverse_root",
    "is_zero",
    "join",
    "largest",
    "lift",
    "long_axis_size",
    "mix",
    "of_eigenvalues",
    "only",
    "orthonormalizer",
    "other",
    "product",
    "pseudo_inverse_root",
    "register_node",
    "spectral_norm",
    "swap",
    "trace",
    "transposed",
    "weigh",
    "widened",
]

WITHOUT_RATE = object()
"""The learning rate of a method that has none."""

Rule = Callable[[Pairs, list[Any], list[Any], Any], tuple[list[Any], Any]]
"""`(pairs, grads, params, state) → (updates, state)`, lists and a state of lists."""


class NoState(NamedTuple):
    """The state of a method that keeps nothing, or keeps all in auxiliary leaves of pairs."""


def lift(
    rule: Rule,
    state_type: Any,
    *,
    learning_rate: Any = WITHOUT_RATE,
    weight_decay: Any = None,
    mask: Any = None,
    scale: Any = 1.0,
    fallback: optax.GradientTransformation | None = None,
    adamw: Mapping[str, Any] | None = None,
    rate_suits_adamw: bool = True,
    specs: Sequence[PairMatcher] | None = None,
    allow_no_pairs: bool = False,
    init: Callable[[Any], Any] | None = None,
    node: Any = LoRAPair,
    why_unfit: Callable[[Any], str] = lambda pair: "",
    name: str = "this transformation",
) -> optax.GradientTransformationExtraArgs:
    r"""Lifts a rule for pairs to a transformation of a whole parameter tree.

    Args:
        rule: the method. Its state has the fields of `state_type`, each a list with one entry a
            pair. It returns updates as nodes of the parameters' kind; None is no update.
        state_type: the method's NamedTuple, defined at module level. A field is shaped like the
            factors, or declared `Small`.
        learning_rate: $\eta$, positive, or a schedule of the update count. Left out by a method
            without one, as a chainable `scale_by_...`.
        weight_decay: $\lambda$ of `Pairs.descend`, decoupled, not negative, or a schedule of the
            update count; None for a method without one.
        mask: what is decayed: a tree of booleans, or a callable from the parameters to one; None
            for everything.
        scale: the forward scale s, as alpha / r: a number, a callable from a pair's path, or a tree
            of numbers.
        fallback: transformation of every leaf that belongs to no pair. By default AdamW with the
            same learning rate, decay and mask (for a method without weight decay, optax's default
            decay); nothing is done to them without a learning rate.
        adamw: further arguments of that AdamW, such as `b1`.
        rate_suits_adamw: whether the method's learning rates are of the size of AdamW's. If not,
            `init` warns where leaves beside the pairs get that AdamW.
        specs: layouts of the pairs, see `find_pairs`.
        allow_no_pairs: whether parameters without any pair are taken, and left to the fallback.
        init: the `state_type` of one pair at the start, from the pair. By default zeros, shaped
            like the factors or, where `Small`, r×r for each side; in float32 or better. A side
            that is None, as `only` leaves it, is one of which the state holds nothing.
        node: the kind of pair that the rule understands. Fields with a default may be absent.
        why_unfit: says why a pair does not fit this method, and the remedy; empty if it fits.
        name: the method's name, for messages.

    Returns:
        A transformation that needs `params` in `update`. An update has the wider dtype of its
        gradient and its parameter. Inside `shard_map`, `update` takes `param_specs`, a
        `PartitionSpec` for each parameter.

    Raises:
        ValueError: a learning rate or decay out of range; in `init`, no pairs; in `init` or
            `update`, pairs that do not fit (see `find_pairs`), missing `params`, trees that do not
            match, or a rule that returns another structure.
        TypeError: a rate or decay that is neither a number nor a schedule; a fallback that is no
            optax transformation; a rule that is a generator; the state of another method.

    Example:
        See the module, `lowrank_optax.engine`.
    """
    if learning_rate is not WITHOUT_RATE:
        check_rate("learning_rate", learning_rate)
    if weight_decay is not None:
        check_schedule("weight_decay", weight_decay, lambda v: v >= 0, "must not be negative")
    if fallback is not None and not isinstance(fallback, optax.GradientTransformation):
        raise TypeError(f"`fallback` must be an optax transformation, got {fallback!r}.")
    form = StateForm(state_type, name)
    start = init or form.zero
    find = functools.partial(find_nodes, specs=specs, node=node, why_unfit=why_unfit, name=name)

    def rest_tx(found: pairing.Pairing, decayed: Any) -> optax.GradientTransformationExtraArgs:
        """The transformation of the unpaired leaves, of which those of a mask are decayed."""
        if fallback is not None or learning_rate is WITHOUT_RATE:
            return optax.with_extra_args_support(fallback or optax.identity())
        decay = {"weight_decay": weight_decay, "mask": decayed and found.rest(decayed)}
        decay = {} if weight_decay is None else decay
        return optax.adamw(learning_rate, **decay, **(adamw or {}))

    def init_fn(params: Any) -> PairwiseState:
        found = find(params)
        if not (found.pairs or allow_no_pairs):
            require_no_leaves(params, found, name)
        scales(found, scale)  # a mistake is told before the first update
        if found.pairs and fallback is None and not rate_suits_adamw:
            warn_of_rest(found, name)
        lists = form.gather([start(pair) for pair in found.take(params, node)])
        return PairwiseState(
            count=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            pairs=form.to_trees(found, lists, params),
            fallback=rest_tx(found, found.mask(mask, params)).init(found.rest(params)),
        )

    def update_fn(
        updates: Any,
        state: PairwiseState,
        params: Any = None,
        *,
        param_specs: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, PairwiseState]:
        if params is None:
            raise ValueError(f"{name} needs the parameters: call `update(grads, state, params)`.")
        found = find(params)
        require_same_tree(updates, found, name)
        form.require_own(state)
        old = form.to_lists(found, state.pairs, params) if found.pairs else None
        decayed = found.mask(mask, params)
        if param_specs is not None:
            specs_by_leaf = found.by_leaf(param_specs, "param_specs")
            extra_args["param_specs"] = found.rest(found.treedef.unflatten(specs_by_leaf))
        rest, fallback_state = rest_tx(found, decayed).update(
            found.rest(updates), state.fallback, found.rest(params), **extra_args
        )
        count = optax.safe_increment(state.count)
        if not found.pairs:
            return rest, state._replace(count=count, fallback=fallback_state)

        grads, values = found.take(updates, node), found.take(params, node)
        # Moments in float16 would underflow. Shadows say by their dtype how exact they are.
        seen = jax.tree.map(widened, grads) if node is LoRAPair else grads
        pairs = Pairs(
            count=state.count,
            rate=_rate(learning_rate, state.count),
            scales=scales(found, scale),
            grads=grads,
            decays=_decays(found, weight_decay, decayed, state.count),
            sharded_axes=axes_of(found, params, param_specs),
        )
        moves, new = checked(rule(pairs, seen, values, old), grads, values, old, name)
        new_state = PairwiseState(
            count=count,
            skipped=state.skipped + pairs.failures,
            pairs=form.to_trees(found, new, params),
            fallback=fallback_state,
        )
        return found.merge(found.put(moves, updates), rest), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rate(learning_rate: Any, count: jax.Array) -> Any:
    if learning_rate is WITHOUT_RATE:
        return None
    return learning_rate(count) if callable(learning_rate) else learning_rate


def axes_of(found: pairing.Pairing, params: Any, param_specs: Any) -> list[Any]:
    """Returns the mesh axes that shard each pair inside `shard_map`, none without `param_specs`.

    Example:
        >>> pair = LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> axes_of(pairing.find_pairs(pair), pair, None)
        [{}]
    """
    if param_specs is None:
        return [{} for _ in found.pairs]
    return pairing.sharded_axes(found, params, param_specs)


def _decays(
    found: pairing.Pairing, weight_decay: Any, decayed: Any, count: jax.Array
) -> list[dict[str, Any]]:
    """Reads the weight decay of every pair's leaves, by role."""
    decay = weight_decay(count) if callable(weight_decay) else weight_decay
    wanted = found.by_leaf(True if decayed is None else decayed, "mask")
    return [
        {role: decay if wanted[i] else None for role, i in pair.leaves.items()}
        for pair in found.pairs
    ]
