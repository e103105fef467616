"""The variants of a scan as distributions of ln EMC50, recomputed from ``/probes``."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fasttrain.analysis import Results
from fasttrain.errors import UserError
from fasttrain.estimate import MARGIN, Posterior, estimate, posterior
from fasttrain.estimators import full_runs
from fasttrain.records import Estimate, Problem, Race
from fasttrain.spec import FULL_BATCH, MOMENTUM, Variant

Frames = tuple[pd.DataFrame, pd.DataFrame]
"""``Results.curves`` and ``Results.probes``, or rows of them; of the first, ``variant`` is the key into the second."""

SETTINGS = (*(field.name for field in dataclasses.fields(Variant)), "data", "steps_budget", "budget", "check_every")
"""Columns of ``/curves`` that say what was measured, and under which conditions."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One variant: its settings and what its own runs say of its EMC50.

    Attributes:
        row: its row of ``/curves``.
        post: posterior, from the runs behind the row's estimate.
        estimate: from it, at the content ``interval``; equal to the row's at the row's own content.
        x: float64, rising points in ln EMC50.
        below: float64, posterior probability below each of ``x``.
        bottom: ln n below which EMC50 was not looked for: what lies there is the prior's word alone.
        top: ln n above which it was not.
        test_accuracy: mean over those runs that fitted and were tried on held-out samples; NaN if none was.
    """

    row: Mapping[str, Any]
    post: Posterior
    estimate: Estimate
    x: np.ndarray
    below: np.ndarray
    bottom: float
    top: float
    test_accuracy: float

    @property
    def params(self) -> int:
        """Trained parameters, biases included."""
        return int(self.row["params"])

    @property
    def known(self) -> bool:
        """Whether EMC50 has a value: it is not censored, and both a fit and a failure were seen."""
        return math.isfinite(self.estimate.emc50)

    def moments(self) -> tuple[float, float]:
        """Mean and variance of ln EMC50."""
        at, mass = self.cells()
        mean = float((mass * at).sum())
        return mean, float((mass * (at - mean) ** 2).sum())

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Middles of the intervals between ``x``, and the mass of each; sums to 1."""
        return (self.x[1:] + self.x[:-1]) / 2.0, np.diff(self.below)

    def log_likelihood(self, m: np.ndarray) -> np.ndarray:
        """Log of the likelihood of ln EMC50 = m, slope and lapse integrated over their priors; at most 0 on ``x``.

        The prior of m is flat, so that the posterior's density is this likelihood. Beyond an end of the prior it keeps
        its last value: no run was made there, and just beyond is as likely as far beyond. Beyond an end of a grid that
        has moved in to where the mass is, it falls on as it did, linearly, which is how a logistic's tail falls.
        """
        at, mass = self.cells()
        log_density = np.log(np.maximum(mass / np.diff(self.x), 1e-300))
        log_density -= log_density.max()
        out = np.interp(m, at, log_density)
        for edge, inner, end, sign in ((0, 1, self.prior[0], -1.0), (-1, -2, self.prior[1], 1.0)):
            if not math.isclose(self.x[edge], end, abs_tol=1e-9):
                fall = min(sign * (log_density[edge] - log_density[inner]) / (at[edge] - at[inner]), 0.0)
                out += fall * np.maximum(sign * (m - at[edge]), 0.0)
        return out

    @property
    def prior(self) -> tuple[float, float]:
        """The ends of the prior of ln EMC50."""
        return math.log(self.row["n_min"]) - MARGIN, math.log(self.row["n_max"]) + MARGIN


def measured(source: Results | Frames, interval: float | None = None) -> tuple[list[Measured], list[str]]:
    """The variants of some results, each from its own runs in ``/probes``.

    Of learning rates that raced, only the winner is there, from its confirming runs (seeds from ``spec.CONFIRM`` on).
    Runs at a third of the budget (seeds from ``spec.SHORT`` on) have no part in it, nor have those of rounds that are
    not whole.

    Args:
        source: results, or the frames of its curves and probes.
        interval: probability content of ``Measured.estimate``; ``None`` takes each row's.

    Returns:
        The variants, in the order of their rows, and a line for each that is left out: no run has finished, or the
        race of its learning rates is not decided.

    Raises:
        UserError: ``interval`` is not within (0, 1), or a frame lacks a column.
    """
    if interval is not None and not 0.0 < interval < 1.0:
        raise UserError("interval", interval, "expected a probability content between 0 and 1, such as 0.9")
    curves, probes = frames(source)
    runs = {int(key): group for key, group in probes.groupby("variant")}
    out, missing = [], []
    for row in _rows(curves):
        race = str(row["race"])
        if race in (Race.DROPPED, Race.LOST):
            continue
        found = runs.get(int(row["variant"]), probes.iloc[:0])
        chosen = full_runs(found, row)
        if race == Race.RUNNING:
            missing.append(f"{describe(row)}: the race of its learning rates is not decided")
        elif chosen.empty:
            missing.append(f"{describe(row)}: none of its runs has finished")
        else:
            out.append(_measured(row, chosen, interval))
    return out, missing


def _measured(row: Mapping[str, Any], runs: pd.DataFrame, interval: float | None) -> Measured:
    fitted = runs["outcome"] == "fitted"
    counts = pd.DataFrame({"fits": fitted, "fails": ~fitted}).groupby(runs["n"]).sum()
    n_min, n_max = int(row["n_min"]), int(row["n_max"])
    ns, fits, fails = (values.tolist() for values in (counts.index, counts["fits"], counts["fails"]))
    post = posterior(ns, fits, fails, n_min=n_min, n_max=n_max)
    variant = Variant(**{field.name: row[field.name] for field in dataclasses.fields(Variant)})
    problem = Problem(int(row["variant"]), variant, int(row["params"]), n_min, n_max)
    x, below = post.distribution()
    return Measured(
        row=row,
        post=post,
        estimate=estimate(problem, post, interval or float(row["interval"])),
        x=x,
        below=below,
        bottom=math.log(n_min if any(fits) else ns[0]),
        top=math.log(n_max if any(fails) else ns[-1]),
        test_accuracy=float(runs["test_accuracy"][fitted].mean()),
    )


