"""Ladders and grids: the n that they take, in any order of results, within their limits; and whole scans of both."""

import itertools
import math
import random
import shlex

import numpy as np
import pandas as pd
import pytest
from test_run import same
from test_search import DEFAULTS, problem, result, world

import fasttrain
from fasttrain import ScanSpec, UserError
from fasttrain.cli import main
from fasttrain.designs import design_of, ladder, n_range, probes_of
from fasttrain.records import Censored
from fasttrain.search import Limits, Search, next_round

PAPER = ScanSpec(search="paper")
GRID = ScanSpec(search="grid", n="20,50,110")


def play(the_problem, fitted, spec, **limits):
    """All rounds of one variant, and the last estimate."""
    rounds = []
    while True:
        estimate, probes, _ = design_of(spec)(the_problem, rounds, Limits(**{**DEFAULTS, **limits}), 0)
        assert (not probes) == estimate.finished
        assert all(probe.round == len(rounds) for probe in probes)
        if not probes:
            return estimate, rounds
        rounds.append({probe: bool(fitted(probe)) for probe in probes})


def by_seed(rounds):
    """Of every seed the n and verdicts in the order in which they were asked for."""
    out = {}
    for probe, fitted in itertools.chain.from_iterable(finished.items() for finished in rounds):
        out.setdefault(probe.seed, []).append((probe.n, fitted))
    return out


def plain_ladder(fitted, n, n_max, growth, seed, variant=0):
    """The procedure of one seed as it is written down: train, grow n if all is fitted, stop at the first failure."""
    out = []
    while True:
        probe = fasttrain.records.Probe(variant, n, seed)
        out.append((n, bool(fitted(probe))))
        if not out[-1][1] or n == n_max:
            return out
        n = min(n_max, max(n + 1, round(growth * n)))


@pytest.mark.parametrize("growth", [1.03, 1.1, 2.0, 1e9])
def test_every_seed_climbs_by_itself_to_its_first_failure(growth):
    fitted = world(emc=300.0, slope=6.0, lapse=0.02, key=3)
    one = problem(n_min=40, n_max=900)
    spec = ScanSpec(search="paper", growth=growth)
    last, rounds = play(one, fitted, spec, seeds=12, max_probes=10_000)
    wanted = {seed: plain_ladder(fitted, 40, 900, growth, seed) for seed in range(12)}
    assert by_seed(rounds) == wanted
    assert all(len({probe.n for probe in finished}) == 1 for finished in rounds)
    assert (last.finished, last.budget_spent) == (True, False)
    assert last.n_probes == sum(map(len, wanted.values()))


def test_a_ladder_grows_by_the_factor_and_by_one_at_least_and_ends_at_n_max():
    assert ladder(problem(n_min=2, n_max=16), 1.1) == list(range(2, 17))
    assert ladder(problem(n_min=100, n_max=150), 1.1) == [100, 110, 121, 133, 146, 150]
    assert ladder(problem(n_min=3, n_max=10**18), 1e9) == [3, 3 * 10**9, 10**18]
    assert ladder(problem(n_min=7, n_max=7), 1.1) == [7]


def test_a_limit_on_the_probes_cuts_the_last_round_and_is_said():
    one = problem(n_min=100, n_max=5000)
    last, rounds = play(one, lambda probe: probe.n < 1000, PAPER, seeds=5, max_probes=23)
    assert [len(finished) for finished in rounds] == [5, 5, 5, 5, 3]
    assert [probe.seed for probe in rounds[-1]] == [0, 1, 2]
    assert (last.budget_spent, last.n_probes) == (True, 23)
    last, rounds = play(one, lambda probe: probe.n < 110, PAPER, seeds=5, max_probes=10)
    assert (last.budget_spent, last.n_probes) == (False, 10)


