"""Estimates from stored runs: equal to the scan's own, true where the truth is known, and clear on what they assume."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_search import EMPTY

import fasttrain
from fasttrain import ScanSpec, UserError
from fasttrain.analysis import Results
from fasttrain.cli import main
from fasttrain.designs import design_of, ladder
from fasttrain.estimators import ESTIMATORS, emc50, nakkiran, paper
from fasttrain.records import Outcome, ProbeResult, Problem
from fasttrain.search import Search
from fasttrain.spec import SHORT
from fasttrain.store import MemoryStore

TINY = {"data": "gaussian:8", "classes": 2, "steps": 200, "check_every": 50, "device": "cpu"}


def fit_probability(n, emc, slope, lapse=0.0):
    return (1 - lapse) / (1 + (1 - 2 * lapse) * np.exp(np.minimum(slope * np.log(np.asarray(n) / emc), 600.0)))


def table(rows):
    """Rows of /probes, of variant 0, from (n, seed, outcome, train_error)."""
    columns = ["n", "seed", "outcome", "train_error"]
    frame = pd.DataFrame(rows, columns=columns).astype({"n": "int64", "seed": "int64", "train_error": "float64"})
    return frame.assign(variant=0, round=0)


def row(**changes):
    """A row of /curves, as far as the estimators read it."""
    fields = {
        "variant": 0, "n_min": 100, "n_max": 4000, "interval": 0.9, "search": "paper", "growth": 1.1, "race": "",
        "finished": True, "budget_spent": False, "n_probes": 10**6,
    }  # fmt: skip
    return pd.Series({**fields, **changes}, dtype=object)


def climbed(fits, rungs):
    """Rows of ladders that fitted so many rungs each, up to the failure."""
    runs = []
    for seed, count in enumerate(fits):
        runs += [(n, seed, "fitted", 0.0) for n in rungs[:count]]
        runs += [(n, seed, "plateaued", 0.01) for n in rungs[count : count + 1]]
    return table(runs)


RUNGS = ladder(Problem(0, None, 1000, 100, 4000), 1.1)


def played(spec, fitted, problems, stop=10**9):
    """The results of a scan whose runs' verdicts are made up, cut short after so many of them."""
    store = MemoryStore()
    store.begin(spec, problems, {})
    search = Search(
        problems, seeds=spec.seeds, interval=spec.interval, tolerance=spec.tolerance, max_probes=spec.max_probes,
        races=spec.races, design=design_of(spec),
    )  # fmt: skip
    waiting, done = [], 0
    while not search.done and done < stop:
        waiting += search.ask()
        probe = waiting.pop(0)
        fit = fitted(probe)
        outcome = Outcome.FITTED if fit else Outcome.PLATEAUED
        result = ProbeResult(probe, outcome, 9, 9 if fit else -1, 0.1, 0.0 if fit else 0.1, EMPTY)
        store.append([result])
        search.tell([result])
        done += 1
    store.put_curves(search.estimates())
    store.finish("complete" if search.done else "interrupted", {})
    return Results.from_memory(store)


def equal_to_the_curves(results):
    found = fasttrain.estimates(results)
    for ours, theirs in (("estimate", "emc50"), ("low", "emc50_low"), ("high", "emc50_high")):
        np.testing.assert_array_equal(found[ours].to_numpy(), results.curves[theirs].to_numpy())
    assert found["censored"].tolist() == results.curves["censored"].tolist()
    assert found["n_probes"].tolist() == results.curves["n_probes"].tolist()
    return found


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """A real scan of four variants in two races, from its file."""
    spec = ScanSpec(**TINY, widths=(3, 6), lr=(0.03, 0.0001), max_probes=14)
    return fasttrain.scan(spec, out=tmp_path_factory.mktemp("raced") / "a.h5")


def test_emc50_of_a_real_scan_is_computed_again_to_the_last_bit(raced):
    found = equal_to_the_curves(raced)
    assert raced.curves["race"].value_counts()["won"] == 2
    assert found["estimate"].notna().any()
    assert list(found.columns) == [
        "variant", "width", "lr", "params", "race", "estimate", "low", "high", "censored", "n_probes", "warnings"
    ]  # fmt: skip
    assert (found["warnings"].str.contains("ran out") == raced.curves["budget_spent"]).all()


