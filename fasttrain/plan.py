"""Which probes can train together, how many at once, and what they take. Pure: no torch, nothing is allocated."""

import dataclasses

from fasttrain.data import DataInfo, available
from fasttrain.errors import UserError
from fasttrain.records import Problem
from fasttrain.spec import FULL_BATCH, ScanSpec, Variant

_MOST_SLOTS = {"cpu": 64, "cuda": 1024}
_SLOTS_OF_WORKER = 2  # so that a worker that has finished with one finds the next at once
_ROWS = 7  # parameters, gradient, two moments, temporaries and a copy while slots are refilled
_MUON_ROWS = 4  # of Newton-Schulz, for the largest matrix
_SHAMPOO_LARGEST = 1024  # optim.SHAMPOO_LARGEST, which cannot be had without torch
_SHAMPOO_RATIO = 16  # numbers of all statistics over parameters, where the shapes are not known here
_PASS_ROWS = 128
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


def probe_bytes(problem: Problem, spec: ScanSpec, info: DataInfo, item: int, device: str = "cpu") -> int:
    """Memory of one running probe at its largest n, in bytes.

    Args:
        problem: the variant.
        spec: the scan.
        info: the data set.
        item: bytes of a number, 4 or 8.
        device: ``"cpu"`` or ``"cuda"``.
    """
    return sum(_parts(problem, spec, info, item, device).values())


def _parts(problem: Problem, spec: ScanSpec, info: DataInfo, item: int, device: str) -> dict[str, int]:
    """The same, by what takes it."""
    variant = problem.variant
    # The fused kernels of a GPU take a full batch at once, the others in passes.
    full = max(_PASS_ROWS, problem.n_max) if device == "cuda" else _PASS_ROWS
    batch = full if variant.batch_size == FULL_BATCH else max(variant.batch_size, _PASS_ROWS)
    perceptron = info.features + 2 * (variant.depth + 1) * max(variant.width, variant.classes)
    activations = batch * (problem.elements or perceptron)
    state = optimizer_numbers(variant, info.features, problem.params)
    block = min(spec.check_every, spec.steps)
    drawn = available(info, variant.labels, variant.inputs) is None
    own_data = problem.n_max * info.features * (8 + 3 * item) if drawn else 0
    return {
        "model": item * (_ROWS * problem.params + state + 2 * activations),
        "samples": 2 * 8 * problem.n_max + own_data,
        "indices": 4 * 8 * block * variant.batch_size,
        "checks": _CHECK_BYTES * -(-spec.steps // spec.check_every),
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How a scan uses the machine.

    Attributes:
        slots: probes that train at once.
        memory_bytes: estimated peak of all slots, in bytes.
    """

    slots: int
    memory_bytes: int


def make_plan(
    problems: list[Problem],
    spec: ScanSpec,
    info: DataInfo,
    *,
    device: str,
    item: int,
    available: int,
    workers: int | None = None,
) -> Plan:
    """Slots and memory.

    Args:
        problems: the variants.
        spec: the scan.
        info: the data set.
        device: ``"cpu"`` or ``"cuda"``.
        item: bytes of a number, 4 or 8.
        available: bytes that may be taken.
        workers: threads, where each trains one model at a time; None where models train together.

    Raises:
        UserError: a variant does not fit into memory even alone (two rows are the least that train together).
    """
    needs = ((probe_bytes(problem, spec, info, item, device), problem) for problem in problems)
    largest, culprit = max(needs, key=lambda pair: pair[0])
    most = _MOST_SLOTS[device] if workers is None else _SLOTS_OF_WORKER * workers
    slots = min(most, available // max(largest, 1))
    if slots < 2:
        option, value = _culprit(culprit, spec, info, device)
        raise UserError(
            option,
            value,
            f"a model of {culprit.params:,} parameters takes about {2 * largest / 2**30:,.1f} GiB to train, "
            f"and {available / 2**30:,.1f} GiB are free; expected a smaller one",
        )
    return Plan(slots=slots, memory_bytes=slots * largest)


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
