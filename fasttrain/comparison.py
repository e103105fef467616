"""Two sets of measured variants against each other, in pairs: ratios of EMC with intervals, tests and effect sizes.

Works on results alone: the posteriors of ln EMC50 are recomputed from ``/probes``. docs/analysis.md has the formulas
and what is assumed. A module named compare would shadow ``fasttrain.compare()``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fasttrain.analysis import Results, json_value
from fasttrain.errors import UserError
from fasttrain.measured import (
    SETTINGS,
    Frames,
    Measured,
    describe,
    meaningless,
    measured,
    parse_selection,
    select,
    value_text,
)
from fasttrain.records import Race

MATCHES = ("width", "params", "settings")
CORRECTIONS = ("holm", "bh")
TEST = "two-sided posterior test of the sign of the log ratio, widened by 1.15"
WIDENED = 1.15
"""By this the test widens the posterior of the log ratio: of shallow curves, which the search stops where they look
steep, it is too narrow by some 15 % (docs/analysis.md)."""
PARAMS_TOLERANCE = 0.05
"""Relative difference of two parameter counts that match, as of ``ScanSpec.match_params``."""
LEAST_POINTS = 4
"""Fewer points than this have no correlation worth a number."""

_SIZES = ("width", "depth")
_SHAPING = (*_SIZES, "heads", "patch", "norm", "activation")  # of one architecture only, where counts are matched
_FOLLOWS = {"heads": "arch", "patch": "arch", "norm": "arch", "momentum": "optimizer", "nesterov": "optimizer"}
_CONDITIONS = ("precision", "backend", "device", "data_sha256", "fasttrain_version")
_RESAMPLES = 9999
_TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Overall:
    """One ratio for all pairs: a random-effects mean of the log ratios.

    Between-pair variance by Paule & Mandel (1982); t interval and test with pairs - 1 degrees of freedom by Hartung &
    Knapp (2001), whose factor is never below 1 (Knapp & Hartung 2003).

    Attributes:
        pairs: pairs in it, those whose ratio has a value.
        left_out: pairs that are not, because EMC50 of one side is out of range.
        ratio: of b to a; a geometric mean.
        low: lower end of its interval.
        high: upper end of its interval.
        p: two-sided, of a ratio of 1.
        spread: standard deviation of the true log ratios from pair to pair.
        heterogeneity_p: Cochran's Q test that all pairs have one ratio.
    """

    pairs: int
    left_out: int
    ratio: float
    low: float
    high: float
    p: float
    spread: float
    heterogeneity_p: float


@dataclass(frozen=True, slots=True)
class Correlation:
    """A coefficient with its interval and two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True)
class Association:
    """The gap ln EMC(b) - ln EMC(a) of each pair against a quantity of side b.

    Attributes:
        column: what it is set against.
        points: pairs with both.
        left_out: pairs without: EMC50 out of range, or no value of the column.
        reason: why there are no coefficients; empty if there are.
        pearson: Pearson's r, interval by Fisher's transformation.
        kendall: Kendall's tau-b, percentile interval of a bootstrap over the pairs with a fixed seed.
    """

    column: str
    points: int
    left_out: int
    reason: str = ""
    pearson: Correlation | None = None
    kendall: Correlation | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What ``compare`` gives.

    Attributes:
        pairs: one row a pair. Settings: under their own name where all pairs agree, else as ``NAME_a`` and ``NAME_b``;
            ``variant_a``, ``variant_b``. Of each side ``emc_a``, ``emc_a_low``, ``emc_a_high``, ``censored_a`` and
            ``test_accuracy_a``. ``ratio`` (b / a; NaN if EMC50 of a side has no value), ``ratio_low``, ``ratio_high``
            (0 and inf where open), ``bound`` ("", "at least", "at most", "between" or "unknown"), ``log_ratio`` and
            ``log_ratio_sd`` (posterior mean and standard deviation), ``p``, ``p_adjusted`` (NaN where ``bound`` is
            "unknown"), ``effect`` with ``effect_low`` and ``effect_high`` (log ratio in spreads of the threshold from
            run to run), ``superiority`` (probability that a run of b fits a larger n than one of a), ``notes``.
        differs: settings that were not matched on and differ, with their values on either side, as text.
        unmatched: variants without a partner, a line each.
        notes: what else to know, a line each.
        interval: probability content of all intervals.
        match: how pairs were found.
        quantity: ``"EMC50"`` or ``"EMC50/params"``.
        test: name of the test behind ``p``.
        correction: name of that behind ``p_adjusted``.
        overall: over all pairs; ``None`` with fewer than two whose ratio has a value.
        association: with a quantity of side b, if one was asked for.
    """

    pairs: pd.DataFrame
    differs: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]
    interval: float
    match: str
    quantity: str
    test: str
    correction: str
    overall: Overall | None
    association: Association | None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON; NaN and infinity are ``None``, and ``bound`` tells them apart."""
        return {name: json_value(getattr(self, name)) for name in self.__dataclass_fields__}


