"""From the probes of a variant to its EMC50: a grid posterior over a psychometric function. numpy only.

The share of training runs that fit n samples falls with n like the psychometric functions of sensory science,
and is treated as they are (Kontsevich & Tyler 1999, "Bayesian adaptive estimation of psychometric slope and
threshold"; Wichmann & Hill 2001 for the lapse)::

    P(fit | n) = (1 - lapse) / (1 + (1 - 2 lapse) exp(s (ln n - m)))

so that the *whole* probability, lapses included, is 1/2 at n = e^m = EMC50. The prior is flat in m, from a
factor of four below n_min to a factor of four above n_max; flat in ln s between ``SLOPES``; falling in the lapse.
Flat in m and in ln s is the prior of a location and a scale under which Bayesian and frequentist intervals agree
for continuous data (Berger 1985, section 3.3); how nearly they do for verdicts is measured in docs/measuring.md.
Perfect separation (every n fits up to some n, none above) is the normal case: the likelihood then has no
maximum, the posterior a width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fasttrain.records import Censored, Estimate, Problem

SLOPES = (2.0, 100.0)
"""Ends of the prior of the slope, flat in its logarithm; measured slopes run from 3 at small widths to about 60."""
LAPSE_MOST = 0.2
LAPSE_FALL = 4
"""Prior density of the lapse: proportional to (1 - lapse / LAPSE_MOST)^LAPSE_FALL, mean 0.033."""
MARGIN = math.log(4.0)
"""How far the prior of m = ln EMC50 reaches beyond what may be probed, at both ends."""

_M_NODES = 49
_SLOPE_NODES = 17
_LEAST_SHARE = 1e-5  # of the largest node's mass: less shows in no quantile
_MOST_MASS, _MOST_SLOPE_MASS = 0.06, 0.26  # of a single node, once the grid resolves the posterior

_DIFFERENCE_NODES = 199
_LEAST_INFORMATION = 0.25

_MOST_EXPONENT = 60.0
_FACTORS = 10  # of such exponents, their product stays within float64


def _lapse_rule(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss nodes in the lapse, and the log of their weights times the prior."""
    at, weights = np.polynomial.legendre.leggauss(nodes)
    lapses = LAPSE_MOST * (at + 1.0) / 2.0
    return lapses, np.log(weights) + LAPSE_FALL * np.log1p(-lapses / LAPSE_MOST)


