"""The fused kernels on a GPU: against peers, against the floor that the device itself sets, and a whole scan."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator

import click
import torch

import fasttrain
from benchmarks import scans, work
from benchmarks.work import BLOCK, Case, Stacked
from fasttrain.backends import base, make_backend, together
from fasttrain.backends.base import Run
from fasttrain.kernels import fused, reference
from fasttrain.optim import make_optimizer
from fasttrain.records import Probe, Problem
from fasttrain.spec import ScanSpec

MODELS = 1000
CASES = [
    Case(128, features, width, depth, models=MODELS, device="cuda")
    for features, width, depth in itertools.product((64, 784, 3072), (16, 64, 256), (1, 2))
]
RAGGED = tuple(range(4, 257, 4))
PRECISIONS = ("float32", "bf16x3", "tf32", "bf16")
COLUMNS = (
    "case", "contender", "model_steps_per_s", "low", "high", "repeats", "floor_us", "share_of_floor",
    "launches_per_step", "peak_gib", "conforms",
)  # fmt: skip


class GraphedBmm:
    """A step of stacked models in bmm with its gradient written out, 20 of them in one CUDA graph."""

    def __init__(self, case: Case, models: int) -> None:
        data = Stacked(case, models)
        device = torch.device("cuda")
        self.params = {name: torch.as_tensor(value, device=device) for name, value in data.weights.items()}
        first = {name: torch.zeros_like(p) for name, p in self.params.items()}
        x, y = torch.as_tensor(data.x, device=device), torch.as_tensor(data.y, device=device)
        batches = torch.as_tensor(data.batches, device=device)
        row = torch.arange(models, device=device)[:, None]
        classes = torch.arange(10, device=device)[:, None]
        weight = torch.full((models, case.batch), 1 / case.batch, device=device)
        names = [f"layers.{i}" for i in range(case.depth + 1)]

        def step(batch: torch.Tensor) -> None:
            inputs = [x[row, batch]]
            for name in names[:-1]:
                inputs.append(reference.linear(inputs[-1], *self._layer(name)).relu_())
            out = reference.logits(inputs[-1], *self._layer(names[-1]))
            _, delta = reference.head(out, (y[row, batch][:, None, :] == classes).float(), weight)
            for layer in range(case.depth, -1, -1):
                w, b = self._layer(names[layer])
                into = [first[f"{names[layer]}.{part}"].mul_(0.9) for part in ("weight", "bias")]
                reference.linear_gradient(delta, inputs[layer], *into, add=True)
                if layer:
                    delta = torch.bmm(delta.mT, w).mul_(inputs[layer] > 0).mT
                w.sub_(into[0], alpha=0.01)
                b.sub_(into[1], alpha=0.01)

        # A graph reads addresses: what they hold must live as long as it.
        self._kept = (first, x, y, batches, row, classes, weight)
        held = {name: p.clone() for name, p in self.params.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(batches[0])
        torch.cuda.current_stream().wait_stream(stream)
        for name, p in self.params.items():
            p.copy_(held[name])
            first[name].zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for batch in batches:
                step(batch)

    def _layer(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.params[f"{name}.weight"], self.params[f"{name}.bias"]

    def __call__(self, steps: int) -> None:
        """So many steps of all models."""
        assert steps % BLOCK == 0
        for _ in range(steps // BLOCK):
            self.graph.replay()

    def arrays(self) -> dict:
        """Parameters [E, ...] by name."""
        return {name: value.cpu().numpy() for name, value in self.params.items()}


class Fused:
    """The triton backend on models of one or several widths, a state for each width class."""

    def __init__(self, cases: list[Case], precision: str) -> None:
        self.states, self.steps = [], 0
        for case in cases:
            setting = case.setting(torch.float32, 10**9, precision)
            key = together("triton", setting.spec.variants(10)[0])
            backend = make_backend("triton", setting, key)
            runs = case.runs(setting, case.models)
            known = next((entry for entry in self.states if entry[0] == key), None)
            if known is None:
                self.states.append((key, backend, backend.init(runs)))
            else:
                known[1].insert(known[2], runs)

    def __call__(self, steps: int) -> None:
        """So many steps of all models; not looked at in between, as within a turn of a scan."""
        for _, _, state in self.states:
            advance(state.models, steps)

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return sum(state.models.launches for _, _, state in self.states)


def advance(models: fused.Models, steps: int) -> None:
    """So many steps: of programs that make whole steps in one launch, of stages by the graph of a block."""
    assert steps % BLOCK == 0
    for _ in range(1 if models.config.whole else steps // BLOCK):
        models.run(steps if models.config.whole else BLOCK)


def floor_us(case: Case, copy: float, flops: float) -> float:
    """Microseconds that a model-step must at least take: its bytes at the bandwidth or its products at the peak."""
    return 1e6 * max(case.bytes / copy, case.flops / flops)


def bandwidth() -> float:
    """Bytes/s read and written by a copy of 2 GiB, the best of ten."""
    a = torch.ones(2**29, device="cuda")
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / min(_timed(lambda: b.copy_(a)) for _ in range(10))


def peak(precision: str) -> float:
    """FLOP/s of a large square product in what a precision is made of, the best of ten."""
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    rate = 2 * 8192**3 / min(_timed(lambda: torch.mm(a, a)) for _ in range(10))
    torch.backends.cuda.matmul.allow_tf32 = False
    return rate / (3 if precision == "bf16x3" else 1)


def _timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _rate(run: Callable[[int], object], models: int, budget: float) -> float:
    """Model-steps/s over about the budget of seconds."""
    once = _timed(lambda: run(BLOCK))
    steps = BLOCK * max(1, min(500, round(budget / once)))
    return steps * models / _timed(lambda: run(steps))


def _contenders(case: Case, compiled: bool) -> dict[str, tuple[Callable[[], Callable[[int], object]], int]]:
    """How to build each, and how many models it is given."""
    few = min(case.models, 8)
    out: dict[str, tuple] = {
        f"fasttrain {precision}": (lambda precision=precision: Fused([case], precision), case.models)
        for precision in PRECISIONS
    }
    out["vmap, fused head and update"] = (lambda: Vmap(case, True), case.models)
    out["vmap, torch's"] = (lambda: Vmap(case, False), case.models)
    out["CUDA-graphed bmm"] = (lambda: GraphedBmm(case, case.models), case.models)
    out["eager loop"] = (lambda: work.eager_loop(case.of(few)), few)
    if _jax_has_a_gpu():
        out["JAX vmap+jit"] = (lambda: work.Jax(case, case.models), case.models)
    if compiled:
        out["compiled vmap"] = (lambda: work.TorchVmap(case, case.models, compiled=True), case.models)
    return out


def _jax_has_a_gpu() -> bool:
    # Before its first import: it would take three quarters of the memory, and multiply in TF32.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    try:
        import jax
    except ImportError:
        return False
    return any(device.platform == "gpu" for device in jax.devices())


class Vmap:
    """The vmap backend, with the fused head and update or with torch's."""

    def __init__(self, case: Case, fused: bool) -> None:
        setting = case.setting(torch.float32, 10**9)
        (variant,) = setting.spec.variants(10)
        self.backend = make_backend("vmap", setting, variant)
        if not fused:
            self.backend._fused = False
            self.backend._optimizer = make_optimizer(variant, self.backend._layout)
        self.state = self.backend.init(case.runs(setting, case.models))

    def __call__(self, steps: int) -> None:
        """So many steps of all models."""
        self.backend.run(self.state, self.state.clock + steps)


