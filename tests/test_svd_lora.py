"""SVDLoRA against dense NumPy trajectories in float64, and what users of optax rely on."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, frame, pair_of_delta, svd_lora
from lowrank_optax._core.decompositions import svd

RANK = 2
SHAPES = [(6, 5), (4, 7), (3, 6, 5), (2, 3, 4, 5)]


def nearest(matrix, rank):
    """The nearest matrix of a rank, in NumPy."""
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def momentum_sgd(rate=0.1, decay=0.9):
    trace = 0.0

    def step(grad, params):
        nonlocal trace
        trace = decay * trace + grad
        return -rate * trace

    return step


def adamw(rate=0.1, decays=(0.9, 0.999), weight_decay=0.1):
    count, mean, square = 0, 0.0, 0.0

    def step(grad, params):
        nonlocal count, mean, square
        count += 1
        mean = decays[0] * mean + (1 - decays[0]) * grad
        square = decays[1] * square + (1 - decays[1]) * grad**2
        unbiased = [m / (1 - d**count) for m, d in zip((mean, square), decays, strict=True)]
        return -rate * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + weight_decay * params)

    return step


INNER = {
    "sgd": (lambda: optax.sgd(0.1, 0.9), momentum_sgd),
    "adamw": (lambda: optax.adamw(0.1, weight_decay=0.1), adamw),
}


def problem(shape, dtype=jnp.float64):
    """A start of full rank, and the gradient of an ill-conditioned quadratic."""
    keys = jax.random.split(jax.random.key(0), 3)
    start, target, slope = (jax.random.normal(key, shape, dtype) for key in keys)
    return start, lambda x: (1 + slope**2) * (x - target)


def train(tx, params, gradient, steps):
    update, state = jax.jit(tx.update), tx.init(params)
    trajectory = []
    for _ in range(steps):
        updates, state = update(jax.tree.map(gradient, params), state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", INNER)
def test_steps_are_the_truncated_svd_of_the_inner_steps(name, shape):
    inner, oracle = INNER[name]
    start, gradient = problem(shape)
    step, expected = oracle(), np.asarray(start)
    for t, params in enumerate(train(svd_lora(inner(), RANK), start, gradient, steps=6)):
        grad = np.asarray(gradient(jnp.asarray(expected)))
        expected = nearest(expected + step(grad, expected), RANK)
        np.testing.assert_allclose(params, expected, rtol=0, atol=1e-11, err_msg=f"step {t}")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_parameters_have_the_rank_after_every_step(rank):
    start, gradient = problem((3, 6, 5))
    for params in train(svd_lora(optax.sgd(0.1, 0.9), rank), start, gradient, steps=4):
        values = np.linalg.svd(params, compute_uv=False)
        assert np.all(values[..., rank - 1] > 1e-2)
        np.testing.assert_allclose(values[..., rank:], 0, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_the_full_rank_leaves_the_inner_steps_as_they_are():
    start, gradient = problem((4, 7))
    inner = optax.adam(0.1)
    ours = train(svd_lora(inner, 4), start, gradient, steps=4)
    for params, expected in zip(ours, train(inner, start, gradient, steps=4), strict=True):
        np.testing.assert_allclose(params, expected, rtol=0, atol=1e-12)


def test_bfloat16_parameters_are_projected_in_float32():
    start, gradient = problem((6, 5), jnp.bfloat16)
    grad = gradient(start)
    tx = svd_lora(optax.scale(-1.0), RANK)  # exact in bfloat16
    updates, _ = tx.update(grad, tx.init(start), start)  # without jit, which may leave out rounding
    assert updates.dtype == jnp.bfloat16
    x, g = np.asarray(start, np.float64), np.asarray(grad, np.float64)
    half_ulp = 2.0**-8
    expected = nearest(x - g, RANK) - x
    np.testing.assert_allclose(np.asarray(updates, np.float64), expected, half_ulp, atol=1e-5)


def test_float32_updates_of_bfloat16_parameters_keep_the_dtype_of_the_parameters():
    start, gradient = problem((6, 5), jnp.bfloat16)
    tx = svd_lora(optax.sgd(0.1), RANK)
    updates, _ = tx.update(gradient(start).astype(jnp.float32), tx.init(start), start)
    assert updates.dtype == jnp.bfloat16


def test_no_recompilation_after_the_first_step():
    params, gradient = problem((6, 5), jnp.float32)
    tx = svd_lora(optax.adam(optax.linear_schedule(0.1, 0.0, 10)), RANK)
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for _ in range(3):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1


def stepper(tx, gradient):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(gradient, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return step


def test_a_scan_with_donated_carry_equals_a_loop():
    params, gradient = problem((3, 6, 5), jnp.float32)
    tx = svd_lora(optax.adam(0.1), RANK)
    expected = train(tx, params, gradient, steps=3)[-1]
    steps = lambda carry: jax.lax.scan(stepper(tx, gradient), carry, length=3)[0]
    carry = params, jax.jit(tx.init)(params)
    after, _ = jax.jit(steps, donate_argnums=0)(carry)
    assert params.is_deleted()
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_multi_steps_project_the_step_of_the_mean_gradient():
    params, gradient = problem((6, 5), jnp.float32)
    tx = optax.MultiSteps(svd_lora(optax.sgd(0.1), RANK), every_k_schedule=2)
    state, update = tx.init(params), jax.jit(tx.update)
    nothing, state = update(gradient(params), state, params)
    assert not jnp.any(nothing)
    updates, _ = update(3 * gradient(params), state, params)
    expected = nearest(params - 0.2 * gradient(params), RANK) - params
    np.testing.assert_allclose(updates, expected, atol=1e-5)


def test_a_gradient_that_is_not_finite_spoils_its_own_leaf_alone():
    params, gradient = problem((2, 6, 5), jnp.float32)
    tree = {"bad": params[0], "good": params[1]}
    grads = {"bad": gradient(params)[0].at[1, 2].set(jnp.nan), "good": gradient(params)[1]}
    tx = svd_lora(optax.sgd(0.1), RANK)
    updates, _ = jax.jit(tx.update)(grads, tx.init(tree), tree)
    assert not jnp.any(jnp.isfinite(updates["bad"]))
    expected = nearest(tree["good"] - 0.1 * grads["good"], RANK) - tree["good"]
    np.testing.assert_allclose(updates["good"], expected, atol=1e-5)


def test_export_for_accelerators():
    params, gradient = problem((3, 6, 5), jnp.float32)
    tx = svd_lora(optax.adam(0.1), RANK)
    step = jax.jit(lambda carry: stepper(tx, gradient)(carry, None)[0])
    exported = jax.export.export(step, platforms=["tpu", "cuda"])
    assert exported((params, tx.init(params))).platforms == ("tpu", "cuda")


def test_hyperparameters_of_the_inner_optimizer_can_be_injected():
    params, gradient = problem((6, 5), jnp.float32)
    tx = svd_lora(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), RANK)
    update, state = jax.jit(tx.update), tx.init(params)
    for rate in (0.1, 0.025):
        state.inner.hyperparams["learning_rate"] = jnp.asarray(rate)
        updates, state = update(gradient(params), state, params)
        expected = nearest(params - rate * gradient(params), RANK) - params
        np.testing.assert_allclose(updates, expected, atol=1e-5)
    assert update._cache_size() == 1


def test_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, factor, **extra_args):
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params, gradient = problem((6, 5), jnp.float32)
    tx = svd_lora(inner, RANK)
    updates, _ = tx.update(gradient(params), tx.init(params), params, factor=-0.5)
    expected = nearest(params - 0.5 * gradient(params), RANK) - params
    np.testing.assert_allclose(updates, expected, atol=1e-5)


def tree_with_a_bias():
    start, gradient = problem((6, 5), jnp.float32)
    params = {"kernel": start, "bias": jnp.ones(5)}
    return params, {"kernel": gradient(start), "bias": jnp.full(5, 2.0)}


def assert_kernel_is_projected(updates, params, grads):
    expected = nearest(params["kernel"] - 0.1 * grads["kernel"], RANK) - params["kernel"]
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-5)


def test_masked_leaves_are_left_to_others():
    params, grads = tree_with_a_bias()
    mask = {"kernel": True, "bias": False}
    tx = optax.masked(svd_lora(optax.sgd(0.1, 0.9), RANK), mask)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_kernel_is_projected(updates, params, grads)
    np.testing.assert_array_equal(updates["bias"], grads["bias"])


def test_partition_gives_leaves_to_other_optimizers():
    params, grads = tree_with_a_bias()
    parts = {"low_rank": svd_lora(optax.sgd(0.1), RANK), "free": optax.sgd(1.0)}
    tx = optax.partition(parts, {"kernel": "low_rank", "bias": "free"})
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_kernel_is_projected(updates, params, grads)
    np.testing.assert_array_equal(updates["bias"], -grads["bias"])


@pytest.mark.parametrize("absent", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_absent_leaves_stay_absent(absent):
    params, grads = tree_with_a_bias()
    params["bias"] = grads["bias"] = absent
    tx = svd_lora(optax.sgd(0.1, 0.9), RANK)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates["bias"] == absent
    assert_kernel_is_projected(updates, params, grads)


@pytest.mark.parametrize(
    ("rank", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_rank_that_is_none_is_refused_at_once(rank, error):
    with pytest.raises(error, match="`rank` must be"):
        svd_lora(optax.sgd(0.1), rank)
    with pytest.raises(error, match="`rank` must be"):
        pair_of_delta(jnp.ones((6, 5)), rank)


def test_the_inner_optimizer_must_be_one():
    with pytest.raises(TypeError, match="`inner` must be an optax transformation, got 0"):
        svd_lora(0.1, RANK)


@pytest.mark.parametrize(
    ("leaf", "rank", "error", "message"),
    [
        (jnp.ones(5), 1, ValueError, r"block/w: a matrix .* got \(5,\).* `optax.masked`"),
        (jnp.ones((6, 5), int), 1, TypeError, r"block/w: a floating matrix .*int.* `optax.masked`"),
        (jnp.ones((6, 5)), 6, ValueError, r"block/w: the rank .* \(6, 5\), got 6: .*`optax.masked"),
    ],
    ids=["one axis", "integers", "rank too high"],
)
def test_leaves_that_cannot_be_projected_are_named(leaf, rank, error, message):
    params = {"block": {"w": leaf}}
    tx = svd_lora(optax.sgd(0.1), rank)
    with pytest.raises(error, match=message):
        tx.init(params)
    state = svd_lora(optax.sgd(0.1), RANK).init(jnp.ones((6, 5)))
    with pytest.raises(error, match=message):
        tx.update(params, state, params)
    with pytest.raises(error, match=message.split(".*")[0].replace("block/w", "delta")):
        pair_of_delta(leaf, rank)


@pytest.mark.parametrize("node", [lambda p: p, lambda p: frame(p, jax.random.key(0))])
def test_pairs_are_no_dense_updates(node):
    pair = node(LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 5))))
    with pytest.raises(ValueError, match=r"block: svd_lora works on the dense ΔK.*Pair"):
        svd_lora(optax.sgd(0.1), 1).init({"block": pair})


def test_update_needs_the_parameters():
    tx = svd_lora(optax.sgd(0.1), RANK)
    params = jnp.ones((6, 5))
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        tx.update(params, tx.init(params))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair_of_delta_is_the_nearest_pair_and_balanced(shape):
    delta, _ = problem(shape)
    pair = pair_of_delta(delta, RANK)
    np.testing.assert_allclose(pair.a @ pair.b, nearest(delta, RANK), rtol=0, atol=1e-12)
    values = np.linalg.svd(delta, compute_uv=False)[..., :RANK]
    for gram in (pair.a.mT @ pair.a, pair.b @ pair.b.mT):
        np.testing.assert_allclose(gram, values[..., None] * np.eye(RANK), rtol=0, atol=1e-12)


def test_pair_of_bfloat16_is_float32():
    delta, _ = problem((6, 5), jnp.bfloat16)
    pair = pair_of_delta(delta, RANK)
    assert pair.a.dtype == pair.b.dtype == jnp.float32
    np.testing.assert_allclose(pair.a @ pair.b, nearest(delta, RANK), atol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_singular_values_of_a_matrix_that_is_not_finite_are_nan(bad):
    matrices = jnp.stack([jnp.eye(3, 4), jnp.eye(3, 4).at[1, 2].set(bad)])
    _, values, _ = svd(matrices)
    np.testing.assert_array_equal(values, [[1, 1, 1], [np.nan] * 3])


# Independent decompositions of stacked layers, which the CPU's scheduler runs side by side.
MANY_LEAVES = """
import jax, jax.numpy as jnp, optax
from lowrank_optax import svd_lora

params = [jax.random.normal(jax.random.key(i), (16, 64, 64)) for i in range(8)]
tx = svd_lora(optax.sgd(0.1), 4)
update, state = jax.jit(tx.update), tx.init(params)
for _ in range(30):
    updates, state = jax.block_until_ready(update(params, state, params))
"""


def test_many_decompositions_at_once_do_not_block_the_thread_pool():
    """Batched LAPACK calls in parallel wait for each other for ever on a machine with few cores."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_LEAVES],
        # One BLAS thread: more only spin, ten times slower on a busy machine.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"},
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
