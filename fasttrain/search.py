"""Which probes to run: for each variant, rounds that close in on its EMC50. ask() and tell(); numpy only.

A variant is searched in rounds. Round r + 1 is a pure function (``next_round``) of the problem, the limits
and the variant's rounds up to r, whole: neither timing nor other variants decide which probes run, so a scan
that is interrupted, reordered or spread over devices asks for the same ones.

Variants that differ only in their learning rate may race: their rounds go in step, those that are clearly worse
are dropped after a round, and the winner is searched anew on fresh seeds. All of that is a function of the rounds too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fasttrain.estimate import Posterior, estimate, posterior
from fasttrain.records import Censored, Estimate, Probe, ProbeResult, Problem, Race
from fasttrain.spec import CONFIRM

ROUND_PROBES = 8
"""Probes of a round once a fit and a failure were seen."""
END_PROBES = 4
"""Probes of a round before that, at an end of the range; five with the ladder's."""
SURELY_WORSE = 0.99
"""A learning rate is dropped once its EMC50 is below the leader's with more than this probability."""

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
    problem: Problem, rounds: Sequence[Mapping[Probe, bool]], limits: Limits, first_seed: int = 0
) -> tuple[Estimate, tuple[Probe, ...], Posterior]:
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
        first_seed: at each n; all rounds must have begun there.

    Returns:
        The estimate, the probes by descending n, and the posterior that both rest on.
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
            probes.append(Probe(problem.index, n, first_seed + used.get(n, 0), len(rounds)))
            used[n] = used.get(n, 0) + 1
    if probes:
        return running, tuple(sorted(probes, key=lambda probe: (-probe.n, probe.seed))), post
    return estimate(problem, post, limits.interval, finished=True, budget_spent=not ended), (), post


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


