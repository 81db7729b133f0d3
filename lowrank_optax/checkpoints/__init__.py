"""Checkpoints of a training run: adapters, optimizer state, random state and step, by orbax."""

from lowrank_optax.checkpoints.runs import Checkpoint, read, restore, save, steps

__all__ = ["Checkpoint", "read", "restore", "save", "steps"]
