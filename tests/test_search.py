"""The search: the same probes in whatever order results come, within its limits, ending, and calibrated."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.calibration import STEPS, Curve
from fasttrain import search as module
from fasttrain.records import Censored, History, Outcome, Probe, ProbeResult, Problem
from fasttrain.search import END_PROBES, LEAST_SHORT, ROUND_PROBES, Limits, Search, next_round
from fasttrain.spec import CONFIRM, SHORT, Variant

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
    with pytest.raises(ValueError, match="another verdict"):
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
    assert len(rounds[-1]) < sum(map(len, rounds[:-1]))


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
    assert END_PROBES + 1 <= there <= 2 * END_PROBES


def test_failures_down_to_n_min_end_as_censored_below_after_a_handful_of_probes_there():
    last, rounds = play(problem(n_min=100), lambda probe: False)
    assert last.censored is Censored.BELOW
    assert (last.emc50_low, last.emc50_high, last.budget_spent) == (0.0, 100.0, False)
    there = sum(probe.n == 100 for finished in rounds for probe in finished)
    assert END_PROBES + 1 <= there <= 2 * END_PROBES


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


def test_rounds_grow_to_what_the_tolerance_seems_to_want_but_never_more_than_double():
    last, rounds = play(problem(), world(slope=4.0), max_probes=2000, seeds=50)
    sizes = [len(finished) for finished in rounds]
    assert sizes[1] == ROUND_PROBES
    assert max(sizes) > 2 * ROUND_PROBES
    for k in range(1, len(sizes)):
        assert sizes[k] <= max(sum(sizes[:k]), ROUND_PROBES)
    assert not last.budget_spent


@pytest.mark.parametrize(("tolerance", "fewest"), [(0.08, 32), (0.1, 32), (0.15, 21), (0.2, 16), (0.5, 16)])
def test_no_interval_of_few_probes_ends_a_search(tolerance, fewest):
    """Separated at once, as a shallow curve may be by chance: the interval is narrow long before it may be believed."""
    last, rounds = play(problem(), lambda probe: probe.n <= 600, tolerance=tolerance)
    before = sum(map(len, rounds[:-1]))
    assert before < fewest <= last.n_probes
    seen, _, _ = next_round(problem(), rounds[:-1], Limits(**{**DEFAULTS, "tolerance": tolerance}))
    assert not seen.finished
    assert tolerance < 0.5 or (seen.emc50_high - seen.emc50_low) / (2 * seen.emc50) < tolerance


def test_a_slope_that_may_well_be_shallow_keeps_a_search_going():
    """At equal width of the interval, the one whose slope is known ends."""
    spread = {n: [n % 7 != 0 and n < 640] for n in range(560, 640, 4)} | {n: [n % 5 == 0] for n in range(641, 700, 3)}
    for verdicts, narrow in (({500: [True] * 16, 700: [False] * 16}, False), ({**spread, 500: [True] * 90}, True)):
        estimate, _, post = next_round(problem(), [], Limits(**DEFAULTS), known=verdicts)
        half_width = (estimate.emc50_high - estimate.emc50_low) / (2 * estimate.emc50)
        just_met = Limits(**{**DEFAULTS, "tolerance": 1.001 * half_width})
        assert module._narrow(estimate, post, just_met) == narrow
        assert not module._narrow(estimate, post, Limits(**{**DEFAULTS, "tolerance": 0.999 * half_width}))


def run_steps(problem, n, short):
    return STEPS // 3 if short else STEPS


def shortened(problems, curve, **limits):
    """A whole search with short probes, on the verdicts of a curve; the search, and all probes."""
    search = Search(problems, **{**DEFAULTS, **limits}, run_steps=run_steps)
    asked = []
    while not search.done:
        probes = search.ask()
        asked += probes
        search.tell([fit_result(probe, curve) for probe in probes])
    return search, asked


def fit_result(probe, curve, key=0):
    step = curve.fit_step(probe.n, float(np.random.default_rng([key, probe.n, probe.seed]).random()))
    fitted = step <= (STEPS // 3 if probe.short else STEPS)
    outcome = Outcome.FITTED if fitted else Outcome.OUT_OF_BUDGET
    return ProbeResult(probe, outcome, 1, math.ceil(step) if fitted else -1, 0.1, 0.0, EMPTY)


def test_short_probes_come_last_and_change_nothing_at_the_full_budget():
    curve = Curve(600.0, 10.0, elasticity=0.3)
    search, asked = shortened([problem()], curve)
    plain = Search([problem()], **DEFAULTS)
    while not plain.done:
        plain.tell([fit_result(probe, curve) for probe in plain.ask()])
    (found,), (alone,) = search.estimates(), plain.estimates()
    first = next(i for i, probe in enumerate(asked) if probe.short)
    assert all(probe.short for probe in asked[first:])
    assert len(asked) - first >= LEAST_SHORT
    assert first == found.n_probes == alone.n_probes
    assert (found.emc50, found.emc50_low, found.emc50_high) == (alone.emc50, alone.emc50_low, alone.emc50_high)
    assert (alone.third, math.isnan(alone.elasticity)) == (None, True)
    assert found.third.emc50_low < 600 * 3**-0.3 < found.third.emc50_high
    assert found.elasticity_low < 0.3 < found.elasticity_high
    assert found.budget_limited
    # What the full ones did within a third of the budget counts at once.
    assert found.third.n_probes == len(asked)
    ns = [probe.n for probe in asked[first:]]
    assert max(ns) < 600


def test_without_a_rise_nothing_is_limited_by_the_budget():
    search, _ = shortened([problem()], Curve(600.0, 40.0, elasticity=1e-6))
    (found,) = search.estimates()
    assert found.elasticity_low < 0.0 < found.elasticity_high
    assert not found.budget_limited


def test_a_falling_learning_rate_leaves_short_probes_to_themselves():
    falling = replace(problem(), variant=replace(VARIANT, schedule="cosine"))
    search, asked = shortened([falling], Curve(600.0, 10.0))
    (found,) = search.estimates()
    assert found.third.n_probes == sum(probe.short for probe in asked) < len(asked)


def test_a_censored_variant_is_measured_at_a_third_of_the_budget_all_the_same():
    above, _ = shortened([problem(n_max=500)], Curve(560.0, 60.0, elasticity=0.4))
    (found,) = above.estimates()
    assert found.censored is Censored.ABOVE
    assert found.third.emc50 == pytest.approx(560 * 3**-0.4, rel=0.05)
    assert math.isnan(found.elasticity)
    assert not found.budget_limited


def test_the_short_probes_are_those_of_the_winner_of_a_race():
    other = replace(problem(1), variant=replace(VARIANT, lr=0.03))
    search = Search([problem(0), other], **DEFAULTS, races=True, run_steps=run_steps)
    asked = []
    curves = [Curve(200.0, 15.0), Curve(600.0, 15.0)]
    while not search.done:
        probes = search.ask()
        asked += probes
        search.tell([fit_result(probe, curves[probe.variant]) for probe in probes])
    lost, won = search.estimates()
    assert {probe.variant for probe in asked if probe.short} == {1}
    assert lost.third is None
    confirming = sum(CONFIRM <= probe.seed < SHORT for probe in asked)
    assert won.n_probes == confirming
    assert won.third.n_probes == confirming + sum(probe.short for probe in asked)


@pytest.mark.parametrize("shuffled", [1, 2])
def test_short_probes_do_not_depend_on_the_order_of_results(shuffled):
    def run(order):
        curve = Curve(150.0, 6.0, 0.02)
        search = Search(PROBLEMS, **DEFAULTS, run_steps=run_steps)
        asked, waiting = [], []
        while not search.done:
            new = search.ask()
            asked += new
            waiting += new
            order(waiting)
            search.tell([fit_result(probe, curve) for probe in waiting[:3]])
            del waiting[:3]
        return set(asked), search.estimates()

    assert run(random.Random(shuffled).shuffle) == run(lambda waiting: None)


def test_an_early_fit_told_twice_must_be_the_same_fit():
    search = Search([problem()], **DEFAULTS, run_steps=run_steps)
    probe = search.ask()[0]
    search.tell([ProbeResult(probe, Outcome.FITTED, 100, 100, 0.1, 0.0, EMPTY)])
    with pytest.raises(ValueError, match="another verdict"):
        search.tell([ProbeResult(probe, Outcome.FITTED, STEPS, STEPS, 0.1, 0.0, EMPTY)])


@pytest.mark.parametrize(("full", "short"), [(9000, 3000), (10, 3)])
def test_the_elasticity_is_by_the_steps_that_runs_had(full, short):
    """A third of 10 steps is 3: EMC50 rose over a factor of 10 / 3."""
    curve = Curve(600.0, 10.0, elasticity=0.3)
    found = []
    for budgets in ((9000, 3000), (full, short)):
        search = Search([problem()], **DEFAULTS, run_steps=lambda _problem, n, less, of=budgets: of[less])
        while not search.done:
            search.tell([_scaled(fit_result(probe, curve), budgets[0]) for probe in search.ask()])
        found += search.estimates()
    exact, rounded = (one.elasticity for one in found)
    assert rounded == pytest.approx(exact * math.log(3) / math.log(full / short), rel=1e-12)


def _scaled(told, full):
    """With its step of a fit as a share of a budget of ``full`` steps; those just beyond a third stay beyond it."""
    step = told.fit_step
    return replace(told, fit_step=step if step < 0 else math.floor(full / 3) if step <= STEPS // 3 else full)


def test_a_budget_of_one_step_has_no_elasticity():
    search = Search([problem()], **DEFAULTS, run_steps=lambda _problem, n, short: 1)
    while not search.done:
        search.tell([fit_result(probe, Curve(600.0, 40.0)) for probe in search.ask()])
    (found,) = search.estimates()
    assert math.isnan(found.elasticity)
    assert math.isfinite(found.emc50)
