"""Scaling fits: against a plain integration, known power laws, and the coverage of their intervals by simulation."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2, norm
from simulated import curve, normal, run, scanned, with_density
from test_comparison import SPEC

import fasttrain
from fasttrain import UserError, fit_scaling
from fasttrain.cli import main
from fasttrain.comparison import weighted_quantiles
from fasttrain.scaling import Likelihood, _spread, posterior_of

X = np.log([100.0, 200.0, 400.0, 900.0, 1500.0])
SD = np.array([0.05, 0.06, 0.04, 0.07, 0.05])
Y = 0.9 * X - 1.0 + np.array([0.02, -0.08, 0.07, -0.05, 0.06])


def plain(x, y, sd, top=None):
    """Quantiles of the slope from an even grid over intercept, slope and spread, closed forms for the likelihood.

    What is not below ``top`` is known to lie above it, and no more.
    """
    scale = math.sqrt(len(x) / (1 / sd**2).sum())
    share = (np.arange(60) + 0.5) / 60
    tau = (scale * ((1 - share) ** -2 - 1))[:, None, None]
    a, b = np.linspace(-2.0, 2.0, 161)[:, None], np.linspace(-3.0, 3.0, 301)
    centre = x - x.mean()
    fit = np.polyfit(centre, y, 1)
    total = np.zeros((60, 161, 301))
    for one, value, s in zip(centre, y, sd, strict=True):
        mean = fit[1] + a + (fit[0] + b) * one
        width = np.sqrt(s**2 + tau**2)
        if top is not None and value >= top:
            total += norm.logcdf((mean - top) / tau)
        else:
            total += norm.logpdf(value, mean, width)
    mass = np.exp(total - total.max()).sum((0, 1))
    mass /= mass.sum()
    return np.interp((0.05, 0.5, 0.95), np.cumsum(mass) - mass / 2, fit[0] + b)


def by_grid(x, members):
    got = posterior_of(np.stack([np.ones_like(x), x - x.mean()], axis=1), Likelihood(members))
    return np.array(weighted_quantiles(got.beta[:, 1], got.mass, 0.05, 0.5, 0.95)), got


def test_agrees_with_a_plain_integration():
    members = [normal(y, s) for y, s in zip(Y, SD, strict=True)]
    got, grid = by_grid(X, members)
    expected = plain(X, Y, SD)
    # Twelve nodes of the spread for sixty: a few hundredths of the interval.
    assert np.abs(got - expected).max() < 0.04 * (expected[2] - expected[0])
    weight = 1 / SD**2
    fit = np.polyfit(X, Y, 1, w=np.sqrt(weight))
    assert grid.deviance == pytest.approx((weight * (Y - np.polyval(fit, X)) ** 2).sum(), rel=0.01)


def test_a_censored_variant_enters_by_its_tail():
    top = 6.0
    members = [normal(y, s) for y, s in zip(Y[:4], SD[:4], strict=True)]
    # Surely above the top, anywhere there: flat up to the end of the prior.
    x = np.linspace(top, top + math.log(4), 400)
    members.append(with_density(x, np.linspace(0, 1, 400), top=top - 0.1))
    y = np.append(Y[:4], top)
    y[3] = 5.2
    members[3] = normal(5.2, SD[3])
    got, grid = by_grid(X, members)
    expected = plain(X, y, SD, top=top)
    without = plain(X[:4], y[:4], SD[:4])
    assert np.abs(got - expected).max() < 0.05 * (expected[2] - expected[0])
    # Dropped, it would not have raised the slope; taken for a value at the top, it would bind it from above too.
    assert got[1] > without[1] + 0.1 * (without[2] - without[0])
    assert grid.deviance > 0
    # However far beyond the end of its prior a mean lies, a run at n_max would have fitted.
    for tau in (0.05, 1.0):
        m = np.array([5.0, 6.0, 7.0, 9.0, 20.0])
        # The logarithm is linear between points a fifth of tau apart: off by (1/5)^2 / 8.
        np.testing.assert_allclose(np.exp(_spread(members[4], tau)(m)), norm.cdf((m - top) / tau), atol=5e-3)


PARAMS = [150, 250, 400, 700, 1100]


def test_a_power_law_is_found_and_its_variants_are_listed():
    found = fit_scaling(scanned([0.2 * p**1.1 for p in PARAMS], PARAMS, key=3))
    (row,) = found.fits.to_dict("records")
    assert row["variants"] == 5
    assert row["alpha_low"] < 1.1 < row["alpha_high"]
    assert row["log_a_low"] < math.log(0.2) < row["log_a_high"]
    assert row["alpha_high"] - row["alpha_low"] < 0.4
    assert row["r2"] > 0.98
    assert row["deviance_df"] == 3
    assert row["deviance_p"] == pytest.approx(chi2.sf(row["deviance"], 3))
    variants = found.variants
    np.testing.assert_allclose(variants["efficiency"], variants["emc50"] / PARAMS)
    np.testing.assert_allclose(variants["fitted"], np.exp(row["log_a"]) * np.array(PARAMS) ** row["alpha"])
    wide = fit_scaling(scanned([0.2 * p**1.1 for p in PARAMS], PARAMS, key=3), interval=0.99).fits.iloc[0]
    assert wide["alpha_low"] < row["alpha_low"] < row["alpha_high"] < wide["alpha_high"]


def test_censored_variants_are_in_the_fit():
    emcs = [0.3 * p for p in PARAMS]
    frames = scanned(emcs, PARAMS, key=4, n_max=180)
    found = fit_scaling(frames)
    row = found.fits.iloc[0]
    assert row["censored"] == 2
    assert found.variants["censored"].tolist() == ["no", "no", "no", "above", "above"]
    assert row["alpha_low"] < 1.0 < row["alpha_high"]
    dropped = frames[0].iloc[:3], frames[1]
    assert row["alpha_high"] - row["alpha_low"] < np.diff(fit_scaling(dropped).fits[["alpha_low", "alpha_high"]])[0, 0]


def test_a_bend_is_warned_of_and_a_line_is_not():
    # Far more of a bend than chance makes: EMC saturates.
    bent = fit_scaling(scanned([0.4 * p / (1 + p / 200) for p in PARAMS], PARAMS, key=5, slope=25.0, n_max=800))
    assert bent.fits["bend"][0] < 0
    assert bent.fits["bend_p"][0] < 0.05
    assert "bends down" in bent.warnings[0]
    straight = fit_scaling(scanned([0.4 * p for p in PARAMS], PARAMS, key=6))
    assert straight.fits["bend_p"][0] > 0.05
    assert straight.warnings == ()


def test_groups():
    one, two = (scanned([0.3 * p for p in PARAMS[:3]], PARAMS[:3], key=k) for k in (7, 8))
    curves = pd.concat([one[0], two[0].assign(variant=[3, 4, 5], optimizer="sgd", depth=2)], ignore_index=True)
    probes = pd.concat([one[1], two[1].assign(variant=two[1]["variant"] + 3)], ignore_index=True)
    by_default = fit_scaling((curves, probes))
    assert by_default.fits["optimizer"].tolist() == ["adam", "sgd"]
    assert "width" not in by_default.by
    assert by_default.fits["bend"].isna().all()
    assert len(fit_scaling((curves, probes), by="").fits) == 1
    assert fit_scaling((curves, probes), by="optimizer,depth").by == ("optimizer", "depth")
    few = curves.drop(index=[4, 5]), probes
    mixed = fit_scaling(few)
    assert math.isnan(mixed.fits["alpha"][1])
    assert mixed.warnings[0].endswith("there are 1 and 1")
    with pytest.raises(UserError, match=r"at least 3 parameter counts, .* the largest of 6 has 1, and 1 with a value"):
        fit_scaling((curves, probes), by="width,depth")
    with pytest.raises(UserError, match="no such setting"):
        fit_scaling((curves, probes), by="size")
    with pytest.raises(UserError, match="between 0 and 1"):
        fit_scaling((curves, probes), interval=2.0)
    with pytest.raises(UserError, match="none of its runs has finished"):
        fit_scaling((curves, probes.iloc[:0]))


def test_of_a_race_the_winner_is_in_the_fit_whatever_its_rate():
    curves, probes = scanned([0.3 * p for p in PARAMS[:3]], PARAMS[:3], key=9)
    curves = curves.assign(race="won", lr=[0.1, 0.01, 0.1])
    lost = pd.DataFrame([curve(3, 150, 600, "lost", lr=0.5)])
    probes = pd.concat([probes.assign(seed=probes["seed"] + 2**20), pd.DataFrame([run(3, 5, 0, True)])])
    found = fit_scaling((pd.concat([curves, lost], ignore_index=True), probes))
    assert len(found.fits) == 1
    assert found.fits["variants"][0] == 3


def test_a_real_file_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "fit.h5"
    fasttrain.scan(fasttrain.ScanSpec(**{**SPEC, "widths": "3,5,8"}), out=path)
    assert main(["fit", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].endswith("1 group, 3 variants")
    assert main(["fit", str(path), "--by", "optimizer", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = fit_scaling(fasttrain.load(path), by=["optimizer"]).fits.iloc[0]
    assert found["fits"][0]["alpha"] == row["alpha"]
    assert found["fits"][0]["bend"] is None
    assert found["by"] == ["optimizer"]
    for arguments, says in ((["--by", "x"], "--by x: no such"), (["--interval", "2"], "--interval 2.0: expected")):
        assert main(["fit", str(path), *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"fasttrain: {says}")


def simulated_fits(variants, spread, repeats):
    """Whether 90 % intervals cover a drawn power law, and p-values of its bend; half of the scans are censored."""
    covered, bends = [], []
    for repeat in range(repeats):
        rng = np.random.default_rng([variants, int(100 * spread), repeat])
        alpha = rng.uniform(0.8, 1.2)
        params = np.round(np.exp(np.linspace(math.log(150), math.log(300 * 2 ** (variants / 2)), variants))).astype(int)
        log_a = math.log(0.35) - (alpha - 1) * math.log(600)
        emcs = np.exp(log_a + alpha * np.log(params) + spread * rng.normal(size=variants))
        ends = int(np.sort(emcs)[-max(1, variants // 4)] * rng.uniform(0.75, 1.0)) if repeat % 2 else None
        slope = float(np.exp(rng.normal(math.log(12), 0.4)))
        row = fit_scaling(scanned(emcs, params.tolist(), slope=slope, key=7 * repeat + 1, n_max=ends), by="").fits.iloc[
            0
        ]
        covered.append((row["alpha_low"] <= alpha <= row["alpha_high"], row["log_a_low"] <= log_a <= row["log_a_high"]))
        bends.append(row["bend_p"])
    return np.array(covered), np.array(bends)


@pytest.mark.slow
@pytest.mark.parametrize("variants", [4, 6, 10])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_intervals_cover_and_lines_are_not_called_bent(variants, spread):
    covered, bends = simulated_fits(variants, spread, 60)
    assert (covered.mean(0) > 0.86 - 3 * math.sqrt(0.86 * 0.14 / 60)).all()
    assert np.mean(bends < 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)
