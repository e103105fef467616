"""``python -m benchmarks peers|scan|calibration|economy|stopping|batching|precision|profile|gpu|tune``."""

import csv
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import torch

from benchmarks import batching, calibration, economy, faults, peers, precision, profiles, scans, soak, stopping
from benchmarks.work import Case
from fasttrain.machine import cores

_RESULTS = Path(__file__).parent / "results"
_OUT = click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=_RESULTS, show_default=True)
_QUICK = click.option("--quick", is_flag=True, help="Tiny sizes, to see that it works; no figures to quote.")


def conditions() -> dict[str, object]:
    """What the figures depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.machine(),
        "cores": cores(),
        "python": platform.python_version(),
    }
    for package in ("torch", "numpy", "jax", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found["revision"] = git.stdout.strip()
    return found


def _table(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@click.group()
def main() -> None:
    """Measures fasttrain against peers and against itself."""


@main.command("peers")
@_QUICK
@_OUT
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=float, default=1.5, show_default=True, help="Of one contender in one repeat, about.")
def peers_command(quick: bool, out: Path, repeats: int, seconds: float) -> None:
    """The same work for every contender; writes peers.csv, peers.json and peers.png."""
    rows, facts, good = peers.run(quick, repeats, seconds)
    _table(out / "peers.csv", peers.COLUMNS, rows)
    (out / "peers.json").write_text(json.dumps({**conditions(), **facts}, indent=1) + "\n", encoding="utf-8")
    try:
        peers.chart(rows, str(out / "peers.png"))
    except ImportError as error:
        click.echo(f"chart: skipped ({error})")
    if not good:
        sys.exit(1)


@main.command("scan")
@_QUICK
@_OUT
@click.option("--seconds", type=float, default=60.0, show_default=True, help="For the sample of the sequential script.")
def scan_command(quick: bool, out: Path, seconds: float) -> None:
    """A whole scan against a sequential script; writes scan.json."""
    case = Case(64, 64, 16, optimizer="adam", models=4)
    if not peers.work.conforms(case, "native"):
        click.echo("conformance failed: native")
        sys.exit(1)
    facts = scans.run(quick, seconds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scan.json").write_text(json.dumps({**conditions(), **facts}, indent=1) + "\n", encoding="utf-8")


@main.command("precision")
@_OUT
@click.option("--widths", default="8,16,24", show_default=True)
@click.option("--tolerance", type=float, default=0.05, show_default=True)
@click.option("--max-probes", type=click.IntRange(1), default=96, show_default=True)
def precision_command(widths: str, tolerance: float, max_probes: int, out: Path) -> None:
    """What rounded products do to EMC50, emulated on a CPU; writes precision.json."""
    found = precision.run(tuple(int(part) for part in widths.split(",")), tolerance, max_probes)
    out.mkdir(parents=True, exist_ok=True)
    (out / "precision.json").write_text(json.dumps({**conditions(), "rows": found}, indent=1) + "\n", encoding="utf-8")


@main.command("batching")
@_QUICK
@_OUT
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda: then batching-cuda.csv and .json.")
def batching_command(quick: bool, out: Path, repeats: int, device: str) -> None:
    """Ways to batch convolutions and attention, and cnn and vit against the loop; writes batching.csv and .json."""
    if device != "cpu":
        _cuda()
    rows, good = batching.run(quick, repeats, device)
    name = "batching" if device == "cpu" else "batching-cuda"
    _table(out / f"{name}.csv", batching.COLUMNS, rows)
    (out / f"{name}.json").write_text(json.dumps(conditions(), indent=1) + "\n", encoding="utf-8")
    if not good:
        sys.exit(1)


@main.command("calibration")
@_QUICK
@_OUT
@click.option("--runs", type=click.IntRange(2), default=1000, show_default=True, help="Searches of every curve.")
def calibration_command(quick: bool, out: Path, runs: int) -> None:
    """Whether intervals cover, by simulated searches; writes calibration.csv and calibration.json."""
    rows, facts = calibration.run(8 if quick else runs)
    _table(out / "calibration.csv", list(rows[0]), rows)
    (out / "calibration.json").write_text(json.dumps({**conditions(), **facts}, indent=1) + "\n", encoding="utf-8")


@main.command("economy")
@_QUICK
@_OUT
@click.option("--runs", type=click.IntRange(2), default=200, show_default=True, help="Simulated truths.")
@click.option("--scans", type=click.IntRange(1), default=8, show_default=True, help="Real adaptive scans.")
def economy_command(quick: bool, out: Path, runs: int, scans: int) -> None:
    """Sample-updates of the adaptive search beside fixed grids, at equal interval width; writes economy.csv."""
    rows = economy.run(quick, runs, scans)
    _table(out / "economy.csv", economy.COLUMNS, rows)
    (out / "economy.json").write_text(json.dumps(conditions(), indent=1) + "\n", encoding="utf-8")


@main.command("stopping")
@_QUICK
@_OUT
@click.option("--runs", type=click.IntRange(1), default=300, show_default=True, help="At most, of every case.")
def stopping_command(quick: bool, out: Path, runs: int) -> None:
    """How often the plateau rule stops a run that would have fitted; writes stopping.csv and stopping.json."""
    widths, runs = ((8,), 16) if quick else ((8, 16, 24, 32), runs)
    rows, facts = stopping.run(widths, runs, seed=12)
    _table(out / "stopping.csv", stopping.COLUMNS, rows)
    (out / "stopping.json").write_text(json.dumps({**conditions(), **facts}, indent=1) + "\n", encoding="utf-8")


@main.command("soak")
@_QUICK
@_OUT
@click.option("--probes", type=click.IntRange(1000), default=100_000, show_default=True)
def soak_command(quick: bool, out: Path, probes: int) -> None:
    """Memory and speed over very many short probes in one process; writes soak.json."""
    facts = soak.run(2_000 if quick else probes)
    out.mkdir(parents=True, exist_ok=True)
    (out / "soak.json").write_text(json.dumps({**conditions(), **facts}, indent=1) + "\n", encoding="utf-8")
    for name, value in facts.items():
        click.echo(f"{name}: {value}")


@main.command("faults")
@_QUICK
@_OUT
@click.option("--kills", type=click.IntRange(1), default=200, show_default=True, help="Processes to kill.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments.")
def faults_command(quick: bool, out: Path, kills: int, seed: int) -> None:
    """Scans killed at random moments, full disks, damaged files: what is lost; writes faults.json."""
    facts, good = faults.main(6 if quick else kills, seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "faults.json").write_text(json.dumps({**conditions(), **facts}, indent=1) + "\n", encoding="utf-8")
    if not good:
        sys.exit(1)


@main.command("profile")
@click.option("--backend", default="auto", show_default=True)
@click.option("--shape", default="64,64,16", show_default=True, help="Minibatch, inputs, width.")
@click.option("--models", type=click.IntRange(1), default=8, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=500, show_default=True)
def profile_command(backend: str, shape: str, models: int, steps: int) -> None:
    """Where the time of a step goes."""
    batch, features, width = (int(part) for part in shape.split(","))
    profiles.run(Case(batch, features, width, models=models), backend, steps)


def _cuda() -> None:
    """Ends with one line where there is no GPU."""
    if not torch.cuda.is_available():
        click.echo("Error: this needs a CUDA device, and there is none.", err=True)
        sys.exit(2)


@main.command("gpu")
@_OUT
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Of one contender in one repeat, about.")
@click.option("--only", help="Only the cases whose name contains this, such as d=784; no mix, scan or 10,000 models.")
def gpu_command(repeats: int, seconds: float, only: str | None, out: Path) -> None:
    """The fused kernels against peers and the device's own floor; writes gpu.csv and gpu.json."""
    _cuda()
    from benchmarks import gpu

    rows, facts, good = gpu.run(repeats, seconds, only)
    _table(out / "gpu.csv", gpu.COLUMNS, rows)
    device = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": version("triton")}
    (out / "gpu.json").write_text(json.dumps({**conditions(), **device, **facts}, indent=1) + "\n", encoding="utf-8")
    if not good:
        sys.exit(1)


@main.command("tune")
@click.option("--seconds", type=float, default=0.1, show_default=True, help="Of one candidate, about.")
def tune_command(seconds: float) -> None:
    """Tries launch configurations on this GPU; writes its rows of kernels/configurations.csv."""
    _cuda()
    from benchmarks import tune

    tune.write(tune.run(seconds))


if __name__ == "__main__":
    main()
