"""Data sets, and the task of one run: its inputs and labels from (data set, labels, inputs, seed, n)."""

import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass

import numpy as np

from fasttrain.data import files, sources
from fasttrain.data.arrays import MOST_FEATURES, Dataset
from fasttrain.data.prepare import Part, Task, held_out, moments, part, whole
from fasttrain.errors import UserError
from fasttrain.sampling import Purpose, generator, subset
from fasttrain.spec import ScanSpec

_DATA = (
    f"expected {', '.join(sources.KNOWN)}; gaussian:D with D inputs, such as gaussian:64, or gaussian:CxHxW; "
    "or a file, such as ./mine.csv"
)
_MOST_LISTED = 100  # columns that a file of results names


@dataclass(frozen=True, slots=True)
class DataInfo:
    """What is known of a data set.

    Attributes:
        name: as in the spec.
        shape: of a sample: (features,), or (channels, height, width) of an image.
        classes: its own number of classes.
        size: samples that random labels may have; None where any number can be drawn.
        test_size: samples that are kept for testing where labels are true.
        official: whether those came with it. Otherwise they are a fixed fifth of ``size``, at most 10,000.
        pixels: whether its inputs are uint8, and stay so until a model takes them; else they are float64.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    size: int | None
    test_size: int = 0
    official: bool = False
    pixels: bool = False

    @property
    def features(self) -> int:
        """I, inputs a sample."""
        return math.prod(self.shape)

    @property
    def image(self) -> bool:
        """Whether a sample is an image, [channels, height, width]."""
        return len(self.shape) == 3


def describe(name: str) -> DataInfo:
    """Shape, classes and size of a data set. Named ones are not read; a file is, and the next call reuses it.

    Raises:
        UserError: there is no such data set, or its file cannot be used.
    """
    if known := sources.KNOWN.get(name):
        return DataInfo(
            name,
            known.shape,
            known.classes,
            known.size,
            known.test or held_out(known.size),
            official=bool(known.test),
            pixels=known.pixels,
        )
    if shape := _gaussian(name):
        return DataInfo(name, shape, classes=10, size=None)
    if files.is_file_name(name):
        return _info(sources.load(name, again=True))
    raise UserError("data", name, _DATA)


def _gaussian(name: str) -> tuple[int, ...] | None:
    """The shape that ``gaussian:D`` or ``gaussian:CxHxW`` asks for."""
    match = re.fullmatch(r"gaussian:(\d{1,9})(?:x(\d{1,9})x(\d{1,9}))?", name)
    if not match:
        return None
    shape = tuple(int(side) for side in match.groups() if side is not None)
    return shape if 1 <= math.prod(shape) <= MOST_FEATURES else None


def _info(data: Dataset) -> DataInfo:
    official = data.y_test is not None
    test = len(data.y_test) if data.y_test is not None else held_out(len(data.y))
    return DataInfo(data.name, data.shape, data.classes, len(data.y), test, official, data.x.dtype == np.uint8)


def available(info: DataInfo, labels: str, inputs: str) -> int | None:
    """Samples that a task may have at most, or None where any number can be drawn.

    Args:
        info: the data set.
        labels: ``"random"``, ``"true"`` or ``"corrupted:SHARE"``.
        inputs: ``"real"``, ``"shuffled"`` or ``"gaussian"``.
    """
    if info.size is None or inputs == "gaussian":
        return None
    return info.size if whole(labels) or info.official else info.size - info.test_size


def check(spec: ScanSpec) -> DataInfo:
    """The spec's data set, read (and fetched, if it is not here yet) and with labels, classes and n checked against it.

    Raises:
        UserError: the data set is unknown or damaged, cannot be fetched, or does not have the labels, the inputs, the
            classes or the samples asked for.
    """
    info = describe(spec.data)
    true = [labels for labels in spec.labels if labels != "random"]
    if info.size is None:
        if true:
            raise UserError("labels", true[0], f"{spec.data} has no true labels; expected random")
        if changed := [inputs for inputs in spec.inputs if inputs != "real"]:
            raise UserError("inputs", changed[0], f"{spec.data} is drawn already; expected real")
        return info
    if true:
        if "gaussian" in spec.inputs:
            raise UserError("inputs", "gaussian", f"such inputs have no {true[0]} labels; expected labels random")
        wrong = [c for c in spec.classes or () if c != info.classes]
        if wrong:
            raise UserError("classes", wrong[0], f"{true[0]} labels of {spec.data} have {info.classes} classes")
    for labels in spec.labels:
        for inputs in spec.inputs:
            most = available(info, labels, inputs)
            for option, n in (("n_max", spec.n_max), ("n_min", spec.n_min), ("n", spec.n[-1] if spec.n else None)):
                if n is not None and most is not None and n > most:
                    held = "" if most == info.size else f" to train on with {labels} labels, {info.test_size} held out"
                    raise UserError(option, n, f"{spec.data} has {most} samples{held}; expected at most that")
    sources.load(spec.data, again=True)
    return info


def task(spec: ScanSpec, labels: str, classes: int, seed: int, n: int, inputs: str = "real") -> Task:
    """Inputs and labels of one run, keyed by (spec.seed, seed, n).

    Random labels are drawn uniformly over the classes, each sample's on its own; of corrupted ones, each is drawn so
    with that probability, and is the true one otherwise. ``gaussian:D`` is N(0, I_D); gaussian inputs have the mean
    and variance of every standardised feature instead (Zhang et al. 2017).

    Args:
        spec: the scan; only its data and seed count here.
        labels: a label mode of it.
        classes: C.
        seed: of the probe.
        n: samples.
        inputs: an input mode of it.
    """
    if shape := _gaussian(spec.data):
        pool = generator(spec.seed, seed, n, Purpose.INPUTS).standard_normal((n, math.prod(shape)))
        return Task(pool, np.arange(n), _drawn(spec, seed, n, classes))
    own = _part(spec, labels, inputs)
    if inputs == "gaussian":
        mean, deviation = moments(own)
        pool = generator(spec.seed, seed, n, Purpose.INPUTS).standard_normal((n, len(mean)))
        pool *= deviation
        pool += mean
        return Task(pool, np.arange(n), _drawn(spec, seed, n, classes))
    rows = own.rows[subset(spec.seed, seed, n, len(own.rows))]
    if labels == "random":
        y = _drawn(spec, seed, n, classes)
    elif labels == "true":
        y = own.y[rows]
    else:
        rng = generator(spec.seed, seed, n, Purpose.LABELS)
        replaced = rng.random(n) < float(labels.partition(":")[2])
        y = np.where(replaced, rng.integers(0, classes, n), own.y[rows])
    return Task(own.pool, rows, y, own.shift, own.scale)


def _drawn(spec: ScanSpec, seed: int, n: int, classes: int) -> np.ndarray:
    return generator(spec.seed, seed, n, Purpose.LABELS).integers(0, classes, n)


def _part(spec: ScanSpec, labels: str, inputs: str) -> Part:
    data = sources.load(spec.data)
    split_name = spec.data if spec.data in sources.KNOWN else "a file"
    of_all = whole(labels) or data.y_test is not None  # the same part then, and one pool
    return part(data, split_name, of_all, spec.seed if inputs == "shuffled" else None)


def test_set(spec: ScanSpec, labels: str, inputs: str, classes: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The samples that a variant never trains on, with their true labels.

    Args:
        spec: the scan.
        labels: label mode of the variant; with corrupted labels, those of the test samples are true.
        inputs: input mode of the variant; the test inputs are standardised and shuffled as those for training.
        classes: C.

    Returns:
        x float64 [M, I] and y int64 [M]; None where labels are random, or inputs are drawn, or M would be 0.
    """
    if labels == "random" or inputs == "gaussian" or _gaussian(spec.data):
        return None
    own = _part(spec, labels, inputs)
    if own.test is None or own.y_test is None:
        return None
    assert classes > own.y_test.max()
    return Task(own.test, np.arange(len(own.test)), own.y_test, own.shift, own.scale).inputs(), own.y_test


