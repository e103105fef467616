"""The C kernels: what they share with the Python code to the last bit, and what happens without a compiler."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain import ScanSpec, UserError
from fasttrain.activations import ACTIVATIONS
from fasttrain.backends import choose
from fasttrain.backends.base import Run, Setting
from fasttrain.backends.native import NativeBackend
from fasttrain.kernels import native
from fasttrain.optim import OPTIMIZERS
from fasttrain.records import Probe, Problem

SCRIPT = str(Path(sys.executable).parent / "fasttrain")


def setting(**fields: object) -> Setting:
    spec = ScanSpec(**{"data": "gaussian:7", "widths": 5, **fields})
    return Setting(spec, 7, torch.device("cpu"), torch.float32)


def one(n: int, **fields: object):
    shared = setting(**fields)
    (variant,) = shared.spec.variants(10)
    backend = NativeBackend(shared)
    return backend, backend.init([Run.of(shared, Problem(0, variant, 1, 1, n), Probe(0, n, 3))])


@pytest.mark.parametrize("batch_size", [1, 64, 300])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 30, 97, 100, 1797, 65536])
def test_the_sample_order_is_that_of_the_other_backends(n: int, batch_size: int) -> None:
    backend, state = one(n, batch_size=batch_size)
    (run,), (model,) = state.runs, state.models
    for step in (0, 1, 2, 500, 9_999):
        found = np.empty(batch_size, dtype=np.int64)
        backend._library.batch_of(ctypes.byref(model.struct), step, found.ctypes.data)
        run.step = step
        np.testing.assert_array_equal(found, run.batches(1)[0])


@pytest.mark.parametrize("fields", [{"widths": w, "depths": d} for w in (1, 8, 17, 50) for d in (0, 1, 3)])
def test_parameters_come_out_as_they_went_in(fields: dict) -> None:
    backend, state = one(9, **fields)
    drawn = state.runs[0].initial_weights(backend._setting)
    found = backend.parameters(state, 0)
    assert list(found) == list(drawn)
    for name, value in drawn.items():
        np.testing.assert_array_equal(found[name], value.astype(np.float32))


def test_the_kernels_know_all_activations_and_optimizers_as_they_are_here() -> None:
    assert set(native.ACTIVATIONS) == set(ACTIVATIONS)
    assert {name: len(OPTIMIZERS[name].state_names) for name in native.OPTIMIZERS} == native.OPTIMIZERS


def test_auto_takes_what_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = setting()
    (variant,) = shared.spec.variants(10)
    assert choose("auto", shared, variant) == "native"
    monkeypatch.setattr(native, "ACTIVATIONS", ())
    assert choose("auto", shared, variant) == "stacked"
    with pytest.raises(UserError, match="no activation relu"):
        choose("native", shared, variant)


def scan(folder: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, "scan", "--widths", "3", "--steps", "60", "--max-probes", "2", "--data", "gaussian:4", *options]
    command += ["--out", str(folder / "emc.h5")]
    full = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), **env}
    return subprocess.run(command, capture_output=True, text=True, env=full, check=False)


def test_without_a_compiler_auto_goes_on_and_native_says_so(tmp_path: Path) -> None:
    done = scan(tmp_path, CC="no-such-compiler")
    assert done.returncode == 0
    assert "stacked" in done.stdout
    (tmp_path / "emc.h5").unlink()
    refused = scan(tmp_path, "--backend", "native", CC="no-such-compiler")
    assert refused.returncode == 2
    assert "no-such-compiler" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "emc.h5").exists()


def test_a_compiler_that_fails_is_named(tmp_path: Path) -> None:
    refused = scan(tmp_path, "--backend", "native", CC=f"{sys.executable} -c pass")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_the_library_is_built_once_and_a_cache_of_others_is_refused(tmp_path: Path) -> None:
    assert "native" in scan(tmp_path).stdout
    (built,) = (tmp_path / "cache" / "fasttrain").iterdir()
    first = built.stat().st_mtime_ns
    (tmp_path / "emc.h5").unlink()
    assert scan(tmp_path).returncode == 0
    assert built.stat().st_mtime_ns == first
    built.parent.chmod(0o777)
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o777
    (tmp_path / "emc.h5").unlink()
    refused = scan(tmp_path, "--backend", "native")
    assert refused.returncode == 2
    assert "can be written by others" in refused.stderr
