"""Runs in processes of their own: the same bits, and nothing left behind when one of them dies."""

import os
import signal
import socket
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np
import pandas as pd
import pytest
import torch

import fasttrain
from fasttrain import ScanSpec
from fasttrain import prepare as module
from fasttrain.backends import apart
from fasttrain.backends.apart import ApartBackend, Processes
from fasttrain.backends.base import Run, Setting
from fasttrain.records import Probe, Problem
from fasttrain.schema import TIMING_COLUMNS

SMALL = ScanSpec(
    arch=("cnn", "vit"),
    widths=(4,),
    heads=2,
    labels=("true",),
    steps=40,
    check_every=10,
    n_max=30,
    max_probes=6,
    seed=3,
)


def compared(results: fasttrain.Results) -> pd.DataFrame:
    return results.probes.drop(columns=[*TIMING_COLUMNS, "probe", "history_start"]).sort_values(
        ["variant", "n", "seed"], ignore_index=True
    )


def kept(results: fasttrain.Results) -> dict[tuple[int, ...], dict[str, np.ndarray]]:
    fitted = results.probes[results.probes["outcome"] == "fitted"]
    return {(row.variant, row.n, row.seed): results.weights(row.probe) for row in fitted.itertuples()}


def test_processes_give_the_bits_of_threads(monkeypatch):
    """Results, held-out accuracy and weights; with two states of a bucket side by side."""
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr("fasttrain.trainer._FILLED", 1)
    here = fasttrain.scan(SMALL, save_weights=True)
    assert not module.prepare(SMALL).apart
    monkeypatch.setattr(module, "_APART_STEPS", 0)
    assert len(module.prepare(SMALL).apart) == 2
    there = fasttrain.scan(SMALL, save_weights=True)
    assert set(here.probes["outcome"]) >= {"fitted", "out_of_budget"}
    assert here.probes["test_accuracy"].notna().any()
    pd.testing.assert_frame_equal(compared(here), compared(there), check_exact=True)
    pd.testing.assert_frame_equal(here.curves, there.curves, check_exact=True)
    one, other = kept(here), kept(there)
    assert one.keys() == other.keys()
    for probe, weights in one.items():
        for name, values in weights.items():
            np.testing.assert_array_equal(values, other[probe][name])
    assert there.attrs["model_steps"] == here.attrs["model_steps"]
    assert there.attrs["step_seconds"] > 0


@pytest.mark.parametrize(
    ("changed", "apart"),
    [
        ({}, 2),
        ({"steps": 10}, 0),  # too little work
        ({"arch": ("mlp",), "labels": ("random",)}, 0),
        ({"arch": ("my_models:plain_cnn",), "labels": ("random",)}, 0),  # may not be found in another process
        ({"backend": "loop"}, 0),
    ],
)
def test_what_trains_apart(monkeypatch, changed, apart):
    monkeypatch.setattr(module, "cores", lambda: 2)
    spec = replace(SMALL, **{"steps": 10_000, "max_probes": 96, **changed})
    assert len(module.prepare(spec).apart) == apart
    monkeypatch.setattr(module, "cores", lambda: 1)
    assert not module.prepare(spec).apart


def probes_of(count: int) -> tuple[Setting, list[Run]]:
    spec = ScanSpec(arch=("cnn",), widths=(4,), steps=10_000, seed=3)
    (variant,) = spec.variants(10)
    setting = Setting(spec, 64, torch.device("cpu"), torch.float32, (1, 8, 8))
    problem = Problem(0, variant, 1, 1, 1797)
    return setting, [Run.of(setting, problem, Probe(0, 300, k)) for k in range(count)]


def test_a_process_that_dies_is_named():
    setting, runs = probes_of(2)
    processes = Processes(1)
    try:
        backend = ApartBackend("vmap", setting, runs[0].problem.variant, processes)
        state = backend.init(runs)
        assert backend.run(state, 2).model_steps == 4
        assert state.clock == 2
        backend._worker._process.send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"a worker process ended \(status -9\)"):
            backend.run(state, 4)
    finally:
        processes.close()


def test_what_fails_there_is_told_here():
    setting, runs = probes_of(2)
    processes = Processes(1)
    try:
        backend = ApartBackend("no such backend", setting, runs[0].problem.variant, processes)
        with pytest.raises(RuntimeError, match=r"in a worker process: (.|\n)*no such backend"):
            backend.run(backend.init(runs), 2)
    finally:
        processes.close()


def test_no_process_outlives_its_scan(monkeypatch):
    """Also where the scan is stopped in the middle of a turn."""
    monkeypatch.setattr(module, "cores", lambda: 2)
    monkeypatch.setattr(module, "_APART_STEPS", 0)
    started: list[int] = []
    original = module.Processes.next

    def watched(self):
        worker = original(self)
        started.append(worker._process.pid)
        return worker

    monkeypatch.setattr(module.Processes, "next", watched)
    begin = time.perf_counter()

    def stop(progress: fasttrain.Progress) -> None:
        if progress.model_steps or time.perf_counter() - begin > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fasttrain.scan(ScanSpec(arch=("cnn",), widths=(4,), steps=10**6, check_every=1000), on_progress=stop)
    assert started
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_want_of_memory_in_a_process_is_told_as_such(monkeypatch):
    """And what the process held of the state is gone; another error is another one."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(apart.signal, "signal", lambda *_: None)  # the server runs in a thread here
    forgotten = []
    monkeypatch.setattr(apart._Held, "forget", lambda self, number: forgotten.append(number))
    errors = iter([MemoryError("Unable to allocate 8 TiB"), RuntimeError("can't allocate memory"), ValueError("no")])

    def fails(self, *_):
        raise next(errors)

    monkeypatch.setattr(apart._Held, "run", fails)
    threads = torch.get_num_threads()
    server = threading.Thread(target=apart.serve, args=(theirs.detach(),))
    server.start()
    worker = apart._Worker.__new__(apart._Worker)
    worker._connection, worker._one = Connection(ours.detach()), threading.Lock()
    for number, expected in ((3, MemoryError), (4, MemoryError), (5, RuntimeError)):
        with pytest.raises(expected, match="in a worker process"):
            worker.ask(("run", None, number, [], 0))
    worker._connection.close()
    server.join()
    torch.set_num_threads(threads)
    assert forgotten == [3, 4, 5]
