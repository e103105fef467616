"""Files of data: npz, HDF5, CSV, and the original formats of MNIST (IDX) and CIFAR (binary).

They may come from anywhere. What a file says of its sizes and types is checked before memory is taken; nothing in it
is run or unpickled.
"""

import array
import contextlib
import csv
import gzip
import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from fasttrain.data.arrays import MOST_CLASSES, MOST_VALUE, Dataset, dataset, encoded, room
from fasttrain.errors import UserError

FORMATS = ".npz, .h5, .csv, IDX (...-images-idx3-ubyte, also .gz), CIFAR (.bin), or a folder with IDX or CIFAR files"
_KEYS = ("x", "y", "x_test", "y_test")
_LABELS = ("y", "label", "target", "class")
_TABLE_SUFFIXES = {".npz": "npz", ".h5": "h5", ".hdf5": "h5", ".csv": "csv"}
_IDX = re.compile(r"(?P<start>.*)images(?P<sep>[-_.])idx3(?P<end>[-_.]ubyte(\.gz)?)$")
# Deflate makes at most 1032 bytes of one. A file that claims more is no honest one.
_EXPANSION = 1040
_CIFAR_PIXELS = 3 * 32 * 32
_MOST_CSV_COLUMNS = 2**16
_MOST_SHOWN = 40  # characters of a cell


def is_file_name(name: str) -> bool:
    """Whether a name in a spec can only be that of a file: it has a folder, a known ending, or is there."""
    path = Path(name)
    if not name.strip():
        return False
    with contextlib.suppress(OSError, ValueError):
        if path.exists():
            return True
    return len(path.parts) > 1 or path.suffix in (*_TABLE_SUFFIXES, ".bin", ".gz") or bool(_IDX.match(path.name))


def stamp(name: str) -> tuple[tuple[str, int, int], ...]:
    """What changes when a file, or one in a folder, is written: names, times and sizes. Empty if nothing is there."""
    try:
        path = Path(name)
        files = sorted(path.iterdir()) if path.is_dir() else [path, *_companions(path)]
        states = [(file.name, file.stat()) for file in files if file.is_file()]
    except (OSError, ValueError):
        return ()
    return tuple((file, state.st_mtime_ns, state.st_size) for file, state in states)


def read(name: str) -> Dataset:
    """The data set in a file or folder.

    Raises:
        UserError: there is none, or it cannot be used; the message names the key, row or column.
    """
    path = Path(name)
    try:
        if path.is_dir():
            return _folder(name, path)
        if not path.exists():
            raise UserError("data", name, f"there is no such file; expected {FORMATS}")
        if not path.is_file():
            raise UserError("data", name, f"is no file; expected {FORMATS}")
        kind = _TABLE_SUFFIXES.get(path.suffix.lower())
        if kind == "npz":
            return _npz(name, path)
        if kind == "h5":
            return _h5(name, path)
        if kind == "csv":
            return _csv(name, path)
        if _IDX.match(path.name):
            return _idx(name, path)
        if path.suffix == ".bin":
            return _cifar(name, [path], [])
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("data", name, f"cannot be read ({_line(error)})") from None
    if re.search(r"labels[-_.]idx1[-_.]ubyte(\.gz)?$", path.name):
        raise UserError("data", name, "is a file of labels; give that of the images, the labels are found beside it")
    raise UserError("data", name, f"is of no known format; expected {FORMATS}")


def has_originals(folder: Path) -> bool:
    """Whether a folder has original files of images."""
    return _folder_files(folder) is not None


def originals(name: str, folder: Path) -> Dataset | None:
    """The data set in the original files of a folder, or None if it has none."""
    found = _folder_files(folder)
    if isinstance(found, Path):
        return _idx(name, found)
    if found is not None:
        return _cifar(name, *found)
    return None


def _folder(name: str, folder: Path) -> Dataset:
    found = originals(name, folder)
    if found is None:
        raise UserError(
            "data", name, "has neither train-images-idx3-ubyte nor data_batch_1.bin nor train.bin; expected one of them"
        )
    return found


