import math
import os
import platform
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

import fasttrain
from fasttrain import UserError, machine
from fasttrain.machine import available_bytes, conditions, keeps_models_apart, resolve_device
from fasttrain.sampling import VERSION, generator_digest

CPU = torch.device("cpu")


def with_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "name", "expected"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:0", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch, count: int, name: str, expected: str) -> None:
    with_cuda(monkeypatch, count)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(("count", "name"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, "cuda:2"), (2, "cuda:99")])
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, count: int, name: str) -> None:
    with_cuda(monkeypatch, count)
    with pytest.raises(UserError) as caught:
        resolve_device(name)
    assert (caught.value.option, caught.value.value) == ("device", name)
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    assert caught.value.expected.endswith(f"expected one of {there}")


def test_a_scan_takes_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert available_bytes(CPU) == 800


def test_this_machine_keeps_models_apart() -> None:
    assert os.environ["MKL_CBWR"]
    assert keeps_models_apart(CPU)


@pytest.mark.parametrize("kind", ["place", "company"])
def test_a_blas_that_does_not_is_noticed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """One unit in the last place, by the place in the batch or by the number of models."""
    exact = torch.bmm

    def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = exact(a, b)
        if kind == "place":
            out[1, 0, 0] = torch.nextafter(out[1, 0, 0], torch.tensor(math.inf))
        elif len(a) == 3:
            out[2, -1, -1] = torch.nextafter(out[2, -1, -1], torch.tensor(math.inf))
        return out

    monkeypatch.setattr(torch, "bmm", bmm)
    assert not keeps_models_apart(CPU)


def test_the_check_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    keeps_models_apart(CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_conditions_name_all_that_the_numbers_depend_on() -> None:
    found = conditions(CPU, ["vmap", "native", "vmap"], "float64", 3)
    assert set(found) == {
        "fasttrain_version",
        "torch_version",
        "numpy_version",
        "h5py_version",
        "scikit_learn_version",
        "python_version",
        "platform",
        "device",
        "device_name",
        "triton_version",
        "threads",
        "backend",
        "variant_backends",
        "precision",
        "tf32",
        "generator",
        "generator_digest",
        "bitwise_independent",
    }
    expected = {
        "fasttrain_version": fasttrain.__version__,
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "device": "cpu",
        "threads": 3,
        "backend": "native,vmap",
        "variant_backends": "vmap,native,vmap",
        "precision": "float64",
        "tf32": 0,
        "generator": VERSION,
        "generator_digest": generator_digest(),
        "bitwise_independent": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert {name for name, value in found.items() if not value} == {"tf32", "triton_version"}
    assert conditions(CPU, ["loop"], "float32", 1)["precision"] == "float32"
    on_a_gpu = conditions(CPU, ["triton"], "tf32", 1)
    assert (on_a_gpu["tf32"], on_a_gpu["triton_version"]) == (1, version("triton"))


@pytest.mark.parametrize(("backends", "expected"), [(["native", "triton"], 1), (["triton", "vmap"], 0)])
def test_only_products_of_torch_leave_independence_to_a_library(
    monkeypatch, backends: list[str], expected: int
) -> None:
    monkeypatch.setattr(machine, "keeps_models_apart", lambda device: False)
    assert conditions(CPU, backends, "float32", 1)["bitwise_independent"] == expected


def test_conditions_are_plain_values() -> None:
    """They become attributes of the file and JSON."""
    assert {type(value) for value in conditions(CPU, ["loop"], "float32", 1).values()} <= {str, int, float}
