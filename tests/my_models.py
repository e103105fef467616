"""Factories of models of a user's own, good and bad, for test_custom.py and ``--arch my_models:...``."""

import numpy as np
import torch
from torch import nn


def residual(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A perceptron with skips and layer norms."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(torch.Size(in_shape).numel(), width)
            self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
            self.norm = nn.LayerNorm(width)
            self.last = nn.Linear(width, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x.flatten(1))
            for block in self.blocks:
                x = x + torch.relu(block(self.norm(x)))
            return self.last(x)

    return Residual()


def plain_cnn(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_shape[0], width, 3), nn.GELU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(width, classes)
    )


def normed(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes)
    )


def untracked(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    norm = nn.BatchNorm1d(width, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), norm, nn.Linear(width, classes))


def dropped(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Dropout(0.5), nn.Linear(width, classes))


class _Branching(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x.flatten(1))
        return out * 2 if out.detach().abs().sum() < 0 else out


def branching(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _Branching(classes)


class _Counting(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x.flatten(1))


def counting(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _Counting(classes)


def wrong_shape(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes + 1))


def failing(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    raise RuntimeError(f"width {width} is not for me\nand a second line")


def no_module(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> object:
    return 3


def no_parameters(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Flatten()


def exiting(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    raise SystemExit("no")


def elsewhere(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes, device="meta"))


_ONE = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def one_for_all(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _ONE


def seeding(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    torch.manual_seed(0)
    return _linear(classes=classes)


_CALLS = [0]


def growing(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    _CALLS[0] += 1
    return _linear(*[nn.Linear(8, 8) for _ in range(_CALLS[0])], classes=classes)


class _Apply(nn.Module):
    """A linear classifier with something done to its inputs and logits."""

    def __init__(self, classes: int, before=lambda x: x, after=lambda x: x) -> None:
        super().__init__()
        self.linear, self.before, self.after = nn.Linear(64, classes), before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.linear(self.before(x.flatten(1))))


def pair(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _Apply(classes, after=lambda x: (x, 0))


def not_finite(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _Apply(classes, after=lambda x: x * float("nan"))


def overwriting(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _Apply(classes, before=lambda x: x.mul_(2))


def single_only(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _Apply(classes, before=lambda x: x @ torch.eye(64))


class _Recurrent(nn.Module):
    """Its rows are batched with a gradient, and not without one."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.rows, self.head = nn.GRU(8, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows(x[:, 0])[0][:, -1])


def recurrent(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _Recurrent(width, classes)


def _linear(*between: nn.Module, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *between, nn.Linear(8, classes))


def frozen(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    made = _linear(nn.ReLU(), classes=classes)
    made[1].weight.requires_grad_(False)
    return made


def random_buffer(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    made = _linear(classes=classes)
    made.register_buffer("mask", torch.randn(3))
    return made


def numpy_drawn(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    made = _linear(classes=classes)
    with torch.no_grad():
        made[1].bias.copy_(torch.as_tensor(np.random.randn(8)))  # noqa: NPY002
    return made


class _Spare(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(64, classes), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x.flatten(1))


def unused(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _Spare(classes)


def normed_and_dropped(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _linear(nn.BatchNorm1d(8), nn.Dropout(0.5), classes=classes)


class _Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (2.0 if self.training else 1.0)


def doubling(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return _linear(_Doubling(), classes=classes)


def tied(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    """One layer twice, and a schedule computed with torch while it is built."""
    scales = [float(v) for v in torch.linspace(0.5, 1.0, 2)]
    layer = nn.Linear(width, width)
    layers = [nn.Flatten(), nn.Linear(torch.Size(in_shape).numel(), width), layer, nn.Tanh(), layer]
    return nn.Sequential(*layers, nn.Hardtanh(-9 * scales[0], 9 * scales[1]), nn.Linear(width, classes))


def closure(factor: int):
    def made(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
        return residual(factor * width, depth, in_shape, classes)

    return made


def even_only(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    """As of an encoder whose two directions take half of the width each."""
    if width % 2:
        raise ValueError("the width must be even")
    return residual(width, depth, in_shape, classes)


def hundreds(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Widths in steps of 100, up to 700."""
    if width % 100 or width > 700:
        raise ValueError("no such width")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))


def grouped(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Counts fall where the width is a multiple of 5: the convolution then has 5 groups."""
    groups = 1 if width % 5 else 5
    between = nn.Conv2d(width, width, 3, groups=groups)
    return nn.Sequential(nn.Conv2d(in_shape[0], width, 3), between, nn.Flatten(), nn.Linear(16 * width, classes))


def falling(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Counts fall as the width grows."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, max(1, 400 - width)), nn.Linear(max(1, 400 - width), classes))


def lazy(width: int, depth: int, in_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, classes))


NUMBER = 3
