"""From the probes of a variant to its EMC50: a grid posterior over a psychometric function. numpy only.

The share of training runs that fit n samples falls with n like the psychometric functions of sensory science,
and is treated as they are (Kontsevich & Tyler 1999, "Bayesian adaptive estimation of psychometric slope and
threshold"; Wichmann & Hill 2001 for the lapse)::

    P(fit | n) = (1 - lapse) / (1 + (1 - 2 lapse) exp(s (ln n - m)))

so that the *whole* probability, lapses included, is 1/2 at n = e^m = EMC50. The prior is flat in m, from a
factor of four below n_min to a factor of four above n_max; log-normal in the slope s; falling in the lapse.
Perfect separation (every n fits up to some n, none above) is the normal case: the likelihood then has no
maximum, the posterior a width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fasttrain.records import Censored, Estimate, Problem

SLOPE_MEDIAN = 10.0
SLOPE_LOG_SD = 0.9
"""Prior of the slope, log-normal; measured slopes run from 3 at small widths to about 60."""
LAPSE_MOST = 0.2
LAPSE_FALL = 4
"""Prior density of the lapse: proportional to (1 - lapse / LAPSE_MOST)^LAPSE_FALL, mean 0.033."""
MARGIN = math.log(4.0)
"""How far the prior of m = ln EMC50 reaches beyond what may be probed, at both ends."""

_M_NODES = 49
_SLOPE_NODES = 17
_LOG_SHARE = -18.0  # nodes of less than e^-18 of the mode's density carry no mass that a quantile could show

# The likelihood is a polynomial of low degree in the lapse, unless there are many probes: few Gauss nodes do.
_nodes, _weights = np.polynomial.legendre.leggauss(5)
_LAPSES = LAPSE_MOST * (_nodes + 1.0) / 2.0
_LAPSE_LOG_PRIOR = np.log(_weights) + LAPSE_FALL * np.log1p(-_LAPSES / LAPSE_MOST)


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """Posterior of one variant on its last grid.

    Attributes:
        ns: the distinct n probed, ascending.
        fits: probes that fitted, at each of ``ns``.
        fails: probes that did not, at each of ``ns``.
        m: nodes in m = ln EMC50, evenly spaced over the part of the prior's range that carries mass.
        log_slope: nodes in ln s, evenly spaced.
        weight: mass of each node, shape (m, log_slope, lapse); sums to 1.
    """

    ns: np.ndarray
    fits: np.ndarray
    fails: np.ndarray
    m: np.ndarray
    log_slope: np.ndarray
    weight: np.ndarray

    def quantile(self, share: float) -> float:
        """The m below which ``share`` of the posterior lies."""
        return _quantile(self.m, self.weight.sum((1, 2)), share)

    def above(self, m: float) -> float:
        """P(ln EMC50 > m)."""
        density = self.weight.sum((1, 2))
        return 1.0 - float(np.interp(m, self.m, _cdf(density), left=0.0, right=1.0))

    @property
    def slope(self) -> float:
        """Posterior median of s."""
        return math.exp(_quantile(self.log_slope, self.weight.sum((0, 2)), 0.5))

    @property
    def lapse(self) -> float:
        """Posterior mean of the lapse."""
        return float((self.weight.sum((0, 1)) * _LAPSES).sum())

    def fit_probability(self, x: np.ndarray) -> np.ndarray:
        """Posterior predictive P(fit) at each x = ln n."""
        i, j, k = np.nonzero(self.weight > 1e-4 * self.weight.max())
        weight = self.weight[i, j, k]
        lapse = _LAPSES[k]
        odds = np.exp(np.clip(np.exp(self.log_slope)[j] * (x[:, None] - self.m[i]), -600.0, 600.0))
        return ((weight * (1.0 - lapse)) / (1.0 + (1.0 - 2.0 * lapse) * odds)).sum(1) / weight.sum()


def posterior(
    ns: Sequence[int], fits: Sequence[int], fails: Sequence[int], *, n_min: int, n_max: int
) -> Posterior:
    """The posterior over (ln EMC50, slope, lapse) given the counts at each n.

    The grid zooms, in m and in the slope, into what carries mass until its step in m is a sixth of the
    posterior's standard deviation; its number of nodes, and so its cost, is the same however narrow that is.
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
    centre, reach = math.log(SLOPE_MEDIAN), 3.0 * SLOPE_LOG_SD
    log_slope = np.linspace(centre - reach, centre + reach, _SLOPE_NODES)
    for last in (False, False, False, True):
        log_weight = _log_joint(np.log(n), k, f, m, log_slope)
        weight = np.exp(log_weight - log_weight.max())
        weight[[0, -1]] *= 0.5  # ends of the trapezium rule
        weight[:, [0, -1]] *= 0.5
        weight /= weight.sum()
        mass = weight.sum((1, 2))
        sd = math.sqrt((mass * (m - (mass * m).sum()) ** 2).sum())
        step = m[1] - m[0]
        if last or step <= sd / 6.0:
            break
        if step <= sd:  # coarser, the nodes miss the ridge of steep slopes and would cut it off
            log_slope = _window(log_slope, log_weight.max((0, 2)))
        m = _window(m, log_weight.max((1, 2)))
    return Posterior(n, k, f, m, log_slope, weight)


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
    low, median, high = (post.quantile(share) for share in ((1 - interval) / 2, 0.5, (1 + interval) / 2))
    emc50_low = math.exp(low) if low >= bottom and post.fits.any() else 0.0
    emc50_high = math.exp(high) if high <= top and post.fails.any() else math.inf
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
    )


def _log_joint(
    x: np.ndarray, fits: np.ndarray, fails: np.ndarray, m: np.ndarray, log_slope: np.ndarray
) -> np.ndarray:
    """Log of prior times likelihood, up to a constant, at every (m, log_slope, lapse).

    Elementwise operations and sums over the first axis only: a BLAS product would change bits with alignment.
    """
    prior = -0.5 * ((log_slope - math.log(SLOPE_MEDIAN)) / SLOPE_LOG_SD) ** 2
    z = np.exp(log_slope) * (x[:, None, None] - m[:, None])
    odds = np.exp(np.clip(z, -600.0, 600.0))
    failed = np.flatnonzero(fails)
    n_fails = fails[failed, None, None]
    n_all = (fits + fails)[:, None, None]
    out = np.empty((m.size, log_slope.size, _LAPSES.size))
    for i, lapse in enumerate(_LAPSES):
        scaled = (1.0 - 2.0 * lapse) * odds
        out[:, :, i] = (np.log(scaled[failed] + lapse) * n_fails).sum(0)
        out[:, :, i] -= (np.log(scaled + 1.0) * n_all).sum(0)
        out[:, :, i] += fits.sum() * math.log1p(-lapse) + _LAPSE_LOG_PRIOR[i] + prior
    return out


def _window(nodes: np.ndarray, log_density: np.ndarray) -> np.ndarray:
    """As many nodes over the part of the range that carries mass, and one node beyond at either end."""
    kept = np.flatnonzero(log_density >= log_density.max() + _LOG_SHARE)
    first, last = max(kept[0] - 1, 0), min(kept[-1] + 1, nodes.size - 1)
    return np.linspace(nodes[first], nodes[last], nodes.size)


def _cdf(mass: np.ndarray) -> np.ndarray:
    """The trapezium rule's cumulative integral at the nodes."""
    out = np.cumsum(mass) - 0.5 * mass
    out[0], out[-1] = 0.0, 1.0
    return out


def _quantile(nodes: np.ndarray, mass: np.ndarray, share: float) -> float:
    return float(np.interp(share, _cdf(mass), nodes))
