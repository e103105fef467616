"""The benchmarks run, check before they compare, and count right."""

import csv
import json
import time

import pytest
from click.testing import CliRunner

from benchmarks import peers, profiles, work
from benchmarks.__main__ import main
from benchmarks.work import Case


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
    assert 0 < facts["sampled"] <= 8
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