def measure(
    case: Case, repeats: int, budget: float, compiled: bool, copy: float, peaks: dict[str, float]
) -> list[dict]:
    """A row for each contender: medians of interleaved repeats."""
    peers = {
        "CUDA-graphed bmm": GraphedBmm,
        "compiled vmap": functools.partial(work.TorchVmap, compiled=True),
        "JAX vmap+jit": work.Jax,
    }
    checked: dict[str, bool] = {}
    good = work.conforms(case.of(3), "triton")
    rates: dict[str, list[float]] = {}
    launches: dict[str, float] = {}
    memory: dict[str, float] = {}
    for _ in range(repeats):
        for name, (make, models) in _contenders(case, compiled).items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run = None
            try:
                run = make()
                run(BLOCK)
                if name in peers and name not in checked:
                    checked[name] = work.peer_conforms(case, peers[name])
                before = getattr(run, "launches", math.nan)
                run(BLOCK)
                launches[name] = (getattr(run, "launches", math.nan) - before) / BLOCK
                rates.setdefault(name, []).append(_rate(run, models, budget))
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
            except torch.cuda.OutOfMemoryError:
                click.echo(f"{case.name}: {name}: out of memory")
            del run
    rows = []
    for name, found in rates.items():
        precision = name.removeprefix("fasttrain ")
        floor = floor_us(case, copy, peaks.get(precision, peaks["float32"]))
        rate = statistics.median(found)
        values = (
            case.name, name, rate, min(found), max(found), repeats, floor, rate * floor / 1e6,
            launches[name], memory[name], good if name.startswith("fasttrain") else checked.get(name),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def table(rows: list[dict]) -> bool:
    """Prints the rows of a case; no ratio where ours does not conform."""
    click.echo(f"\n{rows[0]['case']}")
    rate = {row["contender"]: row["model_steps_per_s"] for row in rows}
    peers = [r for r in rows if not r["contender"].startswith(("fasttrain", "vmap")) and r["conforms"] is not False]
    best = max((row["model_steps_per_s"] for row in peers), default=float("nan"))
    good = all(row["conforms"] is not False for row in rows if row["contender"].startswith("fasttrain"))
    for row in rows:
        line = f"  {row['contender']:28}{row['model_steps_per_s']:14,.0f}/s  [{row['low']:,.0f}, {row['high']:,.0f}]"
        line += f"  {row['share_of_floor']:.0%} of the floor  {row['peak_gib']:.1f} GiB"
        if row["contender"].startswith("fasttrain"):
            loop = rate.get("eager loop", float("nan"))
            here = row["model_steps_per_s"]
            line += (
                f"  {here / loop:,.0f}x the loop, {here / best:.2f}x the best peer" if good else "  does not conform"
            )
        elif row["conforms"] is False:
            line += "  does not conform: not compared with"
        click.echo(line)
    return good


def ragged(repeats: int, budget: float, copy: float, peaks: dict[str, float]) -> list[dict]:
    """Widths 4 to 256 at once, against a CUDA-graphed bmm step padded to the widest."""
    each = max(1, MODELS // len(RAGGED))
    cases = [Case(128, 784, width, models=each, device="cuda") for width in RAGGED]
    models = each * len(RAGGED)
    widest = Case(128, 784, RAGGED[-1], models=models, device="cuda")
    rates: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, make in {
            **{f"fasttrain {p}": (lambda p=p: Fused(cases, p)) for p in PRECISIONS},
            "CUDA-graphed bmm, padded": lambda: GraphedBmm(widest, models),
        }.items():
            gc.collect()
            torch.cuda.empty_cache()
            run = make()
            run(BLOCK)
            rates.setdefault(name, []).append(_rate(run, models, budget))
            del run
    good = all(work.conforms(case.of(3), "triton") for case in (cases[0], cases[len(cases) // 2], cases[-1]))
    rows = []
    for name, found in rates.items():
        precision = peaks.get(name.removeprefix("fasttrain "), peaks["float32"])
        floor = statistics.mean(floor_us(case, copy, precision) for case in cases)
        rate = statistics.median(found)
        own = name.startswith("fasttrain")
        values = (
            f"ragged 4 to 256 d=784 E={models}", name, rate, min(found), max(found), repeats, floor, rate * floor / 1e6,
            float("nan"), float("nan"), good if own else None,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def whole_scan(budget: float) -> dict:
    """A scan of sixteen widths from end to end, against the sequential script on the same GPU."""
    spec = ScanSpec(widths=tuple(range(8, 129, 8)), device="cuda")
    fasttrain.scan(dataclasses.replace(spec, steps=200, max_probes=4))  # compiles
    begin = time.perf_counter()
    results = fasttrain.scan(spec)
    wall = time.perf_counter() - begin
    by_width, agree, count = scans.script_seconds(results, budget, torch.device("cuda"))
    attrs = results.attrs
    click.echo(
        f"\nscan of 16 widths: {wall:.1f} s on {attrs['variant_backends']}, {attrs['launches']:,} launches, "
        f"occupancy {attrs['occupancy']:.0%}; script {sum(by_width.values()):,.0f} s, "
        f"{agree} of {count} verdicts at the same step"
    )
    return {"scan_seconds": wall, "script_seconds": sum(by_width.values()), "agree": agree, "sampled": count}


def many(count: int = 10_000) -> dict:
    """So many models of (784, 64, 10) in training at once: GiB and model-steps/s."""
    case = Case(128, 784, 64, models=count, device="cuda")
    setting = case.setting(torch.float32, 10**9, "float32")
    (variant,) = setting.spec.variants(10)
    # One training set for all: what is asked is whether the models fit.
    (run,) = case.runs(setting, 1)
    task = run.task
    runs = []
    for seed in range(count):
        one = Run.of(setting, Problem(0, variant, 1, 1, 1), Probe(0, 1, seed))
        one.task = task
        runs.append(one)
    torch.cuda.reset_peak_memory_stats()
    backend = make_backend("triton", setting, together("triton", variant))
    state = backend.init(runs)
    backend.run(state, BLOCK)
    rate = _rate(lambda steps: advance(state.models, steps), count, 2.0)
    gib = torch.cuda.max_memory_allocated() / 2**30
    click.echo(f"{count:,} models of (784, 64, 10): {gib:.1f} GiB, {rate:,.0f} model-steps/s")
    return {"models": count, "gib": gib, "model_steps_per_s": rate}


@contextlib.contextmanager
def data_drawn_once() -> Iterator[None]:
    """Contenders of the same inputs share them: a thousand sets of 512 x 3,072 normal numbers take a while to draw."""
    draw = base.task

    @functools.lru_cache(MODELS + 16)
    def kept(data: str, spec_seed: int, labels: str, classes: int, seed: int, n: int):
        return draw(ScanSpec(data=data, seed=spec_seed), labels, classes, seed, n)

    base.task = lambda spec, labels, classes, seed, n: kept(spec.data, spec.seed, labels, classes, seed, n)
    try:
        yield
    finally:
        base.task = draw


def run(repeats: int, budget: float, only: str | None) -> tuple[list[dict], dict, bool]:
    """All cases; rows, facts of the run, and whether everything conforms."""
    copy = bandwidth()
    peaks = {name: peak(name) for name in PRECISIONS}
    click.echo(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:,.0f} GB/s")
    click.echo("products, TFLOP/s: " + ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in peaks.items()))
    rows: list[dict] = []
    good = True
    with data_drawn_once():
        for case in CASES:
            if only is None or only in case.name:
                found = measure(case, repeats, budget, case == CASES[0], copy, peaks)
                good &= table(found)
                rows += found
        if only is None:
            found = ragged(repeats, budget, copy, peaks)
            good &= table(found)
            rows += found
    facts = {"copy_gb_per_s": copy / 1e9, "tflops": {name: rate / 1e12 for name, rate in peaks.items()}}
    if only is None:
        facts["scan"] = whole_scan(60.0)
        facts["many"] = many()
    if not good:
        click.echo("conformance failed: no ratios")
    return rows, facts, good
