"""A scan that was stopped goes on to the same file; nothing that was kept is lost, and no other scan gets in."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import fasttrain
from fasttrain import ScanSpec, UserError, cli
from fasttrain import run as module
from fasttrain import store as store_module
from fasttrain.cli import main
from fasttrain.journal import journal_path
from fasttrain.schema import TIMING_ATTRIBUTES, TIMING_COLUMNS

SMALL = {
    "widths": (3, 5),
    "data": "gaussian:8",
    "classes": 2,
    "steps": 300,
    "check_every": 20,
    "max_probes": 40,
    "lr": (0.003, 0.03),
    "seed": 4,
}
"""Two races with confirmations and short probes."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "emc.h5"
    return fasttrain.scan(ScanSpec(**SMALL), out=path, save_weights=True, curvature=2)


def rows(results: fasttrain.Results) -> pd.DataFrame:
    probes = results.probes.drop(columns=[*TIMING_COLUMNS, "history_start"])
    return probes.sort_values(["variant", "n", "seed"], ignore_index=True)


def assert_same(found: fasttrain.Results, wanted: fasttrain.Results) -> None:
    """All that a file says, but for times and the order of its runs."""
    mine, theirs = rows(found), rows(wanted)
    pd.testing.assert_frame_equal(mine.drop(columns="probe"), theirs.drop(columns="probe"), check_exact=True)
    pd.testing.assert_frame_equal(found.curves, wanted.curves, check_exact=True)
    # Each of these opens both files: one of eleven.
    for a, b in list(zip(mine["probe"], theirs["probe"], strict=True))[::11]:
        pd.testing.assert_frame_equal(found.history(a), wanted.history(b), check_exact=True)
        if mine["outcome"][mine["probe"] == a].item() == "fitted" and wanted.attrs["save_weights"]:
            one, other = found.weights(a), wanted.weights(b)
            assert all(np.array_equal(one[name], other[name]) for name in other)
    assert len(found.curvature) == len(wanted.curvature)
    keys = ["variant", "n", "seed"]
    looked = [r.curvature.merge(r.probes[["probe", *keys]]).drop(columns=["probe", "row"]) for r in (found, wanted)]
    mine, theirs = (one.sort_values(keys, ignore_index=True) for one in looked)
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    kept = [{k: v for k, v in r.attrs.items() if k not in TIMING_ATTRIBUTES} for r in (found, wanted)]
    assert kept[0] == kept[1]


