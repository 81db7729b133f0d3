"""The settings of a LoRA adapter: validated, scaled and initialized in one place."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lowrank_optax._core.arguments import check, check_integer, check_positive
from lowrank_optax._core.frames import frame
from lowrank_optax._core.nodes import AxisName, LoRAPair
from lowrank_optax._core.shadows import Metric, shadow

Initializer = Callable[..., Any]


def _he_uniform(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """`jax.nn.initializers.he_uniform()`, as a function that can be pickled."""
    return jax.nn.initializers.he_uniform()(key, shape, dtype)


# Module-level objects: equal configurations then compare equal, and jit caches stay warm.
DEFAULT_A_INIT: Initializer = _he_uniform
DEFAULT_B_INIT: Initializer = jax.nn.initializers.zeros


class Extra(abc.ABC):
    """What an adapter carries beside its factors; subclass it for a kind of pair of your own.

    A frozen dataclass is best, for equal settings must compare equal.

    Attributes:
        root_scale: whether the forward scale is alpha / sqrt(r), as for rank-stabilized LoRA.
        axis_name: see `lora_apply`.

    Example:
        >>> import dataclasses, jax
        >>> from lowrank_optax import frame
        >>> @dataclasses.dataclass(frozen=True)
        ... class OwnFrames(Extra):
        ...     def add_to(self, pair, key):
        ...         return frame(pair)
        >>> config = LoRAConfig(rank=2, extra=OwnFrames())
        >>> config.init_pair(jax.random.key(0), (), 8, 6).f_in.shape
        (8, 2)
    """

    root_scale: bool = False
    axis_name: AxisName = None

    @property
    def keeps_product(self) -> bool:
        """Whether `add_to` keeps the product a b; where not, nothing is loaded into the adapter."""
        return True

    @abc.abstractmethod
    def add_to(self, pair: LoRAPair, key: jax.Array) -> Any:
        """Makes a node of a registered kind (`register_node`) from the factors.

        Args:
            pair: the factors, (..., in, r) and (..., r, out).
            key: a random key.

        Returns:
            The node. No two of its leaves may be one array, which could not be donated to a step.
        """

    def ranks(self) -> dict[str, int]:
        """Returns the ranks that must not exceed min(in, out), by the name of the setting."""
        return {}


@dataclasses.dataclass(frozen=True)
class Shadows(Extra):
    """Which shadows an adapter carries, the leaves that OPLoRA moves and reads.

    `Shadows()` is what `oplora(lr)` needs, and `Shadows(iterations=2, momentum_rank=0)` what
    `oplora_proj(lr)` needs. Shadows change neither the output nor the gradients of the factors.
    With `iterations` from 1 an adapter may be used once in a forward pass, on a whole batch (not
    under a `vmap` over examples).

    Attributes:
        iterations: k, how many LoRSum iterations the optimizer will make, at least 0.
        momentum_rank: rank of the momentum, at most min(in, out) of every adapted kernel; 0 for
            none, None for the rank of the adapter.
        metric: `Metric()` for `scaled_oplora`, with the numbers that it is given.
        axis_name: see `lora_apply`; for `pmap` and `shard_map` only.

    Raises:
        ValueError: a number is negative.

    Example:
        >>> import jax
        >>> config = LoRAConfig(rank=2, extra=Shadows(momentum_rank=1))
        >>> pair = config.init_pair(jax.random.key(0), (), 8, 6)
        >>> pair.m_a.shape, pair.m_b.shape
        ((8, 1), (1, 6))

    Source: OPLoRA, arXiv 2509.19977.
    """

    iterations: int = 1
    momentum_rank: int | None = None
    metric: Metric | None = None
    axis_name: AxisName = None

    def __post_init__(self) -> None:
        check_integer("iterations", self.iterations, least=0)
        if self.momentum_rank is not None:
            check_integer("momentum_rank", self.momentum_rank, least=0)
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise TypeError(f"metric must be a Metric, got {self.metric!r}; write Metric()")

    def add_to(self, pair: LoRAPair, key: jax.Array) -> Any:
        """Adds shadows; see `shadow`."""
        return shadow(
            pair,
            key,
            iterations=self.iterations,
            momentum_rank=self.momentum_rank,
            metric=self.metric,
        )

    def ranks(self) -> dict[str, int]:
        """Returns the momentum's rank."""
        return {"momentum_rank": self.momentum_rank or 0}


