"""Triton's kernels on the CPU, under its interpreter: ``TRITON_INTERPRET=1 python -m pytest tests/interpreter``.

In a process of their own, since the variable acts when a kernel is defined; elsewhere nothing here is collected, and
pytest called on this folder fails for finding no tests.
"""

import os

import numpy as np
import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _numbers_that_are_none():
    """Kernels compute with infinities and NaN on purpose; a GPU does not warn of it, and numpy shall not."""
    with np.errstate(all="ignore"):
        yield
