"""Experiments: one trainer, tasks, studies of overrides only, and one JSON file per run."""
