"""Loading results: what a file must be, and what Results gives."""

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from fasttrain.analysis import Results, load
from fasttrain.errors import UserError
from fasttrain.records import History, Outcome, Probe, ProbeResult, Problem
from fasttrain.run import scan
from fasttrain.schema import GROUPS, SCHEMA_VERSION
from fasttrain.spec import ScanSpec
from fasttrain.store import HDF5Store, MemoryStore

SPEC = ScanSpec(widths=(4, 8))
PROBLEMS = [Problem(i, v, 50, 2, 99) for i, v in enumerate(SPEC.variants(10))]


def fill(store: MemoryStore | HDF5Store, probes: int = 3) -> None:
    store.begin(SPEC, PROBLEMS, {"device": "cpu"})
    for i in range(probes):
        store.append([result(i)])
    store.finish("complete", {})
    store.close()


def result(i: int) -> ProbeResult:
    history = History(np.arange(i) + i, np.arange(i) / 4, np.arange(i) / 8)
    return ProbeResult(Probe(i % 2, 5 + i, 0), Outcome.FITTED, 9, 9, 0.5, 0.0, history)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "scan.h5"
    fill(HDF5Store(path, overwrite=False))
    return path


def _delete(file: h5py.File) -> None:
    del file["probes/outcome"]


def _shorten(file: h5py.File) -> None:
    file["probes/n"].resize((2,))


def _shorten_history(file: h5py.File) -> None:
    for data in file["history"].values():
        data.resize((2,))


def _no_history(file: h5py.File) -> None:
    del file["history"]


def _group_for_column(file: h5py.File) -> None:
    del file["curves/emc50"]
    file["curves"].create_group("emc50")


def _matrix(file: h5py.File) -> None:
    del file["history/step"]
    file["history/step"] = np.zeros((3, 2))


def _text_for_number(file: h5py.File) -> None:
    del file["probes/n"]
    file["probes/n"] = ["a", "b", "c"]


def _number_for_text(file: h5py.File) -> None:
    del file["probes/outcome"]
    file["probes/outcome"] = np.arange(3)


def _no_version(file: h5py.File) -> None:
    del file.attrs["schema_version"]


def _newer(file: h5py.File) -> None:
    file.attrs["schema_version"] = SCHEMA_VERSION + 1


def _bad_spec(file: h5py.File) -> None:
    file["spec"][()] = '{"widths": [0]}'