def test_emc50_leaves_out_runs_at_a_third_of_the_budget(raced):
    short = raced.probes[raced.probes["outcome"] == "fitted"].iloc[:6].copy()
    short["seed"] += SHORT
    more = pd.concat([raced.probes, short.assign(n=5000, variant=1)])
    for _, one in raced.curves.iterrows():
        assert emc50(more, one) == emc50(raced.probes, one)


VARIANTS = ScanSpec(widths=(4, 8)).variants(10)
PROBLEMS = [Problem(i, variant, 1000, 100, 4000) for i, variant in enumerate(VARIANTS)]


def made_up(emc=450.0, slope=6.0):
    return lambda probe: (
        np.random.default_rng([probe.variant, probe.n, probe.seed]).random()
        < fit_probability(probe.n, emc, slope, 0.02)
    )


@pytest.mark.parametrize("stop", [0, 1, 7, 23, 50])
@pytest.mark.parametrize("search", ["adaptive", "paper"])
def test_a_scan_that_was_stopped_counts_its_whole_rounds(stop, search):
    results = played(ScanSpec(widths=(4, 8), search=search, seeds=8), made_up(), PROBLEMS, stop)
    assert len(results.probes) == stop
    assert results.attrs["status"] == "interrupted"
    found = equal_to_the_curves(results)
    assert found["warnings"].str.contains("has not ended").all()
    if search == "paper":
        assert fasttrain.estimates(results, "paper")["n_probes"].tolist() == results.curves["n_probes"].tolist()


def test_a_stopped_race_and_a_stopped_confirmation():
    spec = ScanSpec(widths=4, lr=(0.1, 0.01))
    problems = [Problem(i, variant, 1000, 100, 4000) for i, variant in enumerate(spec.variants(10))]
    stands = set()
    for stop in (0, 11, 25, 40, 55):
        results = played(spec, lambda probe: made_up(450.0 - 230.0 * probe.variant)(probe), problems, stop)
        equal_to_the_curves(results)
        stands |= set(results.curves["race"])
    assert {"running", "won"} <= stands


def test_the_ladders_are_exact_and_their_mean_is_geometric_with_students_interval():
    fits = [3, 5, 5, 9]
    probes = climbed(fits, RUNGS).sample(frac=1, random_state=1)
    found = paper(probes, row())
    ends = np.log([RUNGS[count - 1] for count in fits])
    assert found.estimate == pytest.approx(math.exp(ends.mean()), rel=1e-12)
    interval = stats.ttest_1samp(ends, 0.0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)), rel=1e-12)
    assert (found.censored, found.n_probes, found.warnings) == ("no", sum(fits) + 4, ())
    assert paper(probes, row(), 0.99).low < found.low


def test_the_first_failure_counts_also_where_more_is_fitted_above_it():
    probes = table([(100, 0, "fitted", 0), (110, 0, "diverged", 1), (121, 0, "fitted", 0), (100, 1, "fitted", 0)])
    probes = pd.concat([probes, table([(110, 1, "out_of_budget", 0.1)])])
    assert paper(probes, row()).estimate == pytest.approx(100)


def test_equal_ladders_still_have_an_interval():
    """A rung that 2 of 100 ladders would end at is not seen in four of them, so it cannot be ruled out."""
    found = paper(climbed([5] * 4, RUNGS), row())
    assert found.estimate == pytest.approx(RUNGS[4])
    share = math.log(found.high / found.estimate) / math.log(1.1)
    assert (1 - share) ** 4 == pytest.approx(0.05)
    assert found.low * found.high == pytest.approx(RUNGS[4] ** 2)


@pytest.mark.parametrize(
    ("fits", "kind", "says"),
    [
        ([0, 4, 5, 6, 7], "no", "1 of 5 ladders failed at the first n, 100 (seeds 0)"),
        ([0, 4, 0, 0, 7], "below", "3 of 5 ladders failed at the first n, 100 (seeds 0, 2, 3)"),
        ([99, 4, 5, 6, 7], "no", "1 of 5 ladders fitted n-max, 4000 (seeds 0)"),
        ([99] * 5, "above", "5 of 5 ladders fitted n-max, 4000 (seeds 0, 1, 2, 3, 4)"),
    ],
)
def test_ladders_that_only_bound_open_the_interval_and_are_named(fits, kind, says):
    found = paper(climbed(fits, RUNGS), row())
    assert found.censored == kind
    assert math.isnan(found.estimate) == (kind != "no")
    assert found.low == 0.0 if 0 in fits else found.low > 0
    assert found.high == math.inf if 99 in fits else found.high < 4000
    assert found.warnings[0].startswith(says)


