"""A training run that may be killed at any time: `python -m tests.kill_worker FOLDER`.

It trains every method for a few steps, saves parameters and state after each, and goes on from the
last whole checkpoint. It says what it is about to do, one line each, so that a test can kill it
there.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from lowrank_optax import LoRAPair, nn
from tests.conformance.methods import METHODS

STEPS = 3


def make_params(method):
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    node = method.node(LoRAPair(normal(0, 6, 2), normal(1, 2, 5)))
    return {"q": node, "bias": jnp.ones(5)}


def loss_of(params):
    y = nn.lora_apply(jnp.eye(6), params["q"], 2.0) + params["bias"]
    return jnp.sum((y - 1.0) ** 2)


def say(text):
    print(text, flush=True)


def train(method, folder: Path, checkpointer) -> None:
    """Trains one method to the end, from where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    tx, params = method(), make_params(method)
    state = jax.jit(tx.init)(params)
    done = max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
    if done:
        target = {"params": params, "state": state}
        restored = checkpointer.restore(folder / str(done), target)
        params, state = restored["params"], restored["state"]

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    for number in range(done + 1, STEPS + 1):
        say(f"step {number} {method.name}")
        params, state = step(params, state)
        say(f"save {number} {method.name}")
        checkpointer.save(folder / str(number), {"params": params, "state": state})
        checkpointer.wait_until_finished()


def main(folder: Path) -> None:
    checkpointer = ocp.StandardCheckpointer()
    for method in METHODS:
        if not (folder / method.name / str(STEPS)).exists():
            train(method, folder / method.name, checkpointer)
    say("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
