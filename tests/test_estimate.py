"""The posterior of EMC50: against an independent integration, and where a plain logistic fit breaks."""

import math

import numpy as np
import pytest

from fasttrain import estimate as module
from fasttrain.estimate import estimate, posterior
from fasttrain.records import Censored, Problem
from fasttrain.spec import Variant

VARIANT = Variant(
    arch="mlp",
    width=16,
    depth=1,
    activation="relu",
    optimizer="adam",
    lr=0.01,
    momentum=0.0,
    batch_size=64,
    labels="random",
    classes=10,
)
MIXED = ([200, 280, 330, 400, 470], [6, 5, 3, 1, 0], [0, 1, 3, 4, 5])
SEPARATED = ([50, 100, 200, 400, 800], [3, 3, 3, 0, 0], [0, 0, 0, 3, 3])
LAPSING = ([20, 60, 100, 150, 300, 600], [4, 3, 4, 3, 2, 0], [0, 1, 0, 1, 2, 4])
DENSE = ([270, 285, 300, 315, 330], [97, 85, 50, 17, 4], [3, 15, 50, 83, 96])


def problem(n_min=2, n_max=5000):
    return Problem(index=3, variant=VARIANT, params=1000, n_min=n_min, n_max=n_max)


def assess(ns, fits, fails, n_min=2, n_max=5000, interval=0.9):
    post = posterior(ns, fits, fails, n_min=n_min, n_max=n_max)
    return estimate(problem(n_min, n_max), post, interval)


def by_brute_force(ns, fits, fails, n_min, n_max, around):
    """Quantiles of m, median slope and mean lapse from one fine uniform grid, likelihood as products of P."""
    m = np.linspace(*around, 500)
    log_s = np.linspace(math.log(2), math.log(100), 120)
    lapse = (np.arange(50) + 0.5) / 50 * 0.2
    mm, ss, ll = np.meshgrid(m, np.exp(log_s), lapse, indexing="ij")
    total = 4 * np.log(1 - ll / 0.2)
    total[(mm < math.log(n_min / 4)) | (mm > math.log(n_max * 4))] = -np.inf
    for n, k, f in zip(ns, fits, fails, strict=True):
        shift = -np.log(1 - 2 * ll)
        p = (1 - ll) * 0.5 * (1 + np.tanh((-ss * (math.log(n) - mm) + shift) / 2))
        total += k * np.log(np.maximum(p, 1e-300)) + f * np.log1p(-p)
    weight = np.exp(total - total.max())
    weight /= weight.sum()

    def quantile(axis_values, axes, share):
        mass = weight.sum(axes)
        return np.interp(share, np.cumsum(mass) - mass / 2, axis_values)

    return (
        np.array([quantile(m, (1, 2), share) for share in (0.05, 0.5, 0.95)]),
        math.exp(quantile(log_s, (0, 2), 0.5)),
        float((weight.sum((0, 1)) * lapse).sum()),
    )


@pytest.mark.parametrize(
    ("counts", "around"),
    [(MIXED, (5.0, 7.0)), (SEPARATED, (4.0, 8.0)), (LAPSING, (3.0, 8.0)), (DENSE, (5.6, 5.8))],
)
def test_agrees_with_a_plain_fine_integration(counts, around):
    post = posterior(*counts, n_min=2, n_max=5000)
    quantiles, slope, lapse = by_brute_force(*counts, 2, 5000, around)
    sd = (quantiles[2] - quantiles[0]) / 3.3
    ours = np.array(post.quantile(0.05, 0.5, 0.95))
    assert np.abs(ours - quantiles).max() < 0.04 * sd
    assert post.slope == pytest.approx(slope, rel=0.02)
    assert post.lapse == pytest.approx(lapse, rel=0.02, abs=2e-4)


@pytest.mark.parametrize("counts", [MIXED, SEPARATED, LAPSING, DENSE])
def test_a_finer_grid_changes_nothing_that_shows(counts, monkeypatch):
    coarse = assess(*counts)
    monkeypatch.setattr(module, "_M_NODES", 193)
    monkeypatch.setattr(module, "_SLOPE_NODES", 69)
    fine = assess(*counts)
    width = fine.emc50_high - fine.emc50_low
    for name in ("emc50", "emc50_low", "emc50_high"):
        assert abs(getattr(coarse, name) - getattr(fine, name)) < 0.02 * width
    assert coarse.slope == pytest.approx(fine.slope, rel=0.02)


def test_the_cost_is_bounded_by_the_grid_however_narrow_the_posterior(monkeypatch):
    passes = []
    inner = module._log_joint

    def counted(*args):
        out = inner(*args)
        passes.append(out.size)
        return out

    monkeypatch.setattr(module, "_log_joint", counted)
    scale = np.array([1, 1, 1, 1, 1]) * 1000
    post = posterior(DENSE[0], scale * DENSE[1], scale * DENSE[2], n_min=1, n_max=10**18)
    assert len(passes) <= 4
    assert sum(passes) <= 4 * 49 * 17 * 8
    assert math.exp(post.quantile(0.5)[0]) == pytest.approx(300, rel=0.005)
    assert post.m[1] - post.m[0] < 0.001