def stopped(path: Path, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """A scan that is stopped once so many of its runs are done."""

    def stop(progress: fasttrain.Progress) -> None:
        if progress.probes_done >= after:
            raise error

    with pytest.raises(error):
        fasttrain.scan(ScanSpec(**SMALL), out=path, save_weights=True, curvature=2, on_progress=stop)


@pytest.mark.parametrize("after", [1, 30, 120])
def test_an_interrupted_scan_goes_on_to_the_same_file(tmp_path, monkeypatch, unbroken, after):
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    path = tmp_path / "emc.h5"
    stopped(path, after)
    before = fasttrain.load(path)
    assert before.attrs["status"] == "interrupted"
    assert after <= len(before.probes) < len(unbroken.probes)
    assert not journal_path(path).exists()
    found = fasttrain.resume(path)
    assert_same(found, unbroken)
    # The rows of before stand where they stood.
    pd.testing.assert_frame_equal(found.probes[: len(before.probes)], before.probes, check_exact=True)
    assert found.probes["started"].min() >= 0
    assert (found.probes["finished"] >= found.probes["started"]).all()


def test_a_complete_file_is_left_as_it_is(unbroken, capsys):
    before = unbroken.path.read_bytes()
    assert main(["resume", str(unbroken.path)]) == 0
    assert "is complete; nothing was changed" in capsys.readouterr().out
    assert unbroken.path.read_bytes() == before
    assert not journal_path(unbroken.path).exists()


@pytest.mark.parametrize("moment", ["before the last snapshot", "before the journal goes"])
def test_killed_in_the_last_moment(tmp_path, monkeypatch, unbroken, moment):
    """All is committed, the file may lack some of it, and a journal stands beside it: resume tidies up."""
    path = tmp_path / "emc.h5"

    class Killed(BaseException):
        pass

    def kill(self):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_SNAPSHOT_SECONDS", 1e9)
        if moment == "before the last snapshot":
            patch.setattr(store_module.HDF5Store, "_snapshot", kill)
        else:
            patch.setattr("fasttrain.journal.Journal.remove", kill)
        with pytest.raises(Killed):
            fasttrain.scan(ScanSpec(**SMALL), out=path, save_weights=True, curvature=2)
    assert journal_path(path).exists()
    assert fasttrain.load(path).attrs["status"] == "complete"
    assert_same(fasttrain.resume(path), unbroken)
    assert [each.name for each in tmp_path.iterdir()] == ["emc.h5"]
    with h5py.File(path) as file:
        assert file.attrs["status"] == "complete"
        assert len(file["probes/n"]) == len(unbroken.probes)


def test_stopping_again_and_again_is_no_different(tmp_path, monkeypatch, unbroken):
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    path = tmp_path / "emc.h5"
    stopped(path, 10)
    for after in (40, 90, 10**6):

        def stop(progress, after=after):
            if progress.probes_done >= after:
                raise KeyboardInterrupt

        try:
            found = fasttrain.resume(path, on_progress=stop)
        except KeyboardInterrupt:
            continue
    assert_same(found, unbroken)


def test_what_would_not_go_on_the_same_way_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    path = tmp_path / "emc.h5"
    stopped(path, 5)
    before = path.read_bytes()
    other = ScanSpec(**{**SMALL, "steps": 400, "seeds": 3})
    with pytest.raises(UserError, match=r"steps=400 \(file: 300\), seeds=3 \(file: 16\)"):
        fasttrain.resume(path, spec=other)
    conditions = {"generator_digest": "random numbers", "data_sha256": "data", "variant_backends": "backends"}
    for name, what in conditions.items():
        with h5py.File(path, "r+") as file:
            kept = file.attrs[name]
            file.attrs[name] = "other"
        with pytest.raises(UserError, match=f"was made with other {what}"):
            fasttrain.resume(path)
        path.write_bytes(before)
        assert kept != "other"
    assert path.read_bytes() == before
    assert not journal_path(path).exists()
    with h5py.File(path, "r+") as file:
        file.attrs["torch_version"] = "1.0"
    with pytest.warns(UserWarning, match=r"last bits .* torch_version was 1\.0"):
        fasttrain.resume(path)


def test_the_time_limit_ends_a_scan_that_goes_on_later(tmp_path, unbroken, capsys):
    path = tmp_path / "emc.h5"
    options = ["--save-weights", "--curvature", "2", "--out", str(path)]
    for name, value in SMALL.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        options += [f"--{name.replace('_', '-')}", text]
    assert main(["scan", *options, "--time-limit", "0.3s"]) == 75
    assert f"The time limit came first: fasttrain resume {path} goes on." in capsys.readouterr().err
    held = fasttrain.load(path)
    assert held.attrs["status"] == "interrupted"
    assert main(["resume", str(path), "--time-limit", "1d"]) == 0
    assert_same(fasttrain.load(path), unbroken)


@pytest.mark.parametrize("text", ["0", "-1s", "soon", "1w", "", "nan", "inf"])
def test_a_time_limit_that_is_none(tmp_path, capsys, text):
    assert main(["scan", "--widths", "4", "--time-limit", text, "--out", str(tmp_path / "emc.h5")]) == 2
    assert "--time-limit" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


ENDLESS = ["--widths", "8,12", "--tolerance", "0.0001", "--seeds", "1000", "--max-probes", "100000", "--no-elasticity"]


@pytest.mark.alone
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_within_two_seconds_and_say_how_to_go_on(tmp_path, number, status):
    path = tmp_path / "emc.h5"
    script = str(Path(sys.executable).parent / "fasttrain")
    command = [script, "scan", *ENDLESS, "--out", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(2.0)
        process.send_signal(number)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=30)
    assert time.monotonic() - begin < 2.0
    assert process.returncode == status
    assert f"fasttrain resume {path} goes on" in errors
    assert fasttrain.load(path).attrs["status"] == "interrupted"


@pytest.mark.alone
def test_sigkill_loses_nothing_that_was_said_to_be_kept(tmp_path, monkeypatch):
    """And the file opens beside the writer all the time, for whoever reads it."""
    path = tmp_path / "emc.h5"
    script = "from fasttrain import cli, store; store._SNAPSHOT_SECONDS = 0.2; cli.main()"
    command = [sys.executable, "-c", script, "scan", *ENDLESS, "--out", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said, seen, deadline = 0, 0, time.monotonic() + 60
        while said < 40 and time.monotonic() < deadline:
            line = process.stderr.readline()
            if match := re.search(r"(\d+) kept", line):
                said = int(match[1])
            if path.exists():
                with h5py.File(path) as file:
                    held = len(file["probes/n"])
                results = fasttrain.load(path)
                assert len(results.probes) >= max(said, seen, held)
                seen = len(results.probes)
                with pytest.raises(UserError, match=f"process {process.pid} on .* writes it"):
                    fasttrain.resume(path)
        process.kill()
    assert said >= 40
    results = fasttrain.load(path)
    assert len(results.probes) >= said
    assert results.attrs["status"] == "running"
    assert journal_path(path).exists()


def test_a_file_killed_between_two_snapshots_is_file_and_journal(tmp_path, monkeypatch, unbroken):
    """A store that nobody closes is what a kill leaves: with the first snapshot only, or with some later one."""
    for seconds in (1e9, 0.05):
        path = tmp_path / f"{seconds}.h5"
        copy = tmp_path / f"copy{seconds}.h5"

        def kill(progress, path=path, copy=copy):
            if progress.probes_committed >= 25 and not copy.exists():
                shutil.copy(path, copy)
                shutil.copy(journal_path(path), journal_path(copy))
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store_module, "_SNAPSHOT_SECONDS", seconds)
            patch.setattr(store_module, "_SNAPSHOT_SHARE", 1.0)
            patch.setattr(module, "_REPORT_SECONDS", 0.0)
            patch.setattr(module, "_COMMIT_SECONDS", 0.0)
            with pytest.raises(KeyboardInterrupt):
                fasttrain.scan(ScanSpec(**SMALL), out=path, save_weights=True, curvature=2, on_progress=kill)
        held = fasttrain.load(copy)
        assert held.attrs["status"] == "running"
        assert len(held.probes) >= 25
        with h5py.File(copy) as file:
            assert (len(file["probes/n"]) == 0) == (seconds > 1)
        pd.testing.assert_frame_equal(held.history(24), fasttrain.load(path).history(24), check_exact=True)
        assert_same(fasttrain.resume(copy), unbroken)
        assert not journal_path(copy).exists()


def test_follow_shows_a_file_grow_and_ends_with_its_scan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(cli, "FOLLOW_SECONDS", 0.01)
    path = tmp_path / "emc.h5"
    looks = []

    def look(progress):
        # The scan is this process too, and goes on between two looks.
        if progress.probes_committed and not progress.finished and len(looks) < 3:
            looks.append(len(fasttrain.load(path).probes))
            assert fasttrain.load(path).written

    fasttrain.scan(ScanSpec(**{**SMALL, "lr": (0.03,), "max_probes": 8}), out=path, on_progress=look)
    assert looks
    assert looks[0] >= 1
    assert not fasttrain.load(path).written
    states = iter([True, True, False])
    load = fasttrain.load

    def loaded(name):
        results = load(name)
        results.written = next(states)
        return results

    monkeypatch.setattr(fasttrain, "load", loaded, raising=False)
    assert main(["show", str(path), "--follow"]) == 0
    out = capsys.readouterr().out
    assert out.count("runs kept") == 1  # said once, since nothing was added
    assert "EMC50" in out
    assert main(["show", str(path), "--follow", "--estimator", "emc50"]) == 2
    assert "--follow" in capsys.readouterr().err


def test_an_error_on_the_way_releases_the_file(tmp_path, monkeypatch, unbroken):
    path = tmp_path / "emc.h5"
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    stopped(path, 30)
    before = fasttrain.load(path)

    def broken(*_):
        raise RuntimeError("no search")

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_search", broken)
        with pytest.raises(RuntimeError, match="no search"):
            fasttrain.resume(path)
    pd.testing.assert_frame_equal(fasttrain.load(path).probes, before.probes, check_exact=True)
    assert_same(fasttrain.resume(path), unbroken)


def test_the_time_limit_holds_while_curvature_is_measured(tmp_path, monkeypatch, unbroken):
    path = tmp_path / "emc.h5"
    fasttrain.scan(ScanSpec(**SMALL), out=path, save_weights=True)
    # As if it had been asked for curvature, and killed before that.
    with h5py.File(path, "r+") as file:
        file.attrs["curvature_runs"], file.attrs["status"] = 2, "interrupted"
    original = module._Scan._between_products

    def slow(self):
        time.sleep(0.3)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(module._Scan, "_between_products", slow)
        assert fasttrain.resume(path, time_limit=0.5).attrs["status"] == "interrupted"
    assert_same(fasttrain.resume(path), unbroken)


def test_two_verdicts_on_one_run_are_one_line(tmp_path, monkeypatch):
    path = tmp_path / "emc.h5"
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    stopped(path, 30)
    with h5py.File(path, "r+") as file:
        outcome = file["probes/outcome"].asstr()[:]
        fitted, failed = (int(np.flatnonzero(outcome == which)[0]) for which in ("fitted", "out_of_budget"))
        for column in ("variant", "n", "seed"):
            file[f"probes/{column}"][failed] = file[f"probes/{column}"][fitted]
    before = path.read_bytes()
    assert main(["resume", str(path), "--quiet"]) == 2
    assert main(["extend", str(path), "--seeds", "20", "--quiet"]) == 2
    assert fasttrain.load(path).attrs["status"] == "interrupted"
    assert len(path.read_bytes()) == len(before)
    assert [each.name for each in tmp_path.iterdir()] == ["emc.h5"]
