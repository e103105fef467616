"""The loop that joins search, trainer and store."""

import contextlib
import dataclasses
import itertools
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain import checkpoints, models
from fasttrain.analysis import Results, load
from fasttrain.backends.apart import Processes
from fasttrain.curvature import check as check_curvature
from fasttrain.curvature import choose as choose_measured
from fasttrain.errors import UserError
from fasttrain.heldout import Keeper
from fasttrain.journal import journal_path
from fasttrain.prepare import (
    Prepared,
    check_same,
    identity,
    make_search,
    numerics,
    prepare,
    same_value,
    sound,
    stated_conditions,
    stored_results,
    unchanged,
)
from fasttrain.records import Estimate, Probe, ProbeResult, Saved
from fasttrain.schema import SCHEMA_VERSION
from fasttrain.search import Search
from fasttrain.signals import Interrupts
from fasttrain.spec import ScanSpec, Variant
from fasttrain.store import HDF5Store, MemoryStore, check_output
from fasttrain.trainer import Trainer

_REPORT_SECONDS = 0.25
_COMMIT_SECONDS = 1.0
_CHECKPOINT_SHARE = 0.05  # of the time, that checkpoints may take at most
_RATE_WINDOW_SECONDS = 5.0
_LOOKED_AT = 16  # runs whose parameters are held until their curvature is measured, of each shape under way


@dataclass(frozen=True, slots=True)
class Progress:
    """A scan at one moment.

    Attributes:
        elapsed: seconds since it began.
        seconds_left: rough estimate, or None while there is nothing to base one on.
        probes_done: finished probes.
        probes_committed: of these, those that are on the disk, which nothing but the loss of the disk undoes.
        probes_running: probes in slots.
        variants_done: variants whose search has ended; those in a race once they are dropped or it is decided, its
            winner once it is confirmed.
        variants: all variants.
        params: their parameter counts.
        estimates: their estimates so far, from their finished rounds.
        model_steps: optimizer steps so far, summed over probes.
        steps_per_second: model-steps per second lately.
        slots: probes that can train at once.
        slots_used: slots in use now.
        occupancy: share of the slots in use, averaged over all steps so far, 0 to 1.
        finished: whether this is the last snapshot.
        to_measure: runs whose curvature is to be measured; 0 until the search has ended.
        measured: of these, the runs that are done.
    """

    elapsed: float
    seconds_left: float | None
    probes_done: int
    probes_running: int
    variants_done: int
    variants: tuple[Variant, ...]
    params: tuple[int, ...]
    estimates: tuple[Estimate, ...]
    model_steps: int
    steps_per_second: float
    slots: int
    slots_used: int
    occupancy: float
    finished: bool
    to_measure: int = 0
    measured: int = 0
    probes_committed: int = 0


