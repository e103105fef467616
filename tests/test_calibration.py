"""Intervals on simulated verdicts, with the search and its stopping inside: a short form, and the whole marked slow."""

import math
from functools import partial

import numpy as np
import pytest

from benchmarks import calibration
from benchmarks.calibration import FIXED, MISFITS, WELL, Curve, fixed, many, misfits, simulation_based, summary

ABOUT = 3.0  # standard errors


def error(share: float, runs: int) -> float:
    return ABOUT * math.sqrt(share * (1.0 - share) / runs)


@pytest.mark.parametrize(("u", "n"), [(0.3, 500), (0.5, 600), (0.9, 650), (0.97, 100)])
def test_a_simulated_run_fits_within_a_budget_as_often_as_its_curve_says(u, n):
    curve = Curve(600.0, 10.0, 0.05, elasticity=0.25)
    step = curve.fit_step(n, u)
    for share in (0.1, 1 / 3, 1.0, 2.0):
        emc = 600.0 * share**0.25
        p = 0.95 / (1.0 + 0.9 * (n / emc) ** 10.0)
        assert (step <= share * calibration.STEPS) == (u <= p)


def test_intervals_cover_and_are_unbiased_in_a_short_simulation():
    found = summary([fixed(FIXED["middling"], key) for key in range(40)])
    assert found["covered"] > 0.86 - error(0.86, 40)
    assert abs(found["bias"]) < 0.02 + ABOUT * found["spread"] / math.sqrt(40)
    assert found["covered_third"] > 0.86 - error(0.86, 40)
    assert found["covered_elasticity"] > 0.86 - error(0.86, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED)
def test_intervals_cover_the_truth_of_a_fixed_curve(name):
    runs = 600
    found = summary(many(partial(fixed, FIXED[name]), runs))
    assert 0.86 - error(0.86, runs) < found["covered"] < 0.95 + error(0.95, runs)
    assert abs(found["bias"]) < 0.02
    assert found["covered_third"] > 0.84 - error(0.84, runs)
    assert found["covered_elasticity"] > 0.86 - error(0.86, runs)
    assert found["alarms"] < 0.03 + error(0.03, runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED)
def test_intervals_cover_where_a_scan_was_extended(name):
    found = summary(many(partial(fixed, FIXED[name], began=0.2), 300))
    assert found["covered"] > 0.86 - error(0.86, 300)
    assert abs(found["bias"]) < 0.02 + ABOUT * found["spread"] / math.sqrt(300)


@pytest.mark.slow
def test_simulation_based_calibration():
    found = simulation_based(1000)
    assert found["emc50_p"] > 0.001
    assert found["slope_p"] > 0.001
    assert abs(found["lapse_z"]) < 4.0


@pytest.mark.slow
@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_flagged_with_the_power_that_is_stated(name):
    curve, power = MISFITS[name]
    runs = 200
    assert misfits(curve, runs) > power - error(power, runs)


def test_the_curves_that_alarms_are_counted_on_are_the_models_own():
    assert {curve.shape for curve in WELL} == {"model"}
    assert {curve.shape for curve, _ in MISFITS.values()} == {"two-step", "dip"}
    assert np.all([power > 0.0 for _, power in MISFITS.values()])
