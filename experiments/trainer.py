"""The trainer: any task, any method, compiled once for all learning rates and seeds."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.errors import ExperimentError
from experiments.methods import get_method
from experiments.schema import (
    CurvePoint,
    Plan,
    RunConfig,
    RunResult,
    Scores,
    Status,
    current_environment,
)
from experiments.tasks.base import Batch, OnStep, Task, ignore_steps
from lowrank_optax import nn

EXPLODED = 10.0
"""A run has diverged when its validation loss is this many times the loss before training."""

Trained = dict[str, Any]
"""The trained leaves: `adapters` (what the method moves) and `head` (what AdamW moves)."""


def warmup_cosine(plan: Plan) -> optax.Schedule:
    """Returns the plan's schedule with peak 1. No step is wasted on a rate of zero."""
    shape = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=round(plan.warmup_fraction * plan.steps),
        decay_steps=plan.steps + 1,
    )
    return lambda count: shape(count + 1)


class Run(NamedTuple):
    """A run's result, and the trained model unless the run failed."""

    result: RunResult
    model: Any


class _Parts(NamedTuple):
    """A model taken apart; the states hold plain arrays."""

    graph: Any
    trained: Trained
    frozen: Any

    def merge(self, trained: Trained, frozen: Any) -> Any:
        return nnx.merge(self.graph, trained["adapters"], trained["head"], frozen)


class _Compiled(NamedTuple):
    step: Callable[..., Any]
    totals: Callable[..., Any]
    seconds: float
    temporary_bytes: int | None


@dataclass
class _Log:
    """What a run has produced so far."""

    trained: Trained
    curve: list[CurvePoint] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    final: dict[str, Scores] = field(default_factory=dict)


