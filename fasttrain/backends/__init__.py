"""The backends: ways to step all probes of a bucket, behind one contract (``base.Backend``)."""

from typing import Any

from fasttrain.backends.base import Backend, Setting
from fasttrain.backends.loop import LoopBackend
from fasttrain.backends.native import NativeBackend
from fasttrain.backends.vmap import VmapBackend
from fasttrain.spec import Variant

AUTO = "vmap"
"""What ``--backend auto`` takes."""


def make_backend(name: str, setting: Setting, variant: Variant) -> Backend[Any]:
    """The backend of a bucket, given a variant of it; ``name`` is ``"loop"``, ``"vmap"`` or ``"native"``."""
    if name == LoopBackend.name:
        return LoopBackend(setting)
    if name == NativeBackend.name:
        return NativeBackend(setting)
    assert name == VmapBackend.name, name
    return VmapBackend(setting, variant)
