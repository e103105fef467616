"""Reading what a scan has measured, from its file or from memory, as pandas DataFrames."""

import contextlib
import dataclasses
import json
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd

from fasttrain.errors import UserError
from fasttrain.journal import being_written
from fasttrain.records import Outcome
from fasttrain.schema import CURVATURE, CURVES, GROUPS, HISTORY, PROBES, SCHEMA_VERSION, WEIGHTS, Block, Column
from fasttrain.spec import ScanSpec, budget_text
from fasttrain.store import COMMITS, FILE_ID, MemoryStore, with_journal

EXTENDED_FROM = "extended_from"
"""Attribute of a scan that was extended: what its earlier specs have otherwise than the present one, JSON."""

_CURVE_COLUMNS = HISTORY[1:]
_PROBE = PROBES[0]
_ATTRIBUTES = {EXTENDED_FROM: str, "status": str, "started": str, "save_weights": int, "curvature_runs": int}
"""Types of those attributes on which it depends how a file is read or gone on with."""

if TYPE_CHECKING:
    import xarray

_ROWS_A_BYTE, _LEAST_BYTES = 100, 2**16  # rows that a byte of a file may hold: more than compression makes of it


class Results:
    """The results of a scan. ``load`` makes them from a file, ``scan`` gives them back. Keeps no file open.

    Attributes:
        spec: what was to be measured.
        curves: one row a variant, with its settings and its EMC50; the columns of ``/curves`` (docs/hdf5.md).
        probes: one row a training run, in the order in which they finished; the columns of ``/probes``.
        curvature: one row for each run whose end was looked at (``scan --curvature``); the columns of ``/curvature``.
        earlier: what was to be measured before the scan was extended, the oldest first.
        attrs: the conditions: versions, device, precision, times, ``status`` and the summary.
        path: the file; ``None`` for results in memory.
        written: whether a scan was writing the file when it was loaded, as far as its lock can tell.
    """

    def __init__(
        self,
        spec: str,
        curves: Block,
        probes: Block,
        curvature: Block,
        attrs: Mapping[str, Any],
        read_history: Callable[[slice], Block],
        read_weights: Callable[[int], dict[str, np.ndarray]],
        path: Path | None = None,
        written: bool = False,
    ) -> None:
        self.written = written
        self.spec = ScanSpec.from_json(spec)
        self.curves = _frame(CURVES, curves)
        self.probes = _frame(PROBES, probes)
        self.curvature = _frame(CURVATURE, curvature)
        self.attrs = dict(attrs)
        self.earlier = _earlier(self.spec, self.attrs.get(EXTENDED_FROM, "[]"))
        self.path = path
        self._read_history, self._read_weights = read_history, read_weights
        # Apart from the frame, which is the user's to change.
        self._first, self._count = probes["history_start"], probes["history_count"]

    @classmethod
    def from_memory(cls, store: MemoryStore) -> "Results":
        """The results that a ``MemoryStore`` holds now; what it is given later does not show."""
        history = store.block("history")

        def read(rows: slice) -> Block:
            return {name: values[rows] for name, values in history.items()}

        weights = {probe: dict(kept) for probe, kept in store.weights.items()}

        def read_weights(probe: int) -> dict[str, np.ndarray]:
            return weights.get(probe, {})

        blocks = store.block("curves"), store.block("probes"), store.block("curvature")
        return cls(store.spec, *blocks, store.attributes, read, read_weights)

    def history(self, probe: int) -> pd.DataFrame:
        """The training curve of one probe, read from the file when asked for.

        Args:
            probe: its index, ``probes["probe"]``.

        Returns:
            Columns ``step`` (int64), ``train_loss`` (float64, nats) and ``train_accuracy`` (float64, share),
            one row a check that was kept.

        Raises:
            UserError: there is no such probe, or the file is gone or has been replaced since it was loaded.
        """
        index = self._index(probe)
        rows = slice(int(self._first[index]), int(self._first[index] + self._count[index]))
        return _frame(_CURVE_COLUMNS, self._read_history(rows))

    def weights(self, probe: int) -> dict[str, np.ndarray]:
        """The parameters of one fitted probe at its end, where ``scan`` was asked to keep them.

        Args:
            probe: its index, ``probes["probe"]``.

        Returns:
            float64 arrays by name, as ``torch.nn.Module.load_state_dict`` takes them after ``torch.as_tensor``.

        Raises:
            UserError: there is no such probe, its weights were not kept, or the file is gone or has been replaced.
        """
        found = self._read_weights(self._index(probe))
        if not found:
            raise UserError("probe", probe, "its weights were not kept; a scan with save_weights keeps those that fit")
        return found

    def histories(self, probes: Sequence[int] | None = None) -> pd.DataFrame:
        """The training curves of some probes, or of all, one under the other, read from the file when asked for.

        Args:
            probes: their indices; None for all.

        Returns:
            Columns ``probe`` (int64) and those of ``history``.

        Raises:
            UserError: as ``history``.
        """
        indices = range(len(self._first)) if probes is None else [self._index(probe) for probe in probes]
        if not indices:
            return _frame((_PROBE, *_CURVE_COLUMNS), {c.name: np.empty(0) for c in (_PROBE, *_CURVE_COLUMNS)})
        first = min(int(self._first[i]) for i in indices)
        last = max(int(self._first[i] + self._count[i]) for i in indices)
        block = self._read_history(slice(first, last))
        rows = np.concatenate([np.arange(self._first[i], self._first[i] + self._count[i]) for i in indices]) - first
        probe = np.repeat(np.array(indices, dtype=np.int64), self._count[list(indices)])
        return _frame((_PROBE, *_CURVE_COLUMNS), {"probe": probe, **{name: v[rows] for name, v in block.items()}})

    def to_xarray(self, table: str = "curves") -> "xarray.Dataset":
        """A table as labelled arrays, with the description and units of each.

        Args:
            table: ``"curves"`` over ``variant``, ``"probes"`` over ``probe``, ``"history"`` (all training curves) over
                ``sample`` or ``"curvature"`` over ``row``.

        Raises:
            UserError: there is no such table, or xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise UserError("table", table, f"xarray is missing ({error}); pip install xarray") from None
        frame, columns = self.table(table)
        index = GROUPS[table][0]
        meaning = {
            column.name: {"long_name": column.description, "units": column.units} for column in (index, *columns)
        }
        arrays = {name: (index.name, frame[name].to_numpy(), meaning[name]) for name in frame if name != index.name}
        label = np.arange(len(frame))
        return xarray.Dataset(arrays, {index.name: (index.name, label, meaning[index.name])}, self.attrs)

    def to_dict(self, curves: pd.DataFrame | None = None) -> dict[str, Any]:
        """Spec, conditions and variants as plain values for JSON; NaN and infinity are ``None``.

        Args:
            curves: rows of ``self.curves`` to take, in their order; all by default.
        """
        specs = [json.loads(spec.to_json()) for spec in (*self.earlier, self.spec)]
        return {
            "file": None if self.path is None else str(self.path),
            "spec": specs[-1],
            "earlier": specs[:-1],
            "attributes": json_value(self.attrs),
            "probes": len(self.probes),
            "curves": json_value(self.curves if curves is None else curves),
        }

    def table(self, name: str) -> tuple[pd.DataFrame, tuple[Column, ...]]:
        """A table of the file and what its columns mean.

        Raises:
            UserError: there is no such table.
        """
        if name == "history":
            return self.histories(), (_PROBE, *_CURVE_COLUMNS)
        if name not in GROUPS:
            raise UserError("table", name, f"no such table; expected one of {', '.join(GROUPS)}")
        return getattr(self, name), GROUPS[name]

    def _index(self, probe: int) -> int:
        index = operator.index(probe)
        if not 0 <= index < len(self._first):
            known = f"0 to {len(self._first) - 1}" if len(self._first) else "none, there are no probes"
            raise UserError("probe", probe, f"no such probe; expected {known}")
        return index

    def __repr__(self) -> str:
        source = f" from {self.path}" if self.path is not None else ""
        return (
            f"<Results{source}: {len(self.curves)} variants, {len(self.probes)} probes, "
            f"status {self.attrs.get('status')}>"
        )


def load(path: str | os.PathLike[str]) -> Results:
    """The results in a file that a scan has written, or writes just now: all that was committed, also after a kill.

    Raises:
        UserError: there is no such file, it is not HDF5 or not of fasttrain, it is damaged, a newer fasttrain
            wrote it.

    What a file of an older schema lacks has the value that it had then: the default of its ``schema.Column``;
    ``budget`` and ``steps_budget`` below version 3 follow from ``steps``; and in one of version 1 ``lr_search="all"``.
    """
    path = Path(path)
    # The lock first: a scan that ends in between has written its last rows by the time they are read.
    written = being_written(path)
    with _Reader(path) as reader:
        attrs, status = reader.attrs, reader.attrs.get("status")
        probes = reader.table("probes", PROBES, growing=status == "running")
        curves = reader.table("curves", CURVES, growing=False)
        rows = reader.rows("history", HISTORY, growing=True)
        if wrong := _checked(probes, len(curves["variant"]), rows):
            raise UserError("file", path, f"is damaged: {wrong}, where there are {rows} rows of /history")
        curvature = reader.table("curvature", CURVATURE, growing=status == "running")
        spec = reader.text("spec")
        if reader.version == 1:
            # Its learning rates never raced, which is the default now.
            spec = json.dumps({"lr_search": "all", **json.loads(spec)})
        older = reader.version < 3

    def opened() -> "_Reader":
        return _Reader(path, {name: attrs.get(name) for name in ("spec_digest", "started")})

    def read(rows: slice) -> Block:
        with opened() as reader:
            return reader.block("history", _CURVE_COLUMNS, rows)

    def read_weights(probe: int) -> dict[str, np.ndarray]:
        with opened() as reader:
            return reader.weights(probe)

    try:
        if older:
            asked = ScanSpec.from_json(spec)
            probes["steps_budget"] = np.full(len(probes["n"]), asked.steps)
            curves["budget"] = np.full(len(curves["n_min"]), budget_text(asked), dtype=object)
        return Results(spec, curves, probes, curvature, attrs, read, read_weights, path, written)
    except (UserError, ValueError, TypeError, RecursionError) as error:
        raise UserError("file", path, f"its spec cannot be read ({error})") from None


class _Reader:
    """An open file; whatever goes wrong inside a ``with`` becomes a ``UserError`` that names the file."""

    def __init__(self, path: Path, same: Mapping[str, Any] | None = None) -> None:
        self._path, self._same = path, same or {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "_Reader":
        if not self._path.is_file():
            raise UserError("file", self._path, "is a directory" if self._path.is_dir() else "no such file")
        try:
            self._file = self._stack.enter_context(with_journal(self._path))
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError, MemoryError) as error:
            what = " ".join(str(error).split())
            raise UserError("file", self._path, f"is not an HDF5 file that can be read ({what})") from None
        try:
            held = {name: _plain(value) for name, value in self._file.attrs.items()}
            for name, kind in _ATTRIBUTES.items():
                if not isinstance(held.get(name, kind()), kind):
                    raise UserError("file", self._path, f"is damaged: attribute {name} has type {type(held[name])}")
            # What others have added may be of any type.
            own = {name: value for name, value in held.items() if isinstance(value, str | int | float)}
            self.attrs = {name: value for name, value in own.items() if name not in (COMMITS, FILE_ID)}
            version = self.attrs.get("schema_version")
            if not isinstance(version, int):
                raise UserError("file", self._path, "was not written by fasttrain (no schema_version)")
            self.version = version
            self._most_rows = _ROWS_A_BYTE * (self._path.stat().st_size + _LEAST_BYTES)
            if version > SCHEMA_VERSION:
                raise UserError(
                    "file",
                    self._path,
                    f"has schema version {version}; this fasttrain reads up to {SCHEMA_VERSION}, update it",
                )
            if any(self.attrs.get(name) != value for name, value in self._same.items()):
                raise UserError("file", self._path, "has been replaced since it was loaded; load it again")
        except BaseException as error:
            self.__exit__(type(error), error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._stack.close()
        # h5py reports damaged contents as any of these.
        damaged = (OSError, KeyError, RuntimeError, TypeError, ValueError, OverflowError, MemoryError)
        if isinstance(error, damaged) and not isinstance(error, UserError):
            raise UserError("file", self._path, f"is damaged ({' '.join(str(error).split())})") from None

    def text(self, name: str) -> str:
        """A scalar text."""
        data = self._data(name)
        if data.shape != () or not _fits(data.dtype, str):
            raise UserError("file", self._path, f"is damaged: /{name} is no text")
        return str(data.asstr()[()])

    def rows(self, group: str, columns: tuple[Column, ...], growing: bool) -> int:
        """The rows that all columns have; a kill may leave some columns of a growing group longer.

        None of a group that the file's version does not have.
        """
        written = [column for column in columns if not self._lacks(column)]
        shapes = {}
        for column in written:
            data = self._data(f"{group}/{column.name}")
            if not _fits(data.dtype, column.kind):
                raise UserError("file", self._path, f"is damaged: column /{group}/{column.name} has type {data.dtype}")
            shapes[column.name] = data.shape
        for name, shape in shapes.items():
            if len(shape) != 1 or not (growing or shape == shapes[columns[0].name]):
                raise UserError("file", self._path, f"is damaged: column /{group}/{name} has shape {shape}")
            # A few bytes may claim any number of rows, of which none was ever written.
            if shape[0] > self._most_rows:
                raise UserError("file", self._path, f"is damaged: column /{group}/{name} claims {shape[0]:,} rows")
        return int(min((shape[0] for shape in shapes.values()), default=0))

    def table(self, group: str, columns: tuple[Column, ...], growing: bool) -> Block:
        """All columns of a group."""
        return self.block(group, columns, slice(0, self.rows(group, columns, growing)))

    def block(self, group: str, columns: tuple[Column, ...], rows: slice) -> Block:
        """Some rows of some columns."""
        block = {}
        for column in columns:
            if self._lacks(column):
                dtype = object if column.default is None else column.dtype
                block[column.name] = np.full(max(rows.stop - rows.start, 0), column.default, dtype)
                continue
            data = self._data(f"{group}/{column.name}")
            values = data.asstr()[rows] if column.kind is str else data[rows]
            block[column.name] = values if column.kind is str else values.astype(column.dtype, copy=False)
        return block

    def _lacks(self, column: Column) -> bool:
        """Whether the file is of a version that does not have the column."""
        return self.version < column.since

    def weights(self, probe: int) -> dict[str, np.ndarray]:
        """The parameters of a probe by name; empty if they were not kept."""
        group = self._file.get(f"{WEIGHTS}/{probe}")
        if not isinstance(group, h5py.Group):
            return {}
        found, values = {}, 0
        for name in group:
            data = self._data(f"{WEIGHTS}/{probe}/{name}")
            values += data.size or 0
            if data.size is None or values > self._most_rows or data.dtype.kind != "f":
                what = (
                    f"claims {data.size:,} values" if data.size and data.dtype.kind == "f" else f"has type {data.dtype}"
                )
                raise UserError("file", self._path, f"is damaged: /{WEIGHTS}/{probe}/{name} {what}")
            found[name] = data[()].astype(np.float64, copy=False)
        return found

    def _data(self, name: str) -> h5py.Dataset:
        data = self._file.get(name)
        if not isinstance(data, h5py.Dataset):
            raise UserError("file", self._path, f"is damaged: /{name} is missing")
        return data


def _earlier(spec: ScanSpec, differences: str) -> tuple[ScanSpec, ...]:
    """The specs that a scan had before ``spec``, from what they have otherwise: a JSON list of objects."""
    found = json.loads(differences)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{EXTENDED_FROM} is no list of objects")
    return tuple(ScanSpec.from_json(json.dumps({**json.loads(spec.to_json()), **one})) for one in found)


def json_value(value: Any) -> Any:
    """A value as JSON has it: frames as lists of rows, records as objects, NaN and infinity as ``None``."""
    if isinstance(value, pd.DataFrame):
        return [json_value(row) for row in value.to_dict("records")]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: json_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): json_value(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [json_value(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fits(dtype: np.dtype, kind: type) -> bool:
    """Whether a data set may be a column of a kind: text of any length is kept apart from its row."""
    text = h5py.check_string_dtype(dtype)
    if kind is str:
        return text is not None and text.length is None
    return text is None and dtype.kind in "biuf" and dtype.itemsize <= 8


def _checked(probes: Block, variants: int, rows: int) -> str:
    """What is wrong with the rows of /probes; empty if nothing is.

    Args:
        probes: their columns.
        variants: of /curves.
        rows: of /history.
    """
    first, count = probes["history_start"], probes["history_count"]
    wrong = {
        "variant": (probes["variant"] < 0) | (probes["variant"] >= variants),
        "n": probes["n"] < 1,
        "outcome": ~np.isin(np.array(probes["outcome"], dtype=str), [str(one) for one in Outcome]),
        "seed": probes["seed"] < 0,
        # Not their sum: it may overflow.
        "history_start": (first < 0) | (count < 0) | (first > rows) | (count > rows - first),
    }
    for name, where in wrong.items():
        if where.any():
            row = int(np.flatnonzero(where)[0])
            return f"row {row} of /probes has {name} {str(probes[name][row])[:40]}"
    return ""


def _frame(columns: tuple[Column, ...], block: Block) -> pd.DataFrame:
    dtypes: dict[type, Any] = {int: np.int64, float: np.float64, bool: np.bool_, str: str}
    return pd.DataFrame({c.name: pd.Series(block[c.name], dtype=dtypes[c.kind]) for c in columns})


def _plain(value: Any) -> Any:
    """An attribute as a Python value."""
    return value.item() if isinstance(value, np.generic) else value
