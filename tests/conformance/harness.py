"""What the conformance tests share: settings, runs and backends."""

import numpy as np
import torch

from fasttrain.backends import make_backend
from fasttrain.backends.base import Run, Setting
from fasttrain.data import describe
from fasttrain.records import Probe, Problem
from fasttrain.spec import ScanSpec

BATCHED = ("vmap", "stacked", "native")
"""The backends that are held to the oracle."""


class Bench:
    """Runs of one bucket on one backend; run k takes the k-th n, seed (k unless given) and variant of fixed lists."""

    def __init__(
        self, backend: str, ns: list[int], dtype=torch.float64, features: int = 7, device="cpu", seeds=None, **fields
    ) -> None:
        fields = {"check_every": 100, "data": f"gaussian:{features}", "seed": 5, **fields}
        self.spec = ScanSpec(**fields)
        self.variants = self.spec.variants(10)
        self.setting = Setting(self.spec, features, torch.device(device), dtype, describe(self.spec.data).shape)
        self.backend = make_backend(backend, self.setting, self.variants[0])
        self.ns, self.seeds = ns, range(len(ns)) if seeds is None else seeds

    def runs(self, which, begun=None) -> list[Run]:
        out = []
        for k in which:
            index = k % len(self.variants)
            problem = Problem(index, self.variants[index], 1, 1, 10**6)
            out.append(Run.of(self.setting, problem, Probe(index, self.ns[k], self.seeds[k]), begun and begun.get(k)))
        return out

    def parameters(self, state, position: int) -> np.ndarray:
        return np.concatenate([p.ravel() for p in self.backend.parameters(state, position).values()])

    def final(self, state, position: int) -> np.ndarray:
        """Parameters of a run, and its loss and samples not right over the whole training set."""
        losses, wrong = self.backend._evaluate(state)
        return np.append(self.parameters(state, position), [losses[position], wrong[position]])

    def trained(self, which, steps: int):
        """A state of some runs after so many steps."""
        state = self.backend.init(self.runs(which))
        self.backend.run(state, steps)
        return state

    def assert_company_changes_no_bit(self, companies, steps: int) -> None:
        """Runs in some companies, each in its own order, against all of them together."""
        whole = self.trained(range(len(self.ns)), steps)
        expected = [self.final(whole, i) for i in range(len(self.ns))]
        assert all(np.isfinite(e).all() for e in expected)
        for company in companies:
            state = self.trained(company, steps)
            for position, k in enumerate(company):
                np.testing.assert_array_equal(self.final(state, position), expected[k])

    def assert_insertion_changes_no_bit(self, inserted: int, dropped: int, steps: int) -> None:
        """Run 3 alone, against itself in a slot freed after ``inserted`` steps, with neighbours until ``dropped``."""
        alone = self.trained([3], steps)
        state = self.trained([0, 4, 7], inserted)
        state = self.backend.insert(self.backend.select(state, [2, 0]), self.runs([8, 3]))
        self.backend.run(state, dropped)
        state = self.backend.select(state, [1, 3])
        self.backend.run(state, inserted + steps)
        np.testing.assert_array_equal(self.final(state, 1), self.final(alone, 0))

    def assert_an_explosion_touches_nobody_else(self, steps: int) -> None:
        """The odd ones of six runs explode; the even ones against themselves without those."""
        state, calm = self.trained(range(6), steps), self.trained([4, 0, 2], steps)
        assert not np.isfinite(self.parameters(state, 1)).all()
        for position, k in enumerate([4, 0, 2]):
            np.testing.assert_array_equal(self.final(calm, position), self.final(state, k))

    def step(self, state, until: int):
        """Steps a state on, dropping the runs that end; yields (state, results)."""
        results = []
        while state is not None and state.clock < until:
            report = self.backend.run(state, until)
            results.extend(result for _, result in report.ended)
            if report.ended:
                gone = {position for position, _ in report.ended}
                keep = [i for i in range(len(state.runs)) if i not in gone]
                state = self.backend.select(state, keep) if keep else None
        return state, results

    def walk(self, steps: int, nudge: float = 0.0) -> tuple[np.ndarray, np.ndarray, list[Run]]:
        """All runs step by step, inputs times 1 + ``nudge``: minibatch losses [S, E], parameters [E, P], runs."""
        runs = self.runs(range(len(self.ns)))
        for run in runs:
            run.task = type(run.task)(run.task.pool * (1 + nudge), run.task.rows, run.task.y)
        state = self.backend.init(runs)
        losses = []
        for step in range(1, steps + 1):
            self.backend.run(state, step)
            losses.append([run.batch_loss for run in state.runs])
        return np.array(losses), np.stack([self.parameters(state, i) for i in range(len(runs))]), runs
