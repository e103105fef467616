"""EMC from the runs that a scan has stored, by several definitions: each with its interval and what it assumes.

Every estimator takes the rows of ``/probes`` and one row of ``/curves``, and computes its result from these alone.
No torch.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from fasttrain import estimate as posteriors
from fasttrain.analysis import Results
from fasttrain.errors import UserError
from fasttrain.records import Censored, Outcome, Problem
from fasttrain.spec import CONFIRM, SHORT, ScanSpec, Variant, budget_steps, budget_text, early_tells

NAKKIRAN_EPS = 0.1
"""Expected train error of Nakkiran et al. 2019, who call it heuristic."""
REPLICATES = 2000
"""Bootstrap replicates of ``nakkiran``."""


@dataclass(frozen=True, slots=True)
class Estimated:
    """EMC of one variant by one estimator.

    Attributes:
        estimate: in samples; NaN if censored or unknown.
        low: lower end of the interval; 0 if nothing bounds it.
        high: upper end; infinite if nothing bounds it.
        censored: whether the estimate lies above or below what was tried.
        n_probes: runs behind it.
        warnings: what is to be known of these runs, a sentence each.
    """

    estimate: float
    low: float
    high: float
    censored: Censored
    n_probes: int
    warnings: tuple[str, ...] = ()


def estimates(
    results: Results,
    estimator: str = "emc50",
    *,
    interval: float | None = None,
    eps: float | None = None,
    budget: str | None = None,
) -> pd.DataFrame:
    """EMC of every variant by one estimator, from the stored runs.

    Args:
        results: of a scan.
        estimator: ``"emc50"``, ``"paper"`` or ``"nakkiran"``: the functions of these names in this module.
        interval: probability content of the interval, in (0, 1); ``None`` is that of the scan.
        eps: of ``"nakkiran"`` only, the expected train error, in (0, 1); ``None`` is 0.1.
        budget: of ``"emc50"`` only, a smaller budget of a run, as of ``ScanSpec``: ``"3000steps"``, ``"100epochs"``.

    Returns:
        One row a variant, in their order: ``variant``, the settings that vary, ``params``, ``race`` if there are races,
        ``estimate``, ``low``, ``high``, ``censored``, ``n_probes`` and ``warnings`` (text, empty if there are none).
        Its ``attrs`` are ``estimator``, ``interval`` and ``assumes``, what the estimator rests on, in a few sentences.

    Raises:
        UserError: there is no such estimator, it cannot be had from the runs of this scan, or an option is out of
            its range or not one of the estimator's.
    """
    if estimator not in ESTIMATORS:
        raise UserError("estimator", estimator, f"expected one of {', '.join(ESTIMATORS)}")
    if eps is not None and estimator != "nakkiran":
        raise UserError("eps", eps, f"is of the estimator nakkiran; {estimator} has none")
    if budget is not None and estimator != "emc50":
        raise UserError("budget", budget, f"is of the estimator emc50; {estimator} takes that of the scan")
    content = results.spec.interval if interval is None else interval
    chosen = NAKKIRAN_EPS if eps is None else eps
    for option, value in (("interval", content), ("eps", chosen)):
        if not 0.0 < value < 1.0:
            raise UserError(option, value, "expected a number between 0 and 1")
    function, assumes = ESTIMATORS[estimator]
    if estimator == "nakkiran":
        function = partial(nakkiran, eps=chosen)
    if budget is not None:
        function = partial(emc50, budget=ScanSpec(budget=budget))
        assumes += f" At a budget of {budget_text(ScanSpec(budget=budget))}: a run had fitted within it or had not."
    curves = results.curves
    rows = [function(results.probes, row, content) for _, row in curves.iterrows()]
    settings = [field.name for field in dataclasses.fields(Variant) if curves[field.name].nunique() > 1]
    races = ["race"] if (curves["race"] != "").any() else []
    frame = curves[["variant", *settings, "params", *races]].reset_index(drop=True)
    for field in dataclasses.fields(Estimated):
        frame[field.name] = [getattr(row, field.name) for row in rows]
    frame["censored"] = frame["censored"].map(str).astype(object)
    frame["warnings"] = frame["warnings"].map("; ".join).astype(object)
    frame.attrs = {"estimator": estimator, "interval": content, "assumes": assumes.format(eps=chosen)}
    return frame


def emc50(
    probes: pd.DataFrame, row: pd.Series, interval: float | None = None, *, budget: ScanSpec | None = None
) -> Estimated:
    """EMC50 by the posterior of ``fasttrain.estimate``, as ``/curves`` has it, to the last bit.

    At a smaller budget a run counts as a fit if it had fitted within it, and not at all if it might not take as much:
    runs at a third of the budget say nothing of more than that. Runs whose learning rate falls over their budget
    count at their own budget only, since at another one it would have fallen otherwise. At a third of the budget this
    is ``emc50_third`` of ``/curves``, to the last bit.

    Args:
        probes: rows of ``/probes``, also of other variants.
        row: of ``/curves``.
        interval: probability content of the interval; ``None`` is that of the scan.
        budget: a spec with the smaller budget; ``None`` is that of the scan.

    Raises:
        UserError: the budget is larger than that of the scan.
    """
    problem = _problem(row)
    if budget is None:
        runs = full_runs(probes, row)
        fitted = _fitted(runs)
        warnings = ["the runs ran out before the search was done"] if row["budget_spent"] else []
    else:
        runs = pd.concat([full_runs(probes, row), _short_runs(probes, row)])
        third = _is_third(budget, row)
        asked = ScanSpec(budget=str(row["budget"])) if third else budget
        limit = runs["n"].map(lambda n: budget_steps(asked, problem.variant, n, short=third)).astype("int64")
        if (limit > runs["steps_budget"].where(runs["seed"] < SHORT, limit)).any():
            raise UserError("budget", budget_text(budget), f"is more than that of the scan, {row['budget']}")
        own = limit == runs["steps_budget"]
        if row["schedule"] == "constant" and not (third and not _early_counts(row)):
            own |= limit < runs["steps_budget"]
        runs, limit = runs[own], limit[own]
        fitted = _fitted(runs) & (runs["fit_step"] <= limit)
        warnings = [] if len(runs) else ["no run may say anything of this budget"]
        if row["steps_budget"] and (limit < 10 * row["check_every"]).any():
            warnings.append(f"runs were checked every {row['check_every']} steps only: a fit may have been seen late")
    counts = fitted.groupby(runs["n"]).agg(["sum", "size"])
    fits = counts["sum"].astype(int)
    post = posteriors.posterior(
        counts.index.tolist(), fits.tolist(), (counts["size"] - fits).tolist(), n_min=row["n_min"], n_max=row["n_max"]
    )
    found = posteriors.estimate(problem, post, _content(row, interval))
    if found.misfit:
        warnings.append(f"the runs contradict the logistic form (p = {found.misfit_p:.2g})")
    return Estimated(
        found.emc50, found.emc50_low, found.emc50_high, found.censored, found.n_probes, (*warnings, *_unfinished(row))
    )


def paper(probes: pd.DataFrame, row: pd.Series, interval: float | None = None) -> Estimated:
    """The largest n fitted before the first failure (Shwartz-Ziv et al. 2024), a mean over seeds.

    Of every seed's ladder the EMC is the last n that it fitted. The estimate is their geometric mean, its interval
    Student's t of the mean of ln n. It is of the procedure: of where its ladders end, with this first n and this
    growth, not of EMC50. A ladder without both a fit and a failure only bounds its EMC. It counts at the bound, is
    named in a warning, and opens that end of the interval; where half of the ladders or more are so the estimate is
    censored.

    In simulations 90 % intervals of 16 ladders cover their mean in 0.84 to 0.90 (slopes 4 to 60, lapses of 0 and
    0.02), and BCa bootstrap intervals in 0.74 to 0.89. With a lapse the ends have a long lower tail, of which five
    ladders often show nothing: 0.68 to 0.89 then.

    Args:
        probes: rows of ``/probes``, also of other variants.
        row: of ``/curves``.
        interval: probability content of the interval; ``None`` is that of the scan.

    Raises:
        UserError: the runs were not made by ``--search paper``.
    """
    if row["search"] != "paper":
        raise UserError(
            "estimator",
            "paper",
            "needs ladders of n up to the first failure, which a scan with --search paper makes; "
            f"the runs of this one are of --search {row['search']}",
        )
    runs = full_runs(probes, row)
    ladders: dict[int, list[tuple[int, bool]]] = {}
    for seed, n, fitted in sorted(zip(runs["seed"].tolist(), runs["n"].tolist(), _fitted(runs), strict=True)):
        ladders.setdefault(seed, []).append((n, fitted))
    ends: list[int] = []
    bounds: dict[str, list[int]] = {"below": [], "above": [], "stopped": []}
    for seed, rungs in ladders.items():
        first = next((i for i, (_, fitted) in enumerate(rungs) if not fitted), len(rungs))
        end, _ = rungs[max(first - 1, 0)]
        ends.append(end)
        if first == 0:
            bounds["below"].append(seed)
        elif first == len(rungs):
            bounds["above" if end == row["n_max"] else "stopped"].append(seed)
    count = len(ends)
    above, below = len(bounds["above"]) + len(bounds["stopped"]), len(bounds["below"])
    ways = {
        "below": f"failed at the first n, {row['n_min']}",
        "above": f"fitted n-max, {row['n_max']}",
        "stopped": "were stopped before a failure",
    }
    warnings = [
        f"{len(seeds)} of {count} ladders {ways[kind]} (seeds {', '.join(map(str, seeds))}) and bound the estimate only"
        for kind, seeds in bounds.items()
        if seeds
    ]
    if count < 2:
        warnings.append(f"an interval needs two ladders or more; there {'is one' if count else 'are none'}")
    centre, low, high = _mean_of_log(np.array(ends, dtype=float), _content(row, interval), row["growth"])
    censored = Censored.NO
    if count and 2 * max(above, below) >= count:
        censored, centre = (Censored.ABOVE if above >= below else Censored.BELOW), math.nan
    return Estimated(
        estimate=centre,
        low=0.0 if below else low,
        high=math.inf if above else high,
        censored=censored,
        n_probes=len(runs),
        warnings=(*warnings, *_unfinished(row)),
    )


def _mean_of_log(ends: np.ndarray, content: float, growth: float) -> tuple[float, float, float]:
    """Geometric mean and its interval; ends that are all equal tell that others are rare, not that there are none."""
    if not ends.size:
        return math.nan, 0.0, math.inf
    logs = np.log(ends)
    centre = float(logs.mean())
    if ends.size == 1:
        return math.exp(centre), 0.0, math.inf
    half = float(stats.t.ppf((1.0 + content) / 2.0, ends.size - 1) * stats.sem(logs)) if np.ptp(logs) else 0.0
    if half == 0.0:
        # With probability (1 - content) / 2, a share that k ladders do not show is this large; it is put one n away.
        half = math.log(growth) * (1.0 - ((1.0 - content) / 2.0) ** (1.0 / ends.size))
    return math.exp(centre), math.exp(centre - half), math.exp(centre + half)


def nakkiran(
    probes: pd.DataFrame, row: pd.Series, interval: float | None = None, *, eps: float = NAKKIRAN_EPS
) -> Estimated:
    """The largest n with an expected train error of at most eps (Nakkiran et al. 2019, Definition 1).

    The mean train error at each n, made to rise with n (isotonic regression weighted by runs), crosses eps between two
    n; in between it is taken as linear in ln n. The interval is of a bootstrap over the runs at each n: of k runs k - 1
    drawn with replacement, which gives the variance of their mean without bias (Rao & Wu 1988), and percentiles moved
    out to what Student's t has beyond the normal distribution (Hesterberg 2015), by the runs at the two n around the
    crossing.

    Only runs that were not stopped early count: ``plateaued`` ones end at an error that is not that of the budget. All
    of these are failures, so that leaving them out lowers the error and raises the estimate.

    Args:
        probes: rows of ``/probes``, also of other variants.
        row: of ``/curves``.
        interval: probability content of the interval; ``None`` is that of the scan.
        eps: expected train error, in (0, 1).
    """
    runs = full_runs(probes, row)
    whole = runs[runs["outcome"] != Outcome.PLATEAUED]
    warnings = []
    if dropped := len(runs) - len(whole):
        warnings.append(
            f"{dropped} of {len(runs)} runs were stopped early and are left out; all are failures, so that the "
            "estimate is too high; a scan with --no-early-stop has complete runs"
        )
    if whole.empty:
        return Estimated(math.nan, 0.0, math.inf, Censored.NO, 0, (*warnings, "no runs are left"))
    errors = [group.to_numpy() for _, group in whole["train_error"].groupby(whole["n"])]
    ns = np.sort(whole["n"].unique())
    weights = np.array([len(group) for group in errors], dtype=float)
    x = np.log(ns)

    def crossing(means: np.ndarray) -> tuple[int, float]:
        """The last n whose expected error is at most eps, -1 if none; and ln n where it is eps, infinite if nowhere."""
        rising = optimize.isotonic_regression(means, weights=weights).x
        last = int(np.searchsorted(rising, eps, side="right")) - 1
        if last < 0:
            return last, -math.inf
        if last == len(ns) - 1:
            return last, math.inf
        share = (eps - rising[last]) / (rising[last + 1] - rising[last])
        return last, float(x[last] + share * (x[last + 1] - x[last]))

    last, found = crossing(np.array([group.mean() for group in errors]))
    freedom = sum(len(group) - 1 for group in errors[max(last, 0) : last + 2])
    low, high = 0.0, math.inf
    if freedom:
        rng = np.random.default_rng([int(row["variant"]), len(whole)])
        drawn = [
            group[rng.integers(len(group), size=(REPLICATES, max(len(group) - 1, 1)))].mean(axis=1) for group in errors
        ]
        replicates = [crossing(means)[1] for means in np.stack(drawn, axis=1)]
        beyond = float(stats.norm.sf(stats.t.ppf((1.0 + _content(row, interval)) / 2.0, freedom)))
        # An order statistic: between infinite ones there is nothing to interpolate.
        low, high = np.exp(np.quantile(replicates, [beyond, 1.0 - beyond], method="inverted_cdf")).tolist()
    else:
        warnings.append("an interval needs two runs at an n next to the crossing")
    censored = Censored.NO
    if found == math.inf:
        censored, found, low, high = Censored.ABOVE, math.nan, min(low, float(ns[-1])), math.inf
    elif found == -math.inf:
        censored, found, low, high = Censored.BELOW, math.nan, 0.0, max(high, float(ns[0]))
    return Estimated(
        estimate=math.exp(found),
        low=low,
        high=high,
        censored=censored,
        n_probes=len(whole),
        warnings=(*warnings, *_unfinished(row)),
    )


ESTIMATORS: dict[str, tuple[Callable[..., Estimated], str]] = {
    "emc50": (
        emc50,
        "The n that half of the training runs fit. Assumes that P(fit | n) is logistic in ln n up to a lapse; "
        "posterior median and equal-tailed interval.",
    ),
    "paper": (
        paper,
        "The largest n fitted before the first failure (Shwartz-Ziv et al. 2024), the geometric mean over the ladders "
        "with Student's t interval. Assumes nothing of P(fit | n), but depends on the first n and on the growth, and "
        "lies below EMC50, the more so the more slowly P(fit | n) falls.",
    ),
    "nakkiran": (
        nakkiran,
        "The largest n with an expected train error of at most {eps:g} (Nakkiran et al. 2019, Definition 1). Assumes "
        "that the error rises with n, linearly in ln n between the n that were tried; that a fitted run, stopped at "
        "its first fit, has error 0; and that no run was stopped for want of progress. The interval is of a bootstrap "
        "over the runs.",
    ),
}
"""The estimators by name: the function, and what it assumes, with its options to be filled in."""


def full_runs(probes: pd.DataFrame, row: Mapping[str, Any] | pd.Series) -> pd.DataFrame:
    """The runs behind a row of ``/curves``: at the full budget, of finished rounds; of a winner the confirming ones.

    Of a round that is not whole the quick runs are there and the slow are not, and the quick ones are fits.
    """
    seeds = probes["seed"]
    wanted = (seeds < SHORT) & ((seeds >= CONFIRM) == (row["race"] == "won"))
    runs = probes[(probes["variant"] == row["variant"]) & wanted]
    if row["finished"]:
        return runs
    so_far = runs.groupby("round").size().cumsum()
    return runs[runs["round"].isin(so_far.index[so_far <= row["n_probes"]])]


def _short_runs(probes: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    """The runs at a third of the budget, of finished rounds."""
    runs = probes[(probes["variant"] == row["variant"]) & (probes["seed"] >= SHORT)]
    if row["finished"]:
        return runs
    so_far = runs.groupby("round").size().cumsum()
    known = row["n_probes"] if row["schedule"] == "constant" and _early_counts(row) else 0
    return runs[runs["round"].isin(so_far.index[so_far <= row["n_probes_third"] - known])]


def _early_counts(row: pd.Series) -> bool:
    return early_tells(int(row["check_every"]), int(row["steps_budget"]))


def _is_third(budget: ScanSpec, row: pd.Series) -> bool:
    """Whether a budget is a third of that of the scan: exactly, or to the nearest step."""
    texts = budget_text(budget), str(row["budget"])
    (asked, unit), (whole, units) = (re.fullmatch(r"(\d+)(\D+)", text).groups() for text in texts)  # type: ignore[union-attr]
    return unit == units and (3 * int(asked) == int(whole) or (unit == "steps" and int(asked) == (int(whole) + 1) // 3))


def _fitted(runs: pd.DataFrame) -> pd.Series:
    return runs["outcome"] == Outcome.FITTED


def _unfinished(row: pd.Series) -> tuple[str, ...]:
    return () if row["finished"] else ("the search of this variant has not ended",)


def _content(row: pd.Series, interval: float | None) -> float:
    return float(row["interval"]) if interval is None else interval


def _problem(row: pd.Series) -> Problem:
    settings: dict[str, Any] = {field.name: row[field.name] for field in dataclasses.fields(Variant)}
    return Problem(int(row["variant"]), Variant(**settings), int(row["params"]), int(row["n_min"]), int(row["n_max"]))
