"""The engine: lifts a rule for one LoRA pair to an optax transformation of any parameter tree.

A method is a *rule*, a generator that sees one pair and reads like the paper. Where it needs
algebra on r×r matrices it yields requests (``batching``) and receives the results::

    def rule(step, grads, state, pair, scale):
        [inverse] = yield [Batched(invert, gram("a", pair.a))]
        ...
        return updates, state

The engine runs the rules of all pairs in lockstep and answers the requests of one round together:
matrices of the same shape are stacked, so few Choleskys serve every layer, while the large factors
stay where they are. It also finds the pairs, hands the other leaves to a fallback transformation,
and keeps the state in trees shaped like the parameters. Pairs never see each other's numbers: what
is not finite in one stays there.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import factors
from lowrank_optax.batching import Request, lockstep


class Step(NamedTuple):
    """What every pair shares in one update.

    Args:
        count: updates done before this one, int32 scalar.
        turn: what the method makes of the count, once for all pairs.
        decay: weight-decay mask of this pair's leaves, by role.
    """

    count: jax.Array  # type: ignore[assignment]
    turn: Any
    decay: Any


RuleRun = Generator[Sequence[Request], list[Any], tuple[Any, Any]]


class Rule(Protocol):
    """A method on one pair: ``(step, grads, state, pair, scale) → (updates, state)``.

    ``grads``, ``pair`` and the returned updates are nodes of the same type with canonical factors;
    ``state`` is a NamedTuple whose fields are such nodes too.
    """

    def __call__(self, step: Step, grads: Any, state: Any, pair: Any, scale: Any) -> RuleRun:
        """Starts the rule on one pair."""
        ...


class PairwiseState(NamedTuple):
    """State of a lifted method.

    Args:
        count: updates done, int32 scalar.
        skipped: how often small algebra failed and its result was taken as zero; int32 scalar,
            summed over pairs.
        pairs: the method's NamedTuple; each field is a tree shaped like the parameters with
            ``MaskedNode`` in place of unpaired leaves, or, if small, a list of nodes.
        fallback: state of the transformation of the unpaired leaves.
    """

    count: jax.Array  # type: ignore[assignment]
    skipped: jax.Array
    pairs: Any
    fallback: optax.OptState


def lift(
    rules: Sequence[Rule],
    state_type: Any,
    init: Callable[[Any], Any],
    *,
    fallback: optax.GradientTransformation,
    small: Sequence[str] = (),
    turn: Callable[[jax.Array], Any] = jnp.zeros_like,
    scale: Any = 1.0,
    decay_mask: Any = None,
    specs: Sequence[factors.PairMatcher] = factors.DEFAULT_SPECS,
    node: Any = factors.LoRAPair,
    lacks: Callable[[Any], str] = lambda pair: "",
    name: str = "this transformation",
) -> optax.GradientTransformationExtraArgs:
    """Lifts rules for one pair to a transformation of a whole parameter tree.

    Args:
        rules: the rules the method takes turns in; most have one. They return the same structures.
        state_type: the method's NamedTuple of nodes.
        init: the ``state_type`` of one pair at the start, from the pair.
        fallback: transformation of every leaf that belongs to no pair.
        small: the fields of ``state_type`` that are not shaped like the factors, as (..., r, r).
        turn: makes of the count what rules find as ``step.turn``; with several rules, the index of
            the one to run.
        scale: forward scale, see :func:`lowrank_optax.factors.scales`.
        decay_mask: what weight decay applies to: a tree of booleans or a callable from the
            parameters to one, None for everything. Rules find it in ``step.decay``.
        specs: layouts of the pairs, see :func:`lowrank_optax.factors.find_pairs`.
        node: the node type the rules understand; what is optional in it may be missing in a pair.
        lacks: says of a pair what it lacks for this method, and the remedy; empty if nothing.
        name: the method's name, for messages.

    Returns:
        A transformation that needs ``params`` in ``update``. Updates have the gradients' dtypes.

    Raises:
        ValueError: in ``init`` or ``update``, for pairs that do not fit (see ``find_pairs``), for
            nodes of another type, for missing ``params``, or trees that do not match.

    Example:
        A rule that moves ``a`` by its preconditioned gradient and leaves ``b``:

        >>> import jax, jax.numpy as jnp, optax
        >>> from typing import NamedTuple
        >>> from lowrank_optax import LoRAPair, linalg
        >>> from lowrank_optax.batching import Batched
        >>> class NoState(NamedTuple):
        ...     pass
        >>> invert = lambda gram: linalg.damped_inverse(gram, 1e-6)
        >>> def rule(step, grads, state, pair, scale):
        ...     [inverse] = yield [Batched(invert, linalg.gram("b", pair.b))]
        ...     return LoRAPair(-linalg.mix("a", grads.a, inverse), 0 * grads.b), state
        >>> tx = lift([rule], NoState, lambda pair: NoState(), fallback=optax.sgd(0.1))
        >>> params = {"q": LoRAPair(jnp.zeros((4, 2)), 2.0 * jnp.eye(2, 3)), "bias": jnp.ones(3)}
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> updates["q"].a[0].round(3).tolist(), updates["bias"].shape
        ([-0.25, -0.25], (3,))
    """
    fallback = optax.with_extra_args_support(fallback)

    find = functools.partial(find_nodes, specs=specs, node=node, lacks=lacks, name=name)

    def init_fn(params: Any) -> PairwiseState:
        pairing = find(params)
        states = [init(pair) for pair in pairing.take(params, node)]
        return PairwiseState(
            count=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            pairs=_to_trees(pairing, state_type, small, states, params),
            fallback=fallback.init(pairing.rest(params)),
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
        pairing = find(params)
        _check_same_tree(updates, pairing, name)
        rest, fallback_state = fallback.update(
            pairing.rest(updates), state.fallback, pairing.rest(params), **extra_args
        )
        if not pairing.pairs:
            count = optax.safe_increment(state.count)
            return rest, state._replace(count=count, fallback=fallback_state)

        grads, pairs = pairing.take(updates, node), pairing.take(params, node)
        pair_states = _to_pairs(pairing, small, node, state.pairs)
        pair_scales = factors.scales(pairing, scale)
        cuts = None if param_specs is None else factors.cuts(pairing, params, param_specs)
        decay = _decay_by_pair(pairing, decay_mask, params)
        this_turn = turn(state.count)

        def run(rule: Rule, grads: Any, pair_states: Any, pairs: Any) -> Any:
            inputs = zip(decay, grads, pair_states, pairs, pair_scales, strict=True)
            runs = [rule(Step(state.count, this_turn, d), *args) for d, *args in inputs]
            results, failures = lockstep(runs, cuts)
            moves = [_cast(move, like) for (move, _), like in zip(results, grads, strict=True)]
            states = [_cast(new, old) for (_, new), old in zip(results, pair_states, strict=True)]
            return moves, states, failures

        if len(rules) == 1:
            moves, new_states, skipped = run(rules[0], grads, pair_states, pairs)
        else:
            moves, new_states, skipped = jax.lax.switch(
                this_turn,
                [functools.partial(run, rule) for rule in rules],
                grads,
                pair_states,
                pairs,
            )
        new_state = PairwiseState(
            count=optax.safe_increment(state.count),
            skipped=state.skipped + skipped,
            pairs=_to_trees(pairing, state_type, small, new_states, params),
            fallback=fallback_state,
        )
        return pairing.merge(pairing.put(moves, updates), rest), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def find_nodes(
    params: Any,
    *,
    specs: Sequence[factors.PairMatcher],
    node: Any,
    lacks: Callable[[Any], str],
    name: str,
) -> factors.Pairing:
    """Finds the pairs of a tree and raises unless a method can work on all of them.

    Args:
        params: the parameters.
        specs: layouts of the pairs.
        node: see :func:`lift`.
        lacks: see :func:`lift`.
        name: the method's name.

    Returns:
        The pairing.

    Raises:
        ValueError: pairs that do not fit (see ``find_pairs``), of another node type, or that lack
            something.

    Example:
        >>> import jax.numpy as jnp
        >>> pair = factors.LoRAPair(jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> keywords = {"specs": (), "node": factors.LoRAPair, "lacks": lambda pair: "", "name": ""}
        >>> len(find_nodes({"q": pair}, **keywords).pairs)
        1
    """
    pairing = factors.find_pairs(params, specs)
    needed = set(node._fields) - set(node._field_defaults)
    for pair in pairing.pairs:
        if not needed <= set(pair.leaves) <= set(node._fields):
            raise ValueError(
                f"{pair.path}: {name} works on {node.__name__}, but this is a"
                f" {pair.node.__name__}. Use the optimizer made for it, or add or remove what the"
                " pair has beside its factors."
            )
    for pair, value in zip(pairing.pairs, pairing.take(params, node), strict=True):
        if complaint := lacks(value):
            raise ValueError(f"{pair.path}: {name} {complaint}")
    return pairing


def _cast(new: Any, like: Any) -> Any:
    return jax.tree.map(lambda n, o: n.astype(o.dtype), new, like)


def _to_trees(
    pairing: factors.Pairing,
    state_type: Any,
    small: Sequence[str],
    states: Sequence[Any],
    like: Any,
) -> Any:
    """Turns one state per pair into one state whose fields are trees shaped like the parameters.

    Small fields stay lists in the order of the pairs, for they must not be taken for parameters;
    without pairs, a leaf, which stands for the list where ``optax.tree.map_params`` asks.
    """

    def field(name: str) -> Any:
        values = [getattr(state, name) for state in states]
        return (values or jnp.zeros([0])) if name in small else pairing.put(values, like)

    return state_type(*(field(name) for name in state_type._fields))


def _to_pairs(pairing: factors.Pairing, small: Sequence[str], node: type, state: Any) -> list[Any]:
    """Undoes :func:`_to_trees`."""
    fields = [
        field if name in small else pairing.take(field, node)
        for name, field in state._asdict().items()
    ]
    return [type(state)(*(field[i] for field in fields)) for i in range(len(pairing.pairs))]


def _decay_by_pair(pairing: factors.Pairing, mask: Any, params: Any) -> list[dict[str, bool]]:
    if callable(mask):
        mask = mask(params)
    by_leaf = pairing.by_leaf(True if mask is None else mask, "mask")
    return [{role: by_leaf[index] for role, index in pair.leaves.items()} for pair in pairing.pairs]


def _check_same_tree(updates: Any, pairing: factors.Pairing, name: str) -> None:
    try:
        leaves = pairing.treedef.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(
            f"{name}: gradients and parameters differ in structure. {error}"
        ) from error
    for pair in pairing.pairs:
        for role, index in pair.leaves.items():
            if not hasattr(leaves[index], "shape"):
                raise ValueError(
                    f"{name}: {pairing.paths[index]} has no gradient ({leaves[index]!r}), so"
                    f" {pair.path!r} is half a pair ({role!r} is missing). Take gradients of both"
                    " factors, or mask both in the parameters too."
                )
