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
    """Runs of one bucket on one backend; run k takes the k-th (n, variant) of a fixed list."""

    def __init__(
        self, backend: str, ns: list[int], dtype=torch.float64, features: int = 7, device="cpu", **fields
    ) -> None:
        fields = {"check_every": 100, "data": f"gaussian:{features}", "seed": 5, **fields}
        self.spec = ScanSpec(**fields)
        self.variants = self.spec.variants(10)
        self.setting = Setting(self.spec, features, torch.device(device), dtype, describe(self.spec.data).shape)
        self.backend = make_backend(backend, self.setting, self.variants[0])
        self.ns = ns

    def runs(self, which) -> list[Run]:
        out = []
        for k in which:
            index = k % len(self.variants)
            problem = Problem(index, self.variants[index], 1, 1, 10**6)
            out.append(Run.of(self.setting, problem, Probe(index, self.ns[k], k)))
        return out

    def parameters(self, state, position: int) -> np.ndarray:
        return np.concatenate([p.ravel() for p in self.backend.parameters(state, position).values()])

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
