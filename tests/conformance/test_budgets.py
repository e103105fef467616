"""Budgets of each run's own: epochs at unequal n, and short runs beside full ones, on every backend."""

import functools
import math

import numpy as np
import pytest
import torch
from harness import BATCHED, Bench

from fasttrain.spec import SHORT

COSINE = {"schedule": "cosine", "warmup": 10}
SCHEDULED = ("vmap", "stacked")
SIDE_BY_SIDE = {"steps": 151, "check_every": 20, "seeds": (0, SHORT, 2, SHORT + 1, 4)}
NS = (40, 40, 25, 25, 120)


def results_of(backend: str, ns: tuple[int, ...], **fields) -> dict:
    """How all runs ended, by n and seed."""
    bench = Bench(backend, list(ns), **{"widths": 6, "classes": 3, "batch_size": 8, "lr": 0.02, **fields})
    _, results = bench.step(bench.backend.init(bench.runs(range(len(ns)))), 10_000)
    assert len(results) == len(ns)
    return {(r.probe.n, r.probe.seed): r for r in results}


oracle_of = functools.cache(functools.partial(results_of, "loop"))


def agree(found: dict, oracle: dict) -> None:
    """The same ends, checks and losses; these to what rounding makes of them in a few hundred steps."""
    assert found.keys() == oracle.keys()
    for key, loop in oracle.items():
        own = found[key]
        assert (own.outcome, own.steps, own.fit_step) == (loop.outcome, loop.steps, loop.fit_step)
        assert own.train_error == loop.train_error
        np.testing.assert_array_equal(own.history.step, loop.history.step)
        np.testing.assert_allclose(own.history.train_loss, loop.history.train_loss, rtol=1e-7)


@pytest.mark.parametrize("backend", BATCHED)
@pytest.mark.parametrize(("batch_size", "early_stop"), [(4, True), (4, False), ("full", False)])
def test_epochs_at_unequal_n_are_the_oracles(batch_size, early_stop, backend):
    ns, epochs = (4, 30, 97), 12
    fields = {"batch_size": batch_size, "early_stop": early_stop, "budget": f"{epochs}epochs", "check_every": 50}
    oracle = oracle_of(ns, **fields)
    agree(results_of(backend, ns, **fields), oracle)
    for (n, _), run in oracle.items():
        most = epochs if batch_size == "full" else math.ceil(epochs * n / 4)
        every = max(1, most // 100)
        assert run.steps == most if run.outcome == "out_of_budget" else run.steps < most
        assert run.history.step[0] == every
    assert oracle[97, 2].history.step[0] == (1 if batch_size == "full" else 2)
    assert str(oracle[97, 2].outcome) == ("plateaued" if early_stop else "out_of_budget")


@pytest.mark.parametrize(("backend", "fields"), [("native", {}), *((name, COSINE) for name in SCHEDULED)], ids=str)
def test_short_runs_beside_full_ones_are_the_oracles(backend, fields):
    fields = {"lr": 0.003, "early_stop": False, **SIDE_BY_SIDE, **fields}
    oracle = oracle_of(NS, **fields)
    agree(results_of(backend, NS, **fields), oracle)
    ends = {seed: run.steps for (_, seed), run in oracle.items() if run.outcome == "out_of_budget"}
    assert ends[SHORT] == ends[SHORT + 1] == 50  # of 151 / 3 = 50.3
    assert ends[0] == 151


@pytest.mark.parametrize("backend", ["loop", *SCHEDULED])
def test_a_short_run_has_the_schedule_of_its_own_budget(backend):
    """A linear classifier at full batch by hand: the rate falls from lr to lr / 10 in ten steps, not in thirty."""
    bench = Bench(
        backend, [20, 20], seeds=[0, SHORT], depths=0, classes=3, optimizer="sgd", momentum=0.0, lr=0.5,
        batch_size="full", schedule="linear", steps=30, check_every=30,
    )  # fmt: skip
    runs = bench.runs([0, 1])
    state = bench.backend.init(runs)
    bench.backend.run(state, 9)
    for position, (run, budget) in enumerate(zip(runs, (30, 10), strict=True)):
        x, onehot = run.task.pool[run.task.rows], np.eye(3)[run.task.y]
        weight, bias = run.initial_weights(bench.setting).values()
        for step in range(9):
            z = x @ weight.T + bias
            p = np.exp(z - z.max(1, keepdims=True))
            delta = (p / p.sum(1, keepdims=True) - onehot) / 20
            lr = 0.5 * (1 - step / budget)
            weight, bias = weight - lr * delta.T @ x, bias - lr * delta.sum(0)
        expected = np.concatenate([weight.ravel(), bias])
        np.testing.assert_allclose(bench.parameters(state, position), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("backend", "fields"),
    [
        ("native", SIDE_BY_SIDE),
        *((name, {**SIDE_BY_SIDE, **COSINE}) for name in SCHEDULED),
        *((name, {"budget": "20epochs", "seeds": SIDE_BY_SIDE["seeds"]}) for name in BATCHED),
    ],
    ids=str,
)
def test_company_of_other_budgets_changes_no_bit(backend, fields):
    """A short run alone, and among full ones in any order, some of which come and go while it runs."""
    bench = Bench(backend, list(NS), torch.float32, widths=5, batch_size=7, **fields)
    alone = bench.backend.init(bench.runs([3]))
    bench.backend.run(alone, 20)
    halfway = bench.parameters(alone, 0)
    _, (expected,) = bench.step(alone, 400)
    for company in ([0, 1, 2, 3, 4], [4, 3, 2, 0]):
        state = bench.backend.init(bench.runs(company))
        bench.backend.run(state, 20)
        np.testing.assert_array_equal(bench.parameters(state, company.index(3)), halfway)
        _, results = bench.step(state, 400)
        (own,) = (result for result in results if result.probe.seed == bench.seeds[3])
        assert (own.outcome, own.steps, own.train_loss) == (expected.outcome, expected.steps, expected.train_loss)
        np.testing.assert_array_equal(own.history.train_loss, expected.history.train_loss)
