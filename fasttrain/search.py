"""Which probes to run: for each variant, rounds that close in on its EMC50. ask() and tell(); numpy only.

A variant is searched in rounds. Round r + 1 is a pure function (``next_round``) of the problem, the limits
and the variant's rounds up to r, whole: neither timing nor other variants decide which probes run, so a scan
that is interrupted, reordered or spread over devices asks for the same ones.

Variants that differ only in their learning rate may race: their rounds go in step, those that are clearly worse
are dropped after a round, and the winner is searched anew on fresh seeds. All of that is a function of the rounds too.

Once EMC50 is known at the full budget, short probes measure it at a third of that, for its elasticity.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fasttrain.estimate import Posterior, estimate, posterior
from fasttrain.records import Censored, Estimate, Probe, ProbeResult, Problem, Race
from fasttrain.spec import CONFIRM, SHORT

ROUND_PROBES = 8
"""Probes of a round once a fit and a failure were seen; of later ones at least."""
ROUND_MARGIN = 1.25
"""A round has as many times the probes that the tolerance seems to want, all rounds together."""
LEAST_PROBES = 32
LEAST_SHORT = 24
"""With fewer than these no interval is narrow enough at a tolerance of 0.1 or less: the slope rests on chance. Of short
probes, whose search knows already where to look. At 0.2 and more half as many do (``least``)."""
SHORT_TOLERANCE = 1.5
"""Of short probes, times that of the others: they are for the elasticity, whose interval has both in it."""
END_PROBES = 4
"""Probes of a round before that, at an end of the range; five with the ladder's."""
SURELY_WORSE = 0.99
"""A learning rate is dropped once its EMC50 is below the leader's with more than this probability."""
_SHALLOW = 0.05  # quantile of the slope at which the interval may be wider than the tolerance, but not much

_LADDER = (8, 4, 2, 1)  # parameters per sample of the first n; measured EMC50 are at 4 to 1
_TARGETS = (0.1, 0.9)  # P(fit) of a round's probes: near the half they tell EMC50, off it the slope and the form
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


Verdicts = Mapping[int, Sequence[bool]]
"""Whether each probe fitted, by n."""


def next_round(
    problem: Problem,
    rounds: Sequence[Mapping[Probe, bool]],
    limits: Limits,
    first_seed: int = 0,
    known: Verdicts | None = None,
) -> tuple[Estimate, tuple[Probe, ...], Posterior]:
    """The estimate from the finished rounds, and the probes of the next one; none if the search has ended.

    Round 0 is a ladder of single probes from an eighth of the parameter count to all of it. While all fit or
    none does, two more rungs follow, each a factor of two on, until an end of the range. Then each round's
    probes go where the posterior predictive P(fit | n) is 0.1 to 0.9, or to the end of the range nearest to
    that (the placement rule of Kontsevich & Tyler 1999, with spread for a whole round in place of one look
    ahead). A round has ``ROUND_PROBES``, or as many as the tolerance seems to want, ``ROUND_MARGIN`` times, but at most
    as many as there are already.

    The search of a variant ends when a fit and a failure were seen, ``least`` probes ran, (high - low) / (2 EMC50)
    is at most the tolerance and would not be much more were the slope at its lower 5 % (``_narrow``); when the whole
    interval lies beyond an end of the range and five probes (or all seeds) ran at that end; or when max_probes or the
    telling n are used up: then ``budget_spent`` is set.

    Stopping at the first narrow interval favours curves that look steep by chance: of slope 4, those that ended with
    fewer than 45 probes covered the truth in 4 of 10 cases. Few looks and a least number of probes are the remedies;
    what they leave is in docs/measuring.md.

    Args:
        problem: the variant and its range of n.
        rounds: whether each probe fitted, round by round.
        limits: when to stop.
        first_seed: at each n; all rounds must have begun there.
        known: verdicts of other probes that count, too.

    Returns:
        The estimate, the probes by descending n, and the posterior that both rest on.
    """
    verdicts, post, running = assess(problem, rounds, limits, known)
    used: dict[int, int] = {}
    for probe in (probe for finished_round in rounds for probe in finished_round):
        used[probe.n] = used.get(probe.n, 0) + 1
    own = sum(used.values())
    enough = own >= min(least(limits, bool(known)), limits.max_probes)
    ended = enough and _narrow(running, post, limits)
    ended = ended or _surely_censored(problem, verdicts, running, post, limits)
    targets: Sequence[int] = ()
    left = limits.max_probes - own
    bounds = (problem.n_min, problem.n_max)
    if not ended and left > 0:
        fitted_all = [fitted for seen in verdicts.values() for fitted in seen]
        mixed = any(fitted_all) and not all(fitted_all)
        targets = () if mixed else _ladder(problem, sorted(verdicts), all(fitted_all))
        if not targets:
            count = min(left, _round_size(running, limits, own) if mixed else END_PROBES)
            targets, bounds = _placed(problem, post, count)
    probes = []
    for target in targets[:left]:
        n = _nearest_with_room(target, used, limits.seeds, bounds)
        if n is not None:
            probes.append(Probe(problem.index, n, first_seed + used.get(n, 0), len(rounds)))
            used[n] = used.get(n, 0) + 1
    if probes:
        return running, tuple(sorted(probes, key=lambda probe: (-probe.n, probe.seed))), post
    return estimate(problem, post, limits.interval, finished=True, budget_spent=not ended), (), post


