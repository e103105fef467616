import dataclasses
import math

import numpy as np
import pytest

from fasttrain.records import Outcome
from fasttrain.spec import ScanSpec
from fasttrain.stopping import Monitor, StopRules

N = 50


def checks(rules: StopRules) -> list[int]:
    """All steps at which a run is checked."""
    steps = [rules.next_check(0)]
    while steps[-1] < rules.steps:
        steps.append(rules.next_check(steps[-1]))
    return steps


def follow(losses: list[float], rules: StopRules, wrong: int = 1) -> list[Outcome | None]:
    """The verdicts on these losses at the checks."""
    monitor = Monitor(rules)
    return [monitor.observe(step, loss, wrong, N) for step, loss in zip(checks(rules), losses, strict=False)]


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (1000, 250, [250, 500, 750, 1000]),
        (1000, 300, [300, 600, 900, 1000]),
        (10, 1, list(range(1, 11))),
        (7, 100, [7]),
        (100, 100, [100]),
        (101, 100, [100, 101]),
        (1, 1, [1]),
    ],
)
def test_checks_are_at_the_cadence_and_at_the_last_step(steps: int, every: int, expected: list[int]) -> None:
    rules = StopRules(steps, every)
    assert checks(rules) == expected
    for step in range(steps):
        assert rules.next_check(step) == min(c for c in expected if c > step)


LOW = 0.15 * math.log(10)


def rules_of(n: int = 640, short: bool = False, **fields: object) -> StopRules:
    spec = ScanSpec(widths=4, **fields)
    return StopRules.of(spec, spec.variants(10)[0], n, short)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("every", [1, 100, 7000])
def test_a_budget_in_steps_is_checked_as_asked(every: int, short: bool) -> None:
    assert rules_of(check_every=every, short=short) == StopRules(3333 if short else 10_000, every, plateau_loss=LOW)


@pytest.mark.parametrize(
    ("budget", "check_every", "short", "expected"),
    [
        ("1epochs", 100, False, StopRules(10, 1)),
        ("19epochs", 100, False, StopRules(190, 1)),
        ("300epochs", 100, False, StopRules(3000, 30)),
        ("300epochs", 100, True, StopRules(1000, 10)),
        ("300epochs", 20, False, StopRules(3000, 20)),
        ("5000epochs", 100, False, StopRules(50_000, 100)),
        ("640000samples", 100, False, StopRules(10_000, 100)),
    ],
)
def test_few_steps_are_checked_more_often(budget: str, check_every: int, short: bool, expected: StopRules) -> None:
    rules = rules_of(budget=budget, check_every=check_every, short=short)
    assert rules == dataclasses.replace(expected, plateau_loss=LOW)
    assert len(checks(rules)) >= min(rules.steps, 100)


def test_a_short_run_is_judged_as_one_of_a_scan_with_a_third() -> None:
    for fields in ({"steps": 900, "check_every": 7}, {"budget": "300epochs"}):
        third = {"steps": 300} if "steps" in fields else {"budget": "100epochs"}
        assert rules_of(short=True, **fields) == rules_of(**{**fields, **third})
    assert (rules_of(steps=900).plateau_after, rules_of(steps=900, short=True).plateau_after) == (90, 30)


def test_without_early_stop_no_plateau_ends_a_run() -> None:
    rules = rules_of(steps=1000, early_stop=False)
    assert rules == StopRules(1000, 100, early_stop=False, plateau_loss=LOW)
    assert follow([1.0] * 10, rules) == [None] * 9 + [Outcome.OUT_OF_BUDGET]
    assert follow([1.0] * 10, StopRules(1000, 100))[1] is Outcome.PLATEAUED
    assert follow([1.0, math.nan], rules) == [None, Outcome.DIVERGED]
    assert follow([1.0], rules, wrong=0) == [Outcome.FITTED]


