"""What a scan has committed, appended to a file that survives a kill, and the lock of whoever writes it.

``emc.h5.journal`` stands beside ``emc.h5`` while a scan writes it. Each line is one commit: a checksum, and in JSON its
number and its operations on the tables of the file. A line is synced to the disk before the commit counts; one that
was cut short fails its checksum, and reading ends there. docs/decisions/0009-crash-safety.md says how the two files
stay one.
"""

import base64
import contextlib
import errno
import fcntl
import json
import os
import socket
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.errors import UserError

SUFFIX = ".journal"

Operation = list[Any]
"""``["write", group, start, {column: values}]``, ``["weights", probe, {name: array}]``, ``["truncate", group, rows]``
or ``["attributes", {name: value}]``."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_LONGEST_OWNER = 4096


def journal_path(path: str | os.PathLike[str]) -> Path:
    """The journal that belongs to an HDF5 file."""
    path = Path(path)
    return path.parent / (path.name + SUFFIX)


class Journal:
    """The journal of a file, open and locked for writing.

    Args:
        path: of the HDF5 file.
        fresh: whether what it holds is dropped.
        of: if it is, which file it is of, by an attribute of that: a name may be given to another file.

    Attributes:
        commits: that it held when it was opened.
        of: which file it is of.
        new: whether there was nothing in it.

    Raises:
        UserError: another process writes the file.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, fresh: bool, of: str = "") -> None:
        self.path = journal_path(path)
        self._descriptor = _locked(self.path, path)
        if fresh:
            os.ftruncate(self._descriptor, 0)
        commits = list(parsed(_contents(self._descriptor)))
        self._size = commits[-1][0] if commits else 0
        self.commits = [(number, operations) for _, number, operations in commits]
        self.of = of if fresh else owned(self.commits)
        self.new = not self._size
        self._cut()
        if self.new:
            self._own()

    def append(self, number: int, operations: Sequence[Operation]) -> None:
        """Puts a commit on the disk; all of it or, where that raises, nothing.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        self._append(number, operations)

    def clear(self, of: str | None = None) -> None:
        """Drops all commits: they are in the HDF5 file now, or it is of another file from now on."""
        self.of = self.of if of is None else of
        self._size = 0
        self._cut()
        self._own()

    def _own(self) -> None:
        self._append(0, [["owner", {"host": socket.gethostname(), "process": os.getpid(), "of": self.of}]])

    def remove(self) -> None:
        """Drops the journal itself and the lock with it."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Releases the lock; what is committed stays. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, number: int, operations: Sequence[Operation]) -> None:
        line = line_of(number, operations)
        try:
            view = memoryview(line)
            at = self._size
            while view:
                done = os.pwrite(self._descriptor, view, at)
                view, at = view[done:], at + done
            os.fsync(self._descriptor)
        except BaseException:
            self._cut()
            raise
        self._size += len(line)

    def _cut(self) -> None:
        """Takes off what is behind the last whole commit; readers pass over it too."""
        os.ftruncate(self._descriptor, self._size)


def owned(commits: Sequence[tuple[int, list[Operation]]]) -> str:
    """Which file a journal is of; empty if it does not say."""
    for _, operations in commits[:1]:
        for operation in operations:
            match operation:
                case ["owner", {"of": str(of)}]:
                    return of
    return ""


def read_commits(path: str | os.PathLike[str]) -> list[tuple[int, list[Operation]]]:
    """The commits in the journal of an HDF5 file, by number; none where it has no journal.

    Raises:
        UserError: the journal cannot be read.
    """
    journal = journal_path(path)
    try:
        with open(journal, "rb") as file:
            found = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError("file", journal, f"cannot be read ({error.strerror})") from None
    return [(number, operations) for _, number, operations in parsed(found)]


