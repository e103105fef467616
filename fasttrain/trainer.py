"""Slots: probes of several shapes side by side; whoever ends leaves at once and the next one takes its place."""

import concurrent.futures
import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttrain.backends.base import Backend, Report, Run, Setting
from fasttrain.errors import UserError
from fasttrain.heldout import Keeper
from fasttrain.machine import free_memory, out_of_memory
from fasttrain.plan import bucket
from fasttrain.records import Probe, ProbeResult, Problem, Saved
from fasttrain.spec import Variant

MakeBackend = Callable[[Setting, Variant], Backend[Any]]

_TURN_SECONDS = 0.02  # a worker's turn with one model, long beside what handing it over costs
_FILLED = 4  # runs of a lane before the next one is used: a step of fewer costs about as much
_WAITING_THREADS = 256  # at most, each for a state in another process

_Key = tuple[Variant, int]
"""A bucket, and the lane of it: a state of its own with a backend of its own."""


@dataclass(slots=True, eq=False)
class _Group:
    """Runs that one call of a backend steps together.

    Attributes:
        key: their bucket and lane.
        backend: of the bucket and lane.
        state: holds the runs.
        checks: checks that a worker makes before it gives the group back.
    """

    key: _Key
    backend: Backend[Any]
    state: Any
    checks: int

    def turn(self) -> tuple[Report, float]:
        """Steps until some run ends or the turn is over; what was done, and the seconds."""
        begin = time.perf_counter()
        # Of runs that are checked at different steps, those that are checked most rarely.
        every = max(run.monitor.rules.check_every for run in self.state.runs)
        report = self.backend.run(self.state, self.state.clock + self.checks * every)
        return report, report.seconds or time.perf_counter() - begin


