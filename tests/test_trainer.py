import dataclasses
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fasttrain import Outcome, ScanSpec
from fasttrain.backends.base import Report, Run, Setting
from fasttrain.errors import UserError
from fasttrain.plan import bucket
from fasttrain.records import Probe, ProbeResult, Problem
from fasttrain.spec import Variant
from fasttrain.trainer import Load, Trainer


@dataclass(slots=True, eq=False)
class FakeState:
    runs: list[Run]
    clock: int = 0


@dataclass(slots=True)
class Log:
    """What the trainer asked of all backends of one scan."""

    made: list[Variant] = field(default_factory=list)
    stepped: list[tuple[Variant, int, list[Probe]]] = field(default_factory=list)
    inserted: list[tuple[Variant, list[Probe]]] = field(default_factory=list)


class FakeBackend:
    """A run fits at the check number ``lasts(probe)``; it steps and checks as backends must."""

    name = "fake"
    most_together = None
    in_threads = False
    checks_a_turn = 1
    lanes = 1

    def __init__(self, variant: Variant, log: Log) -> None:
        self.variant = variant
        self.log = log
        log.made.append(variant)

    def _take(self, runs: Sequence[Run]) -> list[Run]:
        assert runs
        assert {bucket(run.problem.variant) for run in runs} == {self.variant}
        assert all(run.step == 0 for run in runs)
        self.log.inserted.append((self.variant, [run.probe for run in runs]))
        return list(runs)

    def init(self, runs: Sequence[Run]) -> FakeState:
        return FakeState(self._take(runs))

    def insert(self, state: FakeState, runs: Sequence[Run]) -> FakeState:
        return FakeState([*state.runs, *self._take(runs)], state.clock)

    def select(self, state: FakeState, keep: Sequence[int]) -> FakeState:
        assert keep
        return FakeState([state.runs[i] for i in keep], state.clock)

    def run(self, state: FakeState, until_step: int) -> Report:
        begun, made = state.clock, 0
        ended: list[tuple[int, ProbeResult]] = []
        while state.clock < until_step and not ended:
            steps = min(run.check_due(until_step - state.clock) for run in state.runs)
            for position, run in enumerate(state.runs):
                run.step += steps
                if run.at_check:
                    checks = len(run.monitor.history().step) + 1
                    wrong = int(checks < lasts(run.probe))
                    result = run.observe(0.5**checks, wrong)
                    if result is not None:
                        ended.append((position, result))
            state.clock += steps
            made += steps * len(state.runs)
        self.log.stepped.append((self.variant, state.clock - begun, [run.probe for run in state.runs]))
        return Report(ended, made, check_seconds=2.0**-20, launches=3)


def lasts(probe: Probe) -> int:
    """Checks until a probe fits: the seed says it."""
    return probe.seed


def setup(
    slots: int, widths: tuple[int, ...] = (4,), steps: int = 1000, check_every: int = 10, **fields: object
) -> tuple[Trainer, Log]:
    spec = ScanSpec(widths=widths, steps=steps, check_every=check_every, data="gaussian:2", **fields)
    setting = Setting(spec, 2, torch.device("cpu"), torch.float32)
    problems = [Problem(i, variant, 10, 2, 100) for i, variant in enumerate(spec.variants(10))]
    log = Log()
    return Trainer(setting, problems, lambda _, variant: FakeBackend(variant, log), slots), log


def drive(trainer: Trainer, most: int = 10_000) -> list[ProbeResult]:
    results: list[ProbeResult] = []
    while not trainer.idle and most:
        results += trainer.advance()
        assert trainer.running <= trainer.slots
        most -= 1
    assert trainer.idle
    return results


