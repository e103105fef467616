"""A run's result depends on the run alone, bit for bit: company, order, slot, time of insertion, threads."""

import itertools

import numpy as np
import pytest
import torch
from harness import BATCHED, Bench

from fasttrain.activations import ACTIVATIONS

NS = [33, 5, 129, 300, 77, 1, 256, 131, 64, 201]
COMPANIES = [[3], [9, 3], [7, 2, 4], [5, 6, 7, 8], list(range(9, -1, -1)), [5, 6, 7, 8, 9, 0]]
STEPS = 12

EXACT = [
    {"widths": width, "batch_size": batch, "activation": "relu"}
    for width, batch in itertools.product((1, 5, 17), (1, 7, 64, "full"))
]
APPROXIMATED = [{"widths": 7, "batch_size": 5, "activation": name} for name, a in ACTIVATIONS.items() if not a.exact]
OTHERS = [
    {"widths": 5, "batch_size": 7, "depths": 2, "optimizer": "sgd"},
    {"depths": 0, "batch_size": 7, "optimizer": "sgd", "classes": 3},
    {"widths": 17, "batch_size": 33, "lr": (0.001, 0.01, 0.1)},
]


def ident(fields: dict) -> str:
    return "-".join(f"{value}" for value in fields.values())


@pytest.mark.parametrize(
    ("dtype", "threads"), [(torch.float32, (1, 2)), (torch.float64, (1,))], ids=["float32", "float64"]
)
@pytest.mark.parametrize("backend", BATCHED)
@pytest.mark.parametrize("fields", [*EXACT, *APPROXIMATED, *OTHERS], ids=ident)
def test_company_and_order_change_no_bit(fields, dtype, threads, backend):
    bench = Bench(backend, NS, dtype, **fields)  # one for all: recording its graphs takes most of the time
    for count in threads:
        torch.set_num_threads(count)
        bench.assert_company_changes_no_bit(COMPANIES, STEPS)


@pytest.mark.parametrize("backend", BATCHED)
@pytest.mark.parametrize("data", ["gaussian:7", "digits"])
@pytest.mark.parametrize("batch_size", [7, "full"])
def test_insertion_into_a_freed_slot_changes_no_bit(batch_size, data, backend):
    features = 7 if data != "digits" else 64
    bench = Bench(backend, NS, torch.float32, features, widths=5, batch_size=batch_size, data=data, check_every=10)
    bench.assert_insertion_changes_no_bit(inserted=10, dropped=20, steps=30)


@pytest.mark.parametrize("backend", BATCHED)
def test_block_length_changes_no_bit(backend):
    one, many = (Bench(backend, NS, torch.float32, widths=5, batch_size=7) for _ in range(2))
    a, b = one.backend.init(one.runs([1, 2, 3])), many.backend.init(many.runs([1, 2, 3]))
    one.backend.run(a, 60)
    for step in range(1, 61):
        many.backend.run(b, step)
    for i in range(3):
        np.testing.assert_array_equal(one.final(a, i), many.final(b, i))


@pytest.mark.parametrize("backend", BATCHED)
def test_a_model_that_explodes_touches_nobody_else(backend):
    # Variants alternate between the rates, so the odd runs explode.
    bench = Bench(backend, NS, torch.float32, widths=5, batch_size=7, optimizer="sgd", lr=(0.01, 1e30))
    bench.assert_an_explosion_touches_nobody_else(50)
