"""Flax NNX models that the tasks adapt."""
