"""A training run to be killed: `python -m tests.kill_worker FOLDER METHODS [LINE TOUCH]`.

It trains the methods of these names, separated by commas, for a few steps, saves parameters and
state after each, and goes on from the last whole checkpoint. It says what it is about to do, one
line each, so that a test can kill it there. After the line LINE it kills itself, when it touches
files in the folder for the time TOUCH.
"""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import LoRAPair, checkpoints, nn
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
    said.append(text)


said: list[str] = []


def kill_at(folder: Path, line: int, touch: int) -> None:
    """Arranges that this process is killed in the middle of a save."""
    touched = []

    def hook(event, arguments):
        paths = [x for x in arguments if isinstance(x, str | os.PathLike)]
        if len(said) >= line and any(str(x).startswith(str(folder)) for x in paths):
            touched.append(event)
            if len(touched) == touch:
                print(f"touch {event} {said[-1].split()[-1]}", flush=True)
                os.kill(os.getpid(), 9)

    sys.addaudithook(hook)


def train(method, folder: Path) -> None:
    """Trains one method to the end, from where it was."""
    tx, params = method(), make_params(method)
    state = jax.jit(tx.init)(params)
    done = max(checkpoints.steps(folder), default=0)
    if done:
        _, params, state, _ = checkpoints.restore(folder, params=params, opt_state=state)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    for number in range(done + 1, STEPS + 1):
        say(f"step {number} {method.name}")
        params, state = step(params, state)
        say(f"save {number} {method.name}")
        checkpoints.save(folder, number, params=params, opt_state=state, keep=2)


def main(folder: Path, names: list[str]) -> None:
    for method in METHODS:
        if method.name in names and STEPS not in checkpoints.steps(folder / method.name):
            train(method, folder / method.name)
    say("done")


if __name__ == "__main__":
    where, names, *when = sys.argv[1:]
    if when:
        kill_at(Path(where).absolute(), *map(int, when))
    main(Path(where).absolute(), names.split(","))
