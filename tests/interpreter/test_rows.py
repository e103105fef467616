"""The fused head and update of the vmap path: against float64 references, the update bit for bit torch's."""

import dataclasses

import numpy as np
import pytest
import torch
from harness import Bench

from fasttrain import ScanSpec
from fasttrain.backends import vmap as vmap_module
from fasttrain.ensemble import Layout
from fasttrain.kernels import reference, rows
from fasttrain.optim import Rates, make_optimizer

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "clip": 0.5, "schedule": "cosine"}], ids=["", "all"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_update_has_the_bits_of_optim(name, options, dtype, monkeypatch):
    """Sizes that are no multiple of a block, models with rates of their own, over a few steps.

    The root is numpy's: that of torch on a CPU comes from MKL, which rounds some of them the other way.
    """
    monkeypatch.setattr(torch, "sqrt", lambda t, out: out.copy_(torch.as_tensor(np.sqrt(t.numpy()))))
    rng = torch.Generator().manual_seed(3)
    models, size = 3, rows.BLOCK + 77
    (plain,) = ScanSpec(widths=4).variants(10)
    variant = dataclasses.replace(plain, optimizer=name, **options)
    layout = Layout({"weight": (size,)})
    layout.size = size
    fused, optimizer = (make(variant, layout) for make in (vmap_module._fused_optimizer, make_optimizer))
    assert type(fused) is not type(optimizer)
    params = torch.randn(models, size, generator=rng).to(dtype)
    own, state = params.clone(), [torch.zeros(models, size, dtype=dtype) for _ in optimizer.state_names]
    theirs, other = params.clone(), [tensor.clone() for tensor in state]
    columns = [torch.tensor(row).double() for row in ([0.1, 0.003, 1.0], [0.9, 0.0, 0.5], [0.1, 0.0, 1.0])]
    rates = Rates(*columns, torch.tensor([9, 9, 9]))
    tables = optimizer.tables(torch.arange(1, 4)[:, None].expand(3, models), rates)
    for step in range(3):
        grads = torch.randn(models, size, generator=rng).to(dtype)
        row = [table[step].to(dtype)[:, None] for table in tables]
        assert fused.accumulator(state, row) is None
        fused.update(own, grads.clone(), state, row)
        into = optimizer.accumulator(other, row)
        if into is not None:
            into.add_(grads)
        optimizer.update(theirs, grads.clone(), other, row)
    assert torch.equal(own, theirs)
    for a, b in zip(state, other, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(own, params)


def batch(classes: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(classes)
    logits = (4 * torch.randn(3, size, classes, generator=rng)).to(dtype)
    onehot = torch.eye(classes, dtype=dtype)[torch.randint(classes, (3, size), generator=rng)]
    weight = torch.rand(3, size, generator=rng).to(dtype)
    weight[:, -1] = 0
    return logits, onehot, weight


@pytest.mark.parametrize(("classes", "size"), [(2, 1), (10, 33), (17, 70), (1000, 5)])
def test_the_head_is_the_references(classes, size):
    """float64, to the rounding of sums of so many terms."""
    logits, onehot, weight = batch(classes, size, torch.float64)
    losses, delta = rows.head(logits, onehot, weight)
    expected, gradient = reference.head(logits.mT, onehot.mT, weight)
    unit = 2.0**-53
    assert (losses - expected).abs().max() <= (size + classes + 8) * unit * expected.abs().max()
    assert (delta - gradient.mT).abs().max() <= (classes + 8) * unit


@pytest.mark.parametrize(("classes", "size"), [(2, 1), (10, 33), (17, 70), (1000, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_check_is_the_references(classes, size, dtype):
    """Ties, and samples that weigh nothing; the loss is computed in float64 from logits of either precision."""
    logits, onehot, weight = batch(classes, size, dtype)
    logits[1] = 1.0
    if size > 3:
        weight[0, 2] = 0
        logits[0, 3] *= 30
    found = rows.check(logits, onehot, weight)
    counts = weight > 0
    loss = (reference.cross_entropy(logits.double(), onehot.double()) * weight.double()).sum(1)
    wrong = (counts & ~reference.strictly_right(logits, onehot)).sum(1)
    assert found.dtype == torch.float64
    assert (found[0] - loss).abs().max() <= (size + classes + 8) * 2.0**-53 * loss.abs().max()
    assert found[1].tolist() == wrong.tolist()
    assert size == 1 or wrong[1] == counts[1].sum()


def test_what_is_not_finite_stays_with_its_model():
    logits, onehot, weight = batch(10, 33, torch.float64)
    clean_losses, clean_delta = rows.head(logits, onehot, weight)
    for poison in (NAN, float("inf")):
        bad = logits.clone()
        bad[1, 4, 2] = poison
        losses, delta = rows.head(bad, onehot, weight)
        assert not torch.isfinite(losses[1])
        assert torch.equal(losses[[0, 2]], clean_losses[[0, 2]])
        assert torch.equal(delta[[0, 2]], clean_delta[[0, 2]])
        found = rows.check(bad, onehot, weight)
        assert not torch.isfinite(found[0, 1])
        assert torch.isfinite(found[:, [0, 2]]).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adam"},
        {"optimizer": "sgd", "batch_size": "full"},
        {"optimizer": "adamw", "weight_decay": 0.1, "clip": 0.5, "label_smoothing": 0.1, "warmup": 3},
        {"optimizer": "sgd", "nesterov": True},
        {"optimizer": "shampoo"},
    ],
    ids=str,
)
def test_vmap_with_them_follows_the_oracle(fields):
    """The recorded graph with the fused head, and the fused update, in float64; losses, parameters and a check."""
    found = {}
    for name in ("loop", "vmap"):
        bench = Bench(name, [40, 5, 150], widths=6, **{"batch_size": 8, "check_every": 5, **fields})
        assert name == "loop" or bench.backend._fused
        state = bench.backend.init(bench.runs(range(3)))
        bench.backend.run(state, 12)
        found[name] = [bench.parameters(state, k) for k in range(3)], [run.monitor.history() for run in state.runs]
    for k in range(3):
        np.testing.assert_allclose(found["vmap"][0][k], found["loop"][0][k], rtol=1e-9, atol=1e-12)
        mine, oracle = found["vmap"][1][k], found["loop"][1][k]
        np.testing.assert_allclose(mine.train_loss, oracle.train_loss, rtol=1e-10)
        np.testing.assert_array_equal(mine.train_accuracy, oracle.train_accuracy)
        assert len(mine.step) == 2
