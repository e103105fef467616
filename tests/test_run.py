"""Whole scans through the public interface."""

import contextlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import chi2, norm

import fasttrain
import fasttrain.plan
import fasttrain.trainer
from fasttrain.cli import main
from fasttrain.data import task
from fasttrain.schema import TIMING_ATTRIBUTES, TIMING_COLUMNS
from fasttrain.signals import Interrupts
from fasttrain.spec import SHORT

SMALL = {
    "widths": (3, 6),
    "steps": 400,
    "check_every": 50,
    "max_probes": 14,
    "data": "gaussian:8",
    "classes": 3,
    "elasticity": False,
}


def same(a: fasttrain.Results, b: fasttrain.Results) -> None:
    """Asserts that two results are equal but for times and for where they were computed."""
    timeless = [column for column in a.curves.columns if column not in TIMING_COLUMNS]
    pd.testing.assert_frame_equal(a.curves[timeless], b.curves[timeless], check_exact=True)
    # Rows come in the order in which the runs finished, which timing decides.
    drop = ["probe", "history_start", *(column for column in a.probes.columns if column in TIMING_COLUMNS)]
    first, second = (r.probes.sort_values(["variant", "n", "seed"]) for r in (a, b))
    pd.testing.assert_frame_equal(
        first.drop(columns=drop).reset_index(drop=True),
        second.drop(columns=drop).reset_index(drop=True),
        check_exact=True,
    )
    for x, y in zip(first.index, second.index, strict=True):
        pd.testing.assert_frame_equal(a.history(x), b.history(y), check_exact=True)
    assert {k: v for k, v in a.attrs.items() if k not in TIMING_ATTRIBUTES} == {
        k: v for k, v in b.attrs.items() if k not in TIMING_ATTRIBUTES
    }


def test_the_same_scan_twice_gives_the_same_file_but_for_times(tmp_path):
    spec = fasttrain.ScanSpec(**SMALL)
    first = fasttrain.scan(spec, out=tmp_path / "a.h5")
    second = fasttrain.scan(spec, out=tmp_path / "b.h5")
    same(first, second)
    same(first, fasttrain.scan(spec))  # in memory
    assert first.spec == spec
    assert first.attrs["status"] == "complete"
    assert first.attrs["bitwise_independent"] == 1
    assert 0.0 < first.attrs["occupancy"] <= 1.0
    assert (first.probes.groupby("variant").size() == first.curves.n_probes).all()
    other = fasttrain.scan(fasttrain.ScanSpec(**SMALL, seed=1))
    assert not np.array_equal(other.probes.train_loss, first.probes.train_loss)


def test_the_document_names_attributes_that_a_scan_writes(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "hdf5.md").read_text(encoding="utf-8")
    section = re.search(r"^### Conditions and summary\n(.*?)(?=^##)", text, re.M | re.S)
    cells = re.findall(r"^\| ([^|]*) \| [^|]* \| [^|]* \|$", section[1], re.M)
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    results = fasttrain.scan(fasttrain.ScanSpec(**SMALL), out=tmp_path / "a.h5")
    assert {"launches", "check_seconds", "variant_configurations", "search_seconds"} <= names
    assert names - {"extended_from"} <= set(results.attrs)
    assert set(TIMING_ATTRIBUTES) - {"started", "ended"} <= names


def test_the_number_of_slots_changes_no_result(monkeypatch):
    spec = fasttrain.ScanSpec(**SMALL, lr=(0.01, 0.03))
    whole = fasttrain.scan(spec)
    monkeypatch.setitem(fasttrain.plan._MOST_SLOTS, "cpu", 3)
    monkeypatch.setattr(fasttrain.plan, "_SLOTS_OF_WORKER", 1)
    monkeypatch.setattr("fasttrain.prepare.cores", lambda: 2)
    few = fasttrain.scan(spec)
    key = ["variant", "n", "seed"]
    timeless = [c for c in whole.probes.columns if c not in (*TIMING_COLUMNS, "probe", "history_start")]
    a, b = (r.probes[timeless].sort_values(key, ignore_index=True) for r in (whole, few))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    pd.testing.assert_frame_equal(whole.curves, few.curves, check_exact=True)


