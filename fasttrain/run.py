"""The loop that joins search, trainer and store, and what comes before it: the preparation of a scan."""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fasttrain import factories, models
from fasttrain.analysis import Results, load
from fasttrain.backends import choose, configuration_text, make_backend, together
from fasttrain.backends.base import Run, Setting
from fasttrain.data import check, pool_bytes, provenance
from fasttrain.errors import UserError
from fasttrain.heldout import Keeper
from fasttrain.machine import available_bytes, conditions, cores, resolve_device
from fasttrain.models.matching import matched
from fasttrain.plan import default_n_max, make_plan
from fasttrain.records import Estimate, Probe, ProbeResult, Problem
from fasttrain.search import Search, raced
from fasttrain.spec import ARCHITECTURES, ScanSpec, Variant
from fasttrain.store import HDF5Store, MemoryStore, check_output
from fasttrain.trainer import Trainer

_REPORT_SECONDS = 0.25
_COMMIT_SECONDS = 1.0
_RATE_WINDOW_SECONDS = 5.0
# A variant of the default scan takes about so many probes, and a probe about this share of its budget.
_LIKELY_PROBES = 30
_LIKELY_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Progress:
    """A scan at one moment.

    Attributes:
        elapsed: seconds since it began.
        seconds_left: rough estimate, or None while there is nothing to base one on.
        probes_done: finished probes.
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


@dataclass(frozen=True, slots=True)
class Preview:
    """What a scan would do.

    Attributes:
        variants: index, settings, parameters and range of n of each variant.
        memory_bytes: estimated peak of all slots, in bytes.
        model_steps_most: optimizer steps if every probe were made and took its whole budget.
        seconds_most: time for those, at the speed measured now.
        seconds_likely: time for as many as scans usually take.
        slots: probes that would train at once.
        device: resolved.
        backend: resolved.
        precision: resolved.
        unmatched: variants that ``match_params`` leaves out, and why, a line each.
    """

    variants: tuple[Problem, ...]
    memory_bytes: int
    model_steps_most: int
    seconds_most: float
    seconds_likely: float
    slots: int
    device: str
    backend: str
    precision: str
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A scan that can begin."""

    setting: Setting
    problems: list[Problem]
    slots: int
    memory_bytes: int
    backends: tuple[str, ...]  # of every variant
    workers: int
    unmatched: tuple[str, ...]  # variants that match_params left out, and why

    def chosen(self, variant: Variant) -> str:
        """The backend that trains a variant."""
        return choose(self.setting.spec.backend, self.setting, variant)

    def make_backend(self, setting: Setting, variant: Variant) -> Any:
        """The backend of a variant's bucket."""
        return make_backend(self.chosen(variant), setting, variant)

    def bucket(self, variant: Variant) -> Variant:
        """The key of a variant's bucket."""
        return together(self.chosen(variant), variant)