@dataclass(slots=True)
class Load:
    """What the slots did so far.

    Attributes:
        model_steps: optimizer steps, summed over the probes.
        slot_steps: optimizer steps that all slots together could have made meanwhile; shapes take parts of a slot.
        launches: kernels that the triton backend launched.
        step_seconds: time inside the backend.
        check_seconds: of that, time in evaluations for checks; 0 where they are a part of the kernels that train.
        retreats: times that memory did not reach, and the slots were halved.
    """

    model_steps: int = 0
    slot_steps: float = 0.0
    launches: int = 0
    step_seconds: float = 0.0
    check_seconds: float = 0.0
    retreats: int = 0

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
        workers: threads for the backends that may use several.
        bucket: the key of the bucket of a variant; itself a variant.
        keeper: looks at the parameters of runs before they leave.
        elapsed: seconds of the scan before this.
        begun: runs that go on from where they were, once they are submitted.
    """

    def __init__(
        self,
        setting: Setting,
        problems: Sequence[Problem],
        make_backend: MakeBackend,
        slots: int,
        workers: int = 1,
        bucket: Callable[[Variant], Variant] = bucket,
        keeper: Keeper | None = None,
        elapsed: float = 0.0,
        begun: Mapping[Probe, Saved] | None = None,
    ) -> None:
        self.load = Load()
        self.slots = slots
        self._setting = setting
        self._problems = problems
        self._make_backend = make_backend
        self._bucket = bucket
        self._keeper = keeper
        self._waiting: deque[Probe] = deque()
        self._backends: dict[_Key, Backend[Any]] = {}
        self._turn: deque[_Group] = deque()
        self._arrived: dict[_Key, list[Run]] = {}  # for groups that are in the hands of a worker
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="fasttrain")
        self._waiters = concurrent.futures.ThreadPoolExecutor(_WAITING_THREADS, thread_name_prefix="fasttrain-waits")
        self._working: dict[concurrent.futures.Future[tuple[Report, float]], _Group] = {}
        self._origin = time.perf_counter() - elapsed
        self._begun = dict(begun or {})
        self._resting = False  # groups are kept back after their turn
        self._started: dict[Probe, float] = {}
        self._seconds: dict[Probe, float] = {}

    def submit(self, probes: Sequence[Probe]) -> None:
        """Adds probes to those that wait for a slot."""
        self._waiting.extend(probes)

    @property
    def running(self) -> int:
        """Probes in slots."""
        groups = (*self._turn, *self._working.values())
        return sum(len(group.state.runs) for group in groups) + sum(map(len, self._arrived.values()))

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._turn and not self._working and not self._waiting

    def advance(self) -> list[ProbeResult]:
        """Steps the next group for a turn (at most), or waits for a worker; the results that this brought."""
        self._refill()
        results: list[ProbeResult] = []
        if self._turn:
            group = self._turn.popleft()
            with self._retreating(group.key, group.state.runs):
                results += self._settle(group, *group.turn())
            wait = 0.0
        else:
            wait = None
        return results + self._collected(wait)

    def _collected(self, wait: float | None) -> list[ProbeResult]:
        """The results of workers that have ended their turn, after so many seconds at most."""
        results: list[ProbeResult] = []
        if self._working:
            done, _ = concurrent.futures.wait(self._working, wait, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                group = self._working.pop(future)
                with self._retreating(group.key, group.state.runs):
                    report, took = future.result()
                    if took < _TURN_SECONDS:
                        group.checks *= 2
                    results += self._settle(group, report, took)
        return results

    def saved(self, take: Callable[[list[ProbeResult]], None]) -> dict[Probe, Saved]:
        """Every run under way, as it is once all turns have ended.

        Args:
            take: is given the results that come meanwhile, at once.
        """
        self._resting = True
        while self._working:
            take(self._collected(None))
        self._resting = False
        found: dict[Probe, Saved] = {}
        now = time.perf_counter() - self._origin
        for group in self._turn:
            for run, saved in zip(group.state.runs, group.backend.saved(group.state), strict=True):
                clock = np.array([self._started[run.probe], self._seconds[run.probe], now])
                found[run.probe] = saved | {"clock": clock}
        groups, self._turn = self._turn, deque()
        for group in groups:
            self._dispatch(group)
        # Those that wait for a slot, to go on where an earlier part of the scan left them.
        return found | self._begun

    @contextlib.contextmanager
    def _retreating(self, key: _Key, runs: Sequence[Run]) -> Iterator[None]:
        """Where memory does not reach for a state: half of the slots, and its runs once more from their start.

        A step may have been cut short in the middle, so that nothing of its state is to be trusted. A run from its
        start is the same run.

        Raises:
            UserError: it does not reach for a single run.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            again = [*runs, *self._arrived.pop(key, [])]
            if self.slots <= 1:
                variant = again[0].problem.variant
                told = f"memory does not reach for one model of width {variant.width} and depth {variant.depth}"
                raise UserError("widths", variant.width, told) from None
            self.slots = max(self.slots // 2, 1)
            self.load.retreats += 1
            self._waiting.extendleft(run.probe for run in reversed(again))
        else:
            return
        # Outside of the handler: the traceback holds on to what is to be freed.
        free_memory(self._setting.device)

    def _settle(self, group: _Group, report: Report, took: float) -> list[ProbeResult]:
        """Books what a group's turn did, and lets it go on with the runs that it has left."""
        runs = group.state.runs
        running = self.running + len(runs)
        self.load.step_seconds += took
        self.load.check_seconds += report.check_seconds
        self.load.model_steps += report.model_steps
        self.load.launches += report.launches
        # All groups share the slots: while this one steps, its share of the idle slots idles too.
        self.load.slot_steps += report.model_steps * self.slots / running
        for run in runs:
            self._seconds[run.probe] += took / len(runs)
        results = [self._timed(self._kept(group, position, result)) for position, result in report.ended]
        # Taken off the list once a state has them: where memory does not reach for it, they are to be found there.
        arrived = self._arrived.get(group.key, [])
        if report.ended:
            gone = {position for position, _ in report.ended}
            keep = [i for i in range(len(runs)) if i not in gone]
            if not keep:
                if arrived:
                    new = self._group(group.key, group.backend, arrived)
                    del self._arrived[group.key]
                    self._dispatch(new)
                return results
            group.state = group.backend.select(group.state, keep)
        if arrived:
            group.state = group.backend.insert(group.state, arrived)
            del self._arrived[group.key]
            group.checks = group.backend.checks_a_turn  # more models take longer
        self._dispatch(group)
        return results

    def _kept(self, group: _Group, position: int, result: ProbeResult) -> ProbeResult:
        """With what is to be known of a run's parameters, which are gone once its slot is free."""
        run, keeper = group.state.runs[position], self._keeper
        if keeper is None:
            return result
        if not result.fitted:
            kept = group.backend.parameters(group.state, position) if keeper.save_failed else None
            return dataclasses.replace(result, weights=kept)
        if not keeper.wanted(run):
            return result
        parameters = group.backend.parameters(group.state, position)
        return dataclasses.replace(
            result,
            test_accuracy=keeper.accuracy(run, parameters),
            weights=parameters if keeper.save_weights else None,
        )

    def _dispatch(self, group: _Group) -> None:
        if self._resting or not group.backend.in_threads:
            self._turn.append(group)
        else:
            pool = self._pool if group.backend.lanes == 1 else self._waiters
            self._working[pool.submit(group.turn)] = group

    def close(self) -> None:
        """Ends the workers, each after its turn; what they ran is dropped."""
        for pool in (self._pool, self._waiters):
            pool.shutdown(wait=True, cancel_futures=True)

    def _refill(self) -> None:
        """Gives free slots to waiting probes, first come first served, all probes of a shape in one insertion."""
        new: dict[_Key, list[Run]] = {}
        for _ in range(min(len(self._waiting), self.slots - self.running)):
            probe = self._waiting.popleft()
            problem = self._problems[probe.variant]
            begun = self._begun.pop(probe, None)
            clock = (time.perf_counter() - self._origin, 0.0) if begun is None else begun["clock"].tolist()
            self._started[probe], self._seconds[probe] = clock[:2]
            run = Run.of(self._setting, problem, probe, begun)
            new.setdefault(self._lane(self._bucket(problem.variant), new), []).append(run)
        for key, runs in new.items():
            backend = self._backend(key)
            most = backend.most_together or len(runs)
            if backend.most_together is None and any(group.key == key for group in self._working.values()):
                self._arrived.setdefault(key, []).extend(runs)
                continue
            group = next((group for group in self._turn if group.key == key), None)
            if backend.most_together is None and group is not None:
                self._turn.remove(group)
                with self._retreating(key, [*group.state.runs, *runs]):
                    group.state = backend.insert(group.state, runs)
                    self._turn.append(group)
                continue
            for start in range(0, len(runs), most):
                some = runs[start : start + most]
                with self._retreating(key, some):
                    self._dispatch(self._group(key, backend, some))

    def _lane(self, bucket: Variant, new: Mapping[_Key, Sequence[Run]]) -> _Key:
        """The lane of a bucket that takes a run: the first that is not well filled, or the one with the fewest runs."""
        lanes = self._backend((bucket, 0)).lanes
        if lanes == 1:
            return bucket, 0
        load = [len(new.get((bucket, lane), ())) + len(self._arrived.get((bucket, lane), ())) for lane in range(lanes)]
        for group in self._working.values():
            if group.key[0] == bucket:
                load[group.key[1]] += len(group.state.runs)
        return bucket, next((lane for lane in range(lanes) if load[lane] < _FILLED), load.index(min(load)))

    def _backend(self, key: _Key) -> Backend[Any]:
        if key not in self._backends:
            self._backends[key] = self._make_backend(self._setting, key[0])
        return self._backends[key]

    @staticmethod
    def _group(key: _Key, backend: Backend[Any], runs: list[Run]) -> _Group:
        return _Group(key, backend, backend.init(runs), backend.checks_a_turn)

    def _timed(self, result: ProbeResult) -> ProbeResult:
        probe = result.probe
        return dataclasses.replace(
            result,
            started=self._started.pop(probe),
            finished=time.perf_counter() - self._origin,
            train_seconds=self._seconds.pop(probe),
        )