def test_outcomes_and_progress_are_consistent():
    seen = []
    results = fasttrain.scan(fasttrain.ScanSpec(**SMALL), on_progress=seen.append)
    probes = results.probes
    fitted = probes.outcome == "fitted"
    assert fitted.any()
    assert not fitted.all()
    assert (probes.train_error[fitted] == 0).all()
    assert (probes.fit_step[fitted] == probes.steps[fitted]).all()
    assert (probes.train_error[~fitted] > 0).all()
    assert (probes.fit_step[~fitted] == -1).all()
    assert (probes.steps[probes.outcome == "out_of_budget"] == 400).all()
    last = seen[-1]
    assert last.finished
    assert last.probes_done == len(probes)
    assert last.variants_done == 2
    assert last.model_steps == probes.steps.sum() == results.attrs["model_steps"]
    for index, estimate in enumerate(last.estimates):
        np.testing.assert_equal(results.curves.emc50[index], estimate.emc50)


def test_a_custom_cadence_and_precision_reach_the_runs():
    spec = fasttrain.ScanSpec(**{**SMALL, "steps": 130, "precision": "float64", "backend": "loop", "max_probes": 4})
    results = fasttrain.scan(spec)
    assert results.attrs["precision"] == "float64"
    assert results.attrs["backend"] == "loop"
    ends = set(results.probes.steps[results.probes.outcome == "out_of_budget"])
    assert ends <= {130}
    assert set(results.probes.steps) <= {50, 100, 130}


def test_a_budget_in_epochs_is_each_runs_own():
    fields = {**SMALL, "batch_size": 8, "max_probes": 10, "budget": "30epochs"}
    del fields["steps"]
    spec = fasttrain.ScanSpec(**fields)
    results = fasttrain.scan(spec)
    probes = results.probes
    most = np.ceil(30 * probes.n / 8)
    assert (probes.steps_budget == most).all()
    spent = probes.outcome == "out_of_budget"
    assert spent.any()
    assert (probes.steps[spent] == most[spent]).all()
    assert (probes.steps <= most).all()
    assert (results.curves.budget == "30epochs").all()
    assert (results.curves.steps_budget == 0).all()
    largest = [math.ceil(30 * 4 * params / 8) for params in results.curves.params]  # n-max is 4 times the parameters
    preview = fasttrain.preview(spec)
    assert preview.model_steps_most == 10 * sum(largest)
    assert 0 < preview.seconds_likely < preview.seconds_most


def test_short_runs_take_a_third_of_the_budget_and_measure_emc50_there():
    spec = fasttrain.ScanSpec(**{**SMALL, "elasticity": True, "check_every": 10})
    results = fasttrain.scan(spec)
    probes, curves = results.probes, results.curves
    short = probes.seed >= SHORT
    assert short.any()
    assert set(probes.steps_budget[short]) == {133}
    assert set(probes.steps_budget[~short]) == {400}
    assert (probes.steps <= probes.steps_budget).all()
    assert (curves.n_probes == (~short).groupby(probes.variant).sum()).all()
    assert (curves.n_probes_third == probes.groupby("variant").size()).all()
    # The estimates at the full budget are those of a scan without short runs.
    full = fasttrain.scan(replace(spec, elasticity=False)).curves
    same = ["emc50", "emc50_low", "emc50_high", "slope", "lapse", "n_probes", "budget_spent", "misfit_p"]
    pd.testing.assert_frame_equal(curves[same], full[same], check_exact=True)
    assert full.emc50_third.isna().all()
    assert not full.budget_limited.any()
    # From the runs alone, to the last bit.
    again = fasttrain.estimates(results, budget="133steps")
    assert again.estimate.tolist() == curves.emc50_third.tolist()
    assert again.low.tolist() == curves.emc50_third_low.tolist()
    assert again.high.tolist() == curves.emc50_third_high.tolist()
    assert again.n_probes.tolist() == curves.n_probes_third.tolist()
    rise = np.log(curves.emc50 / curves.emc50_third) / math.log(3)
    assert ((curves.elasticity_low < rise) & (rise < curves.elasticity_high)).all()
    assert (curves.budget_limited == (curves.elasticity > math.log(1.1) / math.log(10))).all()