def _folder_files(folder: Path) -> Path | tuple[list[Path], list[Path]] | None:
    """The IDX file of images, or the CIFAR files for training and testing."""
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    batches = sorted(name for name in files if re.fullmatch(r"data_batch_\d+\.bin", name))
    if batches:
        return [files[name] for name in batches], [files[name] for name in files if name == "test_batch.bin"]
    if "train.bin" in files:
        return [files["train.bin"]], [files[name] for name in files if name == "test.bin"]
    images = [name for name in sorted(files) if name.startswith("train-") and _IDX.match(name)]
    return files[images[0]] if images else None


def _line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(str(text).split()) or type(error).__name__


def _claims(name: str, what: str, claimed: int, stored: int) -> None:
    """Whether so many bytes can come from a file, or a part of one, that stores fewer."""
    if claimed > _EXPANSION * (stored + 64):
        raise UserError(
            "data", name, f"{what} claims {claimed:,} bytes and the file has {stored:,} for it; it is damaged"
        )


def _bytes(dtype: np.dtype) -> int:
    """Bytes that a value takes in memory, as it is read and as it is kept."""
    return 1 if dtype in (np.uint8, np.bool_) else dtype.itemsize + 8


# npz ------------------------------------------------------------------------------------------------------------------


def _npz(name: str, path: Path) -> Dataset:
    arrays, _ = npz_arrays(name, path)
    return dataset(name, str(path.absolute()), **arrays)


def npz_arrays(name: str, path: Path) -> tuple[dict[str, Any], str]:
    """The arrays x, y, x_test and y_test of a file that has them, and the text ``columns`` (empty if it has none)."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            _need(name, members)
            size = path.stat().st_size
            wanted = [key for key in (*_KEYS, "columns") if key in members]
            total = 0
            for key in wanted:
                shape, dtype = _npy_header(name, key, archive, members[key], size)
                total += math.prod(shape) * _bytes(dtype)
            room(name, total)
            arrays: dict[str, Any] = {key: _npy(archive, members[key]) for key in wanted}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("data", name, f"is no whole .npz file ({_line(error)})") from None
    columns = arrays.pop("columns", np.array(""))
    return arrays, str(columns) if columns.dtype.kind == "U" and columns.ndim == 0 else ""


def _need(name: str, keys: Any) -> None:
    for key in ("x", "y"):
        if key not in keys:
            there = ", ".join(sorted(map(str, keys))[:10]) or "nothing"
            raise UserError(
                "data", name, f"has no array {key}, only {there}; expected x, y and, if any, x_test, y_test"
            )


def _npy_header(
    name: str, key: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int
) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array of an archive, after a check of what they claim."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError("data", name, f"{key} is compressed in another way than numpy does; expected numpy.savez")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise UserError("data", name, f"{key} has a header of version {version}; expected numbers")
        one = version == (1, 0)
        reader = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        try:
            shape, _, dtype = reader(stream)
        except (tokenize.TokenError, TypeError, MemoryError, RecursionError) as error:
            # numpy reads it as Python does, with what that may raise.
            raise ValueError(f"header: {error}") from None
        at = stream.tell()
    if dtype.hasobject:
        raise UserError("data", name, f"{key} holds Python objects (a pickle), which are not read; expected numbers")
    if dtype.kind not in ("U" if key == "columns" else "buif"):
        raise UserError("data", name, f"{key} has type {dtype}; expected numbers")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != info.file_size - at:
        raise UserError("data", name, f"{key} claims {claimed:,} bytes and has {info.file_size - at:,}; it is damaged")
    _claims(name, key, info.file_size, min(info.compress_size, size))
    return shape, dtype


def _npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        values = np.lib.format.read_array(stream, allow_pickle=False)
        stream.read(1)  # at its end, the archive's checksum is compared
    return values


# HDF5 -----------------------------------------------------------------------------------------------------------------


def _h5(name: str, path: Path) -> Dataset:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            _need(name, file.keys())
            wanted = [key for key in _KEYS if key in file]
            for key in wanted:
                _h5_header(name, key, file)
            room(name, sum(file[key].size * _bytes(file[key].dtype) for key in wanted))
            arrays = {key: file[key][()] for key in wanted}
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise UserError("data", name, f"is no whole HDF5 file ({_line(error)})") from None
    return dataset(name, str(path.absolute()), **arrays)


def _h5_header(name: str, key: str, file: Any) -> None:
    import h5py

    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise UserError("data", name, f"{key} is a link; expected the array itself")
    values = file[key]
    if not isinstance(values, h5py.Dataset) or values.shape is None:
        raise UserError("data", name, f"{key} is no array")
    if values.is_virtual or values.external:
        raise UserError("data", name, f"{key} lies in another file; expected it in this one")
    if values.dtype.kind not in "buif":
        raise UserError("data", name, f"{key} has type {values.dtype}; expected numbers")
    # Space that was never written reads as zeros, however large it is said to be.
    _claims(name, key, values.size * values.dtype.itemsize, values.id.get_storage_size())


# CSV ------------------------------------------------------------------------------------------------------------------


def _csv(name: str, path: Path) -> Dataset:
    room(name, 4 * path.stat().st_size)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            columns, labels = _csv_columns(name, csv.reader(file, strict=True))
    except UnicodeDecodeError as error:
        raise UserError("data", name, f"is no UTF-8 text ({_line(error)})") from None
    except csv.Error as error:
        raise UserError("data", name, f"is no whole CSV file ({_line(error)})") from None
    x, told = encoded(name, columns)
    key, texts = labels
    order = label_order(texts)
    for row, text in enumerate(texts, 2):
        number = _number(text)
        if number is not None and not math.isfinite(number) and _number(order[0]) is not None:
            what = f"row {row}, column {key!r}: the label {_shown(text)} is no number like the others"
            raise UserError("data", name, what)
    if len(order) > MOST_CLASSES:
        raise UserError(
            "data", name, f"column {key!r} has {len(order):,} different labels; expected at most {MOST_CLASSES:,}"
        )
    index = {text: k for k, text in enumerate(order)}
    y = np.array([index[text] for text in texts], dtype=np.int64)
    return dataset(name, str(path.absolute()), x, y, columns=told, keys=("the table", f"column {key!r}", "", ""))


def label_order(texts: Sequence[str]) -> list[str]:
    """The different labels: as numbers if all of them are, else as text."""
    different = set(texts)
    if all(_number(text) is not None for text in different):
        return sorted(sorted(different), key=float)
    return sorted(different)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "...")


def _number(text: str) -> float | None:
    """The number that a cell is, or None."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


