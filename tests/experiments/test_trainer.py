import dataclasses
import json
import math
from itertools import pairwise

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.adapters import Dense, LowRank, WholeModel
from experiments.errors import ExperimentError
from experiments.methods import METHODS
from experiments.schema import Plan, RunResult, read_result
from experiments.tasks.data import padded_batches, shuffled_batches, shuffled_batches_by_length
from experiments.trainer import Outcome, Trainer, warmup_cosine
from lowrank_optax import nn


@pytest.fixture(scope="module")
def trainer(tiny_digits, plan) -> Trainer:
    return Trainer(tiny_digits, "adamw", plan)


@pytest.fixture(scope="module")
def run(trainer) -> Outcome:
    return trainer.run(1e-2, seed=0)


def leaves(model, wanted) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, wanted))]


def test_run_learns_and_its_json_is_complete(run, plan, tmp_path):
    result = run.result
    assert result.status == "finished"
    assert result.steps_done == len(result.train_losses) == plan.steps
    assert [point.step for point in result.curve] == [0, 10, 20, 30]
    assert result.curve[-1].validation.loss < 0.8 * result.curve[0].validation.loss
    assert result.final["validation"] == result.curve[-1].validation
    assert set(result.final) == {"validation", "test"}
    assert result.best.validation.loss == min(p.validation.loss for p in result.curve)
    assert result.median_step_seconds > 0
    assert result.compile_seconds > 0

    path = result.write(tmp_path)
    stored = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert stored["environment"]["packages"]["jax"] == jax.__version__
    assert stored["config"]["plan"]["steps"] == plan.steps
    assert read_result(path) == result


def test_counts_of_parameters_and_state(run, tiny_digits):
    w, r = tiny_digits.options.width, tiny_digits.options.rank
    pairs = 4 * (w + w) * r + 2 * (w + 4 * w) * r
    head = w * 5 + 5
    assert run.result.trainable_parameters == pairs + head
    counters = 4 * 4  # AdamW's count and the schedule's, int32, for adapters and for head
    assert run.result.optimizer_state_bytes == 2 * 4 * (pairs + head) + counters


@pytest.mark.parametrize("method", ["oplora-2", "scaled-oplora", "sds-lora"])
def test_shadows_and_frames_are_no_trained_parameters(method, run, tiny_digits):
    plan = Plan(steps=12, eval_every=12, head_learning_rate=1e-2)
    other = Trainer(tiny_digits, method, plan).run(1e-3, seed=0)
    assert other.result.trainable_parameters == run.result.trainable_parameters
    assert other.result.trained_bytes > run.result.trained_bytes


def test_all_parameters_are_counted_without_pairs(tiny_digits):
    plan = Plan(steps=1, eval_every=1, head_learning_rate=1e-2)
    for method, adapters in (("full-adamw", WholeModel()), ("svd-lora", Dense())):
        model = tiny_digits.build_model(0, adapters)
        trained = nnx.state(model, nnx.Any(adapters.trained, tiny_digits.head))
        result = Trainer(tiny_digits, method, plan).run(1e-3, seed=0).result
        assert result.trainable_parameters == sum(x.size for x in jax.tree.leaves(trained))


def test_only_adapters_and_head_change(run, tiny_digits):
    trained = nnx.Any(nnx.LoRAParam, tiny_digits.head)
    before, after = tiny_digits.build_model(0, LowRank()), run.model
    frozen_before, frozen_after = (leaves(m, nnx.Not(trained)) for m in (before, after))
    assert len(frozen_before) > 10
    for old, new in zip(frozen_before, frozen_after, strict=True):
        np.testing.assert_array_equal(old, new)
    for wanted in (nnx.LoRAParam, tiny_digits.head):
        for old, new in zip(leaves(before, wanted), leaves(after, wanted), strict=True):
            assert not np.array_equal(old, new)


def test_same_seed_same_losses_bitwise(trainer, run):
    again = trainer.run(1e-2, seed=0).result
    assert again.train_losses == run.result.train_losses
    assert again.final == run.result.final
    assert trainer.run(1e-2, seed=1).result.train_losses != again.train_losses


def test_another_learning_rate_compiles_nothing(trainer, run):
    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        other = trainer.run(1e-3, seed=0).result
        assert compiled == []
        jax.jit(lambda x: x + 1.25)(1.0)
        assert compiled  # the listener does count compilations
    finally:
        jax.monitoring.clear_event_listeners()
    assert other.train_losses[0] == run.result.train_losses[0]
    assert other.train_losses[2] != run.result.train_losses[2]