Design = Callable[[Problem, Sequence[Mapping[Probe, bool]], Limits, int], tuple[Estimate, tuple[Probe, ...], Posterior]]
"""What decides on the probes: ``next_round``, or another one of its kind (``fasttrain.designs``)."""


def least(limits: Limits, short: bool = False) -> int:
    """Probes before any interval counts as narrow: fewer the less narrow it need be, since fewer looks then end it."""
    tolerance = limits.tolerance / SHORT_TOLERANCE if short else limits.tolerance
    share = min(max(0.1 / tolerance, 0.5), 1.0)
    return round((LEAST_SHORT if short else LEAST_PROBES) * share)


def assess(
    problem: Problem,
    rounds: Sequence[Mapping[Probe, bool]],
    limits: Limits,
    known: Verdicts | None = None,
) -> tuple[dict[int, list[bool]], Posterior, Estimate]:
    """The verdicts at each n, and what they say."""
    verdicts = {n: list(seen) for n, seen in (known or {}).items()}
    for finished_round in rounds:
        for probe, fitted in finished_round.items():
            verdicts.setdefault(probe.n, []).append(fitted)
    fits = [sum(seen) for seen in verdicts.values()]
    fails = [len(seen) - sum(seen) for seen in verdicts.values()]
    post = posterior(list(verdicts), fits, fails, n_min=problem.n_min, n_max=problem.n_max)
    return verdicts, post, estimate(problem, post, limits.interval)


def _width_share(estimate: Estimate, limits: Limits) -> float:
    """Half-width of the interval, as a share of the one wanted; infinite or NaN where it is not known."""
    return (estimate.emc50_high - estimate.emc50_low) / (2.0 * limits.tolerance * estimate.emc50)


def _narrow(estimate: Estimate, post: Posterior, limits: Limits) -> bool:
    """Whether the interval is narrow enough, and would not be much wider were the curve as shallow as it may be."""
    share = _width_share(estimate, limits)
    # 1.5 times the tolerance, 3 times where that is 0.2 or more: simulated, intervals cover no less often for it.
    most = min(max(15.0 * limits.tolerance, 1.5), 3.0)
    return share <= 1.0 and share * post.slope / post.slope_at(_SHALLOW) <= most


def _round_size(estimate: Estimate, limits: Limits, own: int) -> int:
    """Probes of the next round: few looks, since each is an occasion to stop at a chance narrow interval.

    ``own`` are those in earlier rounds; of what was known before, many may be far from EMC50 and tell little.
    """
    share = _width_share(estimate, limits)
    if not math.isfinite(share):
        return ROUND_PROBES
    wanted = math.ceil(estimate.n_probes * (ROUND_MARGIN * share**2 - 1.0))
    return min(max(wanted, ROUND_PROBES), max(own, ROUND_PROBES))


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


RunSteps = Callable[[Problem, int, bool], int]
"""Optimizer steps that a run of a variant at n may take; True asks for a short one."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a scan was asked for before it was extended, or is since.

    Attributes:
        problems: its variants, by the index that they have now; their ranges of n are those of then.
        limits: when to stop.
        design: what decides on the probes of a round, from the rounds before it.
    """

    problems: Mapping[int, Problem]
    limits: Limits
    design: Design = next_round


