"""The trainer: any task, any method, compiled once for all learning rates and seeds."""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.errors import ExperimentError
from experiments.methods import Setting, get_method
from experiments.probes import Probe, make_probe
from experiments.program import Program
from experiments.schema import (
    CurvePoint,
    Plan,
    ProbePoint,
    RunConfig,
    RunResult,
    Scores,
    Status,
    current_environment,
)
from experiments.start import NoStartError, WeightStart, options_of, parse_start
from experiments.task import Batch, OnStep, Task, ignore_steps
from lowrank_optax import find_pairs, nn

EXPLODED = 10.0
"""A run has diverged when its validation loss is this many times the loss before training."""

Trained = dict[str, Any]
"""The trained leaves: `adapters` (what the method moves) and `head` (what AdamW moves)."""


KEPT_LOSSES = 50
"""At most so many means of successive training losses are kept of a run."""

TIMED_STEPS = 11
"""How many steps are timed for a ratio."""


def warmup_cosine(plan: Plan) -> optax.Schedule:
    """Returns the plan's schedule with peak 1. No step is wasted on a rate of zero."""
    if plan.decay == "none":
        return optax.constant_schedule(1.0)
    shape = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=round(plan.warmup_fraction * plan.steps),
        decay_steps=plan.steps + 1,
    )
    return lambda count: shape(count + 1)


def step_ratio(trainer: "Trainer", baseline: "Trainer") -> float:
    """Measures a trainer's step in units of another's, by the medians of steps made in turn."""
    if trainer is baseline:
        return 1.0
    clocks = [trainer.stopwatch(), baseline.stopwatch()]
    times = [[next(clock) for clock in clocks] for _ in range(TIMED_STEPS)]
    own, base = (statistics.median(column) for column in zip(*times, strict=True))
    return own / base


class Outcome(NamedTuple):
    """A run's result, and the trained model unless the run failed."""

    result: RunResult
    model: Any


class _Parts(NamedTuple):
    """A model taken apart; the states hold plain arrays."""

    graph: Any
    trained: Trained
    frozen: Any

    def merge(self, trained: Trained, frozen: Any) -> Any:
        return nnx.merge(self.graph, trained["head"], trained["adapters"], frozen)


class _Programs(NamedTuple):
    step: Program
    totals: Program
    probe: Probe

    @property
    def seconds(self) -> float:
        return self.step.seconds + self.totals.seconds


@dataclass
class _Log:
    """What a run has produced so far."""

    trained: Trained
    curve: list[CurvePoint] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    final: dict[str, Scores] = field(default_factory=dict)
    probes: list[ProbePoint] = field(default_factory=list)


