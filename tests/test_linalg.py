"""Small algebra where libraries below it fail."""

import os
import subprocess
import sys

# Independent batched inverses, which the CPU's scheduler runs side by side.
PROGRAM = """
import jax, jax.numpy as jnp
from lowrank_optax.engine import damped_inverse

@jax.jit
def inverses(seed):
    return [damped_inverse(jnp.broadcast_to((i + seed) * jnp.eye(64), (16, 64, 64)), 1e-6)
            for i in range(8)]

for _ in range(50):
    jax.block_until_ready(inverses(1.0))
"""


def test_many_inverses_at_once_do_not_block_the_thread_pool():
    """Batched LAPACK calls in parallel wait for each other for ever on a machine with few cores."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
