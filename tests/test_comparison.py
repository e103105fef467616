"""Comparisons: pairs, ratios and tests against independent computations, and the level of the test by simulation."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.integrate import quad
from simulated import curve, normal, run, scanned, with_density
from test_search import DEFAULTS, play, problem, world

import fasttrain
from fasttrain import UserError, compare
from fasttrain.cli import main
from fasttrain.comparison import (
    Difference,
    _effect,
    _superiority,
    adjusted,
    associated,
    p_equal,
    random_effects,
    tau_b,
)
from fasttrain.estimate import posterior
from fasttrain.measured import measured, parse_selection, select
from fasttrain.spec import CONFIRM, SHORT

PARAMS = [200, 400, 800]


@pytest.fixture(scope="module")
def sides():
    """Three widths whose EMC50 are 0.3 and 0.45 a parameter."""
    a = scanned([0.3 * p for p in PARAMS], PARAMS, key=1)
    return a, scanned([0.45 * p for p in PARAMS], PARAMS, key=2, optimizer="sgd", momentum=0.9)


def uniform(low, high, **about):
    x = np.linspace(low, high, 4001)
    return with_density(x, (x - low) / (high - low), **about)


def test_differences_of_normals_are_normal():
    one, two = normal(5.0, 0.03), normal(5.2, 0.04)
    difference = Difference(one, two)
    for share in (0.05, 0.5, 0.975):
        # The grids' cells have a width of sd / 100: a variance of (sd / 100)^2 / 12, and no more, is lost or added.
        assert difference.quantile(share) == pytest.approx(stats.norm.ppf(share, 0.2, 0.05), abs=2e-5)
    assert p_equal(one, two) == pytest.approx(2 * stats.norm.sf(4.0 / 1.15), rel=1e-2)
    assert p_equal(one, two, shift=0.2) == pytest.approx(1.0, abs=1e-3)
    # One side's cells are taken at their middles, the other's are lines: of second order in their width.
    assert p_equal(two, one) == pytest.approx(p_equal(one, two), rel=1e-3)


def test_what_lies_beyond_the_range_is_a_bound_and_not_a_value():
    a = uniform(0.0, 1.0)
    b = uniform(2.0, 4.0, top=3.0)
    # At worst, half of b is at 3: P(D <= t) is P(U - A <= t) / 2 below 2, with U uniform on 2 to 3.
    for share in (0.05, 0.2):
        assert Difference(a, b, "low").quantile(share) == pytest.approx(1.0 + math.sqrt(2 * share * 2), abs=1e-3)
    assert Difference(a, b, "high").quantile(0.95) == math.inf
    further = uniform(2.0, 10.0, top=3.0)
    assert Difference(a, uniform(2.9, 50.0, top=3.0), "low").quantile(0.5) == pytest.approx(2.5, abs=1e-2)
    assert Difference(a, further, "low").quantile(0.5) < Difference(a, further).quantile(0.5)
    # The other way round the same holds of the other end.
    assert Difference(b, a, "high").quantile(0.95) == pytest.approx(-Difference(a, b, "low").quantile(0.05), abs=1e-3)
    assert Difference(b, a, "low").quantile(0.05) == -math.inf
    # Both beyond: nothing is known.
    c = uniform(3.0, 4.0, top=3.0)
    assert (Difference(c, c, "low").quantile(0.05), Difference(c, c, "high").quantile(0.95)) == (-math.inf, math.inf)
    assert p_equal(c, c) == 1.0
    assert p_equal(a, b) == pytest.approx(0.0, abs=1e-9)


DENSE = [30, 38, 44, 48, 52, 56, 62, 70, 90]


def dense(emc, slope=10.0, runs=400, lapse=0.0):
    """A variant with so many runs at each n that its curve is known."""
    rows, x = [], np.array(DENSE) / 50 * emc
    for n in np.round(x).astype(int):
        p = (1 - lapse) / (1 + (1 - 2 * lapse) * (n / emc) ** slope)
        rows += [run(0, n, k, k < round(p * runs)) for k in range(runs)]
    return measured((pd.DataFrame([curve(0, 100, 10_000)]), pd.DataFrame(rows)))[0][0]


def test_effect_and_superiority_of_known_curves():
    one, two = dense(500.0), dense(600.0, slope=14.0)
    sd = math.sqrt((math.pi**2 / 3) * (1 / 10**2 + 1 / 14**2) / 2)
    effect, low, high = _effect(one, two, 0.0, 0.9)
    assert low < effect < high
    # 3600 runs a curve tell its slope to about 3 %.
    assert effect == pytest.approx(math.log(1.2) / sd, rel=0.05)
    assert low < math.log(1.2) / sd < high

    def density(x):  # of a's threshold, and the share of b's above it
        e = math.exp(10 * (x - math.log(500)))
        return 10 * e / (1 + e) ** 2 / (1 + math.exp(14 * (x - math.log(600))))

    assert _superiority(one, two, 0.0) == pytest.approx(quad(density, 3, 9, points=[6.2, 6.4])[0], abs=0.01)
    assert _superiority(one, two, 0.0) + _superiority(two, one, 0.0) == pytest.approx(1.0, abs=1e-12)
    assert _superiority(one, one, 0.0) == pytest.approx(0.5, abs=1e-12)


def test_the_effects_interval_is_that_of_draws_from_both_posteriors():
    one, two = (measured(scanned([emc], [400], key=9, slope=s))[0][0] for emc, s in ((120, 8.0), (160, 12.0)))
    rng = np.random.default_rng(0)
    draws = []
    for it in (one, two):
        weight = it.post.weight.sum(2)
        index = rng.choice(weight.size, 400_000, p=weight.ravel())
        i, j = np.unravel_index(index, weight.shape)
        draws.append((it.post.m[i], math.pi / math.sqrt(3) / np.exp(it.post.log_slope[j])))
    values = (draws[1][0] - draws[0][0]) / np.sqrt((draws[0][1] ** 2 + draws[1][1] ** 2) / 2)
    got = _effect(one, two, 0.0, 0.9)
    # A sample quantile's error is sqrt(p (1 - p) / draws) / density, below 0.01 sd here; nodes are atoms in both.
    assert np.allclose(got, np.quantile(values, (0.5, 0.05, 0.95)), atol=0.02 * values.std())


def test_holm_and_benjamini_hochberg():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(adjusted(p, "holm"), [0.03, 0.06, np.nan, 0.06, 0.02])
    np.testing.assert_allclose(adjusted(p, "bh"), [0.02, 0.04, np.nan, 0.04, 0.02])
    assert np.isnan(adjusted(np.array([np.nan]), "holm")).all()


def test_the_overall_ratio_is_the_t_test_where_pairs_differ_and_the_weighted_mean_where_they_do_not():
    y = np.array([0.1, 0.5, 0.3, 0.9])
    got = random_effects(y, np.full(4, 1e-12), 0.9)
    t = stats.ttest_1samp(y, 0.0)
    ends = t.confidence_interval(0.9)
    np.testing.assert_allclose(
        [got.p, math.log(got.low), math.log(got.high), got.spread], [t.pvalue, ends.low, ends.high, y.std(ddof=1)]
    )
    variance = np.array([0.01, 0.04, 0.02])
    y = np.array([0.2, 0.21, 0.19])
    got = random_effects(y, variance, 0.9)
    assert got.spread == 0.0
    assert math.log(got.ratio) == pytest.approx((y / variance).sum() / (1 / variance).sum())
    half = stats.t.ppf(0.95, 2) / math.sqrt((1 / variance).sum())
    assert math.log(got.high / got.low) == pytest.approx(2 * half)
    # Paule and Mandel: with the spread, the weighted sum of squares is its expectation.
    y = np.array([0.0, 0.6, 0.2])
    got = random_effects(y, variance, 0.9)
    weight = 1 / (variance + got.spread**2)
    assert (weight * (y - math.log(got.ratio)) ** 2).sum() == pytest.approx(2.0)


def test_correlations_and_when_there_are_none():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 12))
    x[3] = x[4]
    y[5] = y[6] = y[7]
    assert tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
    got = associated(x, y, "test_accuracy", 0.9)
    assert got.kendall.value == pytest.approx(stats.kendalltau(x, y).statistic)
    assert got.kendall.low < got.kendall.value < got.kendall.high
    r = stats.pearsonr(x, y)
    assert (got.pearson.value, got.pearson.p) == (r.statistic, r.pvalue)
    fisher = np.tanh(np.arctanh(r.statistic) + np.array([-1, 1]) * stats.norm.ppf(0.95) / 3)
    np.testing.assert_allclose([got.pearson.low, got.pearson.high], fisher)
    assert associated(x, y, "test_accuracy", 0.9) == got
    assert associated(x[:3], y[:3], "test_accuracy", 0.9).reason.startswith("3 points are too few")
    assert associated(x, np.ones(12), "width", 0.9).reason == "all values of width are equal"
    assert associated(np.ones(12), y, "width", 0.9).reason == "all values of the gap are equal"


def test_two_sides_are_paired_by_width_and_what_differs_is_named(sides):
    a, b = sides
    found = compare(a, b)
    pairs = found.pairs
    assert pairs["width"].tolist() == [1, 2, 3]
    assert found.differs == {"optimizer": (("adam",), ("sgd",))}
    assert found.unmatched == ()
    assert (pairs["ratio_low"] < 1.5).all()
    assert (pairs["ratio_high"] > 1.5).all()
    assert (pairs["p"] < 0.01).all()
    assert (pairs["p_adjusted"] >= pairs["p"]).all()
    assert (pairs["superiority"] > 0.7).all()
    assert found.overall.pairs == 3
    assert found.overall.low < 1.5 < found.overall.high
    per_param = compare(a, b, per_param=True).pairs
    np.testing.assert_allclose(per_param["ratio"], pairs["ratio"])
    np.testing.assert_allclose(per_param["emc_a"], pairs["emc_a"] / PARAMS)
    back = compare(b, a).pairs
    np.testing.assert_allclose(back["ratio_low"] * pairs["ratio_high"], 1.0, rtol=1e-3)
    np.testing.assert_allclose(back["p"], pairs["p"], rtol=1e-3)


def test_unmatched_variants_are_listed(sides):
    a, b = sides
    less = b[0][b[0]["width"] != 2], b[1]
    found = compare(a, less)
    assert len(found.pairs) == 2
    assert found.unmatched == ("a: mlp, width 2, depth 1, adam, lr 0.01: no partner",)
    empty = b[0], b[1][b[1]["variant"] != 0]
    found = compare(a, empty)
    assert "b: mlp, width 1, depth 1, sgd, lr 0.01: none of its runs has finished" in found.unmatched
    assert "a: mlp, width 1, depth 1, adam, lr 0.01: no partner" in found.unmatched


def test_architectures_are_matched_by_parameters(sides):
    a, _ = sides
    params = [208, 390, 900]
    b = scanned([90, 150, 300], params, key=3, arch="cnn", width=7)
    b[0]["width"] = [40, 50, 60]
    with pytest.raises(
        UserError, match=r"no variant of a has a partner in b; they differ in width \(1, 2, 3 against 40"
    ):
        compare(a, b)
    found = compare(a, b, match="params", per_param=True)
    assert found.pairs[["params_a", "params_b"]].to_numpy().tolist() == [[200, 208], [400, 390]]
    assert len(found.unmatched) == 2
    ratio = found.pairs["emc_b"] / found.pairs["emc_a"]
    np.testing.assert_allclose(found.pairs["ratio"], ratio, rtol=0.02)
    # The most pairs, not the closest first: 199 would leave 204 alone.
    c = (b[0].head(2).assign(params=[201, 192], width=[8, 9]), b[1])
    d = (a[0].head(2).assign(params=[200, 209]), a[1])
    assert compare(d, c, match="params").pairs[["params_a", "params_b"]].to_numpy().tolist() == [[200, 192], [209, 201]]


def test_settings_that_both_sides_share_must_agree(sides):
    a, b = sides
    both = (
        pd.concat([b[0], b[0].assign(batch_size=0, variant=[3, 4, 5])], ignore_index=True),
        pd.concat([b[1], b[1].assign(variant=b[1]["variant"] + 3)], ignore_index=True),
    )
    assert set(compare(a, both).pairs["batch_size"]) == {64}
    with pytest.raises(UserError, match="has 2 partners, which differ in batch_size; select one with --b"):
        compare(a, both, select_b="batch_size=full,batch_size=64")
    assert set(compare(a, both, select_b="batch_size=full").pairs["batch_size_b"]) == {0}
    with pytest.raises(UserError, match="they differ in optimizer"):
        compare(a, both, match="settings")
    assert len(compare(a, b, match="settings", select_a="optimizer=adam").pairs) == 3


def test_a_censored_side_gives_a_bound(sides):
    a, _ = sides
    b = scanned([0.6 * p for p in PARAMS], PARAMS, key=5, n_max=300, optimizer="sgd")
    found = compare(a, b)
    assert found.pairs["bound"].tolist() == ["", "", "at least"]
    last = found.pairs.iloc[2]
    assert last["censored_b"] == "above"
    assert math.isnan(last["ratio"])
    assert math.isnan(last["log_ratio"])
    assert last["ratio_high"] == math.inf
    assert 1.0 < last["ratio_low"] < 300 / last["emc_a"]
    assert last["notes"] == "b above n-max"
    assert (found.overall.pairs, found.overall.left_out) == (2, 1)
    none = compare(b, scanned([0.7 * p for p in PARAMS], PARAMS, key=6, n_max=300)).pairs.iloc[2]
    assert (none["bound"], none["ratio_low"], none["ratio_high"]) == ("unknown", 0.0, math.inf)
    assert math.isnan(none["p"])
    assert math.isnan(none["p_adjusted"])


def test_the_runs_behind_a_variant():
    kinds = {"race": (0, 100), "confirm": (CONFIRM, 200), "short": (SHORT, 50)}
    rows = [run(0, round(n * emc), first + k, n < 1) for first, emc in kinds.values() for k, n in enumerate((0.8, 1.2))]
    rows[2]["test_accuracy"] = 0.25

    def at(race):
        return measured((pd.DataFrame([curve(0, 300, 1200, race)]), pd.DataFrame(rows)))

    assert at("")[0][0].post.ns.tolist() == [80, 120]
    won = at("won")[0][0]
    assert won.post.ns.tolist() == [160, 240]
    assert won.test_accuracy == 0.25
    expected = posterior([160, 240], [1, 0], [0, 1], n_min=2, n_max=1200)
    np.testing.assert_array_equal(won.post.weight, expected.weight)
    assert at("lost") == at("dropped") == ([], [])
    assert at("running")[1] == ["mlp, width 1, depth 1, adam, lr 0.01: the race of its learning rates is not decided"]


def test_the_gap_is_set_against_the_accuracy_of_side_b():
    params = [150, 200, 300, 400]
    a = scanned([0.3 * p for p in params], params, key=7)
    b = scanned([0.3 * p * f for p, f in zip(params, (1.1, 1.5, 2.0, 2.6), strict=True)], params, key=8, labels="true")
    fitted = b[1]["outcome"] == "fitted"
    b[1].loc[fitted, "test_accuracy"] = 0.5 + 0.05 * b[1]["variant"][fitted]
    about = compare(a, b, against="test_accuracy").association
    assert (about.points, about.left_out) == (4, 0)
    assert about.kendall.value == pytest.approx(1.0)
    assert about.pearson.value > 0.9
    assert compare(a, b, against="params").association.kendall.value == pytest.approx(1.0)
    empty = compare(b, a, against="test_accuracy").association
    assert (empty.points, empty.left_out) == (0, 4)
    assert empty.reason.startswith("0 points")
    with pytest.raises(UserError, match="numeric column"):
        compare(a, b, against="labels")


def test_selections():
    assert parse_selection(["width=8,16,labels=true", "width=4"]) == {"width": ["8", "16", "4"], "labels": ["true"]}
    frames = pd.DataFrame([curve(k, 10, 40, nesterov=k > 0) for k in range(3)]), pd.DataFrame([run(1, 5, 0, True)])
    assert select(frames, "nesterov=true,lr=1e-2")[0]["variant"].tolist() == [1, 2]
    assert select(frames, ())[0]["variant"].tolist() == [0, 1, 2]
    for text, why in (
        ("width=9", "no variant has it; there are 1, 2, 3"),
        ("size=1", "no such column"),
        ("8", "expected name=value"),
        ("width=", "expected name=value"),
    ):
        with pytest.raises(UserError, match=why):
            select(frames, text)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"match": "size"}, "match"),
        ({"correction": "none"}, "correction"),
        ({"interval": 90.0}, "interval"),
        ({"select_a": "optimizer=muon"}, "a"),
    ],
)
def test_bad_arguments(sides, arguments, option):
    with pytest.raises(UserError) as caught:
        compare(*sides, **arguments)
    assert caught.value.option == option


def test_sides_that_cannot_be_compared(sides):
    a, b = sides
    with pytest.raises(UserError, match="needs two selections"):
        compare(a)
    with pytest.raises(UserError, match="both selections hold mlp, width 1"):
        compare(a, select_a="width=1,2", select_b="width=1,2")
    with pytest.raises(UserError, match="the two sides differ in it"):
        compare(a, (b[0].assign(interval=0.95), b[1]))
    with pytest.raises(UserError, match="lacks the columns race"):
        compare(a, (b[0].drop(columns="race"), b[1]))


SPEC = {"data": "gaussian:8", "classes": 3, "widths": "3,6", "steps": 100, "check_every": 50, "max_probes": 8}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "two.h5"
    fasttrain.scan(fasttrain.ScanSpec(**SPEC, optimizer="sgd,adam", lr="0.05,0.01"), out=path)
    return path


def test_estimates_are_recomputed_from_the_probes_to_the_bit(file):
    results = fasttrain.load(file)
    found, missing = measured(results)
    assert missing == []
    assert len(found) == 4
    for one in found:
        for name in ("emc50", "emc50_low", "emc50_high", "slope", "lapse", "censored", "n_probes"):
            got = getattr(one.estimate, name)
            np.testing.assert_equal(str(got) if name == "censored" else got, one.row[name])


def test_a_real_file_from_the_command_line(file, capsys):
    line = ["compare", str(file), "--a", "optimizer=sgd", "--b", "optimizer=adam"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].endswith("2 pairs, matched by width")
    assert "optimizer (sgd against adam)" in lines[1]
    assert lines[3].split()[:6] == ["width", "depth", "params", "a", "b", "b/a"] or "lr" in lines[3]
    assert main([*line, "--json", "--against", "test_accuracy", "--correction", "bh"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["pairs"]) == 2
    assert found["correction"] == "Benjamini-Hochberg"
    assert found["association"]["reason"]
    frame = compare(fasttrain.load(file), select_a="optimizer=sgd", select_b="optimizer=adam").pairs
    for row, (_, expected) in zip(found["pairs"], frame.iterrows(), strict=True):
        for name in ("ratio", "ratio_low", "p"):
            assert row[name] == (expected[name] if math.isfinite(expected[name]) else None)
    assert main(["compare", str(file), str(file), "--match", "settings"]) == 0
    assert "nothing differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--a", "optimizer=sgd"], "--b not given: one file needs two selections"),
        (
            ["--a", "optimizer=sgd", "--b", "optimizer=muon"],
            "--b optimizer=muon: no variant has it; there are sgd, adam",
        ),
        (["--a", "width=3", "--b", "optimizer"], "--b optimizer: expected name=value"),
        (["--a", "optimizer=sgd", "--b", "width=6,optimizer=adam", "--match", "x"], "--match x: expected one of width"),
        (["--a", "width=3", "--b", "width=6", "--interval", "wide"], "--interval wide: expected a probability"),
        (["--a", "width=3,optimizer=sgd", "--b", "width=6", "--match", "params"], "--match params: no variant of a"),
    ],
)
def test_errors_are_one_line(file, capsys, arguments, says):
    assert main(["compare", str(file), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fasttrain: {says}")
    assert err.count("\n") == 1


def level(slope, lapse, pairs, key):
    """P-values of simulated searches of two variants of equal EMC50."""
    rng = np.random.default_rng(key)
    out = []
    for _ in range(pairs):
        emc = 1210 * math.exp(rng.uniform(math.log(0.15), 0.0))
        pair = []
        for _ in range(2):
            _, rounds = play(problem(), world(emc, slope, lapse, key=int(rng.integers(2**31))), **DEFAULTS)
            rows = [run(0, one.n, one.seed, fitted) for done in rounds for one, fitted in done.items()]
            pair.append(measured((pd.DataFrame([curve(0, 1210, 4840)]), pd.DataFrame(rows)))[0][0])
        out.append(p_equal(*pair))
    return np.array(out)


@pytest.mark.slow
@pytest.mark.parametrize(("slope", "lapse"), [(4.0, 0.0), (10.0, 0.0), (25.0, 0.0), (10.0, 0.05)])
def test_the_test_holds_its_level_under_the_search(slope, lapse):
    p = level(slope, lapse, 300, key=21)
    for alpha in (0.05, 0.01):
        assert (p < alpha).mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / len(p))
