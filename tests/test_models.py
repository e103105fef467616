import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from fasttrain.activations import ACTIVATIONS
from fasttrain.models import MLP, draw_weights, parameter_count
from fasttrain.spec import Variant

# All draws are keyed, so that a test gives the same number every time; see test_sampling.py.
P_LEAST = 1e-4


def variant(width: int = 8, depth: int = 1, activation: str = "relu", classes: int = 10) -> Variant:
    return Variant(
        arch="mlp",
        width=width,
        depth=depth,
        activation=activation,
        optimizer="adam",
        lr=0.01,
        momentum=0.0,
        batch_size=64,
        labels="random",
        classes=classes,
    )


@pytest.mark.parametrize("features", [1, 64, 101])
def test_parameter_count_is_that_of_the_module(features: int) -> None:
    for width, depth, classes in itertools.product((1, 2, 5, 17, 64), (0, 1, 2, 3, 7), (2, 10, 33)):
        one = variant(width, depth, classes=classes)
        module = MLP(one, features)
        assert parameter_count(one, features) == sum(p.numel() for p in module.parameters())
        drawn = draw_weights(one, features, scan_seed=0, seed=0, n=2)
        assert {k: v.shape for k, v in drawn.items()} == {k: tuple(p.shape) for k, p in module.named_parameters()}


def test_absurd_sizes_are_counted_exactly_without_being_built() -> None:
    w = 99_999_999_999
    assert parameter_count(variant(w, 1), 64) == 65 * w + (w + 1) * 10
    assert parameter_count(variant(w, 3), 64) == 65 * w + 2 * (w + 1) * w + (w + 1) * 10
    assert parameter_count(variant(4, 10**18), 64) == 65 * 4 + (10**18 - 1) * 20 + 50


def test_the_linear_classifier_ignores_width_and_activation() -> None:
    for width, activation in ((0, "none"), (7, "relu"), (10**12, "tanh")):
        one = variant(width, 0, activation)
        assert parameter_count(one, 64) == 650
        drawn = draw_weights(one, 64, scan_seed=0, seed=1, n=30)
        reference = draw_weights(variant(0, 0, "none"), 64, scan_seed=0, seed=1, n=30)
        assert drawn.keys() == reference.keys() == {"layers.0.weight", "layers.0.bias"}
        assert all(np.array_equal(drawn[name], reference[name]) for name in drawn)


def expected_gain(activation: str) -> float:
    """As documented: He for the ReLU-like, LeCun for the others and the linear classifier."""
    return math.sqrt(2) if activation in ("relu", "leaky_relu", "gelu", "silu") else 1.0


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "none"])
def test_initial_weights_are_normal_with_the_gain_over_the_root_of_fan_in(activation: str) -> None:
    one = variant(90, 0 if activation == "none" else 2, activation)
    drawn = draw_weights(one, 70, scan_seed=0, seed=0, n=50)
    for layer, weight in enumerate(w for name, w in drawn.items() if name.endswith("weight")):
        bias = drawn[f"layers.{layer}.bias"]
        assert not bias.any()
        unit = weight.ravel() * math.sqrt(weight.shape[1]) / expected_gain(activation)
        # The sum of squares of N(0, 1) is chi-square: both ends.
        assert P_LEAST < stats.chi2.sf((unit**2).sum(), unit.size) < 1 - P_LEAST
        assert abs(unit.mean()) * math.sqrt(unit.size) < stats.norm.isf(P_LEAST / 2)
        assert stats.kstest(unit, "norm").pvalue > P_LEAST


def test_layers_seeds_and_n_are_independent_and_drawing_again_gives_the_same() -> None:
    def weights(seed: int, n: int, scan_seed: int = 0) -> dict[str, np.ndarray]:
        return draw_weights(variant(40, 3, classes=40), 40, scan_seed=scan_seed, seed=seed, n=n)

    first, again = weights(0, 50), weights(0, 50)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    flat = [
        w.ravel()
        for drawn in (first, weights(1, 50), weights(0, 51), weights(0, 50, scan_seed=1))
        for name, w in drawn.items()
        if name.endswith("weight")
    ]
    correlation = np.corrcoef(flat)[np.triu_indices(len(flat), 1)]
    assert np.abs(correlation).max() * 40 < stats.norm.isf(P_LEAST / 2 / len(correlation))


NUMPY_ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "gelu": lambda x: x * (1 + special.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "identity": lambda x: x,
}
STEEPEST = 1.13  # the largest slope of any of them (gelu)


def forward(
    weights: dict[str, np.ndarray], depth: int, activation: str, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits by hand, and how far rounding can put either of two evaluations off (Higham 2002, ch. 3)."""
    eps = np.finfo(float).eps
    error = np.zeros_like(x)
    for layer in range(depth + 1):
        w, b = weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"]
        error = error @ np.abs(w).T + (w.shape[1] + 1) * eps * (np.abs(x) @ np.abs(w).T + np.abs(b))
        x = x @ w.T + b
        if layer < depth:
            error = STEEPEST * error + 8 * eps * (1 + np.abs(x))
            x = NUMPY_ACTIVATIONS[activation](x)
    return x, 2 * error


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_is_that_of_numpy(activation: str, depth: int) -> None:
    one = variant(13, depth, activation, classes=5)
    weights = draw_weights(one, 9, scan_seed=0, seed=0, n=20)
    rng = np.random.default_rng(0)
    for name in weights:
        if name.endswith("bias"):
            weights[name] = rng.standard_normal(weights[name].shape)
    x = rng.standard_normal((4, 6, 9))
    module = MLP(one, 9).double()
    module.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    expected, bound = forward(weights, depth, activation, x)
    assert (np.abs(module(torch.as_tensor(x)).detach().numpy() - expected) <= bound).all()
    assert bound.max() < 1e-10  # the bound itself leaves no room for another activation
