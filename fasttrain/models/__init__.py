"""The model families: width and depth to a module, its parameter count and its initial weights."""

import functools
import math
from typing import Any

import numpy as np
import torch

from fasttrain.activations import ACTIVATIONS
from fasttrain.errors import UserError
from fasttrain.models import cnn, custom, mlp, vit
from fasttrain.models.mlp import MLP
from fasttrain.sampling import Purpose, generator
from fasttrain.spec import ARCHITECTURES, Variant

__all__ = [
    "MLP",
    "build",
    "check",
    "check_images",
    "draw_weights",
    "elementwise_sizes",
    "input_shape",
    "is_perceptron",
    "parameter_count",
    "sample_elements",
    "shaping",
    "try_out",
]

_POSITIONS = 0.02  # standard deviation of the initial positions of vit, as its authors have it


def is_perceptron(variant: Variant) -> bool:
    """Whether it is a multilayer perceptron or the linear classifier, which the fused kernels know."""
    return variant.arch in ("mlp", "linear")


def input_shape(variant: Variant, in_shape: tuple[int, ...]) -> tuple[int, ...]:
    """What the module takes for a sample: all features in a row, or the shape that the data have."""
    return (math.prod(in_shape),) if is_perceptron(variant) else in_shape


def check(variant: Variant, in_shape: tuple[int, ...]) -> None:
    """Whether a family can be built for these inputs.

    Raises:
        UserError: it needs images, or a size that the images or the width do not allow.
    """
    check_images(variant, in_shape)
    if variant.arch != "vit":
        return
    if variant.width % variant.heads:
        raise UserError("heads", variant.heads, f"does not divide the width {variant.width}")
    side = variant.patch or 1
    if in_shape[1] % side or in_shape[2] % side:
        raise UserError("patch", side, f"does not divide the {in_shape[1]} x {in_shape[2]} pixels of an image")


def check_images(variant: Variant, in_shape: tuple[int, ...]) -> None:
    """Whether a family that needs images has them.

    Raises:
        UserError: it has not.
    """
    if variant.arch in ("cnn", "vit") and len(in_shape) != 3:
        raise UserError("arch", variant.arch, f"needs images, and a sample has shape {in_shape}")


def build(variant: Variant, in_shape: tuple[int, ...], *, batched: bool = False) -> torch.nn.Module:
    """The module of a variant, from inputs [B, *input_shape] to logits [B, C]; its weights are not drawn.

    Args:
        variant: what to build.
        in_shape: of a sample of the data, (I,) or (channels, height, width).
        batched: whether it is to be run by vmap, for which convolutions bring a rule of their own.
    """
    if is_perceptron(variant):
        return MLP(variant, math.prod(in_shape))
    if variant.arch == "cnn":
        return cnn.CNN(variant, in_shape, batched)
    if variant.arch == "vit":
        return vit.ViT(variant, in_shape)
    return custom.build(variant, in_shape)


def parameter_count(variant: Variant, in_shape: tuple[int, ...]) -> int:
    """Trained parameters, biases included; counted without building anything but a module of the user's."""
    if is_perceptron(variant):
        return mlp.parameter_count(variant, math.prod(in_shape))
    if variant.arch in _FAMILIES:
        return _FAMILIES[variant.arch].parameter_count(variant, in_shape)
    return sum(p.numel() for p in custom.build(variant, in_shape).parameters())


def sample_elements(variant: Variant, in_shape: tuple[int, ...]) -> int:
    """Numbers that a pass over one sample keeps for the way back, about; for the memory that a scan plans."""
    if is_perceptron(variant):
        return math.prod(in_shape) + 2 * (variant.depth + 1) * max(variant.width, variant.classes)
    if variant.arch in _FAMILIES:
        return math.prod(in_shape) + _FAMILIES[variant.arch].sample_elements(variant, in_shape)
    return custom.sample_elements(custom.build(variant, in_shape), in_shape)


def elementwise_sizes(variant: Variant, in_shape: tuple[int, ...]) -> list[int]:
    """Numbers a sample of each array that something approximated (exp, erf) is applied to elementwise.

    The softmax of the loss is not among them: it goes along the classes. Of a module of the user's, whose insides are
    unknown, one: any number of elements.
    """
    if variant.arch not in ARCHITECTURES:
        return [1]
    if variant.depth == 0 or ACTIVATIONS[variant.activation].exact:
        return []
    if variant.arch in _FAMILIES:
        return _FAMILIES[variant.arch].elementwise_sizes(variant, in_shape)
    return [variant.width]


_FAMILIES = {"cnn": cnn, "vit": vit}


@functools.lru_cache(maxsize=64)
def _skeleton(variant: Variant, in_shape: tuple[int, ...]) -> torch.nn.Module:
    """The module of a built-in family without memory for its weights: names and shapes."""
    with torch.device("meta"):
        return build(variant, in_shape)


def draw_weights(
    variant: Variant, in_shape: tuple[int, ...], *, scan_seed: int, seed: int, n: int
) -> dict[str, np.ndarray]:
    """Initial parameters of one run, float64, by parameter name.

    Weights are N(0, gain^2 / fan_in) times the variant's ``init_scale``, with the gain of the activation (He et al.
    2015 for the ReLU-like ones; 1 otherwise and for the linear classifier), biases are zero. The last layer takes the
    same gain as the others. In vit the gain is 1 except for what goes into the activation; positions are N(0, 0.02^2),
    norms start at one. A module of the user's draws its own, from a generator of torch that is keyed alike.
    """
    if variant.arch not in ARCHITECTURES:
        low, high = generator(scan_seed, seed, n, Purpose.WEIGHTS).integers(0, 2**32, 2).tolist()
        return custom.draw(variant, in_shape, low << 32 | high)
    rng = generator(scan_seed, seed, n, Purpose.WEIGHTS)
    gain = 1.0 if variant.depth == 0 else ACTIVATIONS[variant.activation].gain
    out: dict[str, np.ndarray] = {}
    for name, parameter in _skeleton(shaping(variant), in_shape).named_parameters():
        shape = tuple(parameter.shape)
        if name == "positions":
            out[name] = rng.standard_normal(shape) * (_POSITIONS * variant.init_scale)
        elif len(shape) > 1:
            own = gain if variant.arch != "vit" or name.endswith("up.weight") else 1.0
            out[name] = rng.standard_normal(shape) * (own * variant.init_scale / math.prod(shape[1:]) ** 0.5)
        else:
            out[name] = np.ones(shape) if "norm" in name and name.endswith("weight") else np.zeros(shape)
    return out


# What decides the names and shapes of a module's parameters.
_SHAPING = ("arch", "width", "depth", "activation", "classes", "norm", "heads", "patch")
_IDLE: dict[str, Any] = {"optimizer": "sgd", "lr": 1.0, "momentum": 0.0, "batch_size": 1, "labels": "random"}


def shaping(variant: Variant) -> Variant:
    """The variant with all but what decides its module left at a fixed value."""
    return Variant(**{name: getattr(variant, name) for name in _SHAPING}, **_IDLE)


def try_out(variant: Variant, in_shape: tuple[int, ...], batched: bool, dtype: torch.dtype) -> None:
    """Tries a module of the user's before anything is trained; the built-in families need none of that.

    Args:
        variant: any.
        in_shape: of a sample.
        batched: whether vmap is to train it.
        dtype: of its parameters and inputs then.

    Raises:
        UserError: as ``custom.check``.
    """
    if variant.arch not in ARCHITECTURES:
        custom.check(variant, in_shape, batched, dtype)