def test_ladders_that_fit_everything_or_nothing_end_at_the_ends_of_the_range():
    one = problem(n_min=100, n_max=150)
    last, rounds = play(one, lambda probe: True, PAPER, seeds=3)
    assert [max(probe.n for probe in finished) for finished in rounds] == [100, 110, 121, 133, 146, 150]
    assert (last.censored, last.budget_spent) == (Censored.ABOVE, False)
    last, rounds = play(one, lambda probe: False, PAPER, seeds=3)
    assert (len(rounds), last.censored, last.budget_spent) == (1, Censored.BELOW, False)


def test_a_grid_is_all_seeds_at_all_n_in_one_round_whatever_comes_out():
    for fitted in (world(), lambda probe: True, lambda probe: False):
        last, rounds = play(problem(n_min=20, n_max=110), fitted, GRID, seeds=3, max_probes=1, tolerance=1e-9)
        wanted = [(n, seed) for n in (110, 50, 20) for seed in range(3)]
        assert [[(probe.n, probe.seed) for probe in finished] for finished in rounds] == [wanted]
        assert (last.n_probes, last.budget_spent, last.finished) == (9, False, True)


def test_other_searches_share_the_posterior_of_the_adaptive_one():
    """The estimate of the same verdicts is the same, whichever search asked for them."""
    fitted = world(emc=60.0, slope=8.0)
    one = problem(n_min=20, n_max=110)
    last, rounds = play(one, fitted, GRID, seeds=6)
    estimate, _, _ = next_round(one, rounds, Limits(**{**DEFAULTS, "max_probes": 18}))
    assert last.emc50 == estimate.emc50
    assert (last.emc50_low, last.emc50_high, last.slope) == (estimate.emc50_low, estimate.emc50_high, estimate.slope)


PROBLEMS = [problem(4), problem(1, params=130, n_min=20, n_max=110), problem(7, params=40, n_min=20, n_max=300)]


def run_search(spec, order, batch):
    fitted = world(emc=150.0, slope=6.0, lapse=0.02)
    search = Search(PROBLEMS, **{**DEFAULTS, "max_probes": 150}, design=design_of(spec))
    asked, waiting = [], []
    while not search.done:
        new = search.ask()
        asked += new
        waiting += new
        assert all(search.probes_left(one.index) > 0 for one in PROBLEMS if not all_done(search, one.index))
        order(waiting)
        search.tell([result(probe, fitted(probe)) for probe in waiting[:batch]])
        del waiting[:batch]
    assert search.ask() == waiting == []
    assert len(set(asked)) == len(asked)
    return set(asked), search.estimates()


def all_done(search, index):
    return next(estimate.finished for estimate in search.estimates() if estimate.variant == index)


@pytest.mark.parametrize("spec", [PAPER, GRID], ids=["paper", "grid"])
@pytest.mark.parametrize(("seed", "batch"), [(1, 1), (2, 7)])
def test_the_probes_and_estimates_are_the_same_in_whatever_order_results_come(spec, seed, batch):
    reference = run_search(spec, lambda waiting: None, 10**6)
    assert run_search(spec, random.Random(seed).shuffle, batch) == reference


def test_the_range_of_n_of_every_search():
    assert n_range(ScanSpec(), 1210, 1797) == (2, 1797)
    assert n_range(ScanSpec(n_min=9), 1210, 1797) == (9, 1797)
    assert n_range(PAPER, 1210, 1797) == (151, 1797)
    assert n_range(PAPER, 5, 20) == (2, 20)
    assert n_range(PAPER, 10**6, 1797) == (224, 1797)
    assert n_range(PAPER, 10**6, 2) == (1, 2)
    assert n_range(ScanSpec(search="paper", n_min=30, n_max=99), 1210, 1797) == (30, 99)
    assert n_range(GRID, 5, 1797) == (20, 110)
    assert n_range(ScanSpec(search="grid", n=50), 5, 20) == (50, 50)
    assert n_range(ScanSpec(search="grid", n=50, n_max=99, n_min=3), 5, 20) == (3, 99)
    with pytest.raises(UserError, match="less than n-max, which is 20 here"):
        n_range(ScanSpec(search="paper", n_min=20), 1210, 20)


