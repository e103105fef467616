"""Whether intervals cover, by simulation: the search with its rounds and its stopping, on verdicts of known curves."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from scipy import stats

from fasttrain import estimate, search
from fasttrain.machine import cores
from fasttrain.records import Estimate, History, Outcome, Probe, ProbeResult, Problem
from fasttrain.search import Limits, Search, Stage
from fasttrain.spec import ScanSpec

STEPS = 9_000
"""Budget of a simulated run, in steps."""
_DEFAULT = ScanSpec()
_EMPTY = History(np.empty(0, np.int64), np.empty(0), np.empty(0))
_PARAMS = 1210


@dataclass(frozen=True, slots=True)
class Curve:
    """A truth: P(fit | n) at the full budget, and how EMC50 rises with the budget.

    Attributes:
        emc: n at which P(fit) is one half.
        slope: of the model's logistic.
        lapse: probability to fail where n is no obstacle.
        elasticity: d ln EMC50 / d ln budget.
        shape: ``"model"``; ``"two-step"``: half of the runs have their threshold a factor ``gap`` below and half above
            emc, ``"dip"``: as the model, but P falls to ``floor`` around emc / gap.
        gap: a factor.
        floor: lowest P in a dip.
    """

    emc: float
    slope: float
    lapse: float = 0.0
    elasticity: float = 0.2
    shape: str = "model"
    gap: float = 2.0
    floor: float = 0.2

    def fit_step(self, n: int, u: float) -> float:
        """Step at which a run fits, infinite if never; ``u`` uniform in (0, 1) is its luck."""
        x = math.log(n / self.emc)
        if self.shape == "two-step":
            thresholds = math.log(self.gap) / 2.0
            p = sum(0.5 / (1.0 + math.exp(self._bounded(x + side))) for side in (-thresholds, thresholds))
            return STEPS if u < p else math.inf
        if self.shape == "dip":
            p = 1.0 / (1.0 + math.exp(self._bounded(x)))
            p *= 1.0 - (1.0 - self.floor) * math.exp(-0.5 * ((x + math.log(self.gap)) / 0.15) ** 2)
            return STEPS if u < p else math.inf
        if u >= 1.0 - self.lapse:
            return math.inf
        z = math.log(((1.0 - self.lapse) / u - 1.0) / (1.0 - 2.0 * self.lapse))
        exponent = (x - z / self.slope) / self.elasticity
        return STEPS * math.exp(exponent) if exponent < 100.0 else math.inf

    def _bounded(self, x: float) -> float:
        return min(max(self.slope * x, -500.0), 500.0)


@dataclass(frozen=True, slots=True)
class Trial:
    """A simulated search.

    Attributes:
        curve: the truth.
        found: what it ended with.
        below: posterior probabilities of a smaller ln EMC50 and of a smaller slope than the true ones.
        samples: sample-updates that the probes would have cost, for batches of one sample a step.
        rounds: rounds at the full budget.
    """

    curve: Curve
    found: Estimate
    below: tuple[float, float]
    samples: float
    rounds: int


def problem(n_min: int = 2, n_max: int = 4 * _PARAMS, params: int = _PARAMS) -> Problem:
    """A variant for the search to look at; nothing of it but its sizes matters."""
    spec = ScanSpec(widths=(16,))
    return Problem(0, spec.variants(10)[0], params, n_min, n_max)


def play(
    curve: Curve,
    key: Sequence[int],
    *,
    at: Problem | None = None,
    short: bool = True,
    tolerance: float = _DEFAULT.tolerance,
    max_probes: int = _DEFAULT.max_probes,
    interval: float = _DEFAULT.interval,
    began: float | None = None,
) -> Trial:
    """One search to its end, on verdicts of a curve.

    Args:
        curve: the truth.
        key: of the random numbers: equal keys give equal verdicts for equal probes.
        at: the variant.
        short: whether EMC50 at a third of the budget is measured too.
        tolerance: as of ``ScanSpec``.
        max_probes: as of ``ScanSpec``.
        interval: as of ``ScanSpec``.
        began: the tolerance that the scan had before it was extended.
    """
    at = at or problem()
    limits = Limits(seeds=_DEFAULT.seeds, interval=interval, tolerance=tolerance, max_probes=max_probes)
    earlier = [] if began is None else [Stage({at.index: at}, replace(limits, tolerance=began))]
    one = Search([at], **asdict(limits), run_steps=_run_steps if short else None, earlier=earlier)
    verdicts: dict[int, list[bool]] = {}
    samples, rounds = 0.0, 0
    while not one.done:
        results = []
        for probe in one.ask():
            budget = STEPS // 3 if probe.short else STEPS
            step = curve.fit_step(probe.n, float(np.random.default_rng([*key, probe.n, probe.seed]).random()))
            fitted = step <= budget
            samples += min(step, budget)
            rounds = rounds if probe.short else max(rounds, probe.round + 1)
            if not probe.short:
                verdicts.setdefault(probe.n, []).append(fitted)
            results.append(_result(probe, math.ceil(step) if fitted else -1))
        one.tell(results)
    ns = list(verdicts)
    fits = [sum(verdicts[n]) for n in ns]
    fails = [len(verdicts[n]) - fit for n, fit in zip(ns, fits, strict=True)]
    post = estimate.posterior(ns, fits, fails, n_min=at.n_min, n_max=at.n_max)
    below = 1.0 - post.above(math.log(curve.emc)), post.slope_below(curve.slope)
    return Trial(curve, one.estimates()[0], below, samples, rounds)


def _run_steps(problem: Problem, n: int, short: bool) -> int:
    del problem, n
    return STEPS // 3 if short else STEPS


def _result(probe: Probe, fit_step: int) -> ProbeResult:
    outcome = Outcome.FITTED if fit_step >= 0 else Outcome.OUT_OF_BUDGET
    return ProbeResult(probe, outcome, max(fit_step, 1), fit_step, 0.1, 0.0, _EMPTY)


def many(one: Callable[[int], Trial], runs: int) -> list[Trial]:
    """``one(0)``, ``one(1)``, ..., on all cores."""
    with ProcessPoolExecutor(cores()) as workers:
        return list(workers.map(one, range(runs), chunksize=8))


def fixed(curve: Curve, key: int, **options: float) -> Trial:
    """A search of a curve at a place of its own: EMC50 between 0.15 and 1 times the parameters."""
    place = math.exp(float(np.random.default_rng([key, 1]).uniform(math.log(0.15), 0.0)))
    return play(replace(curve, emc=place * _PARAMS), [key], **options)  # type: ignore[arg-type]


FIXED = {
    "shallow": Curve(1.0, 4.0),
    "shallow, lapsing": Curve(1.0, 4.0, 0.05),
    "middling": Curve(1.0, 10.0),
    "middling, lapsing": Curve(1.0, 10.0, 0.1),
    "sharp": Curve(1.0, 25.0),
    "sharp, lapsing": Curve(1.0, 25.0, 0.05),
    "very sharp": Curve(1.0, 60.0),
}
WELL = tuple(FIXED.values())
MISFITS = {
    "two steps, a factor of 2 apart": (Curve(1.0, 25.0, shape="two-step", gap=2.0), 0.25),
    "two steps, a factor of 4 apart": (Curve(1.0, 25.0, shape="two-step", gap=4.0), 0.37),
    "a dip to 0.2 at EMC50 / 1.4": (Curve(1.0, 25.0, shape="dip", gap=1.4), 0.5),
    "a dip to 0.2 at half of EMC50": (Curve(1.0, 25.0, shape="dip", gap=2.0), 0.07),
}
"""Curves that are not of the model's form, and the share of searches that flag them."""


