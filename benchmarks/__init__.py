"""Measurements of fasttrain against peers and against itself; run from a checkout with ``python -m benchmarks``."""
