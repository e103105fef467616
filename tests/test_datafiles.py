import gzip
import io
import json
import re
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
from datafiles import cifar_bytes, idx_bytes, images, labels, write_idx

import fasttrain
from fasttrain import ScanSpec, UserError
from fasttrain.cli import main
from fasttrain.data import available, check, describe, files, provenance, sources, task, test_set
from fasttrain.data.arrays import Column
from fasttrain.data.sources import Known


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for named data sets, and no network."""

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("FASTTRAIN_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", no_network)
    monkeypatch.setattr(sklearn.datasets, "fetch_covtype", no_network)
    return tmp_path / "cache"


def refused(path: object, *words: str) -> str:
    """The line with which a file is refused; it has these words, and is one line."""
    with pytest.raises(UserError) as caught:
        check(ScanSpec(data=str(path)))
    assert caught.value.option == "data"
    assert caught.value.value == str(path)
    line = caught.value.expected
    assert "\n" not in line
    for word in words:
        assert word in line
    return line


def spread(x: np.ndarray) -> np.ndarray:
    """Every column to mean 0 and variance 1; constant ones to 0."""
    x = x.astype(float)
    deviation = x.std(0)
    return (x - x.mean(0)) / np.where(deviation == 0, np.inf, deviation)


def by_channel(x: np.ndarray, over: np.ndarray | None = None) -> np.ndarray:
    """Images [N, C, H, W] to mean 0 and variance 1 of each channel over some images, flat."""
    over = x if over is None else over
    mean, deviation = (f(over.astype(float), axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    return ((x - mean) / deviation).reshape(len(x), -1)


# Sums of up to 1e5 numbers of order 1 lose at most 1e5 eps, in either way of summing.
CLOSE = 1e5 * np.finfo(float).eps


def whole_pool(path: object, kind: str = "random") -> tuple[np.ndarray, np.ndarray]:
    """All inputs, standardised, in the order of the file, and true labels."""
    spec = ScanSpec(data=str(path), labels=kind)
    check(spec)
    return task(spec, kind, 2, 0, 2).standardised(np.float64), sources.load(str(path)).y


# Formats --------------------------------------------------------------------------------------------------------------


def save_npz(path: Path, **arrays: np.ndarray) -> None:
    np.savez(path, **arrays)


def save_packed(path: Path, **arrays: np.ndarray) -> None:
    np.savez_compressed(path, **arrays)


def save_h5(path: Path, **arrays: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file.create_dataset(key, data=values)


def save_packed_h5(path: Path, **arrays: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file.create_dataset(key, data=values, compression="gzip")


SAVERS = [(save_npz, "a.npz"), (save_packed, "a.npz"), (save_h5, "a.h5"), (save_packed_h5, "a.hdf5")]


@pytest.mark.parametrize(("save", "file"), SAVERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "int16", ">f8"])
def test_tables_of_numbers(tmp_path, rng, save, file, dtype):
    x, y = (10 * rng.standard_normal((40, 3)) + 5).astype(dtype), labels(rng, 40, 4)
    x[:, 1] = 7  # constant
    save(tmp_path / file, x=x, y=y.astype(np.int8))
    info = describe(str(tmp_path / file))
    assert (info.shape, info.features, info.classes, info.size, info.test_size) == ((3,), 3, 4, 40, 8)
    found, true = whole_pool(tmp_path / file)
    np.testing.assert_allclose(found, spread(x), atol=CLOSE)
    assert not found[:, 1].any()
    assert np.array_equal(true, y)


@pytest.mark.parametrize(("save", "file"), SAVERS)
@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (3, 5, 4)])
def test_images_stay_uint8_and_are_standardised_by_channel(tmp_path, rng, save, file, shape):
    x, y = images(rng, 30, *shape), labels(rng, 30, 3)
    x_test, y_test = images(rng, 11, *shape), labels(rng, 11, 3)
    save(tmp_path / file, x=x, y=y, x_test=x_test, y_test=y_test)
    info = describe(str(tmp_path / file))
    assert info.shape == (shape if len(shape) == 3 else (1, *shape))
    assert info.image
    assert (info.size, info.test_size, info.official) == (30, 11, True)
    spec = ScanSpec(data=str(tmp_path / file), labels="true")
    found = task(spec, "true", 3, 0, 30)
    assert found.pool.dtype == np.uint8
    assert np.array_equal(found.pool, x.reshape(30, -1))
    four = x.reshape(30, *info.shape)
    np.testing.assert_allclose(found.inputs(np.arange(30)), by_channel(four), atol=CLOSE)
    assert np.array_equal(found.y, y[found.rows])
    assert found.standardised("float32") is task(spec, "random", 3, 0, 9).standardised("float32")
    tested = test_set(spec, "true", "real", 3)
    assert tested is not None
    np.testing.assert_allclose(tested[0], by_channel(x_test.reshape(11, *info.shape), four), atol=CLOSE)
    assert np.array_equal(tested[1], y_test)


def test_images_of_floats_are_standardised_by_channel(tmp_path, rng):
    x, y = rng.standard_normal((20, 3, 4, 5)) * [[[[1]], [[5]], [[9]]]] + 2, labels(rng, 20, 2)
    np.savez(tmp_path / "a.npz", x=x, y=y, x_test=x[:7] + 1, y_test=y[:7])
    spec = ScanSpec(data=str(tmp_path / "a.npz"), labels="true")
    np.testing.assert_allclose(whole_pool(tmp_path / "a.npz")[0], by_channel(x), atol=CLOSE)
    tested = test_set(spec, "true", "real", 2)
    assert tested is not None
    np.testing.assert_allclose(tested[0], by_channel(x[:7] + 1, x), atol=CLOSE)


def test_bytes_in_a_table_are_standardised_by_column(tmp_path, rng):
    x, y = images(rng, 50, 6), labels(rng, 50, 2)
    x[:, 2] = 9
    np.savez(tmp_path / "a.npz", x=x, y=y)
    found, _ = whole_pool(tmp_path / "a.npz")
    np.testing.assert_allclose(found, spread(x), atol=CLOSE)
    assert not found[:, 2].any()


def test_csv_with_numbers_and_categories(tmp_path):
    (tmp_path / "a.csv").write_text(
        'size,colour,label,weight\n1,red,b,2e1\n2,"blue, dark",a,30\n\n4, red ,b,10\n8,,c,-5\n', encoding="utf-8-sig"
    )
    found, y = whole_pool(tmp_path / "a.csv")
    # Categories in sorted order, the missing one first: "", "blue, dark", "red".
    table = [[1, 0, 0, 1, 20], [2, 0, 1, 0, 30], [4, 0, 0, 1, 10], [8, 1, 0, 0, -5]]
    np.testing.assert_allclose(found, spread(np.array(table)), atol=CLOSE)
    assert y.tolist() == [1, 0, 1, 2]
    told = sources.load(str(tmp_path / "a.csv")).columns
    assert told == (Column("size"), Column("colour", 3), Column("weight"))
    preparation = json.loads(str(provenance(ScanSpec(data=str(tmp_path / "a.csv")))["data_preparation"]))
    assert preparation["one-hot encoded, categories"] == {"colour": 3}


@pytest.mark.parametrize(
    ("header", "own"), [("Target,a,b", 0), ("a,y,class", 1), ("a,CLASS,b", 1), ("a,b,c", 2), ("label,y,c", 1)]
)
def test_csv_labels_are_those_of_the_named_column_or_of_the_last(tmp_path, header, own):
    rows = [["1", "10", "100"], ["1", "9", "20"], ["3", "9", "100"]]
    (tmp_path / "a.csv").write_text("\n".join([header, *map(",".join, rows)]))
    found, y = whole_pool(tmp_path / "a.csv")
    order = sorted({float(row[own]) for row in rows})  # as numbers: 9 before 10, 20 before 100
    assert y.tolist() == [order.index(float(row[own])) for row in rows]
    rest = np.array([[float(cell) for k, cell in enumerate(row) if k != own] for row in rows])
    np.testing.assert_allclose(found, spread(rest), atol=CLOSE)


@pytest.mark.parametrize(
    ("name", "own_labels"),
    [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
        ("letters-images-idx3-ubyte", "letters-labels-idx1-ubyte.gz"),
    ],
)
@pytest.mark.parametrize("with_test", [False, True])
def test_idx(tmp_path, rng, name, own_labels, with_test):
    x, y, x_test, y_test = images(rng, 30, 6, 5), labels(rng, 30, 3), images(rng, 10, 6, 5), labels(rng, 10, 3)
    write_idx(tmp_path / name, x)
    write_idx(tmp_path / own_labels, y)
    if with_test:
        write_idx(tmp_path / name.replace("train", "t10k"), x_test)
        write_idx(tmp_path / own_labels.replace("train", "t10k"), y_test)
    if name.startswith("letters"):
        with_test = False
        write_idx(tmp_path / name, x)
        write_idx(tmp_path / own_labels, y)
    for path in (tmp_path / name, *([tmp_path] if name.startswith("train") else [])):
        data = files.read(str(path))
        assert (data.shape, data.classes, data.x.dtype) == ((1, 6, 5), 3, np.uint8)
        assert np.array_equal(data.x, x.reshape(30, -1))
        assert np.array_equal(data.y, y)
        if with_test:
            assert np.array_equal(data.x_test, x_test.reshape(10, -1))
            assert np.array_equal(data.y_test, y_test)
        else:
            assert data.x_test is None


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, rng, classes):
    x, y = images(rng, 120, 3, 32, 32), labels(rng, 120, classes)
    coarse = [] if classes == 10 else [y // 5]
    names = ["data_batch_1.bin", "data_batch_2.bin"] if classes == 10 else ["train.bin"]
    for name, rows in zip(names, np.array_split(np.arange(120), len(names)), strict=True):
        (tmp_path / name).write_bytes(cifar_bytes(x[rows], *(c[rows] for c in coarse), y[rows]))
    first = files.read(str(tmp_path / names[0]))
    assert np.array_equal(first.x, x.reshape(120, -1)[: 120 // len(names)])
    assert first.y_test is None
    test = "test_batch.bin" if classes == 10 else "test.bin"
    (tmp_path / test).write_bytes(cifar_bytes(x[:20], *(c[:20] for c in coarse), y[:20]))
    whole = files.read(str(tmp_path))
    assert (whole.shape, whole.classes, whole.x.dtype) == ((3, 32, 32), classes, np.uint8)
    assert np.array_equal(whole.x, x.reshape(120, -1))
    assert np.array_equal(whole.y, y)
    assert np.array_equal(whole.x_test, x.reshape(120, -1)[:20])
    assert np.array_equal(whole.y_test, y[:20])


# Bad data -------------------------------------------------------------------------------------------------------------

GOOD = {"x": np.arange(24.0).reshape(8, 3), "y": np.array([0, 1, 2, 0, 1, 2, 0, 1])}


def with_value(array: np.ndarray, at: Any, value: object) -> np.ndarray:
    changed = array.copy()
    changed[at] = value
    return changed


@pytest.mark.parametrize("save_and_file", [(save_npz, "bad.npz"), (save_h5, "bad.h5")])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": np.arange(8.0)}, ["x has shape [8]"]),
        ({"x": np.zeros((8, 0))}, ["x has shape [8, 0]"]),
        ({"x": np.zeros((8, 1, 2, 3, 4))}, ["x has shape [8, 1, 2, 3, 4]"]),
        ({"x": np.zeros((8, 32, 32, 3))}, ["[8, 32, 32, 3]", "channels last"]),
        ({"y": np.array([0, 1, 2])}, ["y has shape [3]", "[8]"]),
        ({"y": np.array([[0, 1, 2, 0, 1, 2, 0, 1]]).T}, ["y has shape [8, 1]"]),
        ({"y": GOOD["y"] + 0.5}, ["y has type float64", "whole numbers"]),
        ({"y": with_value(GOOD["y"], 5, -1)}, ["y has label -1 in row 5"]),
        ({"y": with_value(GOOD["y"], 5, 2**40)}, [f"y has label {2**40} in row 5"]),
        ({"y": with_value(GOOD["y"], 5, 9)}, ["y has label 9 in row 5", "class 3"]),
        ({"y": GOOD["y"] + 1}, ["y has label 3 in row 2", "no sample of class 0"]),
        ({"y": np.zeros(8, int)}, ["y has one class only, 0"]),
        ({"x": with_value(GOOD["x"], (6, 1), np.nan)}, ["x has nan in row 6"]),
        ({"x": with_value(GOOD["x"], (2, 0), -np.inf)}, ["x has -inf in row 2"]),
        ({"x": with_value(GOOD["x"], (2, 0), 1e300)}, ["x has 1e+300 in row 2"]),
        ({"x": GOOD["x"] * 1j}, ["x has type complex128", "numbers"]),
        ({"x": GOOD["x"].astype("S3")}, ["x has type |S", "numbers"]),
        ({"x_test": GOOD["x"]}, ["has x_test and no y_test"]),
        ({"x_test": np.zeros((4, 2)), "y_test": GOOD["y"][:4]}, ["x_test has shape [4, 2]", "[8, 3]"]),
        ({"x_test": GOOD["x"].astype(np.uint8), "y_test": GOOD["y"]}, ["x_test has type uint8"]),
        ({"x_test": GOOD["x"], "y_test": with_value(GOOD["y"], 4, 3)}, ["y_test has label 3 in row 4", "0 to 2"]),
        ({"x_test": with_value(GOOD["x"], (1, 1), np.nan), "y_test": GOOD["y"]}, ["x_test has nan in row 1"]),
    ],
)
def test_bad_arrays(tmp_path, save_and_file, changed, words):
    save, file = save_and_file
    save(tmp_path / file, **{**GOOD, **changed})
    refused(tmp_path / file, *words)


@pytest.mark.parametrize("save_and_file", [(save_npz, "bad.npz"), (save_h5, "bad.h5")])
def test_a_missing_array(tmp_path, save_and_file):
    save, file = save_and_file
    save(tmp_path / file, x=GOOD["x"], labels=GOOD["y"])
    refused(tmp_path / file, "no array y", "labels, x")


@pytest.mark.parametrize(("save", "file"), SAVERS)
def test_truncated_and_corrupted_files(tmp_path, rng, save, file):
    save(tmp_path / file, x=rng.standard_normal((300, 5)), y=labels(rng, 300, 2))
    data = (tmp_path / file).read_bytes()
    for end in (0, 3, len(data) // 2, len(data) - 3):
        (tmp_path / f"cut{end}-{file}").write_bytes(data[:end])
        refused(tmp_path / f"cut{end}-{file}", "no whole")
    if file.endswith("npz"):
        at = len(data) // 2
        (tmp_path / f"flipped-{file}").write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        refused(tmp_path / f"flipped-{file}", "no whole .npz file")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (4, 2",  # tokenize.TokenError
        "{'descr': '<f8', 'fortran_order': False, 'shape': (4, 2), {}: 1}",  # TypeError
        "{'descr': '<f8', 'fortran_order': False}",
        "[" * 3000,
        "4 * 2",
        "",
    ],
)
def test_headers_of_arrays_that_are_none(tmp_path, header):
    """numpy parses them as Python, and raises what that may raise."""
    text = header.encode() + b"\n"
    contents = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", contents)
        archive.writestr("y.npy", contents)
    refused(tmp_path / "a.npz", "")


def test_no_pickle_is_read(tmp_path):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "sprung").touch, ())

    np.savez(tmp_path / "a.npz", x=np.array([Trap(), Trap()], dtype=object), y=np.array([0, 1]))
    refused(tmp_path / "a.npz", "pickle", "x holds")
    assert not (tmp_path / "sprung").exists()


def claiming(path: Path, shape: tuple[int, ...], data: bytes, size: int | None = None) -> None:
    """An npz file whose x claims a shape of float64, whatever data it has."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + data)
        buffer = io.BytesIO()
        np.save(buffer, np.array([0, 1]))
        archive.writestr("y.npy", buffer.getvalue())


