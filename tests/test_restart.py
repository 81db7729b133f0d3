"""What restarts at the end of SDS-LoRA's warm-up: moments, and no count but their age."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowrank_optax import LoRAPair, frame, sds_lora
from lowrank_optax._core.restart import restart_moments

PARAMS = {"q": LoRAPair(jnp.ones((6, 2)), jnp.ones((2, 5))), "bias": jnp.ones(3)}
SCHEDULE = optax.linear_schedule(0.0, 0.1, 50)
ADAMW = optax.adamw(SCHEDULE)

INNER = {
    "adamw": ADAMW,
    "trace": optax.chain(optax.trace(0.9), optax.scale_by_schedule(SCHEDULE)),
    "multi steps": optax.MultiSteps(ADAMW, 3).gradient_transformation(),
    "multi steps within a chain": optax.chain(
        optax.clip(1.0),
        optax.MultiSteps(
            optax.inject_hyperparams(optax.adamw)(SCHEDULE), 3
        ).gradient_transformation(),
    ),
    "apply every": optax.chain(ADAMW, optax.apply_every(3)),
    "if finite": optax.apply_if_finite(ADAMW, 5),
    "masked": optax.masked(ADAMW, {"q": True, "bias": False}),
    "partition": optax.partition(
        {"pairs": ADAMW, "rest": optax.sgd(SCHEDULE, 0.9)}, {"q": "pairs", "bias": "rest"}
    ),
    "decay schedule": optax.adamw(SCHEDULE, weight_decay=optax.linear_schedule(0.0, 1.0, 9)),
    "amsgrad": optax.amsgrad(SCHEDULE),
    "muon": optax.contrib.muon(SCHEDULE),
}


WITH_MOMENTS = {"ScaleByAdamState", "ScaleByAmsgradState", "MuonState"}


def is_age(path):
    """Whether a leaf is the count of a state with moments."""
    return path.rpartition("/")[2] in {f"{state}.count" for state in WITH_MOMENTS}


def named_leaves(state):
    """Leaves by a path that names the types of the states above it."""

    def walk(node, prefix):
        if isinstance(node, LoRAPair) or not hasattr(node, "_fields"):
            children, _ = jax.tree_util.default_registry.flatten_one_level(node) or ([], None)
            if jax.tree_util.all_leaves([node]):
                yield prefix, node
            for index, child in enumerate(children if not jax.tree_util.all_leaves([node]) else []):
                yield from walk(child, f"{prefix}/{index}")
        else:
            for name in node._fields:
                yield from walk(getattr(node, name), f"{prefix}/{type(node).__name__}.{name}")

    return dict(walk(state, ""))


@pytest.mark.parametrize("name", INNER)
def test_moments_restart_and_counts_go_on(name):
    tx = INNER[name]
    state = fresh = tx.init(PARAMS)
    for _ in range(4):  # one more than a cycle of three
        _, state = tx.update(PARAMS, state, PARAMS)
    restarted = named_leaves(restart_moments(fresh, state, PARAMS, jnp.array(True)))
    before, new = named_leaves(state), named_leaves(fresh)
    assert restarted.keys() == before.keys()
    counts = 0
    for path, leaf in restarted.items():
        is_scalar = jnp.ndim(leaf) == 0
        expected = before[path] if is_scalar and not is_age(path) else new[path]
        counts += is_scalar and not is_age(path)
        np.testing.assert_array_equal(leaf, expected, err_msg=path)
    assert counts > 0
    kept = restart_moments(fresh, state, PARAMS, jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_the_schedule_inside_multi_steps_goes_on_through_the_switch():
    params = frame(PARAMS["q"])
    tx = sds_lora(optax.MultiSteps(ADAMW, 2), total_steps=100, warmup_steps=20)
    state, update = tx.init(params), jax.jit(tx.update)
    ones = jax.tree.map(jnp.ones_like, params)
    counts = []
    for _ in range(22):
        _, state = update(ones, state, params)
        counts.append(int(state.inner.inner_opt_state[2].count))
    assert counts == [step // 2 for step in range(1, 23)]


def test_moments_of_other_shapes_are_refused():
    """An accumulator that goes on with its values would be of the factors before the switch."""
    tx, params = sds_lora(optax.sm3(0.01), total_steps=20, warmup_steps=2), frame(PARAMS["q"])
    with pytest.raises(TypeError, match=r"an array of shape .*give it another one"):
        tx.update(params, tx.init(params), params)
