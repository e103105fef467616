"""The backends on a CUDA device (make test-gpu)."""

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Bench
from planted import plant

from fasttrain import ScanSpec, scan
from fasttrain.backends import together
from fasttrain.kernels import fused
from fasttrain.machine import keeps_models_apart

pytestmark = pytest.mark.gpu
NS = [5, 40, 150, 90, 11, 300]
WIDTHS = (9, 1, 16, 3)
DRIVERS = pytest.mark.parametrize("whole", [False, True], ids=["stages", "whole"])


def made(backend: str, dtype=torch.float64, whole: bool | None = None, device: str = "cuda:0", **fields) -> Bench:
    """A bench; for triton, with one driver for all shapes where ``whole`` says so."""
    fields = {"widths": 9, "batch_size": 16, "check_every": 10_000, **fields}
    bench = Bench(backend, NS, dtype, device=device, **fields)
    if backend == "triton":
        bench.backend = type(bench.backend)(bench.setting, together("triton", bench.variants[0]))
        if whole is not None:
            bench.backend._configuration = dataclasses.replace(bench.backend._configuration, whole=whole)
    return bench


def finals(bench: Bench, steps: int, which=tuple(range(6))) -> list[np.ndarray]:
    state = bench.backend.init(bench.runs(which))
    bench.backend.run(state, steps)
    return [bench.parameters(state, position) for position in range(len(which))]


