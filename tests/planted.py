"""Copies of the kernels with a fault put in, to see that a test notices it."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from fasttrain.kernels import drivers

FOLDER = Path(drivers.__file__).parent


def plant(folder: Path, name: str, old: str, new: str) -> ModuleType:
    """The drivers over the tiles with ``old`` replaced by ``new`` in either, as a module of its own."""
    texts = {part: (FOLDER / f"{part}.py").read_text(encoding="utf-8") for part in ("tiles", "drivers")}
    assert any(old in text for text in texts.values()), f"nothing to replace: {old}"
    for part, text in texts.items():
        changed = text.replace(old, new).replace("fasttrain.kernels.tiles", f"{name}_tiles")
        (folder / f"{name}_{part}.py").write_text(changed, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{name}_drivers")
    finally:
        sys.path.remove(str(folder))