class Search:
    """The search of all variants of a scan.

    Results may be told in any order and at any time, also before their probe was asked for (a resumed scan
    tells all that it has stored, then asks for the rest): each counts once its round is open, and a round
    counts once it is whole. A variant's rounds and estimates do not depend on those that it does not race with.

    A scan that was extended is searched as it was asked for at first, and goes on from there by each later stage: so
    every probe of before has its part in what comes after, and the rounds still follow from what was asked alone.

    Args:
        problems: the variants; ``Problem.index`` is the key of all else.
        seeds: at most so many probes at one n of one variant.
        interval: probability content of the reported interval, in (0, 1).
        tolerance: half-width of the interval, as a share of EMC50, at which a variant is done.
        max_probes: at most so many probes a variant; the winner of a race has as many again, and so have short probes.
        races: whether variants race that differ only in their learning rate; in all stages the same ones.
        run_steps: budgets of runs, where EMC50 at a third of the budget is measured; None where it is not.
        early_tells: whether full runs are checked often enough to count at a third of their budget too.
        design: what decides on the probes of a round, from the rounds before it.
        earlier: stages before this one.
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
        run_steps: RunSteps | None = None,
        early_tells: bool = True,
        design: Design = next_round,
        earlier: Sequence[Stage] = (),
    ) -> None:
        limits = Limits(seeds=seeds, interval=interval, tolerance=tolerance, max_probes=max_probes)
        stages = [*earlier, Stage({problem.index: problem for problem in problems}, limits, design)]
        by_index: dict[int, _Group] = {}
        for problems_of in raced(problems) if races else [[problem] for problem in problems]:
            indices = [problem.index for problem in problems_of]
            own = [stage for stage in stages if indices[0] in stage.problems]
            by_index.update(dict.fromkeys(indices, _Group(indices, own, run_steps, early_tells)))
        self._groups = {problem.index: by_index[problem.index] for problem in problems}

    def ask(self) -> list[Probe]:
        """The probes of rounds opened since the last call, but those already told; each is given out once.

        Variants come in the order of the problems, a round's probes by descending n (the longest first).
        """
        return [probe for index, group in self._groups.items() for probe in group.take(index)]

    def tell(self, results: Sequence[ProbeResult]) -> None:
        """Take results in.

        Args:
            results: in any order; of each, only ``probe``, ``fitted`` and ``fit_step`` are used.

        Raises:
            ValueError: a probe is of no variant of this search, or was told before with another verdict.
        """
        for result in results:
            if result.probe.variant not in self._groups:
                raise ValueError(f"{result.probe} is of no variant of this search")
            self._groups[result.probe.variant].record(result)
        for index in {result.probe.variant for result in results}:
            self._groups[index].advance()

    def estimates(self) -> list[Estimate]:
        """One for each variant, in the order of the problems, from its finished rounds."""
        return [group.estimate(index) for index, group in self._groups.items()]

    @property
    def done(self) -> bool:
        """Whether the search of every variant has ended, and with it every race, confirmation and short probe."""
        return all(group.done for group in self._groups.values())

    def probes_left(self, index: int) -> float:
        """About how many results of a variant are to come, a short one as a third.

        The interval's width falls with the square root of the number of probes. The confirmation of a race and the
        short probes after it are counted with its leader.

        Args:
            index: ``Problem.index``.
        """
        return self._groups[index].probes_left(index)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a probe says: whether it fitted, and whether already within a third of the budget."""

    fitted: bool
    early: bool


_VERDICTS = {(fitted, early): _Verdict(fitted, early) for fitted in (False, True) for early in (False, True)}
"""One object of each kind: a scan may have very many verdicts."""


