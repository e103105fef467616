"""Which backend trains a variant: the rules of ``auto``, and no silent fallback."""

import re

import pytest
import torch

from fasttrain import ScanSpec, UserError, backends
from fasttrain.backends import choose, configuration_text, make_backend, together
from fasttrain.backends import triton as triton_backend
from fasttrain.backends.base import Setting
from fasttrain.kernels import native
from fasttrain.plan import bucket

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def chosen(device: torch.device = CPU, **fields: object) -> str:
    spec = ScanSpec(**{"data": "gaussian:7", "backend": "auto", **fields})
    dtype = torch.float64 if spec.precision == "float64" else torch.float32
    return choose(spec.backend, Setting(spec, 7, device, dtype), spec.variants(10)[0])


@pytest.mark.parametrize("fields", [{}, {"depths": 0}, {"activation": "gelu"}, {"precision": "float64"}])
def test_auto_on_a_cpu_is_native(fields: dict) -> None:
    assert chosen(**fields) == "native"


def test_auto_on_a_cpu_without_a_compiler_is_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise native.Unavailable("no compiler")

    monkeypatch.setattr(native, "library", missing)
    assert chosen() == "stacked"
    monkeypatch.setattr(backends, "carries", lambda variant: False)
    assert chosen() == "vmap"
    with pytest.raises(UserError, match="no compiler; expected auto, stacked, vmap or loop here"):
        chosen(backend="native")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "triton"),
        ({"depths": 0, "optimizer": "sgd", "batch_size": "full"}, "triton"),
        ({"precision": "bf16x3"}, "triton"),
        ({"widths": 1024}, "triton"),
        ({"widths": 1025}, "vmap"),
        ({"classes": 1025}, "vmap"),
    ],
)
def test_auto_on_cuda_is_triton_where_the_kernels_carry_the_variant(fields: dict, expected: str) -> None:
    assert chosen(CUDA, **fields) == expected


@pytest.mark.usefixtures("hopper")
def test_what_triton_does_not_carry_is_said_where_it_was_asked_for() -> None:
    with pytest.raises(
        UserError, match="its largest width is 1,024, not 1,025; expected auto, stacked, vmap or loop here"
    ):
        chosen(CUDA, widths=1025, backend="triton")
    with pytest.raises(UserError, match=r"precision=tf32: only the triton backend .* largest width is 1,024"):
        chosen(CUDA, widths=1025, precision="tf32")
    with pytest.raises(UserError, match="the backend is vmap; expected float32 or float64 here"):
        chosen(CUDA, backend="vmap", precision="bf16")


def test_an_old_gpu_and_a_missing_triton_take_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen(CUDA) == "vmap"
    with pytest.raises(UserError, match=r"needs compute capability 8\.0"):
        chosen(CUDA, backend="triton")

    def absent(setting: Setting, variant: object) -> str:
        return "triton cannot be imported (no module)"

    monkeypatch.setattr(backends, "_triton_unavailable", absent)
    assert chosen(CUDA) == "vmap"


@pytest.mark.parametrize("backend", ["auto", "native", "stacked", "vmap", "loop"])
@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
def test_rounded_products_are_an_error_on_a_cpu(backend: str, precision: str) -> None:
    with pytest.raises(UserError, match=f"precision={precision}: only the triton backend"):
        chosen(backend=backend, precision=precision)


def test_triton_on_a_cpu_is_one_clear_line() -> None:
    with pytest.raises(UserError) as caught:
        chosen(backend="triton")
    assert str(caught.value) == "backend=triton: it needs a CUDA device; expected auto, stacked, vmap or loop here"


def test_only_triton_puts_widths_together_and_records_a_configuration(hopper: None) -> None:
    spec = ScanSpec(widths=(3, 16, 17, 1024), data="gaussian:7", optimizer="sgd")
    setting = Setting(spec, 7, CUDA, torch.float32)
    variants = spec.variants(10)
    for name in ("loop", "vmap", "stacked", "native"):
        assert [together(name, variant) for variant in variants] == [bucket(variant) for variant in variants]
        assert configuration_text(name, setting, variants[0]) == ""
    assert [together("triton", variant).width for variant in variants] == [16, 16, 32, 1024]
    texts = [configuration_text("triton", setting, variant) for variant in variants]
    assert texts[0] == texts[1] != texts[2]
    assert re.match(r"(whole|stages) BB=\d+ BH=16 ", texts[0])
    assert re.match(r"stages BB=\d+ BH=64 ", texts[3])
    backend = make_backend("triton", setting, together("triton", variants[0]))
    assert (backend.name, backend.checks_a_turn) == ("triton", 4)
    assert set(triton_backend.PRODUCTS) == {"auto", "float32", "float64", "bf16x3", "tf32", "bf16"}
