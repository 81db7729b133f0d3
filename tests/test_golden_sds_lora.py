"""SDS-LoRA against trajectories of its equations in float64, the whole schedule included."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, frame, nn, sds_lora

pytestmark = pytest.mark.usefixtures("x64")

GOLDEN = pathlib.Path(__file__).parent / "golden"
INNER = {
    "sgd": optax.sgd,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.0),
}


@pytest.mark.parametrize("begin", ["randB", "zeroB"])
@pytest.mark.parametrize("inner", INNER)
def test_the_whole_schedule(inner, begin):
    with np.load(GOLDEN / f"sds_lora_equations_{inner}_{begin}.npz") as file:
        data = dict(file)
    hp = {name[3:]: data[name].item() for name in data if name.startswith("hp_")}
    scale = hp["scale"]
    params = frame(LoRAPair(jnp.asarray(data["A"][0].T), jnp.asarray(data["B"][0].T)))
    tx = sds_lora(
        INNER[inner](hp["lr"]),
        total_steps=hp["total_steps"],
        warmup_steps=hp["warmup_steps"],
        phases=hp["phases"],
        scale=scale,
    )

    def delta(params):
        return nn.lora_apply(jnp.eye(params.a.shape[0]), params, scale)

    def loss(params):
        return 0.5 * jnp.sum((delta(params) - data["target"].T) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    # Singular vectors are determined up to their signs, which all that follows keeps.
    first = int(np.argmax(data["active"]))
    signs = {}

    def check(t, params):
        assert_same = lambda x, name: np.testing.assert_allclose(
            x, data[name][t], rtol=0, atol=1e-10, err_msg=f"{name} at {t}"
        )
        if t == first:
            signs["of all"] = jnp.sign(jnp.sum(params.f_in * data["QA"][t], axis=0))
        sign = signs.get("of all", 1.0)
        assert_same((params.a * sign).T, "A")
        assert_same(params.b.T * sign, "B")
        assert_same(delta(params).T, "dW")
        assert bool(data["active"][t]) == (params.warm.item() == 0.0)
        if data["active"][t]:
            assert_same(params.f_in * sign, "QA")
            assert_same(params.f_out.T * sign, "QB")

    state, refreshed = tx.init(params), []
    check(0, params)
    for t in range(hp["total_steps"]):
        before = params
        value, params, state = step(params, state)
        np.testing.assert_allclose(value, data["loss"][t], rtol=0, atol=1e-10)
        check(t + 1, params)
        if before.warm == 0.0 and jnp.any(params.f_in != before.f_in):
            refreshed.append(t + 1)
    assert refreshed == data["refresh_steps"].tolist()
    assert step._cache_size() == 1