test_set.__test__ = False  # type: ignore[attr-defined]  # a test module that imports it has one test less


def provenance(spec: ScanSpec) -> dict[str, str | int | float]:
    """What was read and what was done to it; for the file of a scan.

    Returns:
        data_source, data_sha256 (of types, shapes and values of x, y and the test samples that came with it, as they
        were read), data_size, data_shape (``"1x8x8"``), data_preparation (JSON), data_test_size (0 where nothing is
        tested, as with random labels).
    """
    info = describe(spec.data) if _gaussian(spec.data) else _info(sources.load(spec.data))
    out: dict[str, str | int | float] = {"data_shape": "x".join(map(str, info.shape))}
    if info.size is None:
        out |= {"data_source": "drawn", "data_sha256": "", "data_size": 0, "data_test_size": 0}
        return out | {"data_preparation": json.dumps({"inputs": "standard normal"})}
    data = sources.load(spec.data)
    tested = any(labels != "random" for labels in spec.labels)
    out |= {
        "data_source": data.source,
        "data_sha256": _sha256(data),
        "data_size": info.size,
        "data_test_size": info.test_size if tested else 0,
    }
    return out | {"data_preparation": json.dumps(_preparation(spec, data, info))}


def _preparation(spec: ScanSpec, data: Dataset, info: DataInfo) -> dict[str, object]:
    by = "channel" if data.by_channel else "column"
    told: dict[str, object] = {
        "type": str(data.x.dtype),
        "standardised": f"mean 0 and variance 1 of every {by} over what is trained on; a constant one is 0",
    }
    if data.by_channel and data.x.dtype == np.uint8:
        first = np.arange(0, info.features, info.features // info.shape[0])
        for all_of_it in sorted({whole(labels) for labels in spec.labels}):
            own = _part(spec, "random" if all_of_it else "true", "real")
            assert own.shift is not None
            assert own.scale is not None
            told["random labels" if all_of_it else "true labels"] = {
                "mean": own.shift[first].tolist(),
                "one over standard deviation": own.scale[first].tolist(),
            }
    categorical = {column.name: column.categories for column in data.columns if column.categories}
    if categorical:
        told["one-hot encoded, categories"] = dict(list(categorical.items())[:_MOST_LISTED])
        if len(categorical) > _MOST_LISTED:
            told["more columns encoded"] = len(categorical) - _MOST_LISTED
    if any(not whole(labels) for labels in spec.labels):
        told["test part"] = "official" if info.official else "a fixed fifth, at most 10000"
    return told


@functools.lru_cache(maxsize=4)
def _sha256(data: Dataset) -> str:
    digest = hashlib.sha256()
    for values in (data.x, data.y, data.x_test, data.y_test):
        if values is not None:
            digest.update(f"{values.dtype.str} {values.shape};".encode())
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


__all__ = [
    "DataInfo",
    "Task",
    "available",
    "check",
    "describe",
    "provenance",
    "task",
    "test_set",
]