@dataclasses.dataclass(frozen=True)
class Frames(Extra):
    """Gives an adapter frames, through which its gradients flow and which `sds_lora` moves.

    Attributes:
        warmup: True for `sds_lora`'s warm-up, an adapter that starts as ordinary LoRA; False for a
            start from random frames and factors of zero, for `warmup_steps=0`.

    Example:
        >>> import jax
        >>> config = LoRAConfig(rank=4, alpha=8.0, extra=Frames())
        >>> config.scale, config.init_pair(jax.random.key(0), (), 8, 6).f_out.shape
        (4.0, (4, 6))

    Source: SDS-LoRA, arXiv 2606.16454.
    """

    root_scale = True

    warmup: bool = True

    @property
    def keeps_product(self) -> bool:
        """Not without a warm-up: the factors then start at zero."""
        return self.warmup

    def add_to(self, pair: LoRAPair, key: jax.Array) -> Any:
        """Adds frames; see `frame`."""
        return frame(pair, None if self.warmup else key)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    r"""Settings of a LoRA adapter.

    The forward scale is $s = \alpha / r$, or $s = \alpha / \sqrt r$ for rank-stabilized LoRA and
    with `Frames`, as SDS-LoRA has it.

    Attributes:
        rank: r, at least 1 and at most min(in, out) of every adapted kernel.
        alpha: positive numerator of the scale.
        rslora: divide by the square root of the rank instead of the rank.
        dora: train the norms of the kernel's columns beside the factors (DoRA), of linear maps and
            convolutions. The norms are leaves `lora_magnitude`, no pairs, and so the optimizer's
            `fallback` trains them: where the rate of a method is not AdamW's, as with `polora`,
            give it `optax.adamw(1e-3)`, say.
        dropout: probability in [0, 1) of dropping an entry of the adapter's input.
        a_init: initializer of `a`, called as `a_init(key, (in, r), dtype)` for each batch entry.
        b_init: initializer of `b`, called as `b_init(key, (r, out), dtype)`; zeros by default, so
            that an adapted model starts as the base model.
        param_dtype: dtype of the factors, whatever the dtype of the base kernel.
        dtype: dtype of the adapter's matmul operands; None means the dtype of the base's output, to
            which the adapter's input is rounded in any case.
        extra: what the adapter carries beside its factors: `Shadows()` for `oplora`, `Frames()` for
            `sds_lora`, or an `Extra` of your own; nothing by default.

    Raises:
        ValueError: a setting is outside its range.
        TypeError: a rank that is not an integer, or an extra that is none.

    Example:
        >>> LoRAConfig(rank=4, alpha=16.0).scale
        4.0
        >>> LoRAConfig(rank=4, alpha=16.0, rslora=True).scale
        8.0

    Source: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353.
    """

    rank: int
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    a_init: Initializer = DEFAULT_A_INIT
    b_init: Initializer = DEFAULT_B_INIT
    param_dtype: DTypeLike = jnp.float32
    dtype: DTypeLike | None = None
    extra: Extra | None = None

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, least=1, hint="; write rank=8, say")
        check_positive("alpha", self.alpha)
        check("dropout", self.dropout, lambda v: 0 <= v < 1, "must lie in [0, 1)")
        for name in ("a_init", "b_init"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"{name} must be an initializer such as jax.nn.initializers.zeros, got"
                    f" {getattr(self, name)!r}"
                )
        if self.extra is not None and not isinstance(self.extra, Extra):
            raise TypeError(
                "extra must be an nn.Extra such as nn.Shadows() for oplora or nn.Frames() for"
                f" sds_lora, got {self.extra!r}"
            )

    @property
    def axis_name(self) -> AxisName:
        """The axes over which `lora_apply` sums what is not linear in the gradient."""
        return None if self.extra is None else self.extra.axis_name

    @property
    def scale(self) -> float:
        """The forward scale s."""
        by_root = self.rslora or (self.extra is not None and self.extra.root_scale)
        return self.alpha / (math.sqrt(self.rank) if by_root else self.rank)

    def check_rank(self, n_in: int, n_out: int, path: str) -> None:
        """Refuses a rank, of the factors or of what they carry, that the kernel cannot use.

        Args:
            n_in: flattened input size of the kernel.
            n_out: flattened output size of the kernel.
            path: where the kernel is, for the message.

        Raises:
            ValueError: one exceeds min(in, out).
        """
        ranks = {"rank": self.rank, **(self.extra.ranks() if self.extra else {})}
        for name, rank in ranks.items():
            if rank > min(n_in, n_out):
                raise ValueError(
                    f"{path}: {name} {rank} exceeds min(in, out) = {min(n_in, n_out)} of its "
                    f"({n_in}, {n_out}) kernel; lower it or leave this layer out of the targets"
                )

    def init_pair(self, key: jax.Array, batch: tuple[int, ...], n_in: int, n_out: int) -> Any:
        """Draws new factors, and adds what they are to carry.

        Args:
            key: random key.
            batch: leading axes of the factors; each entry is drawn independently.
            n_in: flattened input size.
            n_out: flattened output size.

        Returns:
            The node, `a` (batch..., in, r) and `b` (batch..., r, out), in `param_dtype`. The
            factors are the same with and without shadows or warm-up frames. Where an initializer
            boxes a factor with sharding names, what is sharded like it is boxed too.

        Example:
            >>> import jax
            >>> pair = LoRAConfig(rank=2).init_pair(jax.random.key(0), (12,), 8, 6)
            >>> pair.a.shape, pair.b.shape
            ((12, 8, 2), (12, 2, 6))
        """
        key_a, key_b = jax.random.split(key)
        pair = LoRAPair(
            a=self._draw(self.a_init, key_a, batch, (n_in, self.rank)),
            b=self._draw(self.b_init, key_b, batch, (self.rank, n_out)),
        )
        if self.extra is None:
            return pair
        _require_arrays(pair, "an extra")
        [a], [b] = jax.tree.leaves(pair.a), jax.tree.leaves(pair.b)
        # A key of its own, so that the factors are those that the same key draws without extra.
        return _boxed(self.extra.add_to(LoRAPair(a, b), jax.random.fold_in(key, 2)), pair)

    def _draw(
        self, init: Initializer, key: jax.Array, batch: tuple[int, ...], shape: tuple[int, int]
    ) -> Any:
        if not batch:
            return init(key, shape, self.param_dtype)  # may be boxed with sharding names
        # An initializer that saw the batch axes would count them into the fan-in.
        keys = jax.random.split(key, math.prod(batch))
        one = lambda key: _require_arrays(init(key, shape, self.param_dtype), "a stacked kernel")
        stacked = jax.vmap(one)(keys)
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *shape), stacked)