def test_divergence_is_a_result(trainer, tmp_path):
    result = trainer.run(1e6, seed=0).result
    assert result.status == "diverged"
    assert result.steps_done < trainer.plan.steps
    assert result.validation_loss == math.inf
    assert "test" not in result.final
    path = result.write(tmp_path)
    assert read_result(path).status == "diverged"


def test_not_a_number_is_stored_as_strict_json(trainer, tmp_path, monkeypatch):
    batch = next(trainer.task.train_batches(0))
    poisoned = batch | {"image": batch["image"] * np.float32(np.nan)}
    monkeypatch.setattr(trainer.task, "train_batches", lambda seed: iter([poisoned] * 99))
    result = trainer.run(1e-2, seed=0).result
    assert (result.status, result.steps_done) == ("diverged", 1)
    path = result.write(tmp_path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert math.isnan(read_result(path).train_losses[0])


def test_device_failure_is_a_result(trainer, tmp_path, monkeypatch):
    def out_of_memory(seed):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(trainer.task, "train_batches", out_of_memory)
    run = trainer.run(1e-3, seed=0)
    assert (run.result.status, run.model) == ("failed", None)
    assert "RESOURCE_EXHAUSTED" in run.result.error
    assert read_result(run.result.write(tmp_path)) == run.result


def test_mistakes_in_the_code_are_raised(trainer, monkeypatch):
    monkeypatch.setattr(trainer.task, "train_batches", lambda seed: iter([{}]))
    with pytest.raises((TypeError, KeyError)):
        trainer.run(1e-3, seed=0)


def test_altlora_knows_its_scale_and_moves_both_factors(tiny_digits, monkeypatch):
    scales = []
    row = METHODS["altlora"]

    def recording(setting, **options):
        scales.append(setting.scale("blocks/0/attention/query"))
        return row.make(setting, **options)

    monkeypatch.setitem(METHODS, "altlora", dataclasses.replace(row, make=recording))
    plan = Plan(steps=4, eval_every=4, head_learning_rate=1e-2)
    run = Trainer(tiny_digits, "altlora", plan).run(1e-3, seed=0)
    assert run.result.status == "finished"
    assert set(scales) == {tiny_digits.options.alpha / tiny_digits.options.rank}
    before = nnx.to_flat_state(nnx.state(tiny_digits.build_model(0, LowRank()), nnx.LoRAParam))
    after = nnx.to_flat_state(nnx.state(run.model, nnx.LoRAParam))
    for (path, old), (_, new) in zip(before, after, strict=True):
        assert not np.array_equal(old[...], new[...]), path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, tiny_digits):
    plan = Plan(steps=12, eval_every=12, head_learning_rate=1e-2)
    trainer = Trainer(tiny_digits, method, plan)
    run = trainer.run(1e-3, seed=0)
    assert run.result.status == "finished"
    assert run.result.config.method_options == METHODS[method].options
    moved = METHODS[method].adapters.trained
    before = leaves(tiny_digits.build_model(0, METHODS[method].adapters), moved)
    assert any(
        not np.array_equal(x, y) for x, y in zip(before, leaves(run.model, moved), strict=True)
    )


def test_nothing_to_train_is_an_error(trainer, monkeypatch):
    monkeypatch.setattr(
        trainer.task, "build_model", lambda seed, adapters: nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    )
    with pytest.raises(ExperimentError, match="finds nothing to train"):
        trainer.run(1e-3, seed=0)


def test_unknown_method(tiny_digits, plan):
    with pytest.raises(ExperimentError, match="unknown method 'adam'; there are: adamw"):
        Trainer(tiny_digits, "adam", plan)


def test_schedule_warms_up_to_one_and_decays_without_idle_steps():
    schedule = warmup_cosine(Plan(steps=20, eval_every=20, head_learning_rate=1.0))
    values = [float(schedule(step)) for step in range(20)]
    assert values[:2] == pytest.approx([0.5, 1.0])
    assert all(a > b for a, b in pairwise(values[1:]))
    assert 0 < values[-1] < 0.02


def test_padding_of_the_last_batch_has_no_weight():
    examples = {"x": np.arange(5), "label": np.arange(5)}
    batches = padded_batches(examples, 4)
    assert [batch["x"].shape for batch in batches] == [(4,), (4,)]
    counted = np.concatenate([b["x"][b["weight"] > 0] for b in batches])
    np.testing.assert_array_equal(counted, np.arange(5))


