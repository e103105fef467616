"""The loop that joins search, trainer and store, and what comes before it: the preparation of a scan."""

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttrain import factories, models
from fasttrain.analysis import Results, load
from fasttrain.backends import choose, configuration_text, make_backend, together
from fasttrain.backends.apart import ApartBackend, Processes
from fasttrain.backends.base import Run, Setting
from fasttrain.curvature import check as check_curvature
from fasttrain.curvature import choose as choose_measured
from fasttrain.curvature import measure
from fasttrain.data import check, provenance
from fasttrain.designs import design_of, n_range, probes_of
from fasttrain.errors import UserError
from fasttrain.heldout import Keeper
from fasttrain.machine import available_bytes, conditions, cores, resolve_device
from fasttrain.models.matching import matched
from fasttrain.plan import Plan, Trained, default_n_max, make_plan, most_steps
from fasttrain.records import Curvature, Estimate, History, Outcome, Probe, ProbeResult, Problem, Terminated
from fasttrain.schema import SCHEMA_VERSION
from fasttrain.search import Search, raced
from fasttrain.spec import ARCHITECTURES, ScanSpec, Variant, budget_steps, budget_text, early_tells
from fasttrain.stopping import StopRules
from fasttrain.store import HDF5Store, MemoryStore, check_output
from fasttrain.trainer import Trainer

_REPORT_SECONDS = 0.25
_COMMIT_SECONDS = 1.0
_RATE_WINDOW_SECONDS = 5.0
# A probe of the default scan takes about this share of its budget.
_LIKELY_SHARE = 0.6
_APART_STEPS = 20_000  # likely model-steps from which on processes of their own are worth their start of some seconds
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


@dataclass(frozen=True, slots=True)
class Preview:
    """What a scan would do.

    Attributes:
        variants: index, settings, parameters and range of n of each variant.
        memory_bytes: estimated peak of all slots and the data, in bytes.
        model_bytes: the part of it that one slot may take.
        data_bytes: the part of it that all slots share.
        model_steps_most: optimizer steps if every probe were made and took its whole budget, the largest that it has at
            any n.
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
    model_bytes: int
    data_bytes: int
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
    plan: Plan
    backends: tuple[str, ...]  # of every variant
    workers: int
    apart: frozenset[Variant]  # that train in processes of their own
    unmatched: tuple[str, ...]  # variants that match_params left out, and why

    @property
    def slots(self) -> int:
        """Probes that train at once."""
        return self.plan.slots

    def chosen(self, variant: Variant) -> str:
        """The backend that trains a variant."""
        return choose(self.setting.spec.backend, self.setting, variant)

    def make_backend(self, setting: Setting, variant: Variant) -> Any:
        """The backend of a variant's bucket."""
        return make_backend(self.chosen(variant), setting, variant)

    def maker(self, processes: Processes | None) -> Callable[[Setting, Variant], Any]:
        """What makes the backend of a bucket for a whole scan, with some buckets in processes of their own."""
        apart = {self.bucket(variant) for variant in self.apart} if processes is not None else frozenset()

        def made(setting: Setting, variant: Variant) -> Any:
            if processes is not None and variant in apart:
                return ApartBackend(self.chosen(variant), setting, variant, processes)
            return self.make_backend(setting, variant)

        return made

    def bucket(self, variant: Variant) -> Variant:
        """The key of a variant's bucket."""
        return together(self.chosen(variant), variant)

    def again(self, probes: Sequence[Probe]) -> Iterator[list[ProbeResult]]:
        """Trains probes and gives, a turn at a time, those that have ended, with their parameters, fitted or not."""
        trainer = Trainer(
            self.setting,
            self.problems,
            self.make_backend,
            self.slots,
            workers=self.workers,
            bucket=self.bucket,
            keeper=Keeper(self.setting, save_weights=True, save_failed=True),
        )
        trainer.submit(probes)
        try:
            while not trainer.idle:
                yield trainer.advance()
        finally:
            trainer.close()

    def measured(self, results: Sequence[ProbeResult], between: Callable[[], None] = lambda: None) -> list[Curvature]:
        """The curvature of runs of one shape; see ``curvature.measure``."""
        variants = [self.problems[result.probe.variant].variant for result in results]
        # What vmap cannot batch is trained by loop.
        built_in = all(variant.arch in ARCHITECTURES for variant in variants)
        batched = built_in or all(self.chosen(variant) != "loop" for variant in variants)
        return measure(self.setting, variants, results, batched=batched, between=between)


