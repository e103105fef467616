"""Shared by all tests."""

import os

# Before torch loads OpenMP: spinning threads stall the tests of two threads on a machine shared with others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import fasttrain  # isort: skip  (before torch: it sets how BLAS and OpenMP behave)

import pytest
import torch

assert fasttrain.__version__


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread unless a test asks for two: threads that wait by spinning stall on a machine shared with others."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
