"""What is there on this machine, and whether it works: for a first look, and for reports of what does not."""

import dataclasses
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from fasttrain.analysis import load
from fasttrain.backends import choose, make_backend
from fasttrain.backends.base import Run
from fasttrain.errors import UserError
from fasttrain.journal import Journal
from fasttrain.machine import cores, keeps_models_apart, resolve_device
from fasttrain.prepare import numerics, prepare
from fasttrain.records import Probe
from fasttrain.run import resume, scan
from fasttrain.spec import ScanSpec

PACKAGES = ("fasttrain", "torch", "triton", "numpy", "scipy", "h5py", "pandas", "scikit-learn", "click", "matplotlib")
OPTIONAL = ("xarray", "pyarrow")
# Float64 rounds to 1.1e-16; over this many steps of these models a difference of that size grows by less than a
# million, and a wrong formula shows at the second step.
_STEPS, _CLOSE = 20, 1e-9
_SHORT: dict[str, Any] = {"steps": _STEPS, "check_every": 10, "early_stop": False, "precision": "float64", "classes": 3}
_MLP = ScanSpec(widths=(5,), data="gaussian:7", **_SHORT)
_CNN = ScanSpec(arch=("cnn",), widths=(3,), data="gaussian:1x6x6", **_SHORT)
_SCAN = ScanSpec(widths=(3,), data="gaussian:8", classes=(2,), steps=200, check_every=20, max_probes=16)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: ``"ok"``; ``"missing"``, of what can be done without; ``"failed"``; or ``"fact"``, where there is
            nothing to judge.
        detail: what was found, in a line.
        seconds: that it took.
    """

    name: str
    status: str
    detail: str
    seconds: float = 0.0


def diagnose(on_check: Callable[[Check], None] | None = None) -> list[Check]:
    """Versions, devices, what is available, and a self-test of every backend that is, in about half a minute.

    The self-test trains some models in float64 with each backend and compares their losses with those of ``loop``,
    which is plain torch, and with the same models in other company; then it makes a scan, stops it and goes on with it.

    Args:
        on_check: told of each as it is done.
    """
    done: list[Check] = []
    steps: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        ("versions", _versions),
        ("optional packages", _optional),
        ("system", _system),
        ("processor and memory", _processor),
        ("CUDA devices", _cuda),
        ("models apart in BLAS", _apart),
        ("file locks", _locks),
        *[(f"backend {name}", lambda name=name, spec=spec: _backend(name, spec)) for name, spec in _tested()],
        ("a scan, stopped and resumed", _scan),
    ]
    for name, look in steps:
        begin = time.perf_counter()
        try:
            status, detail = look()
        except UserError as error:
            status, detail = "missing", error.expected
        except Exception as error:  # whatever is wrong here is what was asked for
            status, detail = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        done.append(Check(name, status, detail, time.perf_counter() - begin))
        if on_check is not None:
            on_check(done[-1])
    return done


def _versions() -> tuple[str, str]:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            if name != "triton":  # not on every system
                return "failed", f"{name} is not installed"
    return "ok", ", ".join(found)


def _optional() -> tuple[str, str]:
    there, missing = [], []
    for name in OPTIONAL:
        try:
            there.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return "missing", f"{', '.join(missing)}: pip install fasttrain[formats]"
    return "ok", ", ".join(there)


def _system() -> tuple[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "CC")
    given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return "fact", ", ".join([platform.platform(), *given])


def _processor() -> tuple[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = psutil.virtual_memory()
    free = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    return "fact", f"{names[0] if names else platform.machine()}, {cores()} cores to use, {free}"


def _cuda() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "missing", f"none (torch was built for {torch.version.cuda or 'the CPU alone'}); scans run on the CPU"
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {about.name}, {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB")
    return "ok", "; ".join(found)


def _apart() -> tuple[str, str]:
    device = resolve_device("auto")
    if keeps_models_apart(device):
        return "ok", f"a model's bits do not depend on its company, on {device}"
    return "missing", f"with vmap and stacked, a model's last bits depend on its company on {device}"


def _locks() -> tuple[str, str]:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "emc.h5"
        journal = Journal(path, fresh=True)
        try:
            Journal(path, fresh=True).close()
        except UserError:
            return "ok", "two writers of a file in this folder are told apart"
        finally:
            journal.remove()
    return "missing", "this folder's file system has no locks: see to it that no two scans write one file"


def _tested() -> list[tuple[str, ScanSpec]]:
    backends = [(name, _MLP) for name in ("native", "stacked", "vmap")]
    if torch.cuda.is_available():
        backends.append(("triton", _MLP))
    return [*backends, ("vmap, convolutions", _CNN)]


def _backend(name: str, spec: ScanSpec) -> tuple[str, str]:
    """Losses of three models beside those of the oracle, and of one of them alone."""
    backend = name.partition(",")[0]
    probes = [Probe(0, n, seed) for seed, n in enumerate((40, 23, 61))]

    def losses(which: str, some: list[Probe]) -> tuple[np.ndarray, float]:
        prepared = prepare(dataclasses.replace(spec, backend=which))
        problem = prepared.problems[0]
        made = make_backend(choose(which, prepared.setting, problem.variant), prepared.setting, problem.variant)
        with numerics(prepared):
            state = made.init([Run.of(prepared.setting, problem, probe) for probe in some])
            begin = time.perf_counter()
            report = made.run(state, _STEPS)
            took = time.perf_counter() - begin
        ended = sorted(report.ended)
        return np.array([result.history.train_loss for _, result in ended]), took

    mine, took = losses(backend, probes)
    oracle, _ = losses("loop", probes)
    worst = float(np.abs(mine - oracle).max() / np.abs(oracle).max())
    if not worst < _CLOSE:
        return "failed", f"losses differ from plain torch by {worst:.1e} in float64"
    alone, _ = losses(backend, probes[:1])
    same = "the same bits alone" if np.array_equal(alone[0], mine[0]) else "other last bits alone"
    return "ok", f"within {worst:.1e} of plain torch after {_STEPS} steps, {same}, {1e3 * took:.0f} ms"


def _scan() -> tuple[str, str]:
    """A whole one in memory, and one that is stopped by its time limit until it is done."""
    whole = scan(_SCAN)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emc.h5"
        parts = 1
        found = scan(_SCAN, out=path, time_limit=0.01)
        while found.attrs["status"] != "complete" and parts < 1000:
            found = resume(path, time_limit=0.01 * 2**parts)
            parts += 1
        same = load(path).curves.equals(whole.curves)
    if not same:
        return "failed", f"the same scan in {parts} parts ended otherwise"
    return "ok", f"{len(whole.probes)} runs, and the same in {parts} parts"
