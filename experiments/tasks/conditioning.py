"""Matrix factorization from ill-conditioned factors: what the theory of LoRA optimizers is about.

``½ ‖ΔK - T‖²`` is minimized for a target T of rank r, near which ΔK = s a b starts. Half of the
singular values of either factor are 1/κ of the others. Two problems differ in which half:

* ``factorization``: the weak half of ``a`` meets the strong half of ``b``, so that T and ΔK are
  perfectly conditioned and only their factorization is not;
* ``adapter``: weak meets weak, as in a balanced factorization of a T of condition number κ².

T and the start have singular vectors that differ by about `ANGLE`, and the start half of T's
singular values. The validation "loss" is relative to that of the start.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.task import Batch, OnStep, Task, TaskOptions, Totals, ignore_steps
from experiments.tasks.linear import LinearModel, starting_at
from lowrank_optax import LoRAPair

N_IN, RANK, N_OUT = 16, 4, 12
SCALE = 2.0
ANGLE = 0.3

Kind = Literal["factorization", "adapter"]


class Problem(NamedTuple):
    """One problem.

    Args:
        target: T, (in, out).
        start: the factors to start at.
    """

    target: jax.Array
    start: LoRAPair


@jax.jit(static_argnames="kind")
def make_problem(kind: Kind, condition: float, seed: int = 0) -> Problem:
    """Makes a target and, near it, factors of a condition number.

    Args:
        kind: which singular values meet.
        condition: κ of either factor.
        seed: of how the start differs from the target, which is always the same.

    Returns:
        The problem.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    weak = jnp.arange(RANK) >= RANK // 2
    values_a = jnp.where(weak, 1 / condition, 1.0)
    values_b = values_a if kind == "adapter" else values_a[::-1] * condition
    left, left_start = _vectors(N_IN, keys[0], jax.random.fold_in(keys[1], seed))
    right, right_start = _vectors(N_OUT, keys[2], jax.random.fold_in(keys[3], seed))
    balance = condition**0.5 if kind == "factorization" else 1.0
    a = left_start * values_a * balance
    b = (right_start * values_b).T / balance
    target = (left * values_a * values_b) @ right.T
    return Problem(target, LoRAPair(a, b / (2 * SCALE)))


def _vectors(size: int, key: jax.Array, other_key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws orthonormal columns (size, r), and others near them."""
    wanted, _ = jnp.linalg.qr(jax.random.normal(key, (size, RANK)))
    noise = jax.random.normal(other_key, (size, RANK)) / size**0.5
    near, upper = jnp.linalg.qr(wanted + ANGLE * noise)
    return wanted, near * jnp.sign(jnp.diag(upper))


class ConditioningOptions(TaskOptions):
    """Which problem; its sizes are fixed."""

    rank: Literal[4] = 4
    alpha: Literal[8] = 8
    targets: Literal["layer"] = "layer"
    kind: Kind = "factorization"
    condition: float = 1.0


class Conditioning(Task[ConditioningOptions]):
    """A matrix, all of it at every step."""

    name: ClassVar[str] = "conditioning"
    options_type = ConditioningOptions

    def __init__(
        self,
        options: ConditioningOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options)
        if data_dir is not None:
            raise ExperimentError("the conditioning task takes no --data-dir: its data are random")

    @property
    def head(self) -> nnx.filterlib.Filter:
        """Nothing: there are only the adapters."""
        return nnx.Nothing()

    @property
    def splits(self) -> tuple[str, ...]:
        """The whole matrix."""
        return ("validation",)

    @property
    def data(self) -> dict[str, str]:
        """What was drawn."""
        return {"source": "random singular vectors, seed 0"}

    def _problem(self, seed: int) -> Problem:
        return make_problem(self.options.kind, self.options.condition, seed)

    def build_model(self, seed: int, adapters: Adapters) -> LinearModel:
        """Returns a layer with zeros for a kernel, and adapters at the problem's start."""
        start = self._problem(seed).start
        model = LinearModel(N_IN, N_OUT)
        config = starting_at(start, self.options.lora)
        adapters.add_to(model, self.options.targets, config, rngs=nnx.Rngs(seed))
        return model

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields the whole matrix for ever."""
        batch = {"x": np.eye(N_IN, dtype=np.float32), "y": np.asarray(self._problem(0).target)}
        while True:
            yield batch

    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns the whole matrix, with the loss at the start of seed 0 as the unit."""
        target, start = self._problem(0)
        distance = SCALE * start.a @ start.b - target
        unit = np.asarray(0.5 * jnp.sum(distance**2))
        return [next(self.train_batches(0)) | {"unit": unit}]

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns half of the squared distance."""
        loss = 0.5 * jnp.sum((model(batch["x"]) - batch["y"]) ** 2)
        return Totals(loss / batch["unit"] if "unit" in batch else loss, None, jnp.ones([]))
