"""Which probes can train together, how many at once, and what they take. Pure: no torch, nothing is allocated."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from fasttrain.data import DataInfo, available
from fasttrain.data.prepare import ROWS, whole
from fasttrain.errors import UserError
from fasttrain.records import Problem
from fasttrain.spec import FULL_BATCH, ScanSpec, Variant, budget_steps
from fasttrain.stopping import CHECKS

_MOST_SLOTS = {"cpu": 64, "cuda": 1024}
_SLOTS_OF_WORKER = 2  # so that a worker that has finished with one finds the next at once
_ROWS = 7  # parameters, gradient, two moments, temporaries and a copy while slots are refilled
_MUON_ROWS = 4  # of Newton-Schulz, for the largest matrix
_SHAMPOO_LARGEST = 1024  # optim.SHAMPOO_LARGEST, which cannot be had without torch
_SHAMPOO_RATIO = 16  # numbers of all statistics over parameters, where the shapes are not known here
_PASS_ROWS = 128
_LINE_BYTES = 64
_GRADIENT_NUMBERS = 48 * 3 * 16  # of native, where a step takes one pass
_PLENTY = 0.25  # of the memory; up to this the estimates decide
_CHECK_BYTES = 160  # of what is kept of a check while a run lasts


def bucket(variant: Variant) -> Variant:
    """The key of the bucket: variants with an equal key share one step function, whatever their learning rates.

    Data and initial weights may differ too, and the weight decay, but not whether there is one.
    """
    decay = 1.0 if variant.weight_decay else 0.0
    return dataclasses.replace(
        variant, lr=1.0, momentum=0.0, weight_decay=decay, labels="random", inputs="real", init_scale=1.0
    )


def optimizer_numbers(variant: Variant, features: int, params: int) -> int:
    """Numbers that an optimizer takes beyond what SGD and Adam do, in its state or while it works.

    Of Shampoo exactly for multilayer perceptrons: statistics and roots, a copy of them while slots are refilled, and an
    eigenvalue problem. For others a bound that holds while no kernel has sides of a ratio above 16.
    """
    if variant.optimizer == "muon":
        return _MUON_ROWS * params
    if variant.optimizer != "shampoo":
        return 0
    if variant.arch not in ("mlp", "linear"):
        return 5 * _SHAMPOO_RATIO * params
    whole, diagonal, largest = 0, 0, 0
    for size, count in _dimensions(variant, features):
        if size > _SHAMPOO_LARGEST:
            diagonal += count * size
        else:
            whole, largest = whole + count * size**2, max(largest, size**2)
    return 2 * (2 * whole + diagonal) + 4 * largest


def _dimensions(variant: Variant, features: int) -> list[tuple[int, int]]:
    """The sizes of the dimensions of all weights and biases of a multilayer perceptron, and how many there are."""
    if variant.depth == 0:
        return [(features, 1), (variant.classes, 2)]
    # A weight has its output and its input as dimensions, a bias its output.
    return [(features, 1), (variant.width, 3 * variant.depth), (variant.classes, 2)]


def default_n_max(params: int, info: DataInfo, labels: str = "random", inputs: str = "real") -> int:
    """Where the spec leaves n-max open: the samples there are, or 4 times the parameters where any n can be drawn.

    Random labels of C classes can be fitted up to about 2 samples a parameter (Cover 1965 for a linear classifier).
    """
    most = available(info, labels, inputs)
    return most if most is not None else 4 * params


def most_steps(problem: Problem, spec: ScanSpec) -> int:
    """Optimizer steps that a run of a variant may take at whichever n allows most: an end of its range."""
    return max(budget_steps(spec, problem.variant, n) for n in (problem.n_min, problem.n_max))


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """A variant and what trains it.

    Attributes:
        problem: the variant.
        backend: its name, as ``backends.choose`` gave it.
        key: of its bucket, as ``backends.together`` gave it.
    """

    problem: Problem
    backend: str
    key: Variant


def data_bytes(trained: Sequence[Trained], info: DataInfo, item: int, device: str) -> int:
    """Memory of the inputs that the runs of a scan share, beyond the data set as it was read, in bytes.

    A pool is kept for all samples and for those to train on, each also with its features shuffled, as the labels and
    inputs ask for (``data.prepare``). On a CPU it counts as it is kept, converted to the type that models train in, and
    once more where a bucket joins the pools of its runs; on a GPU in every bucket. With true labels the samples
    held out are kept in all three ways.

    Args:
        trained: the variants.
        info: the data set.
        item: bytes of a number, 4 or 8.
        device: ``"cpu"`` or ``"cuda"``; the memory counted is that device's.
    """
    if info.size is None:
        return 0
    kept = 1 if info.pixels else 8
    pools: set[_Pool] = set()
    converted: set[_Pool] = set()
    buckets: dict[tuple[str, Variant], set[_Pool | None]] = defaultdict(set)
    tests: set[tuple[str, str, int]] = set()
    for one in trained:
        variant = one.problem.variant
        pool = _Pool(whole(variant.labels) or info.official, variant.inputs == "shuffled")
        pools |= {pool, dataclasses.replace(pool, shuffled=False)}  # shuffled ones are made of the others
        buckets[one.backend, one.key].add(pool if variant.inputs != "gaussian" else None)
        if not whole(variant.labels):
            tests.add((variant.labels.partition(":")[0], variant.inputs, variant.classes))
    count = info.test_size * len(tests) * item  # values of one feature, in bytes
    for (backend, _), of_bucket in buckets.items():
        own = of_bucket - {None}
        raw = backend == "vmap" and info.pixels and len(of_bucket) == 1
        if not raw and backend != "loop" and (info.pixels or item != 8):
            converted |= own  # type: ignore[arg-type]  # None is out
        copies = 0
        if backend in ("vmap", "stacked"):
            # A bucket's pools are joined anew when its runs change: those of the old, of the coming and of all runs.
            copies = 3 if len(of_bucket) > 1 else int(device == "cuda")
        elif backend == "triton":
            copies = 2 if device == "cuda" else 0  # an arena that grows
        count += copies * len(own) * info.size * (1 if raw else item)
    if device == "cpu":
        for pool in pools:
            held = 0 if pool.whole and not info.official else info.test_size
            in_place = info.pixels and not pool.shuffled  # the data set itself
            count += kept * ((0 if in_place else info.size) + (0 if in_place and info.official else held))
        count += len(converted) * info.size * item
        if info.pixels:  # while they become numbers, a block at a time
            count += (2 if converted else 1) * 8 * min(ROWS, info.size)
        else:  # while it is standardised: the part to train on, and where channels are columns
            count += (2 if info.image else 1) * 8 * info.size
    return count * info.features


@dataclasses.dataclass(frozen=True, slots=True)
class _Pool:
    """What tells the pools of a data set apart."""

    whole: bool  # standardised over all samples
    shuffled: bool


def probe_bytes(
    problem: Problem, spec: ScanSpec, info: DataInfo, item: int, device: str = "cpu", backend: str = ""
) -> int:
    """Memory of one running probe at its largest n, in bytes.

    Args:
        problem: the variant.
        spec: the scan.
        info: the data set.
        item: bytes of a number, 4 or 8.
        device: ``"cpu"`` or ``"cuda"``.
        backend: which trains it: native pads its arrays, and the loop keeps each run's inputs.
    """
    return sum(_parts(problem, spec, info, item, device, backend).values())


def bytes_beyond(problem: Problem, spec: ScanSpec, info: DataInfo, item: int, n: int) -> int:
    """The part of ``probe_bytes`` that grows with the steps, and that of samples beyond n, in bytes."""
    drawn = available(info, problem.variant.labels, problem.variant.inputs) is None
    a_sample = 16 + (info.features * (8 + 3 * item) if drawn else 0)
    return sum(_parts_of_steps(problem, spec).values()) + (problem.n_max - n) * a_sample


def _parts_of_steps(problem: Problem, spec: ScanSpec) -> dict[str, int]:
    steps = most_steps(problem, spec)
    block = min(spec.check_every, steps)
    checks = -(-steps // spec.check_every)
    if spec.budget is not None:
        checks = max(checks, min(steps, 2 * CHECKS))  # every floor(steps / CHECKS) steps: fewer than twice as many
    return {"indices": 4 * 8 * block * problem.variant.batch_size, "checks": _CHECK_BYTES * checks}


def _parts(
    problem: Problem, spec: ScanSpec, info: DataInfo, item: int, device: str, backend: str = ""
) -> dict[str, int]:
    """The same, by what takes it."""
    variant = problem.variant
    # The fused kernels of a GPU take a full batch at once, the others in passes.
    full = max(_PASS_ROWS, problem.n_max) if device == "cuda" else _PASS_ROWS
    batch = full if variant.batch_size == FULL_BATCH else max(variant.batch_size, _PASS_ROWS)
    perceptron = info.features + 2 * (variant.depth + 1) * max(variant.width, variant.classes)
    activations = batch * (problem.elements or perceptron)
    state = optimizer_numbers(variant, info.features, problem.params)
    numbers = _ROWS * problem.params + state + 2 * activations
    if backend == "native":
        numbers = max(numbers, _native_numbers(variant, info.features, item))
    drawn = available(info, variant.labels, variant.inputs) is None
    own_data = problem.n_max * info.features * (8 + 3 * item) if drawn or backend == "loop" else 0
    return {
        "model": item * numbers,
        "samples": 2 * 8 * problem.n_max + own_data,
        **_parts_of_steps(problem, spec),
    }


def _native_numbers(variant: Variant, features: int, item: int) -> int:
    """What kernels/mlp.c takes for a model and the scratch of a thread, with Adam: rows of whole cache lines."""
    line = _LINE_BYTES // item

    def whole_lines(columns: int) -> int:
        return -(-columns // line) * line

    def pitch(columns: int) -> int:
        return whole_lines(columns + 1) + line  # an odd number of lines

    wide = whole_lines(variant.width)
    hidden = (features + 1 + (variant.depth - 1) * (variant.width + 1)) * wide if variant.depth else 0
    params = hidden + ((variant.width if variant.depth else features) + 1) * whole_lines(variant.classes)
    largest = max(variant.width, variant.classes)
    a_sample = pitch(features) + 2 * variant.depth * pitch(variant.width) + 2 * pitch(largest)
    turned = (largest if variant.depth > 1 else variant.classes) * wide
    return 4 * params + _PASS_ROWS * a_sample + turned + _GRADIENT_NUMBERS


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How a scan uses the machine.

    Attributes:
        slots: probes that train at once.
        model_bytes: peak of one slot, in bytes; estimated, or measured where memory is what limits the slots.
        data_bytes: what all of them share, in bytes; estimated.
        most: slots that there would be with plenty of memory.
        available: bytes that may be taken.
        costliest: the variant that takes ``model_bytes``.
    """

    slots: int
    model_bytes: int
    data_bytes: int
    most: int
    available: int
    costliest: Trained

    @property
    def tight(self) -> bool:
        """Whether memory may matter: an estimate that is wrong by some factor would change the slots."""
        return self.most * self.model_bytes + self.data_bytes > _PLENTY * self.available

    def measured(self, model_bytes: int) -> "Plan":
        """The plan with what a slot really takes."""
        slots = min(self.most, max(self.available - self.data_bytes, 0) // max(model_bytes, 1))
        return dataclasses.replace(self, slots=slots, model_bytes=model_bytes)

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of all, in bytes."""
        return self.slots * self.model_bytes + self.data_bytes


def make_plan(
    trained: Sequence[Trained],
    spec: ScanSpec,
    info: DataInfo,
    *,
    device: str,
    item: int,
    available: int,
    workers: int | None = None,
    copies: int = 1,
) -> Plan:
    """Slots and memory.

    Args:
        trained: the variants.
        spec: the scan.
        info: the data set.
        device: ``"cpu"`` or ``"cuda"``.
        item: bytes of a number, 4 or 8.
        available: bytes that may be taken.
        workers: threads, where each trains one model at a time; None where models train together.
        copies: of the data, in as many processes.

    Raises:
        UserError: a variant does not fit into memory even alone (two rows are the least that train together), or not
            beside the data.
    """
    needs = ((probe_bytes(one.problem, spec, info, item, device, one.backend), one) for one in trained)
    largest, culprit = max(needs, key=lambda pair: pair[0])
    shared = copies * data_bytes(trained, info, item, device)
    most = _MOST_SLOTS[device] if workers is None else _SLOTS_OF_WORKER * workers
    plan = Plan(0, 0, shared, most, available, culprit).measured(largest)
    check_plan(plan, spec, info, device)
    return plan


def check_plan(plan: Plan, spec: ScanSpec, info: DataInfo, device: str) -> None:
    """Whether at least two models train at once, the least that do.

    Raises:
        UserError: they do not; it names what makes them large.
    """
    if plan.slots < 2:
        largest, shared, culprit = plan.model_bytes, plan.data_bytes, plan.costliest
        free = f"and {plan.available / 2**30:,.1f} GiB are free"
        if shared > 2 * largest:
            taken = f"{spec.data} takes about {shared / 2**30:,.1f} GiB for these labels and inputs"
            raise UserError("data", spec.data, f"{taken}, {free}; expected less data, or fewer of them")
        option, value = _culprit(culprit.problem, spec, info, device)
        raise UserError(
            option,
            value,
            f"a model of {culprit.problem.params:,} parameters takes about {2 * largest / 2**30:,.1f} GiB to train, "
            f"{free}; expected a smaller one",
        )


def _culprit(problem: Problem, spec: ScanSpec, info: DataInfo, device: str) -> tuple[str, object]:
    """The option to name when a model does not fit: the one that makes it large."""
    variant = problem.variant
    parts = _parts(problem, spec, info, 4, device)
    most = max(parts, key=lambda name: parts[name])
    if most == "checks" or (most == "indices" and spec.check_every > variant.batch_size):
        return "check_every", spec.check_every
    if most == "samples" and spec.n_max is not None and spec.n_max > info.features:
        return "n_max", spec.n_max
    if info.features >= max(variant.width, variant.depth, variant.classes, variant.batch_size):
        return "data", spec.data
    sizes = {"widths": variant.width, "depths": variant.depth, "classes": variant.classes}
    sizes["batch_size"] = variant.batch_size
    option = max(sizes, key=lambda name: sizes[name])
    return option, sizes[option]
