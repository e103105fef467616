"""Coverage-guided fuzzing of what reads files in Python (atheris, which is no dependency: ``pip install atheris``).

``python -m benchmarks.fuzzing TARGET [options of libFuzzer]``, such as ``csv -max_total_time=120``. Any exception but a
``UserError`` is a finding, and so is a file that takes more than ``-timeout`` seconds or ``-rss_limit_mb``.
"""

import contextlib
import gzip
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["fasttrain"], enable_loader_override=False):
    from fasttrain import UserError
    from fasttrain.checkpoints import checkpoint_path, kept
    from fasttrain.data.files import read
    from fasttrain.journal import journal_path, read_commits
    from fasttrain.spec import ScanSpec, read_toml

_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz"))


def _data(name: str) -> Callable[[bytes], None]:
    """A data set in a file of this name."""

    def one(contents: bytes) -> None:
        path = _FOLDER / name
        path.write_bytes(contents)
        read(str(path))

    return one


def _idx(contents: bytes) -> None:
    """IDX images and labels, split at the first byte's place, plain or compressed."""
    at = 1 + contents[0] if contents else 0
    for name, part in (("images-idx3-ubyte", contents[1:at]), ("labels-idx1-ubyte", contents[at:])):
        (_FOLDER / name).write_bytes(part)
        (_FOLDER / f"{name}.gz").write_bytes(gzip.compress(part, 1))
    for ending in ("", ".gz"):
        with contextlib.suppress(UserError):
            read(str(_FOLDER / f"images-idx3-ubyte{ending}"))


def _spec(contents: bytes) -> None:
    """A spec as JSON, and as TOML."""
    text = contents.decode("utf-8", "surrogateescape")
    path = _FOLDER / "spec.toml"
    path.write_bytes(contents)
    with contextlib.suppress(UserError):
        ScanSpec(**read_toml(path)).variants(10)
    ScanSpec.from_json(text).variants(10)


def _lines(contents: bytes) -> None:
    """Journals and checkpoints, with checksums that are right."""
    out = b""
    for line in contents.split(b"\n"):
        out += b"%08x %b\n" % (zlib.crc32(line), line)
    path = _FOLDER / "emc.h5"
    journal_path(path).write_bytes(out)
    read_commits(path)
    checkpoint_path(path).write_bytes(out)
    kept(path, "mine")


_IDX_SEED = b"\x60" + b"\0\0\x08\x03" + b"\0\0\0\x02\0\0\0\x02\0\0\0\x02" + bytes(8) + b"\0\0\x08\x01\0\0\0\x02\0\x01"
TARGETS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "csv": (_data("data.csv"), b"a,b,y\n1,2,0\n3,x,1\n5,6,0\n"),
    "npz": (_data("data.npz"), b""),
    "cifar": (_data("data.bin"), bytes(2 * 3073)),
    "idx": (_idx, _IDX_SEED),
    "spec": (_spec, json.dumps({"widths": "2^3:2^6", "lr": [0.1], "budget": "3epochs", "labels": "true"}).encode()),
    "lines": (_lines, b'[0,[["checkpoint","mine",1]]]\n[1,[["run",[0,2,0,0],{"step":{"type":"<i8","shape":[]}}]]]'),
}


def main() -> None:
    """Fuzzes the target that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"expected one of {', '.join(TARGETS)}")
    target, seed = TARGETS[sys.argv.pop(1)]
    corpus = _FOLDER / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed)
    if not seed:
        np.savez(corpus / "seed.npz", x=np.zeros((4, 2)), y=np.array([0, 1, 0, 1]))

    def one(contents: bytes) -> None:
        with contextlib.suppress(UserError):
            target(contents)

    os.environ["PYTHONWARNINGS"] = "ignore"
    atheris.Setup([*sys.argv, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