def some_probes(count: int, variants: int) -> list[Probe]:
    """Different lengths, 1 to 9 checks; n makes each a probe of its own."""
    return [Probe(variant=k * k % variants, n=2 + k, seed=1 + k * 7 % 9) for k in range(count)]


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 64])
def test_every_probe_comes_back_once_and_slots_are_never_exceeded(slots: int) -> None:
    trainer, log = setup(slots, widths=(4, 8, 16))
    probes = some_probes(40, 3)
    trainer.submit(probes)
    results = drive(trainer)
    assert len(results) == 40
    assert {result.probe for result in results} == set(probes)
    for result in results:
        assert result.outcome is Outcome.FITTED
        assert result.steps == result.fit_step == 10 * lasts(result.probe)
    # What was stepped at once, over all shapes: the shape's own runs, and those of the others in their slots.
    assert max(len(running) for _, _, running in log.stepped) <= slots


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_results_do_not_depend_on_the_number_of_slots(slots: int) -> None:
    def results(slots: int) -> dict[Probe, tuple[object, ...]]:
        trainer, _ = setup(slots, widths=(4, 8), steps=70)
        trainer.submit(some_probes(30, 2))
        return {
            r.probe: (r.outcome, r.steps, r.fit_step, r.train_loss, r.train_error, r.history.step.tolist())
            for r in drive(trainer)
        }

    expected = results(5)
    assert {outcome for outcome, *_ in expected.values()} == {Outcome.FITTED, Outcome.OUT_OF_BUDGET}
    assert results(slots) == expected


def test_a_result_passes_through_as_the_backend_reported_it_with_its_times() -> None:
    trainer, _ = setup(2)
    trainer.submit([Probe(0, 20, 3, round=5), Probe(0, 30, 5)])
    results = drive(trainer)
    assert [result.probe for result in results] == [Probe(0, 20, 3, round=5), Probe(0, 30, 5)]
    first = results[0]
    assert (first.outcome, first.steps, first.train_loss, first.train_error) == (
        Outcome.FITTED,
        30,
        0.125,
        0.0,
    )
    assert first.history.step.tolist() == [10, 20, 30]
    for result in results:
        assert 0 <= result.started < result.finished
        assert 0 < result.train_seconds <= result.finished - result.started
    assert results[0].finished <= results[1].finished
    # The time of a batch is shared among its runs, none of it twice and none lost.
    total = sum(result.train_seconds for result in results)
    assert total == pytest.approx(trainer.load.step_seconds, rel=1e-12)


def test_free_slots_are_refilled_before_the_next_step() -> None:
    trainer, log = setup(3)
    trainer.submit(some_probes(12, 1))
    waiting = 12 - 3
    while not trainer.idle:
        ended = trainer.advance()
        assert len(log.stepped[-1][2]) == min(3, 3 + waiting)
        if waiting <= 0:
            break
        waiting -= len(ended)
    assert waiting <= 0


def test_all_probes_of_a_shape_come_in_one_insertion_in_the_order_of_submission() -> None:
    trainer, log = setup(5, widths=(4, 8))
    small, large = [Probe(0, n, 4) for n in (10, 11, 12)], [Probe(1, n, 4) for n in (10, 11)]
    trainer.submit([small[0], large[0], small[1]])
    trainer.submit([large[1], small[2], Probe(0, 50, 2), Probe(1, 60, 2)])
    trainer.advance()
    shapes = [bucket(problem) for problem in ScanSpec(widths=(4, 8), data="gaussian:2").variants(10)]
    assert log.inserted == [(shapes[0], small), (shapes[1], large)]
    drive(trainer)
    assert [probe.n for _, probes in log.inserted[2:] for probe in probes] == [50, 60]
    assert log.made == shapes


def test_variants_that_differ_in_rate_or_labels_train_together() -> None:
    trainer, log = setup(4, lr=(0.1, 0.01), optimizer="sgd")
    trainer.submit([Probe(0, 10, 2), Probe(1, 10, 2)])
    results = drive(trainer)
    assert len(log.made) == 1
    assert [len(running) for _, _, running in log.stepped] == [2, 2]
    assert {result.probe.variant for result in results} == {0, 1}


def test_several_shapes_progress_side_by_side() -> None:
    trainer, log = setup(6, widths=(4, 8, 16))
    trainer.submit([Probe(variant, 10, 20) for variant in (0, 1, 2)])
    drive(trainer)
    turns = [variant.width for variant, _, _ in log.stepped]
    assert turns == [4, 8, 16] * 20


