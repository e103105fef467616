"""What models are given: a data set split, standardised, and with its features shuffled or replaced."""

import functools
import hashlib
import threading
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fasttrain.data.arrays import Dataset
from fasttrain.sampling import Purpose, order_key, permute

ROWS = 4096
"""Samples that are converted at once."""
_HELD_OUT = 5  # one sample of so many, where a data set has no test part of its own
_MOST_HELD_OUT = 10_000
_CONVERTED: dict[tuple[int, int, str], np.ndarray] = {}
_CONVERTING = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """The training set of one run: sample i is row ``rows[i]`` of the pool with label ``y[i]``.

    Attributes:
        pool: [R, I]; one array shared by all tasks of a data set, or a task's own. float64, or uint8 pixels.
        rows: int64 [N], rows of the pool.
        y: int64 [N], labels in [0, C).
        shift: float64 [I], what to subtract from a row of the pool; None where the pool is final.
        scale: float64 [I], what to multiply the difference by; None with ``shift``.
    """

    pool: np.ndarray
    rows: np.ndarray
    y: np.ndarray
    shift: np.ndarray | None = None
    scale: np.ndarray | None = None

    def inputs(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Standardised inputs, float64 [K, I], of some rows of the pool; those of the task by default."""
        some = self.pool[self.rows if rows is None else rows]
        return some if self.shift is None else (some - self.shift) * self.scale

    def standardised(self, dtype: npt.DTypeLike) -> np.ndarray:
        """The whole pool standardised, [R, I], C-contiguous: one array for all tasks that share a pool.

        A conversion is kept as long as the pool is. A final pool that has the type already is returned itself.
        """
        dtype = np.dtype(dtype)
        if self.shift is None and self.pool.dtype == dtype and self.pool.flags.c_contiguous:
            return self.pool
        key = (id(self.pool), id(self.shift), dtype.str)
        with _CONVERTING:
            found = _CONVERTED.get(key)
            if found is None:
                found = np.empty(self.pool.shape, dtype=dtype)
                for start in range(0, len(found), ROWS):
                    some = self.pool[start : start + ROWS]
                    found[start : start + ROWS] = some if self.shift is None else (some - self.shift) * self.scale
                _CONVERTED[key] = found
                for owner in (self.pool, self.shift):
                    if owner is not None:  # ids are used again when an array is gone
                        weakref.finalize(owner, _CONVERTED.pop, key, None).atexit = False
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The samples of a data set that a label mode trains on, and those that it does not.

    Attributes:
        pool: as in ``Task``.
        shift: as in ``Task``.
        scale: as in ``Task``.
        rows: int64, rows of the pool that are trained on; the standardisation is theirs.
        y: int64, true label of each row of the pool.
        test: test inputs float64 or uint8 [M, I], to be treated as the pool; None if there are none.
        y_test: int64 [M].
    """

    pool: np.ndarray
    shift: np.ndarray | None
    scale: np.ndarray | None
    rows: np.ndarray
    y: np.ndarray
    test: np.ndarray | None
    y_test: np.ndarray | None


def held_out(size: int) -> int:
    """Test samples of a data set that has no test part of its own."""
    return min(size // _HELD_OUT, _MOST_HELD_OUT)


def split(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for testing, each rising, of a data set without a test part of its own.

    They follow from the name of the data set (for files, from its size alone) and never change.
    """
    digest = hashlib.sha256(f"fasttrain test part of {name}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    count = held_out(size)
    place = np.arange(count)
    test = np.sort(permute(place, size, np.zeros_like(place), key))
    return np.setdiff1d(np.arange(size), test, assume_unique=True), test


def whole(labels: str) -> bool:
    """Whether a label mode trains on all samples: random labels have no use for a test part."""
    return labels == "random"


@functools.lru_cache(maxsize=8)
def part(data: Dataset, split_name: str, of_all: bool, shuffled: int | None = None) -> Part:
    """The part of a data set that is trained on, standardised.

    Args:
        data: the data set.
        split_name: what its split is keyed by.
        of_all: whether there is no test part unless the data set came with one.
        shuffled: seed of the permutation of the features; None leaves them in place.
    """
    if shuffled is not None:
        plain = part(data, split_name, of_all, None)  # as all others call it, so that it is kept once
        order = feature_order(shuffled, plain.pool.shape[1])
        moved = [None if each is None else each[..., order] for each in (plain.shift, plain.scale, plain.test)]
        pool = np.empty_like(plain.pool)
        for start in range(0, len(pool), ROWS):
            np.take(plain.pool[start : start + ROWS], order, axis=1, out=pool[start : start + ROWS])
        return Part(pool, moved[0], moved[1], plain.rows, plain.y, moved[2], plain.y_test)
    every = np.arange(len(data.y))
    rows, held = (every, every[:0]) if of_all or data.y_test is not None else split(split_name, len(data.y))
    shift: np.ndarray | None = None
    scale: np.ndarray | None = None
    if data.x.dtype == np.uint8:
        shift, scale = _pixel_moments(data, rows)
        pool, final_test = data.x, data.x_test
    else:
        pool, final_test = _final(data, rows)
    test, y_test = final_test, data.y_test
    if data.y_test is None and len(held):
        test, y_test = pool[held], data.y[held]
    return Part(pool, shift, scale, rows, data.y, test, y_test)


def feature_order(seed: int, features: int) -> np.ndarray:
    """A permutation of the features, int64 [I], keyed by the seed of a scan."""
    place = np.arange(features)
    return permute(place, features, np.zeros_like(place), order_key(seed, 0, 0, Purpose.FEATURES))


def _pixel_moments(data: Dataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse standard deviation, float64 [I], by channel or by column; exact sums of whole numbers.

    A constant channel has scale 0, so that it becomes 0 in test samples too.
    """
    features = data.x.shape[1]
    channels = data.shape[0] if data.by_channel else features
    total, squares = np.zeros(channels, dtype=np.int64), np.zeros(channels, dtype=np.int64)
    values = np.arange(256)
    for start in range(0, len(rows), ROWS):
        some = data.x[rows[start : start + ROWS]].reshape(-1, channels, features // channels)
        if data.by_channel:
            for c in range(channels):
                counts = np.bincount(some[:, c].ravel(), minlength=256)
                total[c] += counts @ values
                squares[c] += counts @ values**2
        else:
            total += some.sum(axis=(0, 2), dtype=np.int64)
            squares += (some.astype(np.int64) ** 2).sum(axis=(0, 2))
    count = len(rows) * (features // channels)
    mean, deviation = [], []
    for s, q in zip(total.tolist(), squares.tolist(), strict=True):  # Python's integers do not overflow
        mean.append(s / count)
        deviation.append(((count * q - s * s) / count**2) ** 0.5)
    scale = [1 / each if each else 0.0 for each in deviation]
    repeat = features // channels
    return np.repeat(np.array(mean), repeat), np.repeat(np.array(scale), repeat)


def _final(data: Dataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Inputs and test inputs of numbers that are no pixels, by channel or by column to mean 0 and variance 1."""
    from sklearn.preprocessing import StandardScaler

    def arranged(x: np.ndarray) -> np.ndarray:
        # Channels as columns: the moments of a column are then those of a channel.
        return (
            x.reshape(len(x), data.shape[0], -1).transpose(0, 2, 1).reshape(-1, data.shape[0]) if data.by_channel else x
        )

    def flat(x: np.ndarray, samples: int) -> np.ndarray:
        if data.by_channel:
            x = x.reshape(samples, -1, data.shape[0]).transpose(0, 2, 1).reshape(samples, -1)
        return np.ascontiguousarray(x)

    train = arranged(data.x if len(rows) == len(data.x) else data.x[rows])
    scaler = StandardScaler().fit(train)
    constant = np.ptp(train, axis=0) == 0
    out = []
    for x in (data.x, data.x_test):
        if x is None:
            continue
        scaled = scaler.transform(arranged(x))
        scaled[:, constant] = 0.0
        out.append(flat(scaled, len(x)))
    return out[0], out[1] if len(out) > 1 else None


@functools.lru_cache(maxsize=4)
def moments(one: Part) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [I], of every standardised feature over what is trained on."""
    view = Task(one.pool, one.rows, one.y, one.shift, one.scale)
    starts = range(0, len(one.rows), ROWS)
    total = sum(view.inputs(one.rows[start : start + ROWS]).sum(axis=0) for start in starts)
    mean = np.asarray(total) / len(one.rows)
    squares = sum(((view.inputs(one.rows[start : start + ROWS]) - mean) ** 2).sum(axis=0) for start in starts)
    return mean, np.sqrt(np.asarray(squares) / len(one.rows))
