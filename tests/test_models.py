import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from fasttrain import UserError
from fasttrain.activations import ACTIVATIONS
from fasttrain.kernels.convolve import METHODS, convolve
from fasttrain.models import MLP, build, check, draw_weights, parameter_count, vit
from fasttrain.spec import ScanSpec, Variant

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
        assert parameter_count(one, (features,)) == sum(p.numel() for p in module.parameters())
        drawn = draw_weights(one, (features,), scan_seed=0, seed=0, n=2)
        assert {k: v.shape for k, v in drawn.items()} == {k: tuple(p.shape) for k, p in module.named_parameters()}


def test_absurd_sizes_are_counted_exactly_without_being_built() -> None:
    w = 99_999_999_999
    assert parameter_count(variant(w, 1), (64,)) == 65 * w + (w + 1) * 10
    assert parameter_count(variant(w, 3), (64,)) == 65 * w + 2 * (w + 1) * w + (w + 1) * 10
    assert parameter_count(variant(4, 10**18), (64,)) == 65 * 4 + (10**18 - 1) * 20 + 50


def test_the_linear_classifier_ignores_width_and_activation() -> None:
    for width, activation in ((0, "none"), (7, "relu"), (10**12, "tanh")):
        one = variant(width, 0, activation)
        assert parameter_count(one, (64,)) == 650
        drawn = draw_weights(one, (64,), scan_seed=0, seed=1, n=30)
        reference = draw_weights(variant(0, 0, "none"), (64,), scan_seed=0, seed=1, n=30)
        assert drawn.keys() == reference.keys() == {"layers.0.weight", "layers.0.bias"}
        assert all(np.array_equal(drawn[name], reference[name]) for name in drawn)


def expected_gain(activation: str) -> float:
    """As documented: He for the ReLU-like, LeCun for the others and the linear classifier."""
    return math.sqrt(2) if activation in ("relu", "leaky_relu", "gelu", "silu") else 1.0


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "none"])
def test_initial_weights_are_normal_with_the_gain_over_the_root_of_fan_in(activation: str) -> None:
    one = variant(90, 0 if activation == "none" else 2, activation)
    drawn = draw_weights(one, (70,), scan_seed=0, seed=0, n=50)
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
        return draw_weights(variant(40, 3, classes=40), (40,), scan_seed=scan_seed, seed=seed, n=n)

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
    weights = draw_weights(one, (9,), scan_seed=0, seed=0, n=20)
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


IMAGES = [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 5, 7)]


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize(
    "fields",
    [{"arch": "cnn"}, {"arch": "cnn", "norm": "batch"}, {"arch": "vit"}, {"arch": "vit", "patch": 1, "heads": 2}],
)
def test_families_are_counted_as_torch_counts_them(fields: dict, shape: tuple[int, ...]) -> None:
    for one in ScanSpec(widths="2,6,16", depths="1,2,5", **fields).variants(7):
        for batched in (False, True):
            module = build(one, shape, batched=batched)
            assert parameter_count(one, shape) == sum(p.numel() for p in module.parameters())
            drawn = draw_weights(one, shape, scan_seed=0, seed=0, n=2)
            assert {k: v.shape for k, v in drawn.items()} == {k: tuple(p.shape) for k, p in module.named_parameters()}
            assert module(torch.zeros(3, *shape)).shape == (3, 7)


def test_absurd_depths_of_families_cost_no_memory() -> None:
    for arch in ("cnn", "vit"):
        (one,), (two,) = (ScanSpec(arch=arch, widths=4, depths=d).variants(10) for d in (10**9, 1))
        (three,) = ScanSpec(arch=arch, widths=4, depths=2).variants(10)
        block = parameter_count(three, (1, 8, 8)) - parameter_count(two, (1, 8, 8))
        assert parameter_count(one, (1, 8, 8)) == parameter_count(two, (1, 8, 8)) + (10**9 - 1) * block


@pytest.mark.parametrize(
    ("shape", "side"), [((1, 8, 8), 2), ((1, 28, 28), 7), ((3, 32, 32), 8), ((1, 5, 5), 1), ((1, 3, 3), 1)]
)
def test_the_patches_of_vit_are_the_largest_with_four_along_a_side(shape: tuple[int, ...], side: int) -> None:
    (one,) = ScanSpec(arch="vit", widths=4).variants(10)
    assert vit.patch_side(one, shape) == side


def test_vit_cuts_an_image_into_patches_and_attends_by_head() -> None:
    """By hand: patches, embedding and positions, one block, norms, mean and head."""
    (one,) = ScanSpec(arch="vit", widths=6, heads=3, patch=2, activation="gelu").variants(4)
    module = build(one, (2, 4, 6)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = {name: value.detach() for name, value in module.named_parameters()}

    def norm(z: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(z, (6,), p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(z: torch.Tensor, name: str) -> torch.Tensor:
        return z @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    patches = [x[:, :, i : i + 2, j : j + 2].reshape(3, -1) for i in (0, 2) for j in (0, 2, 4)]
    z = linear(torch.stack(patches, 1), "embedding") + p["positions"]
    q, k, v = linear(norm(z, "blocks.0.norm1"), "blocks.0.qkv").split(6, -1)
    heads = [
        torch.softmax(q[..., s] @ k[..., s].mT / 2**0.5, -1) @ v[..., s]
        for s in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    z = z + linear(torch.cat(heads, -1), "blocks.0.out")
    up = torch.nn.functional.gelu(linear(norm(z, "blocks.0.norm2"), "blocks.0.up"))
    z = z + linear(up, "blocks.0.down")
    expected = linear(norm(z, "norm").mean(1), "head")
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("channels", [1, 5])
def test_batched_convolutions_are_torchs_one_by_one(channels: int, how: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, channels, 6, 5, dtype=torch.float64, generator=rng)
    w, b = torch.randn(3, 2, channels, 3, 3, generator=rng).double(), torch.randn(3, 2, generator=rng).double()
    pull = torch.randn(3, 4, 2, 6, 5, generator=rng).double()

    def value(x, w, b, pull):
        out = convolve(x, w, b, how)
        return (out * pull).sum(), out

    grads, (_, out) = torch.func.vmap(torch.func.grad_and_value(value, argnums=(0, 1, 2), has_aux=True))(x, w, b, pull)
    for k in range(3):
        leaves = [t[k].clone().requires_grad_() for t in (x, w, b)]
        one = torch.nn.functional.conv2d(*leaves, padding=1)
        torch.testing.assert_close(out[k], one, rtol=1e-13, atol=1e-13)
        for found, expected in zip(grads, torch.autograd.grad((one * pull[k]).sum(), leaves), strict=True):
            torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-12)


def test_convolutions_in_the_loop_give_the_same_bits_in_any_company() -> None:
    rng = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(9, 5, 7, 8, 8, generator=rng), torch.randn(9, 3, 7, 3, 3, generator=rng), torch.zeros(9, 3)
    whole = torch.ops.fasttrain.convolve(x, w, b)
    order = [8, 2, 5]
    assert torch.equal(torch.ops.fasttrain.convolve(x[order], w[order], b[order]), whole[order])


@pytest.mark.parametrize(
    ("fields", "shape", "said"),
    [
        ({"arch": "cnn"}, (64,), "needs images"),
        ({"arch": "vit"}, (64,), "needs images"),
        ({"arch": "vit", "patch": 3}, (1, 8, 8), "does not divide the 8 x 8"),
    ],
)
def test_what_does_not_fit_the_images_is_said(fields: dict, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(ScanSpec(widths=4, **fields).variants(10)[0], shape)
