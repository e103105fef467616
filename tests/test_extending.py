"""A scan that is asked for more: every run of before is used, and what follows depends on what was asked alone."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from test_search import VARIANT, result, world

import fasttrain
import fasttrain.extending
from fasttrain import ScanSpec, UserError
from fasttrain import run as module
from fasttrain.cli import main
from fasttrain.prepare import limits_of, make_search
from fasttrain.records import Problem
from fasttrain.schema import TIMING_ATTRIBUTES, TIMING_COLUMNS
from fasttrain.search import Search, Stage, next_round

SMALL = {"data": "gaussian:8", "classes": 2, "steps": 300, "check_every": 20, "seed": 4}
FIRST = ScanSpec(**SMALL, widths=(3, 5), tolerance=0.3)
MORE = {"widths": "2,3,5", "tolerance": 0.15}
KEYS = ["variant", "n", "seed"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "emc.h5"
    fasttrain.scan(FIRST, out=path, save_weights=True, curvature=1)
    return path


@pytest.fixture
def copy(tmp_path, first):
    return shutil.copy(first, tmp_path / "emc.h5")


@pytest.fixture(scope="module")
def extended(tmp_path_factory, first):
    return fasttrain.extend(first, MORE, out=tmp_path_factory.mktemp("extended") / "emc.h5")


def rows(results, drop=()):
    probes = results.probes.drop(columns=[*TIMING_COLUMNS, "history_start", "probe", *drop])
    return probes.sort_values(KEYS, ignore_index=True)


def assert_same(found, wanted):
    pd.testing.assert_frame_equal(rows(found), rows(wanted), check_exact=True)
    pd.testing.assert_frame_equal(found.curves, wanted.curves, check_exact=True)
    kept = [{k: v for k, v in r.attrs.items() if k not in TIMING_ATTRIBUTES} for r in (found, wanted)]
    assert kept[0] == kept[1]
    assert found.spec == wanted.spec
    assert found.earlier == wanted.earlier


def test_every_run_of_before_is_used(first, extended):
    before = fasttrain.load(first)
    assert extended.attrs["status"] == "complete"
    assert extended.spec.widths == (2, 3, 5)
    assert extended.earlier == (FIRST,)
    # They stand where they stood, under the number that their variant has now.
    kept = extended.probes[: len(before.probes)]
    pd.testing.assert_series_equal(kept["variant"], before.probes["variant"] + 1)
    pd.testing.assert_frame_equal(kept.drop(columns="variant"), before.probes.drop(columns="variant"), check_exact=True)
    for probe in (0, len(before.probes) - 1):
        pd.testing.assert_frame_equal(extended.history(probe), before.history(probe), check_exact=True)
    fitted = int(before.probes[before.probes["outcome"] == "fitted"]["probe"].iloc[0])
    assert all(np.array_equal(extended.weights(fitted)[k], v) for k, v in before.weights(fitted).items())
    # None was made twice, and all have their part in the estimate.
    assert not extended.probes.duplicated(KEYS).any()
    full = extended.probes[extended.probes["seed"] < 2**20]
    assert (full.groupby("variant").size().to_numpy() >= extended.curves["n_probes"]).all()
    own = before.curves
    now = extended.curves[1:].reset_index(drop=True)
    assert (now["n_probes"] > own["n_probes"]).all()
    half = (now["emc50_high"] - now["emc50_low"]) / (2 * now["emc50"])
    spent = now["budget_spent"].astype(bool)
    assert ((half <= 0.15) | spent).all()
    assert not spent.all()
    assert ((own["emc50_high"] - own["emc50_low"]) / (2 * own["emc50"]) > 0.15).any()
    assert len(extended.curvature) == 3


def test_a_new_variant_is_that_of_a_scan_of_its_own(extended):
    alone = fasttrain.scan(ScanSpec(**SMALL, widths=(2,), tolerance=0.15))
    mine = rows(extended)
    pd.testing.assert_frame_equal(mine[mine["variant"] == 0], rows(alone), check_exact=True)
    pd.testing.assert_frame_equal(extended.curves[:1], alone.curves, check_exact=True)


def test_a_scan_that_was_stopped_is_extended_to_the_same(tmp_path, monkeypatch, extended):
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    path = tmp_path / "emc.h5"

    def stop(progress):
        if progress.probes_done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fasttrain.scan(FIRST, out=path, save_weights=True, curvature=1, on_progress=stop)
    stopped = len(fasttrain.load(path).probes)
    assert stopped < len(extended.probes) // 2

    # And the extension is stopped in turn.
    def later(progress):
        if progress.probes_done >= 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fasttrain.extend(path, MORE, on_progress=later)
    between = fasttrain.load(path)
    assert between.attrs["status"] == "interrupted"
    assert stopped < len(between.probes) < len(extended.probes)
    assert_same(fasttrain.resume(path), extended)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["emc.h5"]


def test_extending_again_and_again(copy, monkeypatch):
    step = fasttrain.extend(copy, {"widths": (3, 5, 7)})
    assert step.earlier == (FIRST,)
    last = fasttrain.extend(copy, {"seeds": 20, "tolerance": 0.2})
    assert [spec.widths for spec in last.earlier] == [(3, 5), (3, 5, 7)]
    assert [spec.seeds for spec in last.earlier] == [16, 16]
    assert last.attrs["status"] == "complete"
    before = copy.read_bytes()
    assert main(["resume", str(copy)]) == 0
    assert copy.read_bytes() == before
    # What a search of all three stages asks for is what is there.
    prepared = fasttrain.prepare.prepare(last.spec)
    search = make_search(last.spec, prepared.problems, last.earlier)
    search.tell(fasttrain.prepare.stored_results(last))
    assert search.done
    assert not search.ask()


def test_a_race_stays_decided_and_its_winner_goes_on(tmp_path):
    spec = ScanSpec(**SMALL, widths=(3,), lr=(0.003, 0.03), tolerance=0.3)
    path = tmp_path / "emc.h5"
    before = fasttrain.scan(spec, out=path)
    after = fasttrain.extend(path, {"tolerance": 0.15, "widths": "3,4"})
    held = after.curves[after.curves["width"] == 3]
    assert held["race"].tolist() == before.curves["race"].tolist()
    for column in (name for name in held if name.startswith("race_")):
        assert held[column].tolist() == before.curves[column].tolist()
    grown = after.probes[after.probes["variant"].isin(held["variant"])]
    new = grown.iloc[len(before.probes) :]
    won = held[held["race"] == "won"]["variant"].item()
    assert set(new["variant"]) == {won}
    assert len(new) > 0
    with pytest.raises(UserError, match=r"lr=0\.003,0\.03,0\.1: would change a race that has begun"):
        fasttrain.extend(path, {"lr": "0.003,0.03,0.1"})


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        ({"search": "grid", "n": (10, 20), "seeds": 3}, {"n": (10, 15, 20), "seeds": 5}),
        ({"search": "paper", "seeds": 3, "growth": 1.3}, {"seeds": 5}),
        ({"search": "paper", "seeds": 4, "growth": 1.3, "max_probes": 9}, {"max_probes": 60}),
        ({"search": "paper", "seeds": 3, "growth": 1.3, "n_min": 3, "n_max": 12}, {"n_max": 60}),
    ],
)
def test_ladders_and_grids_come_to_what_they_would_have_been(tmp_path, asked, more):
    spec = ScanSpec(**SMALL, widths=(3,), **asked)
    path = tmp_path / "emc.h5"
    before = fasttrain.scan(spec, out=path)
    found = fasttrain.extend(path, more)
    whole = fasttrain.scan(ScanSpec(**SMALL, widths=(3,), **{**asked, **more}))
    assert len(before.probes) < len(found.probes)
    if "n_max" in more:  # the last rung of before is one more
        assert set(map(tuple, before.probes[KEYS].to_numpy())) < set(map(tuple, found.probes[KEYS].to_numpy()))
        ends = [r.probes.groupby("seed")["outcome"].last() for r in (found, whole)]
        assert (ends[0] != "fitted").all()
        return
    pd.testing.assert_frame_equal(rows(found, ["round"]), rows(whole, ["round"]), check_exact=True)
    pd.testing.assert_frame_equal(found.curves, whole.curves, check_exact=True)


def test_the_range_of_n_may_grow(tmp_path):
    path = tmp_path / "emc.h5"
    before = fasttrain.scan(ScanSpec(**SMALL, widths=(5,), n_max=10, tolerance=0.3), out=path)
    assert before.curves["censored"].item() == "above"
    after = fasttrain.extend(path, {"n_max": 200})
    assert after.curves["censored"].item() == "no"
    assert after.curves["n_max"].item() == 200
    assert after.probes["n"].max() > 10
    assert set(map(tuple, before.probes[KEYS].to_numpy())) < set(map(tuple, after.probes[KEYS].to_numpy()))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, "has all of that already"),
        ({"widths": "3,5"}, "has all of that already"),
        ({"widths": "3,4"}, "widths=3,4: expected all values of before, 3,5, and more"),
        ({"steps": 500}, "steps=500: cannot be extended"),
        ({"tolerance": 0.5}, "tolerance=0.5: expected less than before, 0.3"),
        ({"seeds": 4}, "seeds=4: expected more than before, 16"),
        ({"n_max": 10}, "n_max=10: expected at least that of before, 140"),
        ({"n_min": 4}, "n_min=4: expected at most that of before, 2"),
        ({"classes": 3}, "classes=3: expected all values of before, 2, and more"),
        ({"lr": "0.01,0.03"}, "would change a race"),
        ({"seed": 5}, "seed=5: cannot be extended"),
        ({"tolerance": "wide"}, "tolerance=wide: expected a number"),
    ],
)
def test_what_is_not_more_is_refused(copy, changes, what):
    before = copy.read_bytes()
    with pytest.raises(UserError, match=what):
        fasttrain.extend(copy, changes)
    assert copy.read_bytes() == before
    assert [p.name for p in copy.parent.iterdir()] == ["emc.h5"]


def test_a_scan_under_way_is_not_extended(copy):
    holder = fasttrain.store.HDF5Store.reopened(copy)
    try:
        with pytest.raises(UserError, match="writes it"):
            fasttrain.extend(copy, MORE)
    finally:
        holder.leave()


def test_an_error_leaves_the_file_as_it_is(copy, monkeypatch):
    def full(self, results):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fasttrain.store.HDF5Store, "append", full)
    before = fasttrain.load(copy)
    with pytest.raises(OSError, match="No space"):
        fasttrain.extend(copy, MORE)
    pd.testing.assert_frame_equal(fasttrain.load(copy).probes, before.probes, check_exact=True)
    assert fasttrain.load(copy).spec == FIRST


def test_other_conditions_are_refused(copy, monkeypatch):
    monkeypatch.setattr("fasttrain.machine.VERSION", "another")
    with pytest.raises(UserError, match="was made with other random numbers"):
        fasttrain.extend(copy, MORE)


def test_from_the_command_line(copy, capsys):
    other = copy.parent / "other.h5"
    before = copy.read_bytes()
    assert main(["extend", str(copy), "--widths", "3,5,6", "--out", str(other), "--quiet"]) == 0
    assert copy.read_bytes() == before
    assert fasttrain.load(other).curves["width"].tolist() == [3, 5, 6]
    assert str(other) in capsys.readouterr().out
    assert main(["extend", str(copy), "--tolerance", "0.9"]) == 2
    assert capsys.readouterr().err.strip() == "fasttrain: --tolerance 0.9: expected less than before, 0.3"
    assert main(["extend", str(copy)]) == 2
    assert "has all of that already" in capsys.readouterr().err
    assert main(["extend", str(copy), "--widths", "3,5,6", "--out", str(copy)]) == 2
    assert main(["extend", str(copy), "--widths", "3,5,6", "--out", str(other)]) == 2
    assert "exists" in capsys.readouterr().err


def test_stages_made_up_by_a_file_are_no_traceback(copy):
    import h5py

    for text in ("{", "[1]", '[{"widths": [9]}]', '[{"nonsense": 1}]', json.dumps([{"seeds": 10**6}] * 3)):
        with h5py.File(copy, "r+") as file:
            file.attrs["extended_from"] = text
            file.attrs["status"] = "interrupted"
        assert main(["resume", str(copy), "--quiet"]) in (0, 2)


def test_the_search_goes_on_from_its_rounds():
    """Of one variant: the rounds under the wider tolerance come first, whole, and stay."""
    problem = Problem(0, VARIANT, 100, 2, 400)
    spec = ScanSpec(tolerance=0.3)
    early = Search([problem], **_limits(spec))
    rounds = _played(early)
    late = Search([problem], **_limits(ScanSpec(tolerance=0.1)), earlier=[Stage({0: problem}, limits_of(spec))])
    found = _played(late)
    assert found[: len(rounds)] == rounds
    assert len(found) > len(rounds)
    verdicts = [{probe: world(50.0)(probe) for probe in one} for one in found[: len(rounds)]]
    assert next_round(problem, verdicts, limits_of(ScanSpec(tolerance=0.1)))[1] == found[len(rounds)]
    assert late.estimates()[0].finished


def _limits(spec):
    return {name: getattr(spec, name) for name in ("seeds", "interval", "tolerance", "max_probes")}


def _played(search):
    rounds = []
    while not search.done:
        rounds.append(tuple(search.ask()))
        search.tell([result(probe, world(50.0)(probe)) for probe in rounds[-1]])
    return rounds


def test_a_file_that_another_extends_meanwhile_is_left_as_that_made_it(copy, monkeypatch):
    original = fasttrain.extending.prepare
    done = []

    def slow(spec):
        if not done:
            done.append(1)
            fasttrain.extend(copy, {"seeds": 20})
        return original(spec)

    monkeypatch.setattr(fasttrain.extending, "prepare", slow)
    with pytest.raises(UserError, match="has been changed meanwhile; try again"):
        fasttrain.extend(copy, MORE)
    assert fasttrain.load(copy).spec.seeds == 20
    assert [p.name for p in copy.parent.iterdir()] == ["emc.h5"]
    assert fasttrain.extend(copy, MORE).spec.widths == (2, 3, 5)
