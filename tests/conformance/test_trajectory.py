"""Every backend against the oracle: the same weights, batches, losses and final parameters."""

import functools

import numpy as np
import pytest
import torch
from harness import BATCHED, Bench

from fasttrain.backends import base

STEPS = 520
FIRST = 50
"""Steps before a path's own instability multiplies errors by what it likes."""


@pytest.fixture(autouse=True, scope="module")
def _orders_drawn_once():
    """The same sample orders serve every backend and precision, and drawing them takes more than half of a walk."""
    drawn = base.minibatches
    base.minibatches = functools.cache(drawn)
    yield
    base.minibatches = drawn


# Unequal n, some below the batch size of 16, one above a whole-set pass of 128 samples.
NS = [5, 40, 150, 90, 11]
CASES = [
    pytest.param({"optimizer": "adam", "lr": (0.003, 0.02), "depths": 1}, id="adam-1"),
    pytest.param({"optimizer": "adam", "lr": (0.003, 0.02), "depths": 2}, id="adam-2"),
    pytest.param({"optimizer": "sgd", "lr": (0.01, 0.1), "depths": 0}, id="sgd-0"),
    pytest.param({"optimizer": "sgd", "lr": (0.01, 0.1), "depths": 1}, id="sgd-1"),
    pytest.param({"optimizer": "sgd", "lr": (0.01, 0.05), "depths": 2, "activation": "tanh"}, id="sgd-2-tanh"),
    pytest.param({"optimizer": "sgd", "lr": (0.01, 0.1), "depths": 1, "batch_size": "full"}, id="sgd-1-full"),
    pytest.param({"optimizer": "adam", "lr": (0.003, 0.02), "depths": 0, "batch_size": "full"}, id="adam-0-full"),
]
# Every activation (the kernels approximate some themselves), three hidden layers, minibatches above a block of 128
# samples, and widths that are and are not whole vectors.
NATIVE_CASES = [
    *(
        pytest.param({"optimizer": "sgd", "lr": (0.01, 0.05), "depths": 2, "activation": name}, id=f"sgd-2-{name}")
        for name in ("leaky_relu", "gelu", "silu", "sigmoid", "identity")
    ),
    pytest.param({"optimizer": "adam", "lr": (0.003, 0.01), "depths": 3, "widths": 16}, id="adam-3-wide"),
    pytest.param(
        {"optimizer": "sgd", "lr": (0.01, 0.1), "widths": 50, "batch_size": 150, "classes": 9}, id="sgd-1-150"
    ),
]


BACKENDS = [
    pytest.param(backend, fields.values[0], id=f"{fields.id}-{backend}", marks=slow)
    for fields in [*CASES, *NATIVE_CASES]
    for backend in BATCHED
    # The activations of vmap are torch's; test_families has each of them once.
    for slow in [[pytest.mark.slow] if backend == "vmap" and fields in NATIVE_CASES else []]
]


def paths(backend: str, fields: dict, dtype: torch.dtype, nudge: float = 0.0, steps: int = STEPS):
    """``walk``, once for the oracle and each case."""
    key = (repr(fields), dtype, nudge, steps)
    if backend != "loop":
        return walk(backend, fields, dtype, nudge, steps)
    if key not in ORACLE:
        ORACLE[key] = walk(backend, fields, dtype, nudge, steps)
    return ORACLE[key]


ORACLE: dict = {}


def walk(backend: str, fields: dict, dtype: torch.dtype, nudge: float, steps: int):
    """Per-step minibatch losses [S, E] and final parameters of all runs, none of which is stopped early."""
    # A check interval beyond the budget: no run leaves, however well it fits.
    fields = {"widths": 9, "batch_size": 16, "classes": 4, "steps": 10_000, **fields, "check_every": 10_000}
    losses, finals, _ = Bench(backend, NS, dtype, **fields).walk(steps, nudge)
    return losses, finals


