"""Builds ``mlp.c`` with the machine's C compiler at first use, keeps it in the user's cache, and calls it."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "identity")
"""What the kernels know, in the order of their enumeration."""
OPTIMIZERS = {"sgd": 1, "adam": 2}
"""What the kernels know, in the order of their enumeration, and how many state arrays each has."""

_SOURCE = Path(__file__).with_name("mlp.c")
# No -ffast-math: a NaN must stay one, and sums must keep their order.
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_COMPILE_SECONDS = 120
_ALIGNMENT = 64


class Unavailable(Exception):
    """The kernels cannot be built or loaded here; the message says why in one line."""


class Model(ctypes.Structure):
    """``model`` of mlp.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("features", "width", "depth", "classes", "batch")),
        *((name, ctypes.c_int64) for name in ("activation", "optimizer", "n", "step")),
        ("key", ctypes.c_int64 * 2),
        ("lr", ctypes.c_double),
        ("momentum", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("pool", "rows", "labels", "params", "state")),
        ("loss", ctypes.c_double),
        ("mean_loss", ctypes.c_double),
        ("wrong", ctypes.c_int64),
    )


def zeros(count: int, dtype: np.dtype) -> np.ndarray:
    """An array of zeros [count] that starts at a cache line."""
    raw = np.zeros(count * dtype.itemsize + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count * dtype.itemsize].view(dtype)


@functools.cache
def library(dtype: str, *definitions: str) -> ctypes.CDLL:
    """The kernels for ``"float32"`` or ``"float64"``; its functions release the interpreter's lock.

    ``definitions`` are macros to compile with: with ``"PHASES"``, ``train`` adds up in ``phase_seconds`` where its time
    goes.

    Raises:
        Unavailable: there is no working C compiler, or nowhere to keep what it makes.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = [*_FLAGS, *(["-DREAL=float", "-DSINGLE=1"] if dtype == "float32" else ["-DREAL=double", "-DSINGLE=0"])]
    flags += [f"-D{name}" for name in definitions]
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=10, check=True).stdout
        key = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), version, " ".join(flags).encode(), _processor()]))
        path = _cache() / f"mlp-{dtype}-{key.hexdigest()[:24]}.so"
        if not path.exists():
            _build([*compiler, *flags], path)
        lib = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise Unavailable(f"{' '.join(compiler)} failed: {lines[0] if lines else error}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the C compiler {' '.join(compiler)} or its result could not be used: {error}") from error
    for name in ("parameters_size", "scratch_size"):
        getattr(lib, name).restype = ctypes.c_int64
    lib.train.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    lib.batch_of.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    for name in ("evaluate", "pack", "unpack"):
        getattr(lib, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return lib


def _build(command: list[str], path: Path) -> None:
    """Compiles beside the target and moves it there whole, so that two processes cannot meet a half of it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        run = [*command, str(_SOURCE), "-o", str(made), "-lm"]
        subprocess.run(run, capture_output=True, timeout=_COMPILE_SECONDS, check=True)
        os.replace(made, path)


def _cache() -> Path:
    """A folder of the user's own: what lies in it is executed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written by others")
    return folder


def _processor() -> bytes:
    """What the instruction set depends on: a shared home may serve several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    return "\n".join([platform.machine(), platform.processor(), *kept]).encode()
