"""Scans that are killed, run out of disk or are damaged at random moments: what is lost, and whether they end the same.

Each scan runs in a forked process that says, over a pipe, how many runs are kept. What it said before it died must be
in the file that is found, which must open; and once the scan has been resumed to its end, all must be as in an unbroken
one.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

import fasttrain
from fasttrain import ScanSpec
from fasttrain import run as run_module
from fasttrain import store as store_module
from fasttrain.journal import journal_path
from fasttrain.schema import TIMING_COLUMNS

SPECS = (
    ScanSpec(widths=(3, 5), data="gaussian:8", classes=2, steps=400, check_every=20, max_probes=24, seed=1),
    ScanSpec(
        widths=(4,), data="gaussian:8", classes=2, steps=300, check_every=20, max_probes=24, lr=(0.003, 0.03), seed=2
    ),
    ScanSpec(widths=(4,), data="gaussian:8", classes=2, steps=300, search="paper", seeds=8, seed=3),
)
"""Short and long probes, a race with its confirmation, and ladders."""
_LONGEST = 120.0  # seconds, of one part of a scan


@dataclass(slots=True)
class Tally:
    """What came of all faults.

    Attributes:
        faults: how many there were, by kind.
        scans: that were brought to their end.
        lost: probes that were said to be kept and were not found.
        unopened: files that did not open after a fault, in h5py, fasttrain or h5dump.
        dumped: that h5dump was asked to print.
        different: scans that did not end as an unbroken one.
        notes: what was wrong, a line each.
    """

    faults: Counter[str] = field(default_factory=Counter)
    scans: int = 0
    lost: int = 0
    unopened: int = 0
    dumped: int = 0
    different: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing was lost, broken or different."""
        return not (self.lost or self.unopened or self.different)