def test_a_shape_that_comes_back_gets_its_backend_again() -> None:
    trainer, log = setup(2, widths=(4, 8))
    for _ in range(3):
        trainer.submit([Probe(0, 10, 1), Probe(1, 10, 1)])
        assert len(drive(trainer)) == 2
    assert [variant.width for variant in log.made] == [4, 8]


def test_the_same_submissions_are_worked_on_in_the_same_order() -> None:
    def trace() -> tuple[list[object], list[Probe]]:
        trainer, log = setup(4, widths=(4, 8, 16))
        order = []
        for start in range(0, 30, 10):
            trainer.submit(some_probes(30, 3)[start : start + 10])
            for _ in range(5):
                order += [result.probe for result in trainer.advance()]
        order += [result.probe for result in drive(trainer)]
        return [log.stepped, log.inserted], order

    assert trace() == trace()


def test_nothing_to_do_is_idle_and_harmless() -> None:
    trainer, log = setup(2)
    assert trainer.idle
    assert trainer.advance() == []
    assert (trainer.load, log.stepped) == (Load(), [])
    assert trainer.load.occupancy == 0.0
    trainer.submit([Probe(0, 10, 1)])
    assert not trainer.idle
    assert trainer.running == 0
    assert len(trainer.advance()) == 1
    assert trainer.idle


def test_full_slots_have_occupancy_one() -> None:
    """Also where probes of unequal length leave and others take their slots."""
    trainer, _ = setup(4, widths=(4, 8))
    trainer.submit([Probe(k % 2, 10 + k, 1 + k % 5) for k in range(40)])
    finished = 0
    while finished < 30:
        finished += len(trainer.advance())
        assert trainer.load.occupancy == pytest.approx(1.0, rel=1e-12)
    assert trainer.load.model_steps > 4 * 10 * 10


def test_occupancy_of_one_shape_is_the_mean_over_the_steps() -> None:
    """8 slots: 4 runs for 10 steps, 3 for another 20, 1 for another 10."""
    trainer, _ = setup(8)
    trainer.submit([Probe(0, 10, 1), Probe(0, 11, 3), Probe(0, 12, 3), Probe(0, 13, 4)])
    drive(trainer)
    assert trainer.load.model_steps == 4 * 10 + 3 * 20 + 1 * 10
    assert trainer.load.slot_steps == pytest.approx(8 * 40, rel=1e-12)
    assert trainer.load.occupancy == pytest.approx(110 / 320, rel=1e-12)


@pytest.mark.parametrize("check_every", [1, 10, 100])
@pytest.mark.parametrize(("slots", "counts"), [(4, (2, 1)), (4, (1, 1, 1)), (10, (5, 2)), (7, (1, 1, 1))])
def test_occupancy_of_several_shapes_is_the_share_of_slots_in_use(
    slots: int, counts: tuple[int, ...], check_every: int
) -> None:
    """However the shapes divide the slots, and also where a turn is a single step."""
    trainer, _ = setup(slots, widths=(4, 8, 16)[: len(counts)], check_every=check_every, steps=1000)
    trainer.submit([Probe(v, 10 + k, 5) for v, count in enumerate(counts) for k in range(count)])
    for _ in range(4 * len(counts)):
        assert trainer.advance() == []
        assert trainer.load.occupancy == pytest.approx(sum(counts) / slots, rel=1e-12)


def test_a_probe_inserted_mid_run_has_its_own_checks() -> None:
    """The third takes the slot of the second at step 10 of the first."""
    trainer, _ = setup(2, steps=35)
    trainer.submit([Probe(0, 10, 99), Probe(0, 11, 1), Probe(0, 12, 99)])
    results = {result.probe.n: result for result in drive(trainer)}
    assert results[10].history.step.tolist() == [10, 20, 30, 35]
    assert results[12].history.step.tolist() == [10, 20, 30, 35]
    assert results[12].outcome is Outcome.OUT_OF_BUDGET