def test_a_run_that_keeps_falling_runs_out_of_budget_at_the_last_check_only() -> None:
    rules = StopRules(1000, 100)
    falling = [0.5**k for k in range(10)]
    assert follow(falling, rules) == [None] * 9 + [Outcome.OUT_OF_BUDGET]


def test_no_wrong_sample_is_a_fit_at_any_check() -> None:
    for at in range(1, 11):
        monitor = Monitor(StopRules(1000, 100))
        for k in range(1, at):
            assert monitor.observe(100 * k, 0.5**k, 1, N) is None
        assert monitor.observe(100 * at, 0.5**at, 0, N) is Outcome.FITTED
        assert monitor.last == (100 * at, 0.5**at, 0.0)


def test_a_fit_wins_over_plateau_and_end_of_the_budget() -> None:
    monitor = Monitor(StopRules(1000, 100))
    for k in range(1, 10):
        assert monitor.observe(100 * k, 0.5**k, 2, N) is None
    assert monitor.observe(1000, 0.5**9, 0, N) is Outcome.FITTED
    flat = Monitor(StopRules(1000, 100))
    flat.observe(100, 1.0, 3, N)
    assert flat.observe(200, 1.0, 0, N) is Outcome.FITTED


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 5, 10])
def test_a_loss_that_is_no_number_has_diverged(loss: float, at: int) -> None:
    losses = [0.5**k for k in range(10)]
    losses[at - 1] = loss
    assert follow(losses, StopRules(1000, 100))[:at] == [None] * (at - 1) + [Outcome.DIVERGED]


def test_divergence_wins_over_everything() -> None:
    assert Monitor(StopRules(10, 10)).observe(10, math.nan, 0, N) is Outcome.DIVERGED


def test_a_flat_loss_is_a_plateau_as_soon_as_there_was_a_check_at_half_of_the_steps() -> None:
    assert follow([1.0, 1.0], StopRules(1000, 100)) == [None, Outcome.PLATEAUED]


@pytest.mark.parametrize("classes", [2, 10])
def test_a_loss_that_is_low_already_is_no_plateau(classes: int) -> None:
    """Below 15 % of the loss of guessing; of the best loss, whatever the one at the check."""
    spec = ScanSpec(widths=4, data="gaussian:4", classes=classes, steps=1000)
    rules = StopRules.of(spec, spec.variants(classes)[0], 50)
    low = 0.15 * math.log(classes)
    assert follow([low, low], rules) == [None, None]
    assert follow([1.001 * low, 1.001 * low], rules) == [None, Outcome.PLATEAUED]
    assert follow([low, 2 * low, 2 * low], rules) == [None, None, None]


@pytest.mark.parametrize(
    ("last", "outcome"),
    [
        (math.nextafter(0.9, 1.0), Outcome.PLATEAUED),
        (0.9, None),
        (math.nextafter(0.9, 0.0), None),
    ],
)
def test_the_plateau_is_exactly_where_less_than_a_tenth_was_gained(last: float, outcome: Outcome | None) -> None:
    """Losses 1 at step 400, and so much at step 800; in between it falls so that nothing is flat before."""
    monitor = Monitor(StopRules(1000, 400))
    assert monitor.observe(400, 1.0, 1, N) is None
    assert monitor.observe(800, last, 1, N) is outcome


def test_half_of_the_steps_is_the_last_check_at_or_before_it() -> None:
    """At step 500 that is the one at 200, not at 300: gains since 200 count."""
    rules = StopRules(5000, 100)
    assert follow([4.0, 1.0, 0.85, 0.85, 0.85], rules) == [None] * 5
    assert follow([4.0, 1.0, 0.85, 0.85, 0.85, 0.85], rules)[-1] is Outcome.PLATEAUED
    assert follow([4.0, 0.94, 0.85, 0.85, 0.85], rules) == [None] * 4 + [Outcome.PLATEAUED]


def test_the_best_loss_counts_not_the_last() -> None:
    rules = StopRules(3000, 100)
    assert follow([1.0, 0.5, 0.8, 2.0], rules) == [None, None, None, Outcome.PLATEAUED]
    assert follow([1.0, 0.8, 0.5, 2.0], rules) == [None] * 4