def test_the_command_line_shows_emc50_at_a_smaller_budget(tmp_path, capsys):
    spec = fasttrain.ScanSpec(**{**SMALL, "elasticity": True, "check_every": 10})
    results = fasttrain.scan(spec, out=tmp_path / "emc.h5")
    assert main(["show", str(tmp_path / "emc.h5"), "--budget", "133steps"]) == 0
    shown = capsys.readouterr().out
    assert "budget of 133steps" in shown
    assert "elasticity" not in shown
    for emc in results.curves.emc50_third.dropna():
        assert f" {emc:.{0 if emc > 99.95 else 1 if emc > 9.995 else 2}f} " in shown
    assert main(["show", str(tmp_path / "emc.h5"), "--budget", "401steps"]) == 2
    assert capsys.readouterr().err == "fasttrain: --budget 401steps: is more than that of the scan, 400steps\n"


def test_full_runs_that_are_checked_too_seldom_say_nothing_of_a_third():
    results = fasttrain.scan(fasttrain.ScanSpec(**{**SMALL, "elasticity": True}))  # every 50 of 400 steps
    short = (results.probes.seed >= SHORT).groupby(results.probes.variant).sum()
    assert results.curves.n_probes_third.tolist() == short.tolist()
    again = fasttrain.estimates(results, budget="133steps")
    assert again.estimate.tolist() == results.curves.emc50_third.tolist()
    assert "checked every 50 steps" in again.warnings[0]


def test_a_third_of_a_budget_in_epochs_is_that_of_the_short_runs():
    fields = {**SMALL, "elasticity": True, "batch_size": 7, "budget": "180epochs"}
    del fields["steps"]
    results = fasttrain.scan(fasttrain.ScanSpec(**fields))
    again = fasttrain.estimates(results, budget="60epochs")
    assert again.n_probes.tolist() == results.curves.n_probes_third.tolist()
    assert results.curves.emc50_third.notna().any()
    for found, stored in (("estimate", "emc50_third"), ("low", "emc50_third_low"), ("high", "emc50_third_high")):
        np.testing.assert_array_equal(again[found], results.curves[stored])


def test_at_a_falling_learning_rate_runs_of_the_full_budget_say_nothing_of_a_third():
    spec = fasttrain.ScanSpec(**{**SMALL, "elasticity": True, "schedule": "cosine", "backend": "stacked"})
    results = fasttrain.scan(spec)
    short = (results.probes.seed >= SHORT).groupby(results.probes.variant).sum()
    assert results.curves.n_probes_third.tolist() == short.tolist()
    assert fasttrain.estimates(results, budget="133steps").n_probes.tolist() == short.tolist()
    assert fasttrain.estimates(results, budget="200steps").n_probes.tolist() == [0, 0]


def test_a_budget_above_the_scans_is_refused():
    results = fasttrain.scan(fasttrain.ScanSpec(**SMALL))
    with pytest.raises(fasttrain.UserError, match="budget=401steps: is more than that of the scan, 400steps"):
        fasttrain.estimates(results, budget="401steps")
    with pytest.raises(fasttrain.UserError, match="emc50"):
        fasttrain.estimates(results, "nakkiran", budget="100steps")


def test_a_budget_of_one_step_can_be_previewed():
    fields = {**SMALL, "batch_size": "full", "budget": "1epochs"}
    del fields["steps"]
    assert fasttrain.preview(fasttrain.ScanSpec(**fields)).model_steps_most == 2 * 14


def test_a_warm_up_that_no_run_would_leave_is_refused():
    spec = fasttrain.ScanSpec(widths=4, batch_size="64,full", budget="300epochs", warmup=300)
    with pytest.raises(fasttrain.UserError, match=r"warmup=300: expected less than the 300 steps .* with 300epochs"):
        fasttrain.preview(spec)
    fasttrain.preview(fasttrain.ScanSpec(widths=4, batch_size="64,full", budget="301epochs", warmup=300))