def counts_from(emc, slope, lapse, ns, each, rng):
    p = (1 - lapse) / (1 + (1 - 2 * lapse) * np.exp(slope * np.log(np.asarray(ns) / emc)))
    fits = rng.binomial(each, p)
    return list(ns), fits, each - fits


@pytest.mark.parametrize(("slope", "lapse"), [(4.0, 0.0), (10.0, 0.05), (25.0, 0.0)])
def test_recovers_the_parameters_that_made_the_data(slope, lapse):
    rng = np.random.default_rng(5)
    ns = np.unique(np.round(600 * np.exp(np.linspace(-6, 4, 31) / slope)).astype(int))
    found = assess(*counts_from(600, slope, lapse, ns, 60, rng))
    assert found.emc50 == pytest.approx(600, rel=0.4 / slope)
    assert found.slope == pytest.approx(slope, rel=0.15)
    assert found.lapse == pytest.approx(lapse, abs=0.015)


def test_emc50_is_where_the_whole_probability_is_one_half_not_the_logistics_midpoint():
    slope, lapse, midpoint = 4.0, 0.15, 600
    whole = midpoint * (1 - 2 * lapse) ** (1 / slope)
    ns = np.unique(np.round(whole * np.exp(np.linspace(-2, 1, 31))).astype(int))
    p = (1 - lapse) / (1 + np.exp(slope * np.log(ns / midpoint)))
    fits = np.round(40 * p).astype(int)
    found = assess(ns, fits, 40 - fits)
    assert found.emc50 == pytest.approx(whole, rel=0.02)
    assert found.emc50_high < midpoint * 0.98


def test_perfect_separation_gives_a_finite_interval_inside_the_gap():
    found = assess(*SEPARATED)
    assert found.censored is Censored.NO
    assert 200 < found.emc50 < 400
    assert 150 < found.emc50_low < 230
    assert 350 < found.emc50_high < 530


def test_more_of_the_same_evidence_narrows_the_interval_as_one_over_root_n():
    one = assess(*MIXED)
    many = assess(MIXED[0], [16 * k for k in MIXED[1]], [16 * f for f in MIXED[2]])
    ratio = (one.emc50_high - one.emc50_low) / (many.emc50_high - many.emc50_low)
    assert 3 < ratio < 8


def test_a_larger_content_contains_a_smaller_one():
    narrow, wide = assess(*MIXED, interval=0.5), assess(*MIXED, interval=0.99)
    assert wide.emc50_low < narrow.emc50_low < narrow.emc50 == wide.emc50
    assert narrow.emc50 < narrow.emc50_high < wide.emc50_high


def test_all_fit_up_to_n_max_is_censored_above_with_n_max_as_the_bound():
    found = assess([100, 200, 400], [1, 1, 5], [0, 0, 0], n_max=400)
    assert found.censored is Censored.ABOVE
    assert math.isnan(found.emc50)
    assert (found.emc50_low, found.emc50_high) == (400.0, math.inf)


def test_none_fits_down_to_n_min_is_censored_below_with_n_min_as_the_bound():
    found = assess([20, 40, 80], [0, 0, 0], [5, 1, 1], n_min=20)
    assert found.censored is Censored.BELOW
    assert math.isnan(found.emc50)
    assert (found.emc50_low, found.emc50_high) == (0.0, 20.0)


def test_what_was_not_tried_is_neither_estimated_nor_called_censored():
    fits_only = assess([100], [3], [0], n_max=200)
    assert fits_only.censored is Censored.NO
    assert math.isnan(fits_only.emc50)
    assert fits_only.emc50_high == math.inf
    assert 50 < fits_only.emc50_low <= 110
    nothing = assess([], [], [])
    assert math.isnan(nothing.emc50)
    assert (nothing.emc50_low, nothing.emc50_high, nothing.n_probes) == (0.0, math.inf, 0)


def test_an_end_of_the_interval_outside_of_the_range_is_not_extrapolated():
    top = assess([300, 360, 400], [6, 5, 3], [0, 1, 5], n_max=400)
    assert top.censored is Censored.NO
    assert 360 < top.emc50 < 400
    assert (top.emc50_low > 300, top.emc50_high) == (True, math.inf)
    bottom = assess([20, 23, 30], [5, 1, 0], [3, 5, 6], n_min=20)
    assert 20 < bottom.emc50 < 23
    assert (bottom.emc50_low, bottom.emc50_high < 30) == (0.0, True)


def test_an_early_failure_is_taken_for_a_lapse_when_much_fits_above_it():
    found = assess([50, 100, 200, 300, 600], [7, 8, 8, 8, 0], [1, 0, 0, 0, 8])
    assert found.emc50_low > 290
    assert found.lapse > assess([50, 100, 200, 300, 600], [8, 8, 8, 8, 0], [0, 0, 0, 0, 8]).lapse + 0.005


def test_the_order_of_the_counts_changes_no_bit():
    ns, fits, fails = LAPSING
    order = [4, 0, 5, 2, 1, 3]
    again = assess(*([values[i] for i in order] for values in (ns, fits, fails)))
    assert again == assess(ns, fits, fails)