def compare(
    a: Results | Frames,
    b: Results | Frames | None = None,
    *,
    select_a: str | Sequence[str] = (),
    select_b: str | Sequence[str] = (),
    match: str = "width",
    per_param: bool = False,
    interval: float | None = None,
    correction: str = "holm",
    against: str | None = None,
) -> Comparison:
    """Compares the EMC50 of variants of two results, or of two selections of one, pair by pair.

    A variant of a and one of b are a pair if they agree in all settings that mean something for both, but for what
    the selections name, a learning rate that a race has chosen, and (not with ``match="settings"``) settings of which
    the two sides have no value in common: these are what is compared, and ``Comparison.differs`` has them.

    Args:
        a: results, or the frames of their curves and probes.
        b: the same, of the other side; ``None`` takes a's.
        select_a: settings of a's variants, such as ``"optimizer=sgd"``; see ``measured.select``.
        select_b: settings of b's.
        match: ``"width"``: equal width and depth; ``"params"``: parameter counts within 5 %, whatever the shape;
            ``"settings"``: equal in everything that the selections do not name.
        per_param: whether to compare EMC50 / params.
        interval: probability content of the intervals; ``None`` takes the files', which must agree.
        correction: of the p-values for their number: ``"holm"`` (family-wise error), ``"bh"`` (false discovery rate).
        against: what to set the gap ln EMC(b) - ln EMC(a) against: ``"test_accuracy"``, the mean over the fitted runs
            of side b, or a numeric column of its curves.

    Raises:
        UserError: an argument is out of its range, a selection is empty, no variant has a partner, or one has several.
    """
    for name, value, known in (("match", match, MATCHES), ("correction", correction, CORRECTIONS)):
        if value not in known:
            raise UserError(name, value, f"expected one of {', '.join(known)}")
    if b is None and not (select_a and select_b):
        raise UserError("b", _shown(select_b), "one file needs two selections, --a and --b; or give a second file")
    other = a if b is None else b
    named = {*parse_selection(select_a, "a"), *parse_selection(select_b, "b")}
    chosen_a, chosen_b = select(a, select_a, "a"), select(other, select_b, "b")
    content = _content(chosen_a, chosen_b, interval)
    left, missing_a = measured(chosen_a, content)
    right, missing_b = measured(chosen_b, content)
    if a is other and (both := {one.row["variant"] for one in left} & {two.row["variant"] for two in right}):
        twice = next(one for one in left if one.row["variant"] in both)
        raise UserError("b", _shown(select_b), f"both selections hold {describe(twice.row)}")
    free = _free_settings(left, right, match, named)
    pairs = _matched(left, right, free, match)
    unmatched = [f"a: {line}" for line in (*missing_a, *_alone(left, [one for one, _ in pairs]))]
    unmatched += [f"b: {line}" for line in (*missing_b, *_alone(right, [two for _, two in pairs]))]
    if not pairs:
        raise UserError("match", match, _why_none(left, right, free, match, unmatched))

    rows = [_row(one, two, content, per_param) for one, two in pairs]
    frame = pd.DataFrame([{**settings, **row} for settings, row in zip(_settings(pairs), rows, strict=True)])
    frame.insert(frame.columns.get_loc("p") + 1, "p_adjusted", adjusted(frame["p"].to_numpy(), correction))
    return Comparison(
        pairs=frame,
        differs=_differs(pairs),
        unmatched=tuple(unmatched),
        notes=tuple(_condition_notes(a, other)),
        interval=content,
        match=match,
        quantity="EMC50/params" if per_param else "EMC50",
        test=TEST,
        correction={"holm": "Holm", "bh": "Benjamini-Hochberg"}[correction],
        overall=_overall(frame, content),
        association=None if against is None else _association(frame, pairs, against, content),
    )


# Pairs


