"""Which probes to run where the search is not the adaptive one: ladders to the first failure, and a grid. No torch.

Each is a ``search.Design``: a pure function of the variant and its finished rounds, as ``search.next_round`` is.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from fasttrain.errors import UserError
from fasttrain.estimate import Posterior, estimate
from fasttrain.records import Estimate, Probe, Problem
from fasttrain.search import Design, Limits, assess, next_round
from fasttrain.spec import ScanSpec

_FIRST_SHARE = 8  # parameters per sample of a ladder's first n, as of the adaptive search's
_LIKELY_SHARE = 2.5  # parameters per sample about where ladders end
_LIKELY_PROBES = 45  # of a variant of the default scan, at its full budget


def design_of(spec: ScanSpec) -> Design:
    """What decides on the probes of a scan."""
    if spec.search == "paper":
        return partial(paper_round, growth=spec.growth)
    if spec.search == "grid":
        return partial(grid_round, ns=spec.n or ())
    return next_round


def n_range(spec: ScanSpec, params: int, n_max: int) -> tuple[int, int]:
    """Smallest and largest n of a variant.

    Args:
        spec: the scan.
        params: of the variant.
        n_max: where the spec leaves it open.

    Raises:
        UserError: the smallest is not below the largest; those of a grid may be equal.
    """
    if spec.search == "grid" and spec.n:
        return spec.n_min or spec.n[0], spec.n_max or spec.n[-1]
    n_max = spec.n_max or n_max
    default = max(2, min(params, n_max) // _FIRST_SHARE) if spec.search == "paper" else 2
    n_min = spec.n_min or min(default, n_max - 1)
    if n_min >= n_max:
        raise UserError("n_min", n_min, f"expected less than n-max, which is {n_max} here")
    return n_min, n_max


def probes_of(spec: ScanSpec, problem: Problem) -> tuple[int, int]:
    """How many probes a search of a variant is likely to take, and how many at most."""
    if spec.search == "grid":
        return (len(spec.n or ()) * spec.seeds,) * 2
    if spec.search == "paper":
        rungs = ladder(problem, spec.growth)
        likely = sum(n <= problem.params / _LIKELY_SHARE for n in rungs) + 1
        return min(likely * spec.seeds, spec.max_probes), min(len(rungs) * spec.seeds, spec.max_probes)
    return min(_LIKELY_PROBES, spec.max_probes), spec.max_probes


def ladder(problem: Problem, growth: float) -> list[int]:
    """The n of a ladder that never fails, ascending: from n_min, each ``growth`` times the one before, to n_max."""
    rungs = [problem.n_min]
    while rungs[-1] < problem.n_max:
        rungs.append(_next_n(rungs[-1], problem, growth))
    return rungs


def _next_n(n: int, problem: Problem, growth: float) -> int:
    return min(max(round(min(n * growth, problem.n_max)), n + 1), problem.n_max)


def paper_round(
    problem: Problem,
    rounds: Sequence[Mapping[Probe, bool]],
    limits: Limits,
    first_seed: int = 0,
    *,
    growth: float,
) -> tuple[Estimate, tuple[Probe, ...], Posterior]:
    """The next rung of every seed's ladder: n grows until the seed's first failure (Shwartz-Ziv et al. 2024).

    Every seed climbs by itself: a ladder starts at n_min, each n is a fresh training set and a fresh initialisation,
    and it ends at the first failure, or at n_max. All that still climb are at the same n, so that a round is one n,
    but for a scan that was extended, whose new seeds begin below. Where max_probes does not reach for all of them the
    largest n go on and of these the first seeds, the last round is short, and ``budget_spent`` is set.

    Args:
        problem: the variant and its range of n.
        rounds: whether each probe fitted, round by round.
        limits: as many ladders as ``seeds``; the tolerance has no part in it.
        first_seed: of the first ladder.
        growth: factor from one n to the next, > 1; n grows by at least 1.

    Returns:
        As ``search.next_round``. The estimate is the posterior's, from all probes; that of the procedure itself is
        ``fasttrain.estimates(results, "paper")``.
    """
    _, post, running = assess(problem, rounds, limits)
    rungs = dict.fromkeys(range(first_seed, first_seed + limits.seeds), problem.n_min)
    for probe, fitted in (item for finished_round in rounds for item in finished_round.items()):
        n = _next_n(probe.n, problem, growth)
        if fitted and n > probe.n:
            rungs[probe.seed] = n
        else:
            rungs.pop(probe.seed, None)
    climbing = sorted(rungs.items(), key=lambda rung: (-rung[1], rung[0]))
    left = max(0, limits.max_probes - running.n_probes)
    probes = tuple(Probe(problem.index, n, seed, len(rounds)) for seed, n in climbing[:left])
    if probes:
        return running, probes, post
    return estimate(problem, post, limits.interval, finished=True, budget_spent=bool(climbing)), (), post


def grid_round(
    problem: Problem,
    rounds: Sequence[Mapping[Probe, bool]],
    limits: Limits,
    first_seed: int = 0,
    *,
    ns: Sequence[int],
) -> tuple[Estimate, tuple[Probe, ...], Posterior]:
    """All seeds at all n, in one round; of a scan that was extended, those that are missing.

    Args:
        problem: the variant.
        rounds: whether each probe fitted.
        limits: ``seeds`` probes at every n; max_probes and the tolerance have no part in it.
        first_seed: at each n.
        ns: training samples, distinct, within the problem's range.

    Returns:
        As ``search.next_round``.
    """
    _, post, running = assess(problem, rounds, limits)
    done = {(probe.n, probe.seed) for finished_round in rounds for probe in finished_round}
    seeds = range(first_seed, first_seed + limits.seeds)
    wanted = ((n, seed) for n in sorted(ns, reverse=True) for seed in seeds)
    probes = tuple(Probe(problem.index, *one, len(rounds)) for one in wanted if one not in done)
    if probes:
        return running, probes, post
    return estimate(problem, post, limits.interval, finished=True), (), post