class _CsvColumn:
    """The cells of one column so far: numbers or texts, as the first that is not empty decides."""

    def __init__(self, file: str, name: str) -> None:
        self.file, self.name = file, name
        self.numbers: array.array[float] | None = None
        self.texts: list[str] | None = None
        self.seen: dict[str, str] = {}  # one object for equal texts
        self.first = ("", 0)  # and its row
        self.empty = 0  # first row without anything, or 0

    def _refuse(self, row: int, what: str) -> None:
        raise UserError("data", self.file, f"row {row}, column {self.name!r}: {what}")

    def _first(self) -> str:
        return f"{_shown(self.first[0])} in row {self.first[1]}"

    def add(self, text: str, row: int, sample: int) -> None:
        """Take the cell of a row, which has the sample of that number, from 0."""
        number = _number(text)
        if not text:
            self.empty = self.empty or row
            if self.numbers is not None:
                self._refuse(row, f"nothing, and {self._first()}; expected a number")
        elif not self.first[1]:
            self.first = (text, row)
            if number is None:
                self.texts = [""] * sample
            else:
                if self.empty:
                    self._refuse(self.empty, f"nothing, and {_shown(text)} in row {row}; expected a number")
                self.numbers = array.array("d")
        if self.numbers is not None:
            if number is None:
                self._refuse(row, f"{_shown(text)} is no number, and {self._first()} is one")
            elif not abs(number) <= MOST_VALUE:
                self._refuse(row, f"{_shown(text)} is no finite number")
            else:
                self.numbers.append(number)
        elif self.texts is not None:
            if number is not None:
                self._refuse(row, f"{_shown(text)} is a number, and {self._first()} is none")
            self.texts.append(self.seen.setdefault(text, text))

    def values(self, samples: int) -> np.ndarray | list[str]:
        """float64 [N] or N texts."""
        if self.numbers is not None:
            return np.frombuffer(self.numbers, dtype=np.float64)
        return self.texts if self.texts is not None else [""] * samples


