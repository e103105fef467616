import dataclasses
import io
import os
import re
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from fasttrain import ScanSpec
from fasttrain.cli.progress import Log, render, reporter, visible
from fasttrain.cli.tables import bytes_text, number_text, seconds_text
from fasttrain.records import Censored, Estimate, Race

NAN, INF = float("nan"), float("inf")


def estimate(variant, emc50=NAN, low=NAN, high=NAN, censored=Censored.NO, budget=False, finished=False, runs=0):
    return Estimate(variant, emc50, low, high, 4.0, 0.01, censored, budget, finished, runs)


def snapshot(estimates, spec=None, **changes):
    spec = spec or ScanSpec(widths=f"1:{len(estimates)}")
    fields = {
        "elapsed": 12.0,
        "seconds_left": 75.0,
        "probes_done": 37,
        "probes_committed": 35,
        "probes_running": 12,
        "variants_done": sum(e.finished for e in estimates),
        "variants": spec.variants(10),
        "params": tuple(100 + i for i in range(len(estimates))),
        "estimates": tuple(estimates),
        "model_steps": 5_000_000,
        "steps_per_second": 123_456.0,
        "slots": 32,
        "slots_used": 30,
        "occupancy": 0.937,
        "finished": False,
        "to_measure": 0,
        "measured": 0,
        **changes,
    }
    return SimpleNamespace(**fields)


THREE = (
    estimate(0, 662.4, 641.2, 683.0, finished=True, runs=41),
    estimate(1, 101.0, 80.0, INF, runs=8),
    estimate(2),
)


def shown(progress, height=24, width=80):
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, highlight=False)
    console.print(render(progress, height))
    return console.file.getvalue()


def test_snapshots_have_the_fields_of_progress():
    run = pytest.importorskip("fasttrain.run", exc_type=ModuleNotFoundError)
    fields = {field.name for field in dataclasses.fields(run.Progress)}
    assert fields == set(vars(snapshot(THREE)))


def test_live_table_shows_the_numbers():
    lines = shown(snapshot(THREE)).splitlines()
    assert lines[0].split() == ["width", "depth", "params", "EMC50", "runs", "state"]
    assert lines[1].split() == ["1", "1", "100", "662", "[641,", "683]", "41", "done"]
    assert lines[2].split() == ["2", "1", "101", "101", "[80,", "inf)", "8", "running"]
    assert lines[3].split() == ["3", "1", "102", "-", "0", "waiting"]
    assert lines[4] == "1/3 variants done, 37 runs done, 35 kept, 12 running, about 1 min 15 s left"
    assert lines[5] == "123 k model-steps/s, 30/32 slots in use, occupancy 94%, 12 s elapsed"
    assert len(lines) == 6


def test_live_table_shows_what_varies_and_why_a_variant_ended():
    spec = ScanSpec(widths=8, optimizer="sgd,adam", batch_size="full")
    above = estimate(0, low=1797.0, high=INF, censored=Censored.ABOVE, finished=True, runs=20)
    spent = estimate(1, 50.0, 20.0, 90.0, budget=True, finished=True, runs=96)
    lines = shown(snapshot((above, spent), spec)).splitlines()
    assert "optimizer" in lines[0]
    assert "batch" not in lines[0]
    assert lines[1].split() == ["8", "1", "sgd", "100", ">", "1797", "20", "done,", "above", "n-max"]
    assert lines[2].rstrip().endswith("done, runs used up")


@pytest.mark.parametrize("height", [1, 3, 5, 10, 24, 50])
@pytest.mark.parametrize("width", [30, 80, 200])
def test_hundreds_of_variants_fit_the_terminal(height, width):
    estimates = [estimate(i, 50.0, 40.0, 60.0, finished=i < 150, runs=9 if i < 156 else 0) for i in range(300)]
    lines = shown(snapshot(estimates), height=height, width=width).splitlines()
    assert len(lines) <= max(height, 3)
    assert max(len(line) for line in lines) <= width
    if height >= 10 and width >= 80:
        assert [line.split()[-1] for line in lines[1:7]] == ["running"] * 6
        room = height - 4
        assert lines[-3] == f"... and {300 - room} more ({156 - room} done, 144 waiting)"


def test_visible_keeps_the_order_where_everything_fits():
    states = ["waiting", "done", "running"]
    assert visible(states, 3) == ([0, 1, 2], [])
    assert visible(states, 2) == ([2, 1], [0])
    assert visible(states, -1) == ([], [2, 1, 0])


