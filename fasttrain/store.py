"""Where results go while a scan runs: memory or an HDF5 file (docs/hdf5.md). The only writer of HDF5."""

import datetime
import math
import operator
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from fasttrain.errors import UserError
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
)
"""Root attributes that differ between two runs of one scan: the clock, and the speeds and load of a summary."""

Attribute = str | int | float


class Store(Protocol):
    """What a scan writes to: ``begin``; ``append``, ``put_curves`` and ``put_curvature``; ``finish``, ``close``."""

    def begin(self, spec: ScanSpec, problems: Sequence[Problem], conditions: Mapping[str, Attribute]) -> None:
        """Start a scan: keep its spec, its variants and the conditions it runs under.

        Raises:
            UserError: the output file cannot be created.
            ValueError: the problems are not numbered 0, 1, 2, ... in order, or a condition has the name of an
                attribute that the store sets.
        """

    def append(self, results: Sequence[ProbeResult]) -> None:
        """Commit finished probes. On return they are out of this process: a kill does not lose them.

        Raises:
            OSError: the file cannot be written (disk full). What was committed before stays valid.
        """

    def put_curves(self, estimates: Sequence[Estimate]) -> None:
        """Replace the estimates of all variants.

        Raises:
            ValueError: not exactly one estimate for each variant.
        """

    def put_curvature(self, measured: Sequence[tuple[int, Curvature]]) -> None:
        """Commit the curvature of probes: for each, its row in ``/probes`` and what was measured.

        Raises:
            OSError: the file cannot be written.
        """

    def finish(self, status: str, summary: Mapping[str, Attribute]) -> None:
        """Set the status, ``"complete"`` or ``"interrupted"``, the end time and the summary's attributes."""

    def close(self) -> None:
        """Release the file; without ``finish`` the status stays ``"running"``. May be called again."""


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


def _unknown(variant: int) -> Estimate:
    """An estimate from no probe."""
    nothing = (math.nan,) * 5
    return Estimate(variant, *nothing, Censored.NO, False, False, 0, misfit_p=math.nan)


@dataclass(frozen=True, slots=True)
class _Curve:
    """What a row of /curves is made of."""

    spec: ScanSpec
    problem: Problem
    estimate: Estimate

    @property
    def growth(self) -> float:
        return self.spec.growth if self.spec.search == "paper" else math.nan

    @property
    def third(self) -> Estimate:
        """That at a third of the budget, empty where there is none."""
        return self.estimate.third or _unknown(self.problem.index)

    @property
    def per_param(self) -> float:
        return self.estimate.emc50 / self.problem.params if self.problem.params else math.nan

    @property
    def budget(self) -> str:
        return budget_text(self.spec)

    @property
    def steps_budget(self) -> int:
        """0 where it depends on n."""
        least, most = (
            budget_steps(self.spec, self.problem.variant, n) for n in (self.problem.n_min, self.problem.n_max)
        )
        return least if least == most else 0


@dataclass(frozen=True, slots=True)
class _Run:
    """What a row of /probes, and its rows of /history, are made of."""

    number: int
    problem: Problem
    result: ProbeResult
    history_start: int
    spec: ScanSpec

    @property
    def steps_budget(self) -> int:
        probe = self.result.probe
        return budget_steps(self.spec, self.problem.variant, probe.n, probe.short)

    @property
    def history_count(self) -> int:
        return len(self.result.history.step)

    @property
    def samples(self) -> np.ndarray:
        return np.arange(self.history_start, self.history_start + self.history_count)


