"""The backends: ways to step all probes of a bucket, behind one contract (``base.Backend``)."""

from typing import Any

from fasttrain.backends.base import Backend, Setting
from fasttrain.backends.loop import LoopBackend
from fasttrain.backends.native import NativeBackend, unavailable
from fasttrain.backends.stacked import StackedBackend, carries
from fasttrain.backends.vmap import VmapBackend
from fasttrain.errors import UserError
from fasttrain.spec import Variant


def choose(name: str, setting: Setting, variant: Variant) -> str:
    """The backend that trains a variant: the named one, or for ``auto`` by rule.

    ``auto`` on a CPU is ``native`` where there is a C compiler and the kernels carry the variant (faster at every shape
    tried), else ``stacked`` where the activation has its derivative there. On other devices it is ``vmap``.

    Raises:
        UserError: ``native`` is asked for by name and cannot serve.
    """
    if name not in ("auto", NativeBackend.name):
        return name
    reason = unavailable(setting, variant)
    if reason is None:
        return NativeBackend.name
    if name == NativeBackend.name:
        raise UserError("backend", name, f"{reason}; expected auto, stacked, vmap or loop here")
    return StackedBackend.name if setting.device.type == "cpu" and carries(variant) else VmapBackend.name


def make_backend(name: str, setting: Setting, variant: Variant) -> Backend[Any]:
    """The backend of a bucket, given a variant of it; ``name`` as ``choose`` gave it."""
    if name == LoopBackend.name:
        return LoopBackend(setting)
    if name == NativeBackend.name:
        return NativeBackend(setting)
    if name == StackedBackend.name:
        return StackedBackend(setting, variant)
    assert name == VmapBackend.name, name
    return VmapBackend(setting, variant)
