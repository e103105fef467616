"""Multilayer perceptrons with one width for all hidden layers; depth 0 is the linear classifier."""

import itertools

import numpy as np
import torch

from fasttrain.activations import ACTIVATIONS
from fasttrain.sampling import Purpose, generator
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
    """Inputs [..., I] to logits [..., C]; the weights are not drawn, see ``draw_weights``."""

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


def draw_weights(variant: Variant, features: int, *, scan_seed: int, seed: int, n: int) -> dict[str, np.ndarray]:
    """Initial parameters of one run, float64, by parameter name.

    Weights are N(0, gain^2 / fan_in) with the gain of the activation (He et al. 2015 for the ReLU-like ones; 1
    otherwise and for the linear classifier), biases are zero. The last layer takes the same gain as the others.
    """
    rng = generator(scan_seed, seed, n, Purpose.WEIGHTS)
    gain = 1.0 if variant.depth == 0 else ACTIVATIONS[variant.activation].gain
    out: dict[str, np.ndarray] = {}
    for layer, (fan_in, fan_out) in enumerate(layer_sizes(variant, features)):
        out[f"layers.{layer}.weight"] = rng.standard_normal((fan_out, fan_in)) * (gain / fan_in**0.5)
        out[f"layers.{layer}.bias"] = np.zeros(fan_out)
    return out
