"""The settings of a LoRA adapter: validated, scaled and initialized in one place."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lowrank_optax.factors import LONG_AXES, FramedPair, LoRAPair, ShadowedPair
from lowrank_optax.frames import frame
from lowrank_optax.shadows import Metric, shadow

Initializer = Callable[..., Any]

# Module-level objects: equal configurations then compare equal, and jit caches stay warm.
DEFAULT_A_INIT: Initializer = jax.nn.initializers.he_uniform()
DEFAULT_B_INIT: Initializer = jax.nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Shadows:
    """Which shadows an adapter carries, the leaves that OPLoRA moves and reads.

    ``Shadows()`` is what ``oplora(lr)`` needs, and ``Shadows(iterations=2, momentum_rank=0)`` what
    ``oplora_proj(lr)`` needs. Shadows change neither the output nor the gradients of the factors.
    With ``iterations`` from 1 an adapter may be used once in a forward pass, on a whole batch (not
    under a ``vmap`` over examples): see ``lowrank_optax.shadows``.

    Attributes:
      iterations: k, how many LoRSum iterations the optimizer will make, at least 0.
      momentum_rank: rank of the momentum, at most min(in, out) of every adapted kernel; 0 for none,
        None for the rank of the adapter.
      metric: ``Metric()`` for ``scaled_oplora``, with the numbers that it is given.
      axis_name: see `lora_apply`; for ``pmap`` and ``shard_map`` only.

    Raises:
      ValueError: if a number is negative.

    Example:
      >>> import jax
      >>> config = LoRAConfig(rank=2, shadows=Shadows(momentum_rank=1))
      >>> pair = config.init_pair(jax.random.key(0), (), 8, 6)
      >>> pair.m_a.shape, pair.m_b.shape
      ((8, 1), (1, 6))

    Source: OPLoRA, https://arxiv.org/abs/2509.19977.
    """

    iterations: int = 1
    momentum_rank: int | None = None
    metric: Metric | None = None
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, got {self.iterations}")
        if self.momentum_rank is not None and self.momentum_rank < 0:
            raise ValueError(f"momentum_rank must be at least 0, got {self.momentum_rank}")


@dataclasses.dataclass(frozen=True)
class Frames:
    """That an adapter carries frames, which SDS-LoRA moves and through which gradients flow.

    Attributes:
      warmup: True for ``sds_lora``'s warm-up, an adapter that starts as ordinary LoRA; False for a
        start from random frames and factors of zero, for ``warmup_steps=0``.

    Example:
      >>> import jax
      >>> config = LoRAConfig(rank=4, alpha=8.0, frames=Frames())
      >>> config.scale, config.init_pair(jax.random.key(0), (), 8, 6).f_out.shape
      (4.0, (4, 6))

    Source: SDS-LoRA, https://arxiv.org/abs/2606.16454.
    """

    warmup: bool = True


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    r"""Settings of a LoRA adapter.

    The forward scale is $s = \alpha / r$, or $s = \alpha / \sqrt r$ for rank-stabilized LoRA and
    with frames, as SDS-LoRA has it.

    Attributes:
      rank: r, at least 1 and at most min(in, out) of every adapted kernel.
      alpha: positive numerator of the scale.
      rslora: divide by the square root of the rank instead of the rank.
      dropout: probability in [0, 1) of dropping an entry of the adapter's input.
      a_init: initializer of ``a``, called as ``a_init(key, (in, r), dtype)`` for each batch entry.
      b_init: initializer of ``b``, called as ``b_init(key, (r, out), dtype)``; zeros by default, so
        that an adapted model starts as the base model.
      param_dtype: dtype of the factors, whatever the dtype of the base kernel.
      dtype: dtype of the adapter's matmul operands; None means the dtype of the base's output.
      shadows: ``Shadows()`` for a layer that OPLoRA can train; none by default.
      frames: ``Frames()`` for a layer that SDS-LoRA can train; none by default.

    Raises:
      ValueError: if a setting is outside its range.

    Example:
      >>> LoRAConfig(rank=4, alpha=16.0).scale
      4.0
      >>> LoRAConfig(rank=4, alpha=16.0, rslora=True).scale
      8.0

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; Kalajdzievski, rsLoRA,
    https://arxiv.org/abs/2312.03732.
    """

    rank: int
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    a_init: Initializer = DEFAULT_A_INIT
    b_init: Initializer = DEFAULT_B_INIT
    param_dtype: DTypeLike = jnp.float32
    dtype: DTypeLike | None = None
    shadows: Shadows | None = None
    frames: Frames | None = None

    def __post_init__(self) -> None:
        if self.shadows is not None and self.frames is not None:
            raise ValueError("shadows are for OPLoRA, frames for SDS-LoRA: give one of them")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def axis_name(self) -> str | tuple[str, ...] | None:
        """The axes over which `lora_apply` sums what is not linear in the gradient."""
        return None if self.shadows is None else self.shadows.axis_name

    @property
    def scale(self) -> float:
        """The forward scale s."""
        by_root = self.rslora or self.frames is not None
        return self.alpha / (math.sqrt(self.rank) if by_root else self.rank)

    def check_rank(self, n_in: int, n_out: int, path: str) -> None:
        """Refuses a rank, of the factors or of their momentum, that the kernel cannot use.

        Args:
          n_in: flattened input size of the kernel.
          n_out: flattened output size of the kernel.
          path: where the kernel is, for the message.

        Raises:
          ValueError: if one exceeds min(in, out).
        """
        ranks = {"rank": self.rank}
        if self.shadows is not None:
            ranks["momentum_rank"] = self.shadows.momentum_rank or 0
        for name, rank in ranks.items():
            if rank > min(n_in, n_out):
                raise ValueError(
                    f"{path}: {name} {rank} exceeds min(in, out) = {min(n_in, n_out)} of its "
                    f"({n_in}, {n_out}) kernel; lower it or leave this layer out of the targets"
                )

    def init_pair(
        self, key: jax.Array, batch: tuple[int, ...], n_in: int, n_out: int
    ) -> LoRAPair | ShadowedPair | FramedPair:
        """Draws new factors, and their shadows or frames if there are to be any.

        Args:
          key: random key.
          batch: leading axes of the factors; each entry is drawn independently.
          n_in: flattened input size.
          n_out: flattened output size.

        Returns:
          The pair, ``a`` (batch..., in, r) and ``b`` (batch..., r, out), in ``param_dtype``. It is
          the same with shadows or warm-up frames; they are in float32 or better.

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
        if self.frames is not None:
            return self._framed(pair, jax.random.fold_in(key, 2))
        if self.shadows is None:
            return pair
        # Shapes instead of the factors, which may be boxed with sharding names, and a key of its
        # own, so that the factors are those that the same key draws without shadows.
        shapes = LoRAPair(
            a=jax.ShapeDtypeStruct((*batch, n_in, self.rank), self.param_dtype),
            b=jax.ShapeDtypeStruct((*batch, self.rank, n_out), self.param_dtype),
        )
        node = shadow(
            shapes,
            jax.random.fold_in(key, 2),
            iterations=self.shadows.iterations,
            momentum_rank=self.shadows.momentum_rank,
            metric=self.shadows.metric,
        )
        return _boxed(node._replace(a=pair.a, b=pair.b), pair)

    def _framed(self, pair: LoRAPair, key: jax.Array) -> FramedPair:
        """Adds frames to factors that may be boxed with sharding names."""
        assert self.frames is not None
        [a], [b] = jax.tree.leaves(pair.a), jax.tree.leaves(pair.b)
        node = frame(LoRAPair(a, b), None if self.frames.warmup else key)
        # The node's own factors: without a warm-up they are zeros, whatever was drawn.
        node = node._replace(
            a=jax.tree.map(lambda _: node.a, pair.a), b=jax.tree.map(lambda _: node.b, pair.b)
        )
        return _boxed(node, pair)

    def _draw(
        self, init: Initializer, key: jax.Array, batch: tuple[int, ...], shape: tuple[int, int]
    ) -> Any:
        if not batch:
            return init(key, shape, self.param_dtype)  # may be boxed with sharding names
        # An initializer that saw the batch axes would count them into the fan-in.
        keys = jax.random.split(key, math.prod(batch))
        stacked = jax.vmap(lambda one: init(one, shape, self.param_dtype))(keys)
        return jax.tree.map(lambda leaf: leaf.reshape(*batch, *shape), stacked)


def _boxed(node: Any, pair: LoRAPair) -> Any:
    """Gives auxiliary leaves that lie as a factor the sharding names that the factor is boxed with.

    Those of a factor's vectors are not known to the box, so diagonals of a metric stay without.
    """
    like = {"in": pair.a, "out": pair.b}
    box = lambda side, leaf: jax.tree.unflatten(jax.tree.structure(like[side]), [leaf])
    boxed = {
        name: box(LONG_AXES[name][0], leaf)
        for name, leaf in node._asdict().items()
        if name in LONG_AXES and name not in ("a", "b", "d_in", "d_out") and leaf is not None
    }
    return node._replace(**boxed)
