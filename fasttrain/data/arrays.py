"""A data set in memory, and the checks that every one passes before it is used."""

from dataclasses import dataclass

import numpy as np
import psutil

from fasttrain.errors import UserError

MOST_FEATURES = 2**20
MOST_CLASSES = 2**16
MOST_VALUE = 1e100  # the square of a larger one may be infinite, and so the variance
_MEMORY_SHARE = 0.5  # of what is free: a standardised copy comes beside it
_ROWS = 4096  # that are looked at together, so that no check takes much memory


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        name: from the header.
        categories: number of its categories, each of which became a column of 0 and 1; 0 for a column of numbers.
    """

    name: str
    categories: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A data set as it was read: nothing is standardised yet. Equal only to itself, so that it can key a cache.

    Attributes:
        name: as in a spec.
        source: where it came from, for people.
        shape: of a sample: (features,), or (channels, height, width) of an image.
        x: uint8 or float64 [N, I], C-contiguous; images are flat, channel by channel.
        y: int64 [N], in [0, classes).
        classes: C.
        x_test: as ``x``, of the test samples that came with it; None if there were none.
        y_test: int64 [M].
        columns: of a table whose columns have names.
        by_channel: whether an image is standardised by channel; else every column on its own.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    x: np.ndarray
    y: np.ndarray
    classes: int
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    columns: tuple[Column, ...] = ()
    by_channel: bool = False


def room(name: str, size: int, what: str = "it") -> None:
    """Whether so many bytes may be taken for a data set.

    Raises:
        UserError: they are more than half of the memory that is free.
    """
    free = psutil.virtual_memory().available
    if size > _MEMORY_SHARE * free:
        raise UserError(
            "data",
            name,
            f"{what} takes {size / 2**30:,.1f} GiB, of {free / 2**30:,.1f} GiB of free memory; expected less",
        )


def as_inputs(name: str, key: str, x: np.ndarray) -> np.ndarray:
    """Inputs as uint8 or float64, of any shape.

    Raises:
        UserError: they are no numbers.
    """
    if x.dtype.kind not in "buif":
        raise UserError("data", name, f"{key} has type {x.dtype}; expected numbers")
    return np.ascontiguousarray(x, dtype=np.uint8 if x.dtype in (np.uint8, np.bool_) else np.float64)


def sample_shape(name: str, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a sample from that of an array of samples.

    Raises:
        UserError: it is none of [N, I], [N, H, W] and [N, C, H, W], or has nothing in it.
    """
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise UserError(
            "data",
            name,
            f"{key} has shape {list(shape)}; expected [samples, features] or [samples, (channels,) height, width]",
        )
    if len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] > 4:
        raise UserError(
            "data", name, f"{key} has shape {list(shape)}, channels last; expected [N, channels, height, width]"
        )
    own = shape[1:] if len(shape) != 3 else (1, *shape[1:])
    if np.prod([float(side) for side in own]) > MOST_FEATURES:
        raise UserError("data", name, f"{key} has shape {list(shape)}; expected at most {MOST_FEATURES:,} features")
    return tuple(int(side) for side in own)


def finite(name: str, key: str, x: np.ndarray) -> None:
    """Whether all inputs [N, ...] are finite, and small enough to be squared.

    Raises:
        UserError: one is not; the message names its row, from 0.
    """
    if x.dtype.kind != "f":
        return
    for start in range(0, len(x), _ROWS):
        some = x[start : start + _ROWS].reshape(len(x[start : start + _ROWS]), -1)
        good = np.abs(some) <= MOST_VALUE  # False for NaN
        if not good.all():
            row = int(np.argmin(good.all(axis=1)))
            value = some[row, int(np.argmin(good[row]))]
            raise UserError(
                "data",
                name,
                f"{key} has {value} in row {start + row} (the first is 0); expected numbers up to {MOST_VALUE:g}",
            )


def as_labels(name: str, key: str, y: np.ndarray, samples: int, classes: int | None = None) -> np.ndarray:
    """Labels as int64 [N].

    Args:
        name: of the data set.
        key: of the labels in it.
        y: what was read.
        samples: N.
        classes: C, where it is known.

    Raises:
        UserError: they are not N whole numbers from 0 on, below C; the message names the row, from 0.
    """
    if y.shape != (samples,):
        raise UserError("data", name, f"{key} has shape {list(y.shape)}; expected [{samples}], one label a sample")
    if y.dtype.kind not in "iu":
        raise UserError("data", name, f"{key} has type {y.dtype}; expected whole numbers")
    most = classes or MOST_CLASSES
    wrong = (y < 0) | (y >= most)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
            "data", name, f"{key} has label {y[row]} in row {row} (the first is 0); expected 0 to {most - 1}"
        )
    return y.astype(np.int64)