def summary(trials: Sequence[Trial]) -> dict[str, float]:
    """Coverage, bias and cost of searches of one kind of curve.

    Returns:
        ``covered``, ``covered_third`` and ``covered_elasticity``: shares of the intervals that hold the truth;
        ``bias``: mean error of ln EMC50, of those not censored; ``spread``: its standard deviation; ``probes``,
        ``third_probes`` (short ones alone), ``rounds``, ``half_width`` (median, as a share of EMC50), ``alarms``:
        share flagged as misfits; ``ended``: share that met the tolerance.
    """
    errors, covered, third, rise = [], [], [], []
    for trial in trials:
        found, curve = trial.found, trial.curve
        covered.append(found.emc50_low <= curve.emc <= found.emc50_high)
        if not math.isnan(found.emc50):
            errors.append(math.log(found.emc50 / curve.emc))
        if found.third is not None:
            truth = curve.emc * 3.0**-curve.elasticity
            third.append(found.third.emc50_low <= truth <= found.third.emc50_high)
        if not math.isnan(found.elasticity):
            rise.append(found.elasticity_low <= curve.elasticity <= found.elasticity_high)
    widths = [(t.found.emc50_high - t.found.emc50_low) / (2.0 * t.found.emc50) for t in trials]
    return {
        "runs": len(trials),
        "covered": float(np.mean(covered)),
        "bias": float(np.mean(errors)),
        "spread": float(np.std(errors)),
        "covered_third": float(np.mean(third)) if third else math.nan,
        "covered_elasticity": float(np.mean(rise)) if rise else math.nan,
        "probes": float(np.mean([t.found.n_probes for t in trials])),
        "third_probes": float(
            np.mean([t.found.third.n_probes - t.found.n_probes if t.found.third else 0 for t in trials])
        ),
        "rounds": float(np.mean([t.rounds for t in trials])),
        "half_width": float(np.nanmedian(widths)),
        "alarms": float(np.mean([t.found.misfit for t in trials])),
        "ended": float(np.mean([not t.found.budget_spent for t in trials])),
    }