def test_ladders_that_were_cut_short_bound_from_below():
    cut = climbed([6, 6, 6, 9], RUNGS)
    cut = cut[~((cut["seed"] == 3) & (cut["n"] > RUNGS[5]))]
    found = paper(cut, row())
    assert found.warnings[0].startswith("1 of 4 ladders were stopped before a failure (seeds 3)")
    assert (found.high, found.censored) == (math.inf, "no")
    assert found.estimate == pytest.approx(RUNGS[5])


def test_one_ladder_or_none_has_no_interval():
    one = paper(climbed([5], RUNGS), row())
    assert (one.estimate, one.low, one.high) == (pytest.approx(RUNGS[4]), 0.0, math.inf)
    assert "there is one" in one.warnings[0]
    none = paper(climbed([], RUNGS), row())
    assert (none.low, none.high, none.n_probes) == (0.0, math.inf, 0)
    assert math.isnan(none.estimate)


def ends_of_ladders(emc, slope, lapse, n_min=188, growth=1.1):
    """The n at which a ladder may end, and the probability of each: what the verdicts' probabilities imply."""
    rungs = ladder(Problem(0, None, 1500, n_min, 8 * n_min), growth)
    p = fit_probability(rungs, emc, slope, lapse)
    fitted_so_far = np.cumprod(p)
    ends = np.array([rungs[0], *rungs[:-1]])  # a failure at the first n counts there
    return rungs, p, np.log(ends), np.concatenate([[1.0], fitted_so_far[:-1]]) * (1 - p)


def test_how_far_ladders_end_below_emc50_is_what_the_document_says():
    """By the sum over all places where a ladder may end, and over where EMC50 lies between two n."""
    text = (Path(__file__).parents[1] / "docs" / "measuring.md").read_text(encoding="utf-8")
    table = text[text.index("| slope | without lapses") :].split("\n\n")[0].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == ["4", "10", "25"]
    for line in table:
        slope, *said = (float(cell.strip(" %").replace("none", "0")) for cell in line.strip("|").split("|"))
        for lapse, below in zip((0.0, 0.02), said, strict=True):
            off = []
            for emc in 600 * 1.1 ** np.linspace(-0.5, 0.5, 11):
                _, _, logs, probability = ends_of_ladders(emc, slope, lapse)
                assert probability.sum() == pytest.approx(1.0, abs=1e-6)
                off.append((probability * logs).sum() - math.log(emc))
            assert 100 * (1 - math.exp(np.mean(off))) == pytest.approx(below, abs=0.06)


LONG = pytest.mark.slow


@pytest.mark.parametrize(
    ("slope", "lapse", "repeats"),
    [
        (4, 0.0, 60),
        (25, 0.0, 60),
        *(pytest.param(*case, 1500, marks=LONG) for case in ((4, 0.0), (10, 0.0), (10, 0.02))),
    ],
)
def test_the_interval_of_the_ladders_covers_their_own_mean(slope, lapse, repeats):
    rungs, p, logs, probability = ends_of_ladders(600.0, slope, lapse)
    target = math.exp((probability * logs).sum())
    rng = np.random.default_rng(17)
    covered, centres = 0, []
    one = row(n_min=rungs[0], n_max=rungs[-1])
    for _ in range(repeats):
        failed = rng.random((16, len(rungs))) >= p
        fits = np.where(failed.any(1), failed.argmax(1), len(rungs)).tolist()
        found = paper(climbed(fits, rungs), one)
        covered += found.low <= target <= found.high
        centres.append(math.log(found.estimate / target))
    # 0.866 and more in 3,000 repetitions (docs/measuring.md has the range), less three binomial errors of these.
    assert covered / repeats > 0.866 - 3 * math.sqrt(0.866 * 0.134 / repeats)
    assert abs(np.mean(centres)) < 3 * np.std(centres) / math.sqrt(repeats)


