"""The data sets that have a name: what is known of them, where they are kept, and how they are fetched."""

import contextlib
import dataclasses
import http.client
import json
import os
import sys
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data import files
from fasttrain.data.arrays import Column, Dataset, dataset, encoded
from fasttrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a named data set before it is read.

    Attributes:
        about: what it is, for people.
        shape: of a sample.
        classes: C.
        size: samples; where ``test`` is not 0, those for training.
        test: samples of the official test part; 0 if there is none.
        files: which files to put into its folder, for people; empty if it needs none.
        fetch: name for ``fetch_openml`` and version, or a marker of our own.
        test_counts: samples of each class in the official test part: other ones are another order or another set.
    """

    about: str
    shape: tuple[int, ...]
    classes: int
    size: int
    test: int = 0
    files: str = ""
    fetch: tuple[str, int] | None = None
    test_counts: tuple[int, ...] = ()

    @property
    def pixels(self) -> bool:
        """Whether its inputs are uint8: those of the sets of images with a test part."""
        return len(self.shape) == 3 and self.test > 0


_IDX_FILES = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (or .gz)"
)
_TABLE = " (with a header, and the labels in a column named class)"
KNOWN = {
    "digits": Known("8x8 images of digits, bundled with scikit-learn", (1, 8, 8), 10, 1797),
    "mnist": Known(
        "images of handwritten digits",
        (1, 28, 28),
        10,
        60_000,
        10_000,
        _IDX_FILES,
        ("mnist_784", 1),
        (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
    ),
    "fashion-mnist": Known(
        "images of clothes", (1, 28, 28), 10, 60_000, 10_000, _IDX_FILES, ("Fashion-MNIST", 1), (1000,) * 10
    ),
    "cifar10": Known(
        "colour photographs of 10 kinds of things",
        (3, 32, 32),
        10,
        50_000,
        10_000,
        "data_batch_1.bin to data_batch_5.bin and test_batch.bin",
        ("CIFAR_10", 1),
        (1000,) * 10,
    ),
    "cifar100": Known(
        "colour photographs of 100 kinds of things",
        (3, 32, 32),
        100,
        50_000,
        10_000,
        "train.bin and test.bin",
        ("CIFAR-100", 1),
        (100,) * 100,
    ),
    "covertype": Known("forest cover type from maps", (54,), 7, 581_012, 0, "covertype.csv" + _TABLE, ("covertype", 0)),
    "adult": Known(
        "income above 50,000 dollars, census of 1994", (108,), 2, 48_842, 0, "adult.csv" + _TABLE, ("adult", 2)
    ),
    "credit": Known("credit risk (German credit)", (61,), 2, 1000, 0, "credit.csv" + _TABLE, ("credit-g", 1)),
}
_MOST_LOADED = 4
_LOADED: dict[str, tuple[Any, Dataset]] = {}
_LOCK = threading.RLock()


def cache_folder() -> Path:
    """Where named data sets are kept: ``$FASTTRAIN_DATA``, or the user's cache of this platform."""
    if own := os.environ.get("FASTTRAIN_DATA"):
        return Path(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fasttrain"


def folder_of(name: str) -> Path:
    """The folder of a named data set."""
    return cache_folder() / name


def load(name: str, again: bool = False) -> Dataset:
    """A named data set, or that of a file; read once. A named one that is not here is fetched.

    Args:
        name: as in a spec; no ``gaussian``.
        again: whether to look if its files have changed since. Within a scan they may not matter.

    Raises:
        UserError: it is not there, cannot be fetched, or is damaged.
    """
    with _LOCK:
        if name in _LOADED and not again:
            return _LOADED[name][1]
        stamp = _stamp(name)
        if name in _LOADED and _LOADED[name][0] == stamp:
            return _LOADED[name][1]
        found = named(name) if name in KNOWN else files.read(name)
        while len(_LOADED) >= _MOST_LOADED:
            del _LOADED[next(iter(_LOADED))]
        _LOADED.pop(name, None)
        _LOADED[name] = (_stamp(name), found)  # a fetch has written a file
        return found


def _stamp(name: str) -> Any:
    if name == "digits":
        return ()
    return (str(folder_of(name)), files.stamp(str(folder_of(name)))) if name in KNOWN else files.stamp(name)


def here(name: str) -> bool:
    """Whether a named data set can be read without a network."""
    return name == "digits" or any(_kept(name))


def _kept(name: str) -> tuple[bool, bool, bool]:
    """Whether a folder has the original files, our npz, or a CSV file of a named data set."""
    folder = folder_of(name)
    try:
        original = len(KNOWN[name].shape) == 3 and folder.is_dir() and files.has_originals(folder)
    except OSError:
        original = False
    return original, (folder / f"{name}.npz").is_file(), (folder / f"{name}.csv").is_file()


def named(name: str) -> Dataset:
    """A named data set from its folder, or fetched into it.

    Raises:
        UserError: as ``load``.
    """
    if name == "digits":
        return _digits()
    folder = folder_of(name)
    original, npz, table = _kept(name)
    if original:
        return _checked(name, _of(files.originals, str(folder), folder), str(folder))
    if npz:
        path = folder / f"{name}.npz"
        return _checked(name, _of(_from_npz, str(path), path), str(path))
    if table:
        path = folder / f"{name}.csv"
        return _checked(name, files.read(str(path)), str(path))
    found = _checked(name, _fetched(name), "what was fetched")
    _keep(name, found)
    return found


def _of(function: Callable[[str, Path], Any], name: str, path: Path) -> Dataset:
    try:
        found = function(name, path)
    except OSError as error:
        raise UserError("data", name, f"cannot be read ({error.strerror or error})") from None
    assert found is not None
    return found


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    known = KNOWN["digits"]
    return Dataset("digits", "scikit-learn, load_digits", known.shape, x, y.astype(np.int64), known.classes)


def _checked(name: str, found: Dataset, where: str) -> Dataset:
    """The data set under its name, if it is the one that has it.

    Raises:
        UserError: shape, classes or samples are others.
    """
    known = KNOWN[name]
    test = 0 if found.y_test is None else len(found.y_test)
    for what, has, expected in (
        ("samples of shape", list(found.shape), list(known.shape)),
        ("classes", found.classes, known.classes),
        ("samples", len(found.y), known.size),
        ("test samples", test, known.test),
    ):
        if has != expected:
            raise UserError("data", name, f"{where} has {what} {has}; expected {expected}")
    if known.pixels and found.x.dtype != np.uint8:
        raise UserError("data", name, f"{where} has pixels of type {found.x.dtype}; expected uint8")
    if known.test_counts and found.y_test is not None:
        counts = tuple(np.bincount(found.y_test, minlength=known.classes).tolist())
        if counts != known.test_counts:
            k = next(k for k in range(known.classes) if counts[k] != known.test_counts[k])
            raise UserError(
                "data",
                name,
                f"{where} has {counts[k]} test samples of class {k}, the official test part {known.test_counts[k]}",
            )
    return dataclasses.replace(found, name=name)


def _from_npz(name: str, path: Path) -> Dataset:
    arrays, text = files.npz_arrays(name, path)
    try:
        columns = tuple(Column(str(column), int(categories)) for column, categories in json.loads(text or "[]"))
    except (ValueError, TypeError):
        raise UserError("data", name, "columns is no list of names and numbers of categories; it is damaged") from None
    return dataset(name, str(path.absolute()), **arrays, columns=columns)


def _keep(name: str, found: Dataset) -> None:
    """Write a data set that was fetched: all of it, or nothing."""
    folder = folder_of(name)
    arrays = {"x": found.x.reshape(-1, *found.shape), "y": found.y}
    if found.x_test is not None and found.y_test is not None:
        arrays |= {"x_test": found.x_test.reshape(-1, *found.shape), "y_test": found.y_test}
    columns = json.dumps([[column.name, column.categories] for column in found.columns])
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            temporary = file.name
            np.savez_compressed(file, **arrays, columns=np.array(columns))  # type: ignore[arg-type]
        os.replace(temporary, folder / f"{name}.npz")
        temporary = None
    except OSError as error:
        raise UserError("data", name, f"cannot be kept in {folder} ({error.strerror or error})") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _fetched(name: str) -> Dataset:
    """A data set through scikit-learn's fetchers, into a folder that is removed: what is kept is our own file."""
    known, folder = KNOWN[name], folder_of(name)
    assert known.fetch is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetching-") as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a download is tried again
            x, y, columns, source = _download(name, known, scratch)
    except (OSError, EOFError, zlib.error, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError("data", name, f"cannot be fetched ({why}); put {known.files} into {folder}") from None
    if len(x) != known.size + known.test:
        raise UserError("data", name, f"what was fetched has {len(x)} samples; expected {known.size + known.test}")
    if not known.test:
        return dataset(name, source, x, y, columns=columns)
    at = known.size
    return dataset(name, source, x[:at], y[:at], x[at:], y[at:])


def _download(name: str, known: Known, scratch: str) -> tuple[np.ndarray, np.ndarray, tuple[Column, ...], str]:
    """Inputs, labels, columns, and where they came from."""
    from sklearn import datasets

    assert known.fetch is not None
    title, version = known.fetch
    if name == "covertype":
        bunch = datasets.fetch_covtype(data_home=scratch)
        x, y = np.asarray(bunch.data), np.asarray(bunch.target)
        columns = tuple(Column(str(column)) for column in getattr(bunch, "feature_names", None) or ())
        return x, _labels(name, y), columns, "scikit-learn, fetch_covtype"
    table = len(known.shape) == 1
    bunch = datasets.fetch_openml(title, version=version, data_home=scratch, as_frame=table)
    source = f"OpenML through scikit-learn, {title} version {version}"
    y = _labels(name, np.asarray(bunch.target))
    if table:
        x, columns = encoded(name, _frame(bunch.data))
        return x, y, columns, source
    return _pixels(name, known, np.asarray(bunch.data)), y, (), source


def _labels(name: str, y: np.ndarray) -> np.ndarray:
    """Labels 0 to C-1, in the order of the numbers, or of the texts, that were fetched."""
    texts = [str(label) for label in y.tolist()]
    if any(text in ("", "nan", "None") for text in texts):
        raise UserError("data", name, "what was fetched has samples without a label")
    index = {text: k for k, text in enumerate(files.label_order(texts))}
    return np.array([index[text] for text in texts], dtype=np.int64)


def _pixels(name: str, known: Known, x: np.ndarray) -> np.ndarray:
    """Images uint8 [N, C, H, W] from rows of numbers."""
    if x.ndim != 2 or x.shape[1] != np.prod(known.shape):
        raise UserError(
            "data", name, f"what was fetched has shape {list(x.shape)}; expected [N, {np.prod(known.shape)}]"
        )
    if x.dtype.kind not in "buif" or not (x.min() >= 0 and x.max() <= 255):
        raise UserError("data", name, "what was fetched has pixels outside of 0 to 255")
    pixels = x.astype(np.uint8)
    if not np.array_equal(pixels, x):
        raise UserError("data", name, "what was fetched has pixels that are no whole numbers")
    return pixels.reshape(-1, *known.shape)


def _frame(frame: Any) -> list[tuple[str, np.ndarray | list[str]]]:
    """The columns of a pandas table; a missing category is the empty text."""
    import pandas as pd

    out: list[tuple[str, np.ndarray | list[str]]] = []
    for column in frame.columns:
        series = frame[column]
        if pd.api.types.is_numeric_dtype(series.dtype):
            out.append((str(column), series.to_numpy(dtype=np.float64, na_value=np.nan)))
        else:
            missing = series.isna().to_numpy()
            texts = series.astype(object).tolist()
            out.append((str(column), ["" if m else str(text) for m, text in zip(missing, texts, strict=True)]))
    return out