def _no_spec(file: h5py.File) -> None:
    del file["spec"]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_delete, "/probes/outcome is missing"),
        (_shorten, "column /probes/n has shape"),
        (_shorten_history, "row 2 of /probes has history_start"),
        (_no_history, "/history/sample is missing"),
        (_group_for_column, "/curves/emc50 is missing"),
        (_matrix, "column /history/step has shape"),
        (_text_for_number, "is damaged"),
        (_number_for_text, "is damaged"),
        (_no_version, "not written by fasttrain"),
        (_newer, f"schema version {SCHEMA_VERSION + 1}"),
        (_bad_spec, "spec cannot be read.*widths"),
        (_no_spec, "/spec is missing"),
    ],
)
def test_damaged_files_are_refused(path: Path, damage: Callable[[h5py.File], None], why: str) -> None:
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(UserError, match=why) as caught:
        load(path)
    assert (caught.value.option, caught.value.value) == ("file", path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_scans_are_refused(path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.h5"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = tmp_path / "text.h5"
    text.write_text("n,seed\n1,2\n")
    empty = tmp_path / "empty.h5"
    empty.touch()
    cases = {
        tmp_path / "nothing.h5": "no such file",
        tmp_path: "is a directory",
        text: "not an HDF5 file",
        empty: "not an HDF5 file",
        cut: "truncated",
    }
    for file, why in cases.items():
        with pytest.raises(UserError, match=why) as caught:
            load(file)
        assert (caught.value.option, caught.value.value) == ("file", file)
        assert "\n" not in str(caught.value)


def test_a_running_file_shows_the_rows_that_all_columns_have(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["status"] = "running"
        _shorten(file)
    results = load(path)
    assert results.probes["n"].tolist() == [5, 6]
    assert results.history(1)["step"].tolist() == [1]


def test_rows_that_were_never_written_are_not_read(path: Path) -> None:
    """A column of 2^40 rows takes no space in a file, and eight terabytes in memory."""
    with h5py.File(path, "r+") as file:
        for column in file["probes"].values():
            column.resize((2**40,))
    with pytest.raises(UserError, match=r"damaged: column /probes/\w+ claims 1,099,511,627,776 rows"):
        load(path)


@pytest.mark.parametrize("locking", ["TRUE", "FALSE", "BEST_EFFORT"])
def test_a_file_that_is_being_written_can_be_read(tmp_path: Path, locking: str) -> None:
    path = tmp_path / "live.h5"
    store = HDF5Store(path, overwrite=False)
    store.begin(SPEC, PROBLEMS, {})
    for k in range(3):
        store.append([result(k)])
    program = "import sys, fasttrain; r = fasttrain.load(sys.argv[1]); print(len(r.probes), r.attrs['status'])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "HDF5_USE_FILE_LOCKING": locking},
    )
    store.append([result(3)])
    store.close()
    assert done.stdout == "3 running\n"
    assert len(load(path).probes) == 4


def test_history_reads_its_slice_and_no_file_stays_open(path: Path) -> None:
    results = load(path)
    with h5py.File(path, "r+") as file:
        file["history/train_loss"][0] = 77.0
    assert results.history(1)["train_loss"].tolist() == [77.0]
    assert results.history(2)["step"].tolist() == [2, 3]
    assert results.history(0).empty
    assert list(results.history(0).columns) == ["step", "train_loss", "train_accuracy"]
    assert results.history(np.int64(2))["train_accuracy"].tolist() == [0.0, 0.125]


def test_history_survives_changes_to_the_frame(path: Path) -> None:
    results = load(path)
    results.probes["history_start"] = 0
    assert results.history(2)["step"].tolist() == [2, 3]


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_an_unknown_probe_is_refused(path: Path, kind: str) -> None:
    store = MemoryStore()
    fill(store)
    results = Results.from_memory(store) if kind == "memory" else load(path)
    for probe in (3, -1):
        with pytest.raises(UserError, match="expected 0 to 2") as caught:
            results.history(probe)
        assert caught.value.option == "probe"


def test_history_of_a_file_that_went_or_changed(path: Path) -> None:
    results = load(path)
    with h5py.File(path, "r+") as file:
        file.attrs["started"] = "1999-01-01T00:00:00+00:00"
    with pytest.raises(UserError, match="replaced"):
        results.history(1)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        results.history(1)


def test_results_from_memory_are_a_snapshot() -> None:
    store = MemoryStore()
    store.begin(SPEC, PROBLEMS, {})
    results = Results.from_memory(store)
    history = History(np.arange(2), np.ones(2), np.ones(2))
    store.append([ProbeResult(Probe(0, 5, 0), Outcome.FITTED, 9, 9, 0.5, 0.0, history)])
    store.finish("complete", {})
    assert len(results.probes) == 0
    assert results.attrs["status"] == "running"
    with pytest.raises(UserError, match="no probes"):
        results.history(0)
    later = Results.from_memory(store)
    frame = later.history(0)
    frame.loc[0, "train_loss"] = 9.0
    assert later.history(0)["train_loss"].tolist() == [1.0, 1.0]


def test_what_results_say_of_themselves(path: Path, tmp_path: Path) -> None:
    results = load(str(path))
    assert results.path == path
    assert repr(results) == f"<Results from {path}: 2 variants, 3 probes, status complete>"
    assert results.spec == SPEC
    store = MemoryStore()
    fill(store)
    memory = Results.from_memory(store)
    assert memory.path is None
    assert repr(memory) == "<Results: 2 variants, 3 probes, status complete>"


def test_columns_added_later_do_no_harm(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.h5"
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        file["probes/new"] = np.arange(3)
        file.attrs["new"] = np.arange(3)
    results = load(copy)
    assert list(results.probes.columns) == [c.name for c in GROUPS["probes"]]
    assert results.probes["n"].tolist() == [5, 6, 7]


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    """A file that fasttrain 915253f, of schema version 1, wrote: two widths, two learning rates, 20 probes."""
    path = tmp_path / "version1.h5"
    path.write_bytes(gzip.decompress((Path(__file__).parent / "data" / "version1.h5.gz").read_bytes()))
    return path


def test_a_file_of_version_1_is_read_with_the_values_that_it_had_then(version_1: Path) -> None:
    results = load(version_1)
    assert results.attrs["schema_version"] == 1
    curves, probes = results.curves, results.probes
    for group, frame in (("curves", curves), ("probes", probes)):
        assert list(frame.columns) == [c.name for c in GROUPS[group]]
    # As h5py reads them; what version 1 has is not replaced.
    with h5py.File(version_1) as file:
        for group, frame in (("curves", curves), ("probes", probes)):
            lacked = {c.name for c in GROUPS[group] if c.since > 1}
            assert set(file[group]) == {c.name for c in GROUPS[group]} - lacked
            for name in set(file[group]) - {"arch", "activation", "optimizer", "labels", "data", "censored", "outcome"}:
                np.testing.assert_array_equal(frame[name], file[group][name][:])
    assert len(curves) == 4
    assert len(probes) == 20
    assert set(curves["lr"]) == {0.01, 0.03}
    for frame in (curves, probes):
        assert set(zip(frame["norm"], frame["inputs"], frame["schedule"], strict=True)) == {
            ("none", "real", "constant")
        }
        assert not frame[["heads", "patch", "warmup", "weight_decay", "clip", "label_smoothing"]].any(axis=None)
        assert frame["nesterov"].dtype == np.bool_
        assert not frame["nesterov"].any()
        assert (frame["init_scale"] == 1.0).all()
    assert (curves["race"] == "").all()
    assert curves[["race_emc50", "race_emc50_low", "race_emc50_high"]].isna().all(axis=None)
    assert probes["test_accuracy"].isna().all()
    # What follows from the spec.
    assert (probes["steps_budget"] == results.spec.steps).all()
    assert probes["steps_budget"].dtype == np.int64
    assert (curves["budget"] == f"{results.spec.steps}steps").all()
    assert (results.spec.budget, results.spec.early_stop) == (None, True)
    assert len(results.history(0)) == probes["history_count"][0] > 0
    # Its learning rates never raced.
    assert (results.spec.lr, results.spec.lr_search) == ((0.01, 0.03), "all")
    assert len(results.spec.variants(10)) == 4


def test_of_version_1_only_what_it_lacked_may_be_missing(version_1: Path, path: Path) -> None:
    with h5py.File(version_1, "r+") as file:
        del file["curves/censored"]
    with pytest.raises(UserError, match="/curves/censored is missing"):
        load(version_1)
    with h5py.File(path, "r+") as file:
        del file["curves/race"]
    with pytest.raises(UserError, match="/curves/race is missing"):
        load(path)


def test_weights_that_claim_more_than_the_file_holds(tmp_path: Path) -> None:
    """A few bytes may claim terabytes: nothing is taken for them."""
    path = tmp_path / "emc.h5"
    spec = ScanSpec(widths=(3,), data="gaussian:8", classes=2, steps=200, check_every=20, max_probes=6)
    probes = scan(spec, out=path, save_weights=True).probes
    probe = int(probes[probes["outcome"] == "fitted"]["probe"].iloc[0])
    whole = path.read_bytes()
    for shape, dtype, what in (((10**12,), "<f8", "claims 1,000,000,000,000 values"), ((3,), "S4", r"has type \|S4")):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            del file[f"weights/{probe}/layers.0.bias"]
            file.create_dataset(f"weights/{probe}/layers.0.bias", shape, dtype, chunks=True)
        with pytest.raises(UserError, match=rf"layers\.0\.bias {what}"):
            load(path).weights(probe)


def _set(name: str, row: int, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][row] = value

    return change


def _attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


def _again(name: str, **how: object) -> Callable[[h5py.File], None]:
    """Another data set of that name."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **how)

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_attribute("extended_from", 3), "attribute extended_from has type"),
        (_attribute("extended_from", np.zeros(3)), "attribute extended_from has type"),
        (_attribute("extended_from", "3"), "its spec cannot be read"),
        (_attribute("curvature_runs", "x"), "attribute curvature_runs has type"),
        (_attribute("save_weights", np.ones(2)), "attribute save_weights has type"),
        (_set("probes/outcome", 0, "foo"), "row 0 of /probes has outcome foo"),
        (_set("probes/variant", 1, 77), "row 1 of /probes has variant 77"),
        (_set("probes/variant", 1, -1), "row 1 of /probes has variant -1"),
        (_set("probes/n", 0, 0), "row 0 of /probes has n 0"),
        (_set("probes/history_start", 0, -(10**12)), "row 0 of /probes has history_start"),
        (_set("probes/history_count", 0, 2**63 - 1), "row 0 of /probes has history_start"),
        (_again("spec", shape=(10**9,), dtype=h5py.string_dtype(), chunks=True), "/spec is no text"),
        (_again("spec", data=1.5), "/spec is no text"),
        (_again("curves/arch", shape=(4,), dtype="S100000000", chunks=(1,)), "column /curves/arch has type"),
        (_again("probes/n", data=["a", "b", "c"]), "column /probes/n has type"),
    ],
)
def test_files_that_others_have_made(path: Path, change: Callable[[h5py.File], None], why: str) -> None:
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(UserError, match=why) as caught:
        load(path)
    assert "\n" not in str(caught.value)
