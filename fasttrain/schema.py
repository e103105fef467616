"""The tables of a file (docs/hdf5.md): one place that names every column, its type and what a row has there."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from fasttrain.records import Censored, Curvature, Estimate, ProbeResult, Problem
from fasttrain.spec import ScanSpec, budget_steps, budget_text

SCHEMA_VERSION = 3
"""Attribute ``schema_version`` of the files written; raised when something moves, changes its meaning or is added
without which a file cannot be understood."""

TIMING_COLUMNS = ("started", "finished", "train_seconds")
"""Columns of ``/probes`` that differ between two runs of one scan, as does the order of its rows."""

TIMING_ATTRIBUTES = (
    "started",
    "ended",
    "seconds",
    "steps_per_second",
    "launches",
    "step_seconds",
    "check_seconds",
    "search_seconds",
    "curvature_seconds",
    "occupancy",
    "memory_retreats",
)
"""Root attributes that differ between two runs of one scan: the clock, and the speeds and load of a summary."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a group.

    Attributes:
        name: of its data set.
        kind: ``int`` (int64), ``float`` (float64), ``bool`` (int8, 0 or 1), ``str`` (variable-length UTF-8).
        source: where a row has the value; for /history the whole array.
        description: what it means, in a line.
        units: ``"1"`` where dimensionless, empty for text.
        default: of all rows of a file of a schema version below ``since``, which lacks the column; None where it
            follows from the spec (``analysis.load``).
        since: the first schema version that has it.
    """

    name: str
    kind: type
    source: str
    description: str
    units: str = "1"
    default: str | float | None = None
    since: int = 1

    @property
    def dtype(self) -> np.dtype:
        """The type in the file."""
        return _DTYPES[self.kind]


# Little-endian by name, so that a file does not depend on the machine that wrote it.
_DTYPES = {int: np.dtype("<i8"), float: np.dtype("<f8"), bool: np.dtype("i1"), str: h5py.string_dtype()}


def unknown(variant: int) -> Estimate:
    """An estimate from no probe."""
    nothing = (math.nan,) * 5
    return Estimate(variant, *nothing, Censored.NO, False, False, 0, misfit_p=math.nan)


@dataclass(frozen=True, slots=True)
class CurveRow:
    """What a row of /curves is made of."""

    spec: ScanSpec
    problem: Problem
    estimate: Estimate

    @property
    def growth(self) -> float:
        """NaN where there are no ladders."""
        return self.spec.growth if self.spec.search == "paper" else math.nan

    @property
    def third(self) -> Estimate:
        """That at a third of the budget, empty where there is none."""
        return self.estimate.third or unknown(self.problem.index)

    @property
    def per_param(self) -> float:
        """NaN for a model without parameters."""
        return self.estimate.emc50 / self.problem.params if self.problem.params else math.nan

    @property
    def budget(self) -> str:
        """As the scan was asked for it."""
        return budget_text(self.spec)

    @property
    def steps_budget(self) -> int:
        """0 where it depends on n."""
        least, most = (
            budget_steps(self.spec, self.problem.variant, n) for n in (self.problem.n_min, self.problem.n_max)
        )
        return least if least == most else 0


@dataclass(frozen=True, slots=True)
class RunRow:
    """What a row of /probes, and its rows of /history, are made of."""

    number: int
    problem: Problem
    result: ProbeResult
    history_start: int
    spec: ScanSpec

    @property
    def steps_budget(self) -> int:
        """Of this run."""
        probe = self.result.probe
        return budget_steps(self.spec, self.problem.variant, probe.n, probe.short)

    @property
    def history_count(self) -> int:
        """Checks that were kept."""
        return len(self.result.history.step)

    @property
    def samples(self) -> np.ndarray:
        """Its rows in /history."""
        return np.arange(self.history_start, self.history_start + self.history_count)


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """What a row of /curvature is made of."""

    number: int
    probe: int
    curvature: Curvature


_SETTINGS = (
    Column("variant", int, "problem.index", "index of the variant: its row in /curves"),
    Column("arch", str, "problem.variant.arch", "architecture family", ""),
    Column("width", int, "problem.variant.width", "hidden units, channels or embedding; 0 for the linear classifier"),
    Column("depth", int, "problem.variant.depth", "hidden layers or blocks; 0 is the linear classifier"),
    Column("activation", str, "problem.variant.activation", "activation; none for the linear classifier", ""),
    Column("norm", str, "problem.variant.norm", "none or batch", "", default="none", since=2),
    Column("heads", int, "problem.variant.heads", "attention heads; 0 where there are none", default=0, since=2),
    Column(
        "patch",
        int,
        "problem.variant.patch",
        "side of a patch; 0 where there are none, or by rule",
        "pixel",
        default=0,
        since=2,
    ),
    Column("init_scale", float, "problem.variant.init_scale", "factor on the initial weights", default=1.0, since=2),
    Column("optimizer", str, "problem.variant.optimizer", "name of the optimizer", ""),
    Column("lr", float, "problem.variant.lr", "learning rate, the largest of its schedule"),
    Column("momentum", float, "problem.variant.momentum", "momentum of sgd and muon; 0 for the others"),
    Column("nesterov", bool, "problem.variant.nesterov", "1 if the momentum is Nesterov's", default=False, since=2),
    Column("weight_decay", float, "problem.variant.weight_decay", "weight decay", default=0.0, since=2),
    Column("schedule", str, "problem.variant.schedule", "constant, cosine or linear", "", default="constant", since=2),
    Column("warmup", int, "problem.variant.warmup", "steps in which the learning rate rises", default=0, since=2),
    Column("clip", float, "problem.variant.clip", "largest norm of a gradient; 0 for no limit", default=0.0, since=2),
    Column(
        "label_smoothing",
        float,
        "problem.variant.label_smoothing",
        "share of a label spread over all classes",
        default=0.0,
        since=2,
    ),
    Column("batch_size", int, "problem.variant.batch_size", "samples a step; 0 is the full batch"),
    Column("inputs", str, "problem.variant.inputs", "real, shuffled or gaussian", "", default="real", since=2),
    Column("labels", str, "problem.variant.labels", "random, true or corrupted:SHARE", ""),
    Column("classes", int, "problem.variant.classes", "number of labels"),
    Column("params", int, "problem.params", "trained parameters, biases included"),
)
ESTIMATES = (
    Column("emc50", float, "estimate.emc50", "n fitted with probability one half; NaN if censored or unknown"),
    Column("emc50_low", float, "estimate.emc50_low", "lower end of its interval; n_max if above, 0 if below"),
    Column("emc50_high", float, "estimate.emc50_high", "upper end of its interval; infinite if not reached"),
    Column("emc50_per_param", float, "per_param", "emc50 / params"),
    Column("slope", float, "estimate.slope", "steepness of the probability of a fit over ln n"),
    Column("lapse", float, "estimate.lapse", "probability to fail where n is no obstacle"),
    Column("censored", str, "estimate.censored", "no, or above n_max, or below n_min", ""),
    Column("budget_spent", bool, "estimate.budget_spent", "1 if the probes ran out before the tolerance"),
    Column("finished", bool, "estimate.finished", "1 if the search of the variant has ended"),
    Column("n_probes", int, "estimate.n_probes", "finished probes behind the estimate"),
    Column(
        "misfit_p", float, "estimate.misfit_p", "p-value of a test that the runs follow the model", "1", math.nan, 3
    ),
    Column("misfit", bool, "estimate.misfit", "1 if they contradict it", "1", False, 3),
    Column("emc50_third", float, "third.emc50", "emc50 at a third of the budget; NaN if unknown", "1", math.nan, 3),
    Column("emc50_third_low", float, "third.emc50_low", "lower end of its interval", "1", math.nan, 3),
    Column("emc50_third_high", float, "third.emc50_high", "upper end of its interval", "1", math.nan, 3),
    Column("censored_third", str, "third.censored", "as censored, at a third of the budget", "", "no", 3),
    Column(
        "budget_spent_third", bool, "third.budget_spent", "as budget_spent, at a third of the budget", "1", False, 3
    ),
    Column("n_probes_third", int, "third.n_probes", "runs behind it, those at the full budget included", "1", 0, 3),
    Column("elasticity", float, "estimate.elasticity", "d ln emc50 / d ln budget; NaN if unknown", "1", math.nan, 3),
    Column("elasticity_low", float, "estimate.elasticity_low", "lower end of its interval", "1", math.nan, 3),
    Column("elasticity_high", float, "estimate.elasticity_high", "upper end of its interval", "1", math.nan, 3),
    Column(
        "budget_limited",
        bool,
        "estimate.budget_limited",
        "1 if the elasticity says that ten times the budget adds more than 10 %",
        "1",
        False,
        3,
    ),
    Column("race", str, "estimate.race", "of its learning rate: running, dropped, lost or won; empty: none", "", "", 2),
    Column(
        "race_emc50",
        float,
        "estimate.race_emc50",
        "emc50 of the race's own probes; NaN if none",
        default=math.nan,
        since=2,
    ),
    Column(
        "race_emc50_low",
        float,
        "estimate.race_low",
        "lower end of its interval; NaN if none",
        default=math.nan,
        since=2,
    ),
    Column(
        "race_emc50_high",
        float,
        "estimate.race_high",
        "upper end of its interval; NaN if none",
        default=math.nan,
        since=2,
    ),
)
CURVES = (
    *_SETTINGS,
    Column("n_min", int, "problem.n_min", "smallest number of samples that may be tried"),
    Column("n_max", int, "problem.n_max", "largest number of samples that may be tried"),
    Column("data", str, "spec.data", "data set", ""),
    Column("steps_budget", int, "steps_budget", "optimizer steps that a full probe may take; 0 if it depends on n"),
    Column("budget", str, "budget", "what a full probe may take, in steps, epochs or samples", "", since=3),
    Column("check_every", int, "spec.check_every", "steps between checks on the whole training set, at most"),
    Column("search", str, "spec.search", "which runs were made: adaptive, paper or grid", "", "adaptive", 3),
    Column("growth", float, "growth", "factor from one n of a ladder to the next; NaN if none", "1", math.nan, 3),
    Column("max_probes", int, "spec.max_probes", "at most so many probes a variant; not of a grid"),
    Column("interval", float, "spec.interval", "probability content of emc50_low to emc50_high"),
    Column("tolerance", float, "spec.tolerance", "half-width of it, as a share of emc50, that is enough"),
    *ESTIMATES,
)
PROBES = (
    Column("probe", int, "number", "index of the probe, in the order in which they finished"),
    *_SETTINGS,
    Column("n", int, "result.probe.n", "training samples"),
    Column(
        "seed", int, "result.probe.seed", "0, 1, 2, ... at each n; from 2^20 on it confirms, from 2^21 on it is short"
    ),
    Column("round", int, "result.probe.round", "round of the search that asked for it; 0 is the bracket"),
    Column("outcome", str, "result.outcome", "fitted, plateaued, diverged or out_of_budget", ""),
    Column("steps_budget", int, "steps_budget", "optimizer steps that it might take", since=3),
    Column("steps", int, "result.steps", "optimizer steps taken"),
    Column("fit_step", int, "result.fit_step", "step of the first fit; -1 if there was none"),
    Column("train_error", float, "result.train_error", "share of the n samples not strictly right at the end"),
    Column("train_loss", float, "result.train_loss", "mean cross-entropy over the n samples at the end", "nat"),
    Column(
        "test_accuracy",
        float,
        "result.test_accuracy",
        "share of the held-out samples classified right at the end of a fitted run",
        default=math.nan,
        since=2,
    ),
    Column("started", float, "result.started", "start of the run, after the start of the scan", "s"),
    Column("finished", float, "result.finished", "end of the run, after the start of the scan", "s"),
    Column("train_seconds", float, "result.train_seconds", "its share of the time of its batches", "s"),
    Column("history_start", int, "history_start", "row of /history where its training curve starts"),
    Column("history_count", int, "history_count", "rows of its training curve in /history"),
)
HISTORY = (
    Column("sample", int, "samples", "index of the row"),
    Column("step", int, "result.history.step", "optimizer steps taken"),
    Column("train_loss", float, "result.history.train_loss", "mean cross-entropy over the n samples", "nat"),
    Column("train_accuracy", float, "result.history.train_accuracy", "share of the n samples strictly right"),
)
CURVATURE = (
    Column("row", int, "number", "index of the row", since=3),
    Column("probe", int, "probe", "index of the probe: its row in /probes", since=3),
    Column(
        "loss", float, "curvature.loss", "mean cross-entropy over the n samples at the end, in float64", "nat", since=3
    ),
    Column("gradient_norm", float, "curvature.gradient_norm", "norm of its gradient, all parameters", "nat", since=3),
    Column("loss_slope", float, "curvature.loss_slope", "d ln loss / d ln step, last half of the curve", since=3),
    Column("lambda_min", float, "curvature.lambda_min", "smallest eigenvalue of the loss's Hessian", "nat", since=3),
    Column(
        "residual_min", float, "curvature.residual_min", "|H v - lambda v|; an eigenvalue is within", "nat", since=3
    ),
    Column("lambda_max", float, "curvature.lambda_max", "largest eigenvalue of the loss's Hessian", "nat", since=3),
    Column(
        "residual_max", float, "curvature.residual_max", "|H v - lambda v|; an eigenvalue is within", "nat", since=3
    ),
    Column("products", int, "curvature.products", "Hessian-vector products that it took", since=3),
    Column(
        "converged", bool, "curvature.converged", "1 if both residuals are at most 1e-5 of the larger |lambda|", since=3
    ),
)
GROUPS = {"curves": CURVES, "probes": PROBES, "history": HISTORY, "curvature": CURVATURE}
"""The columns of each group; the first is its dimension scale and equals the row number."""

WEIGHTS = "weights"
"""The group of the parameters that were kept: /weights/<probe>/<name of the parameter>."""

Block = dict[str, np.ndarray]
"""Values of some columns of a group, by name; all of one length."""


def array(column: Column, values: Any) -> np.ndarray:
    """Values of a column in the type of the file."""
    # Plain str: in memory an enum would stay one, and read back differently from text of a file.
    if column.kind is str:
        return np.array([str(value) for value in values], dtype=object)
    return np.asarray(values, dtype=column.dtype)


def block(columns: Sequence[Column], rows: Sequence[CurveRow] | Sequence[RunRow] | Sequence[MeasuredRow]) -> Block:
    """Columns with one value from each row."""
    return {c.name: array(c, list(map(operator.attrgetter(c.source), rows))) for c in columns}


def joined(columns: Sequence[Column], rows: Sequence[RunRow]) -> Block:
    """As ``block``, for columns that give an array for each row."""
    block = {c.name: np.concatenate(list(map(operator.attrgetter(c.source), rows))) for c in columns}
    if len({len(values) for values in block.values()}) > 1:
        raise ValueError("the arrays of a history must be of one length")
    return {c.name: array(c, block[c.name]) for c in columns}