@dataclass(slots=True)
class Threads:
    """Which threads stepped, and how many at once at most."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    names: set[str] = field(default_factory=set)
    now: int = 0
    most: int = 0


class SlowBackend(FakeBackend):
    """One run a state; sleeps as a kernel does that has let go of the interpreter's lock."""

    most_together = 1
    in_threads = True

    def __init__(self, variant: Variant, log: Log, threads: Threads) -> None:
        super().__init__(variant, log)
        self.threads = threads

    def run(self, state: FakeState, until_step: int) -> Report:
        threads = self.threads
        with threads.lock:
            threads.names.add(threading.current_thread().name)
            threads.now += 1
            threads.most = max(threads.most, threads.now)
        time.sleep(0.002)
        assert len(state.runs) == 1
        report = super().run(state, until_step)
        with threads.lock:
            threads.now -= 1
        return report


def slow(workers: int, slots: int = 8) -> tuple[Trainer, Threads]:
    trainer, log = setup(slots, widths=(4, 8, 16))
    threads = Threads()
    make = lambda _, variant: SlowBackend(variant, log, threads)  # noqa: E731
    return Trainer(trainer._setting, trainer._problems, make, slots, workers), threads


def test_workers_run_states_of_their_own_at_once_and_give_the_same_results() -> None:
    found = []
    for workers in (1, 2, 3):
        trainer, threads = slow(workers)
        trainer.submit(some_probes(40, 3))
        results = drive(trainer)
        trainer.close()
        assert threads.most == workers
        assert len(threads.names) == workers
        found.append(sorted((r.probe.n, r.steps, r.outcome, r.train_loss) for r in results))
        assert trainer.load.model_steps == sum(r.steps for r in results)
    assert len(found[0]) == 40
    assert found[0] == found[1] == found[2]


class SharingBackend(SlowBackend):
    """Many runs a state, which one thread steps at a time."""

    most_together = None

    def run(self, state: FakeState, until_step: int) -> Report:
        assert self.threads.lock.acquire(timeout=1)
        self.threads.lock.release()
        assert id(state) not in self.threads.names
        self.threads.names.add(str(id(state)))
        time.sleep(0.002)
        report = FakeBackend.run(self, state, until_step)
        self.threads.names.discard(str(id(state)))
        return report


def test_buckets_are_stepped_at_once_and_what_arrives_meanwhile_joins_its_bucket() -> None:
    found = []
    for workers in (1, 2):
        trainer, log = setup(6, widths=(4, 8, 16))
        threads = Threads()
        make = lambda _, variant, log=log, threads=threads: SharingBackend(variant, log, threads)  # noqa: E731
        trainer = Trainer(trainer._setting, trainer._problems, make, 6, workers)
        results = []
        for start in range(0, 60, 5):  # while earlier ones run
            trainer.submit(some_probes(60, 3)[start : start + 5])
            results += trainer.advance()
            assert trainer.running <= 6
        results += drive(trainer)
        trainer.close()
        assert len(results) == 60
        assert trainer.load.model_steps == sum(r.steps for r in results)
        found.append(sorted((r.probe.variant, r.probe.n, r.probe.seed, r.steps, r.train_loss) for r in results))
    assert found[0] == found[1]
    assert len(set(found[0])) == 60


def test_what_fails_in_a_worker_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = slow(2)

    def fail(*_: object) -> Report:
        raise ArithmeticError("no luck")

    monkeypatch.setattr(SlowBackend, "run", fail)
    trainer.submit(some_probes(3, 3))
    with pytest.raises(ArithmeticError, match="no luck"):
        drive(trainer)
    trainer.close()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("where", ["run", "insert", "init", "select"])