# The likelihood is a polynomial of low degree in the lapse, unless there are many probes: few Gauss nodes do, and
# fewer where only the place of the mass in the other two dimensions is asked for.
_LAPSE_RULE = _lapse_rule(8)
_PLACING_RULE = _lapse_rule(3)
_LAPSES = _LAPSE_RULE[0]


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """Posterior of one variant on its last grid.

    Attributes:
        ns: the distinct n probed, ascending.
        fits: probes that fitted, at each of ``ns``.
        fails: probes that did not, at each of ``ns``.
        m: nodes in m = ln EMC50, over the part of the prior's range that carries mass, close where it is.
        log_slope: nodes in ln s, evenly spaced.
        weight: mass of each node, shape (m, log_slope, lapse); sums to 1.
    """

    ns: np.ndarray
    fits: np.ndarray
    fails: np.ndarray
    m: np.ndarray
    log_slope: np.ndarray
    weight: np.ndarray

    def quantile(self, *shares: float) -> list[float]:
        """The m below which each share of the posterior lies."""
        return _quantile(self.m, self.weight.sum((1, 2)), shares)

    def distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """Rising points in ln EMC50, sixteen between two nodes, and the share of the posterior below each."""
        return _cdf(self.m, self.weight.sum((1, 2)))

    def above(self, m: float) -> float:
        """P(ln EMC50 > m)."""
        x, below = self.distribution()
        return 1.0 - float(np.interp(m, x, below))

    def slope_at(self, share: float) -> float:
        """The slope below which a share of the posterior lies."""
        return math.exp(_quantile(self.log_slope, self.weight.sum((0, 2)), (share,))[0])

    def slope_below(self, slope: float) -> float:
        """P(slope < a value)."""
        x, below = _cdf(self.log_slope, self.weight.sum((0, 2)))
        return float(np.interp(math.log(slope), x, below))

    def below(self, other: "Posterior", bottom: float, top: float) -> float:
        """P(own ln EMC50 < the other's), the two independent; all beyond [bottom, top] counts as equal there."""
        x, own = self.distribution()
        at, others = other.distribution()
        mass = np.diff(np.interp(np.minimum(x, top), x, own))
        above = 1.0 - np.interp(np.maximum(x, bottom), at, others)
        return float((mass * (above[1:] + above[:-1])).sum() / 2.0)

    def minus(self, other: "Posterior", *shares: float) -> list[float]:
        """Quantiles of own ln EMC50 less the other's, the two taken as independent."""
        t = (np.arange(_DIFFERENCE_NODES) + 0.5) / _DIFFERENCE_NODES
        # Closer together towards the ends, so that far tails are met; what each stands for is the slope of this.
        nodes, mass = t**2 * (3.0 - 2.0 * t), t * (1.0 - t)
        own, others = (np.array(post.quantile(*nodes)) for post in (self, other))
        differences = np.subtract.outer(own, others).ravel()
        order = np.argsort(differences, kind="stable")
        below = np.cumsum(np.multiply.outer(mass, mass).ravel()[order])
        return np.interp(shares, (below - below[0] / 2.0) / below[-1], differences[order]).tolist()

    @property
    def misfit(self) -> float:
        """p-value of a test that P(fit | n) has the form of this model; 1 where the probes cannot tell.

        A score test (Rao 1948) of one more term in the logit, the third Legendre polynomial in the fitted
        probability, which has the shape of what is left where the curve falls in two steps or rises in between.
        What a change of the model's own three parameters would explain is projected out.
        """
        counts = self.fits + self.fails
        if not self.fits.any() or not self.fails.any():
            return 1.0
        m, slope, lapse = self.quantile(0.5)[0], self.slope, self.lapse
        x = np.log(self.ns) - m
        odds = np.exp(np.clip(slope * x, -_MOST_EXPONENT, _MOST_EXPONENT))
        scaled = (1.0 - 2.0 * lapse) * odds
        fit = (1.0 - lapse) / (1.0 + scaled)
        by_logistic = (1.0 - lapse) * scaled / (1.0 + scaled) ** 2
        by_lapse = (2.0 * (1.0 - lapse) * odds / (1.0 + scaled) - 1.0) / (1.0 + scaled)
        variance = np.maximum(fit * (1.0 - fit), 1e-12)
        tangents = np.stack([by_logistic, by_logistic * x, by_lapse], axis=1) / variance[:, None]
        u = 2.0 * fit / (1.0 - lapse) - 1.0
        term = (5.0 * u**3 - 3.0 * u) / 2.0
        root = np.sqrt(counts * variance)
        term -= tangents @ np.linalg.lstsq(root[:, None] * tangents, root * term, rcond=1e-9)[0]
        information = float((counts * variance * term**2).sum())
        if information < _LEAST_INFORMATION:
            return 1.0
        score = float(((self.fits - counts * fit) * term).sum())
        return math.erfc(abs(score) / math.sqrt(2.0 * information))

    @property
    def slope(self) -> float:
        """Posterior median of s."""
        return self.slope_at(0.5)

    @property
    def lapse(self) -> float:
        """Posterior mean of the lapse."""
        return float((self.weight.sum((0, 1)) * _LAPSES).sum())

    def fit_probability(self, x: np.ndarray) -> np.ndarray:
        """Posterior predictive P(fit) at each x = ln n, within 0.002.

        The lapse enters by its mean at each (m, slope), since P is nearly linear in it.
        """
        weight = self.weight.sum(2)
        i, j = np.nonzero(weight > 1e-3 * weight.max())
        kept = weight[i, j]
        lapse = (self.weight[i, j] * _LAPSES).sum(1) / kept
        z = np.exp(self.log_slope)[j] * (x[:, None] - self.m[i])
        np.exp(np.clip(z, -_MOST_EXPONENT, _MOST_EXPONENT, out=z), out=z)
        z *= 1.0 - 2.0 * lapse
        z += 1.0
        return (kept * (1.0 - lapse) / z).sum(1) / kept.sum()