class Trainer:
    """Trains one task with one method.

    Only the method's variables and the task's head are inputs of the gradient and of the
    optimizer; everything else enters the compiled step as a frozen argument. The peak learning
    rate is an argument too, so one compilation serves a sweep and all seeds.

    Args:
        task: What to train.
        method: Name of a method of `experiments.methods.METHODS`.
        plan: Steps and schedule.
    """

    def __init__(self, task: Task[Any], method: str, plan: Plan) -> None:
        self.task = task
        self.method_name = method
        self.method = get_method(method)
        self.plan = plan

    def config(self, learning_rate: float, seed: int) -> RunConfig:
        """Returns the full configuration of one run."""
        return RunConfig(
            task=self.task.name,
            task_options=self.task.options.model_dump(mode="json"),
            data=self.task.data,
            method=self.method_name,
            method_options=dict(self.method.options),
            learning_rate=learning_rate,
            plan=self.plan,
            seed=seed,
        )

    def run(
        self,
        learning_rate: float,
        seed: int,
        on_step: OnStep = ignore_steps,
    ) -> Run:
        """Trains once.

        Divergence stops the run and is recorded, and so is a failure of the device, such as no
        memory. Mistakes in the code are raised as usual.

        Args:
            learning_rate: Peak learning rate of the method.
            seed: Fixes the start of the adapters and of the head, and the order of the data.
            on_step: Called after each step.

        Returns:
            The result, and the model as trained.
        """
        begin = time.perf_counter()
        parts = self._split(self.task.build_model(seed))
        # Copies: the compiled step donates its arguments, and the task may share its arrays.
        log = _Log(trained=jax.tree.map(jnp.copy, parts.trained))
        peak = jnp.float32(learning_rate)
        error = None
        try:
            status = self._loop(log, parts.frozen, seed, peak, on_step)
        except jax.errors.JaxRuntimeError as failure:
            status, error = "failed", str(failure)
        finite = [point for point in log.curve if math.isfinite(point.validation.loss)]
        state = jax.eval_shape(self._init, parts.trained, peak)
        result = RunResult(
            config=self.config(learning_rate, seed),
            status=status,
            error=error,
            environment=current_environment(),
            trainable_parameters=sum(x.size for x in jax.tree.leaves(parts.trained)),
            optimizer_state_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
            step_temporary_bytes=None if status == "failed" else self._compiled.temporary_bytes,
            compile_seconds=0.0 if status == "failed" else self._compiled.seconds,
            wall_seconds=time.perf_counter() - begin,
            median_step_seconds=_median(log.step_seconds),
            steps_done=len(log.losses),
            train_losses=log.losses,
            curve=log.curve,
            best=min(finite, key=lambda point: point.validation.loss) if finite else None,
            final=log.final,
        )
        model = None if status == "failed" else parts.merge(log.trained, parts.frozen)
        return Run(result, model)

    def _loop(
        self,
        log: _Log,
        frozen: Any,
        seed: int,
        peak: jax.Array,
        on_step: OnStep,
    ) -> Status:
        compiled = self._compiled
        state = self._init(log.trained, peak)
        batches = self.task.train_batches(seed)
        log.final["validation"] = start = self._score(log.trained, frozen, "validation")
        log.curve.append(CurvePoint(step=0, seconds=0.0, validation=start))
        for step in range(1, self.plan.steps + 1):
            batch = next(batches)
            begin = time.perf_counter()
            log.trained, state, loss = compiled.step(log.trained, state, frozen, batch, peak)
            log.losses.append(float(loss))
            log.step_seconds.append(time.perf_counter() - begin)
            on_step(step, self.plan.steps)
            broken = not math.isfinite(log.losses[-1])
            if broken or step % self.plan.eval_every == 0 or step == self.plan.steps:
                scores = self._score(log.trained, frozen, "validation")
                log.final["validation"] = scores
                log.curve.append(
                    CurvePoint(step=step, seconds=sum(log.step_seconds), validation=scores)
                )
                # Written so that NaN counts as exploded.
                if broken or not scores.loss <= EXPLODED * start.loss:
                    return "diverged"
        for split in self.task.splits:
            if split != "validation":
                log.final[split] = self._score(log.trained, frozen, split)
        return "finished"

    def _score(self, trained: Trained, frozen: Any, split: str) -> Scores:
        loss = correct = weight = 0.0
        for batch in self.task.eval_batches(split):
            totals = self._compiled.totals(trained, frozen, batch)
            loss += float(totals.loss)
            correct += float(totals.correct)
            weight += float(totals.weight)
        return Scores(loss=loss / weight, accuracy=correct / weight)

    def _split(self, model: nnx.Module) -> _Parts:
        wanted = (self.method.trains, self.task.head, nnx.RngState, ...)
        graph, *states = nnx.split(model, *wanted)
        adapters, head, random, frozen = states
        if not jax.tree.leaves(adapters):
            raise ExperimentError(
                f"method {self.method_name!r} finds nothing to train in task {self.task.name!r}"
            )
        if jax.tree.leaves(random):
            raise ExperimentError(
                f"the model of task {self.task.name!r} draws random numbers (dropout?), "
                "which the trainer does not support"
            )
        trained = {"adapters": nnx.as_pure(adapters), "head": nnx.as_pure(head)}
        return _Parts(graph, trained, nnx.as_pure(frozen))

    def _optimizers(self, peak: jax.Array) -> dict[str, optax.GradientTransformationExtraArgs]:
        plan = self.plan
        shape = warmup_cosine(plan)
        adapters = self.method.build(lambda count: peak * shape(count), self._scale)
        head = optax.adamw(lambda count: plan.head_learning_rate * shape(count), weight_decay=0.0)
        return {
            "adapters": optax.with_extra_args_support(adapters),
            "head": optax.with_extra_args_support(head),
        }

    def _init(self, trained: Trained, peak: jax.Array) -> dict[str, Any]:
        return {name: tx.init(trained[name]) for name, tx in self._optimizers(peak).items()}

    @functools.cached_property
    def _scale(self) -> Callable[[str], float]:
        return nn.lora_scales(self.task.build_model(0)).__getitem__

    @functools.cached_property
    def _compiled(self) -> _Compiled:
        parts = self._split(self.task.build_model(0))

        def totals(trained: Trained, frozen: Any, batch: Batch) -> Any:
            return self.task.totals(parts.merge(trained, frozen), batch)

        def loss(trained: Trained, frozen: Any, batch: Batch) -> jax.Array:
            sums = totals(trained, frozen, batch)
            return sums.loss / sums.weight

        def step(
            trained: Trained, state: dict[str, Any], frozen: Any, batch: Batch, peak: jax.Array
        ) -> tuple[Trained, dict[str, Any], jax.Array]:
            value, grads = jax.value_and_grad(loss)(trained, frozen, batch)
            moved, states = {}, {}
            for name, tx in self._optimizers(peak).items():
                updates, states[name] = tx.update(grads[name], state[name], trained[name])
                moved[name] = optax.apply_updates(trained[name], updates)
            return moved, states, value

        peak = jnp.float32(1.0)
        begin = time.perf_counter()
        state = jax.eval_shape(self._init, parts.trained, peak)
        train_batch = next(self.task.train_batches(0))
        eval_batch = self.task.eval_batches("validation")[0]
        compiled_step = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(parts.trained, state, parts.frozen, train_batch, peak)
            .compile()
        )
        compiled_totals = jax.jit(totals).lower(parts.trained, parts.frozen, eval_batch).compile()
        memory = compiled_step.memory_analysis()
        return _Compiled(
            step=compiled_step,
            totals=compiled_totals,
            seconds=time.perf_counter() - begin,
            temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
        )


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