def dataset(
    name: str,
    source: str,
    x: np.ndarray,
    y: np.ndarray,
    x_test: np.ndarray | None = None,
    y_test: np.ndarray | None = None,
    *,
    classes: int | None = None,
    columns: tuple[Column, ...] = (),
    keys: tuple[str, str, str, str] = ("x", "y", "x_test", "y_test"),
) -> Dataset:
    """A data set from arrays, after all checks.

    Args:
        name: as in a spec.
        source: where it came from.
        x: numbers [N, I], [N, H, W] or [N, C, H, W].
        y: whole numbers [N].
        x_test: as ``x``, or None.
        y_test: as ``y``, or None.
        classes: C, where it is known; otherwise the largest label tells, and each one below it must be there.
        columns: names of a table's columns.
        keys: what messages call the four arrays.

    Raises:
        UserError: the arrays are none; the message names the key and, where there is one, the row.
    """
    shape = sample_shape(name, keys[0], x.shape)
    x = as_inputs(name, keys[0], x)
    finite(name, keys[0], x)
    labels = as_labels(name, keys[1], y, len(x), classes)
    present = np.bincount(labels, minlength=classes or 0) > 0
    if present.sum() < 2:
        raise UserError("data", name, f"{keys[1]} has one class only, {labels[0]}; expected two or more")
    if classes is None and not present.all():
        largest, missing = len(present) - 1, int(np.argmin(present))
        row = int(np.argmax(labels == largest))
        raise UserError(
            "data",
            name,
            f"{keys[1]} has label {largest} in row {row} (the first is 0) and no sample of class {missing}; "
            "expected labels from 0 on without a gap",
        )
    flat_test = test = None
    if (x_test is None) != (y_test is None):
        there, absent = (keys[2], keys[3]) if y_test is None else (keys[3], keys[2])
        raise UserError("data", name, f"has {there} and no {absent}; expected both or none")
    if x_test is not None and y_test is not None:
        if sample_shape(name, keys[2], x_test.shape) != shape or x_test.ndim != x.ndim:
            raise UserError(
                "data", name, f"{keys[2]} has shape {list(x_test.shape)}; expected that of {keys[0]}, {list(x.shape)}"
            )
        flat_test = as_inputs(name, keys[2], x_test)
        if flat_test.dtype != x.dtype:
            raise UserError("data", name, f"{keys[2]} has type {x_test.dtype}; expected that of {keys[0]}, {x.dtype}")
        finite(name, keys[2], flat_test)
        test = as_labels(name, keys[3], y_test, len(flat_test), len(present))
        flat_test = flat_test.reshape(len(flat_test), -1)
    return Dataset(
        name=name,
        source=source,
        shape=shape,
        x=x.reshape(len(x), -1),
        y=labels,
        classes=len(present),
        x_test=flat_test,
        y_test=test,
        columns=columns,
        by_channel=len(shape) == 3,
    )


def encoded(name: str, columns: list[tuple[str, np.ndarray | list[str]]]) -> tuple[np.ndarray, tuple[Column, ...]]:
    """A table as numbers: every category of a column of text becomes a column of 0 and 1, in sorted order.

    Args:
        name: of the data set.
        columns: name and values of each, float64 [N] or N texts; an empty text is a category too.

    Returns:
        float64 [N, I], and what became of each column.

    Raises:
        UserError: the result would be too large.
    """
    from sklearn.preprocessing import OneHotEncoder

    widths = [1 if isinstance(values, np.ndarray) else len(set(values)) for _, values in columns]
    samples = len(columns[0][1])
    widest = int(np.argmax(widths))
    if sum(widths) > MOST_FEATURES:
        raise UserError(
            "data", name, f"column {columns[widest][0]!r} has {widths[widest]:,} categories; expected fewer"
        )
    room(name, 8 * samples * sum(widths), f"the table, with {widths[widest]:,} columns for {columns[widest][0]!r},")
    x, at = np.empty((samples, sum(widths))), 0
    for (_, values), width in zip(columns, widths, strict=True):
        if isinstance(values, np.ndarray):
            x[:, at] = values
        else:
            encoder = OneHotEncoder(sparse_output=False, dtype=np.float64)
            x[:, at : at + width] = encoder.fit_transform(np.array(values, dtype=object)[:, None])
        at += width
    told = [
        Column(column, 0 if isinstance(values, np.ndarray) else width)
        for (column, values), width in zip(columns, widths, strict=True)
    ]
    return x, tuple(told)
