"""Benchmarks: ratios measured in one process, written with versions and machine."""