def being_written(path: str | os.PathLike[str]) -> bool:
    """Whether a process writes an HDF5 file now, as far as locks can tell."""
    try:
        descriptor = os.open(journal_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def replace_file(temporary: Path, path: Path, contents: Iterable[bytes | memoryview], new: bool = False) -> None:
    """Writes a file whole or not at all: beside, synced, and then under its name.

    Args:
        temporary: beside it; whatever has this name is replaced, and it is gone afterwards.
        path: the file.
        contents: in parts.
        new: whether nothing may have its name.

    Raises:
        FileExistsError: something has.
        OSError: it cannot be written.
    """
    try:
        with open(temporary, "wb") as file:
            for part in contents:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if new:
            _new_name(temporary, path)
        else:
            os.replace(temporary, path)
        sync_folder(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _new_name(temporary: Path, path: Path) -> None:
    """Gives a file a name that nothing has.

    Raises:
        FileExistsError: something has it.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)


def sync_folder(path: Path) -> None:
    """Makes a new name in the folder of a path last, where the file system knows of that: some on networks do not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def line_of(number: int, operations: Sequence[Operation]) -> bytes:
    """A commit as a line of a journal."""
    text = json.dumps([number, operations], separators=(",", ":"), default=_plain).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _plain(value: Any) -> Any:
    """An array for JSON: numbers and text as they are, which keeps every bit of a float64."""
    if isinstance(value, np.ndarray):
        if value.ndim == 1:
            return value.tolist()
        values = np.ascontiguousarray(value, "<f8")
        return {"shape": values.shape, "float64": base64.b64encode(values.tobytes()).decode()}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} has no place in a journal")


def array_of(stored: Any) -> np.ndarray:
    """An array of parameters as it was given to a journal.

    Raises:
        ValueError: it is none.
    """
    if isinstance(stored, list):
        return np.array(stored, dtype=np.float64)
    if not isinstance(stored, dict) or stored.keys() != {"shape", "float64"}:
        raise ValueError("no array")
    return np.frombuffer(base64.b64decode(stored["float64"]), "<f8").reshape(stored["shape"])


def parsed(contents: bytes) -> Iterator[tuple[int, int, list[Operation]]]:
    """Of each whole commit where it ends, its number and its operations; up to the first that is not whole."""
    at = 0
    while (end := contents.find(b"\n", at)) >= 0:
        line = contents[at:end]
        at = end + 1
        if line[8:9] != b" " or line[:8] != b"%08x" % zlib.crc32(line[9:]):
            return
        try:
            number, operations = json.loads(line[9:])
        except (ValueError, TypeError, RecursionError):
            return
        if not isinstance(number, int) or not isinstance(operations, list):
            return
        yield at, number, operations


def _contents(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    parts, at = [], 0
    while at < size and (part := os.pread(descriptor, size - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _locked(journal: Path, path: Path) -> int:
    """The journal, open and locked; it is made if there is none."""
    while True:
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    _check_owner(descriptor, journal, path)
                    return descriptor
                raise UserError("out", path, f"{_owner(descriptor) or 'another process'} writes it") from None
            try:
                same = os.stat(journal).st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                same = False
            if same:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner finished and removed it in between: another round


def _check_owner(descriptor: int, journal: Path, path: Path) -> None:
    """Where the file system has no locks: refuses a journal whose owner may be alive."""
    told = _told(descriptor)
    if told is None:
        return
    if told["host"] == socket.gethostname():
        try:
            os.kill(told["process"], 0)
        except ProcessLookupError:
            return
        except PermissionError:
            pass
        if told["process"] == os.getpid():
            return
        raise UserError("out", path, f"process {told['process']} on {told['host']} writes it")
    raise UserError(
        "out",
        path,
        f"process {told['process']} on {told['host']} writes it, or was killed; this file system has no locks: if it "
        f"is gone, remove the first line of {journal}",
    )


def _owner(descriptor: int) -> str:
    told = _told(descriptor)
    return f"process {told['process']} on {told['host']}" if told else ""


def _told(descriptor: int) -> dict[str, Any] | None:
    """Who wrote the first line, if it says so."""
    first = os.pread(descriptor, _LONGEST_OWNER, 0).partition(b"\n")[0]
    for _, _, operations in parsed(first + b"\n"):
        for operation in operations:
            match operation:
                case ["owner", {"host": str(host), "process": int(process)}]:
                    return {"host": host, "process": process}
    return None
