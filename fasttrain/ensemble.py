"""Stacked parameters and optimizer state of many models of one shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_ROW = 64  # elements: rows start on whole vectors and cache lines whatever the parameter count


def capacity(models: int) -> int:
    """Rows that hold so many models: 2, 3, 4, 6, 8, 12, 16, 24, ... and at least 2.

    Few sizes, because every size is traced once. At least 2, because a batched product of one matrix takes another
    code path on a CPU, which gives other bits.
    """
    size = 2
    while size < models:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class Layout:
    """Where each named parameter lies in a row of P elements."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.offsets: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            self.offsets[name] = end
            end += -(-math.prod(shape) // _ROW) * _ROW
        self.size = end

    def views(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters [E, ...] by name as views of rows [E, P]."""
        return {
            name: rows[:, start : start + math.prod(shape)].view(-1, *shape)
            for (name, shape), start in zip(self.shapes.items(), self.offsets.values(), strict=True)
        }

    def pack(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """One row [P] from the named parameters of one model; what lies between them is zero."""
        row = np.zeros(self.size)
        for name, value in values.items():
            start = self.offsets[name]
            row[start : start + value.size] = value.ravel()
        return row


@dataclass(slots=True, eq=False)
class Stack:
    """Rows of parameters, gradients and optimizer state; the rows beyond the models repeat the first one.

    Attributes:
        params: [E, P].
        grads: [E, P], scratch.
        optim: optimizer state, each [E, S] with an S of its own.
    """

    params: torch.Tensor
    grads: torch.Tensor
    optim: list[torch.Tensor]

    @classmethod
    def of(cls, rows: torch.Tensor, sizes: Sequence[int]) -> "Stack":
        """A stack of new models from parameter rows [E, P], without spare rows; optimizer state of these sizes zero."""
        return cls(rows, torch.zeros_like(rows), [rows.new_zeros(len(rows), size) for size in sizes])

    def take(self, positions: Sequence[int]) -> "Stack":
        """The rows at these positions, and spare rows up to ``capacity``."""
        padded = padded_index(positions, self.params.device)
        params = self.params[padded]
        return Stack(params, torch.zeros_like(params), [tensor[padded] for tensor in self.optim])

    def join(self, models: int, other: "Stack", added: int) -> "Stack":
        """The first ``models`` rows of this stack and the first ``added`` of another."""

        def cat(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cat([a[:models], b[:added]])

        optim = [cat(a, b) for a, b in zip(self.optim, other.optim, strict=True)]
        params = cat(self.params, other.params)
        return Stack(params, torch.zeros_like(params), optim).take(range(models + added))


def padded_index(positions: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [capacity]: the positions, then the first one again."""
    spare = capacity(len(positions)) - len(positions)
    return torch.tensor([*positions, *[positions[0]] * spare], device=device)
