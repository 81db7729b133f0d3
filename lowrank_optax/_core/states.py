"""The state of a lifted method: trees shaped like the parameters outside, lists inside."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core.linalg import compute_dtype, gram
from lowrank_optax._core.names import in_words
from lowrank_optax._core.nodes import LoRAPair, both
from lowrank_optax._core.pairing import Pairing

_SMALL = "not shaped like the factors"

Small = Annotated[Any, _SMALL]
"""Annotates a field of a state that is not shaped like the factors, such as r×r matrices."""


class PairwiseState(NamedTuple):
    """State of a lifted method.

    Args:
        count: updates done, int32 scalar.
        skipped: how often small algebra failed and its result was taken as zero; int32 scalar,
            summed over pairs.
        pairs: the method's own state, a NamedTuple. Each field is a tree shaped like the parameters
            with `MaskedNode` in place of unpaired leaves and of factors of which the method holds
            nothing, or, if declared `Small`, a list with one entry a pair (without pairs, a zero).
        fallback: state of the transformation of the unpaired leaves.
    """

    count: jax.Array  # type: ignore[assignment]
    skipped: jax.Array
    pairs: Any
    fallback: optax.OptState


def not_own(state: Any, name: str) -> TypeError:
    """Makes the error of a state that is not a method's own.

    Args:
        state: what the method was given.
        name: the method's name.

    Example:
        >>> not_own({}, "altlora").args[0][:50]
        'altlora needs the state of its own `init`, got a d'
    """
    return TypeError(
        f"{name} needs the state of its own `init`, got a {type(state).__name__}. A checkpoint"
        " restored without a target holds plain dicts and lists: give `tx.init(params)` as the"
        " target."
    )


def skipped(state: Any) -> jax.Array:
    """Counts what was skipped, in every state of this library inside an optimizer state.

    Args:
        state: any nesting of optax states, or an `nnx.Optimizer`'s `opt_state`.

    Returns:
        The sum of `PairwiseState.skipped`, int32 scalar: results of small algebra that were not
        finite, pairs that OPLoRA did not move, frames that SDS-LoRA made anew. Zero is a run that
        goes well.

    Raises:
        ValueError: the state holds none of this library.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from lowrank_optax import LoRAPair, altlora, skipped
        >>> tx = optax.chain(optax.clip(1.0), altlora(0.1))
        >>> skipped(tx.init(LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4))))).item()
        0
    """
    counts = list(_counts(state))
    if not counts:
        raise ValueError("the state holds none of this library's: give the optimizer's whole state")
    return jnp.sum(jnp.stack(counts), dtype=jnp.int32)


def _counts(state: Any) -> Iterator[jax.Array]:
    """Yields what each state of this library has skipped, those of fallbacks too."""
    is_ours = lambda x: isinstance(x, PairwiseState)
    for ours in filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours)):
        yield jnp.sum(jnp.stack(jax.tree.leaves(ours.skipped)))
        yield from _counts(ours.fallback)


class StateForm:
    """How the state of one method is kept.

    Args:
        state_type: the method's NamedTuple.
        name: the method's name, for messages.

    Example:
        >>> class State(NamedTuple):
        ...     mu: Any
        >>> pair = LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> StateForm(State, "mine").zero(pair).mu.a.shape
        (6, 2)
    """

    def __init__(self, state_type: Any, name: str) -> None:
        hints = get_type_hints(state_type, include_extras=True)
        self._type = state_type
        self._small = {field for field, hint in hints.items() if hint is Small}
        self._name = name

    def zero(self, pair: Any) -> Any:
        """Makes the state of a pair: zeros, shaped like the factors or, where small, r×r."""
        like_factor = lambda side, x: jnp.zeros_like(x, dtype=compute_dtype(x))
        like_gram = lambda side, x: jnp.zeros_like(gram(side, x))
        kinds = [like_gram if field in self._small else like_factor for field in self._type._fields]
        return self._type(*(both(kind, pair) for kind in kinds))

    def gather(self, states: Sequence[Any]) -> Any:
        """Turns the states of single pairs into one state of lists."""
        return self._type(*([getattr(s, field) for s in states] for field in self._type._fields))

    def to_trees(self, found: Pairing, lists: Any, like: Any) -> Any:
        """Turns a state of lists into one whose fields are trees shaped like the parameters.

        Small fields stay lists, for they must not be taken for parameters. Without pairs such a
        field is a leaf, which stands for the list where `optax.tree.map_params` asks.
        """

        def field(name: str, values: list[Any]) -> Any:
            return (values or jnp.zeros([])) if name in self._small else found.put(values, like)

        return type(lists)(*(field(name, values) for name, values in lists._asdict().items()))

    def to_lists(self, found: Pairing, trees: Any, params: Any) -> Any:
        """Undoes `to_trees`.

        Raises:
            ValueError: the state is that of factors of other shapes.
        """
        try:
            lists = {
                field: tree if field in self._small else found.take(tree, LoRAPair)
                for field, tree in trees._asdict().items()
            }
        except ValueError as error:
            raise self._of_others() from error
        if any(len(lists[field]) != len(found.pairs) for field in self._small):
            raise self._of_others()
        for field in lists.keys() - self._small:
            self._require_shapes(found, lists[field], found.take(params, LoRAPair))
        return type(trees)(**lists)

    def require_own(self, state: Any) -> None:
        """Raises unless a state is that of this method.

        Raises:
            TypeError: it is not.
        """
        if not isinstance(state, PairwiseState):
            raise not_own(state, self._name)
        if not isinstance(state.pairs, self._type):
            raise TypeError(
                f"{self._name} got the state of another method, {type(state.pairs).__name__} in"
                f" place of {self._type.__name__}; begin with `tx.init(params)`."
            )

    def _of_others(self) -> ValueError:
        return ValueError(
            f"the state of {self._name} is for other parameters than these: other layers have"
            " adapters, or they have other names. Begin with `tx.init(params)`."
        )

    def _require_shapes(self, found: Pairing, values: Sequence[Any], pairs: Sequence[Any]) -> None:
        for at, pair, value in zip(found.pairs, pairs, values, strict=True):
            own = [jnp.shape(x) for x in value if x is not None]
            needed = [jnp.shape(y) for x, y in zip(value, pair, strict=True) if x is not None]
            if own != needed:
                raise ValueError(
                    f"{in_words(at.path)}: the state of {self._name} is for factors of shapes"
                    f" {own}, but the parameters have {needed}: it belongs to adapters of another"
                    " rank or model. Begin with `tx.init(params)`."
                )