def test_what_an_array_claims_is_checked_before_memory_is_taken(tmp_path, monkeypatch):
    claiming(tmp_path / "a.npz", (2, 10**14), b"\0" * 100)
    refused(tmp_path / "a.npz", "x claims 1,600,000,000,000,000 bytes and has 100")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", shape=(2, 10**12), dtype="f8", chunks=(1, 1000))  # never written: no space is taken
        file.create_dataset("y", data=[0, 1])
    refused(tmp_path / "a.h5", "x claims 16,000,000,000,000 bytes and the file has 0")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1])))
    head = bytes([0, 0, 8, 3]) + (2**32 - 1).to_bytes(4, "big") * 3
    (tmp_path / "train-images-idx3-ubyte").write_bytes(head + b"\0" * 50)
    refused(tmp_path / "train-images-idx3-ubyte", "claims", "has 50", "damaged")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + b"\0" * 50))
    refused(tmp_path / "train-images-idx3-ubyte.gz", "claims", "damaged")
    # An honest file that is too large for this machine.
    np.savez(tmp_path / "b.npz", **GOOD)
    free = SimpleNamespace(available=500)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    refused(tmp_path / "b.npz", "free memory")


def test_a_bomb_stops_where_its_claim_ends(tmp_path):
    """64 MiB of zeros behind a header of 2 images: more than claimed is an error, and is not unpacked."""
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([0, 1]))
    bomb = gzip.compress(idx_bytes(np.zeros((2, 4, 4))) + bytes(2**26))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    refused(tmp_path / "train-images-idx3-ubyte.gz", "claims 32 bytes of data and has more")


