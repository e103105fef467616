"""Multilayer perceptrons with one width for all hidden layers; depth 0 is the linear classifier."""

import itertools

import torch

from fasttrain.activations import ACTIVATIONS
from fasttrain.spec import Variant


def layer_sizes(variant: Variant, features: int) -> list[tuple[int, int]]:
    """(fan_in, fan_out) of each weight matrix, input side first."""
    sizes = [features, *[variant.width] * variant.depth, variant.classes]
    return list(itertools.pairwise(sizes))


def parameter_count(variant: Variant, features: int) -> int:
    """Trained parameters, biases included. Depth counts arithmetically: an absurd one must not cost memory."""
    if variant.depth == 0:
        return (features + 1) * variant.classes
    hidden = (features + 1) * variant.width + (variant.depth - 1) * (variant.width + 1) * variant.width
    return hidden + (variant.width + 1) * variant.classes


class MLP(torch.nn.Module):
    """Inputs [..., I] to logits [..., C]; the weights are not drawn, see ``models.draw_weights``."""

    def __init__(self, variant: Variant, features: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.utils.skip_init(torch.nn.Linear, fan_in, fan_out)
            for fan_in, fan_out in layer_sizes(variant, features)
        )
        self.act = torch.nn.Identity() if variant.depth == 0 else activation(variant.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., C] of inputs [..., I]."""
        *hidden, head = self.layers
        for layer in hidden:
            x = self.act(layer(x))
        return head(x)


def activation(name: str) -> torch.nn.Module:
    """The torch module of an activation."""
    return getattr(torch.nn, ACTIVATIONS[name].module)()
