"""The search: the same probes in whatever order results come, within its limits, ending, and calibrated."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from fasttrain import search as module
from fasttrain.records import Censored, History, Outcome, Probe, ProbeResult, Problem
from fasttrain.search import END_PROBES, ROUND_PROBES, Limits, Search, next_round
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
EMPTY = History(np.empty(0, np.int64), np.empty(0), np.empty(0))
DEFAULTS = {"seeds": 16, "interval": 0.9, "tolerance": 0.1, "max_probes": 96}


def problem(index=0, params=1210, n_min=2, n_max=4840):
    return Problem(index=index, variant=VARIANT, params=params, n_min=n_min, n_max=n_max)


def result(probe, fitted):
    outcome = Outcome.FITTED if fitted else Outcome.PLATEAUED
    return ProbeResult(probe, outcome, 100, 100 if fitted else -1, 0.1, 0.0 if fitted else 0.1, EMPTY)


def world(emc=600.0, slope=10.0, lapse=0.0, key=0):
    """Verdicts that depend on the probe alone, as a trainer's do."""

    def fitted(probe):
        z = min(slope * math.log(probe.n / emc), 600.0)
        p = (1 - lapse) / (1 + (1 - 2 * lapse) * math.exp(z))
        return np.random.default_rng([key, probe.variant, probe.n, probe.seed]).random() < p

    return fitted


def play(the_problem, fitted, **limits):
    """All rounds of one variant by ``next_round`` alone, and the last estimate."""
    rounds = []
    while True:
        estimate, probes, _ = next_round(the_problem, rounds, Limits(**{**DEFAULTS, **limits}))
        assert (not probes) == estimate.finished
        if not probes:
            return estimate, rounds
        rounds.append({probe: bool(fitted(probe)) for probe in probes})


def check_limits(the_problem, rounds, seeds, max_probes):
    probes = [probe for finished in rounds for probe in finished]
    assert len(probes) <= max_probes
    assert len({(probe.n, probe.seed) for probe in probes}) == len(probes)
    assert all(the_problem.n_min <= probe.n <= the_problem.n_max for probe in probes)
    for n, count in Counter(probe.n for probe in probes).items():
        assert count <= seeds
        assert sorted(probe.seed for probe in probes if probe.n == n) == list(range(count))
    for number, finished in enumerate(rounds):
        ns = [probe.n for probe in finished]
        assert ns == sorted(ns, reverse=True)
        assert {probe.round for probe in finished} == {number}


PROBLEMS = [problem(4), problem(1, params=130, n_max=520), problem(7, params=40, n_max=300)]


def run_search(order, batch, alone=False):
    """The probes asked for and the last estimates; ``order`` rearranges what is outstanding."""
    fitted = world(emc=150.0, slope=6.0, lapse=0.02)
    groups = [[one] for one in PROBLEMS] if alone else [PROBLEMS]
    asked, estimates = [], []
    for group in groups:
        search = Search(group, **DEFAULTS)
        waiting = []
        while not search.done:
            new = search.ask()
            asked += new
            waiting += new
            order(waiting)
            search.tell([result(probe, fitted(probe)) for probe in waiting[:batch]])
            del waiting[:batch]
        assert search.ask() == []
        assert not waiting
        estimates += search.estimates()
    assert len(set(asked)) == len(asked)
    return set(asked), estimates


@pytest.mark.parametrize(
    ("order", "batch", "alone"),
    [
        (random.Random(1).shuffle, 1, False),
        (random.Random(2).shuffle, 5, False),
        (lambda waiting: waiting.sort(key=lambda probe: (probe.variant, probe.n)), 1, False),
        (lambda waiting: waiting.sort(key=lambda probe: (-probe.variant, probe.seed)), 3, False),
        (random.Random(3).shuffle, 2, True),
    ],
)
def test_the_probes_and_estimates_are_the_same_in_whatever_order_results_come(order, batch, alone):
    asked, estimates = run_search(order, batch, alone)
    reference, reference_estimates = run_search(lambda waiting: None, 10**6)
    assert asked == reference
    assert estimates == reference_estimates
    assert [estimate.variant for estimate in estimates] == [4, 1, 7]


