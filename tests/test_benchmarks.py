"""The benchmarks run, check before they compare, and count right."""

import csv
import json
import math
import time

import pytest
import torch
from click.testing import CliRunner

from benchmarks import batching, gpu, peers, precision, profiles, soak, tune, work
from benchmarks.__main__ import main
from benchmarks.work import Case
from fasttrain.kernels import configurations
from fasttrain.kernels.convolve import convolve


def test_flops_and_bytes_of_a_model_step_by_hand() -> None:
    # Forward and dW of 64x32 and 32x10, dX of the second layer only.
    assert Case(128, 64, 32).bytes == 4 * (128 * 64 + 4 * (65 * 32 + 33 * 10))
    assert Case(128, 64, 32).flops == 2 * 128 * (2 * (64 * 32 + 32 * 10) + 32 * 10)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "gemm_peak", lambda: 100.0)
    monkeypatch.setattr(peers, "bandwidth", lambda: 10.0)
    monkeypatch.setattr(peers, "memory", lambda models: ("native", 1000 * models))
    monkeypatch.setattr(peers, "chart", lambda rows, path: None)


def run_peers(tmp_path):
    return CliRunner().invoke(main, ["peers", "--quick", "--repeats", "1", "--seconds", "0.01", "--out", str(tmp_path)])


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise ImportError("No module named 'jax'")

    monkeypatch.setattr(work, "Jax", absent)


@pytest.mark.usefixtures("small")
def test_peers_writes_its_rows_and_skips_what_is_not_installed(tmp_path, monkeypatch) -> None:
    without(monkeypatch)
    done = run_peers(tmp_path)
    assert done.exit_code == 0, done.output
    assert "JAX vmap+jit: skipped (No module named 'jax')" in done.output
    assert "JAX vmap+jit not measured" in done.output.splitlines()[-1]
    with (tmp_path / "peers.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == set(peers.COLUMNS)
    own = {row["contender"]: row for row in rows}
    assert {"eager loop", "torch.func vmap", "fasttrain auto", "fasttrain stacked"} <= set(own)
    case = Case(16, 8, 4, models=4)
    for row in rows:
        expected = float(row["model_steps_per_s"]) * case.flops / 1e9
        assert float(row["gflops"]) == pytest.approx(expected)
        assert float(row["share_of_gemm_peak"]) == pytest.approx(expected / 100)
    facts = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    assert {"date", "processor", "revision", "torch", "growth", "memory_bytes"} <= set(facts)


@pytest.mark.usefixtures("small")
def test_no_ratio_for_a_backend_that_trains_something_else(tmp_path, monkeypatch) -> None:
    without(monkeypatch)
    real = work._own

    def wrong(case, name, *args):
        found = real(case, name, *args)
        return found * 1.0001 if name == "stacked" else found

    monkeypatch.setattr(work, "_own", wrong)
    done = run_peers(tmp_path)
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if "fasttrain stacked" in line]
    assert "conformance failed: no ratio" in line
    assert "the loop" not in line
    assert done.output.splitlines()[-1] == "conformance failed: no geometric mean"


def test_scan_compares_with_the_script(tmp_path) -> None:
    done = CliRunner().invoke(main, ["scan", "--quick", "--seconds", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "scan.json").read_text(encoding="utf-8"))
    assert facts["ratio"] == pytest.approx(facts["script_seconds"] / facts["scan_seconds"])
    assert 0 < facts["sampled"] <= 16  # eight at the full budget, and as many short ones
    assert [row["variants"] for row in facts["growth"]] == [1, 2]


def test_profile_names_the_parts() -> None:
    done = CliRunner().invoke(
        main, ["profile", "--backend", "stacked", "--shape", "8,4,3", "--models", "2", "--steps", "20"]
    )
    assert done.exit_code == 0, done.output
    for part in ("set-up", "steps", "one evaluation", "aten::baddbmm"):
        assert part in done.output


