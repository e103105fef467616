"""What comes before a scan: everything that it needs, and that can go wrong before it begins; and whether a file can be
gone on with here."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fasttrain import factories, models
from fasttrain.analysis import Results, load
from fasttrain.backends import choose, configuration_text, make_backend, together
from fasttrain.backends.apart import ApartBackend, Processes
from fasttrain.backends.base import Run, Setting
from fasttrain.curvature import measure
from fasttrain.data import DataInfo, check, provenance
from fasttrain.designs import design_of, n_range, probes_of
from fasttrain.errors import UserError
from fasttrain.heldout import Keeper
from fasttrain.machine import (
    Peak,
    available_bytes,
    conditions,
    cores,
    free_memory,
    out_of_memory,
    resolve_device,
)
from fasttrain.models.matching import matched
from fasttrain.plan import Plan, Trained, bytes_beyond, check_plan, default_n_max, make_plan, most_steps
from fasttrain.records import Curvature, History, Outcome, Probe, ProbeResult, Problem, Saved
from fasttrain.search import Limits, Search, Stage, raced
from fasttrain.spec import ARCHITECTURES, FULL_BATCH, ScanSpec, Variant, budget_steps, budget_text, early_tells
from fasttrain.stopping import StopRules
from fasttrain.trainer import Trainer

# A probe of the default scan takes about this share of its budget.
_LIKELY_SHARE = 0.6
# Models whose memory is measured: fewer than two take another path, and the first bring what all share.
_LEAST_TRIED, _MOST_TRIED = 2, 6
_SOME_SAMPLES = 1024
_LEAST_SHARE = 0.25
_APART_STEPS = 20_000  # likely model-steps from which on processes of their own are worth their start of some seconds


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
    problems, unmatched = _problems(spec, info)
    setting = Setting(spec, info.features, device, dtype, info.shape)
    variants = [problem.variant for problem in problems]
    backends = [choose(spec.backend, setting, variant) for variant in variants]
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
    prepared = Prepared(setting, problems, plan, tuple(backends), workers, apart, tuple(unmatched))
    if not plan.tight or (model_bytes := _model_bytes(prepared)) is None:
        return prepared
    measured = plan.measured(model_bytes)
    check_plan(measured, spec, info, device.type)
    return dataclasses.replace(prepared, plan=measured)


def _model_bytes(prepared: Prepared) -> int | None:
    """Memory of a slot with the costliest variant, by training two models and some more for a step and a check.

    What is small and exact is taken from the estimate: what grows with the steps, and samples beyond some where passes
    take a part of them at once. Resident pages are a rough measure, and so no less than a part of the estimate counts.
    None where the system does not tell what a process takes, or where hardly two models are estimated to fit.
    """
    tried = _LEAST_TRIED, min(_MOST_TRIED, prepared.plan.slots)
    if tried[1] <= tried[0]:
        return None
    setting, problem = prepared.setting, prepared.plan.costliest.problem
    steps = problem.variant.warmup + 2
    at_once = prepared.chosen(problem.variant) == "loop" or problem.variant.batch_size == FULL_BATCH
    n = problem.n_max if at_once else min(problem.n_max, max(_SOME_SAMPLES, problem.n_min))
    spec = dataclasses.replace(setting.spec, budget=None, steps=steps, check_every=1, early_stop=False)
    short = dataclasses.replace(setting, spec=spec)
    try:
        peak = Peak(setting.device)
    except OSError:
        return None
    used = []
    with numerics(prepared):
        for models_now in tried:
            backend = prepared.make_backend(short, prepared.bucket(problem.variant))
            runs = [Run.of(short, problem, Probe(problem.index, n, k)) for k in range(models_now)]
            try:
                backend.run(backend.init(runs), 1)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                return prepared.plan.available  # not even these
            finally:
                del backend, runs
                free_memory(setting.device)
            used.append(peak.bytes)
    more = bytes_beyond(problem, setting.spec, check(setting.spec), setting.dtype.itemsize, n)
    found = max(used[1] - used[0], 0) // (tried[1] - tried[0]) + more
    return max(found, round(_LEAST_SHARE * prepared.plan.model_bytes))


def _problems(spec: ScanSpec, info: DataInfo) -> tuple[list[Problem], list[str]]:
    """The variants of a spec with their ranges of n, and a line on each that ``match_params`` leaves out."""
    variants = list(spec.variants(info.classes))
    unmatched: list[str] = []
    for variant in variants:
        models.check_images(variant, info.shape)
    if spec.match_params:
        variants, unmatched = matched(variants, info.shape, spec.heads)
    for variant in variants:
        models.check(variant, info.shape)
    problems = []
    for index, variant in enumerate(variants):
        params = models.parameter_count(variant, info.shape)
        n_min, n_max = n_range(spec, params, default_n_max(params, info, variant.labels, variant.inputs))
        elements = 0 if models.is_perceptron(variant) else models.sample_elements(variant, info.shape)
        problems.append(Problem(index, variant, params, n_min, n_max, elements))
        most = most_steps(problems[-1], spec)
        if variant.warmup >= most and variant.warmup > 0:
            what = f"expected less than the {most} steps that a run may take with {budget_text(spec)}"
            raise UserError("warmup", variant.warmup, what)
    return problems, unmatched


def stages(earlier: Sequence[ScanSpec], spec: ScanSpec, problems: Sequence[Problem]) -> list[Stage]:
    """What a scan was asked for before it was extended, in terms of the variants that it has now.

    Args:
        earlier: the specs, the oldest first.
        spec: what it is asked for now.
        problems: the variants of that.

    Raises:
        UserError: a later spec lacks a variant, lets other learning rates race, or has a smaller range of n.
    """
    asked = [(one, _problems(one, check(one))[0]) for one in earlier]
    at = {problem.variant: problem for problem in problems}
    out = []
    for (one, then), (later, after) in itertools.pairwise([*asked, (spec, list(problems))]):
        coming = {problem.variant: problem for problem in after}
        for problem in then:
            where = coming.get(problem.variant)
            if where is None:
                one_of = f"{problem.variant.arch} of width {problem.variant.width} and depth {problem.variant.depth}"
                raise UserError("spec", one_of, "was asked for before, and no more; expected all variants of before")
            if where.n_min > problem.n_min or (one.search == "paper" and where.n_min < problem.n_min):
                raise UserError("n_min", where.n_min, f"expected {_BEGIN[one.search == 'paper']} {problem.n_min}")
            if where.n_max < problem.n_max:
                raise UserError("n_max", where.n_max, f"expected at least that of before, {problem.n_max}")
        if one.races:
            known = {problem.variant for problem in then}
            races = [{problem.variant for problem in group} for group in raced(then)]
            for group in ({problem.variant for problem in group} for group in raced(after)):
                if group & known and group not in races:
                    rates = ",".join(map(str, later.lr))
                    raise UserError("lr", rates, "would change a race that has begun; expected the same learning rates")
        by_index = {at[p.variant].index: dataclasses.replace(p, index=at[p.variant].index) for p in then}
        out.append(Stage(by_index, limits_of(one), design_of(one)))
    return out


_BEGIN = {False: "at most that of before,", True: "that of before, where the ladders began,"}


def limits_of(spec: ScanSpec) -> Limits:
    """When the search of a spec stops."""
    return Limits(seeds=spec.seeds, interval=spec.interval, tolerance=spec.tolerance, max_probes=spec.max_probes)


def make_search(spec: ScanSpec, problems: Sequence[Problem], earlier: Sequence[ScanSpec] = ()) -> Search:
    """The search of a spec, at its beginning.

    Args:
        spec: what the scan is asked for.
        problems: its variants.
        earlier: what it was asked for before it was extended, the oldest first.
    """

    def run_steps(problem: Problem, n: int, short: bool) -> int:
        return budget_steps(spec, problem.variant, n, short)

    return Search(
        problems,
        **dataclasses.asdict(limits_of(spec)),
        races=spec.races,
        run_steps=run_steps if spec.shortens else None,
        early_tells=early_tells(spec.check_every, 0 if spec.budget else spec.steps),
        design=design_of(spec),
        earlier=stages(earlier, spec, problems),
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


def stated_conditions(prepared: Prepared) -> dict[str, str | int | float]:
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


_OF_VARIANTS = {"variant_backends": ",", "variant_configurations": ";"}
"""Of these, those that have a part for each variant, and what parts them."""


def check_same(prepared: Prepared, before: Results, own: Sequence[Problem] | None = None) -> None:
    """Whether this installation goes on as the scan began.

    Args:
        prepared: what it would do now.
        before: what is there.
        own: the variants of the file, in their order, with the index that they have in ``prepared``; its own ones by
            default.

    Raises:
        UserError: it would not.
    """
    now = stated_conditions(prepared)
    if own is None:
        own = prepared.problems
    else:
        for name, between in _OF_VARIANTS.items():
            parts = str(now[name]).split(between)
            now[name] = between.join(parts[problem.index] for problem in own)
        now["arch_source"] = own_sources(before.spec)
    for name, called in _SAME.items():
        if now.get(name) != before.attrs.get(name):
            raise UserError(
                "file",
                before.path,
                f"was made with other {called}: {name} was {before.attrs.get(name)} and is {now.get(name)} here",
            )
    held = [(int(row["params"]), int(row["n_min"]), int(row["n_max"])) for row in before.curves.to_dict("records")]
    if held != [(problem.params, problem.n_min, problem.n_max) for problem in own]:
        raise UserError("file", before.path, "has other variants than its spec gives here")
    different = [name for name in _ALIKE if now.get(name) != before.attrs.get(name)]
    if different:
        told = ", ".join(f"{name} was {before.attrs.get(name)}" for name in different)
        warnings.warn(f"the last bits of new runs may differ from those of an unbroken scan: {told}", stacklevel=3)


def identity(spec: ScanSpec, earlier: Sequence[ScanSpec], stated: Mapping[str, object]) -> str:
    """What a run under way is of, so that it goes on bit for bit nowhere else.

    Args:
        spec: of the scan.
        earlier: what it was asked for before it was extended.
        stated: its conditions, as ``stated_conditions`` gives them.
    """
    names = ("fasttrain_version", *_SAME, *_ALIKE)
    text = [[one.to_json() for one in (*earlier, spec)], {name: stated.get(name) for name in names}]
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()


def _arrays_of(prepared: Prepared, problem: Problem, steps: int) -> dict[str, Any]:
    """Shapes and types of what a backend saves of a run of a variant after so many steps."""
    backend = prepared.make_backend(prepared.setting, prepared.bucket(problem.variant))
    state = backend.init([Run.of(prepared.setting, problem, Probe(problem.index, problem.n_min, 0))])
    if steps:
        with numerics(prepared):
            backend.run(state, steps)
    [saved] = backend.saved(state)
    return {name: (values.shape, values.dtype) for name, values in saved.items() if name not in _OF_ANY_RUN}


_OF_ANY_RUN = {"step", "checks", "clock"}
"""Names in ``records.Saved`` that no backend adds."""


def sound(prepared: Prepared, saved: Mapping[Probe, Saved]) -> bool:
    """Whether runs under way have all that their backends need to go on with them, and nothing else."""
    fresh: dict[tuple[int, int], dict[str, Any]] = {}
    for probe, arrays in saved.items():
        if not 0 <= probe.variant < len(prepared.problems):
            return False
        problem = prepared.problems[probe.variant]
        if not problem.n_min <= probe.n <= problem.n_max:
            return False
        if not arrays.keys() >= _OF_ANY_RUN:
            return False
        rules = StopRules.of(prepared.setting.spec, problem.variant, probe.n, probe.short)
        step, checks, clock = (arrays[name] for name in ("step", "checks", "clock"))
        if step.shape != () or step.dtype.kind != "i" or not 0 <= step < rules.steps:
            return False
        if checks.shape != (int(step) // rules.check_every, 2) or not np.isfinite(checks).all():
            return False
        if clock.shape != (3,) or not (np.isfinite(clock) & (clock >= 0)).all():
            return False
        # What an optimizer makes at its first step is not there before.
        steps = min(int(step), 1)
        if (probe.variant, steps) not in fresh:
            fresh[probe.variant, steps] = _arrays_of(prepared, problem, steps)
        begun = {name: (v.shape, v.dtype) for name, v in arrays.items() if name not in _OF_ANY_RUN}
        if begun != fresh[probe.variant, steps]:
            return False
    return True


def unchanged(before: Results) -> Results:
    """A file again, once nobody else can write it: other runs may have come, but nothing else.

    Raises:
        UserError: it has been extended or replaced since it was read.
    """
    assert before.path is not None
    now = load(before.path)
    if (now.spec, now.earlier, now.attrs.get("started")) != (before.spec, before.earlier, before.attrs.get("started")):
        raise UserError("file", before.path, "has been changed meanwhile; try again")
    return now


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


def same_value(new: object, old: object) -> bool:
    """Whether two values are equal, or both NaN."""
    return new == old or (new != new and old != old)


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