def test_hdf5_that_points_elsewhere(tmp_path):
    save_h5(tmp_path / "other.h5", **GOOD)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"] = h5py.ExternalLink("other.h5", "x"), GOOD["y"]
    refused(tmp_path / "a.h5", "x is a link")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("x", (8, 3), "f8", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
        file["y"] = GOOD["y"]
    refused(tmp_path / "b.h5", "x lies in another file")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_group("x")
        file["y"] = GOOD["y"]
    refused(tmp_path / "c.h5", "x is no array")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,y\n1,2,0\n3,four,1\n", ["row 3, column 'b'", "'four' is no number"]),
        ("a,b,y\n1,two,0\n3,4,1\n", ["row 3, column 'b'", "'4' is a number", "'two' in row 2"]),
        ("a,b,y\n1,,0\n3,4,1\n", ["row 2, column 'b'", "nothing"]),
        ("a,b,y\n1,2,0\n\n3,,1\n", ["row 4, column 'b'", "nothing"]),
        ("a,b,y\n1,2,0\n3,nan,1\n", ["row 3, column 'b'", "'nan' is no finite number"]),
        ("a,b,y\n1,2,0\n3,1e999,1\n", ["row 3, column 'b'", "'1e999' is no finite number"]),
        (f"a,b,y\n1,{'9' * 500},0\n", [f"row 2, column 'b': '{'9' * 40}...' is no finite number"]),
        ("a,b,y\n1,2,0\n3,1_0,1\n", ["row 3, column 'b'", "'1_0' is no number"]),
        ("a,b,y\n1,2,0\n3,1\n", ["row 3 has 2 cells", "3"]),
        ("a,b,y\n1,2,0\n3,1,\n", ["row 3, column 'y'", "label"]),
        ("a,b,y\n1,2,0\n3,1,0\n", ["column 'y' has one class only"]),
        ("a,b,y\n", ["no rows"]),
        ("", ["row 1 has fewer than two columns"]),
        ("y\n1\n2\n", ["row 1 has fewer than two columns"]),
        ("1,2,0\n3,1,1\n", ["row 1", "header"]),
        ("a,a,y\n1,2,0\n3,1,1\n", ["row 1", "'a'"]),
        ('a,b,y\n1,"2,0\n3,1,1\n', ["no whole CSV file"]),
        ("a,b,y\n1,2,0\n3,\x001,1\n", ["row 3, column 'b'"]),
    ],
)
def test_bad_csv(tmp_path, text, words):
    (tmp_path / "bad.csv").write_text(text)
    refused(tmp_path / "bad.csv", *words)