def _csv_columns(
    file: str, rows: Iterator[list[str]]
) -> tuple[list[tuple[str, np.ndarray | list[str]]], tuple[str, list[str]]]:
    """The columns of inputs, by name, and the name and texts of the column of labels. Rows count from 1, the header."""
    header = [cell.strip() for cell in next(rows, [])]
    if len(header) < 2:
        raise UserError(
            "data", file, "row 1 has fewer than two columns; expected a header with names, separated by commas"
        )
    if len(header) > _MOST_CSV_COLUMNS:
        raise UserError("data", file, f"row 1 has {len(header):,} columns; expected at most {_MOST_CSV_COLUMNS:,}")
    if all(_number(cell) is not None for cell in header):
        raise UserError("data", file, "row 1 has numbers only; expected a header with the names of the columns")
    for k, cell in enumerate(header):
        if cell in header[:k]:
            raise UserError("data", file, f"row 1: two columns have the name {_shown(cell)}; expected different names")
    lowered = [cell.lower() for cell in header]
    found = [lowered.index(key) for key in _LABELS if key in lowered]
    own = found[0] if found else len(header) - 1
    columns = [_CsvColumn(file, cell) for k, cell in enumerate(header) if k != own]
    labels: list[str] = []
    seen: dict[str, str] = {}
    for row, cells in enumerate(rows, start=2):
        if not cells:
            continue
        if len(cells) != len(header):
            raise UserError("data", file, f"row {row} has {len(cells)} cells; expected {len(header)}, as in the header")
        cells = [cell.strip() for cell in cells]
        label = cells.pop(own)
        if not label:
            raise UserError("data", file, f"row {row}, column {header[own]!r}: nothing; expected a label")
        labels.append(seen.setdefault(label, label))
        for column, cell in zip(columns, cells, strict=True):
            column.add(cell, row, len(labels) - 1)
    if not labels:
        raise UserError("data", file, "has a header and no rows; expected samples")
    return [(column.name, column.values(len(labels))) for column in columns], (header[own], labels)


# IDX ------------------------------------------------------------------------------------------------------------------


def _companions(images: Path) -> list[Path]:
    """What belongs to a file of training images, in this order, where it is there: labels, test images, test labels."""
    match = _IDX.match(images.name)
    if not match:
        return []
    labels = _beside(images, f"{match['start']}labels{match['sep']}idx1{match['end']}")
    if not match["start"].startswith("train"):
        return [labels] if labels else []
    test = _beside(images, f"t10k{match['start'][5:]}images{match['sep']}idx3{match['end']}")
    test_labels = _beside(images, f"t10k{match['start'][5:]}labels{match['sep']}idx1{match['end']}")
    return [path for path in (labels, test, test_labels) if path]


def _beside(path: Path, name: str) -> Path | None:
    """A file in the same folder, packed or not."""
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    return next((path.with_name(each) for each in (name, other) if path.with_name(each).is_file()), None)


def _idx(name: str, images: Path) -> Dataset:
    parts = {
        ("t10k" if path.name.startswith("t10k") else "", "labels" in path.name): path for path in _companions(images)
    }
    first = "t10k" if images.name.startswith("t10k") else ""
    labels = parts.get((first, True))
    if labels is None:
        wanted = images.name.replace("images", "labels").replace("idx3", "idx1")
        raise UserError("data", name, f"there is no {wanted} beside {images.name}; expected its labels there")
    paths = [images, labels]
    if not first and ("t10k", False) in parts and ("t10k", True) in parts:
        paths += [parts["t10k", False], parts["t10k", True]]
    sizes = [_idx_shape(name, path, 1 if "labels" in path.name else 3) for path in paths]
    room(name, sum(math.prod(shape) for shape in sizes))
    arrays = [_idx_array(name, path, shape) for path, shape in zip(paths, sizes, strict=True)]
    keys = [path.name for path in paths]
    keys += _KEYS[len(keys) :]
    return dataset(name, str(images.absolute()), *arrays, keys=(keys[0], keys[1], keys[2], keys[3]))


def _unpacked(path: Path) -> IO[bytes]:
    # A GzipFile is a file of bytes in all that is asked of it here.
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _idx_shape(name: str, path: Path, ndim: int) -> tuple[int, ...]:
    """Shape of the uint8 array in an IDX file, after a check of what its header claims."""
    head = 4 + 4 * ndim
    try:
        with _unpacked(path) as stream:
            header = stream.read(head)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("data", name, f"{path.name} cannot be read ({_line(error)})") from None
    if len(header) < head or header[:4] != bytes([0, 0, 8, ndim]):
        raise UserError(
            "data", name, f"{path.name} is no IDX file of bytes in {ndim} dimensions; it starts with {header[:4].hex()}"
        )
    shape = tuple(int(side) for side in np.frombuffer(header, dtype=">u4", offset=4))
    size, stored = math.prod(shape), path.stat().st_size
    if path.suffix == ".gz":
        _claims(name, path.name, size, stored)
    elif size != stored - head:
        raise UserError(
            "data", name, f"{path.name} claims {size:,} bytes of data and has {stored - head:,}; it is damaged"
        )
    return shape