CASES = [
    {"optimizer": "sgd"},
    {"optimizer": "adam", "depths": 2, "activation": "gelu"},
    {"optimizer": "adam", "depths": 0},
    {"optimizer": "sgd", "depths": 3, "activation": "tanh", "widths": 70},
    {"optimizer": "sgd", "classes": 60, "widths": 33},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
@pytest.mark.parametrize("backend", ["vmap", "triton"])
def test_float64_parameters_are_the_cpu_oracles(backend, fields):
    """To what four units of rounding in the inputs do to the oracle itself, as on the CPU."""
    truth = finals(made("loop", device="cpu", **fields), 200)
    nudged = made("loop", device="cpu", **fields)
    runs = nudged.runs(range(len(NS)))
    for run in runs:
        run.task = type(run.task)(run.task.pool * (1 + 4 * 2.0**-52), run.task.rows, run.task.y)
    state = nudged.backend.init(runs)
    nudged.backend.run(state, 200)
    for whole in (False, True) if backend == "triton" else (None,):
        own = finals(made(backend, whole=whole, **fields), 200)
        for k in range(len(NS)):
            size = np.abs(truth[k]).max()
            moved = np.abs(nudged.parameters(state, k) - truth[k]).max() / size
            assert np.abs(own[k] - truth[k]).max() / size <= 30 * moved + 256 * 2.0**-52
            assert moved < 1e-8


@DRIVERS
@pytest.mark.parametrize("precision", ["float32", "bf16x3", "tf32", "bf16"])
def test_float32_losses_err_as_much_as_their_products(precision, whole):
    """Against the float64 oracle over 20 steps: float32 as its oracle does, the others by their unit roundoff."""
    truth, own, oracle = [], [], []
    for kept, backend, dtype, fields in (
        (truth, "loop", torch.float64, {"device": "cpu"}),
        (oracle, "loop", torch.float32, {"device": "cpu"}),
        (own, "triton", torch.float32, {"precision": precision, "whole": whole}),
    ):
        bench = made(backend, dtype, optimizer="sgd", lr=0.05, **fields)
        state = bench.backend.init(bench.runs(range(len(NS))))
        for step in range(1, 21):
            bench.backend.run(state, step)
            kept.append([run.batch_loss for run in state.runs])
    error, plain = (np.sqrt(np.mean((np.array(x) - np.array(truth)) ** 2)) for x in (own, oracle))
    unit = {"float32": 0.0, "bf16x3": 2.0**-16, "tf32": 2.0**-10, "bf16": 2.0**-7}[precision]
    assert error <= 4 * plain + 4 * unit
    if precision != "float32":
        assert error > plain  # it is not float32 that ran


@pytest.mark.parametrize(("width", "batch_size"), [(1, 7), (5, 64), (17, "full")])
def test_company_changes_no_bit_of_vmap_where_products_keep_models_apart(width, batch_size):
    """Decision 0002: where this GPU's library does not keep them apart, company changes the rounding alone."""
    fields = {"widths": width, "batch_size": batch_size}
    bench, exact = made("vmap", torch.float32, **fields), made("loop", device="cpu", **fields)
    whole, some = finals(bench, 30), finals(bench, 30, [3, 0])
    truth = finals(exact, 30)
    apart = keeps_models_apart(torch.device("cuda:0"))
    for position, k in enumerate([3, 0]):
        rounding = np.abs(whole[k] - truth[k]).max()
        assert np.abs(some[position] - whole[k]).max() <= (0.0 if apart else 4 * rounding)


def test_a_scan_with_vmap_says_whether_company_changes_bits():
    apart = keeps_models_apart(torch.device("cuda:0"))
    spec = ScanSpec(widths=3, steps=200, max_probes=4, n_max=20, device="cuda", backend="vmap")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = scan(spec)
    assert any("gives a model other bits in other company" in str(one.message) for one in caught) == (not apart)
    assert results.attrs["bitwise_independent"] == int(apart)


@DRIVERS
@pytest.mark.parametrize("precision", ["float32", "bf16x3", "tf32", "bf16"])
def test_company_order_and_slot_change_no_bit_of_triton(precision, whole):
    bench = made("triton", torch.float32, whole, precision=precision, widths=WIDTHS, check_every=10)
    expected = finals(bench, 30)
    assert all(np.isfinite(e).all() for e in expected)
    for company in ([3], [5, 3], [2, 3, 1, 0]):
        for position, k in enumerate(company):
            np.testing.assert_array_equal(finals(bench, 30, company)[position], expected[k])
    state = bench.backend.init(bench.runs([0, 4, 1]))
    bench.backend.run(state, 10)
    state = bench.backend.insert(bench.backend.select(state, [2, 0]), bench.runs([3, 5]))
    bench.backend.run(state, 40)
    for position, k in ((2, 3), (3, 5)):
        np.testing.assert_array_equal(bench.parameters(state, position), expected[k])


@DRIVERS
def test_runs_of_triton_go_on_from_where_they_were(whole):
    """What a checkpoint keeps of runs, taken in by another state in other company."""
    bench = made("triton", torch.float32, whole, widths=WIDTHS, check_every=10)
    expected = finals(bench, 30)
    state = bench.backend.init(bench.runs([0, 1]))
    bench.backend.run(state, 13)
    saved = dict(enumerate(bench.backend.saved(state)))
    other = made("triton", torch.float32, whole, widths=WIDTHS, check_every=10)
    state = other.backend.insert(other.backend.init(other.runs([1], saved)), other.runs([2, 0], saved))
    other.backend.run(state, 17)
    for position, k in ((0, 1), (2, 0)):
        np.testing.assert_array_equal(other.parameters(state, position), expected[k])


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_the_drivers_are_equal_bit_for_bit(fields):
    for a, b in zip(
        *(finals(made("triton", torch.float32, whole, **fields), 300) for whole in (False, True)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@DRIVERS
def test_nothing_waits_for_the_device_inside_of_a_block_of_steps(whole):
    bench = made("triton", torch.float32, whole, check_every=10)
    state = bench.backend.init(bench.runs(range(len(NS))))
    state.models.run(20)  # compiles and records
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.models.run(20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_a_barrier_taken_away_is_noticed(tmp_path, monkeypatch):
    """Without its barriers a program reads weights and activations before they are there."""
    sound = finals(made("triton", torch.float32, True, widths=16, depths=3), 300)
    monkeypatch.setattr(fused, "drivers", plant(tmp_path, "no_barrier", "tl.debug_barrier()", "pass"))
    faulty = finals(made("triton", torch.float32, True, widths=16, depths=3), 300)
    assert any(not np.array_equal(a, b) for a, b in zip(sound, faulty, strict=True))


def test_a_scan_takes_the_fused_kernels_and_says_so(tmp_path):
    spec = ScanSpec(widths=(2, 4, 8), steps=2000, max_probes=24, device="cuda")
    results = scan(spec, out=tmp_path / "cuda.h5")
    attrs = results.attrs
    assert attrs["variant_backends"] == "triton,triton,triton"
    assert attrs["launches"] > 0
    again = scan(spec)
    columns = ["variant", "n", "seed", "outcome", "steps", "train_loss"]
    tables = [r.probes[columns].sort_values(["variant", "n", "seed"]).reset_index(drop=True) for r in (results, again)]
    assert tables[0].equals(tables[1])
    on_cpu = scan(dataclasses.replace(spec, device="cpu"))
    for mine, theirs in zip(results.curves.itertuples(), on_cpu.curves.itertuples(), strict=True):
        assert mine.emc50_low <= theirs.emc50_high
        assert theirs.emc50_low <= mine.emc50_high


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool):
    """A few steps of both drivers under NVIDIA's compute-sanitizer, which comes with the CUDA toolkit."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    program = shutil.which("compute-sanitizer") or (str(home) if home.exists() else None)
    if program is None:
        pytest.fail("compute-sanitizer is not installed: install the CUDA toolkit to run this")
    command = [program, f"--tool={tool}", "--error-exitcode=9", sys.executable, __file__]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


if __name__ == "__main__":
    for case in CASES[:3]:
        for one in (False, True):
            finals(made("triton", torch.float32, one, check_every=2, **case), 4)
