"""The same work in one run for every contender, interleaved; ratios, and shares of what the machine can do."""

import statistics
import subprocess
import sys
import time

import click
import torch

from benchmarks import work
from benchmarks.work import BLOCK, Case
from fasttrain.backends import choose
from fasttrain.machine import cores

REFERENCE = [Case(128, 64, 32), Case(128, 784, 64), Case(64, 64, 16)]
OTHERS = [Case(128, 64, 32, depth=2), Case(64, 64, 16, optimizer="adam")]
MIXED = [Case(64, 64, width, models=8) for width in (4, 8, 16, 32, 64, 128)]
OWN = ("auto", "native", "stacked", "vmap")
GROWTH = (16, 64, 256, 1024, 4096)
COLUMNS = (
    "case", "contender", "model_steps_per_s", "low", "high", "repeats", "gflops", "share_of_gemm_peak",
    "gb_per_s", "share_of_copy", "compile_seconds", "conforms",
)  # fmt: skip
_MEMORY = """
import psutil, torch
from benchmarks.work import Case
from fasttrain.backends import choose, make_backend
from fasttrain.records import Probe, Problem
from fasttrain.backends.base import Run, Setting
from fasttrain.spec import ScanSpec
spec = ScanSpec(widths=16, data="digits", check_every=20, steps=10**6)
setting = Setting(spec, 64, torch.device("cpu"), torch.float32)
(variant,) = spec.variants(10)
backend = make_backend(choose("auto", setting, variant), setting, variant)
problem = Problem(0, variant, 1, 1, 1000)
def train(models):
    state = backend.init([Run.of(setting, problem, Probe(0, 1000, seed)) for seed in range(models)])
    backend.run(state, 20)
    return state
train(2)
before = psutil.Process().memory_info().rss
state = train({models})
print(backend.name, psutil.Process().memory_info().rss - before)
"""


def _contenders(case: Case, own: tuple[str, ...], compiled: bool) -> dict[str, tuple]:
    """(steps function or None, conforms or None, seconds until the first step was done) by name."""
    out: dict[str, tuple] = {}
    builders = {
        "eager loop": (work.eager_loop, lambda: True),
        "torch.func vmap": (lambda c: work.TorchVmap(c, c.models), lambda: work.peer_conforms(case, work.TorchVmap)),
        "JAX vmap+jit": (lambda c: work.Jax(c, c.models), lambda: work.peer_conforms(case, work.Jax)),
        "scikit-learn joblib": (work.scikit_learn, lambda: None),
    }
    if compiled:
        builders["compiled vmap"] = (
            lambda c: work.TorchVmap(c, c.models, compiled=True),
            lambda: work.peer_conforms(case, lambda c, models: work.TorchVmap(c, models, compiled=True)),
        )
    for name in own:
        setting = case.setting(torch.float64, 10**6)
        checked = choose(name, setting, setting.spec.variants(10)[0])
        builders[f"fasttrain {name}"] = (work.ours(name), lambda checked=checked: work.conforms(case, checked))
    for name, (make, conforms) in builders.items():
        try:
            begin = time.perf_counter()
            run = make(case)
            run(BLOCK)
            out[name] = (run, conforms(), time.perf_counter() - begin)
        except ImportError as error:
            click.echo(f"{name}: skipped ({error})")
    return out