def test_the_search_is_next_round_replayed():
    fitted = world()
    last, rounds = play(problem(), fitted)
    search = Search([problem()], **DEFAULTS)
    for finished in rounds:
        assert search.ask() == list(finished)
        search.tell([result(probe, verdict) for probe, verdict in finished.items()])
    assert search.done
    assert search.estimates() == [last]


def test_a_resumed_search_asks_only_for_what_was_not_stored():
    fitted = world()
    last, rounds = play(problem(), fitted)
    probes = [probe for finished in rounds for probe in finished]
    missing = {probes[2], probes[-1]}
    stored = [result(probe, fitted(probe)) for probe in reversed(probes) if probe not in missing]
    search = Search([problem()], **DEFAULTS)
    search.tell(stored)
    assert search.ask() == [probes[2]]
    search.tell([result(probes[2], fitted(probes[2]))])
    assert search.ask() == [probes[-1]]
    search.tell([result(probes[-1], fitted(probes[-1]))])
    assert search.done
    assert search.estimates() == [last]


def test_an_estimate_waits_for_its_round_and_is_computed_once_a_round(monkeypatch):
    calls = []
    inner = module.posterior
    monkeypatch.setattr(module, "posterior", lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs))
    search = Search([problem(0), problem(1)], **DEFAULTS)
    first = [probe for probe in search.ask() if probe.variant == 0]
    before = search.estimates()
    for probe in first[:-1]:
        search.tell([result(probe, probe.n < 600)])
        assert search.estimates() == before
    assert len(calls) == 2
    search.tell([result(first[-1], True)])
    assert search.estimates()[0].n_probes == len(first)
    assert search.estimates()[1] == before[1]
    assert len(calls) == 3


def test_results_that_cannot_be_are_refused():
    search = Search([problem()], **DEFAULTS)
    probe = search.ask()[0]
    search.tell([result(probe, False)])
    search.tell([result(probe, False)])
    with pytest.raises(ValueError, match="other verdict"):
        search.tell([result(probe, True)])
    with pytest.raises(ValueError, match="no variant"):
        search.tell([result(Probe(9, 10, 0), True)])


ADVERSARIES = {
    "all fit": lambda probe: True,
    "none fits": lambda probe: False,
    "alternating": lambda probe: probe.n % 2 == 0,
    "alternating seeds": lambda probe: probe.seed % 2 == 0,
    "rising": lambda probe: probe.n > 40,
    "step": lambda probe: probe.n <= 40,
    "coin": lambda probe: np.random.default_rng([probe.n, probe.seed]).random() < 0.5,
}
RANGES = [(2, 3), (2, 100), (1, 5000), (39, 41), (2, 10**18)]


@pytest.mark.parametrize("fitted", ADVERSARIES.values(), ids=ADVERSARIES)
@pytest.mark.parametrize("bounds", RANGES)
def test_it_ends_within_its_limits_whatever_the_outcomes(fitted, bounds):
    for params in (1, 80, 10**6):
        for seeds, max_probes in ((1, 40), (3, 7), (16, 1), (16, 40)):
            one = problem(params=params, n_min=bounds[0], n_max=bounds[1])
            last, rounds = play(one, fitted, seeds=seeds, max_probes=max_probes, tolerance=0.01)
            check_limits(one, rounds, seeds, max_probes)
            assert last.n_probes == sum(map(len, rounds)) >= 1


def test_a_budget_is_spent_to_the_last_probe_and_said_to_be():
    last, rounds = play(problem(), world(slope=4.0), tolerance=0.001, max_probes=45)
    assert last.n_probes == 45
    assert last.budget_spent
    assert len(rounds[-1]) < ROUND_PROBES


def test_a_met_tolerance_is_not_a_spent_budget():
    last, _ = play(problem(), lambda probe: probe.n <= 600)
    assert not last.budget_spent
    assert (last.emc50_high - last.emc50_low) / 2 <= 0.1 * last.emc50
    assert last.emc50_low < 600 < last.emc50_high


def test_a_smaller_tolerance_takes_more_probes_and_is_met():
    loose, _ = play(problem(), world(slope=25.0), max_probes=2000, seeds=50)
    tight, rounds = play(problem(), world(slope=25.0), tolerance=0.01, max_probes=2000, seeds=50)
    assert tight.n_probes > loose.n_probes
    assert not tight.budget_spent
    assert tight.emc50_high - tight.emc50_low <= 0.02 * tight.emc50
    assert tight.emc50 == pytest.approx(600, rel=0.02)
    check_limits(problem(), rounds, 50, 2000)


