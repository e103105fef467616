"""Where results go while a scan runs: memory or an HDF5 file (docs/hdf5.md). The only writer of HDF5."""

import contextlib
import datetime
import hashlib
import io
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from fasttrain.errors import UserError
from fasttrain.journal import Journal, Operation, array_of, owned, read_commits, replace_file
from fasttrain.records import Curvature, Estimate, ProbeResult, Problem
from fasttrain.schema import (
    CURVATURE,
    CURVES,
    ESTIMATES,
    GROUPS,
    HISTORY,
    PROBES,
    SCHEMA_VERSION,
    WEIGHTS,
    Block,
    CurveRow,
    MeasuredRow,
    RunRow,
    array,
    block,
    joined,
    unknown,
)
from fasttrain.spec import ScanSpec

_SNAPSHOT_SECONDS = 10.0
"""Between two times that the HDF5 file is brought up to date; the commits in between are in the journal."""
_SNAPSHOT_SHARE = 0.02
"""Of the time, that this may take at most."""

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
        self._reserved = frozenset(RESERVED)
        curves = [CurveRow(spec, problem, unknown(problem.index)) for problem in problems]
        self._create(spec.to_json(), {**own, **self._checked(conditions)}, block(CURVES, curves))

    def append(self, results: Sequence[ProbeResult]) -> None:
        runs, start = [], self._rows["history"]
        for index, result in enumerate(results, self._rows["probes"]):
            runs.append(RunRow(index, self._problems[result.probe.variant], result, start, self._spec))
            start += len(result.history.step)
        if not runs:
            return
        # Cut short between the two, this leaves curves without a probe, never a probe without its curve.
        with self._whole():
            for run in runs:
                if run.result.weights is not None:
                    self._keep_weights(run.number, run.result.weights)
            self._write("history", self._rows["history"], joined(HISTORY, runs))
            self._write("probes", self._rows["probes"], block(PROBES, runs))
        self._rows |= {"probes": self._rows["probes"] + len(runs), "history": start}

    def put_curves(self, estimates: Sequence[Estimate]) -> None:
        by_variant = {estimate.variant: estimate for estimate in estimates}
        if len(estimates) != len(self._problems) or set(by_variant) != set(range(len(self._problems))):
            raise ValueError("expected one estimate for each variant")
        rows = [CurveRow(self._spec, problem, by_variant[problem.index]) for problem in self._problems]
        with self._whole():
            self._write("curves", 0, block(ESTIMATES, rows))

    def put_curvature(self, measured: Sequence[tuple[int, Curvature]]) -> None:
        first = self._rows["curvature"]
        rows = [MeasuredRow(number, *one) for number, one in enumerate(measured, first)]
        with self._whole():
            self._write("curvature", first, block(CURVATURE, rows))
        self._rows["curvature"] = first + len(rows)

    def finish(self, status: str, summary: Mapping[str, Attribute]) -> None:
        if status not in ("complete", "interrupted"):
            raise ValueError(f"status {status!r} is neither complete nor interrupted")
        with self._whole():
            # An append that an exception cut short has left rows that were never committed.
            for group, rows in self._rows.items():
                self._truncate(group, rows)
            self._set_attributes({**self._checked(summary), "ended": _now(), "status": status})

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """A commit: all that is written inside, or nothing."""
        try:
            yield
            self._flush()
        except BaseException:
            self._forget()
            raise

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

    def _forget(self) -> None:  # noqa: B027, only a store that holds writes back has something to drop
        """Drops what was written since the last flush, where that is possible."""


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
        return {c.name: array(c, self._lists[group][c.name]) for c in GROUPS[group]}

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
    """A store that writes an HDF5 file, which is whole at any moment: kills, full disks and power cuts included.

    What is committed goes to a journal beside it, synced to the disk; now and then a copy of the file takes all of that
    in, and the copy's name becomes the file's (docs/decisions/0009-crash-safety.md). Nobody ever writes in the file
    that a reader may have open. ``fasttrain.load`` takes the journal into account.

    Args:
        path: of the file; created by ``begin``.
        overwrite: whether an existing file is replaced, by ``begin``.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool) -> None:
        super().__init__()
        self.path = Path(path)
        self._overwrite = overwrite
        self._journal: Journal | None = None
        self._commit = 0
        self._operations: list[Operation] = []  # of the commit under way
        self._unsaved: list[list[Operation]] = []  # commits since the last snapshot
        self._next_snapshot = 0.0

    @classmethod
    def reopened(cls, path: str | os.PathLike[str]) -> "HDF5Store":
        """The store of a file that a scan has left unfinished, locked, with its journal taken in.

        ``continue_with`` goes on from there.

        Raises:
            UserError: another process writes the file, or it cannot be written.
        """
        store = cls(path, overwrite=True)
        try:
            store._journal = Journal(store.path, fresh=False)
            with h5py.File(store.path, "r", locking=False) as file:
                taken_in, name = _count(file.attrs.get(COMMITS, 0)), _name(file)
            if store._journal.of != name:
                if any(number > 0 for number, _ in store._journal.commits):
                    raise UserError("file", store._journal.path, "is of another file; move it away")
                store._journal.clear(name)
            with _image(store.path, store._journal.commits) as (file, commit):
                store._commit = commit
                store._rows = {group: len(file[f"{group}/{GROUPS[group][0].name}"]) for group in store._rows}
            store._unsaved = [operations for number, operations in store._journal.commits if number > taken_in]
            if store._unsaved:
                store._snapshot()
            else:
                store._journal.clear()
        except OSError as error:
            store.close()
            raise UserError("out", path, f"cannot be written ({_line(error)})") from None
        except BaseException:
            store.close()
            raise
        return store

    def continue_with(self, spec: ScanSpec, problems: Sequence[Problem]) -> None:
        """Go on with a scan, after ``reopened``: it is running again, and measures curvature from the start."""
        self._spec, self._problems = spec, tuple(problems)
        self._reserved = frozenset(RESERVED)
        with self._whole():
            self._rows["curvature"] = 0
            self._truncate("curvature", 0)
            self._set_attributes({"status": "running", "ended": ""})

    def leave(self) -> None:
        """Release the file and drop its journal: right after ``reopened`` all is in the file."""
        if self._journal is not None:
            self._journal.remove()
            self._journal = None

    def close(self) -> None:
        """Release the file; what was committed since the last snapshot stays in the journal. May be called again."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def finish(self, status: str, summary: Mapping[str, Attribute]) -> None:
        """See ``Store``. The journal is gone afterwards."""
        super().finish(status, summary)
        assert self._journal is not None
        self._snapshot()
        self._journal.remove()

    def _create(self, spec: str, attributes: Mapping[str, Attribute], curves: Block) -> None:
        check_output(self.path, self._overwrite)
        try:
            # What a journal holds of a file that is to be replaced is dropped when that has happened.
            self._journal = Journal(self.path, fresh=False)
            told = f"{attributes['spec_digest']} {attributes['started']}"
            name = hashlib.sha256(told.encode()).hexdigest()[:16]
            with self._replacing(fresh=True) as file:
                _set_attributes(file, {**attributes, COMMITS: 0, FILE_ID: name})
                file.create_dataset("spec", data=spec, dtype=h5py.string_dtype(), track_order=True)
                file["spec"].attrs["description"] = "the scan's specification, JSON"
                for group in GROUPS:
                    _create_group(file, group, len(next(iter(curves.values()))) if group == "curves" else None)
                _write(file, "curves", 0, curves)
            self._journal.clear(name)
            self._next_snapshot = time.monotonic() + _SNAPSHOT_SECONDS
        except OSError as error:
            self._give_up()
            raise UserError("out", self.path, f"cannot be created ({_line(error)})") from None
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Leaves no journal of a file that was never made, and that of another one as it was."""
        if self._journal is not None and self._journal.new:
            self.leave()
        self.close()

    def _write(self, group: str, start: int, block: Block) -> None:
        self._operations.append(["write", group, start, block])

    def _keep_weights(self, probe: int, weights: Mapping[str, np.ndarray]) -> None:
        self._operations.append(["weights", probe, dict(weights)])

    def _truncate(self, group: str, rows: int) -> None:
        self._operations.append(["truncate", group, rows])

    def _set_attributes(self, attributes: Mapping[str, Attribute]) -> None:
        self._operations.append(["attributes", dict(attributes)])

    def _forget(self) -> None:
        self._operations = []

    def _flush(self) -> None:
        assert self._journal is not None
        operations, self._operations = self._operations, []
        self._journal.append(self._commit + 1, operations)
        self._commit += 1
        self._unsaved.append(operations)
        if time.monotonic() >= self._next_snapshot:
            # A disk too full for a copy may have room for the journal yet.
            with contextlib.suppress(OSError):
                self._snapshot()

    def _snapshot(self) -> None:
        """Brings the file up to date.

        Raises:
            OSError: there is no room for a copy. The file is as it was, and the journal too.
        """
        assert self._journal is not None
        begin = time.monotonic()
        try:
            with self._replacing(fresh=False) as file:
                for operations in self._unsaved:
                    apply(file, operations)
                _set_attributes(file, {COMMITS: self._commit})
            self._unsaved = []
            self._journal.clear()
        finally:
            took = time.monotonic() - begin
            self._next_snapshot = begin + took + max(_SNAPSHOT_SECONDS, took / _SNAPSHOT_SHARE)

    @contextlib.contextmanager
    def _replacing(self, fresh: bool) -> Iterator[h5py.File]:
        """A new file, or a copy of the one there is, which takes its name once the block is left without an error."""
        # In memory: HDF5 on a disk that is full complains of each object that it cannot write, on standard error.
        image = io.BytesIO(b"" if fresh else self.path.read_bytes())
        # What HDF5 1.10 and netCDF-4 read.
        with h5py.File(image, "w" if fresh else "r+", libver=("earliest", "v110"), track_order=True) as file:
            yield file
        # Beside it under one name, since there is one writer: what a kill leaves is replaced by the next snapshot.
        temporary = self.path.with_name(f".{self.path.name[:200]}.next")
        replace_file(temporary, self.path, [image.getbuffer()], new=fresh and not self._overwrite)


COMMITS = "commits"
"""Attribute of the root: commits that the file has taken in; those of the journal beyond it are newer."""
FILE_ID = "file_id"
"""Attribute of the root: a name made of spec and start, by which the file and its journal know one another."""
RESERVED = ("schema_version", "title", "status", "started", "ended", "spec_digest", COMMITS, FILE_ID)


def apply(file: h5py.File, operations: Sequence[Operation]) -> None:
    """Does what a commit says on an open file.

    Raises:
        ValueError: a commit has something that no store writes.
    """
    for operation in operations:
        match operation:
            case ["write", str(group), int(start), dict(columns)] if group in GROUPS:
                _write(
                    file, group, start, {c.name: array(c, columns[c.name]) for c in GROUPS[group] if c.name in columns}
                )
            case ["weights", int(probe), dict(weights)]:
                _keep_weights(file, probe, weights)
            case ["truncate", str(group), int(rows)] if group in GROUPS:
                _truncate(file, group, rows)
            case ["attributes", dict(attributes)]:
                _set_attributes(file, attributes)
            case ["owner", _]:
                pass
            case _:
                raise ValueError(f"no operation: {str(operation)[:60]}")


@contextlib.contextmanager
def with_journal(path: Path) -> Iterator[h5py.File]:
    """A file with its journal taken in, to read: the file itself, or a copy where there is something to take in."""
    # The journal first: the file is at least as new then, and what it has already is passed over.
    commits = read_commits(path)
    with _image(path, commits) as (file, _):
        yield file


@contextlib.contextmanager
def _image(path: Path, commits: Sequence[tuple[int, list[Operation]]]) -> Iterator[tuple[h5py.File, int]]:
    with h5py.File(path, "r", locking=False) as file:
        done = _count(file.attrs.get(COMMITS, 0))
        own = owned(commits) == _name(file)  # not that of a file that had the name before
        newer = [(number, operations) for number, operations in commits if own and number > done]
        if not newer:
            yield file, done
            return
    with io.BytesIO(path.read_bytes()) as image, h5py.File(image, "r+") as file:
        done = _count(file.attrs.get(COMMITS, 0))
        for number, operations in newer:
            if number == done + 1:
                apply(file, operations)
                done = number
        yield file, done


def _name(file: h5py.File) -> str:
    value = file.attrs.get(FILE_ID, "")
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return int(value) if isinstance(value, (int, np.integer)) else 0


def _create_group(file: h5py.File, group: str, rows: int | None) -> None:
    """A group of empty columns; ``rows`` is their length for ever, ``None`` lets them grow."""
    chunks = {"probes": (256,), "history": (1024,), "curvature": (64,)}.get(group)
    parent = file.create_group(group, track_order=True)
    columns = {}
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


def _write(file: h5py.File, group: str, start: int, block: Block) -> None:
    for name, values in block.items():
        data = file[f"{group}/{name}"]
        if not 0 <= start <= data.shape[0]:
            raise ValueError(f"rows of /{group} from {start} on, where there are {data.shape[0]}")
        if data.shape[0] < start + len(values):
            data.resize((start + len(values),))
        if len(values):
            data[start : start + len(values)] = values


def _keep_weights(file: h5py.File, probe: int, weights: Mapping[str, Any]) -> None:
    name = f"{WEIGHTS}/{probe}"
    if name in file:  # of an append that was cut short
        del file[name]
    group = file.create_group(name, track_order=True)
    for parameter, values in weights.items():
        stored = values if isinstance(values, np.ndarray) else array_of(values)
        group.create_dataset(parameter, data=stored, dtype="<f8", track_order=True)


def _truncate(file: h5py.File, group: str, rows: int) -> None:
    for data in file[group].values():
        if data.shape[0] != rows:
            data.resize((rows,))


def _set_attributes(file: h5py.File, attributes: Mapping[str, Attribute]) -> None:
    for name, value in attributes.items():
        text = isinstance(value, str)
        file.attrs.modify(name, np.array(value, dtype=h5py.string_dtype() if text else None))


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


def write_whole(path: Path, contents: bytes | memoryview) -> None:
    """Writes a file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        replace_file(path.with_name(f".{path.name[:200]}.next"), path, [contents])
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
