"""The linear task of the OPLoRA paper (arXiv 2509.19977): how near LoRA comes to the best rank r.

A random matrix T is fitted at low rank from mini-batches of its rows, as the released code does
(zeligism/PSI-LoRA, 9cb3fa6): inputs are the rows of the identity, the loss is the squared error
summed over the batch, without ½. The validation "loss" is the excess of the loss over all rows over
that of the best matrix of the rank, relative to the latter.

The factors start at the truncated singular value decomposition of a uniform matrix, the roots of
the singular values on either side; the frozen kernel is zero.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.adapters import Adapters
from experiments.errors import ExperimentError
from experiments.task import Batch, OnStep, Task, TaskOptions, Totals, ignore_steps
from lowrank_optax import LoRAPair, nn, pair_of_delta


class LinearOptions(TaskOptions):
    """Sizes; those of the released code by default. A batch size of `n_in` is deterministic."""

    n_in: int = 200
    n_out: int = 600
    rank: int = 8
    alpha: float = 8.0
    targets: str = "layer"
    batch_size: int = 64
    target_seed: int = 0


class LinearModel(nnx.Module):
    """One linear layer without bias, its kernel zero."""

    def __init__(self, n_in: int, n_out: int) -> None:
        zeros = nnx.initializers.zeros_init()
        self.layer = nnx.Linear(n_in, n_out, use_bias=False, kernel_init=zeros, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps inputs (batch, in) to outputs (batch, out)."""
        return self.layer(x)


def starting_at(start: LoRAPair, config: nn.LoRAConfig) -> nn.LoRAConfig:
    """Returns the settings of adapters that start at given factors, whatever the random key."""
    return dataclasses.replace(
        config,
        a_init=lambda key, shape, dtype: start.a.astype(dtype),
        b_init=lambda key, shape, dtype: start.b.astype(dtype),
    )


class Linear(Task[LinearOptions]):
    """A random matrix, from its rows."""

    name: ClassVar[str] = "linear"
    options_type = LinearOptions

    def __init__(
        self,
        options: LinearOptions,
        data_dir: Path | None = None,
        on_step: OnStep = ignore_steps,
    ) -> None:
        super().__init__(options)
        if data_dir is not None:
            raise ExperimentError("the linear task takes no --data-dir: its data are random")
        rng = np.random.default_rng(options.target_seed)
        self._target = rng.standard_normal((options.n_in, options.n_out)).astype(np.float32)
        values = np.linalg.svd(self._target, compute_uv=False)
        self._best_loss = float(np.sum(values[options.rank :] ** 2))

    @property
    def head(self) -> nnx.filterlib.Filter:
        """Nothing: there are only the adapters."""
        return nnx.Nothing()

    @property
    def splits(self) -> tuple[str, ...]:
        """All rows."""
        return ("validation",)

    @property
    def data(self) -> dict[str, str]:
        """What was drawn."""
        return {"source": f"standard normal, seed {self.options.target_seed}"}

    def build_model(self, seed: int, adapters: Adapters) -> LinearModel:
        """Returns the layer, its adapters at the decomposition of a uniform matrix."""
        options = self.options
        bound = options.n_in**-0.5
        shape = (options.n_in, options.n_out)
        kernel = np.random.default_rng(seed).uniform(-bound, bound, shape)
        start = pair_of_delta(jnp.asarray(kernel, jnp.float32), options.rank)
        model = LinearModel(options.n_in, options.n_out)
        config = starting_at(start, options.lora)
        adapters.add_to(model, options.targets, config, rngs=nnx.Rngs(seed))
        return model

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yields the rows in shuffled batches for ever; zeros fill an epoch's last batch."""
        n_in, size = self.options.n_in, self.options.batch_size
        rng = np.random.default_rng([seed, 1])
        x, y = (
            np.eye(n_in + 1, n_in, dtype=np.float32),
            np.vstack([self._target, 0 * self._target[:1]]),
        )
        while True:
            order = np.pad(rng.permutation(n_in), (0, -n_in % size), constant_values=n_in)
            for rows in order.reshape(-1, size):
                yield {"x": x[rows], "y": y[rows]}

    def eval_batches(self, split: str) -> Sequence[Batch]:
        """Returns all rows as one batch."""
        unit = np.array(1 / self._best_loss, np.float32)
        return [{"x": np.eye(self.options.n_in, dtype=np.float32), "y": self._target, "unit": unit}]

    def totals(self, model: Any, batch: Batch) -> Totals:
        """Returns the squared error, summed; of all rows, its relative excess."""
        loss = jnp.sum((model(batch["x"]) - batch["y"]) ** 2)
        if "unit" in batch:
            loss = loss * batch["unit"] - 1
        return Totals(loss, None, jnp.ones([]))