GRID = np.array([100, 140, 200, 280, 400, 560, 800])


def mean_error(n, eps_at, slope=1.5):
    """Expected train error, 0.1 at ``eps_at``."""
    return 1.0 / (1.0 + 9.0 * (np.asarray(n) / eps_at) ** -slope)


def complete_runs(eps_at, seeds, rng, grid=GRID):
    """Runs whose train errors scatter by about a third of their mean; those without an error have fitted."""
    means = np.repeat(mean_error(grid, eps_at), seeds)
    errors = rng.beta(9 * (1 - means), 9 * (1 - means) * (1 - means) / means)
    n = np.repeat(grid, seeds)
    runs = zip(n, np.tile(np.arange(seeds), len(grid)), errors, strict=True)
    return table([(a, seed, "out_of_budget", error) for a, seed, error in runs])


def test_nakkirans_emc_is_where_the_error_crosses_eps_by_hand():
    probes = table(
        [
            (100, 0, "fitted", 0.0), (100, 1, "fitted", 0.0),
            (200, 0, "out_of_budget", 0.06), (200, 1, "fitted", 0.0),
            (400, 0, "out_of_budget", 0.20), (400, 1, "diverged", 0.34),
            (800, 0, "out_of_budget", 0.2), (800, 1, "out_of_budget", 0.2),
        ]
    )  # fmt: skip
    # Means 0, 0.03, 0.27, 0.2; the last two pooled to 0.235.
    found = nakkiran(probes, row(search="grid"))
    assert found.estimate == pytest.approx(200 * 2 ** ((0.1 - 0.03) / (0.235 - 0.03)))
    assert (found.censored, found.n_probes, found.warnings) == ("no", 8, ())
    assert 100 < found.low < found.estimate < found.high < 400
    assert nakkiran(probes, row(search="grid"), eps=0.03).estimate == pytest.approx(200)
    assert nakkiran(probes, row(search="grid"), eps=0.01).estimate == pytest.approx(100 * 2 ** (1 / 3))


def test_nakkirans_emc_beyond_what_was_tried_is_censored():
    probes = complete_runs(300.0, 6, np.random.default_rng(1))
    above = nakkiran(probes, row(), eps=0.9)
    assert (above.censored, above.low, above.high) == ("above", 800.0, math.inf)
    below = nakkiran(probes, row(), eps=0.001)
    assert (below.censored, below.low, below.high) == ("below", 0.0, 100.0)
    assert math.isnan(above.estimate)
    assert math.isnan(below.estimate)


def test_runs_that_were_stopped_early_are_left_out_and_counted():
    probes = complete_runs(300.0, 6, np.random.default_rng(1))
    whole = nakkiran(probes, row())
    stopped = probes.assign(outcome="plateaued", train_error=1.0, seed=probes["seed"] + 50)
    found = nakkiran(pd.concat([probes, stopped]), row())
    assert (found.estimate, found.low, found.high, found.n_probes) == (whole.estimate, whole.low, whole.high, 42)
    assert found.warnings[0].startswith("42 of 84 runs were stopped early and are left out")
    assert "too high" in found.warnings[0]
    assert "--no-early-stop" in found.warnings[0]
    nothing = nakkiran(stopped, row())
    assert (nothing.low, nothing.high, nothing.n_probes) == (0.0, math.inf, 0)
    assert math.isnan(nothing.estimate)


def test_single_runs_have_no_scatter_and_around_the_crossing_no_interval():
    found = nakkiran(complete_runs(300.0, 1, np.random.default_rng(1)), row())
    assert (found.low, found.high) == (0.0, math.inf)
    assert 200 < found.estimate < 400
    assert "two runs at an n next to the crossing" in found.warnings[0]
    rng = np.random.default_rng(1)
    probes = complete_runs(300.0, 6, rng)
    some = nakkiran(probes[(probes["n"] != 100) | (probes["seed"] == 0)], row())
    assert some.warnings == ()
    assert 200 < some.low < some.estimate < some.high < 500


def test_the_same_runs_give_the_same_interval_in_any_order():
    probes = complete_runs(300.0, 6, np.random.default_rng(1))
    shuffled = probes.sample(frac=1, random_state=3).sort_values("seed", kind="stable")
    assert nakkiran(probes, row()) == nakkiran(probes, row())
    assert nakkiran(shuffled, row()).estimate == pytest.approx(nakkiran(probes, row()).estimate, rel=1e-12)