def feasible(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether a hyperplane separates the two classes strictly: linear programming, shares nothing with training."""
    signed = np.where(y == 1, 1.0, -1.0)[:, None] * np.hstack([x, np.ones((len(x), 1))])
    result = linprog(
        np.zeros(signed.shape[1]), A_ub=-signed, b_ub=-np.ones(len(x)), bounds=(None, None), method="highs"
    )
    assert result.status in (0, 2)
    return result.status == 0


def test_covers_theorem():
    """n50 = 2 (d + 1) = 130 for a linear classifier (Cover 1965), and no infeasible instance is ever fitted."""
    spec = fasttrain.ScanSpec(
        depths=0, data="gaussian:64", classes=2, optimizer="sgd", lr=1, batch_size="full", tolerance=0.03
    )
    results = fasttrain.scan(spec)
    (curve,) = results.curves.itertuples()
    assert curve.emc50 == pytest.approx(130, abs=5)
    assert curve.emc50_low < 130 < curve.emc50_high or abs(curve.emc50 / 130 - 1) < 0.03
    verdicts = []
    for probe in results.probes.itertuples():
        drawn = task(spec, "random", 2, probe.seed, probe.n)
        verdicts.append((probe.outcome == "fitted", feasible(drawn.pool[drawn.rows], drawn.y)))
    assert not any(fitted and not possible for fitted, possible in verdicts)
    # The converse holds for nearly all: training finds what there is to find within the budget.
    possible = [fitted for fitted, can in verdicts if can]
    assert len(possible) > 10
    assert sum(possible) >= 0.8 * len(possible)
    assert any(not can for _, can in verdicts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "emc50", "error"),
    [
        pytest.param({"lr": 0.01}, 662, 0.011, id="adam"),
        pytest.param({"lr": 0.1, "optimizer": "sgd"}, 600, 0.03, id="sgd"),
        pytest.param({"lr": 0.01, "activation": "identity"}, 288, 0.03, id="identity"),
        pytest.param({"lr": 0.005, "widths": 32}, 1464, 0.005, id="adam-32"),
    ],
)
def test_reference_cases(fields, emc50, error):
    """EMC50 of one hidden layer, X ~ N(0, I_64), 10 classes, against an independent implementation."""
    results = fasttrain.scan(fasttrain.ScanSpec(**{"widths": 16, "data": "gaussian:64", "tolerance": 0.04, **fields}))
    (curve,) = results.curves.itertuples()
    ours = (np.log(curve.emc50_high) - np.log(curve.emc50_low)) / (2 * 1.645)
    assert abs(np.log(curve.emc50 / emc50)) <= 3 * np.hypot(error, ours)
    assert ours < 0.03


def test_bad_input_writes_nothing(tmp_path):
    path = tmp_path / "emc.h5"
    for fields, option in (
        ({"data": "mnist3"}, "data"),
        ({"widths": 99_999_999_999}, "widths"),
        ({"device": "cuda:99"}, "device"),
        ({"n_max": 5000, "data": "digits"}, "n_max"),
        ({"n_min": 1797, "data": "digits"}, "n_min"),
        ({"labels": "true", "data": "digits", "classes": 3}, "classes"),
    ):
        with pytest.raises(fasttrain.UserError) as caught:
            fasttrain.scan(fasttrain.ScanSpec(**{**SMALL, "classes": None, **fields}), out=path)
        assert caught.value.option == option
        assert "\n" not in str(caught.value)
        assert not path.exists()
    path.write_bytes(b"mine")
    with pytest.raises(fasttrain.UserError, match=r"emc\.h5"):
        fasttrain.scan(fasttrain.ScanSpec(**SMALL), out=path)
    assert path.read_bytes() == b"mine"


def test_interrupt_waits_for_a_write_and_then_comes():
    with Interrupts() as interrupts:
        reached = False
        with pytest.raises(KeyboardInterrupt), interrupts.deferred():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            reached = True
        assert reached
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_was_swallowed_still_stops_the_scan(monkeypatch, tmp_path):
    """As one that arrives inside a finaliser, where Python prints the exception and goes on."""
    advance = fasttrain.trainer.Trainer.advance
    calls = []

    def swallowing(self):
        calls.append(0)
        if len(calls) == 8:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(fasttrain.trainer.Trainer, "advance", swallowing)
    with pytest.raises(KeyboardInterrupt):
        fasttrain.scan(fasttrain.ScanSpec(**SMALL), out=tmp_path / "emc.h5")
    assert len(calls) == 8
    results = fasttrain.load(tmp_path / "emc.h5")
    assert results.attrs["status"] == "interrupted"
    assert len(results.probes) > 0


@pytest.mark.alone
@pytest.mark.parametrize("after", [1.5, 4.0])
def test_ctrl_c_stops_within_two_seconds_and_keeps_what_finished(tmp_path, after):
    path = tmp_path / "emc.h5"
    # The installed script. Under `python -m`, Python itself ends by the signal (130 to a shell, -2 here) where the
    # interrupt came inside exec() of a text, though it was caught.
    script = str(Path(sys.executable).parent / "fasttrain")
    # An interval that no probes reach: it is still at it, however fast the machine.
    endless = ["--tolerance", "0.0001", "--seeds", "100000", "--max-probes", "100000"]
    command = [script, "scan", "--widths", "32,48,64", *endless, "--out", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not path.exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(after)
            os.kill(process.pid, signal.SIGINT)
            begin = time.monotonic()
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert time.monotonic() - begin < 2.0
    assert process.returncode == 130
    assert "Traceback" not in errors
    results = fasttrain.load(path)
    assert results.attrs["status"] == "interrupted"
    assert f"{len(results.probes)} finished run" in errors
    assert not results.probes.duplicated(["variant", "n", "seed"]).any()


def test_a_scan_in_a_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    found = []
    spec = fasttrain.ScanSpec(**{**SMALL, "max_probes": 2})
    thread = threading.Thread(target=lambda: found.append(fasttrain.scan(spec)))
    thread.start()
    thread.join()
    assert len(found[0].probes) == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_looser_products_set_by_the_caller_do_not_reach_a_scan():
    spec = fasttrain.ScanSpec(**{**SMALL, "max_probes": 4})
    expected = fasttrain.scan(spec)
    seen = set()
    torch.set_float32_matmul_precision("medium")
    try:
        same(fasttrain.scan(spec, on_progress=lambda _: seen.add(torch.get_float32_matmul_precision())), expected)
        assert torch.get_float32_matmul_precision() == "medium"
        assert "highest" in seen
    finally:
        torch.set_float32_matmul_precision("highest")


def test_preview_counts_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preview = fasttrain.preview(fasttrain.ScanSpec(**SMALL))
    assert [p.params for p in preview.variants] == [(8 + 1) * w + (w + 1) * 3 for w in (3, 6)]
    assert preview.model_steps_most == 2 * 14 * 400
    assert 0 < preview.seconds_likely < preview.seconds_most
    assert list(itertools.chain(tmp_path.iterdir())) == []


def log_errors(curves, of="emc50"):
    """ln EMC50 of every variant, or at a third of the budget, and the standard deviation that its interval claims."""
    half = (np.log(curves[f"{of}_high"]) - np.log(curves[f"{of}_low"])) / 2
    return np.log(curves[of]), half / norm.ppf((1 + curves.interval) / 2)


@pytest.mark.slow
def test_twenty_scans_differ_as_much_as_their_intervals_claim():
    spec = fasttrain.ScanSpec(widths=(8, 16), elasticity=False)
    found = [log_errors(fasttrain.scan(replace(spec, seed=seed)).curves) for seed in range(20)]
    for variant in range(2):
        emc, sd = (np.array([one[i][variant] for one in found]) for i in (0, 1))
        mean = np.average(emc, weights=sd**-2)
        assert chi2.ppf(0.001, 19) < (((emc - mean) / sd) ** 2).sum() < chi2.ppf(0.999, 19)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["stacked", "vmap"])
def test_backends_agree_within_their_intervals(backend):
    spec = fasttrain.ScanSpec(widths=(8,), steps=3000, backend="native")
    one, other = (fasttrain.scan(replace(spec, backend=name)).curves for name in ("native", backend))
    for of in ("emc50", "emc50_third"):
        (emc, sd), (emc2, sd2) = log_errors(one, of), log_errors(other, of)
        assert abs(emc[0] - emc2[0]) < 3 * math.hypot(sd[0], sd2[0])
