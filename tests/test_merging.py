"""Files of one spec as one file, and what cannot be joined."""

import h5py
import pandas as pd
import pytest

import fasttrain
from fasttrain import ScanSpec, UserError
from fasttrain import run as module
from fasttrain.cli import main
from fasttrain.schema import TIMING_COLUMNS
from fasttrain.trainer import Trainer

SPEC = ScanSpec(widths=(3, 5), data="gaussian:8", classes=2, steps=300, check_every=20, max_probes=24, seed=4)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The files of two scans of a spec that were stopped; the second took its runs in another order."""
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    paths = []
    submit = Trainer.submit
    for after in (5, 5):
        if paths:
            monkeypatch.setattr(Trainer, "submit", lambda self, probes: submit(self, list(reversed(probes))))
        paths.append(tmp_path / f"{len(paths)}.h5")

        def stop(progress, after=after):
            if progress.probes_done >= after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fasttrain.scan(SPEC, out=paths[-1], save_weights=True, on_progress=stop)
    monkeypatch.setattr(Trainer, "submit", submit)
    return paths


def rows(results):
    probes = results.probes.drop(columns=[*TIMING_COLUMNS, "history_start", "probe"])
    return probes.sort_values(["variant", "n", "seed"], ignore_index=True)


def test_all_runs_are_there_once_and_the_scan_goes_on(tmp_path, parts):
    unbroken = fasttrain.scan(SPEC, out=tmp_path / "unbroken.h5", save_weights=True)
    first, second = (fasttrain.load(path) for path in parts)
    out = tmp_path / "all.h5"
    assert main(["merge", *map(str, parts), "--out", str(out)]) == 0
    found = fasttrain.load(out)
    one, other = ({tuple(row) for row in r.probes[["variant", "n", "seed"]].to_numpy()} for r in (first, second))
    wanted = one | other
    assert one - other
    assert one & other
    assert sorted(map(tuple, found.probes[["variant", "n", "seed"]].to_numpy())) == sorted(wanted)
    assert found.attrs["status"] == "interrupted"
    assert found.attrs["model_steps"] == found.probes["steps"].sum()
    last = fasttrain.resume(out)
    pd.testing.assert_frame_equal(rows(last), rows(unbroken), check_exact=True)
    pd.testing.assert_frame_equal(last.curves, unbroken.curves, check_exact=True)
    fitted = last.probes[last.probes["outcome"] == "fitted"]
    for row in fitted.itertuples():
        twin = unbroken.probes.query(f"variant == {row.variant} and n == {row.n} and seed == {row.seed}").probe.item()
        pd.testing.assert_frame_equal(last.history(row.probe), unbroken.history(twin), check_exact=True)
        assert all((last.weights(row.probe)[k] == v).all() for k, v in unbroken.weights(twin).items())


def test_what_cannot_be_joined_is_named_and_nothing_is_written(tmp_path, parts):
    out = tmp_path / "all.h5"
    other = tmp_path / "other.h5"
    fasttrain.scan(ScanSpec(**{**vars_of(SPEC), "steps": 200}), out=other)
    for files, what in (
        ([parts[0]], "two files or more"),
        ([parts[0], other], "has another spec than"),
        ([parts[0], tmp_path / "none.h5"], "no such file"),
        ([parts[0], out], "is one of the files"),
    ):
        with pytest.raises(UserError, match=what):
            fasttrain.merge(files, out)
    first, second = (fasttrain.load(path).probes[["variant", "n", "seed"]].apply(tuple, axis=1) for path in parts)
    with h5py.File(parts[1], "r+") as file:
        file["probes/steps"][int(second.isin(set(first)).argmax())] += 1
    with pytest.raises(UserError, match=r"ended otherwise in .*: steps\)"):
        fasttrain.merge(parts, out)
    assert not out.exists()


def vars_of(spec: ScanSpec) -> dict:
    return {name: getattr(spec, name) for name in ("widths", "data", "classes", "check_every", "max_probes", "seed")}