def run(kills: int, seed: int, say: Callable[[str], None] = print) -> Tally:
    """Faults until so many scans were killed, and with them full disks in a fifth of the cases.

    Args:
        kills: SIGKILLs at random moments.
        seed: of the moments.
        say: told how it gets on.
    """
    rng = random.Random(seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as name, _fast_snapshots():
        folder = Path(name)
        unbroken = [_frames(fasttrain.scan(spec)) for spec in SPECS]
        while tally.faults["kill"] < kills:
            number = tally.scans % len(SPECS)
            path = folder / f"{tally.scans}.h5"
            _one(SPECS[number], path, rng, tally, kills)
            if not _equal(_frames(fasttrain.load(path)), unbroken[number]):
                tally.different += 1
                tally.notes.append(f"scan {tally.scans} of spec {number} ended otherwise")
            if list(folder.glob(f"*{path.name}?*")):
                tally.notes.append(f"left behind: {sorted(p.name for p in folder.iterdir())}")
                tally.different += 1
            tally.scans += 1
            path.unlink()
            if tally.scans % 5 == 0:
                say(f"{tally.scans} scans, {dict(tally.faults)}, {tally.lost} lost, {tally.unopened} unopened")
        _damages(folder, tally)
    return tally


@contextlib.contextmanager
def _fast_snapshots() -> Iterator[None]:
    """Commits and snapshots so often that faults meet all of their moments."""
    kept = store_module._SNAPSHOT_SECONDS, store_module._SNAPSHOT_SHARE, run_module._COMMIT_SECONDS
    report = run_module._REPORT_SECONDS
    store_module._SNAPSHOT_SECONDS, store_module._SNAPSHOT_SHARE, run_module._COMMIT_SECONDS = 0.02, 0.5, 0.0
    run_module._REPORT_SECONDS = 0.0
    try:
        yield
    finally:
        store_module._SNAPSHOT_SECONDS, store_module._SNAPSHOT_SHARE, run_module._COMMIT_SECONDS = kept
        run_module._REPORT_SECONDS = report


def _one(spec: ScanSpec, path: Path, rng: random.Random, tally: Tally, kills: int) -> None:
    """A scan with faults, until it is complete."""
    while True:
        enough = tally.faults["kill"] >= kills
        # One part in five goes on to the end of its scan, so that there are many scans.
        kind = "none" if enough else rng.choices(["kill", "full disk", "none"], [7, 1, 2])[0]
        limit = rng.randrange(20_000, 400_000) if kind == "full disk" else None
        pid, reading = _start(spec, path, limit)
        # Kills are spread over the start, the work and the end of a part of a scan, which takes about a second.
        moment = time.monotonic() + (rng.uniform(0.0, 1.2) if kind == "kill" else _LONGEST)
        said, status = _watch(pid, reading, moment)
        if os.WIFSIGNALED(status):
            tally.faults["kill"] += 1
        elif os.WEXITSTATUS(status) == 3:
            tally.faults["full disk"] += 1
        elif os.WEXITSTATUS(status) == 0:
            return
        else:
            raise RuntimeError(f"a scan ended with status {os.WEXITSTATUS(status)}")
        _inspect(path, said, tally)


def _start(spec: ScanSpec, path: Path, limit: int | None) -> tuple[int, int]:
    """A process that scans, or goes on where there is a file; its number, and where it says what is kept."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        os.close(reading)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        def tell(progress: "fasttrain.Progress") -> None:
            os.write(writing, progress.probes_committed.to_bytes(8, "little"))

        if path.exists():
            fasttrain.resume(path, on_progress=tell)
        else:
            fasttrain.scan(spec, out=path, on_progress=tell)
        os._exit(0)
    except OSError:
        os._exit(3)
    except fasttrain.UserError as error:
        # A disk that is full before the first byte of the file.
        full = "too large" in str(error) or "cannot be" in str(error)
        if not full:
            traceback.print_exc()
        os._exit(3 if full else 4)
    except BaseException:
        traceback.print_exc()
        os._exit(4)


def _watch(pid: int, reading: int, moment: float) -> tuple[int, int]:
    """Reads what a process says is kept until it ends, or is killed at a moment: the last number, and its status."""
    said = 0
    os.set_blocking(reading, False)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(reading, 8192):
                said = int.from_bytes(data[len(data) // 8 * 8 - 8 : len(data) // 8 * 8], "little")
        if ended:
            os.close(reading)
            return said, status
        if time.monotonic() >= moment:
            os.kill(pid, signal.SIGKILL)
            moment = float("inf")
        time.sleep(0.002)


def _inspect(path: Path, said: int, tally: Tally) -> None:
    """What a fault has left."""
    if not path.exists():
        if said:
            tally.lost += said
            tally.notes.append(f"{said} kept, and no file")
        return
    try:
        with h5py.File(path) as file:
            snapshot = len(file["probes/n"])
        if dump := shutil.which("h5dump"):
            tally.dumped += 1
            subprocess.run([dump, str(path)], check=True, capture_output=True)
        found = len(fasttrain.load(path).probes)
    except (OSError, KeyError, fasttrain.UserError, subprocess.CalledProcessError) as error:
        tally.unopened += 1
        tally.notes.append(str(error))
        return
    if not said <= found or snapshot > found:
        tally.lost += max(said - found, 1)
        tally.notes.append(f"said {said}, found {found}, snapshot {snapshot}")


def _damages(folder: Path, tally: Tally) -> None:
    """Faults that are no kills: each must end with one line, and leave what was there."""
    path = folder / "damaged.h5"
    with contextlib.suppress(KeyboardInterrupt):
        fasttrain.scan(SPECS[0], out=path, on_progress=_stop_at(10))
    whole = path.read_bytes()

    def refused(kind: str, call: Callable[[], object], what: str) -> None:
        before = path.read_bytes()
        tally.faults[kind] += 1
        try:
            call()
        except fasttrain.UserError as error:
            if what in str(error) and path.read_bytes() == before and "\n" not in str(error):
                return
            tally.notes.append(f"{kind}: {error}")
        else:
            tally.notes.append(f"{kind}: no error")
        tally.different += 1

    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("truncated file", lambda: fasttrain.resume(path), str(path))
    path.write_bytes(whole)
    # A folder in which nobody may write, root included.
    refused("read-only folder", lambda: fasttrain.scan(SPECS[0], out="/proc/emc.h5"), "/proc/emc.h5")
    # A lock file of a process that is gone, with half a line at its end.
    journal_path(path).write_bytes(b'deadbeef [0,[["owner",{"host":"gone","process":1}]]]\nhalf')
    tally.faults["stale lock"] += 1
    fasttrain.resume(path)
    path.unlink()


def _stop_at(runs: int) -> "Callable[[fasttrain.Progress], None]":
    def stop(progress: "fasttrain.Progress") -> None:
        if progress.probes_done >= runs:
            raise KeyboardInterrupt

    return stop


def _frames(results: "fasttrain.Results") -> list[pd.DataFrame]:
    """All that must not differ."""
    probes = results.probes.drop(columns=[*TIMING_COLUMNS, "history_start", "probe"])
    order = np.lexsort((probes["seed"], probes["n"], probes["variant"]))
    histories = pd.concat([results.history(int(results.probes["probe"].iloc[i])) for i in order], ignore_index=True)
    return [probes.iloc[order].reset_index(drop=True), results.curves, histories]


def _equal(found: list[pd.DataFrame], wanted: list[pd.DataFrame]) -> bool:
    return all(one.equals(other) for one, other in zip(found, wanted, strict=True))


def main(kills: int, seed: int) -> tuple[dict[str, object], bool]:
    """The campaign: its figures, printed too, and whether nothing was lost, broken or different."""
    begin = time.monotonic()
    tally = run(kills, seed)
    facts: dict[str, object] = {
        **{f"faults_{kind.replace(' ', '_')}": number for kind, number in sorted(tally.faults.items())},
        "scans": tally.scans,
        "probes_lost": tally.lost,
        "files_that_did_not_open": tally.unopened,
        "files_printed_by_h5dump": tally.dumped,
        "scans_that_ended_otherwise": tally.different,
        "seconds": round(time.monotonic() - begin, 1),
    }
    for name, value in facts.items():
        print(f"{name}: {value}")
    for note in tally.notes:
        print(note, file=sys.stderr)
    return facts, tally.good
