"""Small files of data in every format, as their original writers make them."""

import gzip
import struct
from pathlib import Path

import numpy as np


def idx_bytes(values: np.ndarray) -> bytes:
    """An IDX file of bytes: magic number, sizes, values."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.astype(np.uint8).tobytes()


def write_idx(path: Path, values: np.ndarray) -> None:
    data = idx_bytes(values)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def cifar_bytes(x: np.ndarray, *labels: np.ndarray) -> bytes:
    """CIFAR records: the label, or the coarse and the fine one, then 3 x 1024 pixels."""
    return b"".join(bytes([*(int(y[i]) for y in labels)]) + x[i].astype(np.uint8).tobytes() for i in range(len(x)))


def images(rng: np.random.Generator, count: int, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(rng: np.random.Generator, count: int, classes: int) -> np.ndarray:
    """Every class at least once."""
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    return rng.permutation(y)