def _idx_array(name: str, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    values = np.empty(math.prod(shape), dtype=np.uint8)
    try:
        with _unpacked(path) as stream:
            stream.read(4 + 4 * len(shape))
            got = _fill(stream, values)
            more = stream.read(1)  # at its end, the checksum of a packed file is compared
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("data", name, f"{path.name} is damaged ({_line(error)})") from None
    if got < values.size or more:
        has = "more" if more else f"{got:,}"
        raise UserError("data", name, f"{path.name} claims {values.size:,} bytes of data and has {has}; it is damaged")
    return values.reshape(shape)


def _fill(stream: IO[bytes], values: np.ndarray) -> int:
    """Reads bytes into a flat array until it is full or there are no more; how many there were."""
    view, at = values.data, 0
    while at < len(view):
        got = stream.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            break
        at += got
    return at


# CIFAR ----------------------------------------------------------------------------------------------------------------


def _cifar(name: str, train: list[Path], test: list[Path]) -> Dataset:
    room(name, sum(path.stat().st_size for path in (*train, *test)))
    if len({_label_bytes(name, path) for path in (*train, *test)}) > 1:
        raise UserError("data", name, "has files of CIFAR-10 and of CIFAR-100; expected those of one")
    x, y = _cifar_records(name, train)
    classes = 10 if _label_bytes(name, train[0]) == 1 else 100
    source = str(train[0].absolute()) if len(train) == 1 and not test else str(train[0].absolute().parent)
    held = _cifar_records(name, test) if test else (None, None)
    keys = (train[0].name, train[0].name, test[0].name if test else "", test[0].name if test else "")
    return dataset(name, source, x, y, *held, classes=classes, keys=keys)


def _label_bytes(name: str, path: Path) -> int:
    """Bytes of label before the pixels of an image: 1 in CIFAR-10, 2 (coarse and fine) in CIFAR-100."""
    size = path.stat().st_size
    fits = [k for k in (1, 2) if size and size % (_CIFAR_PIXELS + k) == 0]
    if not fits:
        raise UserError(
            "data",
            name,
            f"{path.name} has {size:,} bytes; expected a multiple of 3,073 (CIFAR-10) or 3,074 (CIFAR-100)",
        )
    if len(fits) == 2:
        return 2 if path.name in ("train.bin", "test.bin") else 1
    return fits[0]


def _cifar_records(name: str, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, 32, 32] and labels [N], the fine ones of CIFAR-100."""
    extra = _label_bytes(name, paths[0])
    counts = [path.stat().st_size // (_CIFAR_PIXELS + extra) for path in paths]
    x, y = np.empty((sum(counts), _CIFAR_PIXELS), dtype=np.uint8), np.empty(sum(counts), dtype=np.uint8)
    at = 0
    for path, count in zip(paths, counts, strict=True):
        records = np.fromfile(path, dtype=np.uint8, count=count * (_CIFAR_PIXELS + extra))
        if records.size != count * (_CIFAR_PIXELS + extra):
            raise UserError("data", name, f"{path.name} ended early; it is damaged")
        records = records.reshape(count, -1)
        if extra == 2 and (records[:, 0] >= 20).any():
            row = int(np.argmax(records[:, 0] >= 20))
            raise UserError(
                "data", name, f"{path.name} has coarse label {records[row, 0]} in row {row}; expected 0 to 19"
            )
        most = 10 if extra == 1 else 100
        if (records[:, extra - 1] >= most).any():
            row = int(np.argmax(records[:, extra - 1] >= most))
            raise UserError(
                "data",
                name,
                f"{path.name} has label {records[row, extra - 1]} in row {row} (the first is 0); "
                f"expected 0 to {most - 1}",
            )
        x[at : at + count], y[at : at + count] = records[:, extra:], records[:, extra - 1]
        at += count
    return x.reshape(-1, 3, 32, 32), y
