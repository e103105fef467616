"""Convolutional networks: width is the number of channels, depth the number of blocks.

A block is a 3x3 convolution with padding 1, batch normalisation if asked for, the activation, and 2x2 max pooling as
long as both sides are at least 2. The mean over the positions that are left and a linear head follow: the plain network
of Nakkiran et al. (2019), with one width for all blocks.
"""

import torch
from torch.nn import functional as F

from fasttrain.kernels.convolve import convolve, method
from fasttrain.models.mlp import activation
from fasttrain.spec import Variant

_SIDE = 3


def parameter_count(variant: Variant, in_shape: tuple[int, ...]) -> int:
    """Trained parameters, biases included."""
    channels, width = in_shape[0], variant.width
    normed = 2 * width if variant.norm == "batch" else 0
    first = (_SIDE**2 * channels + 1) * width + normed
    others = (_SIDE**2 * width + 1) * width + normed
    return first + (variant.depth - 1) * others + (width + 1) * variant.classes


def sizes(variant: Variant, in_shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Height and width of what goes into each block, and of what comes out of the last; at most 64 blocks differ."""
    found = [(in_shape[1], in_shape[2])]
    for _ in range(variant.depth):
        height, width = found[-1]
        if min(height, width) < 2:
            break
        found.append((height // 2, width // 2))
    return found


def elementwise_sizes(variant: Variant, in_shape: tuple[int, ...]) -> list[int]:
    """Numbers a sample that the activation of each block is applied to."""
    return [variant.width * height * width for height, width in sizes(variant, in_shape)]


def sample_elements(variant: Variant, in_shape: tuple[int, ...]) -> int:
    """Numbers that a pass over one sample keeps for the way back, patches included."""
    blocks = sizes(variant, in_shape)
    total, channels = 0, in_shape[0]
    for block in range(min(variant.depth, len(blocks))):
        height, width = blocks[block]
        total += height * width * (_SIDE**2 * channels + 4 * variant.width)
        channels = variant.width
    left = variant.depth - min(variant.depth, len(blocks))
    height, width = blocks[-1]
    return total + left * height * width * (_SIDE**2 + 4) * variant.width


class Convolution(torch.nn.Module):
    """3x3 convolution with padding 1, batched over models by a rule of its own (``kernels.convolve``)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, channels, _SIDE, _SIDE))
        self.bias = torch.nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, H, W] to [B, width, H, W]."""
        return convolve(x, self.weight, self.bias, method(x.device, x.shape[-3]))


class CNN(torch.nn.Module):
    """Images [B, C, H, W] to logits [B, classes]; the weights are not drawn."""

    def __init__(self, variant: Variant, in_shape: tuple[int, ...], batched: bool) -> None:
        super().__init__()
        channels = [in_shape[0], *[variant.width] * variant.depth]
        self.convolutions = torch.nn.ModuleList(
            Convolution(before, variant.width)
            if batched
            else torch.nn.utils.skip_init(torch.nn.Conv2d, before, variant.width, _SIDE, padding=1)
            for before in channels[:-1]
        )
        normed = variant.depth if variant.norm == "batch" else 0
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(variant.width) for _ in range(normed))
        self.act = activation(variant.activation)
        self.head = torch.nn.utils.skip_init(torch.nn.Linear, variant.width, variant.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        for block, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if self.norms:
                x = self.norms[block](x)
            x = self.act(x)
            if min(x.shape[-2:]) >= 2:
                x = F.max_pool2d(x, 2)
        return self.head(x.mean((-2, -1)))
