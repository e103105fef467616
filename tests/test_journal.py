"""The journal: whole commits or none, one writer, and what a reader makes of a damaged one."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.errors import UserError
from fasttrain.journal import Journal, array_of, being_written, journal_path, read_commits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "emc.h5"


def commits(path: Path) -> list[int]:
    return [number for number, _ in read_commits(path) if number]


def test_what_is_appended_is_read_back(path):
    journal = Journal(path, fresh=True)
    values = np.array([1 / 3, np.nan, -np.inf, 5e-324])
    weights = np.arange(6.0).reshape(2, 3) / 7
    journal.append(1, [["write", "probes", 0, {"train_loss": values, "outcome": np.array(["fitted"], object)}]])
    journal.append(2, [["weights", 3, {"0.weight": weights}], ["attributes", {"status": "größe"}]])
    journal.close()
    (owner, (one, first), (two, second)) = read_commits(path)
    assert owner[0] == 0
    assert (one, two) == (1, 2)
    np.testing.assert_array_equal(np.array(first[0][3]["train_loss"]), values)
    assert first[0][3]["outcome"] == ["fitted"]
    np.testing.assert_array_equal(array_of(second[0][2]["0.weight"]), weights)
    assert second[1] == ["attributes", {"status": "größe"}]
    assert read_commits(path.with_name("other.h5")) == []


def test_a_line_cut_anywhere_is_no_commit_and_what_follows_is_none_either(path):
    journal = Journal(path, fresh=True)
    for number in (1, 2, 3):
        journal.append(number, [["truncate", "probes", number]])
    journal.close()
    whole = journal_path(path).read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole) + 1):
        journal_path(path).write_bytes(whole[:size])
        assert len(read_commits(path)) == sum(end <= size for end in ends)


@settings(deadline=None)  # a sync may take long
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_ends_the_journal_before_its_line(tmp_path_factory, place, change):
    path = tmp_path_factory.getbasetemp() / "changed.h5"
    journal = Journal(path, fresh=True)
    for number in (1, 2, 3):
        journal.append(number, [["truncate", "probes", number]])
    journal.close()
    contents = bytearray(journal_path(path).read_bytes())
    place %= len(contents)
    contents[place] ^= change
    journal_path(path).write_bytes(contents)
    whole = contents[:place].count(b"\n")
    assert [number for number, _ in read_commits(path)] == list(range(whole))


def test_a_journal_that_goes_on_drops_what_was_cut_short(path):
    journal = Journal(path, fresh=True)
    journal.append(1, [])
    journal.close()
    with open(journal_path(path), "ab") as file:
        file.write(b"0badc0de [2,[[")
    journal = Journal(path, fresh=False)
    assert [number for number, _ in journal.commits if number] == [1]
    journal.append(2, [])
    journal.close()
    assert commits(path) == [1, 2]


def test_a_full_disk_leaves_the_commits_before(path):
    """A limit on the size of files is a disk that is full in the middle of a line."""
    journal = Journal(path, fresh=True)
    journal.append(1, [["attributes", {"a": "x" * 100}]])
    size = journal_path(path).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))
        with pytest.raises(OSError, match="too large"):
            journal.append(2, [["attributes", {"a": "x" * 100}]])
        assert journal_path(path).stat().st_size == size
        assert commits(path) == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    journal.append(2, [])
    journal.close()
    assert commits(path) == [1, 2]


HOLD = """
import sys, time
from pathlib import Path
from fasttrain.journal import Journal
journal = Journal(Path(sys.argv[1]), fresh=True)
journal.append(1, [])
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_and_told_of_the_first(path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=f"process {holder.pid} on .* writes it"):
                Journal(path, fresh=True)
            assert commits(path) == [1]
            assert being_written(path)
        finally:
            holder.kill()
    assert not being_written(path)
    # Killed: the lock went with it, what it committed did not.
    journal = Journal(path, fresh=False)
    assert [number for number, _ in journal.commits if number] == [1]
    journal.close()


@pytest.mark.parametrize(("process", "host", "refused"), [(1, None, True), (2**22 + 1, None, False), (5, "far", True)])
def test_without_locks_the_owner_is_asked_for(path, monkeypatch, process, host, refused):
    journal = Journal(path, fresh=True)
    journal.close()
    monkeypatch.setattr(os, "getpid", lambda: process)
    if host:
        monkeypatch.setattr("socket.gethostname", lambda: host)
    journal = Journal(path, fresh=True)
    journal.close()
    monkeypatch.undo()

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    if refused:
        with pytest.raises(UserError, match=f"process {process} on "):
            Journal(path, fresh=False)
    else:
        Journal(path, fresh=False).close()


def test_removing_ends_the_lock_and_the_file(path):
    journal = Journal(path, fresh=True)
    journal.remove()
    assert not journal_path(path).exists()
    Journal(path, fresh=True).remove()


@pytest.mark.parametrize("text", ["[]", "7", "[1,2,3]", '["1",[]]', "[" * 5000, '{"a":1}'])
def test_a_line_with_a_good_checksum_and_other_contents_ends_the_journal(path, text):
    line = b"%08x %b\n" % (zlib.crc32(text.encode()), text.encode())
    good = json.dumps([1, []]).encode()
    journal_path(path).write_bytes(b"%08x %b\n" % (zlib.crc32(good), good) + line)
    assert commits(path) == [1]