def scan(
    spec: ScanSpec,
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    save_weights: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Results:
    """Measures EMC50 of every variant of a spec.

    The same spec gives the same probes, results and estimates on the same hardware, always.

    Args:
        spec: what to measure.
        out: HDF5 file to write while it runs; None keeps the results in memory.
        overwrite: whether ``out`` may replace a file.
        save_weights: whether the parameters of every fitted run are kept (``Results.weights``).
        on_progress: called a few times a second from the calling thread.

    Raises:
        UserError: the spec asks for what is not there or does not fit, or ``out`` cannot be written; nothing has
            been written then.
        KeyboardInterrupt: on Ctrl-C; every finished probe is in ``out``, which is closed.
    """
    if out is not None:
        check_output(out, overwrite)
    prepared = prepare(spec)
    store = MemoryStore() if out is None else HDF5Store(out, overwrite)
    with numerics(prepared):
        stated = conditions(prepared.setting.device, prepared.backends, precision_name(spec), prepared.workers)
    variants = [problem.variant for problem in prepared.problems]
    configured = map(configuration_text, prepared.backends, [prepared.setting] * len(variants), variants)
    stated |= provenance(spec)
    stated["variant_configurations"] = ";".join(configured)
    stated["arch_source"] = own_sources(spec)
    stated["unmatched"] = "; ".join(prepared.unmatched)
    for line in prepared.unmatched:
        warnings.warn(f"left out: {line}", stacklevel=2)
    if not stated["bitwise_independent"]:
        warnings.warn(
            "this BLAS gives a model other bits in other company: results are right, but not bitwise independent of "
            "what trains beside them (recorded in the file; docs/decisions/0002-bitwise-on-cpu.md)",
            stacklevel=2,
        )
    with numerics(prepared), _Interrupts() as interrupts:
        with interrupts.deferred():
            store.begin(spec, prepared.problems, {**stated, "slots": prepared.slots})
        _Scan(spec, prepared, store, interrupts, on_progress, save_weights).run()
    return Results.from_memory(store) if isinstance(store, MemoryStore) else load(store.path)


def preview(spec: ScanSpec) -> Preview:
    """What ``scan`` would do with a spec, with a cost measured on a few steps of every shape. Writes nothing.

    Raises:
        UserError: as ``scan``.
    """
    prepared = prepare(spec)
    with numerics(prepared):
        of_each = {problem: _step_seconds(prepared, problem) * spec.steps for problem in prepared.problems}
    races = [group for group in raced(prepared.problems) if len(group) > 1 and spec.lr_search == "race"]
    # The winner of a race is searched once more.
    seconds = sum(of_each.values()) + sum(max(map(of_each.__getitem__, group)) for group in races)
    return Preview(
        variants=tuple(prepared.problems),
        memory_bytes=prepared.memory_bytes,
        model_steps_most=(len(prepared.problems) + len(races)) * spec.max_probes * spec.steps,
        seconds_most=seconds * spec.max_probes,
        seconds_likely=seconds * min(_LIKELY_PROBES, spec.max_probes) * _LIKELY_SHARE,
        slots=prepared.slots,
        device=str(prepared.setting.device),
        backend=",".join(sorted(set(prepared.backends))),
        precision=precision_name(spec),
        unmatched=prepared.unmatched,
    )


def prepare(spec: ScanSpec) -> Prepared:
    """Everything that a scan needs and that can go wrong before it begins.

    Raises:
        UserError: the spec asks for what is not there or does not fit.
    """
    info = check(spec)
    device = resolve_device(spec.device)
    dtype = torch.float64 if spec.precision == "float64" else torch.float32
    variants = list(spec.variants(info.classes))
    unmatched: list[str] = []
    for variant in variants:
        models.check_images(variant, info.shape)
    if spec.match_params:
        variants, unmatched = matched(variants, info.shape, spec.heads)
    for variant in variants:
        models.check(variant, info.shape)
    setting = Setting(spec, info.features, device, dtype, info.shape)
    problems, backends = [], []
    for index, variant in enumerate(variants):
        backends.append(choose(spec.backend, setting, variant))
        params = models.parameter_count(variant, info.shape)
        n_max = spec.n_max or default_n_max(params, info, variant.labels, variant.inputs)
        n_min = spec.n_min or min(2, n_max - 1)
        if n_min >= n_max:
            raise UserError("n_min", n_min, f"expected less than n-max, which is {n_max} here")
        elements = 0 if models.is_perceptron(variant) else models.sample_elements(variant, info.shape)
        problems.append(Problem(index, variant, params, n_min, n_max, elements))
    tried = {models.shaping(v): (v, backend) for v, backend in zip(variants, backends, strict=True)}
    for variant, backend in tried.values():
        models.try_out(variant, info.shape, batched=backend != "loop")
    threaded = any(
        backend == "native" or (backend == "vmap" and device.type == "cpu" and not models.is_perceptron(variant))
        for variant, backend in zip(variants, backends, strict=True)
    )
    workers = cores() if threaded else 1
    plan = make_plan(
        problems,
        spec,
        info,
        device=device.type,
        item=dtype.itemsize,
        available=max(0, available_bytes(device) - pool_bytes(info, dtype.itemsize)),
        workers=workers if set(backends) == {"native"} else None,
    )
    return Prepared(setting, problems, plan.slots, plan.memory_bytes, tuple(backends), workers, tuple(unmatched))


def own_sources(spec: ScanSpec) -> str:
    """The user's own models in a spec with the hash of their sources: ``module:name=SHA-256``, parted by semicolons."""
    own = [arch for arch in spec.arch if arch not in ARCHITECTURES]
    return ";".join(f"{arch}={factories.source_digest(arch)}" for arch in own)


def precision_name(spec: ScanSpec) -> str:
    """The precision of a spec, ``auto`` resolved."""
    return "float32" if spec.precision == "auto" else spec.precision


@contextlib.contextmanager
def numerics(prepared: Prepared) -> Iterator[None]:
    """Full float32 products (no TF32, no bfloat16), and on a CPU one thread inside of torch; restored afterwards.

    One, because threads cost more than they give at these sizes: the default scan made 1.1 to 2.2 thousand model-steps
    a second with two passive threads and 3 to 6 thousand with one, and two spinning threads stall on a busy machine
    (docs/TRAPS.md).
    """
    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    convolutions = cudnn.allow_tf32, cudnn.deterministic
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32, cudnn.deterministic = False, True
    if prepared.setting.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32, cudnn.deterministic = convolutions


def _step_seconds(prepared: Prepared, problem: Problem) -> float:
    """Seconds of one model-step of a variant, measured on as many models as a round has."""
    backend = prepared.make_backend(prepared.setting, prepared.bucket(problem.variant))
    n = min(problem.n_max, max(problem.n_min, problem.params // 2))
    models = min(8, prepared.slots)
    state = backend.init([Run.of(prepared.setting, problem, Probe(problem.index, n, k)) for k in range(models)])
    steps = max(1, min(20, (prepared.setting.spec.check_every - 1) // 2))
    backend.run(state, steps)  # as many as are timed: a graph is recorded for a number of steps
    begin = time.perf_counter()
    report = backend.run(state, state.clock + steps)
    used = prepared.workers if backend.most_together else 1
    return (time.perf_counter() - begin) / max(1, report.model_steps) / used


@dataclass(slots=True)
class _Interrupts:
    """Ctrl-C as an exception, but not in the middle of writing: there it waits until the write is done.

    It is remembered too: an exception that a signal raises inside a finaliser or a weak reference's callback, of
    which recording a graph makes many, is printed and lost.
    """

    _writing: bool = False
    _pending: bool = False
    _previous: Any = None

    def __enter__(self) -> "_Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, *_: object) -> None:
        self._pending = True
        if not self._writing:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises what came and was held back or lost."""
        if self._pending:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Holds Ctrl-C back until the block is left."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False
        self.check()


@dataclass(slots=True)
class _Scan:
    """One scan under way."""

    spec: ScanSpec
    prepared: Prepared
    store: MemoryStore | HDF5Store
    interrupts: _Interrupts
    on_progress: Callable[[Progress], None] | None
    save_weights: bool
    search: Search = field(init=False)
    trainer: Trainer = field(init=False)
    begin: float = field(init=False)
    search_seconds: float = 0.0
    done: int = 0
    unwritten: list[ProbeResult] = field(default_factory=list)
    written_at: float = 0.0
    reported_at: float = 0.0
    rate: deque[tuple[float, int]] = field(default_factory=deque)

    def run(self) -> None:
        """Until the search is done, or Ctrl-C; the store is complete and closed afterwards."""
        spec, problems = self.spec, self.prepared.problems
        self.begin = time.perf_counter()
        self.search = Search(
            problems,
            seeds=spec.seeds,
            interval=spec.interval,
            tolerance=spec.tolerance,
            max_probes=spec.max_probes,
            races=spec.lr_search == "race",
        )
        prepared = self.prepared
        self.trainer = Trainer(
            prepared.setting,
            problems,
            prepared.make_backend,
            prepared.slots,
            workers=prepared.workers,
            bucket=prepared.bucket,
            keeper=Keeper(prepared.setting, self.save_weights),
        )
        status = "interrupted"
        try:
            while not self.search.done:
                self.trainer.submit(self._searching(self.search.ask))
                self._take(self.trainer.advance())
                self.interrupts.check()
            status = "complete"
        finally:
            with self.interrupts.deferred():
                self.trainer.close()
                self._commit()
                self.store.finish(status, self._summary())
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
            self.done += len(results)
            self._searching(self.search.tell, results)
        if self.unwritten and now - self.written_at >= _COMMIT_SECONDS:
            with self.interrupts.deferred():
                self._commit()
        if now - self.reported_at >= _REPORT_SECONDS:
            self._report(finished=False)

    def _commit(self) -> None:
        self.store.append(self.unwritten)
        self.unwritten = []
        self.store.put_curves(self._searching(self.search.estimates))
        self.written_at = time.perf_counter() - self.begin

    def _summary(self) -> dict[str, str | int | float]:
        seconds = time.perf_counter() - self.begin
        load = self.trainer.load
        return {
            "model_steps": load.model_steps,
            "launches": load.launches,
            "occupancy": load.occupancy,
            "seconds": seconds,
            "steps_per_second": load.model_steps / seconds if seconds > 0 else 0.0,
            "step_seconds": load.step_seconds,
            "check_seconds": load.check_seconds,
            "search_seconds": self.search_seconds,
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
        if self.done and load.model_steps:
            coming = sum(self.search.probes_left(problem.index) for problem in problems)
            left = coming * (load.model_steps / self.done) / (load.model_steps / now)
        estimates = self._searching(self.search.estimates)
        self.on_progress(
            Progress(
                elapsed=now,
                seconds_left=0.0 if finished else left,
                probes_done=self.done,
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
            )
        )