def frames(source: Results | Frames) -> Frames:
    """The frames of the curves and the probes of some results.

    Raises:
        UserError: a frame lacks a column that is needed.
    """
    curves, probes = (source.curves, source.probes) if isinstance(source, Results) else source
    needed = {"variant", "params", "n_min", "n_max", "interval", "race", *SETTINGS}
    for name, frame, columns in (
        ("curves", curves, needed),
        ("probes", probes, {"variant", "n", "seed", "outcome", "test_accuracy"}),
    ):
        if lacking := sorted(columns.difference(frame.columns)):
            raise UserError(name, "frame", f"lacks the columns {', '.join(lacking)}")
    return curves, probes


def select(source: Results | Frames, selection: str | Sequence[str], option: str = "selection") -> Frames:
    """The variants with given settings, and their runs.

    Args:
        source: results, or the frames of its curves and probes.
        selection: ``"name=value"``, several separated by commas or in a sequence. A name is a column of ``/curves``.
            Values of one name are alternatives (``"width=8,16"`` or ``"width=8,width=16"``), names are all to hold.
        option: what an error calls it.

    Raises:
        UserError: it names no column, or no variant has the value; the message has those that exist.
    """
    curves, probes = frames(source)
    for name, values in parse_selection(selection, option).items():
        if name not in curves.columns:
            raise UserError(option, name, f"no such column of /curves; settings are {', '.join(SETTINGS)}, params")
        exist = curves[name]
        keep = np.zeros(len(curves), dtype=bool)
        for value in values:
            same = exist.map(lambda have, want=value, column=name: _equals(column, have, want)).to_numpy(bool)
            if not same.any():
                shown = ", ".join(dict.fromkeys(value_text(name, one) for one in exist))
                raise UserError(option, f"{name}={value}", f"no variant has it; there are {shown or 'none'}")
            keep |= same
        curves = curves[keep]
    return curves, probes[probes["variant"].isin(curves["variant"])]


def parse_selection(selection: str | Sequence[str], option: str = "selection") -> dict[str, list[str]]:
    """The values asked for by name: ``"width=8,16,labels=true"`` is ``{"width": ["8", "16"], "labels": ["true"]}``.

    Raises:
        UserError: a part is not ``name=value``.
    """
    texts = [selection] if isinstance(selection, str) else list(selection)
    out: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for part in text.split(","):
            before, equals, after = part.partition("=")
            name, value = (before.strip().replace("-", "_"), after.strip()) if equals else (name, part.strip())
            if not name or not value:
                raise UserError(option, text, "expected name=value, such as optimizer=sgd or width=8,16")
            out.setdefault(name, []).append(value)
    return out


def meaningless(row: Mapping[str, Any], name: str) -> bool:
    """Whether a setting says nothing of a variant, such as the momentum of Adam or the width of a linear classifier."""
    return {
        "width": row["depth"] == 0,
        "activation": row["activation"] == "none",
        "norm": row["arch"] != "cnn",
        "heads": row["heads"] == 0,
        "patch": row["patch"] == 0,
        "momentum": row["optimizer"] not in MOMENTUM,
        "nesterov": row["optimizer"] not in MOMENTUM,
    }.get(name, False)


def value_text(name: str, value: Any) -> str:
    """A value of a column as it would be typed in a selection."""
    if name == "batch_size" and value == FULL_BATCH:
        return "full"
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(row: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """A variant in words: architecture, width, depth, optimizer and learning rate, and other settings by name."""
    extra = [f"{name} {value_text(name, row[name])}" for name in names if not meaningless(row, name)]
    sizes = [f"width {row['width']}"] if row["depth"] else []
    words = [row["arch"], *sizes, f"depth {row['depth']}", row["optimizer"], f"lr {row['lr']:g}", *extra]
    return ", ".join(str(word) for word in words)


def variants(results: Results, selection: str | Sequence[str] = (), sort: str = "") -> pd.DataFrame:
    """Rows of ``results.curves``.

    Args:
        results: from ``load`` or ``scan``.
        selection: as of ``select``; all where it is empty.
        sort: a column to sort by, ``"emc50"``, or ``"-emc50"`` for the largest first; unknown values come last. By
            default the order of the spec.

    Raises:
        UserError: there is no such column, or no variant that is selected.
    """
    curves = select(results, selection, "select")[0] if selection else results.curves
    name = sort.removeprefix("-").replace("-", "_")
    if name and name not in curves.columns:
        raise UserError("sort", sort, f"no such column of /curves; expected one of {', '.join(curves.columns)}")
    if name:
        curves = curves.sort_values(name, ascending=not sort.startswith("-"), kind="stable")
    return curves


def _rows(curves: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in curves.to_dict("records")]


def _equals(name: str, have: Any, want: str) -> bool:
    """Whether a value of a column is the one that was typed."""
    if isinstance(have, str):
        return have == want
    if isinstance(have, bool | np.bool_):
        return value_text(name, have) == {"1": "true", "0": "false"}.get(want.lower(), want.lower())
    if name == "batch_size" and want == "full":
        return bool(have == FULL_BATCH)
    try:
        return math.isclose(float(want), have, rel_tol=1e-9)
    except ValueError:
        return False
