"""The short form of the fault campaign (``python -m benchmarks faults``), and what its tally can see."""

import pandas as pd
import pytest

from benchmarks import faults


@pytest.mark.alone
def test_kills_and_full_disks_lose_nothing():
    tally = faults.run(kills=5, seed=7, say=lambda line: None)
    assert tally.good, tally.notes
    assert tally.faults["kill"] >= 5
    assert tally.faults["truncated file"] == 4
    assert tally.scans >= 1


def test_a_lost_probe_a_broken_file_and_another_end_are_seen(tmp_path):
    tally = faults.Tally()
    faults._inspect(tmp_path / "none.h5", 3, tally)
    assert (tally.lost, tally.good) == (3, False)
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    faults._inspect(tmp_path / "broken.h5", 0, tally)
    assert tally.unopened == 1
    frame = pd.DataFrame({"a": [1.0]})
    assert faults._equal([frame], [frame.copy()])
    assert not faults._equal([frame], [frame + 1e-16 + 1e-15])