def scan(
    spec: ScanSpec,
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    save_weights: bool = False,
    curvature: int = 0,
    time_limit: float | None = None,
    checkpoint: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Results:
    """Measures EMC50 of every variant of a spec.

    The same spec gives the same probes, results and estimates on the same hardware, always.

    Args:
        spec: what to measure.
        out: HDF5 file to write while it runs; None keeps the results in memory.
        overwrite: whether ``out`` may replace a file.
        save_weights: whether the parameters of every fitted run are kept (``Results.weights``).
        curvature: runs of each variant that are trained once more after the search, for the gradient norm, the slope of
            the loss and the ends of the Hessian's spectrum where they ended (``Results.curvature``). It changes no
            other number.
        time_limit: seconds after which the scan is stopped as by Ctrl-C, but without an exception: its ``status`` is
            ``"interrupted"``.
        checkpoint: seconds between two times that the runs under way are put on the disk too, beside ``out``, so that
            ``resume`` goes on with them instead of from their start; for runs that take long. Also done where the time
            limit stops the scan. None for never.
        on_progress: called a few times a second from the calling thread.

    Raises:
        UserError: the spec asks for what is not there or does not fit, or ``out`` cannot be written; nothing has
            been written then.
        KeyboardInterrupt: on Ctrl-C; every finished probe is in ``out``, and ``resume`` goes on from there.
        Terminated: likewise, on SIGTERM.
    """
    check_seconds("time_limit", time_limit)
    check_seconds("checkpoint", checkpoint)
    if checkpoint is not None and out is None:
        raise UserError("checkpoint", checkpoint, "is for a scan with a file; give out")
    if not isinstance(curvature, int) or isinstance(curvature, bool) or curvature < 0:
        raise UserError("curvature", curvature, "expected a whole number of runs, 0 or more")
    if out is not None:
        check_output(out, overwrite)
    prepared = prepare(spec)
    if curvature:
        check_curvature(prepared.setting, [problem.variant for problem in prepared.problems])
    store = MemoryStore() if out is None else HDF5Store(out, overwrite)
    stated = stated_conditions(prepared) | {"save_weights": int(save_weights), "curvature_runs": curvature}
    for line in prepared.unmatched:
        warnings.warn(f"left out: {line}", stacklevel=2)
    if not stated["bitwise_independent"]:
        warnings.warn(
            "this BLAS gives a model other bits in other company: results are right, but not bitwise independent of "
            "what trains beside them (recorded in the file; docs/decisions/0002-bitwise-on-cpu.md)",
            stacklevel=2,
        )
    with numerics(prepared), Interrupts() as interrupts:
        with interrupts.deferred():
            store.begin(spec, prepared.problems, {**stated, "slots": prepared.slots})
            if out is not None:
                checkpoints.drop(out)
        try:
            own = identity(spec, (), stated)
            search = make_search(spec, prepared.problems)
            scanned = (spec, prepared, search, store, interrupts, on_progress, save_weights, curvature)
            _Scan(*scanned, time_limit, checkpoint, own).run()
        finally:
            store.close()
    return Results.from_memory(store) if isinstance(store, MemoryStore) else load(store.path)


def resume(
    path: str | os.PathLike[str],
    *,
    spec: ScanSpec | None = None,
    time_limit: float | None = None,
    checkpoint: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Results:
    """Goes on with a scan that was killed, interrupted or stopped by its time limit.

    Its probes, results and estimates are then those of a scan that nobody stopped, bit for bit on the same hardware.
    Runs that were under way are made again from their start, or from the last checkpoint if there is one. Of a complete
    file nothing is changed.

    Args:
        path: its file.
        spec: what the file must have been asked for, if that is to be checked.
        time_limit: as of ``scan``.
        checkpoint: as of ``scan``.
        on_progress: as of ``scan``.

    Raises:
        UserError: there is no such file, another process writes it, it was asked for something else than ``spec``, or
            this installation would not do the same: other random numbers, data, model sources, device or backend.
        KeyboardInterrupt: as of ``scan``.
        Terminated: as of ``scan``.
    """
    check_seconds("time_limit", time_limit)
    check_seconds("checkpoint", checkpoint)
    path = Path(path)
    before = load(path)
    if spec is not None and spec != before.spec:
        raise UserError("spec", _differing(spec, before.spec), f"is not what {path} was asked for")
    if before.attrs.get("status") == "complete":
        checkpoints.drop(path)
        if journal_path(path).exists():  # killed in its last moment: all is there, but not all in the file
            HDF5Store.reopened(path).leave()
            return load(path)
        return before
    if before.attrs["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            "file", path, f"has schema version {before.attrs['schema_version']}; only {SCHEMA_VERSION} can be continued"
        )
    spec = before.spec
    prepared = prepare(spec)
    check_same(prepared, before)
    with numerics(prepared), Interrupts() as interrupts:
        own = identity(spec, before.earlier, stated_conditions(prepared))
        begun = checkpoints.kept(path, own)
        if begun is None or not sound(prepared, begun):
            where = checkpoints.checkpoint_path(path)
            warnings.warn(f"{where} is damaged, or of another scan or installation: runs start again", stacklevel=2)
            begun = {}
        with interrupts.deferred():
            store = HDF5Store.reopened(path)
        try:
            now = unchanged(before)  # the file is ours only now
            stored = stored_results(now)
            search = make_search(spec, prepared.problems, now.earlier)
            try:
                search.tell(stored)
            except ValueError as error:
                raise UserError("file", path, f"is damaged: {error}") from None
            kept = bool(now.attrs.get("save_weights", 0)), int(now.attrs.get("curvature_runs", 0))
            with interrupts.deferred():
                store.continue_with(spec, prepared.problems)
            scanned = (spec, prepared, search, store, interrupts, on_progress, *kept)
            _Scan(*scanned, time_limit, checkpoint, own, begun=begun, stored=stored).run()
        finally:
            store.close()
    return load(path)


def check_seconds(name: str, seconds: float | None) -> None:
    """Whether an option can be a time.

    Raises:
        UserError: it cannot.
    """
    if seconds is not None and not seconds > 0.0:
        raise UserError(name, seconds, "expected a time above 0")


def _differing(spec: ScanSpec, held: ScanSpec) -> str:
    """The fields in which two specs differ, as ``name=value (file: value)``."""
    return ", ".join(
        f"{field.name}={getattr(spec, field.name)} (file: {getattr(held, field.name)})"
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != getattr(held, field.name)
    )


class _Late(Exception):
    """The time limit has come."""


@dataclass(slots=True)
class _Scan:
    """One scan under way."""

    spec: ScanSpec
    prepared: Prepared
    search: Search  # which has been told what is stored
    store: MemoryStore | HDF5Store
    interrupts: Interrupts
    on_progress: Callable[[Progress], None] | None
    save_weights: bool
    curvature: int
    time_limit: float | None = None
    checkpoint: float | None = None  # seconds between two
    identity: str = ""
    begun: dict[Probe, Saved] = field(default_factory=dict)  # that an earlier part of the scan left under way
    stored: list[ProbeResult] = field(default_factory=list)  # by an earlier part of the scan
    trainer: Trainer = field(init=False)
    begin: float = field(init=False)
    search_seconds: float = 0.0
    done: int = 0
    committed: int = 0
    steps: int = 0  # of all runs that have ended
    unwritten: list[ProbeResult] = field(default_factory=list)
    ended: list[ProbeResult] = field(default_factory=list)  # in the order of their rows, if curvature is to be measured
    to_measure: int = 0
    measured: int = 0
    curvature_seconds: float = 0.0
    written_at: float = 0.0
    reported_at: float = 0.0
    next_checkpoint: float = math.inf
    late: float = math.inf  # when the time limit comes
    rate: deque[tuple[float, int]] = field(default_factory=deque)

    def run(self) -> None:
        """Until the search is done, or Ctrl-C; the store is complete and closed afterwards."""
        earlier = max((result.finished for result in self.stored), default=0.0)
        earlier = max([earlier, *(float(saved["clock"][-1]) for saved in self.begun.values())])
        self.begin = time.perf_counter() - earlier

        prepared = self.prepared
        known = {result.probe for result in self.stored}
        processes = Processes(prepared.workers) if prepared.apart else None
        self.trainer = Trainer(
            prepared.setting,
            prepared.problems,
            prepared.maker(processes),
            prepared.slots,
            workers=prepared.workers,
            bucket=prepared.bucket,
            keeper=Keeper(prepared.setting, self.save_weights),
            elapsed=earlier,
            begun={probe: saved for probe, saved in self.begun.items() if probe not in known},
        )
        self.done = self.committed = len(self.stored)
        if self.curvature:
            self.ended = list(self.stored)
        self.steps = sum(result.steps for result in self.stored)
        self.stored = []
        self.begun = {}
        if self.time_limit is not None:
            self.late = time.perf_counter() + self.time_limit
        if self.checkpoint is not None:
            self.next_checkpoint = time.perf_counter() + self.checkpoint
        status = "interrupted"
        try:
            while not self.search.done:
                if time.perf_counter() >= self.late:
                    if self.checkpoint is not None:
                        self._keep_running()
                    break
                if time.perf_counter() >= self.next_checkpoint:
                    self._keep_running()
                self.trainer.submit(self._searching(self.search.ask))
                self._take(self.trainer.advance())
                self.interrupts.check()
            else:
                with contextlib.suppress(_Late):
                    if self.curvature:
                        self._measure()
                    status = "complete"
        finally:
            with self.interrupts.deferred():
                try:
                    if processes is not None:
                        processes.close()
                    self.trainer.close()
                    self._commit()
                    self.store.finish(status, self._summary())
                    if status == "complete" and isinstance(self.store, HDF5Store):
                        checkpoints.drop(self.store.path)
                finally:
                    self.store.close()
        self._report(finished=True)

    def _searching(self, call: Callable[..., Any], *args: Any) -> Any:
        begin = time.thread_time()
        result = call(*args)
        self.search_seconds += time.thread_time() - begin
        return result

    def _take(self, results: list[ProbeResult]) -> None:
        now = time.perf_counter() - self.begin
        if results:
            # The list first: an interrupt between the two must not lose a finished probe.
            self.unwritten.extend(results)
            if self.curvature:
                self.ended.extend(dataclasses.replace(result, weights=None) for result in results)
            self.done += len(results)
            self.steps += sum(result.steps for result in results)
            self._searching(self.search.tell, results)
        if self.unwritten and now - self.written_at >= _COMMIT_SECONDS:
            with self.interrupts.deferred():
                self._commit()
        self._report_at_times()

    def _keep_running(self) -> None:
        """Puts the runs under way on the disk."""
        assert isinstance(self.store, HDF5Store)
        assert self.checkpoint is not None
        begin = time.perf_counter()
        # A disk or memory that is too full for it may have room later; what has finished does not depend on it.
        with contextlib.suppress(MemoryError):
            running = self.trainer.saved(self._take)
            with self.interrupts.deferred():
                self._commit()  # the checkpoint before this may have had runs that have ended since
                with contextlib.suppress(OSError):
                    checkpoints.keep(self.store.path, self.identity, running)
        end = time.perf_counter()
        self.next_checkpoint = end + max(self.checkpoint, (end - begin) / _CHECKPOINT_SHARE)

    def _measure(self) -> None:
        """The curvature of some runs of each variant, which are trained once more: their parameters are gone."""
        begin = time.perf_counter()
        with self.interrupts.deferred():
            self._commit()
        rows = {result.probe: row for row, result in enumerate(self.ended)}
        groups = self._to_measure()
        self.to_measure = sum(map(len, groups))
        arrived: dict[Probe, ProbeResult] = {}
        different = 0
        try:
            for results in self.prepared.again(list(itertools.chain(*groups))):
                self._between_products()
                arrived.update((result.probe, result) for result in results)
                # One group after the other, whichever is trained first: the order of the rows is not that of the clock.
                while groups and all(probe in arrived for probe in groups[0]):
                    found = [arrived.pop(probe) for probe in groups.pop(0)]
                    # Only what is the run that the file has.
                    same = [result for result in found if _same_end(result, self.ended[rows[result.probe]])]
                    different += len(found) - len(same)
                    curvatures = self.prepared.measured(same, self._between_products)
                    measured = [(rows[result.probe], one) for result, one in zip(same, curvatures, strict=True)]
                    with self.interrupts.deferred():
                        self.store.put_curvature(measured)
                    self.measured += len(found)
        finally:
            self.curvature_seconds = time.perf_counter() - begin
        if different:
            warnings.warn(
                f"{different} of {self.to_measure} runs ended otherwise when they were trained again for their "
                "curvature, and are left out: this machine does not give the same bits twice",
                stacklevel=2,
            )

    def _to_measure(self) -> list[list[Probe]]:
        """The runs to look at, in groups of one shape, in an order that follows from the results alone."""
        by_variant: dict[int, list[ProbeResult]] = {}
        for result in self.ended:
            by_variant.setdefault(result.probe.variant, []).append(result)
        by_shape: dict[Variant, list[Probe]] = {}
        for problem, estimate in zip(self.prepared.problems, self.search.estimates(), strict=True):
            chosen = choose_measured(estimate, by_variant.get(problem.index, []), self.curvature)
            by_shape.setdefault(models.shaping(problem.variant), []).extend(result.probe for result in chosen)
        return [
            probes[start : start + _LOOKED_AT]
            for probes in by_shape.values()
            for start in range(0, len(probes), _LOOKED_AT)
        ]

    def _between_products(self) -> None:
        self.interrupts.check()
        if time.perf_counter() >= self.late:
            raise _Late
        self._report_at_times()

    def _report_at_times(self) -> None:
        if time.perf_counter() - self.begin - self.reported_at >= _REPORT_SECONDS:
            self._report(finished=False)

    def _commit(self) -> None:
        self.store.append(self.unwritten)
        self.committed += len(self.unwritten)
        self.unwritten = []
        self.store.put_curves(self._searching(self.search.estimates))
        self.written_at = time.perf_counter() - self.begin

    def _summary(self) -> dict[str, str | int | float]:
        seconds = time.perf_counter() - self.begin
        load = self.trainer.load
        return {
            "model_steps": self.steps,
            "launches": load.launches,
            "memory_retreats": load.retreats,
            "occupancy": load.occupancy,
            "seconds": seconds,
            "steps_per_second": load.model_steps / seconds if seconds > 0 else 0.0,
            "step_seconds": load.step_seconds,
            "check_seconds": load.check_seconds,
            "search_seconds": self.search_seconds,
            "curvature_seconds": self.curvature_seconds,
        }

    def _report(self, finished: bool) -> None:
        if self.on_progress is None:
            return
        now = time.perf_counter() - self.begin
        self.reported_at = now
        load, problems = self.trainer.load, self.prepared.problems
        self.rate.append((now, load.model_steps))
        while len(self.rate) > 2 and now - self.rate[0][0] > _RATE_WINDOW_SECONDS:
            self.rate.popleft()
        seconds, steps = (self.rate[-1][i] - self.rate[0][i] for i in (0, 1))
        speed = steps / seconds if seconds > 0 else 0.0
        left = None
        if self.done and load.model_steps and not self.to_measure:
            coming = sum(self.search.probes_left(problem.index) for problem in problems)
            left = coming * (load.model_steps / self.done) / (load.model_steps / now)
        estimates = self._searching(self.search.estimates)
        self.on_progress(
            Progress(
                elapsed=now,
                seconds_left=0.0 if finished else left,
                probes_done=self.done,
                probes_committed=self.committed,
                probes_running=self.trainer.running,
                variants_done=sum(estimate.finished for estimate in estimates),
                variants=tuple(problem.variant for problem in problems),
                params=tuple(problem.params for problem in problems),
                estimates=tuple(estimates),
                model_steps=load.model_steps,
                steps_per_second=load.model_steps / now if finished else speed,
                slots=self.trainer.slots,
                slots_used=self.trainer.running,
                occupancy=load.occupancy,
                finished=finished,
                to_measure=self.to_measure,
                measured=self.measured,
            )
        )


def _same_end(again: ProbeResult, before: ProbeResult) -> bool:
    """Whether a run made again ended as it did before."""
    names = ("outcome", "steps", "train_loss", "train_error")
    return all(same_value(getattr(again, name), getattr(before, name)) for name in names)
