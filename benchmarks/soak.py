"""A hundred thousand short probes in one process: whether memory stays flat and the speed too."""

import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from scipy import stats

import fasttrain
from fasttrain import ScanSpec

_EVERY = 1.0  # seconds between two looks
_PARTS = 16  # of the rest, of which the times are compared
_WARM = 0.2  # share of the probes before which nothing is fitted: caches fill


def run(probes: int) -> dict[str, float]:
    """Scans so many probes, about, into a file.

    Returns:
        ``probes``; ``seconds``; ``slowdown``, by how much of itself the time of a probe grew from the first fifth to
        the end, from a line through the times of equal parts, and ``slowdown_error``, its standard error;
        ``mib_at_start`` and ``_at_end``, resident, of the same part; ``bytes_a_probe``, the slope of a line through
        that; ``file_mib``.
    """
    variants, ns = 50, 20
    spec = ScanSpec(
        widths=(2,),
        data="gaussian:2",
        classes=2,
        steps=20,
        check_every=10,
        lr=tuple(0.001 * (1 + k) for k in range(variants)),
        lr_search="all",
        search="grid",
        n=tuple(range(2, 2 + ns)),
        seeds=max(probes // (variants * ns), 1),
    )
    process = psutil.Process()
    looks: list[tuple[float, int, int]] = []

    def look(progress: "fasttrain.Progress") -> None:
        now = time.monotonic()
        if not looks or now - looks[-1][0] >= _EVERY or progress.finished:
            looks.append((now, progress.probes_done, process.memory_info().rss))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "soak.h5"
        fasttrain.scan(spec, out=path, on_progress=look)
        size = path.stat().st_size
    at, done, resident = (np.array(column, dtype=float) for column in zip(*looks, strict=True))
    late = done >= _WARM * done[-1]
    slope = float(np.polyfit(done[late], resident[late], 1)[0])
    edges = np.linspace(_WARM, 1.0, _PARTS + 1)
    took = np.diff(np.interp(edges, done / done[-1], at))
    fit = stats.linregress((edges[1:] + edges[:-1]) / 2, took)
    grown = (1.0 - _WARM) / (fit.intercept + fit.slope * _WARM)

    return {
        "probes": int(done[-1]),
        "seconds": round(float(at[-1] - at[0]), 1),
        "slowdown": round(float(fit.slope * grown), 3),
        "slowdown_error": round(float(fit.stderr * grown), 3),
        "mib_at_start": round(float(resident[late][0]) / 2**20, 1),
        "mib_at_end": round(float(resident[-1]) / 2**20, 1),
        "bytes_a_probe": round(slope, 1),
        "file_mib": round(size / 2**20, 1),
    }