def test_batches_are_epochs_in_an_order_fixed_by_the_seed():
    examples = {"label": np.arange(12)}

    def epoch(seed, skip=0):
        batches = shuffled_batches(examples, 4, seed)
        drawn = [next(batches)["label"] for _ in range(3 * (skip + 1))]
        return np.concatenate(drawn[-3:])

    np.testing.assert_array_equal(np.sort(epoch(0)), np.arange(12))
    np.testing.assert_array_equal(np.sort(epoch(0, skip=1)), np.arange(12))
    np.testing.assert_array_equal(epoch(0), epoch(0))
    assert not np.array_equal(epoch(0), epoch(1))
    assert not np.array_equal(epoch(0), epoch(0, skip=1))
    with pytest.raises(ExperimentError, match="batch_size 13"):
        next(shuffled_batches(examples, 13, 0))


def test_batches_by_length_are_the_same_examples_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 50, 64)
    examples = {"label": np.arange(64), "tokens": np.arange(64)[:, None]}

    def epoch(seed, pool):
        batches = shuffled_batches_by_length(examples, lengths, 4, seed, pool)
        return np.stack([next(batches)["label"] for _ in range(16)])

    for pool in (4, 16, 99):  # 99 batches are more than there are
        drawn = epoch(0, pool)
        np.testing.assert_array_equal(np.sort(drawn.ravel()), np.arange(64))
        np.testing.assert_array_equal(drawn, epoch(0, pool))
    spread = lambda drawn: np.ptp(lengths[drawn], axis=1).mean()
    assert spread(epoch(0, 16)) < 0.2 * spread(epoch(0, 1))
    assert not np.array_equal(epoch(0, 16), epoch(1, 16))
    longest = lengths[epoch(0, 16)].max(axis=1)
    assert (np.diff(longest) < 0).any()  # the batches are not in the order of their lengths
    batch = next(shuffled_batches_by_length(examples, lengths, 4, 0))
    np.testing.assert_array_equal(batch["tokens"][:, 0], batch["label"])


def test_run_result_needs_every_field():
    with pytest.raises(ValueError, match="config"):
        RunResult.model_validate({"schema_version": 2})


def test_a_run_without_a_start_is_recorded_as_failed(tiny_digits, plan, monkeypatch):
    """So the other methods of its study go on."""

    def refuse(*_, **__):
        raise ValueError("layers/0/query: the gradient has rank 3")

    monkeypatch.setattr(nn, "gradient_start", refuse)
    run = Trainer(tiny_digits, "polora-start", plan).run(0.3, seed=0)
    assert (run.result.status, run.result.steps_done, run.model) == ("failed", 0, None)
    assert "no start from the gradient: layers/0/query" in run.result.error


def test_a_start_from_the_gradient_keeps_the_model_and_is_made_anew_for_each_seed(
    tiny_digits, plan, run
):
    trainer = Trainer(tiny_digits, "polora-start", plan)
    started = trainer.run(0.3, seed=0)
    begin = [result.curve[0].validation.loss for result in (run.result, started.result)]
    assert begin[1] == pytest.approx(begin[0], rel=1e-4)
    assert started.result.status == "finished"
    assert started.result.curve[-1].validation.loss < 0.8 * begin[1]
    starts = [leaves(trainer.build_model(seed), nnx.LoRAParam) for seed in (0, 0, 1)]
    assert all(np.array_equal(x, y) for x, y in zip(starts[0], starts[1], strict=True))
    assert not any(np.allclose(x, y) for x, y in zip(starts[0], starts[2], strict=True))
    assert all(np.any(leaf) for leaf in starts[0])  # neither factor begins at zero


@pytest.mark.parametrize("method", ["adamw-pissa", "adamw-olora"])
def test_a_start_from_the_weights_keeps_the_model_and_begins_at_its_loss(
    method, run, tiny_digits, plan
):
    before = leaves(tiny_digits.build_model(0, LowRank()), nnx.Param)
    trainer = Trainer(tiny_digits, method, plan)
    started = trainer.run(1e-2, seed=0).result
    assert started.curve[0].validation.loss == pytest.approx(
        run.result.curve[0].validation.loss, rel=1e-4
    )
    assert started.curve[-1].validation.loss < 0.9 * started.curve[0].validation.loss
    assert started.config.method_options["start"] == {"method": method.removeprefix("adamw-")}
    after = leaves(tiny_digits.build_model(0, LowRank()), nnx.Param)
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(np.any(leaf) for leaf in leaves(trainer.build_model(0), nnx.LoRAParam))
