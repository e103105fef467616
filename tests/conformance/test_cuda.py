"""The backends on a CUDA device (make test-gpu)."""

import numpy as np
import pytest
import torch
from harness import Bench

pytestmark = pytest.mark.gpu
NS = [5, 40, 150, 90, 11]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_float64_parameters_are_the_cpu_oracles(optimizer):
    finals = {}
    for backend, device in (("loop", "cpu"), ("vmap", "cuda:0")):
        bench = Bench(backend, NS, device=device, widths=9, batch_size=16, optimizer=optimizer, check_every=10_000)
        state = bench.backend.init(bench.runs(range(5)))
        bench.backend.run(state, 200)
        finals[backend] = np.stack([bench.parameters(state, i) for i in range(5)])
    np.testing.assert_allclose(finals["vmap"], finals["loop"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("width", "batch_size"), [(1, 7), (5, 64), (17, "full")])
def test_company_changes_no_bit(width, batch_size):
    bench = Bench("vmap", NS, torch.float32, device="cuda:0", widths=width, batch_size=batch_size)
    whole, some = bench.backend.init(bench.runs(range(5))), bench.backend.init(bench.runs([3, 0]))
    bench.backend.run(whole, 30)
    bench.backend.run(some, 30)
    for position, k in enumerate([3, 0]):
        np.testing.assert_array_equal(bench.parameters(some, position), bench.parameters(whole, k))