def _shown(selection: str | Sequence[str]) -> str:
    return (selection if isinstance(selection, str) else ",".join(selection)) or "not given"


def _content(a: Frames, b: Frames, interval: float | None) -> float:
    if interval is not None:
        return interval
    contents = sorted({*a[0]["interval"].astype(float), *b[0]["interval"].astype(float)})
    if len(contents) != 1:
        shown = ",".join(f"{content:g}" for content in contents)
        raise UserError("interval", shown, "the two sides differ in it; give one")
    return contents[0]


def _free_settings(left: Sequence[Measured], right: Sequence[Measured], match: str, named: set[str]) -> set[str]:
    """The settings that pairs need not agree in."""
    free = set(named)
    if any(one.row["race"] == Race.WON for one in (*left, *right)):
        free.add("lr")
    if match == "params":
        free.update(_SHAPING[:-1])
    if match != "settings":
        for name in SETTINGS:
            values = [{one.row[name] for one in side if not meaningless(one.row, name)} for side in (left, right)]
            if name not in _SIZES and all(values) and not values[0] & values[1]:
                free.add(name)
    return free


def _agree(one: Measured, two: Measured, free: set[str]) -> bool:
    for name in SETTINGS:
        if name in free or one.row[name] == two.row[name]:
            continue
        if name in _SIZES or not (meaningless(one.row, name) or meaningless(two.row, name)):
            return False
    return True


def _matched(
    left: Sequence[Measured], right: Sequence[Measured], free: set[str], match: str
) -> list[tuple[Measured, Measured]]:
    """The pairs, in the order of the left side."""
    able = np.array([[_agree(one, two, free) for two in right] for one in left], dtype=bool).reshape(
        len(left), len(right)
    )
    if match != "params":
        for side, others, table in (("a", right, able), ("b", left, able.T)):
            for owner, row in zip(left if side == "a" else right, table, strict=True):
                if row.sum() > 1:
                    rivals = [other for other, can in zip(others, row, strict=True) if can]
                    apart = [name for name in SETTINGS if len({one.row[name] for one in rivals}) > 1]
                    raise UserError(
                        "match",
                        match,
                        f"{describe(owner.row)} of {side} has {len(rivals)} partners, which differ in "
                        f"{', '.join(apart) or 'nothing'}; select one with --{'b' if side == 'a' else 'a'}",
                    )
        return [(left[i], right[j]) for i, j in zip(*np.nonzero(able), strict=True)]
    from scipy.optimize import linear_sum_assignment

    distance = np.abs(np.log([[two.params / one.params for two in right] for one in left])).reshape(able.shape)
    able &= distance <= math.log1p(PARAMS_TOLERANCE) + _TINY
    # As many pairs as can be, then the closest, then those of one shape.
    alike = np.array([[all(one.row[s] == two.row[s] for s in _SIZES) for two in right] for one in left])
    cost = np.where(able, distance + 1e-6 * ~alike.reshape(able.shape), 1e3)
    return [(left[i], right[j]) for i, j in zip(*linear_sum_assignment(cost), strict=True) if able[i, j]]


def _alone(side: Sequence[Measured], paired: Sequence[Measured]) -> list[str]:
    taken = {id(one) for one in paired}
    return [f"{describe(one.row)}: no partner" for one in side if id(one) not in taken]


def _why_none(
    left: Sequence[Measured], right: Sequence[Measured], free: set[str], match: str, unmatched: Sequence[str]
) -> str:
    if not left or not right:
        return f"nothing to compare ({unmatched[0] if unmatched else 'no variant'})"
    apart = []
    for name in SETTINGS:
        a, b = ([value_text(name, one.row[name]) for one in side] for side in (left, right))
        if name not in free and not set(a) & set(b):
            apart.append(f"{name} ({_listed(a)} against {_listed(b)})")
    if match == "params":
        a, b = ([str(one.params) for one in side] for side in (left, right))
        apart.append(f"parameters ({_listed(a)} against {_listed(b)})")
    return f"no variant of a has a partner in b; they differ in {'; '.join(apart) or 'combinations of their settings'}"


def _listed(values: Sequence[str]) -> str:
    unique = list(dict.fromkeys(values))
    return ", ".join(unique[:8]) + (", ..." if len(unique) > 8 else "")


