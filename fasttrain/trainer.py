"""Slots: probes of several shapes side by side; whoever ends leaves at once and the next one takes its place."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fasttrain.backends.base import Backend, Run, Setting
from fasttrain.plan import bucket
from fasttrain.records import Probe, ProbeResult, Problem
from fasttrain.spec import Variant

MakeBackend = Callable[[Setting, Variant], Backend[Any]]


@dataclass(slots=True)
class Load:
    """What the slots did so far.

    Attributes:
        model_steps: optimizer steps, summed over the probes.
        slot_steps: optimizer steps that all slots together could have made meanwhile; shapes take parts of a slot.
        step_seconds: time inside the backend.
    """

    model_steps: int = 0
    slot_steps: float = 0.0
    step_seconds: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the slots that held a running probe, averaged over the steps."""
        return self.model_steps / self.slot_steps if self.slot_steps else 0.0


class Trainer:
    """Runs probes in slots; which probe runs beside which changes nothing in their results.

    Args:
        setting: what all runs share.
        problems: the variants, by index.
        make_backend: builds the backend of a bucket, given a variant of it.
        slots: probes that train at once.
    """

    def __init__(self, setting: Setting, problems: Sequence[Problem], make_backend: MakeBackend, slots: int) -> None:
        self.load = Load()
        self.slots = slots
        self._setting = setting
        self._problems = problems
        self._make_backend = make_backend
        self._waiting: deque[Probe] = deque()
        self._backends: dict[Variant, Backend[Any]] = {}
        self._states: dict[Variant, Any] = {}
        self._turn: deque[Variant] = deque()
        self._origin = time.perf_counter()
        self._started: dict[Probe, float] = {}
        self._seconds: dict[Probe, float] = {}

    def submit(self, probes: Sequence[Probe]) -> None:
        """Adds probes to those that wait for a slot."""
        self._waiting.extend(probes)

    @property
    def running(self) -> int:
        """Probes in slots."""
        return sum(len(state.runs) for state in self._states.values())

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._states and not self._waiting

    def advance(self) -> list[ProbeResult]:
        """Steps the next shape to its next check (at most); the results of the probes that ended there."""
        self._refill()
        if not self._turn:
            return []
        key = self._turn[0]
        self._turn.rotate(-1)
        backend, state = self._backends[key], self._states[key]
        running, before = self.running, state.clock
        begin = time.perf_counter()
        report = backend.run(state, before + self._setting.spec.check_every)
        took = time.perf_counter() - begin
        self.load.step_seconds += took
        self.load.model_steps += report.model_steps
        # All shapes share the slots: while this one steps, its share of the idle slots idles too.
        width = self.slots * len(state.runs) / running
        self.load.slot_steps += (state.clock - before) * width
        for run in state.runs:
            self._seconds[run.probe] += took / len(state.runs)
        results = [self._timed(result) for _, result in report.ended]
        if report.ended:
            gone = {position for position, _ in report.ended}
            self._keep(key, [i for i in range(len(state.runs)) if i not in gone])
        return results

    def _keep(self, key: Variant, keep: list[int]) -> None:
        if keep:
            self._states[key] = self._backends[key].select(self._states[key], keep)
        else:
            del self._states[key]
            self._turn.remove(key)

    def _refill(self) -> None:
        """Gives free slots to waiting probes, first come first served, all probes of a shape in one insertion."""
        new: dict[Variant, list[Run]] = {}
        for _ in range(min(len(self._waiting), self.slots - self.running)):
            probe = self._waiting.popleft()
            problem = self._problems[probe.variant]
            self._started[probe] = time.perf_counter() - self._origin
            self._seconds[probe] = 0.0
            run = Run.of(self._setting, problem, probe)
            new.setdefault(bucket(problem.variant), []).append(run)
        for key, runs in new.items():
            if key not in self._backends:
                self._backends[key] = self._make_backend(self._setting, key)
            backend = self._backends[key]
            if key in self._states:
                self._states[key] = backend.insert(self._states[key], runs)
            else:
                self._states[key] = backend.init(runs)
                self._turn.append(key)

    def _timed(self, result: ProbeResult) -> ProbeResult:
        probe = result.probe
        return dataclasses.replace(
            result,
            started=self._started.pop(probe),
            finished=time.perf_counter() - self._origin,
            train_seconds=self._seconds.pop(probe),
        )
