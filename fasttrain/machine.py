"""The machine a scan runs on: device, memory, versions, and whether its BLAS keeps models apart bit for bit."""

import gc
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch

import fasttrain
from fasttrain.errors import UserError
from fasttrain.sampling import VERSION, generator_digest

_MEMORY_SHARE = 0.8  # of what is free; the rest is for the search, the store and other programs


def resolve_device(name: str) -> torch.device:
    """The device a spec names; ``auto`` is CUDA where there is one.

    Raises:
        UserError: the device is not there.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = ["cpu", *(f"cuda:{i}" for i in range(count))]
        if (name if ":" in name else "cuda:0") not in devices:
            raise UserError("device", name, f"not on this machine; expected one of {', '.join(devices)}")
        return torch.device(name if ":" in name else "cuda:0")
    return torch.device(name)


def available_bytes(device: torch.device) -> int:
    """Memory that a scan may take on a device, in bytes."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(_MEMORY_SHARE * free)


def keeps_models_apart(device: torch.device) -> bool:
    """Whether batched products of torch on a device give a model the same bits in any company.

    Tried at sizes where MKL without its strict reproducibility mode does not (odd ones, in changed order and number).
    """
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((7, 5, 3), (64, 17, 5), (33, 65, 17), (128, 5, 10), (601, 7, 1)):
        a = torch.randn(8, rows, inner, generator=generator).to(device)
        b = torch.randn(8, inner, columns, generator=generator).to(device)
        order = torch.randperm(8, generator=generator).to(device)
        whole = torch.bmm(a, b)
        if not torch.equal(torch.bmm(a[order], b[order]), whole[order]):
            return False
        if not torch.equal(torch.bmm(a[:3].clone(), b[:3].clone()), whole[:3]):
            return False
    return True


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Peak:
    """The most memory that this process has taken on a device since, beyond what it had then.

    On CUDA it is what torch's allocator counts, on a CPU what Linux counts: resident pages, so that a figure of less
    than some MiB says little.

    Raises:
        OSError: when made; this system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what there is now
            self._before = _peak_resident()

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _peak_resident() - self._before


def _peak_resident() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError("no VmHWM in /proc/self/status")
    return 1024 * int(found[1])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is of torch, numpy or Python that could not allocate; torch has no type for that on a CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def conditions(
    device: torch.device, backends: Sequence[str], precision: str, threads: int
) -> dict[str, str | int | float]:
    """What every number of a scan depends on beside its spec; kept in the file.

    Args:
        device: resolved.
        backends: of every variant, resolved.
        precision: of the training, resolved.
        threads: that step models.
    """
    on_cuda = device.type == "cuda"
    return {
        "fasttrain_version": fasttrain.__version__,
        "torch_version": str(torch.__version__),
        "numpy_version": np.__version__,
        "h5py_version": version("h5py"),
        "triton_version": version("triton") if "triton" in backends else "",
        "scikit_learn_version": version("scikit-learn"),
        "python_version": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "threads": threads,
        "backend": ",".join(sorted(set(backends))),
        "variant_backends": ",".join(backends),
        "precision": precision,
        "tf32": int(precision == "tf32"),
        "generator": VERSION,
        "generator_digest": generator_digest(),
        # Models never meet in native and triton; the others leave it to batched products.
        "bitwise_independent": int(set(backends) <= {"native", "triton"} or keeps_models_apart(device)),
    }