def test_profile_of_the_compiled_kernels_shares_a_step_out_to_its_phases() -> None:
    begin = time.perf_counter()
    parts = profiles.run(Case(8, 4, 3, models=2), "native", 200)
    phases = [parts[name] for name in profiles.PHASES]
    assert min(phases) > 0
    assert sum(phases) < time.perf_counter() - begin


@pytest.mark.slow
def test_batching_writes_its_rows_after_a_check(monkeypatch, tmp_path):
    arguments = ["batching", "--quick", "--repeats", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "batching.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["what"] for row in rows} == {"convolution", "attention", "step"}
    assert all(float(row["milliseconds a model"]) > 0 for row in rows)
    ways = {row["way"] for row in rows if row["what"] == "convolution"}
    assert ways == {*batching.METHODS, "eager loop"}

    def wrong(x, weight, bias, how):
        return convolve(x, weight * (1.0001 if how == "product" else 1.0), bias, how)

    monkeypatch.setattr(batching, "convolve", wrong)
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 1
    assert "conformance failed: product" in done.output
    assert "conformance failed: loop" not in done.output


@pytest.mark.parametrize("command", ["gpu", "tune"])
def test_commands_for_a_gpu_end_with_a_line_where_there_is_none(monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(main, [command])
    assert done.exit_code == 2
    assert done.output == "Error: this needs a CUDA device, and there is none.\n"


def test_the_floor_is_bytes_or_products_whichever_takes_longer():
    case = Case(128, 784, 64)
    assert gpu.floor_us(case, copy=1e12, flops=1e30) == pytest.approx(1e6 * case.bytes / 1e12)
    assert gpu.floor_us(case, copy=1e30, flops=1e13) == pytest.approx(1e6 * case.flops / 1e13)


def test_tuned_rows_take_the_place_of_those_of_their_target(monkeypatch, tmp_path):
    before = configurations.rows()
    table = tmp_path / "table.csv"
    table.write_bytes(configurations.TABLE.read_bytes())
    monkeypatch.setattr(configurations, "TABLE", table)
    own = [{**row, "BB": 32} for row in before if row["target"] == 90]
    try:
        tune.write(own)
        after = configurations.rows()
    finally:
        configurations.rows.cache_clear()
    assert [row for row in after if row["target"] == 80] == [row for row in before if row["target"] == 80]
    assert [row for row in after if row["target"] == 90] == own
    assert table.read_bytes().startswith(configurations.TABLE.read_bytes().split(b"\n")[0])


def test_candidates_differ_from_their_row_in_one_size():
    for row in configurations.rows():
        changes = list(tune.candidates(row))
        assert changes
        assert all(len(change) == 1 and row[name] != value for change in changes for name, value in change.items())
        assert row["precision"] != "ieee" or not any("BS" in change for change in changes)


def test_rounded_products_lose_what_their_bits_say():
    """Unit roundoffs 2^-24, 2^-17, 2^-11 and 2^-8; torch's own functions are back afterwards."""
    rng = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 64, 64, generator=rng) for _ in range(2))
    exact = torch.bmm(a.double(), b.double())
    kept = torch.bmm, torch.baddbmm
    for name, unit in (("float32", 2.0**-24), ("bf16x3", 2.0**-17), ("tf32", 2.0**-11), ("bf16", 2.0**-8)):
        with precision.products(name):
            found = torch.bmm(a, b)
            out = torch.full_like(a, float("nan"))
            assert torch.equal(torch.baddbmm(a, a, b, beta=0, out=out), found)
            assert torch.equal(torch.baddbmm(a, a, b), found + a)
        error = ((found - exact).square().mean() / exact.square().mean()).sqrt().item()
        assert unit / 16 < error < 8 * unit if name == "float32" else unit / 16 < error < 2 * unit
    assert (torch.bmm, torch.baddbmm) == kept


def test_a_short_soak():
    found = soak.run(3000)
    assert found["probes"] == 3000
    assert found["bytes_a_probe"] < 2**14
    assert math.isfinite(found["slowdown"] + found["slowdown_error"])