def from_prior(key: int, at: Problem) -> Trial:
    """A search of a curve drawn from the model's own prior, EMC50 beyond what may be probed included."""
    rng = np.random.default_rng([key, 2])
    m = rng.uniform(math.log(at.n_min) - estimate.MARGIN, math.log(at.n_max) + estimate.MARGIN)
    slope = math.exp(rng.uniform(*np.log(estimate.SLOPES)))
    lapse = estimate.LAPSE_MOST * float(rng.beta(1.0, estimate.LAPSE_FALL + 1.0))
    return play(Curve(math.exp(m), slope, lapse), [key], at=at, short=False)


def simulation_based(runs: int) -> dict[str, float]:
    """Simulation-based calibration (Talts et al. 2018, arXiv 1804.06788) of ln EMC50 and of the slope.

    Where truths follow the prior, the posterior probability below the truth is uniform, whatever the search does.

    Returns:
        p-values of Kolmogorov and Smirnov's test that it is, ``emc50_p`` and ``slope_p``; ``lapse_z``: mean of the true
        lapse less its posterior mean, in its standard errors.
    """
    trials = many(partial(from_prior, at=problem(20, 4 * _PARAMS)), runs)
    below = np.array([trial.below for trial in trials])
    lapse = np.array([trial.curve.lapse - trial.found.lapse for trial in trials])
    return {
        "runs": runs,
        "emc50_p": float(stats.kstest(below[:, 0], "uniform").pvalue),
        "slope_p": float(stats.kstest(below[:, 1], "uniform").pvalue),
        "lapse_z": float(lapse.mean() / (lapse.std(ddof=1) / math.sqrt(runs))),
    }


def one_at_a_time(curve: Curve, key: int) -> Trial:
    """As ``fixed``, with rounds of a single probe; without short ones."""
    single_probes()
    return fixed(curve, key, short=False)


_TURNS = (3, 7, 1, 5, 0, 4, 2, 6)
"""Order in which single probes take the places of a round of eight."""


def single_probes() -> None:
    """From now on all searches of this process ask for one probe at a time, at the places of a round in turn."""
    if search.ROUND_PROBES == 1:
        return
    placed = search._placed

    def one(at: Problem, post: estimate.Posterior, count: int) -> tuple[Sequence[int], tuple[int, int]]:
        del count
        targets, bounds = placed(at, post, len(_TURNS))
        return [targets[_TURNS[int((post.fits + post.fails).sum()) % len(_TURNS)]]], bounds

    search._placed = one
    search.ROUND_PROBES = 1
    search._round_size = lambda *_: 1


def misfits(curve: Curve, runs: int) -> float:
    """Share of searches of a curve that end with the misfit flag."""
    return float(np.mean([trial.found.misfit for trial in many(partial(fixed, curve, short=False), runs)]))


def run(runs: int) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Coverage at fixed curves, simulation-based calibration, misfits, rounds against one probe at a time, and scans
    that began with twice the tolerance and were extended.

    Args:
        runs: searches of every curve.

    Returns:
        A row for each curve, of ``summary`` or the share of misfits flagged; and the rest by name.
    """
    rows: list[dict[str, object]] = []
    for name, curve in FIXED.items():
        rows.append({"curve": name, **_rounded(summary(many(partial(fixed, curve), runs)))})
        print(rows[-1], flush=True)
    facts: dict[str, object] = {"simulation_based": _rounded(simulation_based(runs))}
    print(facts, flush=True)
    facts["misfits_flagged"] = {name: misfits(curve, runs) for name, (curve, _) in MISFITS.items()}
    print(facts, flush=True)
    fewer = max(runs // 10, 2)
    facts["one_at_a_time"] = {
        name: _rounded(summary(many(partial(one_at_a_time, FIXED[name]), fewer))) for name in ("middling", "sharp")
    }
    print(facts, flush=True)
    facts["extended"] = {
        name: _rounded(summary(many(partial(fixed, curve, began=2 * _DEFAULT.tolerance), runs)))
        for name, curve in FIXED.items()
    }
    print(facts, flush=True)
    return rows, facts


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in found.items()}