def test_where_memory_does_not_reach_fewer_train_together_and_the_results_are_the_same(
    monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    trainer, _ = setup(16)
    trainer.submit(some_probes(40, 1))
    wanted = {result.probe: result.steps for result in drive(trainer)}
    assert trainer.load.retreats == 0
    original = getattr(FakeBackend, where)

    def short(self: FakeBackend, *args: Any) -> object:
        first = args[0]
        count = len(first) if where == "init" else len(first.runs) + (len(args[1]) if where == "insert" else 0)
        if count > 5:
            raise error
        return original(self, *args)

    monkeypatch.setattr(FakeBackend, where, short)
    trainer, _ = setup(16)
    trainer.submit(some_probes(40, 1))
    found = drive(trainer)
    assert {result.probe: result.steps for result in found} == wanted
    assert len(found) == len(wanted) == 40
    assert trainer.load.retreats >= 1
    assert trainer.slots < 16
    assert trainer.idle


def test_a_model_that_does_not_fit_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = setup(16)

    def short(*_: object) -> Report:
        raise MemoryError

    monkeypatch.setattr(FakeBackend, "run", short)
    trainer.submit(some_probes(40, 1))
    with pytest.raises(UserError, match="memory does not reach for one model of width 4"):
        drive(trainer)


def test_close_ends_the_workers_though_probes_are_left() -> None:
    trainer, threads = slow(2)
    trainer.submit(some_probes(40, 3))
    trainer.advance()
    trainer.close()
    assert not [thread for thread in threading.enumerate() if thread.name in threads.names]


@pytest.mark.parametrize(("checks", "steps"), [(1, 10), (3, 30)])
def test_a_turn_makes_as_many_checks_as_the_backend_asks_for(
    monkeypatch: pytest.MonkeyPatch, checks: int, steps: int
) -> None:
    monkeypatch.setattr(FakeBackend, "checks_a_turn", checks)
    trainer, log = setup(4)
    trainer.submit([Probe(0, 20, 9), Probe(0, 30, 8)])
    trainer.advance()
    assert [stepped for _, stepped, _ in log.stepped] == [steps]


def test_launches_and_time_of_checks_add_up() -> None:
    trainer, log = setup(4, widths=(4, 8))
    trainer.submit(some_probes(9, 2))
    drive(trainer)
    assert trainer.load.launches == 3 * len(log.stepped)
    assert trainer.load.check_seconds == len(log.stepped) * 2.0**-20


def test_buckets_are_those_of_the_backend() -> None:
    """Where widths share launches, they share a state."""
    made = []

    class Wide(FakeBackend):
        def _take(self, runs: Sequence[Run]) -> list[Run]:
            return list(runs)

    trainer, log = setup(6, widths=(4, 8, 16))

    def make(_: object, variant: Variant) -> Wide:
        made.append(variant.width)
        return Wide(variant, log)

    wide = lambda variant: dataclasses.replace(bucket(variant), width=16)  # noqa: E731
    shared = Trainer(trainer._setting, trainer._problems, make, 6, bucket=wide)
    shared.submit([Probe(k % 3, 20 + k, 2) for k in range(6)])
    shared.advance()
    assert made == [16]
    ((_, _, probes),) = log.stepped
    assert len({probe.variant for probe in probes}) == 3


class Scarce(FakeBackend):
    """In threads; memory does not reach for the first insertion."""

    in_threads = True
    failed = 0

    def run(self, state: FakeState, until_step: int) -> Report:
        time.sleep(0.02)  # so that others arrive while it is at work
        return super().run(state, until_step)

    def insert(self, state: FakeState, runs: Sequence[Run]) -> FakeState:
        if not Scarce.failed:
            Scarce.failed = len(runs)
            raise MemoryError
        return super().insert(state, runs)


def test_runs_that_arrive_when_memory_gives_out_are_not_lost() -> None:
    Scarce.failed = 0
    trainer, log = setup(8)
    trainer._make_backend = lambda _, variant: Scarce(variant, log)
    probes = [Probe(0, 2 + k, 5 + k) for k in range(8)]
    trainer.submit(probes[:2])
    results = trainer.advance()
    trainer.submit(probes[2:])
    results += drive(trainer)
    trainer.close()
    assert Scarce.failed == 6
    assert trainer.load.retreats == 1
    assert sorted(result.probe.n for result in results) == list(range(2, 10))
