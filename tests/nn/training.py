"""A training run of a model's adapters, as users write it."""

import optax
from flax import nnx


def train(model, tx, x, target, steps=60):
    """Trains the adapters in place, and returns the loss of every step."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    loss = lambda model: optax.l2_loss(model(x), target).mean()

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]