@pytest.mark.parametrize(("steps", "first"), [(1000, 100), (2000, 200), (10_000, 1000), (9999, 1000), (10_001, 1001)])
def test_no_plateau_before_a_tenth_of_the_budget(steps: int, first: int) -> None:
    flat = follow([1.0] * steps, StopRules(steps, 1))
    ends = [k + 1 for k, outcome in enumerate(flat) if outcome is not None]
    assert ends[0] == first
    assert flat[first - 1] is Outcome.PLATEAUED


@pytest.mark.parametrize("steps", range(10, 1000, 10))
def test_a_tenth_of_the_budget_is_not_missed_by_rounding(steps: int) -> None:
    """0.1 is a little more than a tenth."""
    monitor = Monitor(StopRules(steps, 1))
    monitor.observe(max(1, steps // 20), 1.0, 1, N)
    outcome = monitor.observe(steps // 10, 1.0, 1, N)
    assert outcome is (Outcome.PLATEAUED if steps >= 20 else None)


def test_a_plateau_at_the_last_step_is_called_one() -> None:
    monitor = Monitor(StopRules(200, 100))
    assert monitor.observe(100, 1.0, 1, N) is None
    assert monitor.observe(200, 0.99, 1, N) is Outcome.PLATEAUED


def test_one_check_in_all_is_out_of_budget() -> None:
    assert follow([1.0], StopRules(7, 100)) == [Outcome.OUT_OF_BUDGET]


def history(count: int) -> tuple[Monitor, np.ndarray]:
    monitor = Monitor(StopRules(10**6, 100))
    losses = 1.0 / np.arange(1, count + 1)
    for k, loss in enumerate(losses):
        monitor.observe(100 * (k + 1), float(loss), k % (N + 1), N)
    return monitor, losses


@pytest.mark.parametrize("count", [1, 2, 63, 64])
def test_a_short_history_is_kept_whole(count: int) -> None:
    monitor, losses = history(count)
    kept = monitor.history()
    assert kept.step.tolist() == [100 * (k + 1) for k in range(count)]
    assert np.array_equal(kept.train_loss, losses)
    assert kept.train_accuracy.tolist() == [1.0 - (k % (N + 1)) / N for k in range(count)]
    assert kept.step.dtype == np.int64


@pytest.mark.parametrize("count", [65, 66, 100, 127, 128, 1000])
def test_a_long_history_is_thinned_evenly_between_its_first_and_last_check(count: int) -> None:
    monitor, losses = history(count)
    kept = monitor.history()
    which = kept.step // 100 - 1
    assert len(which) == 64
    assert (which[0], which[-1]) == (0, count - 1)
    gaps = np.diff(which)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert np.array_equal(kept.train_loss, losses[which])
    assert np.array_equal(kept.train_accuracy, 1.0 - (which % (N + 1)) / N)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_checks_recorded_at_once_are_those_observed_one_by_one(count: int) -> None:
    """Also the last one, at a step that is no multiple of the cadence."""
    rules = StopRules(100 * count - 30, 100)
    rng = np.random.default_rng(count)
    losses = np.cumprod(rng.uniform(0.5, 1.2, count))
    wrong = rng.integers(1, N, count)
    one, many = Monitor(rules), Monitor(rules)
    step = 0
    for k in range(count):
        step = rules.next_check(step)
        assert rules.step_of(k + 1) == step
        outcome = one.observe(step, float(losses[k]), int(wrong[k]), N)
    assert step == rules.steps
    many.record(losses[:-1], wrong[:-1], N)
    assert many.observe(step, float(losses[-1]), int(wrong[-1]), N) == outcome
    assert many.last == one.last
    for a, b in zip(dataclasses.astuple(many.history()), dataclasses.astuple(one.history()), strict=True):
        assert np.array_equal(a, b)