def posterior(ns: Sequence[int], fits: Sequence[int], fails: Sequence[int], *, n_min: int, n_max: int) -> Posterior:
    """The posterior over (ln EMC50, slope, lapse) given the counts at each n.

    The grid moves its nodes, in m and in the slope, to what carries mass, until none carries much of it: its
    number of nodes, and so its cost, is the same however narrow the posterior.
    The same counts give the same bits in any order.

    Args:
        ns: training samples, distinct.
        fits: probes that fitted, at each of ``ns``.
        fails: probes that did not fit, at each of ``ns``.
        n_min: smallest n that may be probed.
        n_max: largest n that may be probed.
    """
    order = np.argsort(np.asarray(ns, dtype=np.int64))
    n, k, f = (np.asarray(values, dtype=np.int64)[order] for values in (ns, fits, fails))
    m = np.linspace(math.log(n_min) - MARGIN, math.log(n_max) + MARGIN, _M_NODES)
    log_slope = np.linspace(math.log(SLOPES[0]), math.log(SLOPES[1]), _SLOPE_NODES)
    for _ in range(3):
        weight = _weight(n, k, f, m, log_slope, _PLACING_RULE)
        mass = weight.sum((1, 2))
        slope_mass = weight.sum((0, 2))
        if mass.max() <= _MOST_MASS and slope_mass.max() <= _MOST_SLOPE_MASS:
            break
        if mass.max() <= 0.3:  # coarser, the nodes miss the ridge of steep slopes and would cut it off
            log_slope = _window(log_slope, slope_mass)
        m = _refined(m, mass)
    return Posterior(n, k, f, m, log_slope, _weight(n, k, f, m, log_slope, _LAPSE_RULE))


def estimate(
    problem: Problem,
    post: Posterior,
    interval: float,
    *,
    finished: bool = False,
    budget_spent: bool = False,
) -> Estimate:
    """What the posterior says of EMC50, never extrapolated beyond [n_min, n_max].

    Censored ``above``: P(EMC50 > n_max) is at least one half and a probe at n_max fitted; ``below``: P(EMC50
    < n_min) is at least one half and a probe at n_min failed. EMC50 is NaN then, as it is while its median
    lies outside of the range untested, or before both a fit and a failure were seen. Ends of the interval
    outside of the range are 0 and infinity.

    Args:
        problem: the variant and its range of n.
        post: its posterior, from ``posterior``.
        interval: probability content of the equal-tailed interval, in (0, 1).
        finished: passed on.
        budget_spent: passed on.
    """
    bottom, top = math.log(problem.n_min), math.log(problem.n_max)
    low, median, high = post.quantile((1 - interval) / 2, 0.5, (1 + interval) / 2)
    emc50_low = math.exp(low) if low >= bottom and post.fits.any() else 0.0
    emc50_high = math.exp(high) if high <= top and post.fails.any() else math.inf
    if post.ns.size and not post.fails.any():  # what lies beyond every n tried is the prior's word alone
        emc50_low = min(emc50_low, float(post.ns[-1]))
    if post.ns.size and not post.fits.any():
        emc50_high = max(emc50_high, float(post.ns[0]))
    known = bottom <= median <= top and post.fits.any() and post.fails.any()
    emc50 = math.exp(median) if known else math.nan
    censored = Censored.NO
    if median >= top and post.fits[post.ns == problem.n_max].any():
        censored, emc50, emc50_low, emc50_high = Censored.ABOVE, math.nan, float(problem.n_max), math.inf
    elif median <= bottom and post.fails[post.ns == problem.n_min].any():
        censored, emc50, emc50_low, emc50_high = Censored.BELOW, math.nan, 0.0, float(problem.n_min)
    return Estimate(
        variant=problem.index,
        emc50=emc50,
        emc50_low=emc50_low,
        emc50_high=emc50_high,
        slope=post.slope,
        lapse=post.lapse,
        censored=censored,
        budget_spent=budget_spent,
        finished=finished,
        n_probes=int(post.fits.sum() + post.fails.sum()),
        misfit_p=post.misfit,
    )


