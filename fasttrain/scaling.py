"""EMC against parameters: EMC = a params^alpha, censored variants included as such, with fit, bend and efficiency.

The model, for variant i with P_i parameters::

    ln EMC50_i = ln a + alpha ln P_i + e_i,    e_i ~ N(0, tau^2)

Each variant enters by its whole likelihood of ln EMC50, recomputed from ``/probes``, and not by a value with an error:
what is censored is as likely anywhere beyond n_max (Tobin 1958), what is nearly so counts as it should. The posterior
is on a grid, flat in ln a and alpha; the prior of tau is proportional to (s0 + tau)^(-3/2), s0^2 the harmonic mean of
the variants' own variances: the uniform-shrinkage prior (Daniels 1999) has the exponent -2, and intervals that cover
too little where tau is large.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import ndtr

from fasttrain.analysis import Results, json_value
from fasttrain.comparison import weighted_quantiles
from fasttrain.errors import UserError
from fasttrain.measured import SETTINGS, Frames, Measured, measured, value_text
from fasttrain.records import Race

LEAST_VARIANTS = 3
"""Distinct parameter counts that a fit takes; a bend takes one more."""
BEND_LEVEL = 0.05
"""A fit warns where the p-value of its quadratic term is below this."""

_TAU_NODES = 12
_POINTS = {2: 41, 3: 21}  # of the grid along each direction, by the number of coefficients
_REACH = 6.0  # standard deviations that it spans on either side
_CURVE_POINTS = 201


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """What ``fit_scaling`` gives.

    Attributes:
        fits: one row a group: the settings that define it, ``variants``, ``censored`` (of these), ``alpha`` and
            ``log_a`` (posterior medians) with ``_low`` and ``_high``, ``tau`` (posterior median), ``deviance``,
            ``deviance_df`` and ``deviance_p`` (of tau = 0: whether the intervals alone explain the scatter), ``r2`` (of
            ln EMC50, variants with a value), ``bend`` (coefficient of (ln P)^2) with ``bend_low``, ``bend_high`` and
            ``bend_p``, and ``notes``. What a group is too small for is NaN, and its notes say so.
        variants: one row a variant: its group's row in ``fits`` (``group``), ``variant``, its settings, ``params``,
            ``emc50``, ``censored``, ``efficiency`` (EMC50 / params), the two with ``_low`` and ``_high``, and
            ``fitted``, the fit's EMC at its parameters.
        by: the settings that define a group.
        unmatched: variants that are left out, a line each.
        interval: probability content of all intervals.
    """

    fits: pd.DataFrame
    variants: pd.DataFrame
    by: tuple[str, ...]
    unmatched: tuple[str, ...]
    interval: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes of all groups, a line each."""
        named = [name for name in self.by if self.fits[name].nunique() > 1]
        return tuple(
            f"{' '.join(f'{name} {value_text(name, row[name])}' for name in named) or 'all'}: {row['notes']}"
            for row in self.fits.to_dict("records")
            if row["notes"]
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON; NaN and infinity are ``None``."""
        names = (*self.__dataclass_fields__, "warnings")
        return {name: json_value(getattr(self, name)) for name in names}


def fit_scaling(
    results: Results | Frames, *, by: Sequence[str] | str | None = None, interval: float | None = None
) -> Scaling:
    """Fits EMC = a params^alpha to the variants of each group.

    Args:
        results: of a scan, or the frames of its curves and probes.
        by: settings that define a group, a sequence or separated by commas; an empty one puts all together. ``None``
            takes all but the width, what follows from it (``heads``), and a learning rate that a race has chosen.
        interval: probability content of all intervals; ``None`` takes the results'.

    Raises:
        UserError: ``by`` names no setting, ``interval`` is not within (0, 1), no variant can be used, or no group has
            variants enough for a fit.
    """
    variants, missing = measured(results, interval)
    if not variants:
        raise UserError("file", getattr(results, "path", None) or "results", missing[0] if missing else "no variants")
    contents = {float(one.row["interval"]) for one in variants} if interval is None else {interval}
    if len(contents) > 1:
        raise UserError("interval", sorted(contents), "the variants differ in it; give one")
    content = contents.pop()
    names = _grouping(variants, by)
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for one in variants:
        groups.setdefault(tuple(one.row[name] for name in names), []).append(one)
    fits, rows = [], []
    for number, (key, members) in enumerate(groups.items()):
        fit = _fit(members, content)
        fits.append({**dict(zip(names, key, strict=True)), **fit})
        rows += [_variant_row(number, one, fit) for one in members]
    frame = pd.DataFrame(fits)
    if frame["alpha"].isna().all():
        sizes, known = max(
            (len({one.params for one in members}), sum(one.known for one in members)) for members in groups.values()
        )
        raise UserError(
            "by",
            ",".join(names) or "nothing",
            f"expected groups of at least {LEAST_VARIANTS} parameter counts, with a value of EMC for two or more; the "
            f"largest of {len(groups)} has {sizes}, and {known} with a value",
        )
    return Scaling(frame, pd.DataFrame(rows), names, tuple(missing), content)


def _grouping(variants: Sequence[Measured], by: Sequence[str] | str | None) -> tuple[str, ...]:
    if by is None:
        follows = {"width", "heads"}
        if any(one.row["race"] == Race.WON for one in variants):
            follows.add("lr")
        return tuple(name for name in SETTINGS if name not in follows)
    names = [part.strip().replace("-", "_") for part in by.split(",")] if isinstance(by, str) else list(by)
    names = [name for name in names if name]
    for name in names:
        if name not in SETTINGS:
            raise UserError("by", name, f"no such setting; expected some of {', '.join(SETTINGS)}")
    return tuple(dict.fromkeys(names))


def _variant_row(group: int, one: Measured, fit: dict[str, Any]) -> dict[str, Any]:
    emc = one.estimate
    row = {"group": group, "variant": one.row["variant"], **{name: one.row[name] for name in SETTINGS}}
    row |= {"params": one.params, "emc50": emc.emc50, "emc50_low": emc.emc50_low, "emc50_high": emc.emc50_high}
    row |= {"censored": str(emc.censored), "efficiency": emc.emc50 / one.params}
    row |= {"efficiency_low": emc.emc50_low / one.params, "efficiency_high": emc.emc50_high / one.params}
    return row | {"fitted": math.exp(fit["log_a"] + fit["alpha"] * math.log(one.params))}


def _fit(members: Sequence[Measured], interval: float) -> dict[str, Any]:
    log_params = np.log([one.params for one in members])
    distinct = len(np.unique(log_params))
    known = np.array([one.known for one in members])
    names = ["alpha", "alpha_low", "alpha_high", "log_a", "log_a_low", "log_a_high", "tau", "deviance", "deviance_df"]
    names += ["deviance_p", "r2", "bend", "bend_low", "bend_high", "bend_p"]
    out: dict[str, Any] = {"variants": len(members), "censored": int((~known).sum())}
    out |= dict.fromkeys(names, math.nan)
    notes = []
    if distinct < LEAST_VARIANTS or known.sum() < 2:
        notes.append(
            f"too few for a fit: it takes {LEAST_VARIANTS} parameter counts and 2 variants with a value, and there are "
            f"{distinct} and {int(known.sum())}"
        )
        return out | {"notes": "; ".join(notes)}

    centre = log_params[known].mean()
    x = log_params - centre
    shares = ((1 - interval) / 2, 0.5, (1 + interval) / 2)
    told = Likelihood(members)
    line = posterior_of(np.stack([np.ones_like(x), x], axis=1), told)
    out["alpha_low"], out["alpha"], out["alpha_high"] = weighted_quantiles(line.beta[:, 1], line.mass, *shares)
    log_a = line.beta[:, 0] - line.beta[:, 1] * centre
    out["log_a_low"], out["log_a"], out["log_a_high"] = weighted_quantiles(log_a, line.mass, *shares)
    out["tau"] = line.tau
    out |= _goodness(line, x, members, known)
    if out["deviance_p"] < BEND_LEVEL:
        notes.append(f"scatter beyond the intervals (deviance p {out['deviance_p']:.2g})")
    if distinct > LEAST_VARIANTS:
        # Orthogonal to the line, so that the grid is upright.
        square = (x**2) - np.polynomial.Polynomial.fit(x, x**2, 1)(x)
        bent = posterior_of(np.stack([np.ones_like(x), x, square], axis=1), told)
        out["bend_low"], out["bend"], out["bend_high"] = weighted_quantiles(bent.beta[:, 2], bent.mass, *shares)
        out["bend_p"] = _two_sided(bent.beta[:, 2], bent.mass)
        if out["bend_p"] < BEND_LEVEL:
            way = "up" if out["bend"] > 0 else "down"
            notes.append(f"bends {way}: no single power law (quadratic term {out['bend']:.3g}, p {out['bend_p']:.2g})")
    return out | {"notes": "; ".join(notes)}


def _two_sided(values: np.ndarray, mass: np.ndarray) -> float:
    """Twice the smaller share of a posterior on one side of zero."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(mass[order])
    share = float(np.interp(0.0, values[order], (below - mass[order] / 2.0) / below[-1], left=0.0, right=1.0))
    return 2.0 * min(share, 1.0 - share)


def _goodness(line: "Grid", x: np.ndarray, members: Sequence[Measured], known: np.ndarray) -> dict[str, float]:
    from scipy.stats import chi2

    deviance = line.deviance
    df = len(members) - 2  # a censored variant has less than one: too many, which errs on the side of no alarm
    y = np.log([one.estimate.emc50 for one in members])[known]
    beta = np.average(line.beta, axis=0, weights=line.mass)
    residual = y - (beta[0] + beta[1] * x[known])
    total = float(((y - y.mean()) ** 2).sum())
    return {
        "deviance": deviance,
        "deviance_df": df,
        "deviance_p": float(chi2.sf(deviance, df)) if df > 0 else math.nan,
        "r2": 1.0 - float((residual**2).sum()) / total if total > 0 else math.nan,
    }


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """A posterior of coefficients on its grid.

    Attributes:
        beta: float64 [nodes, coefficients].
        mass: float64 [nodes], sums to 1.
        tau: posterior median of the spread.
        deviance: at tau = 0 and the best coefficients: -2 ln of the likelihood over that of one free value a variant.
    """

    beta: np.ndarray
    mass: np.ndarray
    tau: float
    deviance: float


class Likelihood:
    """What some variants say of a mean of ln EMC50 each, at every node of the spread tau.

    Args:
        members: the variants.
    """

    def __init__(self, members: Sequence[Measured]) -> None:
        self.centre, self.variance = _summaries(members)
        self.scale = float(np.sqrt(len(members) / (1.0 / self.variance).sum()))
        # Below tau lies 1 - (1 + tau / s0)^(-1/2) of its prior: the middles of equal parts have equal weights.
        shares = (np.arange(_TAU_NODES) + 0.5) / _TAU_NODES
        self.taus = self.scale * ((1.0 - shares) ** -2 - 1.0)
        self.exact = [one.log_likelihood for one in members]
        self.curves = [[_spread(one, tau) for one in members] for tau in self.taus]


def posterior_of(design: np.ndarray, told: Likelihood) -> Grid:
    """The posterior of the coefficients of a line, or any other linear model, of ln EMC50.

    Args:
        design: float64 [variants, coefficients], the regressors; of full rank.
        told: of the variants.
    """
    start = _weighted(design, told.centre, told.variance + told.scale**2)[0]
    best, _ = _mode(design, told.exact, start, told.variance)
    deviance = -2.0 * float(_total(design, told.exact, best[None])[0])
    axis = np.linspace(-_REACH, _REACH, _POINTS[design.shape[1]])
    steps = np.stack(np.meshgrid(*[axis] * design.shape[1], indexing="ij"), -1).reshape(-1, design.shape[1])
    betas, logs = [], []
    for tau, curves in zip(told.taus, told.curves, strict=True):
        start, spread = _mode(design, curves, start, told.variance + tau**2)
        betas.append(start + steps @ spread.T)
        # The nodes of one tau have equal volumes; those of another differ by the determinant.
        logs.append(_total(design, curves, betas[-1]) + float(np.linalg.slogdet(spread)[1]))
    log_mass = np.stack(logs)
    mass = np.exp(log_mass - log_mass.max())
    mass /= mass.sum()
    below = np.cumsum(mass.sum(1)) - mass.sum(1) / 2
    return Grid(np.concatenate(betas), mass.ravel(), float(np.interp(0.5, below, told.taus)), max(deviance, 0.0))


def _summaries(members: Sequence[Measured]) -> tuple[np.ndarray, np.ndarray]:
    """Where to begin: the means and variances of ln EMC50, within the range that was probed."""
    rows = []
    for one in members:
        at, mass = one.cells()
        at = np.clip(at, one.bottom, one.top)
        mean = float((mass * at).sum())
        own = one.moments()[1]
        rows.append((mean, max(own, 1e-8)))
    means, variances = np.array(rows).T
    return means, variances


def _weighted(design: np.ndarray, y: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares and the covariance of its coefficients."""
    normal = (design.T / variance) @ design
    return np.linalg.solve(normal, (design.T / variance) @ y), np.linalg.inv(normal)


Curve = Callable[[np.ndarray], np.ndarray]


def _spread(one: Measured, tau: float) -> Curve:
    """ln of the likelihood of a mean: the variant's own likelihood, spread by N(0, tau^2)."""
    kept = np.append(np.arange(0, one.x.size - 1, 4), one.x.size - 1)  # finer than a mean needs
    x = one.x[kept]
    density = np.diff(one.below[kept]) / np.diff(x)
    density = density / density.max()
    low, high = one.prior
    bottom = density[0] if math.isclose(x[0], low, abs_tol=1e-9) else 0.0
    top = density[-1] if math.isclose(x[-1], high, abs_tol=1e-9) else 0.0
    at = np.linspace(x[0] - 7.0 * tau, x[-1] + 7.0 * tau, _CURVE_POINTS)
    # By symmetry the smaller tail, where a difference of two shares near one would be rounding.
    z = (x - at[:, None]) / tau
    flip = z[:, :-1] > 0
    share = np.where(flip, ndtr(-z[:, :-1]) - ndtr(-z[:, 1:]), ndtr(z[:, 1:]) - ndtr(z[:, :-1]))
    total = (share * density).sum(1) + bottom * ndtr(z[:, 0]) + top * ndtr(-z[:, -1])
    log_total = np.log(np.maximum(total, 1e-300))
    # Beyond the points, on as it was: flat on a censored side, and on the others steep enough to lead back.
    slopes = np.diff(log_total)[[0, -1]] / np.diff(at)[[0, -1]]

    def curve(m: np.ndarray) -> np.ndarray:
        inside = np.interp(m, at, log_total)
        return inside + slopes[0] * np.minimum(m - at[0], 0.0) + slopes[1] * np.maximum(m - at[-1], 0.0)

    return curve


def _total(design: np.ndarray, curves: Sequence[Curve], beta: np.ndarray) -> np.ndarray:
    """Log-likelihood of coefficients, float64 [nodes, coefficients] to [nodes]."""
    means = beta @ design.T
    return np.sum([curve(means[:, i]) for i, curve in enumerate(curves)], axis=0)


def _mode(
    design: np.ndarray, curves: Sequence[Curve], start: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best coefficients, and a matrix whose columns span a standard deviation of each direction about them."""
    scale = np.linalg.cholesky(_weighted(design, np.zeros(len(design)), variance)[1])
    found = minimize(
        lambda step: -_total(design, curves, (start + scale @ step)[None])[0],
        np.zeros(len(start)),
        method="Nelder-Mead",
        options={"xatol": 1e-3, "fatol": 1e-5, "maxiter": 800, "maxfev": 800},
    )
    mode = start + scale @ found.x
    # Second differences over one standard deviation: the curves are straight between their points.
    size = len(start)
    unit = np.eye(size)
    pairs = [(i, j) for i in range(size) for j in range(i + 1)]
    probes = [np.zeros(size)] + [s * unit[i] for i in range(size) for s in (1.0, -1.0)]
    probes += [s * (unit[i] + unit[j]) for i, j in pairs if i != j for s in (1.0, -1.0)]
    values = -_total(design, curves, mode + np.array(probes) @ scale.T)
    hessian = np.zeros((size, size))
    for i in range(size):
        hessian[i, i] = values[1 + 2 * i] + values[2 + 2 * i] - 2 * values[0]
    for k, (i, j) in enumerate((i, j) for i, j in pairs if i != j):
        first = 1 + 2 * size + 2 * k
        both = values[first] + values[first + 1] - 2 * values[0]
        hessian[i, j] = hessian[j, i] = (both - hessian[i, i] - hessian[j, j]) / 2.0
    # A censored variant weighs nothing on its flat side: no direction is taken for wider than this.
    eigenvalues, vectors = np.linalg.eigh(hessian)
    return mode, scale @ (vectors / np.sqrt(np.clip(eigenvalues, 0.02, None)))
