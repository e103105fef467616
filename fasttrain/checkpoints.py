"""Runs under way in a file beside the results, from which ``resume`` goes on bit for bit instead of from their start.

``emc.h5.checkpoint`` is replaced whole now and then. It has a line for each run, of the form of the journal's, and
before them one that says of what scan and installation it is: to any other one it means nothing.
"""

import base64
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fasttrain.journal import line_of, parsed, replace_file
from fasttrain.records import Probe, Saved

SUFFIX = ".checkpoint"
_TYPE = re.compile(r"[<|][biuf][1248]")


def checkpoint_path(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that belongs to an HDF5 file."""
    path = Path(path)
    return path.parent / (path.name + SUFFIX)


def keep(path: str | os.PathLike[str], identity: str, runs: Mapping[Probe, Saved]) -> None:
    """Puts runs under way on the disk, in place of those of before.

    Args:
        path: of the HDF5 file.
        identity: of the scan and of what trains it.
        runs: the runs.

    Raises:
        OSError: there is no room; the checkpoint of before is as it was.
    """

    def lines() -> Iterator[bytes]:
        yield line_of(0, [["checkpoint", identity, len(runs)]])
        for number, (probe, saved) in enumerate(runs.items(), 1):
            place = [probe.variant, probe.n, probe.seed, probe.round]
            yield line_of(number, [["run", place, {name: _text(values) for name, values in saved.items()}]])

    replace_file(_unfinished(path), checkpoint_path(path), lines())


def kept(path: str | os.PathLike[str], identity: str) -> dict[Probe, Saved] | None:
    """The runs under way of an HDF5 file; None where there is a checkpoint that cannot be used."""
    try:
        contents = checkpoint_path(path).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError:
        return None
    found: dict[Probe, Saved] = {}
    wanted = -1
    for _, number, operations in parsed(contents):
        match operations:
            case [["checkpoint", str(held), int(count)]] if number == 0 and held == identity:
                wanted = count
            case [["run", [int(variant), int(n), int(seed), int(round_)], dict(arrays)]]:
                try:
                    saved = {str(name): _array(stored) for name, stored in arrays.items()}
                except (ValueError, TypeError):
                    return None
                found[Probe(variant, n, seed, round_)] = saved
            case _:
                return None
    return found if len(found) == wanted else None


def drop(path: str | os.PathLike[str]) -> None:
    """Removes the checkpoint of an HDF5 file, if there is one, and what a kill has left of one."""
    for each in (checkpoint_path(path), _unfinished(path)):
        each.unlink(missing_ok=True)


def _unfinished(path: str | os.PathLike[str]) -> Path:
    target = checkpoint_path(path)
    return target.with_name(f".{target.name[:200]}.next")


def _text(values: np.ndarray) -> dict[str, object]:
    plain = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    if not _TYPE.fullmatch(plain.dtype.str):
        raise TypeError(f"{plain.dtype} has no place in a checkpoint")
    return {"type": plain.dtype.str, "shape": values.shape, "values": base64.b64encode(plain.tobytes()).decode()}


def _array(stored: object) -> np.ndarray:
    match stored:
        case {"type": str(kind), "shape": [*shape], "values": str(text)} if _TYPE.fullmatch(kind):
            contents = base64.b64decode(text, validate=True)
            sizes = [size for size in shape if isinstance(size, int) and size >= 0]
            if len(sizes) == len(shape) and math.prod(sizes) * np.dtype(kind).itemsize == len(contents):
                return np.frombuffer(contents, kind).reshape(sizes).copy()
    raise ValueError("no array")
