"""OPLoRA against trajectories of the released code (zeligism/PSI-LoRA, 9cb3fa6) in float64."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import (
    LoRAPair,
    Metric,
    ShadowedPair,
    lorsum,
    nn,
    oplora,
    oplora_proj,
    scaled_oplora,
    shadow,
)

pytestmark = pytest.mark.usefixtures("x64")

# What the released solver adds inside its inversions.
RELEASED = 1e-6

GOLDEN = pathlib.Path(__file__).parent / "golden"
STARTS = ["randB", "zeroB"]
KEY = jax.random.key(0)


def load(name, *arrays):
    """A golden file and its hyperparameters, all numbers but for the named ones."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        data = dict(file)
    names = {key[3:] for key in data if key.startswith("hp_")} - set(arrays)
    return data, {name: data[f"hp_{name}"].item() for name in names}


def trajectory(tx, data, params, correct=None):
    """The parameters after each step of the golden layer with its mini-batches.

    A correction of the parameters is one from outside, so the state begins anew after it.
    """
    kernel = jnp.asarray(data["W0"].T)

    def loss(params, x, y):
        error = x @ kernel + nn.lora_apply(x, params) - y
        return jnp.mean(jnp.sum(error**2, axis=-1))

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state, steps = tx.init(params), [params]
    for x, y in zip(data["X"], data["Y"], strict=True):
        params, state = step(params, state, x, y)
        if correct is not None:
            params = correct(params)
            state = tx.init(params)
        steps.append(params)
    return steps


def start(data, **keywords):
    pair = LoRAPair(jnp.asarray(data["A"][0].T), jnp.asarray(data["B"][0].T))
    node = shadow(pair, KEY, **keywords)
    if "M_A" in data and node.m_a is not None:
        node = node._replace(m_a=jnp.asarray(data["M_A"][0].T), m_b=jnp.asarray(data["M_B"][0].T))
    return node


def assert_follows(steps, data, names):
    for t, node in enumerate(steps):
        for field, name in names.items():
            np.testing.assert_allclose(
                getattr(node, field).T, data[name][t], rtol=0, atol=1e-10, err_msg=f"{name} at {t}"
            )


@pytest.mark.parametrize("begin", STARTS)
@pytest.mark.parametrize("name", ["oplora_k1_nomomentum", "oplora_k1", "oplora_k2"])
def test_oplora_follows_the_released_code(name, begin):
    data, hp = load(f"{name}_released_{begin}")
    tx = oplora(
        hp["lr"],
        hp["momentum"],
        dampening=hp["dampening"],
        iterations=hp["iters"],
        lmbd=hp["lmbd"],
        solver_damping=RELEASED,
    )
    steps = trajectory(tx, data, start(data, iterations=hp["iters"]))
    assert_follows(steps, data, {"a": "A", "b": "B", "m_a": "M_A", "m_b": "M_B"})


@pytest.mark.parametrize("begin", STARTS)
def test_oplora_proj_follows_the_released_code(begin):
    data, hp = load(f"oplora_proj_k1_released_{begin}")
    tx = oplora_proj(
        hp["lr"],
        hp["momentum"],
        iterations=hp["iters"],
        lmbd=hp["lmbd"],
        solver_damping=RELEASED,
    )
    node = start(data, iterations=hp["iters"] + 1, momentum_rank=0)
    assert_follows(trajectory(tx, data, node), data, {"a": "A", "b": "B"})


def scaled(hp, betas):
    """The optimizer of a golden file, and what its pair needs."""
    b1, b2 = betas
    power, damping = hp["metric_power"], hp["damping"]
    tx = scaled_oplora(
        hp["lr"],
        b1,
        b2,
        damping=damping,
        power=power,
        iterations=hp["iters"],
        lmbd=hp["lmbd"],
        solver_damping=RELEASED,
    )
    metric = Metric("kfac", b2=b2, damping=damping, power=power)
    return tx, {"iterations": hp["iters"], "metric": metric}


@pytest.mark.parametrize("begin", STARTS)
def test_scaled_oplora_follows_the_released_code(begin):
    data, hp = load(f"oplora_scaled_k1_released_{begin}", "betas")
    tx, keywords = scaled(hp, data["hp_betas"].tolist())
    names = {"a": "A", "b": "B", "m_a": "M_A", "m_b": "M_B", "d_in": "D_in", "d_out": "D_out"}
    assert_follows(trajectory(tx, data, start(data, **keywords)), data, names)


@pytest.mark.parametrize("begin", STARTS)
def test_scaled_oplora_without_iterations_follows_the_released_code(begin):
    """The released momentum does not move for k = 0; here it does, so it is reset to theirs."""
    data, hp = load(f"oplora_scaled_k0_released_{begin}", "betas")
    tx, keywords = scaled(hp, data["hp_betas"].tolist())
    theirs = {"m_a": jnp.asarray(data["M_A"][0].T), "m_b": jnp.asarray(data["M_B"][0].T)}
    assert np.all(data["M_A"] == data["M_A"][0])
    steps = trajectory(tx, data, start(data, **keywords), lambda params: params._replace(**theirs))
    assert_follows(steps, data, {"a": "A", "b": "B", "d_in": "D_in", "d_out": "D_out"})


@pytest.mark.parametrize("begin", STARTS)
def test_preconditioned_lora_is_oplora_without_iterations_and_momentum(begin):
    """Jacobi half-steps are gradient descent preconditioned by damped inverse Gram matrices."""
    data, hp = load(f"precond_sgd_released_{begin}")
    direction = oplora(1.0, 0.0, iterations=0, lmbd=hp["lmbd"] + RELEASED)
    tx = optax.chain(direction, optax.trace(hp["momentum"]), optax.scale(hp["lr"]))
    pair = LoRAPair(jnp.asarray(data["A"][0].T), jnp.asarray(data["B"][0].T))
    assert_follows(trajectory(tx, data, pair), data, {"a": "A", "b": "B"})


@pytest.mark.parametrize("iterations", [1, 2, 4, 16, 64])
def test_lorsum_follows_the_released_solver(iterations):
    data, hp = load("lorsum_released")
    terms = [LoRAPair(data[f"F{i}_in"].T, data[f"F{i}_out"].T) for i in range(3)]
    keywords = {"iterations": iterations, "ridge": hp["lmbd"], "damping": RELEASED}
    result = lorsum(terms, data["coefficients"], terms[0], **keywords)
    np.testing.assert_allclose(result.a.T, data[f"A_k{iterations}"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.b.T, data[f"B_k{iterations}"], rtol=0, atol=1e-10)


def test_many_iterations_of_lorsum_are_the_truncated_svd():
    data, _ = load("lorsum_released")
    terms = [LoRAPair(data[f"F{i}_in"].T, data[f"F{i}_out"].T) for i in range(3)]
    result = lorsum(terms, data["coefficients"], terms[0], iterations=150, ridge=0.0)
    np.testing.assert_allclose((result.a @ result.b).T, data["svd_r"], atol=1e-8)


def test_golden_starts_are_shadowed_pairs():
    data, _ = load("oplora_k2_released_randB")
    assert isinstance(start(data, iterations=2), ShadowedPair)