def require_config(config: Any) -> LoRAConfig:
    """Refuses what is not a `LoRAConfig`, such as a bare rank.

    Raises:
        TypeError: it is something else.

    Example:
        >>> require_config(LoRAConfig(rank=8)).rank
        8
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(
            f"the settings of adapters are a LoRAConfig, got {config!r}; write"
            " nn.LoRAConfig(rank=8, alpha=16.0)"
        )
    return config


def _require_arrays(drawn: Any, where: str) -> Any:
    """Returns what initializers drew, and refuses what has metadata of NNX, which JAX cannot map.

    Raises:
        ValueError: it has.
    """
    if any(isinstance(leaf, nnx.VariableMetadata) for leaf in jax.tree.leaves(drawn)):
        raise ValueError(
            f"a_init and b_init with metadata, as of nnx.with_partitioning, do not go with {where};"
            " give plain initializers, and shard the factors by lowrank_optax.sharding"
        )
    return drawn


def _boxed(node: Any, pair: LoRAPair) -> Any:
    """Boxes leaves that are sharded like a factor with the sharding names of that factor.

    The box of a factor does not fit its vectors, so the diagonals of a metric stay without.
    """
    like = {("in", -2): "a", ("out", -1): "b"}
    sides = {name: like.get(tuple(axis)) for name, axis in node.long_axes().items()}
    boxed = {}
    for name, side in {**sides, "a": "a", "b": "b"}.items():
        leaf = getattr(node, name)
        if side is not None and leaf is not None and leaf.ndim == getattr(node, side).ndim:
            boxed[name] = jax.tree.unflatten(jax.tree.structure(getattr(pair, side)), [leaf])
    return node._replace(**boxed)