def scan(
    spec: ScanSpec,
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    save_weights: bool = False,
    curvature: int = 0,
    time_limit: float | None = None,
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
        on_progress: called a few times a second from the calling thread.

    Raises:
        UserError: the spec asks for what is not there or does not fit, or ``out`` cannot be written; nothing has
            been written then.
        KeyboardInterrupt: on Ctrl-C; every finished probe is in ``out``, and ``resume`` goes on from there.
        Terminated: likewise, on SIGTERM.
    """
    _check_time_limit(time_limit)
    if not isinstance(curvature, int) or isinstance(curvature, bool) or curvature < 0:
        raise UserError("curvature", curvature, "expected a whole number of runs, 0 or more")
    if out is not None:
        check_output(out, overwrite)
    prepared = prepare(spec)
    if curvature:
        check_curvature(prepared.setting, [problem.variant for problem in prepared.problems])
    store = MemoryStore() if out is None else HDF5Store(out, overwrite)
    stated = _conditions(prepared) | {"save_weights": int(save_weights), "curvature_runs": curvature}
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
        _Scan(spec, prepared, store, interrupts, on_progress, save_weights, curvature, time_limit).run()
    return Results.from_memory(store) if isinstance(store, MemoryStore) else load(store.path)


def resume(
    path: str | os.PathLike[str],
    *,
    spec: ScanSpec | None = None,
    time_limit: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Results:
    """Goes on with a scan that was killed, interrupted or stopped by its time limit.

    Its probes, results and estimates are then those of a scan that nobody stopped, bit for bit on the same hardware.
    Runs that were under way are made again from their start. Of a complete file nothing is changed.

    Args:
        path: its file.
        spec: what the file must have been asked for, if that is to be checked.
        time_limit: as of ``scan``.
        on_progress: as of ``scan``.

    Raises:
        UserError: there is no such file, another process writes it, it was asked for something else than ``spec``, or
            this installation would not do the same: other random numbers, data, model sources, device or backend.
        KeyboardInterrupt: as of ``scan``.
        Terminated: as of ``scan``.
    """
    _check_time_limit(time_limit)
    path = Path(path)
    before = load(path)
    if spec is not None and spec != before.spec:
        raise UserError("spec", _differing(spec, before.spec), f"is not what {path} was asked for")
    if before.attrs.get("status") == "complete":
        return before
    if before.attrs["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            "file", path, f"has schema version {before.attrs['schema_version']}; only {SCHEMA_VERSION} can be continued"
        )
    spec = before.spec
    prepared = prepare(spec)
    check_same(prepared, before)
    with numerics(prepared), _Interrupts() as interrupts:
        with interrupts.deferred():
            store = HDF5Store.reopened(path)
            store.continue_with(spec, prepared.problems)
        one = _Scan(
            spec,
            prepared,
            store,
            interrupts,
            on_progress,
            bool(before.attrs.get("save_weights", 0)),
            int(before.attrs.get("curvature_runs", 0)),
            time_limit,
            # Read again: the file is ours only now.
            stored=stored_results(load(path)),
        )
        one.run()
    return load(path)


def _check_time_limit(time_limit: float | None) -> None:
    if time_limit is not None and not time_limit > 0.0:
        raise UserError("time_limit", time_limit, "expected a time above 0")


def _conditions(prepared: Prepared) -> dict[str, str | int | float]:
    """What a scan runs under, beside its spec."""
    spec = prepared.setting.spec
    with numerics(prepared):
        stated = conditions(prepared.setting.device, prepared.backends, precision_name(spec), prepared.workers)
    variants = [problem.variant for problem in prepared.problems]
    configured = map(configuration_text, prepared.backends, [prepared.setting] * len(variants), variants)
    stated |= provenance(spec)
    stated["variant_configurations"] = ";".join(configured)
    stated["arch_source"] = own_sources(spec)
    stated["unmatched"] = "; ".join(prepared.unmatched)
    return stated


_SAME = {
    "generator": "random numbers",
    "generator_digest": "random numbers",
    "data_sha256": "data",
    "arch_source": "model sources",
    "device": "device",
    "variant_backends": "backends",
    "variant_configurations": "launch configurations",
    "precision": "precision",
}
"""Conditions that must be as they were for a scan to go on, and what they are called."""
_ALIKE = ("device_name", "platform", "torch_version", "numpy_version", "triton_version")
"""Conditions that should be: with others the last bits may differ."""


def check_same(prepared: Prepared, before: Results) -> None:
    """Whether this installation goes on as the scan began.

    Raises:
        UserError: it would not.
    """
    now = _conditions(prepared)
    for name, called in _SAME.items():
        if now.get(name) != before.attrs.get(name):
            raise UserError(
                "file",
                before.path,
                f"was made with other {called}: {name} was {before.attrs.get(name)} and is {now.get(name)} here",
            )
    held = [(int(row["params"]), int(row["n_min"]), int(row["n_max"])) for row in before.curves.to_dict("records")]
    if held != [(problem.params, problem.n_min, problem.n_max) for problem in prepared.problems]:
        raise UserError("file", before.path, "has other variants than its spec gives here")
    different = [name for name in _ALIKE if now.get(name) != before.attrs.get(name)]
    if different:
        told = ", ".join(f"{name} was {before.attrs.get(name)}" for name in different)
        warnings.warn(f"the last bits of new runs may differ from those of an unbroken scan: {told}", stacklevel=3)


def _differing(spec: ScanSpec, held: ScanSpec) -> str:
    """The fields in which two specs differ, as ``name=value (file: value)``."""
    return ", ".join(
        f"{field.name}={getattr(spec, field.name)} (file: {getattr(held, field.name)})"
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != getattr(held, field.name)
    )


def stored_results(results: Results) -> list[ProbeResult]:
    """The runs of a file, in the order of their rows; without their training curves and weights, which stay there."""
    nothing = History(np.empty(0, np.int64), np.empty(0), np.empty(0))
    return [
        ProbeResult(
            probe=Probe(int(row["variant"]), int(row["n"]), int(row["seed"]), int(row["round"])),
            outcome=Outcome(row["outcome"]),
            steps=int(row["steps"]),
            fit_step=int(row["fit_step"]),
            train_loss=float(row["train_loss"]),
            train_error=float(row["train_error"]),
            history=nothing,
            started=float(row["started"]),
            finished=float(row["finished"]),
            train_seconds=float(row["train_seconds"]),
            test_accuracy=float(row["test_accuracy"]),
        )
        for row in results.probes.to_dict("records")
    ]


def preview(spec: ScanSpec) -> Preview:
    """What ``scan`` would do with a spec, with a cost measured on a few steps of every shape. Writes nothing.

    Raises:
        UserError: as ``scan``.
    """
    prepared = prepare(spec)
    with numerics(prepared):
        step = {problem: _step_seconds(prepared, problem) for problem in prepared.problems}
    races = [group for group in raced(prepared.problems) if len(group) > 1 and spec.races]
    # The winner of a race is searched once more.
    searched = [*prepared.problems, *(max(group, key=step.__getitem__) for group in races)]
    raced_ones = {problem.index for group in races for problem in group}
    # Short runs are of a winner, or of a variant that does not race.
    work = [
        _work(spec, problem, spec.shortens and (k >= len(prepared.problems) or problem.index not in raced_ones))
        for k, problem in enumerate(searched)
    ]
    likely, most = (
        sum(step[problem] * steps[i] for problem, steps in zip(searched, work, strict=True)) for i in (0, 1)
    )
    return Preview(
        variants=tuple(prepared.problems),
        memory_bytes=prepared.plan.memory_bytes,
        model_bytes=prepared.plan.model_bytes,
        data_bytes=prepared.plan.data_bytes,
        model_steps_most=sum(steps for _, steps in work),
        seconds_most=most,
        seconds_likely=likely * _LIKELY_SHARE,
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
        n_min, n_max = n_range(spec, params, default_n_max(params, info, variant.labels, variant.inputs))
        elements = 0 if models.is_perceptron(variant) else models.sample_elements(variant, info.shape)
        problems.append(Problem(index, variant, params, n_min, n_max, elements))
        most = most_steps(problems[-1], spec)
        if variant.warmup >= most and variant.warmup > 0:
            what = f"expected less than the {most} steps that a run may take with {budget_text(spec)}"
            raise UserError("warmup", variant.warmup, what)
    tried = {models.shaping(v): (v, backend) for v, backend in zip(variants, backends, strict=True)}
    for variant, backend in tried.values():
        models.try_out(variant, info.shape, batched=backend != "loop", dtype=dtype)
    costly = [
        problem
        for problem, backend in zip(problems, backends, strict=True)
        if backend == "vmap" and device.type == "cpu" and not models.is_perceptron(problem.variant)
    ]
    workers = cores() if costly or "native" in backends else 1
    # A module of the user's own may not be found in another process.
    movable = [problem for problem in costly if problem.variant.arch in ARCHITECTURES]
    work = sum(_work(spec, problem, spec.shortens)[0] for problem in movable) * _LIKELY_SHARE
    apart = frozenset(problem.variant for problem in movable) if workers > 1 and work >= _APART_STEPS else frozenset()
    plan = make_plan(
        [Trained(p, backend, together(backend, p.variant)) for p, backend in zip(problems, backends, strict=True)],
        spec,
        info,
        device=device.type,
        item=dtype.itemsize,
        available=available_bytes(device),
        workers=workers if set(backends) == {"native"} else None,
        copies=1 + workers if apart else 1,
    )
    return Prepared(setting, problems, plan, tuple(backends), workers, apart, tuple(unmatched))


def make_search(spec: ScanSpec, problems: Sequence[Problem]) -> Search:
    """The search of a spec, at its beginning."""

    def run_steps(problem: Problem, n: int, short: bool) -> int:
        return budget_steps(spec, problem.variant, n, short)

    return Search(
        problems,
        seeds=spec.seeds,
        interval=spec.interval,
        tolerance=spec.tolerance,
        max_probes=spec.max_probes,
        races=spec.races,
        run_steps=run_steps if spec.shortens else None,
        early_tells=early_tells(spec.check_every, 0 if spec.budget else spec.steps),
        design=design_of(spec),
    )


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


def _work(spec: ScanSpec, problem: Problem, short: bool) -> tuple[int, int]:
    """Optimizer steps of a search of a variant: where each run takes its whole budget, likely and at most."""
    likely, most = probes_of(spec, problem)
    variant, n = problem.variant, _likely_n(problem)
    shorter = budget_steps(spec, variant, n, short=True) if short else 0
    longest = most_steps(problem, spec)
    return (
        likely * (budget_steps(spec, variant, n) + shorter),
        most * (longest + (round(longest / 3) if short else 0)),
    )


def _likely_n(problem: Problem) -> int:
    """An n at which a scan may well have probes."""
    return min(problem.n_max, max(problem.n_min, problem.params // 2))


def _step_seconds(prepared: Prepared, problem: Problem) -> float:
    """Seconds of one model-step of a variant, measured on as many models as a round has."""
    n = _likely_n(problem)
    rules = StopRules.of(prepared.setting.spec, problem.variant, n)
    steps = max(1, min(20, (rules.check_every - 1) // 2))
    # The same checks, but no end of the budget while the clock runs.
    budget = max(rules.steps, 100 * steps, problem.variant.warmup + 1)
    timed = dataclasses.replace(prepared.setting.spec, budget=None, steps=budget, check_every=rules.check_every)
    setting = dataclasses.replace(prepared.setting, spec=timed)
    backend = prepared.make_backend(setting, prepared.bucket(problem.variant))
    models = min(8, prepared.slots)
    state = backend.init([Run.of(setting, problem, Probe(problem.index, n, k)) for k in range(models)])
    backend.run(state, steps)  # as many as are timed: a graph is recorded for a number of steps
    begin = time.perf_counter()
    report = backend.run(state, state.clock + steps)
    used = prepared.workers if backend.most_together else 1
    return (time.perf_counter() - begin) / max(1, report.model_steps) / used


@dataclass(slots=True)
class _Interrupts:
    """Ctrl-C and SIGTERM as exceptions, but not in the middle of writing: there they wait until the write is done.

    It is remembered too: an exception that a signal raises inside a finaliser or a weak reference's callback, of
    which recording a graph makes many, is printed and lost.
    """

    _writing: bool = False
    _pending: type[BaseException] | None = None
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "_Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _on_signal(self, number: int, _: object) -> None:
        self._pending = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if not self._writing:
            raise self._pending

    def check(self) -> None:
        """Raises what came and was held back or lost."""
        if self._pending is not None:
            raise self._pending

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
    curvature: int
    time_limit: float | None = None
    stored: list[ProbeResult] = field(default_factory=list)  # by an earlier part of the scan
    search: Search = field(init=False)
    trainer: Trainer = field(init=False)
    begin: float = field(init=False)
    search_seconds: float = 0.0
    done: int = 0
    committed: int = 0
    stored_steps: int = 0
    unwritten: list[ProbeResult] = field(default_factory=list)
    ended: list[ProbeResult] = field(default_factory=list)  # in the order of their rows, if curvature is to be measured
    to_measure: int = 0
    measured: int = 0
    curvature_seconds: float = 0.0
    written_at: float = 0.0
    reported_at: float = 0.0
    rate: deque[tuple[float, int]] = field(default_factory=deque)

    def run(self) -> None:
        """Until the search is done, or Ctrl-C; the store is complete and closed afterwards."""
        spec, problems = self.spec, self.prepared.problems
        earlier = max((result.finished for result in self.stored), default=0.0)
        self.begin = time.perf_counter() - earlier

        self.search = make_search(spec, problems)
        prepared = self.prepared
        processes = Processes(prepared.workers) if prepared.apart else None
        self.trainer = Trainer(
            prepared.setting,
            problems,
            prepared.maker(processes),
            prepared.slots,
            workers=prepared.workers,
            bucket=prepared.bucket,
            keeper=Keeper(prepared.setting, self.save_weights),
            elapsed=earlier,
        )
        self._searching(self.search.tell, self.stored)
        self.done = self.committed = len(self.stored)
        if self.curvature:
            self.ended = list(self.stored)
        self.stored_steps = sum(result.steps for result in self.stored)
        self.stored = []
        late = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        status = "interrupted"
        try:
            while not self.search.done:
                if time.perf_counter() >= late:
                    break
                self.trainer.submit(self._searching(self.search.ask))
                self._take(self.trainer.advance())
                self.interrupts.check()
            else:
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
            self._searching(self.search.tell, results)
        if self.unwritten and now - self.written_at >= _COMMIT_SECONDS:
            with self.interrupts.deferred():
                self._commit()
        self._report_at_times()

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
            "model_steps": self.stored_steps + load.model_steps,
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


def same_value(new: object, old: object) -> bool:
    """Whether two values are equal, or both NaN."""
    return new == old or (new != new and old != old)
