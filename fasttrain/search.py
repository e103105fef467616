"""Which probes to run: for each variant, rounds that close in on its EMC50. ask() and tell(); numpy only.

A variant is searched in rounds. Round r + 1 is a pure function (``next_round``) of the problem, the limits
and the variant's rounds up to r, whole: neither timing nor other variants decide which probes run, so a scan
that is interrupted, reordered or spread over devices asks for the same ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fasttrain.estimate import Posterior, estimate, posterior
from fasttrain.records import Censored, Estimate, Probe, ProbeResult, Problem

ROUND_PROBES = 8
"""Probes of a round once a fit and a failure were seen."""
END_PROBES = 4
"""Probes of a round before that, at an end of the range; five with the ladder's."""

_LADDER = (8, 4, 2, 1)  # parameters per sample of the first n; measured EMC50 are at 4 to 1
_TARGETS = (0.2, 0.8)  # P(fit) of a round's probes: near the half they tell EMC50, off it the slope
_TELLING = (0.02, 0.98)  # P(fit), lapses apart, beyond which a probe says next to nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop; the fields of the same names of ``ScanSpec``.

    Attributes:
        seeds: at most so many probes at one n.
        interval: probability content of the reported interval, in (0, 1).
        tolerance: half-width of the interval, as a share of EMC50, at which a variant is done.
        max_probes: at most so many probes a variant.
    """

    seeds: int
    interval: float
    tolerance: float
    max_probes: int


def next_round(
    problem: Problem, rounds: Sequence[Mapping[Probe, bool]], limits: Limits
) -> tuple[Estimate, tuple[Probe, ...]]:
    """The estimate from the finished rounds, and the probes of the next one; none if the search has ended.

    Round 0 is a ladder of single probes from an eighth of the parameter count to all of it. While all fit or
    none does, two more rungs follow, each a factor of two on, until an end of the range. Then each round's
    probes go where the posterior predictive P(fit | n) is 0.2 to 0.8, or to the end of the range nearest to
    that (the placement rule of Kontsevich & Tyler 1999, with spread for a whole round in place of one look
    ahead).

    The search of a variant ends when a fit and a failure were seen and (high - low) / (2 EMC50) is at most
    the tolerance; when the whole interval lies beyond an end of the range and five probes (or all seeds) ran
    at that end; or when max_probes or the telling n are used up: then ``budget_spent`` is set.

    Stopping at the first narrow interval favours curves that look steep by chance. Simulated at a tolerance
    of 0.1, 90 % intervals cover 0.85 of the truth at a slope of 4, 0.91 at 10 and 0.97 at 25. Asking for two
    narrow intervals running was tried: six to nine more probes, the same coverage.

    Args:
        problem: the variant and its range of n.
        rounds: whether each probe fitted, round by round.
        limits: when to stop.

    Returns:
        The estimate, and the probes by descending n.
    """
    verdicts, post, running = _assess(problem, rounds, limits)
    ended = _tolerance_met(running, limits) or _surely_censored(problem, verdicts, running, post, limits)

    targets: Sequence[int] = ()
    left = limits.max_probes - running.n_probes
    bounds = (problem.n_min, problem.n_max)
    if not ended and left > 0:
        fitted_all = [fitted for seen in verdicts.values() for fitted in seen]
        mixed = any(fitted_all) and not all(fitted_all)
        targets = () if mixed else _ladder(problem, sorted(verdicts), all(fitted_all))
        if not targets:
            count = min(left, ROUND_PROBES if mixed else END_PROBES)
            targets, bounds = _placed(problem, post, count)
    used = {n: len(seen) for n, seen in verdicts.items()}
    probes = []
    for target in targets[:left]:
        n = _nearest_with_room(target, used, limits.seeds, bounds)
        if n is not None:
            probes.append(Probe(problem.index, n, used.get(n, 0), len(rounds)))
            used[n] = used.get(n, 0) + 1
    if probes:
        return running, tuple(sorted(probes, key=lambda probe: (-probe.n, probe.seed)))
    return estimate(problem, post, limits.interval, finished=True, budget_spent=not ended), ()


def _assess(
    problem: Problem, rounds: Sequence[Mapping[Probe, bool]], limits: Limits
) -> tuple[dict[int, list[bool]], Posterior, Estimate]:
    """The verdicts at each n, and what they say."""
    verdicts: dict[int, list[bool]] = {}
    for finished_round in rounds:
        for probe, fitted in finished_round.items():
            verdicts.setdefault(probe.n, []).append(fitted)
    fits = [sum(seen) for seen in verdicts.values()]
    fails = [len(seen) - sum(seen) for seen in verdicts.values()]
    post = posterior(list(verdicts), fits, fails, n_min=problem.n_min, n_max=problem.n_max)
    return verdicts, post, estimate(problem, post, limits.interval)


def _tolerance_met(estimate: Estimate, limits: Limits) -> bool:
    half_width = (estimate.emc50_high - estimate.emc50_low) / 2.0
    return half_width <= limits.tolerance * estimate.emc50  # false for NaN


def _surely_censored(
    problem: Problem, verdicts: Mapping[int, list[bool]], estimate: Estimate, post: Posterior, limits: Limits
) -> bool:
    """Whether the whole interval lies beyond the end of the range, with probes enough there to say so."""
    if estimate.censored is Censored.NO:
        return False
    above = estimate.censored is Censored.ABOVE
    end = problem.n_max if above else problem.n_min
    beyond = post.above(math.log(end))
    return max(beyond, 1.0 - beyond) >= (1.0 + limits.interval) / 2.0 and len(verdicts[end]) >= min(
        END_PROBES + 1, limits.seeds
    )


def _ladder(problem: Problem, ns: Sequence[int], all_fit: bool) -> tuple[int, ...]:
    """Rungs of the bracket yet to be tried, by descending n; none once at the end of the range."""
    if not ns:
        rungs = [problem.params // share for share in _LADDER]
    elif all_fit:
        rungs = [2 * ns[-1], 4 * ns[-1]]
    else:
        rungs = [ns[0] // 2, ns[0] // 4]
    clipped = {min(max(n, problem.n_min), problem.n_max) for n in rungs}
    return tuple(sorted(clipped.difference(ns), reverse=True))


def _placed(problem: Problem, post: Posterior, count: int) -> tuple[list[int], tuple[int, int]]:
    """The n at which ``count`` probes tell most, and the first and last n that tell anything."""
    reach = 4.0 / post.slope
    x = np.linspace(post.m[0] - reach, post.m[-1] + reach, 65)
    predicted = post.fit_probability(x)
    most = 1.0 - post.lapse
    shares = [0.5] if count == 1 else list(np.linspace(*_TARGETS, count))
    wanted = np.array([*shares, _TELLING[1] * most, _TELLING[0]])
    at = np.interp(-wanted, -predicted, x)
    clipped = np.exp(np.clip(at, math.log(problem.n_min), math.log(problem.n_max)))
    *targets, first, last = (min(max(round(n), problem.n_min), problem.n_max) for n in clipped.tolist())
    return targets, (first, last)


def _nearest_with_room(target: int, used: Mapping[int, int], seeds: int, bounds: tuple[int, int]) -> int | None:
    """The n nearest to the target, the lower of two, with a seed left; None without one in bounds."""
    if used.get(target, 0) < seeds:
        return target
    for distance in range(1, len(used) + 1):
        for n in (target - distance, target + distance):
            if bounds[0] <= n <= bounds[1] and used.get(n, 0) < seeds:
                return n
    return None


class Search:
    """The search of all variants of a scan.

    Results may be told in any order and at any time, also before their probe was asked for (a resumed scan
    tells all that it has stored, then asks for the rest): each counts once its round is open, and a round
    counts once it is whole. A variant's rounds and estimates do not depend on the others.

    Args:
        problems: the variants; ``Problem.index`` is the key of all else.
        seeds: at most so many probes at one n of one variant.
        interval: probability content of the reported interval, in (0, 1).
        tolerance: half-width of the interval, as a share of EMC50, at which a variant is done.
        max_probes: at most so many probes a variant.
    """

    def __init__(
        self, problems: Sequence[Problem], *, seeds: int, interval: float, tolerance: float, max_probes: int
    ) -> None:
        limits = Limits(seeds=seeds, interval=interval, tolerance=tolerance, max_probes=max_probes)
        self._variants = {problem.index: _VariantSearch(problem, limits) for problem in problems}

    def ask(self) -> list[Probe]:
        """The probes of rounds opened since the last call, but those already told; each is given out once.

        Variants come in the order of the problems, a round's probes by descending n (the longest first).
        """
        return [probe for variant in self._variants.values() for probe in variant.take()]

    def tell(self, results: Sequence[ProbeResult]) -> None:
        """Take results in.

        Args:
            results: in any order; of each, only ``probe`` and ``fitted`` are used.

        Raises:
            ValueError: a probe is of no variant of this search, or was told before with the other verdict.
        """
        for result in results:
            if result.probe.variant not in self._variants:
                raise ValueError(f"{result.probe} is of no variant of this search")
            self._variants[result.probe.variant].record(result.probe, result.fitted)
        for index in {result.probe.variant for result in results}:
            self._variants[index].advance()

    def estimates(self) -> list[Estimate]:
        """One for each variant, in the order of the problems, from its finished rounds."""
        return [variant.estimate for variant in self._variants.values()]

    @property
    def done(self) -> bool:
        """Whether the search of every variant has ended."""
        return all(variant.estimate.finished for variant in self._variants.values())

    def probes_left(self, index: int) -> int:
        """About how many results of a variant are to come: its open round, or more if its interval is wide.

        The interval's width falls with the square root of the number of probes.

        Args:
            index: ``Problem.index``.
        """
        return self._variants[index].probes_left()


class _VariantSearch:
    """The rounds of one variant."""

    def __init__(self, problem: Problem, limits: Limits) -> None:
        self._problem = problem
        self._limits = limits
        self._told: dict[tuple[int, int], bool] = {}
        self._rounds: list[dict[Probe, bool]] = []
        self.estimate, self._open = next_round(problem, self._rounds, limits)
        self._asked = False

    def record(self, probe: Probe, fitted: bool) -> None:
        if self._told.setdefault((probe.n, probe.seed), fitted) != fitted:
            raise ValueError(f"{probe} was told before with the other verdict")

    def advance(self) -> None:
        while self._open and not self._missing():
            self._rounds.append({probe: self._told[probe.n, probe.seed] for probe in self._open})
            self.estimate, self._open = next_round(self._problem, self._rounds, self._limits)
            self._asked = False

    def take(self) -> list[Probe]:
        asked, self._asked = self._asked, True
        return [] if asked else self._missing()

    def _missing(self) -> list[Probe]:
        return [probe for probe in self._open if (probe.n, probe.seed) not in self._told]

    def probes_left(self) -> int:
        if not self._open:
            return 0
        n_probes = self.estimate.n_probes
        half_width = (self.estimate.emc50_high - self.estimate.emc50_low) / 2.0
        more = float(2 * ROUND_PROBES)
        if math.isfinite(self.estimate.emc50) and math.isfinite(half_width):
            more = n_probes * ((half_width / (self._limits.tolerance * self.estimate.emc50)) ** 2 - 1.0)
        return max(len(self._missing()), math.ceil(min(more, self._limits.max_probes - n_probes)))