def test_csv_that_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    refused(tmp_path / "a.csv", "no UTF-8 text")


def test_csv_with_a_column_of_too_many_categories(tmp_path, monkeypatch):
    """Names of people as a column: N categories of N samples are N^2 numbers."""
    rows = "".join(f"name{i},{i % 2}\n" for i in range(5000))
    (tmp_path / "a.csv").write_text("who,y\n" + rows)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 * 10**8))
    refused(tmp_path / "a.csv", "5,000 columns for 'who'", "free memory")


def test_bad_idx(tmp_path, rng):
    x, y = images(rng, 10, 4, 4), labels(rng, 10, 2)
    path, own = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    write_idx(path, x)
    refused(path, "no train-labels-idx1-ubyte beside")
    write_idx(own, y[:9])
    refused(path, "train-labels-idx1-ubyte has shape [9]", "[10]")
    write_idx(own, np.zeros(10))
    refused(path, "one class only")
    write_idx(own, y)
    refused(own, "labels", "images")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(path, "claims 160 bytes of data and has 159")
    path.write_bytes(whole + b"\0")
    refused(path, "claims 160 bytes of data and has 161")
    path.write_bytes(b"\0\0\x0d" + whole[3:])
    refused(path, "no IDX file of bytes")
    path.write_bytes(whole[:9])
    refused(path, "no IDX file of bytes")
    path.write_bytes(whole)
    check(ScanSpec(data=str(path)))
    packed = tmp_path / "other-images-idx3-ubyte.gz"
    write_idx(tmp_path / "other-labels-idx1-ubyte", y)
    write_idx(packed, x)
    data = packed.read_bytes()
    for damaged in (data[:-12], data[:-6] + bytes([data[-6] ^ 1]) + data[-5:], b"no gzip file", b""):
        packed.write_bytes(damaged)
        refused(packed, packed.name)