def test_log_reports_each_finished_variant_once_and_progress_every_few_seconds():
    log = Log(io.StringIO())
    assert log.lines(snapshot(THREE)) == [
        "[12 s] width 1, depth 1: EMC50 662 [641, 683], 41 runs",
        "[12 s] 1/3 variants done, 37 runs done, 35 kept, 12 running, about 1 min 15 s left; "
        "123 k model-steps/s, 30/32 slots in use, occupancy 94%",
    ]
    assert log.lines(snapshot(THREE, elapsed=14.0)) == []
    assert len(log.lines(snapshot(THREE, elapsed=17.1))) == 1
    done = (*THREE[:2], estimate(2, low=0.0, high=2.0, censored=Censored.BELOW, finished=True, runs=5))
    assert log.lines(snapshot(done, elapsed=18.0)) == ["[18 s] width 3, depth 1: EMC50 < 2, 5 runs, below n-min"]
    last = log.lines(snapshot(done, elapsed=18.5, finished=True))
    assert len(last) == 1
    assert "left" not in last[0]


def test_a_race_is_shown_until_its_winner_is_confirmed():
    spec = ScanSpec(widths=8, lr="0.001,0.01,0.1,1")
    dropped = dataclasses.replace(estimate(0, low=0.0, high=2.0, finished=True, runs=12), race=Race.DROPPED)
    dropped = dataclasses.replace(dropped, censored=Censored.BELOW)
    running = [dataclasses.replace(estimate(i, 50.0, 20.0, 90.0, runs=12), race=Race.RUNNING) for i in (1, 2, 3)]
    log = Log(io.StringIO())
    assert log.lines(snapshot((dropped, *running), spec))[0] == (
        "[12 s] width 8, depth 1, lr 0.001: EMC50 < 2, 12 runs, below n-min, lr dropped"
    )
    lines = shown(snapshot((dropped, *running), spec), width=120).splitlines()
    assert [line.rstrip().split("  ")[-1] for line in lines[1:5]] == ["done, below n-min, lr dropped"] + ["running"] * 3
    assert lines[5].startswith("1/4 variants done")
    won = dataclasses.replace(estimate(1), race=Race.WON)
    lost = [dataclasses.replace(one, race=Race.LOST, finished=True) for one in running[1:]]
    lines = shown(snapshot((dropped, won, *lost), spec), width=120).splitlines()
    assert lines[2].rstrip().endswith("running, lr won, confirming")
    assert lines[3].rstrip().endswith("done, lr lost")
    ended = [line.split(": ")[1] for line in log.lines(snapshot((dropped, won, *lost), spec))]
    assert ended == ["EMC50 50.0 [20.0, 90.0], 12 runs, lr lost"] * 2
    won = dataclasses.replace(won, emc50=49.0, emc50_low=45.0, emc50_high=53.0, finished=True, n_probes=40)
    assert log.lines(snapshot((dropped, won, *lost), spec)) == [
        "[12 s] width 8, depth 1, lr 0.01: EMC50 49.0 [45.0, 53.0], 40 runs, lr won"
    ]


def test_log_lines_of_a_long_scan_are_few():
    log = Log(io.StringIO())
    lines = [line for tick in range(1000) for line in log.lines(snapshot(THREE, elapsed=tick * 0.1))]
    assert len(lines) == 1 + 20


def test_without_a_terminal_there_are_no_escape_codes():
    stream = io.StringIO()
    with reporter(False, stream) as report:
        report(snapshot(THREE))
    assert stream.getvalue().count("\n") == 2
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_quiet_reports_nothing():
    stream = io.StringIO()
    with reporter(True, stream) as report:
        assert report is None
    assert stream.getvalue() == ""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_terminal_is_redrawn_and_left_clean(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "LINES", "NO_COLOR", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    master, slave = os.openpty()
    received = bytearray()

    def read():
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:
                return
            if not data:
                return
            received.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    threads = threading.active_count()
    with os.fdopen(slave, "w") as stream, reporter(False, stream) as report:
        # No thread of its own that could draw over what else is printed.
        assert threading.active_count() == threads
        report(snapshot(THREE))
    reader.join()
    os.close(master)
    text = received.decode()
    assert "662 [641, 683]" in text
    # Shown again at the end: the cursor. Erased: as many lines as were drawn.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert len(re.findall(r"\x1b\[1A\x1b\[2K", text[text.rindex("662") :])) >= 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (100_000, "1 d 04 h"),
        (INF, "unknown"),
        (NAN, "unknown"),
    ],
)
def test_seconds(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999.6, "1.00 k"), (12_345, "12.3 k"), (123_456, "123 k"), (4.56e6, "4.56 M")],
)
def test_numbers(number, text):
    assert number_text(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (10, "1 KiB"),
        (3 * 2**19 - 1, "1 MiB"),
        (700_000, "684 KiB"),
        (210 * 2**20, "210 MiB"),
        (1434 * 2**20, "1.4 GiB"),
    ],
)
def test_bytes(number, text):
    assert bytes_text(number) == text