def measure(
    case: Case, own: tuple[str, ...], repeats: int, budget: float, compiled: bool, peak: tuple[float, float]
) -> list[dict]:
    """A row for each contender: medians of interleaved repeats, and shares of the peaks in GFLOP/s and GB/s."""
    contenders = _contenders(case, own, compiled)
    steps = {}
    for name, (run, _, _) in contenders.items():
        once = work.seconds(run, BLOCK)
        steps[name] = BLOCK * min(200, max(1, round(budget / once)))
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, (run, _, _) in contenders.items():
            rates[name].append(steps[name] * case.models / work.seconds(run, steps[name]))
    rows = []
    for name, (_, conforms, first) in contenders.items():
        rate = statistics.median(rates[name])
        gflops, moved = rate * case.flops / 1e9, rate * case.bytes / 1e9
        values = (
            case.name,
            name,
            rate,
            min(rates[name]),
            max(rates[name]),
            repeats,
            gflops,
            gflops / peak[0],
            moved,
            moved / peak[1],
            first,
            conforms,
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def gemm_peak() -> float:
    """GFLOP/s of a large square product with all threads, the best of ten."""
    a = torch.randn(1536, 1536)
    best = 0.0
    for _ in range(10):
        begin = time.perf_counter()
        torch.mm(a, a)
        best = max(best, 2 * 1536**3 / (time.perf_counter() - begin) / 1e9)
    return best


def bandwidth() -> float:
    """GB/s read and written by a copy of 256 MiB, the best of five."""
    a = torch.ones(2**26)
    b = torch.empty_like(a)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        b.copy_(a)
        best = max(best, 2 * a.numel() * 4 / (time.perf_counter() - begin) / 1e9)
    return best


def table(rows: list[dict]) -> bool:
    """Prints the rows of a case with the ratio to each contender that conforms; False if one of ours does not."""
    loop = next(row for row in rows if row["contender"] == "eager loop")["model_steps_per_s"]
    click.echo(f"\n{rows[0]['case']}")
    good = True
    for row in rows:
        line = f"  {row['contender']:22}{row['model_steps_per_s']:10,.0f}/s  [{row['low']:,.0f}, {row['high']:,.0f}]"
        line += f"  {row['gflops']:6.1f} GFLOP/s ({row['share_of_gemm_peak']:.0%} of GEMM)"
        line += f"  {row['gb_per_s']:5.1f} GB/s ({row['share_of_copy']:.0%} of copy)"
        if row["conforms"] is False:
            click.echo(f"{line}  conformance failed: no ratio")
            good = False
        elif row["conforms"] is None:
            click.echo(f"{line}  work only, not the same path")
        else:
            click.echo(
                f"{line}  {row['model_steps_per_s'] / loop:6.1f}x the loop  first steps {row['compile_seconds']:.1f} s"
            )
    return good


def geometric(rows: list[dict], peer: str, cases: list[Case]) -> tuple[float, float] | None:
    """Geometric mean and smallest of auto's ratios to a peer; None where one is missing or does not conform."""
    ratios = []
    for case in cases:
        pair = [r for r in rows if r["case"] == case.name and r["contender"] in ("fasttrain auto", peer)]
        if len(pair) != 2 or not all(r["conforms"] for r in pair):
            return None
        rate = {r["contender"]: r["model_steps_per_s"] for r in pair}
        ratios.append(rate["fasttrain auto"] / rate[peer])
    return statistics.geometric_mean(ratios), min(ratios)


def growth(counts: tuple[int, ...], total: int, repeats: int) -> list[dict]:
    """Microseconds a model-step of auto as the number of models grows; about the same number of model-steps each.

    Enough of them that handing models to workers weighs no more than in a scan, where a turn takes 20 ms.
    """
    rows = []
    cases = [Case(64, 64, 16, models=count) for count in counts]
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        for case in cases:
            steps = max(BLOCK, total // case.models)
            run = work.ours("auto")(case)
            run(1)
            times[case.models].append(work.seconds(run, steps) / steps / case.models * 1e6)
    for count, found in times.items():
        rows.append({"models": count, "us": statistics.median(found), "low": min(found), "high": max(found)})
    return rows


def memory(models: int) -> tuple[str, int]:
    """Backend, and bytes that so many models of (64, 16, 10) on the digits take while they train and are evaluated."""
    command = [sys.executable, "-c", _MEMORY.format(models=models)]
    name, taken = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return name, int(taken)


def run(quick: bool, repeats: int, budget: float) -> tuple[list[dict], dict, bool]:
    """All cases; rows, facts of the run, and whether everything conforms."""
    reference, others, mixed = (REFERENCE, OTHERS, MIXED) if not quick else ([Case(16, 8, 4, models=4)], [], [])
    peak = gemm_peak(), bandwidth()
    click.echo(f"GEMM {peak[0]:.0f} GFLOP/s, copy {peak[1]:.1f} GB/s, {cores()} cores")
    rows: list[dict] = []
    good = True
    for case in reference + others:
        found = measure(case, OWN, repeats, budget, case == REFERENCE[0], peak)
        good &= table(found)
        rows += found
    if mixed:
        found = [measure(case, ("auto",), repeats, budget / 4, False, peak) for case in mixed]
        rows += [row for some in found for row in some]
        click.echo("\nmixed scan, widths 4 to 128, 8 models each (time for one step of all)")
        for name in [row["contender"] for row in found[0]]:
            per = sum(8 / row["model_steps_per_s"] for some in found for row in some if row["contender"] == name)
            click.echo(f"  {name:22}{48 / per:10,.0f}/s")
    grown = growth(GROWTH if not quick else (2, 8), 2_000_000 if not quick else 800, repeats)
    for row in grown:
        click.echo(f"{row['models']:6} models: {row['us']:.2f} us a model-step [{row['low']:.2f}, {row['high']:.2f}]")
    models = 10_000 if not quick else 50
    name, taken = memory(models)
    click.echo(f"{models:,} models of (64, 16, 10), {name}: {taken / 2**20:,.0f} MiB, {taken / models:,.0f} bytes each")
    facts = {
        "gemm_gflops": peak[0],
        "copy_gb_per_s": peak[1],
        "growth": grown,
        "memory_bytes": taken,
        "memory_models": models,
    }
    if not good:
        click.echo("conformance failed: no geometric mean")
        return rows, facts, False
    parts = []
    for peer in ("JAX vmap+jit", "eager loop"):
        found = geometric(rows, peer, reference)
        parts.append(f"{peer} {found[0]:.1f}x (lowest {found[1]:.1f}x)" if found else f"{peer} not measured")
    facts["geometric"] = "; ".join(parts)
    click.echo(f"auto against, geometric mean: {facts['geometric']}")
    return rows, facts, True


def chart(rows: list[dict], path: str) -> None:
    """Bars of model-steps per second, a group for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows if not row["case"].endswith("E=8")))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    colours = ["#000000", "#999999", "#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#0072B2", "#D55E00", "#F0E442"]
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for k, name in enumerate(names):
        found = {row["case"]: row for row in rows if row["contender"] == name}
        here = [i for i, case in enumerate(cases) if case in found]
        rate = [found[cases[i]]["model_steps_per_s"] for i in here]
        spread = [[r - found[cases[i]]["low"] for r, i in zip(rate, here, strict=True)],
                  [found[cases[i]]["high"] - r for r, i in zip(rate, here, strict=True)]]  # fmt: skip
        place = [i + (k - len(names) / 2 + 0.5) * 0.85 / len(names) for i in here]
        axes.bar(place, rate, 0.85 / len(names), yerr=spread, color=colours[k % len(colours)], label=name)
    axes.set_yscale("log")
    axes.set_ylabel("model-steps per second")
    axes.set_xticks(range(len(cases)), [case.replace(" sgd", "").replace(" E=64", "") for case in cases])
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
    figure.savefig(path, dpi=150)