class _Told:
    """The verdicts told so far, by variant, n and seed."""

    def __init__(self, problems: Mapping[int, Problem], run_steps: RunSteps | None) -> None:
        self._problems, self._run_steps = problems, run_steps
        self._verdicts: dict[tuple[int, int, int], _Verdict] = {}

    def record(self, result: ProbeResult) -> None:
        probe, early = result.probe, False
        if self._run_steps is not None and result.fitted:
            early = result.fit_step <= self._run_steps(self._problems[probe.variant], probe.n, True)
        verdict = _VERDICTS[result.fitted, early]
        if self._verdicts.setdefault((probe.variant, probe.n, probe.seed), verdict) != verdict:
            raise ValueError(f"{probe} was told before with another verdict")

    def __contains__(self, probe: Probe) -> bool:
        return (probe.variant, probe.n, probe.seed) in self._verdicts

    def __getitem__(self, probe: Probe) -> _Verdict:
        return self._verdicts[probe.variant, probe.n, probe.seed]


class _Group:
    """Variants that race, or one alone.

    Those left in a race go in step: a round of the group is whole once that of each of them is. A variant whose own
    search has ended waits, and may still be dropped. The race ends when one is left, or all that are left have ended;
    the leader has won. Its confirmation is a search of its own: no probe of the race, which chose it, has a part in it.
    Short probes come last, of the winner or the only one.
    """

    def __init__(
        self, indices: Sequence[int], stages: Sequence[Stage], run_steps: RunSteps | None, early_tells: bool
    ) -> None:
        first, *self._coming = stages
        self._stage = first
        self._problems = {index: first.problems[index] for index in indices}
        self._told = _Told(self._problems, run_steps)
        self._run_steps = run_steps
        self._early_tells = early_tells
        self._searches = {index: _VariantSearch(index, first, self._told) for index in indices}
        self._left = list(self._problems)  # not dropped
        self._leader = self._left[0]
        self._winner = None if self._races else self._leader
        self._final = None if self._races else self._searches[self._leader]  # whose estimate is the winner's
        self._short: _VariantSearch | None = None
        self._short_stage = first  # the last one that short probes have been asked for

    @property
    def _races(self) -> bool:
        return len(self._problems) > 1

    @property
    def done(self) -> bool:
        return self._final is not None and not self._running()

    def record(self, result: ProbeResult) -> None:
        self._told.record(result)
        for search in (self._searches[result.probe.variant], self._final, self._short):
            if search is not None and search.problem.index == result.probe.variant:
                search.hear(result.probe)

    def advance(self) -> None:
        while (running := self._running()) and not any(search.awaited for search in running.values()):
            for search in running.values():
                search.close()
            if self._final is None:
                self._judge()
            while self._final is not None and not self._running() and self._goes_on(self._final):
                pass

    def take(self, index: int) -> list[Probe]:
        running = self._running()
        return running[index].take() if index in running else []

    def estimate(self, index: int) -> Estimate:
        own = self._searches[index].estimate
        if index == self._winner and self._final is not None:
            shown = self._with_short(self._final)
        elif index in self._left and self._winner is None:
            shown = replace(own, finished=False)
        else:
            shown = replace(own, finished=True) if index not in self._left else own
        if not self._races:
            return shown
        if index == self._winner:
            race = Race.WON
        elif index not in self._left:
            race = Race.DROPPED
        else:
            race = Race.RUNNING if self._winner is None else Race.LOST
        return replace(shown, race=race, race_emc50=own.emc50, race_low=own.emc50_low, race_high=own.emc50_high)

    def probes_left(self, index: int) -> float:
        running = self._running()
        left: float = running[index].probes_left() if index in running else 0
        if self._short is not None:
            return left / 3.0
        first = self._leader if self._final is None else self._winner
        if index != first:
            return left
        if self._final is None:
            left += min(self._searches[index].estimate.n_probes + left, self._stage.limits.max_probes)
        if self._run_steps is not None:
            left += min(least(_shorter(self._stage).limits, True), self._stage.limits.max_probes) / 3.0
        return left

    def _running(self) -> dict[int, "_VariantSearch"]:
        """The searches that have an open round."""
        if self._final is None or self._winner is None:
            return {index: self._searches[index] for index in self._left if self._searches[index].open}
        last = self._short if self._short is not None and self._short.open else self._final
        return {self._winner: last} if last.open else {}

    def _goes_on(self, final: "_VariantSearch") -> bool:
        """What follows once nothing is open: short probes, or the next stage; whether there was anything."""
        if self._run_steps is not None and (self._short is None or self._short_stage is not self._stage):
            self._ask_short(final)
            return True
        if not self._coming:
            return False
        self._stage, *self._coming = self._coming
        final.extend(self._stage)
        return True

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
            self._final = _VariantSearch(leader, self._stage, self._told, CONFIRM)

    def _ask_short(self, final: "_VariantSearch") -> None:
        """Starts from what the probes of the full budget say of a third of it, if they would have gone the same way."""
        problem = final.problem
        known = final.early() if self._early_tells and problem.variant.schedule == "constant" else {}
        stage = _shorter(self._stage)
        if self._short is None:
            self._short = _VariantSearch(problem.index, stage, self._told, SHORT, known)
        else:
            self._short.extend(stage, known)
        self._short_stage = self._stage

    def _with_short(self, final: "_VariantSearch") -> Estimate:
        shown = final.estimate
        if self._run_steps is None:
            return shown
        if self._short is None:
            return replace(shown, finished=False)
        third = self._short.estimate
        shown = replace(shown, third=third, finished=shown.finished and third.finished)
        if math.isnan(shown.emc50) or math.isnan(third.emc50):
            return shown
        n = round(shown.emc50)
        rise = math.log(self._run_steps(final.problem, n, False) / self._run_steps(final.problem, n, True))
        if rise == 0.0:  # a budget of one step has no third
            return shown
        content = self._stage.limits.interval
        low, median, high = final.posterior.minus(
            self._short.posterior, (1.0 - content) / 2.0, 0.5, (1.0 + content) / 2.0
        )
        return replace(shown, elasticity=median / rise, elasticity_low=low / rise, elasticity_high=high / rise)