@pytest.mark.parametrize(
    ("seeds", "repeats"), [(6, 80), pytest.param(4, 400, marks=LONG), pytest.param(12, 400, marks=LONG)]
)
def test_the_interval_of_nakkirans_emc_covers_the_crossing(seeds, repeats, monkeypatch):
    monkeypatch.setattr("fasttrain.estimators.REPLICATES", 200)
    rng = np.random.default_rng(23)
    covered, errors = 0, []
    for _ in range(repeats):
        truth = 300 * math.exp(rng.uniform(-0.3, 0.3))
        found = nakkiran(complete_runs(truth, seeds, rng), row(search="grid"))
        covered += found.low <= truth <= found.high
        errors.append(math.log(found.estimate / truth))
    # 0.84 and more in 400 repetitions (docs/measuring.md), less three binomial errors of these.
    assert covered / repeats > 0.84 - 3 * math.sqrt(0.84 * 0.16 / repeats)
    assert abs(np.mean(errors)) < 0.02 + 3 * np.std(errors) / math.sqrt(repeats)


def test_an_estimator_that_cannot_be_had_says_what_it_needs(raced):
    with pytest.raises(UserError, match="--search paper makes; the runs of this one are of --search adaptive"):
        fasttrain.estimates(raced, "paper")
    for options, name in (
        ({"estimator": "mean"}, "estimator"),
        ({"eps": 0.1}, "eps"),
        ({"estimator": "nakkiran", "eps": 1.0}, "eps"),
        ({"interval": 0.0}, "interval"),
    ):
        with pytest.raises(UserError) as caught:
            fasttrain.estimates(raced, **options)
        assert caught.value.option == name


def test_the_frame_says_what_it_rests_on(raced):
    found = fasttrain.estimates(raced, "nakkiran", eps=0.05, interval=0.5)
    assert (found.attrs["estimator"], found.attrs["interval"]) == ("nakkiran", 0.5)
    assert "at most 0.05" in found.attrs["assumes"]
    wide = fasttrain.estimates(raced, interval=0.99)
    assert (wide["low"] <= fasttrain.estimates(raced)["low"]).all()


def test_show_prints_the_estimator_its_assumptions_and_its_warnings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = ScanSpec(widths=(4, 8), search="paper", seeds=4, max_probes=18)
    results = played(spec, lambda probe: probe.n < 130 + 200 * probe.variant, PROBLEMS)
    monkeypatch.setitem(fasttrain.__dict__, "load", lambda path: results)
    assert main(["show", "emc.h5", "--estimator", "paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "width  depth  params  EMC (paper)  90% interval  EMC/param  runs  notes",
        "    4      1    1000          121  [115, 127]        0.121    16",
        "    8      1    1000        > 131                  > 0.131    18  above what was tried, runs used up",
    ]
    assert lines[6] == f"EMC (paper): {ESTIMATORS['paper'][1]}"
    assert lines[7].startswith("width 8, depth 1: 4 of 4 ladders were stopped before a failure (seeds 0, 1, 2, 3)")
    assert len(lines) == 10
    assert main(["show", "emc.h5", "--estimator", "emc50"]) == 0
    assert "EMC50: The n that half of the training runs fit" in capsys.readouterr().out
    assert main(["show", "emc.h5", "--estimator", "nakkiran", "--eps", "0.05"]) == 0
    assert "error of at most 0.05" in capsys.readouterr().out
    for options, says in (
        (["--eps", "0.1"], "--eps 0.1: goes with --estimator nakkiran"),
        (["--estimator", "nakkiran", "--eps", "x"], "--eps x: expected a number"),
        (["--estimator", "x"], "--estimator x: expected one of emc50, paper, nakkiran"),
    ):
        assert main(["show", "emc.h5", *options]) == 2
        assert capsys.readouterr().err.startswith(f"fasttrain: {says}")


def test_the_help_names_the_estimators(capsys):
    assert main(["show", "--help"]) == 0
    assert "|".join(ESTIMATORS) in "".join(capsys.readouterr().out.split())
