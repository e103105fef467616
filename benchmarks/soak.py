"""A hundred thousand short probes in one process: whether memory stays flat and the speed too."""

import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

import fasttrain
from fasttrain import ScanSpec

_EVERY = 1.0  # seconds between two looks
_WARM = 0.2  # share of the probes before which nothing is fitted: caches fill


def run(probes: int) -> dict[str, float]:
    """Scans so many probes, about, into a file.

    Returns:
        ``probes``; ``seconds``; ``probes_per_second_first`` and ``_last``, of the second and of the last fifth;
        ``mib_at_start`` and ``_at_end``, resident; ``bytes_a_probe``, the slope of a line through the resident memory
        after the first fifth; ``file_mib``.
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

    def rate(low: float, high: float) -> float:
        inside = (done >= low * done[-1]) & (done <= high * done[-1])
        return float(np.ptp(done[inside]) / max(np.ptp(at[inside]), 1e-9))

    return {
        "probes": int(done[-1]),
        "seconds": round(float(at[-1] - at[0]), 1),
        "probes_per_second_first": round(rate(_WARM, 0.4)),
        "probes_per_second_last": round(rate(0.8, 1.0)),
        "mib_at_start": round(float(resident[late][0]) / 2**20, 1),
        "mib_at_end": round(float(resident[-1]) / 2**20, 1),
        "bytes_a_probe": round(slope, 1),
        "file_mib": round(size / 2**20, 1),
    }