def _weight(
    n: np.ndarray,
    fits: np.ndarray,
    fails: np.ndarray,
    m: np.ndarray,
    log_slope: np.ndarray,
    lapse_rule: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Mass of every node (m, log_slope, lapse), sums to 1."""
    log_weight = _log_joint(np.log(n), fits, fails, m, log_slope, lapse_rule)
    weight = np.exp(log_weight - log_weight.max())
    weight *= _widths(m)[:, None, None] * _widths(log_slope)[:, None]
    return weight / weight.sum()


def _log_joint(
    x: np.ndarray,
    fits: np.ndarray,
    fails: np.ndarray,
    m: np.ndarray,
    log_slope: np.ndarray,
    lapse_rule: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Log of prior times likelihood, up to a constant, at every (m, log_slope, lapse); flat in the first two.

    Elementwise operations and products over the first axis only: a BLAS product would change bits with alignment.
    """
    odds = x[:, None, None] - m[:, None]
    odds = odds * np.exp(log_slope)
    # Beyond, log(1 + scale e^z) is z + log scale, which a failure has in both of its terms and a fit in one.
    beyond = np.maximum(odds, _MOST_EXPONENT)
    beyond *= fits[:, None, None]
    beyond = beyond.sum(0) - _MOST_EXPONENT * fits.sum()
    np.exp(np.clip(odds, -_MOST_EXPONENT, _MOST_EXPONENT, out=odds), out=odds)
    lapses, lapse_log_prior = lapse_rule
    out = np.empty((m.size, log_slope.size, lapses.size))
    by_fails, by_all = _equal_counts(odds, fails), _equal_counts(odds, fits + fails)
    for i, lapse in enumerate(lapses):
        scale = 1.0 - 2.0 * lapse
        out[:, :, i] = fits.sum() * math.log1p(-lapse) + lapse_log_prior[i] - beyond
        for count, some in by_fails:
            out[:, :, i] += count * np.log((scale * some + lapse).prod(0))
        for count, some in by_all:
            out[:, :, i] -= count * np.log((scale * some + 1.0).prod(0))
    return out


def _equal_counts(rows: np.ndarray, counts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The rows with a count, a few of equal count at a time: one logarithm of their product serves them all."""
    out = []
    for count in np.unique(counts[counts > 0]).tolist():
        same = rows[counts == count]
        out += [(count, same[start : start + _FACTORS]) for start in range(0, len(same), _FACTORS)]
    return out


def _widths(nodes: np.ndarray) -> np.ndarray:
    """Weights of the trapezium rule."""
    steps = np.diff(nodes) / 2.0
    return np.concatenate([steps[:1], steps[1:] + steps[:-1], steps[-1:]])


def _window(nodes: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """As many even nodes over the part of the range that carries mass, and one node beyond at either end."""
    kept = np.flatnonzero(mass >= _LEAST_SHARE * mass.max())
    first, last = max(kept[0] - 1, 0), min(kept[-1] + 1, nodes.size - 1)
    return np.linspace(nodes[first], nodes[last], nodes.size)


def _refined(nodes: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """As many nodes over the same part, close where the mass is: its tails, of gentle slopes, are long."""
    even = _window(nodes, mass)
    kept = (nodes >= even[0]) & (nodes <= even[-1])
    knots = nodes[kept]
    # By the root of the density: nodes spread by the density itself leave its 5 % points too coarse.
    share = _cumulative(knots, np.sqrt(mass[kept] / _widths(nodes)[kept]))
    share = 0.9 * share + 0.1 * (knots - knots[0]) / (knots[-1] - knots[0])
    return np.interp(np.linspace(0.0, 1.0, nodes.size), share, knots)


def _cumulative(nodes: np.ndarray, density: np.ndarray) -> np.ndarray:
    """The trapezium rule's integral up to each node, as a share of the whole."""
    out = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) * np.diff(nodes))])
    return out / out[-1]


def _cdf(nodes: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points and the share of the mass below each, with the log of the density linear between the nodes."""
    at = np.arange(nodes.size)
    x = np.interp(np.linspace(0, at[-1], 16 * at[-1] + 1), at, nodes)
    log_density = np.log(np.maximum(mass / _widths(nodes), 1e-300))
    return x, _cumulative(x, np.exp(np.interp(x, nodes, log_density)))


def _quantile(nodes: np.ndarray, mass: np.ndarray, shares: Sequence[float]) -> list[float]:
    x, below = _cdf(nodes, mass)
    return np.interp(shares, below, x).tolist()