@dataclass(frozen=True, slots=True)
class _Measured:
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
_ESTIMATES = (
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
    *_ESTIMATES,
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


class _TableStore(ABC):
    """The records as rows of tables; a subclass keeps the tables."""

    def __init__(self) -> None:
        self._rows = {"probes": 0, "history": 0, "curvature": 0}

    def begin(self, spec: ScanSpec, problems: Sequence[Problem], conditions: Mapping[str, Attribute]) -> None:
        if [problem.index for problem in problems] != list(range(len(problems))):
            raise ValueError("problems must be numbered 0, 1, 2, ... in order")
        self._spec, self._problems = spec, tuple(problems)
        own: dict[str, Attribute] = {
            "schema_version": SCHEMA_VERSION,
            "title": "EMC scaling curves measured by fasttrain",
            "status": "running",
            "started": _now(),
            "ended": "",
            "spec_digest": spec.digest(),
        }
        self._reserved = frozenset(own)
        curves = [_Curve(spec, problem, _unknown(problem.index)) for problem in problems]
        self._create(spec.to_json(), {**own, **self._checked(conditions)}, _block(CURVES, curves))

    def append(self, results: Sequence[ProbeResult]) -> None:
        runs, start = [], self._rows["history"]
        for index, result in enumerate(results, self._rows["probes"]):
            runs.append(_Run(index, self._problems[result.probe.variant], result, start, self._spec))
            start += len(result.history.step)
        if not runs:
            return
        # Cut short between the two, this leaves curves without a probe, never a probe without its curve.
        for run in runs:
            if run.result.weights is not None:
                self._keep_weights(run.number, run.result.weights)
        self._write("history", self._rows["history"], _joined(HISTORY, runs))
        self._write("probes", self._rows["probes"], _block(PROBES, runs))
        self._flush()
        self._rows |= {"probes": self._rows["probes"] + len(runs), "history": start}

    def put_curves(self, estimates: Sequence[Estimate]) -> None:
        by_variant = {estimate.variant: estimate for estimate in estimates}
        if len(estimates) != len(self._problems) or set(by_variant) != set(range(len(self._problems))):
            raise ValueError("expected one estimate for each variant")
        rows = [_Curve(self._spec, problem, by_variant[problem.index]) for problem in self._problems]
        self._write("curves", 0, _block(_ESTIMATES, rows))
        self._flush()

    def put_curvature(self, measured: Sequence[tuple[int, Curvature]]) -> None:
        first = self._rows["curvature"]
        rows = [_Measured(number, *one) for number, one in enumerate(measured, first)]
        self._write("curvature", first, _block(CURVATURE, rows))
        self._flush()
        self._rows["curvature"] = first + len(rows)

    def finish(self, status: str, summary: Mapping[str, Attribute]) -> None:
        if status not in ("complete", "interrupted"):
            raise ValueError(f"status {status!r} is neither complete nor interrupted")
        # An append that an exception cut short has left rows that were never committed.
        for group, rows in self._rows.items():
            self._truncate(group, rows)
        self._set_attributes({**self._checked(summary), "ended": _now(), "status": status})
        self._flush()

    def _checked(self, attributes: Mapping[str, Attribute]) -> Mapping[str, Attribute]:
        if taken := sorted(self._reserved.intersection(attributes)):
            raise ValueError(f"the store itself sets {', '.join(taken)}")
        return {name: _attribute(name, value) for name, value in attributes.items()}

    @abstractmethod
    def _create(self, spec: str, attributes: Mapping[str, Attribute], curves: Block) -> None: ...

    @abstractmethod
    def _write(self, group: str, start: int, block: Block) -> None:
        """Put values at row ``start``; the columns grow where they must."""

    @abstractmethod
    def _keep_weights(self, probe: int, weights: Mapping[str, np.ndarray]) -> None:
        """Put the parameters of a probe beside the tables."""

    @abstractmethod
    def _truncate(self, group: str, rows: int) -> None: ...

    @abstractmethod
    def _set_attributes(self, attributes: Mapping[str, Attribute]) -> None: ...

    @abstractmethod
    def _flush(self) -> None: ...


class MemoryStore(_TableStore):
    """A store that keeps everything in memory, for a scan without an output file.

    Attributes:
        spec: the spec's JSON; empty before ``begin``.
        attributes: the root attributes.
        weights: parameters of the probes whose weights were kept, by probe and name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spec = ""
        self.attributes: dict[str, Attribute] = {}
        self.weights: dict[int, Mapping[str, np.ndarray]] = {}
        self._lists: dict[str, dict[str, list[Any]]] = {}

    def block(self, group: str) -> Block:
        """A copy of all columns of one of ``GROUPS``, in the types of the file."""
        return {c.name: _array(c, self._lists[group][c.name]) for c in GROUPS[group]}

    def close(self) -> None:
        """Nothing to release; what was stored can still be read."""

    def _create(self, spec: str, attributes: Mapping[str, Attribute], curves: Block) -> None:
        self.spec, self.attributes = spec, dict(attributes)
        self._lists = {group: {column.name: [] for column in columns} for group, columns in GROUPS.items()}
        self._write("curves", 0, curves)

    def _write(self, group: str, start: int, block: Block) -> None:
        for name, values in block.items():
            self._lists[group][name][start : start + len(values)] = values.tolist()

    def _keep_weights(self, probe: int, weights: Mapping[str, np.ndarray]) -> None:
        self.weights[probe] = weights

    def _truncate(self, group: str, rows: int) -> None:
        for values in self._lists[group].values():
            del values[rows:]

    def _set_attributes(self, attributes: Mapping[str, Attribute]) -> None:
        self.attributes.update(attributes)

    def _flush(self) -> None:
        pass


class HDF5Store(_TableStore):
    """A store that writes an HDF5 file.

    Args:
        path: of the file; created by ``begin``.
        overwrite: whether an existing file is replaced, by ``begin``.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool) -> None:
        super().__init__()
        self.path = Path(path)
        self._overwrite = overwrite
        self._file: h5py.File | None = None
        self._columns: dict[str, dict[str, h5py.Dataset]] = {}

    def close(self) -> None:
        """Close the file. May be called again."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._columns = {}

    def _create(self, spec: str, attributes: Mapping[str, Attribute], curves: Block) -> None:
        check_output(self.path, self._overwrite)
        try:
            # What HDF5 1.10 and netCDF-4 read. Newer formats also mark a killed writer's file as still open.
            self._file = h5py.File(
                self.path, "w" if self._overwrite else "x", libver=("earliest", "v110"), track_order=True
            )
            self._set_attributes(attributes)
            self._file.create_dataset("spec", data=spec, dtype=h5py.string_dtype(), track_order=True)
            self._file["spec"].attrs["description"] = "the scan's specification, JSON"
            for group in GROUPS:
                self._create_group(group, len(next(iter(curves.values()))) if group == "curves" else None)
            self._write("curves", 0, curves)
            self._file.flush()
        except OSError as error:
            self.close()
            raise UserError("out", self.path, f"cannot be created ({_line(error)})") from None

    def _create_group(self, group: str, rows: int | None) -> None:
        """A group of empty columns; ``rows`` is their length for ever, ``None`` lets them grow."""
        assert self._file is not None
        chunks = {"probes": (256,), "history": (1024,), "curvature": (64,)}.get(group)
        parent = self._file.create_group(group, track_order=True)
        columns = self._columns[group] = {}
        for column in GROUPS[group]:
            data = columns[column.name] = parent.create_dataset(
                column.name, (rows or 0,), column.dtype, chunks=chunks, maxshape=(rows,), track_order=True
            )
            data.attrs["description"], data.attrs["units"] = column.description, column.units
        scale = columns[GROUPS[group][0].name]
        scale.make_scale(GROUPS[group][0].name)
        for data in columns.values():
            if data is not scale:
                data.dims[0].attach_scale(scale)

    def _write(self, group: str, start: int, block: Block) -> None:
        for name, values in block.items():
            data = self._columns[group][name]
            if data.shape[0] < start + len(values):
                data.resize((start + len(values),))
            if len(values):
                data[start : start + len(values)] = values

    def _keep_weights(self, probe: int, weights: Mapping[str, np.ndarray]) -> None:
        assert self._file is not None
        name = f"{WEIGHTS}/{probe}"
        if name in self._file:  # of an append that was cut short
            del self._file[name]
        group = self._file.create_group(name, track_order=True)
        for parameter, values in weights.items():
            group.create_dataset(parameter, data=values, dtype="<f8", track_order=True)

    def _truncate(self, group: str, rows: int) -> None:
        for data in self._columns[group].values():
            if data.shape[0] != rows:
                data.resize((rows,))

    def _set_attributes(self, attributes: Mapping[str, Attribute]) -> None:
        assert self._file is not None
        for name, value in attributes.items():
            text = isinstance(value, str)
            self._file.attrs.modify(name, np.array(value, dtype=h5py.string_dtype() if text else None))

    def _flush(self) -> None:
        assert self._file is not None
        self._file.flush()


def check_output(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Whether a scan could write its file here, before anything is computed. Leaves nothing behind.

    Raises:
        UserError: the file exists and ``overwrite`` is false, the path is no regular file, or its folder is
            missing or cannot be written.
    """
    try:
        mode = os.stat(path).st_mode if os.path.lexists(path) else None
        if mode is not None and stat.S_ISDIR(mode):
            raise UserError("out", path, "is a directory; expected the name of a file in it")
        if mode is not None and not stat.S_ISREG(mode):
            raise UserError("out", path, "is not a regular file")
        if mode is not None and not overwrite:
            raise UserError("out", path, "exists; choose another name or ask to overwrite it")
        if mode is not None:
            open(path, "r+b").close()
            return
        folder = Path(path).parent
        if not folder.is_dir():
            what = "is not a directory" if folder.exists() else "does not exist"
            raise UserError("out", path, f"its folder {folder} {what}")
        # Only the attempt knows of read-only mounts, access lists and names that are too long.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(path)
    except OSError as error:
        raise UserError("out", path, f"cannot be written ({_line(error)})") from None


def _line(error: OSError) -> str:
    return " ".join((error.strerror or str(error)).split())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _attribute(name: str, value: object) -> Attribute:
    """One of the three plain types, so that what is read back does not depend on the store."""
    if isinstance(value, np.generic):
        value = value.item()
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"attribute {name} is neither text nor a number: {value!r}")


def _array(column: Column, values: Any) -> np.ndarray:
    # Plain str: in memory an enum would stay one, and read back differently from text of a file.
    if column.kind is str:
        return np.array([str(value) for value in values], dtype=object)
    return np.asarray(values, dtype=column.dtype)


def _block(columns: Sequence[Column], rows: Sequence[_Curve] | Sequence[_Run] | Sequence[_Measured]) -> Block:
    return {c.name: _array(c, list(map(operator.attrgetter(c.source), rows))) for c in columns}


def _joined(columns: Sequence[Column], rows: Sequence[_Run]) -> Block:
    """As ``_block``, for columns that give an array for each row."""
    block = {c.name: np.concatenate(list(map(operator.attrgetter(c.source), rows))) for c in columns}
    if len({len(values) for values in block.values()}) > 1:
        raise ValueError("the arrays of a history must be of one length")
    return {c.name: _array(c, block[c.name]) for c in columns}