def raced(problems: Sequence[Problem]) -> list[list[Problem]]:
    """The problems in groups that are equal but for the learning rate, in the order of their first ones."""
    groups: dict[Problem, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(replace(problem, index=0, variant=replace(problem.variant, lr=0.0)), []).append(problem)
    return list(groups.values())


class Search:
    """The search of all variants of a scan.

    Results may be told in any order and at any time, also before their probe was asked for (a resumed scan
    tells all that it has stored, then asks for the rest): each counts once its round is open, and a round
    counts once it is whole. A variant's rounds and estimates do not depend on those that it does not race with.

    Args:
        problems: the variants; ``Problem.index`` is the key of all else.
        seeds: at most so many probes at one n of one variant.
        interval: probability content of the reported interval, in (0, 1).
        tolerance: half-width of the interval, as a share of EMC50, at which a variant is done.
        max_probes: at most so many probes a variant; the winner of a race has as many again.
        races: whether variants race that differ only in their learning rate.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        seeds: int,
        interval: float,
        tolerance: float,
        max_probes: int,
        races: bool = False,
    ) -> None:
        limits = Limits(seeds=seeds, interval=interval, tolerance=tolerance, max_probes=max_probes)
        by_index: dict[int, _Group] = {}
        for problems_of in raced(problems) if races else [[problem] for problem in problems]:
            by_index.update(dict.fromkeys((problem.index for problem in problems_of), _Group(problems_of, limits)))
        self._groups = {problem.index: by_index[problem.index] for problem in problems}

    def ask(self) -> list[Probe]:
        """The probes of rounds opened since the last call, but those already told; each is given out once.

        Variants come in the order of the problems, a round's probes by descending n (the longest first).
        """
        return [probe for index, group in self._groups.items() for probe in group.take(index)]

    def tell(self, results: Sequence[ProbeResult]) -> None:
        """Take results in.

        Args:
            results: in any order; of each, only ``probe`` and ``fitted`` are used.

        Raises:
            ValueError: a probe is of no variant of this search, or was told before with the other verdict.
        """
        for result in results:
            if result.probe.variant not in self._groups:
                raise ValueError(f"{result.probe} is of no variant of this search")
            self._groups[result.probe.variant].record(result.probe, result.fitted)
        for index in {result.probe.variant for result in results}:
            self._groups[index].advance()

    def estimates(self) -> list[Estimate]:
        """One for each variant, in the order of the problems, from its finished rounds."""
        return [group.estimate(index) for index, group in self._groups.items()]

    @property
    def done(self) -> bool:
        """Whether the search of every variant has ended, and with it every race and its confirmation."""
        return all(group.done for group in self._groups.values())

    def probes_left(self, index: int) -> int:
        """About how many results of a variant are to come: its open round, or more if its interval is wide.

        The interval's width falls with the square root of the number of probes. The confirmation of a race is
        counted with its leader.

        Args:
            index: ``Problem.index``.
        """
        return self._groups[index].probes_left(index)


class _Group:
    """Variants that race, or one alone.

    Those left in a race go in step: a round of the group is whole once that of each of them is. A variant whose own
    search has ended waits, and may still be dropped. The race ends when one is left, or all that are left have ended;
    the leader has won. Its confirmation is a search of its own: no probe of the race, which chose it, has a part in it.
    """

    def __init__(self, problems: Sequence[Problem], limits: Limits) -> None:
        self._problems = {problem.index: problem for problem in problems}
        self._limits = limits
        self._told: dict[tuple[int, int, int], bool] = {}
        self._searches = {problem.index: _VariantSearch(problem, limits, self._told) for problem in problems}
        self._left = list(self._problems)  # not dropped
        self._leader = self._left[0]
        self._winner: int | None = None
        self._confirmation: _VariantSearch | None = None

    @property
    def _races(self) -> bool:
        return len(self._problems) > 1

    @property
    def done(self) -> bool:
        return (self._confirmation is not None or not self._races) and not self._running()

    def record(self, probe: Probe, fitted: bool) -> None:
        if self._told.setdefault((probe.variant, probe.n, probe.seed), fitted) != fitted:
            raise ValueError(f"{probe} was told before with the other verdict")

    def advance(self) -> None:
        while (running := self._running()) and not any(search.missing() for search in running.values()):
            for search in running.values():
                search.close()
            if self._races and self._confirmation is None:
                self._judge()

    def take(self, index: int) -> list[Probe]:
        running = self._running()
        return running[index].take() if index in running else []

    def estimate(self, index: int) -> Estimate:
        own = self._searches[index].estimate
        if not self._races:
            return own
        if index == self._winner and self._confirmation is not None:
            shown, race = self._confirmation.estimate, Race.WON
        elif index not in self._left:
            shown, race = replace(own, finished=True), Race.DROPPED
        elif self._winner is None:
            shown, race = replace(own, finished=False), Race.RUNNING
        else:
            shown, race = own, Race.LOST
        return replace(shown, race=race, race_emc50=own.emc50, race_low=own.emc50_low, race_high=own.emc50_high)

    def probes_left(self, index: int) -> int:
        running = self._running()
        left = running[index].probes_left() if index in running else 0
        if self._races and self._confirmation is None and index == self._leader:
            left += min(self._searches[index].estimate.n_probes + left, self._limits.max_probes)
        return left

    def _running(self) -> dict[int, "_VariantSearch"]:
        """The searches that have an open round."""
        if self._confirmation is not None and self._winner is not None:
            return {self._winner: self._confirmation} if self._confirmation.open else {}
        return {index: self._searches[index] for index in self._left if self._searches[index].open}

    def _judge(self) -> None:
        """After a round: drop those that are clearly worse, and end the race if it is decided."""
        problem = self._problems[self._leader]
        bottom, top = math.log(problem.n_min), math.log(problem.n_max)
        posts = {index: self._searches[index].posterior for index in self._left}
        medians = {index: min(max(post.quantile(0.5)[0], bottom), top) for index, post in posts.items()}
        # The largest median; the first of equal ones, as are all beyond an end of the range.
        leader = self._leader = max(self._left, key=medians.__getitem__)
        self._left = [
            index
            for index, post in posts.items()
            if index == leader or post.below(posts[leader], bottom, top) <= SURELY_WORSE
        ]
        if len(self._left) == 1 or not self._running():
            self._winner = leader
            self._confirmation = _VariantSearch(self._problems[leader], self._limits, self._told, CONFIRM)


class _VariantSearch:
    """The rounds of one search: of a variant, or of the confirmation of a winner, which starts at another seed.

    ``told`` holds the verdicts by (variant, n, seed); who owns it adds to it, and closes rounds that are whole.
    """

    def __init__(
        self, problem: Problem, limits: Limits, told: Mapping[tuple[int, int, int], bool], first_seed: int = 0
    ) -> None:
        self._problem = problem
        self._limits = limits
        self._told = told
        self._first_seed = first_seed
        self._rounds: list[dict[Probe, bool]] = []
        self._open_round()

    def _open_round(self) -> None:
        self.estimate, self.open, self.posterior = next_round(
            self._problem, self._rounds, self._limits, self._first_seed
        )
        self._asked = False

    def close(self) -> None:
        self._rounds.append({probe: self._told[probe.variant, probe.n, probe.seed] for probe in self.open})
        self._open_round()

    def take(self) -> list[Probe]:
        asked, self._asked = self._asked, True
        return [] if asked else self.missing()

    def missing(self) -> list[Probe]:
        return [probe for probe in self.open if (probe.variant, probe.n, probe.seed) not in self._told]

    def probes_left(self) -> int:
        if not self.open:
            return 0
        n_probes = self.estimate.n_probes
        half_width = (self.estimate.emc50_high - self.estimate.emc50_low) / 2.0
        more = float(2 * ROUND_PROBES)
        if math.isfinite(self.estimate.emc50) and math.isfinite(half_width):
            more = n_probes * ((half_width / (self._limits.tolerance * self.estimate.emc50)) ** 2 - 1.0)
        return max(len(self.missing()), math.ceil(min(more, self._limits.max_probes - n_probes)))