def test_fits_up_to_n_max_end_as_censored_above_after_a_handful_of_probes_there():
    last, rounds = play(problem(n_max=300), lambda probe: True)
    assert last.censored is Censored.ABOVE
    assert (last.emc50_low, last.emc50_high, last.budget_spent) == (300.0, math.inf, False)
    there = sum(probe.n == 300 for finished in rounds for probe in finished)
    assert there == END_PROBES + 1


def test_failures_down_to_n_min_end_as_censored_below_after_a_handful_of_probes_there():
    last, rounds = play(problem(n_min=100), lambda probe: False)
    assert last.censored is Censored.BELOW
    assert (last.emc50_low, last.emc50_high, last.budget_spent) == (0.0, 100.0, False)
    there = sum(probe.n == 100 for finished in rounds for probe in finished)
    assert there == END_PROBES + 1


@pytest.mark.parametrize("emc", [12, 40, 130, 2000, 60_000])
def test_the_bracket_finds_an_emc_far_from_the_parameter_count(emc):
    last, _ = play(problem(params=1210, n_max=10**6), lambda probe: probe.n <= emc)
    assert last.emc50_low < emc + 1
    assert emc < last.emc50_high
    assert not last.budget_spent
    assert last.n_probes <= 40


def test_probes_left_is_at_least_the_open_round_at_most_the_budget_and_ends_at_zero():
    fitted = world(slope=4.0)
    search = Search([problem()], **{**DEFAULTS, "tolerance": 0.05})
    left = []
    while not search.done:
        probes = search.ask()
        left.append(search.probes_left(0))
        assert len(probes) <= left[-1] <= 96 - search.estimates()[0].n_probes
        search.tell([result(probe, fitted(probe)) for probe in probes])
    assert search.probes_left(0) == 0
    assert left[-1] < left[1]


def simulate(slope, lapse, repeats, key):
    """Log errors of EMC50 and whether each interval covers it, EMC50 drawn from params / 7 to params."""
    rng = np.random.default_rng(key)
    errors, covered = [], []
    for _ in range(repeats):
        emc = 1210 * math.exp(rng.uniform(math.log(0.15), 0.0))
        last, _ = play(problem(), world(emc, slope, lapse, key=int(rng.integers(2**31))))
        errors.append(math.log(last.emc50 / emc))
        covered.append(last.emc50_low <= emc <= last.emc50_high)
    return np.array(errors), np.array(covered)


def assert_calibrated(errors, covered):
    # 0.86 is the aim for 90 % intervals with stopping inside, less three binomial errors. A slope of 4 falls
    # a little short of it (0.846 in 1000 runs), which this bound does not resolve.
    repeats = len(covered)
    assert covered.mean() > 0.86 - 3 * math.sqrt(0.86 * 0.14 / repeats)
    assert abs(errors.mean()) < 0.02 + 3 * errors.std() / math.sqrt(repeats)


@pytest.mark.parametrize(("slope", "lapse"), [(10.0, 0.0), (10.0, 0.05)])
def test_intervals_cover_and_emc50_is_unbiased_in_a_short_simulation(slope, lapse):
    assert_calibrated(*simulate(slope, lapse, 60, key=11))


@pytest.mark.slow
@pytest.mark.parametrize("slope", [4.0, 10.0, 25.0])
@pytest.mark.parametrize("lapse", [0.0, 0.05])
def test_intervals_cover_and_emc50_is_unbiased(slope, lapse):
    errors, covered = simulate(slope, lapse, 400, key=12)
    assert_calibrated(errors, covered)
    assert abs(errors.mean()) < 0.02


@pytest.mark.slow
def test_coverage_is_the_stated_content_when_slopes_follow_the_prior():
    rng = np.random.default_rng(13)
    covered = np.array(
        [simulate(math.exp(rng.normal(math.log(10.0), 0.9)), 0.2 * rng.beta(1, 5), 1, key)[1][0] for key in range(500)]
    )
    assert abs(covered.mean() - 0.9) < 3 * math.sqrt(0.09 / 500) + 0.02