def _settings(pairs: Sequence[tuple[Measured, Measured]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in pairs]
    for name in ("variant", *SETTINGS, "params"):
        equal = name != "variant" and all(one.row[name] == two.row[name] for one, two in pairs)
        for row, (one, two) in zip(rows, pairs, strict=True):
            row.update({name: one.row[name]} if equal else {f"{name}_a": one.row[name], f"{name}_b": two.row[name]})
    return rows


def _differs(pairs: Sequence[tuple[Measured, Measured]]) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    out = {}
    for name in SETTINGS:
        if all(one.row[name] == two.row[name] for one, two in pairs):
            continue
        sides = [
            tuple(dict.fromkeys(value_text(name, one.row[name]) for one in side if not meaningless(one.row, name)))
            for side in zip(*pairs, strict=True)
        ]
        if _FOLLOWS.get(name) not in out or (sides[0] and sides[1]):
            out[name] = (sides[0] or ("-",), sides[1] or ("-",))
    return out


def _condition_notes(a: Results | Frames, b: Results | Frames) -> list[str]:
    if not (isinstance(a, Results) and isinstance(b, Results)):
        return []
    notes = [
        f"the files differ in {name}: {a.attrs.get(name)} against {b.attrs.get(name)}"
        for name in _CONDITIONS
        if a.attrs.get(name) != b.attrs.get(name)
    ]
    for side, one in {"a": a, "b": b}.items():
        if one.attrs.get("status") != "complete":
            notes.append(f"the scan of {side} is not complete")
    return list(dict.fromkeys(notes))


# One pair


def _row(one: Measured, two: Measured, interval: float, per_param: bool) -> dict[str, Any]:
    scales = (one.params, two.params) if per_param else (1, 1)
    shift = math.log(scales[1] / scales[0])
    row: dict[str, Any] = {}
    notes = []
    for side, it, scale in (("a", one, scales[0]), ("b", two, scales[1])):
        row[f"emc_{side}"] = it.estimate.emc50 / scale
        row[f"emc_{side}_low"] = it.estimate.emc50_low / scale
        row[f"emc_{side}_high"] = it.estimate.emc50_high / scale
        row[f"censored_{side}"] = str(it.estimate.censored)
        row[f"test_accuracy_{side}"] = it.test_accuracy
        if not it.known:
            where = {"above": "above n-max", "below": "below n-min"}.get(str(it.estimate.censored), "not known yet")
            notes.append(f"{side} {where}")
        if not it.row["finished"]:
            notes.append(f"{side} unfinished")
    known = one.known and two.known
    low = Difference(one, two, "low").quantile((1 - interval) / 2) - shift
    high = Difference(one, two, "high").quantile((1 + interval) / 2) - shift
    bound = ""
    if not known:
        bound = {(True, True): "between", (True, False): "at least", (False, True): "at most"}.get(
            (math.isfinite(low), math.isfinite(high)), "unknown"
        )
    (mean_a, variance_a), (mean_b, variance_b) = one.moments(), two.moments()
    row |= {
        "ratio": math.exp(Difference(one, two).quantile(0.5) - shift) if known else math.nan,
        "ratio_low": math.exp(low),
        "ratio_high": math.exp(high),
        "bound": bound,
        "log_ratio": mean_b - mean_a - shift if known else math.nan,
        "log_ratio_sd": math.sqrt(variance_a + variance_b) if known else math.nan,
        "p": math.nan if bound == "unknown" else p_equal(one, two, shift),
    }
    effect = _effect(one, two, shift, interval) if known else (math.nan,) * 3
    row |= dict(zip(("effect", "effect_low", "effect_high"), effect, strict=True))
    row["superiority"] = _superiority(one, two, shift) if known else math.nan
    row["notes"] = ", ".join(notes)
    return row


class Difference:
    """ln EMC50 of ``two`` less that of ``one``, by convolution of their independent posteriors.

    Args:
        one: the subtrahend.
        two: the minuend.
        beyond: where the mass outside of what was probed lies: ``"prior"`` as the prior has it; ``"low"`` and
            ``"high"`` where the difference is smallest, or largest: at the end of the range, or infinitely far out.
    """

    def __init__(self, one: Measured, two: Measured, beyond: str = "prior") -> None:
        at, mass = one.cells()
        if beyond == "low":
            at = np.where(at > one.top, np.inf, np.maximum(at, one.bottom))
        elif beyond == "high":
            at = np.where(at < one.bottom, -np.inf, np.minimum(at, one.top))
        finite = np.isfinite(at)
        self._at, self._mass = at[finite], mass[finite]
        self._surely = float(mass[at == np.inf].sum())  # the difference is -inf there
        self._two, self._beyond = two, beyond
        self._first, self._last = np.interp([two.bottom, two.top], two.x, two.below)

    def below(self, t: float) -> float:
        """P(difference <= t)."""
        two, x = self._two, t + self._at
        share = np.interp(x, two.x, two.below)
        if self._beyond == "low":
            share = np.where(x >= two.top, 1.0, np.maximum(share, self._first))
        elif self._beyond == "high":
            share = np.where(x < two.bottom, 0.0, np.minimum(share, self._last))
        return self._surely + float((self._mass * share).sum())

    def quantile(self, share: float) -> float:
        """The smallest t with P(difference <= t) at least ``share``; -inf or inf if that much lies there."""
        if not self._at.size:
            return -math.inf if self._surely >= share else math.inf
        low, high = self._two.x[0] - self._at.max() - 1.0, self._two.x[-1] - self._at.min() + 1.0
        if self.below(low) >= share:
            return -math.inf
        if self.below(high) < share:
            return math.inf
        # Bisected, since a step must not be interpolated across.
        while high - low > 1e-10:
            middle = (low + high) / 2.0
            low, high = (low, middle) if self.below(middle) >= share else (middle, high)
        return high


def p_equal(one: Measured, two: Measured, shift: float = 0.0) -> float:
    """P-value of the hypothesis that ln EMC50 of ``two`` is that of ``one`` plus ``shift`` (``TEST``)."""
    # Widened about its median: where it comes to lie is where the shift would lie in the posterior as it is.
    middle = Difference(one, two).quantile(0.5)
    at = middle + (shift - middle) / WIDENED
    not_above = Difference(one, two, "low").below(at)
    not_below = 1.0 - Difference(one, two, "high").below(math.nextafter(at, -math.inf))
    return min(max(2.0 * min(not_above, not_below), 0.0), 1.0)


def _effect(one: Measured, two: Measured, shift: float, interval: float) -> tuple[float, float, float]:
    """Median and interval of the log ratio in units of the spread of a threshold from run to run.

    A logistic of slope s in ln n is the survival function of a threshold with standard deviation pi / (s sqrt(3)).
    """
    parts = []
    for it in (one, two):
        mass = it.post.weight.sum(2)
        i, j = np.nonzero(mass > 1e-3 * mass.max())
        parts.append((it.post.m[i], math.pi**2 / 3.0 * np.exp(-2.0 * it.post.log_slope[j]), mass[i, j]))
    (m_a, var_a, mass_a), (m_b, var_b, mass_b) = parts
    pooled = np.sqrt((var_a[:, None] + var_b) / 2.0)
    effect = ((m_b - m_a[:, None] - shift) / pooled).ravel()
    shares = 0.5, (1 - interval) / 2, (1 + interval) / 2
    return weighted_quantiles(effect, (mass_a[:, None] * mass_b).ravel(), *shares)


def weighted_quantiles(values: np.ndarray, mass: np.ndarray, *shares: float) -> Any:
    """Quantiles of values with a mass each, half of it below its value, linear between them."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(mass[order])
    return tuple(np.interp(shares, (below - mass[order] / 2.0) / below[-1], values[order]).tolist())


def _superiority(one: Measured, two: Measured, shift: float) -> float:
    """P(a run of ``two`` fits a larger n than one of ``one``), over posteriors and runs; ties count one half.

    P(fit | n) is read as the probability that a run's threshold is above n; a run that lapses has none.
    """
    reach = 12.0 / min(one.post.slope, two.post.slope)
    ends = [end for it, off in ((one, 0.0), (two, shift)) for end in (it.x[0] - off, it.x[-1] - off)]
    x = np.linspace(min(ends) - reach, max(ends) + reach, 1025)
    a, b = one.post.fit_probability(x), two.post.fit_probability(x + shift)
    inside = float(((b[1:] + b[:-1]) / 2.0 * (a[:-1] - a[1:])).sum())
    return inside + (1.0 - a[0]) * (1.0 + b[0]) / 2.0 + a[-1] * b[-1] / 2.0


# All pairs


def adjusted(p: np.ndarray, correction: str) -> np.ndarray:
    """P-values corrected for their number; a NaN is no test and stays one.

    Args:
        p: float64 [pairs].
        correction: ``"holm"`` (Holm 1979) or ``"bh"`` (Benjamini & Hochberg 1995).
    """
    out = np.full(len(p), np.nan)
    tests = np.flatnonzero(~np.isnan(p))
    if not tests.size:
        return out
    if correction == "bh":
        from scipy.stats import false_discovery_control

        out[tests] = false_discovery_control(p[tests])
        return out
    order = tests[np.argsort(p[tests], kind="stable")]
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return out


def _overall(frame: pd.DataFrame, interval: float) -> Overall | None:
    known = frame["log_ratio"].notna()
    if known.sum() < 2:
        return None
    y, variance = frame["log_ratio"][known].to_numpy(), frame["log_ratio_sd"][known].to_numpy() ** 2
    return random_effects(y, variance, interval, left_out=int((~known).sum()))


def random_effects(y: np.ndarray, variance: np.ndarray, interval: float, left_out: int = 0) -> Overall:
    """The mean of log ratios with a variance each (``Overall``), at least two of them."""
    from scipy.optimize import brentq
    from scipy.stats import chi2, t

    df = len(y) - 1

    def mean(between: float) -> tuple[float, float, float]:
        weight = 1.0 / (variance + between)
        centre = float((weight * y).sum() / weight.sum())
        return centre, 1.0 / float(weight.sum()), float((weight * (y - centre) ** 2).sum())

    q = mean(0.0)[2]
    between = 0.0
    if q > df:
        # Q falls in the variance, below df at the latest where the variance of y itself explains all.
        between = float(brentq(lambda value: mean(value)[2] - df, 0.0, float(np.var(y, ddof=1)) * len(y) + 1.0))
    centre, error, q_between = mean(between)
    error = math.sqrt(error * max(q_between / df, 1.0))
    half = float(t.ppf((1 + interval) / 2, df)) * error
    return Overall(
        pairs=len(y),
        left_out=left_out,
        ratio=math.exp(centre),
        low=math.exp(centre - half),
        high=math.exp(centre + half),
        p=float(2.0 * t.sf(abs(centre) / error, df)),
        spread=math.sqrt(between),
        heterogeneity_p=float(chi2.sf(q, df)),
    )


def _association(
    frame: pd.DataFrame, pairs: Sequence[tuple[Measured, Measured]], column: str, interval: float
) -> Association:
    if column == "test_accuracy":
        values = frame["test_accuracy_b"].to_numpy(float)
    else:
        found = [two.row.get(column) for _, two in pairs]
        numeric = all(isinstance(value, int | float | np.number) for value in found)
        if not numeric:
            raise UserError("against", column, "expected test_accuracy or a numeric column of /curves")
        values = np.array(found, dtype=float)
    gaps = frame["log_ratio"].to_numpy(float)
    use = np.isfinite(gaps) & np.isfinite(values)
    return associated(gaps[use], values[use], column, interval, left_out=int((~use).sum()))


def associated(x: np.ndarray, y: np.ndarray, column: str, interval: float, left_out: int = 0) -> Association:
    """Pearson's and Kendall's coefficients of two float64 [points], or why there are none."""
    about = Association(column, len(x), left_out)
    reason = ""
    if len(x) < LEAST_POINTS:
        reason = f"{len(x)} points are too few for a correlation; it takes {LEAST_POINTS}"
    elif np.ptp(x) == 0 or np.ptp(y) == 0:
        reason = f"all values of {column if np.ptp(y) == 0 else 'the gap'} are equal"
    if reason:
        return Association(about.column, about.points, about.left_out, reason)
    from scipy import stats

    r = stats.pearsonr(x, y)
    r_ends = r.confidence_interval(interval)
    tau = stats.kendalltau(x, y)
    ends = stats.bootstrap(
        (x, y),
        tau_b,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=interval,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Association(
        column,
        len(x),
        left_out,
        pearson=Correlation(float(r.statistic), float(r_ends.low), float(r_ends.high), float(r.pvalue)),
        kendall=Correlation(float(tau.statistic), float(ends.low), float(ends.high), float(tau.pvalue)),
    )


def tau_b(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Kendall's tau-b along the last axis of float64 [..., points]; 0 where all x or all y are equal: no order."""
    x, y = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
    i, j = np.triu_indices(x.shape[-1], 1)
    dx, dy = np.sign(x[..., i] - x[..., j]), np.sign(y[..., i] - y[..., j])
    pairs = np.sqrt((dx != 0).sum(-1) * (dy != 0).sum(-1))
    return (dx * dy).sum(-1) / np.where(pairs == 0, 1, pairs)