def test_bad_cifar(tmp_path, rng):
    x, y = images(rng, 12, 3, 32, 32), labels(rng, 12, 10)
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(cifar_bytes(x, y)[:-1])
    refused(path, "data_batch_1.bin has 36,875 bytes", "3,073")
    path.write_bytes(b"")
    refused(path, "0 bytes")
    path.write_bytes(cifar_bytes(x, with_value(y, 7, 10)))
    refused(path, "label 10 in row 7")
    path.write_bytes(cifar_bytes(x, y))
    (tmp_path / "test_batch.bin").write_bytes(cifar_bytes(x, y, y)[: 3074 * 12])
    refused(tmp_path, "CIFAR-10 and of CIFAR-100")


def test_what_is_no_file_of_data(tmp_path):
    refused(tmp_path / "missing.npz", "no such file")
    refused(tmp_path / "missing", "no such file")
    refused(tmp_path, "neither train-images-idx3-ubyte")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", "no known format", ".csv")
    np.savez(tmp_path / "b.npz", **GOOD)
    (tmp_path / "b.npz").rename(tmp_path / "b.h5")
    refused(tmp_path / "b.h5", "no whole HDF5 file")


def test_fewer_samples_than_asked_for(tmp_path, rng):
    np.savez(tmp_path / "a.npz", x=rng.standard_normal((50, 2)), y=labels(rng, 50, 2))
    data = str(tmp_path / "a.npz")
    check(ScanSpec(data=data, n_max=50))
    check(ScanSpec(data=data, labels="true", n_max=40))
    for spec in (ScanSpec(data=data, n_max=51), ScanSpec(data=data, labels="random,true", n_max=41)):
        with pytest.raises(UserError, match=r"n_max=\d\d: .*a.npz has \d\d samples"):
            check(spec)