def test_predictive_probability_falls_and_is_one_half_near_emc50():
    post = posterior(*DENSE, n_min=2, n_max=5000)
    p = post.fit_probability(np.linspace(5.4, 6.0, 61))
    assert (np.diff(p) < 0).all()
    assert post.fit_probability(np.array([post.quantile(0.5)[0]]))[0] == pytest.approx(0.5, abs=0.01)


def test_the_joint_density_is_that_of_the_formula_also_far_from_the_threshold():
    """Against log-sums of exponentials, which need no clipping: exponents here reach 1,400 either way."""
    x = np.log([2.0, 3.0, 40.0, 50.0, 60.0, 1e4, 1e9, *np.arange(5e8, 5e8 + 15)])
    fits, fails = np.array([3, 1, 2, 0, 1, 0, 2, *[0] * 15]), np.array([0, 1, 0, 1000, 2, 7, 1, *[1] * 15])
    m, log_slope = np.log([0.5, 45.0, 55.0, 4e9]), np.log([0.7, 10.0, 70.0])
    lapses, log_prior = module._LAPSE_RULE
    got = module._log_joint(x, fits, fails, m, log_slope, module._LAPSE_RULE)
    z = np.exp(log_slope)[:, None] * (x[:, None, None, None] - m[:, None, None])
    scaled = np.log1p(-2 * lapses) + z
    log_odds_one = np.logaddexp(0.0, scaled)
    fitted = np.log1p(-lapses) - log_odds_one
    failed = np.logaddexp(np.log(lapses), scaled) - log_odds_one
    wanted = (fits[:, None, None, None] * fitted + fails[:, None, None, None] * failed).sum(0)
    wanted += log_prior
    assert np.abs(z).max() > 1400
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-9)


def two_steps(gap, each):
    """Counts where half of the runs have their threshold below 300 and half above, each step steep."""
    ns = np.unique(np.round(300 * np.exp(np.linspace(-1.0, 1.0, 21))).astype(int))
    p = sum(0.5 / (1 + np.exp(25 * (np.log(ns / 300) + side))) for side in (-gap, gap))
    fits = np.round(each * p).astype(int)
    return ns.tolist(), fits.tolist(), (each - fits).tolist()


def test_two_steps_contradict_the_model_and_a_single_one_does_not():
    assert assess(*two_steps(0.5, 10)).misfit_p < 1e-4
    assert assess(*two_steps(0.5, 10)).misfit
    assert assess(*two_steps(0.0, 10)).misfit_p > 0.5
    for counts in (MIXED, SEPARATED, LAPSING, DENSE):
        assert not assess(*counts).misfit


def test_the_p_value_of_a_misfit_is_spread_evenly_where_the_model_holds():
    rng = np.random.default_rng(3)
    ns = np.unique(np.round(600 * np.exp(np.linspace(-0.6, 0.6, 21))).astype(int))
    p = np.array([assess(*counts_from(600, 8.0, 0.0, ns, 20, rng)).misfit_p for _ in range(120)])
    for share in (0.1, 0.3, 0.5, 0.7):
        assert abs((p < share).mean() - share) < 3 * math.sqrt(share * (1 - share) / 120)


def test_too_little_to_tell_is_no_misfit():
    assert assess([100], [3], [0], n_max=200).misfit_p == 1.0
    assert assess([], [], []).misfit_p == 1.0
    assert not assess(*SEPARATED).misfit


def test_the_difference_of_two_posteriors_is_that_of_draws_from_them():
    one, two = (posterior(*counts, n_min=2, n_max=5000) for counts in (MIXED, DENSE))
    rng = np.random.default_rng(1)
    shares = (0.05, 0.5, 0.95)
    draws = [np.array(post.quantile(*rng.random(200_000))) for post in (one, two)]
    wanted = np.quantile(draws[0] - draws[1], shares)
    assert one.minus(two, *shares) == pytest.approx(wanted, abs=0.03 * (wanted[2] - wanted[0]))
    assert one.minus(one, 0.5)[0] == pytest.approx(0.0, abs=1e-4)


def test_far_tails_of_a_difference_are_those_of_its_two_parts():
    """Both nearly normal: the share of 1e-4 lies 3.72 standard deviations off, far beyond 2.58 of a share of 0.005."""
    ns = [int(600 * 1.02**k) for k in range(-20, 21)]
    fits = [round(40 / (1 + (n / 600) ** 12)) for n in ns]
    post = posterior(ns, fits, [40 - fit for fit in fits], n_min=2, n_max=5000)
    low, wide, median = post.minus(post, 0.0001, 0.025, 0.5)
    assert (low - median) / (wide - median) == pytest.approx(3.719 / 1.960, rel=0.03)


def test_slopes_below_a_value_are_what_its_quantile_says():
    post = posterior(*MIXED, n_min=2, n_max=5000)
    for share in (0.05, 0.5, 0.9):
        assert post.slope_below(post.slope_at(share)) == pytest.approx(share, abs=1e-6)
    assert post.slope_at(0.5) == post.slope
