"""The backends: ways to step all probes of a bucket, behind one contract (``base.Backend``)."""

import dataclasses
from typing import Any

from fasttrain import plan
from fasttrain.backends.base import Backend, Setting
from fasttrain.backends.loop import LoopBackend
from fasttrain.backends.native import NativeBackend
from fasttrain.backends.native import unavailable as native_unavailable
from fasttrain.backends.stacked import StackedBackend, carries
from fasttrain.backends.vmap import VmapBackend
from fasttrain.errors import UserError
from fasttrain.spec import ROUNDED, Variant

_TRITON = "triton"  # its module is imported where it may be used: it takes a while, and is not there on every system


def choose(name: str, setting: Setting, variant: Variant) -> str:
    """The backend that trains a variant: the named one, or for ``auto`` by rule.

    ``auto`` on CUDA is ``triton`` where the kernels carry the variant, else ``vmap``. On a CPU it is ``native`` where
    there is a C compiler and the kernels carry the variant (faster at every shape tried), else ``stacked`` where the
    activation has its derivative there, else ``vmap``. Batch normalisation is left to ``loop``.

    Raises:
        UserError: ``native`` or ``triton`` is asked for by name and cannot serve, batch normalisation with another
            backend than ``loop``, or a precision that only ``triton`` has and that it cannot serve.
    """
    on_cuda = setting.device.type == "cuda"
    if variant.norm == "batch":
        if name not in ("auto", LoopBackend.name):
            raise UserError("norm", "batch", f"{name} cannot train batch normalisation; expected backend loop")
        return LoopBackend.name
    reason: str | None = f"the backend is {name}"
    if name == _TRITON or (name == "auto" and on_cuda):
        reason = _triton_unavailable(setting, variant)
        if reason is None:
            return _TRITON
        if name == _TRITON:
            raise UserError("backend", name, f"{reason}; expected auto, stacked, vmap or loop here")
    elif name == "auto":
        reason = "it needs a CUDA device"
    if setting.spec.precision in ROUNDED:
        expected = "only the triton backend rounds its products"
        raise UserError(
            "precision", setting.spec.precision, f"{expected}, and {reason}; expected float32 or float64 here"
        )
    if name in ("auto", NativeBackend.name):
        missing = native_unavailable(setting, variant)
        if missing is None:
            return NativeBackend.name
        if name == NativeBackend.name:
            raise UserError("backend", name, f"{missing}; expected auto, stacked, vmap or loop here")
        return StackedBackend.name if not on_cuda and carries(variant) else VmapBackend.name
    return name


def together(name: str, variant: Variant) -> Variant:
    """The key of a variant's bucket on a backend, as ``choose`` gave it: variants of one key share states."""
    key = plan.bucket(variant)
    if name != _TRITON:
        return key
    from fasttrain.backends.triton import group

    return dataclasses.replace(key, width=group(variant))


def configuration_text(name: str, setting: Setting, variant: Variant) -> str:
    """How a backend launches a variant, where it has a choice; for the record."""
    if name != _TRITON:
        return ""
    from fasttrain.backends.triton import configured

    return str(configured(setting, variant))


def make_backend(name: str, setting: Setting, variant: Variant) -> Backend[Any]:
    """The backend of a bucket, given a variant of it; ``name`` as ``choose`` gave it."""
    if name == LoopBackend.name:
        return LoopBackend(setting)
    if name == NativeBackend.name:
        return NativeBackend(setting)
    if name == StackedBackend.name:
        return StackedBackend(setting, variant)
    if name == _TRITON:
        from fasttrain.backends.triton import TritonBackend

        return TritonBackend(setting, variant)
    assert name == VmapBackend.name, name
    return VmapBackend(setting, variant)


def _triton_unavailable(setting: Setting, variant: Variant) -> str | None:
    try:
        from fasttrain.backends.triton import unavailable
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return unavailable(setting, variant)