class Trainer:
    """Trains one task with one method.

    Only the method's variables and the task's head are inputs of the gradient and of the
    optimizer; everything else enters the compiled step as a frozen argument. The peak learning
    rate is an argument too, so one compilation serves a sweep and all seeds.

    Args:
        task: What to train.
        method: Name of a method of `experiments.methods.METHODS`.
        plan: Steps and schedule.
        method_options: What differs from the method's own options.
        study: Name of the study, for the record.
        variant: Name of its variant, for the record.
    """

    def __init__(
        self,
        task: Task[Any],
        method: str,
        plan: Plan,
        method_options: Mapping[str, Any] | None = None,
        *,
        study: str = "",
        variant: str = "",
    ) -> None:
        self.task = task
        self.method_name = method
        self.method = get_method(method)
        self.method_options = options_of(method, method_options or {})
        start = self.method_options.get("start")
        self._start = None if start is None else parse_start(start)
        self.plan = plan
        self.study = study
        self.variant = variant

    def config(self, learning_rate: float, seed: int) -> RunConfig:
        """Returns the full configuration of one run."""
        return RunConfig(
            study=self.study,
            variant=self.variant,
            task=self.task.name,
            task_options=self.task.options.model_dump(mode="json"),
            data=self.task.data,
            method=self.method_name,
            method_options=self.method_options,
            learning_rate=learning_rate,
            plan=self.plan,
            seed=seed,
        )

    def run(
        self,
        learning_rate: float,
        seed: int,
        on_step: OnStep = ignore_steps,
    ) -> Outcome:
        """Trains once.

        Divergence stops the run and is recorded, and so are a model that the method's start does
        not suit, and a failure of the device, such as no memory. Mistakes in the code are raised
        as usual.

        Args:
            learning_rate: Peak learning rate of the method.
            seed: Fixes the start of the adapters and of the head, and the order of the data.
            on_step: Called after each step.

        Returns:
            The result, and the model as trained.
        """
        begin = time.perf_counter()
        try:
            model, error = self.build_model(seed), None
        except NoStartError as failure:
            model, error = failure.model, str(failure)
        parts = self._split(model)
        # Copies: the compiled step donates its arguments, and the task may share its arrays.
        log = _Log(trained=jax.tree.map(jnp.copy, parts.trained))
        peak = jnp.float32(learning_rate)
        try:
            status = "failed" if error else self._loop(log, parts.frozen, seed, peak, on_step)
            if status == "finished":
                self._solve(log, parts)
        except jax.errors.JaxRuntimeError as failure:
            status, error = "failed", str(failure)
        finite = [point for point in log.curve if math.isfinite(point.validation.loss)]
        state = jax.eval_shape(self._init, parts.trained, peak)
        result = RunResult(
            config=self.config(learning_rate, seed),
            status=status,
            error=error,
            environment=current_environment(),
            trainable_parameters=_count_parameters(parts.trained),
            trained_bytes=_bytes(parts.trained),
            optimizer_state_bytes=_bytes(state),
            step_temporary_bytes=self._programs.step.temporary_bytes,
            compile_seconds=self._programs.seconds,
            wall_seconds=time.perf_counter() - begin,
            median_step_seconds=statistics.median(log.step_seconds) if log.step_seconds else None,
            steps_done=len(log.losses),
            losses_every=math.ceil(self.plan.steps / KEPT_LOSSES),
            train_losses=_block_means(log.losses, math.ceil(self.plan.steps / KEPT_LOSSES)),
            curve=log.curve,
            probes=log.probes,
            best=min(finite, key=lambda point: point.validation.loss) if finite else None,
            final=log.final,
        )
        is_lost = status == "failed"
        return Outcome(result, None if is_lost else parts.merge(log.trained, parts.frozen))

    def stopwatch(self) -> Iterator[float]:
        """Yields the seconds of one step after the other, at a learning rate near zero."""
        parts = self._split(self.task.build_model(0, self.method.adapters))
        trained, peak = jax.tree.map(jnp.copy, parts.trained), jnp.float32(1e-8)
        state = self._init(trained, peak)
        batch = next(self.task.train_batches(0))
        step = self._programs.step.of(trained, state, parts.frozen, batch, peak)
        while True:
            begin = time.perf_counter()
            trained, state, loss = step(trained, state, parts.frozen, batch, peak)
            loss.block_until_ready()
            yield time.perf_counter() - begin

    def _loop(
        self,
        log: _Log,
        frozen: Any,
        seed: int,
        peak: jax.Array,
        on_step: OnStep,
    ) -> Status:
        programs = self._programs
        state = self._init(log.trained, peak)
        batches = self.task.train_batches(seed)
        log.final["validation"] = start = self._score(log.trained, frozen, "validation")
        log.curve.append(CurvePoint(step=0, seconds=0.0, validation=start))
        for step in range(1, self.plan.steps + 1):
            batch = next(batches)
            is_probed = self.plan.probe_every and (step - 1) % self.plan.probe_every == 0
            before = jax.tree.map(jnp.copy, log.trained) if is_probed else None
            compiled_step = programs.step.of(log.trained, state, frozen, batch, peak)
            begin = time.perf_counter()
            log.trained, state, loss = compiled_step(log.trained, state, frozen, batch, peak)
            log.losses.append(float(loss))
            log.step_seconds.append(time.perf_counter() - begin)
            if is_probed:
                seen = programs.probe(before, log.trained, frozen, batch)
                values = {name: float(value) for name, value in seen.items()}
                log.probes.append(ProbePoint(step=step, **values))
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

    def _solve(self, log: _Log, parts: _Parts) -> None:
        model = parts.merge(log.trained, parts.frozen)
        for split, scores in log.final.items():
            solved = self.task.solved(model, split)
            log.final[split] = scores.model_copy(update={"solved": solved})

    def _score(self, trained: Trained, frozen: Any, split: str) -> Scores:
        batches = self.task.eval_batches(split)
        parts = [self._programs.totals(trained, frozen, batch) for batch in batches]
        sums = jax.tree.map(lambda *values: np.sum(values, axis=0, dtype=np.float64), *parts)
        return Scores(
            loss=float(sums.loss / sums.weight),
            accuracy=None if sums.correct is None else float(sums.correct / sums.weight),
            matthews=sums.matthews(),
        )

    def build_model(self, seed: int) -> nnx.Module:
        """Returns the model of a seed with its adapters as the method starts them."""
        model, start = self.task.build_model(seed, self.method.adapters), self._start
        if start is not None:
            model = nnx.clone(model)  # the start corrects kernels, which the task's models share
        if isinstance(start, WeightStart):
            nn.weight_start(model, start.method, seed=seed, progress=False)
        elif start is not None:

            def loss(model: Any, batch: Batch) -> jax.Array:
                sums = self.task.totals(model, batch)
                return sums.loss / sums.weight

            batches = itertools.islice(self.task.train_batches(seed), start.batches)
            settings = start.model_dump(exclude={"batches"})
            try:
                nn.gradient_start(model, loss, list(batches), **settings, seed=seed, progress=False)
            except (ValueError, jax.errors.JaxRuntimeError) as failure:
                raise NoStartError(f"no start from the gradient: {failure}", model) from failure
        return model

    def _split(self, model: nnx.Module) -> _Parts:
        # The head first: a method that trains the whole model leaves it to AdamW too.
        wanted = (self.task.head, self.method.adapters.trained, nnx.RngState, ...)
        graph, *states = nnx.split(model, *wanted)
        head, adapters, random, frozen = states
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
        setting = Setting(
            schedule=lambda count: peak * shape(count),
            total_steps=plan.steps,
            scale=self._scale,
            rank=self.task.options.rank,
        )
        options = {name: value for name, value in self.method_options.items() if name != "start"}
        adapters = self.method.make(setting, **options)
        head = optax.adamw(lambda count: plan.head_learning_rate * shape(count), weight_decay=0.0)
        return {
            "adapters": optax.with_extra_args_support(adapters),
            "head": optax.with_extra_args_support(head),
        }

    def _init(self, trained: Trained, peak: jax.Array) -> dict[str, Any]:
        return {name: tx.init(trained[name]) for name, tx in self._optimizers(peak).items()}

    @functools.cached_property
    def _scale(self) -> Callable[[str], float]:
        return nn.lora_scales(self.task.build_model(0, self.method.adapters)).__getitem__

    @functools.cached_property
    def _programs(self) -> _Programs:
        parts = self._split(self.task.build_model(0, self.method.adapters))

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

        return _Programs(
            step=Program(step, 3, donate_argnums=(0, 1)),
            totals=Program(totals, 2),
            probe=make_probe(loss, parts.merge),
        )


def _count_parameters(trained: Trained) -> int:
    """Counts what gradients train: neither shadows nor frames."""
    found = find_pairs(trained)
    factors = [(pair.a, pair.b) for pair in found.take(trained)]
    return sum(leaf.size for leaf in jax.tree.leaves((factors, found.rest(trained))))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _block_means(values: list[float], size: int) -> list[float]:
    blocks = (values[start : start + size] for start in range(0, len(values), size))
    return [float(f"{np.mean(block):.6g}") for block in blocks]