def largest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest relative difference of each run."""
    axis = 0 if a.shape[1] == len(NS) and a.shape[0] == STEPS else 1
    return np.abs(a - b).max(axis) / np.abs(b).max(axis)


@pytest.mark.parametrize(("backend", "fields"), BACKENDS)
def test_float64_trajectory_is_the_oracles_to_rounding(fields, backend):
    losses, finals = paths("loop", fields, torch.float64)
    # What rounding alone does to the oracle: its own path after inputs that differ by four units in the last place.
    nudged_losses, nudged_finals = paths("loop", fields, torch.float64, nudge=4 * 2.0**-52)
    own_losses, own_finals = paths(backend, fields, torch.float64)
    floor = 64 * 2.0**-52
    assert (largest(own_losses, losses) <= 30 * largest(nudged_losses, losses) + floor).all()
    assert (largest(own_finals, finals) <= 30 * largest(nudged_finals, finals) + floor).all()
    # The bound means something: rounding stays far below anything that a wrong step would do.
    assert largest(nudged_losses, losses).max() < 1e-8
    assert losses[-1].mean() < 0.9 * losses[0].mean()


@pytest.mark.parametrize(("backend", "fields"), BACKENDS)
def test_float32_error_is_no_larger_than_the_oracles(fields, backend):
    truth, _ = paths("loop", fields, torch.float64)
    loop, _ = paths("loop", fields, torch.float32, steps=FIRST)
    own, _ = paths(backend, fields, torch.float32, steps=FIRST)

    def error(x):
        return np.sqrt(((x - truth[:FIRST]) ** 2).mean())

    assert error(own) <= 4 * error(loop)


@pytest.mark.parametrize("batched", BATCHED)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_outcomes_checks_and_histories_agree(optimizer, batched):
    found = {}
    for backend in ("loop", batched):
        bench = Bench(
            backend, [4, 30, 60, 400, 20], widths=6, classes=3, optimizer=optimizer, lr=(0.02, 1e30),
            batch_size=8, steps=900, check_every=50,
        )  # fmt: skip
        _, results = bench.step(bench.backend.init(bench.runs(range(5))), 900)
        found[backend] = {(r.probe.n, r.probe.seed): r for r in results}
    assert found["loop"].keys() == found[batched].keys()
    assert len(found["loop"]) == 5
    for key, loop in found["loop"].items():
        own = found[batched][key]
        assert (loop.outcome, loop.steps, loop.fit_step) == (own.outcome, own.steps, own.fit_step)
        assert loop.train_error == own.train_error or np.isnan(loop.train_loss)
        np.testing.assert_array_equal(loop.history.step, own.history.step)
        np.testing.assert_allclose(own.history.train_loss, loop.history.train_loss, rtol=1e-7)
    # lr 1e30 makes the odd ones explode; they must not take the others along.
    outcomes = {seed: r.outcome for (_, seed), r in found[batched].items()}
    assert outcomes[0] == "fitted"
    assert {outcomes[0], outcomes[3]} > {"fitted"} or outcomes[3] != "diverged"


def test_loop_is_plain_torch():
    """The oracle itself against a script that shares nothing with it but data, batches and initial weights."""
    bench = Bench("loop", [40], widths=9, classes=4, batch_size=16, lr=0.01)
    (run,) = bench.runs([0])
    weights = {k: torch.tensor(v, requires_grad=True) for k, v in run.initial_weights(bench.setting).items()}
    x, y = torch.tensor(run.task.pool[run.task.rows]), torch.tensor(run.task.y)
    order = run.batches(60)
    adam = torch.optim.Adam(weights.values(), lr=0.01)
    for step in range(60):
        batch = order[step]
        hidden = (x[batch] @ weights["layers.0.weight"].T + weights["layers.0.bias"]).clamp(min=0)
        logits = hidden @ weights["layers.1.weight"].T + weights["layers.1.bias"]
        loss = -logits.softmax(1)[torch.arange(16), y[batch]].log().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    state = bench.backend.init(bench.runs([0]))
    bench.backend.run(state, 60)
    expected = np.concatenate([w.detach().numpy().ravel() for w in weights.values()])
    np.testing.assert_allclose(bench.parameters(state, 0), expected, rtol=1e-9, atol=1e-11)
