"""The stores: what goes in comes out, from memory and from HDF5 alike, at every moment of a scan."""

import dataclasses
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from fasttrain import store as store_module
from fasttrain.analysis import Results, load
from fasttrain.errors import UserError
from fasttrain.journal import journal_path
from fasttrain.records import Censored, Curvature, Estimate, History, Outcome, Probe, ProbeResult, Problem, Race
from fasttrain.schema import GROUPS, SCHEMA_VERSION, TIMING_ATTRIBUTES, TIMING_COLUMNS
from fasttrain.spec import SHORT, ScanSpec
from fasttrain.store import HDF5Store, MemoryStore, check_output

SPEC = ScanSpec(widths=(4, 8), depths=(0, 1), optimizer=("sgd", "adam"), batch_size=("full",), lr=(0.1,), steps=500)
PROBLEMS = [Problem(i, v, 50 * (i + 1), 2 + i, 10**18) for i, v in enumerate(SPEC.variants(10))]
CONDITIONS = {"fasttrain": "0.1.0", "device": "Große GPU, 東京", "threads": 2, "memory_gib": 0.5, "note": ""}
LENGTHS = (3, 0, 1, 0, 0, 7)


def result(i: int, length: int = 2, **changes: object) -> ProbeResult:
    step = np.arange(1, length + 1) * 100
    fields = {
        "probe": Probe(i % len(PROBLEMS), 10 + i, i // 2, i // 3),
        "outcome": list(Outcome)[i % 4],
        "steps": 100 * i,
        "fit_step": -1 if i % 4 else 50 * i,
        "train_loss": 1.0 / (i + 3),
        "train_error": i / 7,
        "history": History(step + i, 1.0 / (step + i), 1 - 1.0 / (step + i)),
        "started": 0.5 * i,
        "finished": 0.5 * i + 0.1,
        "train_seconds": 0.1 * i,
        "test_accuracy": i / 9,
    }
    return ProbeResult(**{**fields, **changes})


def estimate(i: int, **changes: object) -> Estimate:
    fields = {
        "variant": i,
        "emc50": 10.5 + i,
        "emc50_low": 9.5,
        "emc50_high": math.inf,
        "slope": 3.25,
        "lapse": 0.01,
        "censored": Censored.NO,
        "budget_spent": i % 2 == 0,
        "finished": i % 2 == 1,
        "n_probes": 7 + i,
        "race": list(Race)[i % 5],
        "race_emc50": 11.5 + i if i % 5 else math.nan,
        "race_low": 8.5 if i % 5 else math.nan,
        "race_high": math.inf if i % 5 else math.nan,
    }
    return Estimate(**{**fields, **changes})


EXTREME = ProbeResult(
    Probe(1, 10**18, 2**62, 0),
    Outcome.DIVERGED,
    0,
    -1,
    math.nan,
    1.0,
    History(np.array([0, 2**62]), np.array([5e-324, math.inf]), np.array([math.nan, -0.0])),
)


def looked_at(i: int) -> tuple[int, Curvature]:
    return i, Curvature(1.5 + i, 0.25, math.nan, -0.5, 1e-9, 7.0, 2e-9, 100 * i, i % 2 == 0)


def fill(store: MemoryStore | HDF5Store) -> None:
    """A small scan: several appends, an empty one, histories of unequal and no length, values at the ends."""
    store.begin(SPEC, PROBLEMS, CONDITIONS)
    store.append([result(i, length) for i, length in enumerate(LENGTHS[:4])])
    store.append([])
    store.put_curves([estimate(i) for i in range(len(PROBLEMS))])
    store.append([result(i, length) for i, length in enumerate(LENGTHS[4:], 4)])
    store.append([EXTREME])
    store.put_curvature([looked_at(3)])
    store.put_curvature([])
    store.put_curvature([looked_at(0), looked_at(5)])
    changed = [estimate(i, slope=-1.5) for i in range(2, len(PROBLEMS))]
    censored = estimate(1, emc50=math.nan, emc50_low=0.0, emc50_high=3.0, censored=Censored.BELOW)
    store.put_curves([censored, *changed, estimate(0, censored=Censored.ABOVE)])
    store.finish("complete", {"seconds": 1.5, "probes": np.int64(7), "warnings": ""})
    store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "größe 東京.h5"


def both(path: Path) -> tuple[Results, Results]:
    memory = MemoryStore()
    fill(memory)
    fill(HDF5Store(path, overwrite=False))
    return Results.from_memory(memory), load(path)


def test_memory_and_file_read_alike(path: Path) -> None:
    memory, file = both(path)
    pd.testing.assert_frame_equal(memory.curves, file.curves, check_exact=True)
    pd.testing.assert_frame_equal(memory.probes, file.probes, check_exact=True)
    pd.testing.assert_frame_equal(memory.curvature, file.curvature, check_exact=True)
    assert len(file.probes) == 7
    for probe in range(7):
        pd.testing.assert_frame_equal(memory.history(probe), file.history(probe), check_exact=True)
    assert memory.spec == file.spec == SPEC
    untimed = [{k: v for k, v in r.attrs.items() if k not in TIMING_ATTRIBUTES} for r in (memory, file)]
    assert untimed[0] == untimed[1]
    assert {k: type(v) for k, v in memory.attrs.items()} == {k: type(v) for k, v in file.attrs.items()}


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_empty_scans_read_alike(path: Path, kind: str) -> None:
    store = MemoryStore() if kind == "memory" else HDF5Store(path, overwrite=False)
    store.begin(SPEC, PROBLEMS, {})
    store.finish("interrupted", {})
    store.close()
    results = Results.from_memory(store) if isinstance(store, MemoryStore) else load(path)
    assert len(results.probes) == 0
    assert list(results.probes.columns) == [c.name for c in GROUPS["probes"]]
    assert list(results.curvature.columns) == [c.name for c in GROUPS["curvature"]]
    assert results.curvature.empty
    assert results.curvature["products"].dtype == np.int64
    assert results.probes["n"].dtype == np.int64
    assert results.curves["emc50"].isna().all()
    assert results.curves["emc50_per_param"].isna().all()
    assert (results.curves["censored"] == "no").all()
    assert not results.curves["finished"].any()
    assert results.attrs["status"] == "interrupted"


@pytest.mark.parametrize("kind", [0, 1])
def test_every_value_comes_back(path: Path, kind: int) -> None:
    results = both(path)[kind]
    probes, curves = results.probes, results.curves
    for i, length in enumerate(LENGTHS):
        want, row = result(i, length), probes.iloc[i]
        variant = PROBLEMS[want.probe.variant].variant
        assert row["probe"] == i
        assert (row["variant"], row["n"], row["seed"], row["round"]) == (i, 10 + i, i // 2, i // 3)
        for name in variant.__slots__:
            assert row[name] == getattr(variant, name), name
        assert row["params"] == 50 * (i + 1)
        assert row["outcome"] == want.outcome.value
        assert row["steps_budget"] == 500
        for name in ("steps", "fit_step", "train_error", "train_loss", "test_accuracy", *TIMING_COLUMNS):
            assert row[name] == getattr(want, name), name
        history = results.history(i)
        assert row["history_count"] == len(history) == length
        for name in ("step", "train_loss", "train_accuracy"):
            np.testing.assert_array_equal(history[name], getattr(want.history, name), strict=True)
    assert list(probes["history_start"]) == [0, 3, 3, 4, 4, 4, 11]
    assert curves["variant"].tolist() == list(range(len(PROBLEMS)))
    assert curves["n_min"].tolist() == [2 + i for i in range(len(PROBLEMS))]
    assert curves["steps_budget"].unique().tolist() == [500]
    assert curves["budget"].unique().tolist() == ["500steps"]
    assert curves["data"].unique().tolist() == ["digits"]
    assert curves["batch_size"].unique().tolist() == [0]
    assert curves["slope"].tolist() == [3.25, 3.25] + [-1.5] * (len(PROBLEMS) - 2)
    assert curves["censored"].tolist() == ["above", "below"] + ["no"] * (len(PROBLEMS) - 2)
    assert math.isnan(curves["emc50"][1])
    assert math.isnan(curves["emc50_per_param"][1])
    assert curves["emc50_per_param"][2] == 12.5 / 150
    assert math.isinf(curves["emc50_high"][2])
    assert curves["budget_spent"].tolist() == [i % 2 == 0 for i in range(len(PROBLEMS))]
    assert curves["budget_spent"].dtype == curves["finished"].dtype == np.bool_
    raced = [i for i in range(len(PROBLEMS)) if i % 5]
    assert curves["race"].tolist() == [list(Race)[i % 5].value for i in range(len(PROBLEMS))]
    assert curves["race_emc50"][raced].tolist() == [11.5 + i for i in raced]
    assert curves["race_emc50_low"][raced].tolist() == [8.5 for _ in raced]
    assert curves["race_emc50_high"][raced].tolist() == [math.inf for _ in raced]
    assert curves["race_emc50"][::5].isna().all()
    assert results.curvature["row"].tolist() == [0, 1, 2]
    for row, i in zip(results.curvature.itertuples(), (3, 0, 5), strict=True):
        assert row.probe == i
        for name, value in dataclasses.asdict(looked_at(i)[1]).items():
            np.testing.assert_equal(getattr(row, name), value)
    assert results.curvature["converged"].dtype == np.bool_
    assert results.attrs["device"] == "Große GPU, 東京"
    assert (results.attrs["threads"], results.attrs["memory_gib"], results.attrs["probes"]) == (2, 0.5, 7)
    assert results.attrs["spec_digest"] == SPEC.digest()


@pytest.mark.parametrize("kind", [0, 1])
def test_extreme_values_come_back(path: Path, kind: int) -> None:
    results = both(path)[kind]
    row = results.probes.iloc[6]
    assert (row["n"], row["seed"], row["fit_step"], row["outcome"]) == (10**18, 2**62, -1, "diverged")
    assert math.isnan(row["train_loss"])
    assert math.isnan(row["started"])
    assert math.isnan(row["test_accuracy"])
    history = results.history(6)
    assert history["step"].tolist() == [0, 2**62]
    assert history["train_loss"].tolist() == [5e-324, math.inf]
    assert math.isnan(history["train_accuracy"][0])
    assert math.copysign(1, history["train_accuracy"][1]) == -1


def test_plain_h5py_reads_the_layout(path: Path) -> None:
    fill(HDF5Store(path, overwrite=False))
    kinds = {int: "<i8", float: "<f8", bool: "|i1"}
    with h5py.File(path) as file:
        assert list(file) == ["spec", "curves", "probes", "history", "curvature"]
        assert ScanSpec.from_json(file["spec"].asstr()[()]) == SPEC
        assert file.attrs["schema_version"] == SCHEMA_VERSION
        for group, columns in GROUPS.items():
            assert list(file[group]) == [c.name for c in columns]
            for column in columns:
                data = file[group][column.name]
                text = h5py.check_string_dtype(data.dtype)
                if column.kind is str:
                    assert text is not None
                    assert (text.encoding, text.length) == ("utf-8", None)
                else:
                    assert data.dtype.str == kinds[column.kind]
                assert data.attrs["description"] == column.description
                assert data.attrs["units"] == column.units
                # netCDF-4 refuses to write to files that do not track it.
                assert (
                    data.id.get_create_plist().get_attr_creation_order()
                    == h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED
                )
                scale = file[group][columns[0].name]
                assert data == scale or data.dims[0][0] == scale
            assert scale.is_scale
            assert scale[:].tolist() == list(range(len(scale)))
        assert [file[g][GROUPS[g][0].name].maxshape for g in GROUPS] == [(len(PROBLEMS),), (None,), (None,), (None,)]
        probes, history = file["probes"], file["history"]
        assert probes["outcome"].asstr()[:].tolist()[:3] == ["fitted", "plateaued", "diverged"]
        start, count = probes["history_start"][5], probes["history_count"][5]
        assert history["step"][start : start + count].tolist() == [105, 205, 305, 405, 505, 605, 705]


def test_times_of_the_scan_are_iso_8601_utc(path: Path) -> None:
    fill(HDF5Store(path, overwrite=False))
    attrs = load(path).attrs
    for name in ("started", "ended"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", attrs[name])
    assert attrs["started"] <= attrs["ended"]


def test_the_same_scan_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_now", lambda: "2000-01-01T00:00:00+00:00")
    for name in ("a", "b"):
        fill(HDF5Store(tmp_path / name, overwrite=False))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def copied(path: Path, copy: Path) -> None:
    """Both files, as another machine would find them: the one with the last commits first."""
    shutil.copy(journal_path(path), journal_path(copy))
    shutil.copy(path, copy)


def test_each_append_is_in_the_file_at_once(path: Path, tmp_path: Path) -> None:
    store = HDF5Store(path, overwrite=False)
    store.begin(SPEC, PROBLEMS, CONDITIONS)
    copy, written = tmp_path / "copy.h5", 0
    for size in (0, 1, 8, 300, 1):
        store.append([result(i % 8, i % 5) for i in range(written, written + size)])
        written += size
        copied(path, copy)
        results = load(copy)
        assert results.attrs["status"] == "running"
        assert results.attrs["ended"] == ""
        assert results.probes["n"].tolist() == [10 + i % 8 for i in range(written)]
        for i in (0, written - 1) if written else ():
            assert results.history(i)["step"].tolist() == [100 * (k + 1) + i % 8 for k in range(i % 5)]
    store.put_curves([estimate(i) for i in range(len(PROBLEMS))])
    copied(path, copy)
    assert load(copy).curves["emc50"].tolist() == [10.5 + i for i in range(len(PROBLEMS))]
    store.close()
    assert load(path).attrs["status"] == "running"


def test_a_kill_loses_no_committed_probe(path: Path) -> None:
    program = (
        "import os, sys; sys.path.insert(0, 'tests'); from test_store import *\n"
        "store = HDF5Store(sys.argv[1], overwrite=False); store.begin(SPEC, PROBLEMS, CONDITIONS)\n"
        "store.append([result(i) for i in range(5)]); store.append([result(5)])\n"
        "os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    results = load(path)
    assert results.probes["n"].tolist() == [10, 11, 12, 13, 14, 15]
    assert results.history(5)["step"].tolist() == [105, 205]
    assert results.attrs["status"] == "running"


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("again", [False, True])
def test_an_append_cut_short_leaves_nothing(
    path: Path, kind: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore() if kind == "memory" else HDF5Store(path, overwrite=False)
    store.begin(SPEC, PROBLEMS, {})
    store.append([result(0)])
    write = store._write

    def stop(group: str, start: int, block: dict[str, np.ndarray]) -> None:
        if group == "probes":
            write(group, start, {name: block[name] for name in list(block)[:9]})
            raise KeyboardInterrupt
        write(group, start, block)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            store.append([result(1, 4), result(2, 4)])
    if again:
        store.append([result(3, 1)])
    store.finish("interrupted", {})
    store.close()
    results = Results.from_memory(store) if isinstance(store, MemoryStore) else load(path)
    assert results.probes["n"].tolist() == ([10, 13] if again else [10])
    assert results.history(len(results.probes) - 1)["step"].tolist() == ([103] if again else [100, 200])
    if kind == "file":
        with h5py.File(path) as file:
            assert {len(c) for c in file["history"].values()} == {3 if again else 2}


def test_refusal_leaves_the_old_file_untouched(path: Path) -> None:
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists") as caught:
        check_output(path, overwrite=False)
    assert caught.value.option == "out"
    with pytest.raises(UserError, match="exists"):
        HDF5Store(path, overwrite=False).begin(SPEC, PROBLEMS, {})
    assert path.read_bytes() == b"precious"


def test_overwrite_replaces_only_at_begin(path: Path) -> None:
    fill(HDF5Store(path, overwrite=False))
    before = path.read_bytes()
    check_output(path, overwrite=True)
    store = HDF5Store(path, overwrite=True)
    store.close()
    assert path.read_bytes() == before
    store.begin(SPEC, PROBLEMS[:1], {})
    store.finish("complete", {})
    store.close()
    store.close()
    results = load(path)
    assert (len(results.curves), len(results.probes)) == (1, 0)
    assert "device" not in results.attrs


@pytest.mark.parametrize("overwrite", [False, True])
def test_unusable_outputs_are_refused_and_leave_nothing(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "missing" / "x")
    before = sorted(tmp_path.rglob("*"))
    cases = {
        tmp_path: "is a directory",
        tmp_path / "pipe": "not a regular file",
        tmp_path / "missing" / "x.h5": "does not exist",
        tmp_path / "file" / "x.h5": "is not a directory",
        tmp_path / ("x" * 300): "cannot be written",
        tmp_path / "dangling": "cannot be written",
    }
    for out, why in cases.items():
        for attempt in (
            lambda out=out: check_output(out, overwrite),
            lambda out=out: HDF5Store(out, overwrite).begin(SPEC, PROBLEMS, {}),
        ):
            with pytest.raises(UserError, match=why) as caught:
                attempt()
            assert (caught.value.option, caught.value.value) == ("out", out)
            assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_good_output_leaves_nothing(path: Path) -> None:
    check_output(path, overwrite=False)
    check_output(str(path), overwrite=True)
    assert list(path.parent.iterdir()) == []


def test_misuse_is_an_error(path: Path) -> None:
    for store in (MemoryStore(), HDF5Store(path, overwrite=True)):
        with pytest.raises(ValueError, match="numbered"):
            store.begin(SPEC, PROBLEMS[1:], {})
        with pytest.raises(ValueError, match="status"):
            store.begin(SPEC, PROBLEMS, {"status": "mine"})
        with pytest.raises(TypeError, match="device"):
            store.begin(SPEC, PROBLEMS, {"device": None})  # type: ignore[dict-item]
        store.begin(SPEC, PROBLEMS, {})
        with pytest.raises(ValueError, match="one estimate"):
            store.put_curves([estimate(0)])
        with pytest.raises(ValueError, match="one estimate"):
            store.put_curves([estimate(0)] * len(PROBLEMS))
        with pytest.raises(ValueError, match="one length"):
            store.append([result(0, history=History(np.arange(2), np.zeros(1), np.zeros(2)))])
        with pytest.raises(ValueError, match="neither"):
            store.finish("done", {})
        store.close()


def test_an_estimate_of_a_model_without_parameters() -> None:
    store = MemoryStore()
    store.begin(SPEC, [Problem(0, PROBLEMS[0].variant, 0, 2, 9)], {})
    store.put_curves([estimate(0)])
    assert type(store.block("curves")["censored"][0]) is str
    assert math.isnan(store.block("curves")["emc50_per_param"][0])


@pytest.mark.parametrize(
    ("budget", "of_curves", "of_probes"),
    [
        ("900steps", [900, 900], [900, 900, 300]),
        ("300epochs", [0, 300], [47, 300, 16]),
        ("6400samples", [100, 0], [100, 640, 33]),
    ],
)
def test_budgets_are_kept_in_steps_where_these_are_known(
    budget: str, of_curves: list[int], of_probes: list[int]
) -> None:
    """0 in /curves where they depend on n; in /probes those of each run, a third of them of a short one."""
    spec = ScanSpec(widths=4, batch_size="64,full", budget=budget)
    store = MemoryStore()
    store.begin(spec, [Problem(i, v, 50, 2, 999) for i, v in enumerate(spec.variants(10))], {})
    store.append([result(0, probe=probe) for probe in (Probe(0, 10, 0), Probe(1, 10, 0), Probe(0, 10, SHORT))])
    curves, probes = store.block("curves"), store.block("probes")
    assert curves["budget"].tolist() == [budget] * 2
    assert curves["steps_budget"].tolist() == of_curves
    assert probes["steps_budget"].tolist() == of_probes


def test_a_disk_without_room_for_a_copy_leaves_file_and_journal(path: Path) -> None:
    """What was committed stays, and a later copy has it."""
    store = HDF5Store(path, overwrite=False)
    store.begin(SPEC, PROBLEMS, CONDITIONS)
    file = path.read_bytes()
    store.append([result(0)])
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(file) // 2, limit[1]))
        with pytest.raises(OSError, match="too large"):
            store._snapshot()
        assert path.read_bytes() == file
        store.append([result(1)])
        assert len(load(path).probes) == 2
        store.close()
        with pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
            HDF5Store.reopened(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    HDF5Store.reopened(path).close()
    with h5py.File(path) as held:
        assert len(held["probes/n"]) == 2
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, journal_path(path).name]


def test_the_document_lists_the_columns_of_a_file(path: Path) -> None:
    fill(HDF5Store(path, overwrite=False))
    text = (Path(__file__).parents[1] / "docs" / "hdf5.md").read_text()
    with h5py.File(path) as file:
        for group in GROUPS:
            section = re.search(rf"^### `/{group}`\n(.*?)(?=^##|\Z)", text, re.M | re.S)
            assert section is not None
            rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\S*) *\|", section[1], re.M)
            listed = {name: (kind, units) for name, kind, units in rows}
            assert len(listed) == len(rows)
            written = {
                name: (
                    "text" if h5py.check_string_dtype(data.dtype) else str(data.dtype),
                    data.attrs["units"],
                )
                for name, data in file[group].items()
            }
            assert listed == written
        section = re.search(r"^### Attributes of the root\n(.*?)(?=^##|\Z)", text, re.M | re.S)
        assert section is not None
        listed_attributes = set(re.findall(r"^\| `(\w+)` \|", section[1], re.M))
        assert set(file.attrs) - set(CONDITIONS) - {"seconds", "probes", "warnings"} == listed_attributes


def test_timing_names_are_real() -> None:
    assert set(TIMING_COLUMNS) <= {c.name for c in GROUPS["probes"]}
    assert {"started", "ended"} <= set(TIMING_ATTRIBUTES)


@pytest.mark.parametrize(("since", "title"), [(2, "version 1 lacks"), (3, "versions 1 and 2 lack")])
def test_the_document_lists_what_older_versions_lack(since: int, title: str) -> None:
    text = (Path(__file__).parents[1] / "docs" / "hdf5.md").read_text()
    table = text[text.index(f"| columns that {title}") :].split("\n\n")[0].splitlines()[2:]
    lines = [line.strip("|").split("|") for line in table]
    listed = {}
    for names, values in lines:
        columns = re.findall(r"`(\w+)`", names)
        of_each = [value.strip(" `") for value in values.split(",")]
        listed.update(zip(columns, of_each * len(columns) if len(of_each) == 1 else of_each, strict=True))
    said = {"": "empty", "False": "false", "nan": "NaN"}
    lacked = {
        c.name: str(c.default)
        for group, columns in GROUPS.items()
        for c in columns
        if c.since == since and group != "curvature" and c.default is not None
    }
    assert listed == {name: said.get(value, value) for name, value in lacked.items()}


def abandoned(path: Path, **changes: object) -> None:
    """A file of a scan that was killed: one run in its journal alone."""
    store = HDF5Store(path, overwrite=False)
    store.begin(dataclasses.replace(SPEC, **changes), PROBLEMS, CONDITIONS)
    store.append([result(0)])
    store.close()
    with h5py.File(path) as file:
        assert len(file["probes/n"]) == 0


def test_replacing_a_file_in_vain_loses_nothing_of_it(path: Path) -> None:
    abandoned(path)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(UserError, match="cannot be created"):
            HDF5Store(path, overwrite=True).begin(SPEC, PROBLEMS, CONDITIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(load(path).probes) == 1


def test_killed_while_replacing_a_file_there_is_one_of_the_two(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the new file's name and the end of the old journal, the old runs are not taken for the new file's."""
    abandoned(path, seed=1)

    def killed(self: object, of: object = None) -> None:
        raise KeyboardInterrupt

    store = HDF5Store(path, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr("fasttrain.journal.Journal.clear", killed)
        with pytest.raises(KeyboardInterrupt):
            store.begin(SPEC, PROBLEMS, CONDITIONS)
    results = load(path)
    assert results.spec == SPEC
    assert len(results.probes) == 0


def test_a_journal_is_of_its_own_file_alone(path: Path) -> None:
    """Another file gets the name of one whose journal is still there."""
    abandoned(path)
    other = path.with_name("other.h5")
    fill_one = HDF5Store(other, overwrite=False)
    fill_one.begin(dataclasses.replace(SPEC, seed=9), PROBLEMS, CONDITIONS)
    fill_one.finish("interrupted", {})
    fill_one.close()
    kept = journal_path(path).read_bytes()
    shutil.copy(other, path)
    results = load(path)
    assert results.spec.seed == 9
    assert len(results.probes) == 0
    with pytest.raises(UserError, match="is of another file; move it away"):
        HDF5Store.reopened(path)
    assert journal_path(path).read_bytes() == kept