@pytest.mark.parametrize("emc", [170, 400, 4000, 10**6])
def test_no_search_takes_more_probes_than_are_announced(emc):
    for spec in (PAPER, ScanSpec(search="paper", max_probes=40), GRID, ScanSpec()):
        one = problem(n_min=20 if spec is GRID else 151)
        likely, most = probes_of(spec, one)
        _, rounds = play(one, lambda probe: probe.n < emc, spec, max_probes=spec.max_probes)
        assert likely <= most
        assert sum(map(len, rounds)) <= most


def test_the_announced_probes_are_those_of_ladders_to_the_parameters_over_2_5_and_to_n_max():
    one = problem(n_min=151)
    for end, count in zip((one.params / 2.5, 10**6), probes_of(PAPER, one), strict=True):
        last, _ = play(one, lambda probe, end=end: probe.n <= end, PAPER, max_probes=1600)
        assert last.n_probes == count


SMALL = shlex.split("--widths 3,5 --data gaussian:8 --classes 2 --steps 200 --check-every 50 --seeds 3 --device cpu")


@pytest.mark.parametrize(
    "options", [["--search", "paper", "--growth", "1.3"], ["--search", "grid", "--n", "8:24:8"]], ids=["paper", "grid"]
)
def test_a_scan_from_the_command_line_twice(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.h5", "b.h5"):
        assert main(["scan", *SMALL, *options, "--quiet", "--out", name]) == 0
    first, second = fasttrain.load("a.h5"), fasttrain.load("b.h5")
    same(first, second)
    assert first.attrs["status"] == "complete"
    assert first.curves["finished"].all()
    assert (first.curves["search"] == first.spec.search).all()
    for _, row in first.curves.iterrows():
        runs = first.probes[first.probes["variant"] == row["variant"]]
        if first.spec.search == "grid":
            assert sorted(zip(runs["n"], runs["seed"], strict=True)) == [(n, s) for n in (8, 16, 24) for s in range(3)]
            assert (row["n_min"], row["n_max"]) == (8, 24)
            assert math.isnan(row["growth"])
            continue
        assert (row["n_min"], row["growth"]) == (max(2, row["params"] // 8), 1.3)
        verdicts = {(n, s): out == "fitted" for n, s, out in zip(runs["n"], runs["seed"], runs["outcome"], strict=True)}
        wanted = {
            (n, seed): fitted
            for seed in range(3)
            for n, fitted in plain_ladder(
                lambda probe, of=verdicts: of[probe.n, probe.seed], row["n_min"], row["n_max"], 1.3, seed
            )
        }
        assert verdicts == wanted
    capsys.readouterr()
    assert main(["show", "a.h5", "--estimator", "paper"]) == (0 if first.spec.search == "paper" else 2)


def test_learning_rates_do_not_race_in_a_grid():
    fields = {"widths": 3, "data": "gaussian:8", "classes": 2, "steps": 50, "check_every": 50, "device": "cpu"}
    spec = ScanSpec(**fields, lr=(0.1, 0.01), search="grid", n=10, seeds=2)
    results = fasttrain.scan(spec)
    assert (results.curves["race"] == "").all()
    assert results.curves["n_probes"].tolist() == [2, 2]
    assert (results.probes["seed"] < 2).all()
    preview = fasttrain.preview(spec)
    assert preview.model_steps_most == 4 * 50
    # Runs at one n are the same whichever search asks for them.
    other = fasttrain.scan(ScanSpec(**fields, lr=0.1, search="paper", n_min=10, n_max=11, seeds=2))
    columns = ["n", "seed", "outcome", "steps", "train_loss", "train_error"]
    a, b = (
        r.probes[(r.probes["lr"] == 0.1) & (r.probes["n"] == 10)][columns].sort_values("seed", ignore_index=True)
        for r in (results, other)
    )
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert np.isfinite(a["train_loss"]).all()


def test_a_grid_beyond_the_data_is_an_error_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["scan", "--search", "grid", "--n", "100,1798", "--out", "a.h5"]) == 2
    assert capsys.readouterr().err.startswith("fasttrain: --n 1798: digits has 1797 samples")
    assert list(tmp_path.iterdir()) == []