def _shorter(stage: Stage) -> Stage:
    """The same for short probes."""
    return replace(stage, limits=replace(stage.limits, tolerance=SHORT_TOLERANCE * stage.limits.tolerance))


class _VariantSearch:
    """The rounds of one search: of a variant, of the confirmation of a winner, which starts at another seed, or of
    short probes, which start at yet another one and from verdicts known before.

    ``told`` holds the verdicts; who owns it adds to it, and closes rounds that are whole.
    """

    def __init__(
        self,
        index: int,
        stage: Stage,
        told: _Told,
        first_seed: int = 0,
        known: Verdicts | None = None,
    ) -> None:
        self._index = index
        self._told = told
        self._first_seed = first_seed
        self._rounds: list[dict[Probe, bool]] = []
        self.extend(stage, known)

    def extend(self, stage: Stage, known: Verdicts | None = None) -> None:
        """Goes on by another stage, from the rounds that there are."""
        self.problem = stage.problems[self._index]
        self._limits = stage.limits
        self._next = stage.design if known is None else partial(next_round, known=known)
        self._adaptive = stage.design is next_round
        self._open_round()

    def _open_round(self) -> None:
        self.estimate, self.open, self.posterior = self._next(
            self.problem, self._rounds, self._limits, self._first_seed
        )
        self._asked = False
        self.awaited = {(probe.n, probe.seed): probe for probe in self.open if probe not in self._told}

    def close(self) -> None:
        self._rounds.append({probe: self._told[probe].fitted for probe in self.open})
        self._open_round()

    def hear(self, probe: Probe) -> None:
        """A verdict has come. One at a time: a round of a grid may have very many probes."""
        self.awaited.pop((probe.n, probe.seed), None)

    def take(self) -> list[Probe]:
        asked, self._asked = self._asked, True
        return [] if asked else list(self.awaited.values())

    def early(self) -> dict[int, list[bool]]:
        """Whether each probe fitted within a third of the budget, by n."""
        out: dict[int, list[bool]] = {}
        for probe in (probe for finished_round in self._rounds for probe in finished_round):
            out.setdefault(probe.n, []).append(self._told[probe].early)
        return out

    def probes_left(self) -> int:
        if not self.open:
            return 0
        if not self._adaptive:  # no interval ends it
            return len(self.awaited)
        own = sum(map(len, self._rounds))
        share = _width_share(self.estimate, self._limits)
        more = self.estimate.n_probes * (share**2 - 1.0) if math.isfinite(share) else float(2 * ROUND_PROBES)
        more = max(more, least(self._limits, self._first_seed == SHORT) - own)
        return max(len(self.awaited), math.ceil(min(more, self._limits.max_probes - own)))
