"""Data sets, and the task of one run: its inputs and labels from (data set, labels, seed, n)."""

import functools
import re
from dataclasses import dataclass

import numpy as np

from fasttrain.errors import UserError
from fasttrain.sampling import Purpose, generator, subset
from fasttrain.spec import ScanSpec

_DATA = "expected digits or gaussian:D with D inputs, such as gaussian:64"
_MOST_FEATURES = 2**20


@dataclass(frozen=True, slots=True)
class DataInfo:
    """What is known of a data set before it is read.

    Attributes:
        name: as in the spec.
        features: I, inputs a sample.
        classes: its own number of classes.
        size: samples that it has; None where any number can be drawn.
    """

    name: str
    features: int
    classes: int
    size: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """The training set of one run: sample i is ``pool[rows[i]]`` with label ``y[i]``.

    Attributes:
        pool: float64 [R, I]; one array shared by all tasks of a data set, or a task's own.
        rows: int64 [N], rows of the pool.
        y: int64 [N], labels in [0, C).
    """

    pool: np.ndarray
    rows: np.ndarray
    y: np.ndarray


def describe(name: str) -> DataInfo:
    """Features, classes and size of a data set, without reading it.

    Raises:
        UserError: there is no such data set.
    """
    if name == "digits":
        return DataInfo(name, features=64, classes=10, size=1797)
    if match := re.fullmatch(r"gaussian:(\d{1,9})", name):
        features = int(match[1])
        if 1 <= features <= _MOST_FEATURES:
            return DataInfo(name, features=features, classes=10, size=None)
    raise UserError("data", name, _DATA)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled 8x8 digits, every pixel to mean 0 and variance 1; a constant pixel stays 0."""
    from sklearn.datasets import load_digits
    from sklearn.preprocessing import StandardScaler

    x, y = load_digits(return_X_y=True)
    return StandardScaler().fit_transform(x), y.astype(np.int64)


def check(spec: ScanSpec) -> DataInfo:
    """The spec's data set, after checking labels, classes and n against it.

    Raises:
        UserError: the data set is unknown, or does not have the labels, the classes or the samples asked for.
    """
    info = describe(spec.data)
    if "true" in spec.labels:
        if info.size is None:
            raise UserError("labels", "true", f"{spec.data} has no true labels; expected random")
        wrong = [c for c in spec.classes or () if c != info.classes]
        if wrong:
            raise UserError("classes", wrong[0], f"true labels of {spec.data} have {info.classes} classes")
    for option, n in (("n_max", spec.n_max), ("n_min", spec.n_min)):
        if n is not None and info.size is not None and n > info.size:
            raise UserError(option, n, f"{spec.data} has {info.size} samples; expected at most that")
    return info


def task(spec: ScanSpec, labels: str, classes: int, seed: int, n: int) -> Task:
    """Inputs and labels of one run, keyed by (spec.seed, seed, n).

    Random labels are drawn uniformly over the classes, each sample's on its own. Gaussian inputs are N(0, I_D).
    """
    info = describe(spec.data)
    if info.size is None:
        pool = generator(spec.seed, seed, n, Purpose.INPUTS).standard_normal((n, info.features))
        rows = np.arange(n)
        true = None
    else:
        pool, true = _digits()
        rows = subset(spec.seed, seed, n, info.size)
    if labels == "true":
        assert true is not None
        return Task(pool, rows, true[rows])
    return Task(pool, rows, generator(spec.seed, seed, n, Purpose.LABELS).integers(0, classes, n))