def test_nothing_is_written_where_data_is_bad(tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("a,b,y\n1,2,0\n3,four,1\n")
    status = main(["scan", "--data", str(tmp_path / "bad.csv"), "--out", str(tmp_path / "out.h5")])
    assert status == 2
    assert not (tmp_path / "out.h5").exists()
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "bad.csv: row 3, column 'b': 'four' is no number" in line


def test_a_changed_file_is_read_again_by_check_only(tmp_path):
    np.savez(tmp_path / "a.npz", **GOOD)
    spec = ScanSpec(data=str(tmp_path / "a.npz"))
    assert check(spec).size == 8
    np.savez(tmp_path / "a.npz", x=GOOD["x"][:6], y=GOOD["y"][:6])
    assert len(task(spec, "random", 2, 0, 5).pool) == 8  # a scan under way keeps what it began with
    assert check(spec).size == 6
    assert len(task(spec, "random", 2, 0, 5).pool) == 6


def test_a_scan_of_a_file_says_what_it_read(tmp_path, rng):
    np.savez(tmp_path / "a.npz", x=images(rng, 60, 4, 4), y=labels(rng, 60, 2))
    spec = ScanSpec(data=str(tmp_path / "a.npz"), labels="true", widths=2, steps=20, check_every=10, max_probes=2)
    attrs = fasttrain.scan(spec, out=tmp_path / "out.h5").attrs
    assert attrs["data_source"] == str(tmp_path / "a.npz")
    assert (attrs["data_size"], attrs["data_test_size"], attrs["data_shape"]) == (60, 12, "1x4x4")
    assert re.fullmatch("[0-9a-f]{64}", attrs["data_sha256"])
    preparation = json.loads(attrs["data_preparation"])
    own = task(spec, "true", 2, 0, 2)
    assert preparation["type"] == "uint8"
    assert preparation["true labels"]["mean"] == [own.shift[0]]
    with np.load(tmp_path / "a.npz") as saved:
        changed = saved["x"].copy()
    changed[59, 3, 3] ^= 1
    np.savez(tmp_path / "b.npz", x=changed, y=sources.load(str(tmp_path / "a.npz")).y)
    assert provenance(ScanSpec(data=str(tmp_path / "b.npz")))["data_sha256"] != attrs["data_sha256"]
    assert provenance(ScanSpec(data=str(tmp_path / "b.npz")))["data_test_size"] == 0


# Named data sets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """mnist with 60 and 20 images instead of 60,000 and 10,000."""
    x, y = images(rng, 80, 28, 28), np.concatenate([labels(rng, 60, 10), np.repeat(np.arange(10), 2)])
    real = sources.KNOWN["mnist"]
    fake = Known(real.about, real.shape, 10, 60, 20, real.files, real.fetch, (2,) * 10)
    monkeypatch.setitem(sources.KNOWN, "mnist", fake)
    return {"x": x[:60], "y": y[:60], "x_test": x[60:], "y_test": y[60:]}


def holds(data: Any, arrays: dict[str, np.ndarray]) -> None:
    assert np.array_equal(data.x, arrays["x"].reshape(60, -1))
    assert np.array_equal(data.y, arrays["y"])
    assert np.array_equal(data.x_test, arrays["x_test"].reshape(20, -1))
    assert np.array_equal(data.y_test, arrays["y_test"])
    assert data.x.dtype == np.uint8


def test_a_named_set_is_read_from_its_original_files(cache, small):
    folder = cache / "mnist"
    folder.mkdir(parents=True)
    for part, key in (("train", ""), ("t10k", "_test")):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", small[f"x{key}"])
        write_idx(folder / f"{part}-labels-idx1-ubyte", small[f"y{key}"])
    assert sources.here("mnist")
    assert check(ScanSpec(data="mnist", labels="true")).shape == (1, 28, 28)
    holds(sources.load("mnist"), small)
    write_idx(folder / "t10k-labels-idx1-ubyte", np.roll(small["y_test"], 1) // 2)
    refused("mnist", "test samples of class 0", "official")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    refused("mnist", "test samples 0", "20")


def openml(monkeypatch: pytest.MonkeyPatch, x: Any, y: Any) -> list[tuple[Any, ...]]:
    """Stands in for fetch_openml; the calls."""
    calls: list[tuple[Any, ...]] = []

    def fetch(name: str, *, version: int, data_home: str, as_frame: bool) -> SimpleNamespace:
        assert Path(data_home).is_dir()
        (Path(data_home) / "download").write_text("what scikit-learn keeps")
        calls.append((name, version, as_frame))
        return SimpleNamespace(data=x, target=y)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    return calls


def test_images_are_fetched_once_and_kept(cache, small, monkeypatch):
    x = np.concatenate([small["x"], small["x_test"]]).reshape(80, -1).astype(float)
    y = np.array([str(label) for label in np.concatenate([small["y"], small["y_test"]])], dtype=object)
    calls = openml(monkeypatch, x, y)
    assert not sources.here("mnist")
    check(ScanSpec(data="mnist"))
    holds(sources.load("mnist"), small)
    assert calls == [("mnist_784", 1, False)]
    assert [path.name for path in (cache / "mnist").iterdir()] == ["mnist.npz"]
    sources._LOADED.clear()
    check(ScanSpec(data="mnist"))
    data = sources.load("mnist")
    holds(data, small)
    assert len(calls) == 1
    assert data.source == str(cache / "mnist" / "mnist.npz")
    # A damaged file of ours is not fetched over in silence.
    whole = (cache / "mnist" / "mnist.npz").read_bytes()
    (cache / "mnist" / "mnist.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"mnist.npz: is no whole .npz file"):
        check(ScanSpec(data="mnist"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x[:, :-1], y), ["shape [80, 783]", "784"]),
        (lambda x, y: (x[:-1], y[:-1]), ["79 samples", "80"]),
        (lambda x, y: (x * 2, y), ["outside of 0 to 255"]),
        (lambda x, y: (with_value(x, (3, 3), np.nan), y), ["outside of 0 to 255"]),
        (lambda x, y: (np.minimum(x + 0.5, 255), y), ["no whole numbers"]),
        (lambda x, y: (x, np.where(y == "9", "8", y)), ["classes 9", "10"]),
        (lambda x, y: (x[::-1], y[::-1]), ["test samples of class", "official"]),
        (lambda x, y: (x, with_value(y, 4, None)), ["without a label"]),
    ],
)
def test_what_was_fetched_is_checked(cache, small, monkeypatch, change, words):
    x = np.concatenate([small["x"], small["x_test"]]).reshape(80, -1).astype(float)
    y = np.concatenate([small["y"], small["y_test"]]).astype(str).astype(object)
    y[0] = y[1] = "0"  # so that the reversed order has other counts
    openml(monkeypatch, *change(x, y))
    refused("mnist", *words)
    assert not list(cache.rglob("*.npz"))


@pytest.mark.parametrize("name", sorted(set(sources.KNOWN) - {"digits"}))
def test_offline_the_line_says_what_to_put_where(cache, name, capsys, tmp_path):
    line = refused(name, "cannot be fetched", "Name or service not known", str(cache / name))
    assert sources.KNOWN[name].files in line
    assert not cache.exists() or not list(cache.rglob("*.*"))
    assert main(["scan", "--data", name, "--out", str(tmp_path / "out.h5")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out.h5").exists()


def test_a_cache_that_cannot_be_written(tmp_path, small, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTTRAIN_DATA", str(tmp_path / "file"))
    refused("mnist", "cannot be fetched", str(tmp_path / "file" / "mnist"))


def credit_frame(rng: np.random.Generator) -> tuple[pd.DataFrame, pd.Series]:
    """1,000 rows with the columns of German credit: 7 of numbers and 13 of 54 categories in all."""
    counts = [4, 5, 10, 5, 5, 4, 3, 4, 3, 3, 4, 2, 2]
    columns: dict[str, Any] = {f"n{k}": rng.integers(0, 50, 1000).astype(float) for k in range(7)}
    for k, count in enumerate(counts):
        texts = pd.Series([f"v{i}" for i in labels(rng, 1000, count)]).astype("category")
        columns[f"c{k}"] = texts.cat.add_categories("never seen")
    return pd.DataFrame(columns), pd.Series(np.where(labels(rng, 1000, 2), "good", "bad")).astype("category")


def test_a_table_is_fetched_and_encoded(cache, rng, monkeypatch):
    frame, target = credit_frame(rng)
    frame.loc[frame["c12"] == "v1", "c12"] = np.nan  # a missing category is a category of its own
    calls = openml(monkeypatch, frame, target)
    assert check(ScanSpec(data="credit", labels="true")) == describe("credit")
    assert calls == [("credit-g", 1, True)]
    for _ in range(2):
        data = sources.load("credit")
        assert data.x.shape == (1000, 61)
        assert np.array_equal(data.x[:, :7], frame[[f"n{k}" for k in range(7)]].to_numpy())
        expected = np.stack([frame["c0"] == f"v{k}" for k in range(4)], axis=1)
        assert np.array_equal(data.x[:, 7:11], expected)
        assert np.array_equal(data.x[:, -2], frame["c12"].isna())  # "" comes first
        assert np.array_equal(data.y, (target == "good").astype(int))
        assert data.columns[7] == Column("c0", 4)
        sources._LOADED.clear()
        monkeypatch.setattr(sklearn.datasets, "fetch_openml", None)  # the second time, from the cache
    frame["n3"] = frame["n3"].astype(object)
    sources._LOADED.clear()


def test_a_table_with_a_missing_number_is_refused(cache, rng, monkeypatch):
    frame, target = credit_frame(rng)
    frame.loc[17, "n3"] = np.nan
    openml(monkeypatch, frame, target)
    refused("credit", "nan in row 17")


def test_a_named_table_may_be_put_there_as_csv(cache, rng):
    frame, target = credit_frame(rng)
    (cache / "credit").mkdir(parents=True)
    frame.assign(**{"class": target}).to_csv(cache / "credit" / "credit.csv", index=False)
    check(ScanSpec(data="credit"))
    data = sources.load("credit")
    assert np.array_equal(data.x[:, :7], frame[[f"n{k}" for k in range(7)]].to_numpy())
    assert np.array_equal(data.y, (target == "good").astype(int))
    frame.drop(columns="n0").assign(**{"class": target}).to_csv(cache / "credit" / "credit.csv", index=False)
    with pytest.raises(UserError, match=r"credit.csv has samples of shape \[60\]; expected \[61\]"):
        check(ScanSpec(data="credit"))


def test_covertype_labels_start_at_0(cache, rng, monkeypatch):
    x, y = rng.integers(0, 9, (700, 54)).astype(float), labels(rng, 700, 7) + 1
    real = sources.KNOWN["covertype"]
    monkeypatch.setitem(sources.KNOWN, "covertype", Known(real.about, (54,), 7, 700, fetch=real.fetch))
    monkeypatch.setattr(
        sklearn.datasets, "fetch_covtype", lambda data_home: SimpleNamespace(data=x, target=y.astype(np.int32))
    )
    info = check(ScanSpec(data="covertype"))
    assert (available(info, "random", "real"), available(info, "true", "real")) == (700, 560)
    data = sources.load("covertype")
    assert np.array_equal(data.x, x)
    assert np.array_equal(data.y, y - 1)


# The command line -----------------------------------------------------------------------------------------------------


def test_data_list(cache, capsys):
    assert main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split() for line in lines if line}
    assert set(sources.KNOWN) < set(table)
    assert table["cifar10"][1:6] == ["3x32x32", "10", "50,000", "10,000", "no"]
    assert table["digits"][1:6] == ["1x8x8", "10", "1,797", "359*", "yes"]
    assert str(cache) in lines[-1]


def test_data_info(cache, tmp_path, rng, capsys):
    np.savez(tmp_path / "a.npz", x=images(rng, 60, 3, 4, 5), y=labels(rng, 60, 7))
    assert main(["data", "info", str(tmp_path / "a.npz")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"inputs +3x4x5", text)
    assert re.search(r"classes +7\n", text)
    assert re.search(r"samples +60\n", text)
    assert re.search(r"sha256 +[0-9a-f]{64}\n", text)
    assert main(["data", "info", "adult"]) == 0
    assert str(cache / "adult") in capsys.readouterr().out
    assert main(["data", "info", "gaussian:2x3x4"]) == 0
    assert "2x3x4" in capsys.readouterr().out


def test_data_fetch(cache, small, monkeypatch, capsys):
    x = np.concatenate([small["x"], small["x_test"]]).reshape(80, -1).astype(float)
    y = np.concatenate([small["y"], small["y_test"]]).astype(str)
    openml(monkeypatch, x, y)
    assert main(["data", "fetch", "mnist"]) == 0
    assert (cache / "mnist" / "mnist.npz").is_file()
    assert "mnist: 60 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fetch", "mnist"], "cannot be fetched"),
        (["fetch", "nothing"], "expected one of"),
        (["info", "nothing"], "gaussian:D"),
        (["info", "nothing.csv"], "no such file"),
        (["info", ""], "gaussian:D"),
    ],
)
def test_data_commands_complain_in_one_line(cache, args, words, capsys):
    assert main(["data", *args]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert words in err
