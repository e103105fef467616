import itertools

import pytest
import torch
from torch.nn import functional as F

from fasttrain.activations import ACTIVATIONS
from fasttrain.kernels import reference
from fasttrain.kernels.reference import cross_entropy, strictly_right

INF, NAN = torch.inf, torch.nan


def one_hot(y: torch.Tensor, classes: int, dtype: torch.dtype) -> torch.Tensor:
    return F.one_hot(y, classes).to(dtype)


def drawn(classes: int, scale: float, count: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn(count, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_cross_entropy_is_that_of_torch_in_float64(classes: int, scale: float) -> None:
    """Both round a sum over the classes and a few operations on numbers of the size of the logits."""
    logits, y = drawn(classes, scale)
    found = cross_entropy(logits, one_hot(y, classes, torch.float64))
    expected = F.cross_entropy(logits, y, reduction="none")
    size = logits.abs().amax(1) + torch.log(torch.tensor(float(classes)))
    bound = (classes + 8) * torch.finfo(torch.float64).eps * size
    assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_cross_entropy_in_float32_is_as_exact_as_that_of_torch(classes: int, scale: float) -> None:
    logits, y = drawn(classes, scale)
    single = logits.float()
    exact = F.cross_entropy(single.double(), y, reduction="none")
    own = (cross_entropy(single, one_hot(y, classes, torch.float32)).double() - exact).abs()
    torchs = (F.cross_entropy(single, y, reduction="none").double() - exact).abs()
    assert own.max() <= 2 * torchs.max()
    assert own.mean() <= 2 * torchs.mean()


@pytest.mark.parametrize("classes", [2, 10])
def test_the_gradient_is_that_of_torch(classes: int) -> None:
    logits, y = drawn(classes, 3.0)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    cross_entropy(ours, one_hot(y, classes, torch.float64)).sum().backward()
    F.cross_entropy(theirs, y, reduction="sum").backward()
    bound = (classes + 8) * torch.finfo(torch.float64).eps * (1 + logits.abs().amax())
    assert ((ours.grad - theirs.grad).abs() <= bound).all()


@pytest.mark.parametrize(
    "logits", [[NAN, 0.0, 1.0], [0.0, NAN, 1.0], [0.0, 1.0, NAN], [0.0, INF, 1.0], [INF, 0.0, 1.0]]
)
@pytest.mark.parametrize("label", [0, 1, 2])
def test_cross_entropy_without_a_value_is_nan(logits: list[float], label: int) -> None:
    found = cross_entropy(torch.tensor(logits), one_hot(torch.tensor(label), 3, torch.float32))
    assert torch.isnan(found)


def test_cross_entropy_with_a_logit_of_minus_infinity() -> None:
    """At the label, the loss is infinite; elsewhere, it is 0 times infinity."""
    logits = torch.tensor([-INF, 0.0, 1.0])
    assert torch.isnan(cross_entropy(logits, torch.tensor([0.0, 0.0, 1.0])))
    assert cross_entropy(logits, torch.tensor([1.0, 0.0, 0.0])) == INF


def test_extreme_but_finite_logits_have_a_finite_loss() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 1e30], [80.0, 0.0, 0.0]], dtype=torch.float64)
    found = cross_entropy(logits, one_hot(torch.tensor([1, 0, 0]), 3, torch.float64))
    assert found[:2].tolist() == [2e4, 2e30]
    assert found[2] == F.cross_entropy(logits[2], torch.tensor(0))


def test_leading_dimensions_are_kept_apart() -> None:
    logits, y = drawn(7, 1.0, count=60)
    onehot = one_hot(y, 7, torch.float64)
    shaped = cross_entropy(logits.view(3, 4, 5, 7), onehot.view(3, 4, 5, 7))
    assert torch.equal(shaped, cross_entropy(logits, onehot).view(3, 4, 5))
    right = strictly_right(logits.view(3, 4, 5, 7), onehot.view(3, 4, 5, 7))
    assert torch.equal(right, strictly_right(logits, onehot).view(3, 4, 5))


def right_in_python(logits: tuple[float, ...], label: int) -> bool:
    """The definition: comparisons with NaN are false."""
    return all(logits[label] > other for k, other in enumerate(logits) if k != label)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_strictly_right_is_the_definition_over_all_special_values(classes: int, dtype: torch.dtype) -> None:
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    values = [-INF, -largest, -1.0, -0.0, 0.0, tiny, 1.0, largest, INF, NAN]
    if classes == 4:
        values = [-INF, -0.0, 0.0, largest, INF, NAN]
    cases = list(itertools.product(values, repeat=classes))
    logits = torch.tensor(cases, dtype=dtype)
    exact = [tuple(row) for row in logits.tolist()]
    for label in range(classes):
        onehot = one_hot(torch.full((len(cases),), label), classes, dtype)
        expected = [right_in_python(row, label) for row in exact]
        assert strictly_right(logits, onehot).tolist() == expected
        assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_unit_in_the_last_place_decides(dtype: torch.dtype) -> None:
    one = torch.tensor(1.0, dtype=dtype)
    above = torch.nextafter(one, torch.tensor(2.0, dtype=dtype))
    onehot = torch.tensor([1.0, 0.0], dtype=dtype)
    assert strictly_right(torch.stack([above, one]), onehot)
    assert not strictly_right(torch.stack([one, one]), onehot)
    assert not strictly_right(torch.stack([one, above]), onehot)


def test_under_vmap_both_are_the_same() -> None:
    logits, y = drawn(5, 2.0, count=40)
    onehot = one_hot(y, 5, torch.float64)
    models, onehots = logits.view(4, 10, 5), onehot.view(4, 10, 5)
    assert torch.equal(torch.func.vmap(cross_entropy)(models, onehots), cross_entropy(models, onehots))
    assert torch.equal(torch.func.vmap(strictly_right)(models, onehots), strictly_right(models, onehots))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# A handful of roundings of a number of size one; the derivatives themselves are of that size.
ROUNDING = 32 * 2.0**-52


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_derivatives_are_torchs(name: str) -> None:
    z = torch.cat([torch.linspace(-9, 9, 400, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    z.requires_grad_()
    expected = getattr(torch.nn, ACTIVATIONS[name].module)()(z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    found = z.detach().clone()
    found_slope = torch.full_like(found, torch.nan)
    reference.activate_(name, found, found_slope)
    assert relative(found, expected.detach()) <= ROUNDING
    assert relative(found_slope, slope) <= ROUNDING


def test_every_activation_has_a_derivative_here() -> None:
    assert set(reference.ACTIVATIONS) == set(ACTIVATIONS)


def test_head_and_linear_gradients_are_autograds() -> None:
    rng = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x, w, b = draw(3, 7, 5), draw(3, 4, 5).requires_grad_(), draw(3, 4).requires_grad_()
    x.requires_grad_()
    onehot = torch.eye(4, dtype=torch.float64)[torch.randint(4, (3, 7), generator=rng)]
    weight = torch.rand(3, 7, generator=rng, dtype=torch.float64)
    out = reference.linear(x, w, b)
    torch.testing.assert_close(out, torch.einsum("ebi,eoi->ebo", x, w) + b[:, None], rtol=0, atol=ROUNDING * 16)
    assert relative(reference.logits(x, w, b).detach(), out.detach().mT) <= ROUNDING
    loss = (reference.cross_entropy(out, onehot) * weight).sum(-1)
    expected = torch.autograd.grad(loss.sum(), (w, b, x))
    with torch.no_grad():
        losses, delta = reference.head(out.mT, onehot.mT, weight)
        grads = torch.full_like(w, NAN), torch.full_like(b, NAN)
        reference.linear_gradient(delta, x, *grads)
    assert relative(losses, loss.detach()) <= ROUNDING
    assert relative(grads[0], expected[0]) <= ROUNDING
    assert relative(grads[1], expected[1]) <= ROUNDING
    assert relative(torch.bmm(delta.mT, w.detach()), expected[2]) <= ROUNDING
    held = draw(3, 4, 5), draw(3, 4)
    added = held[0].clone(), held[1].clone()
    reference.linear_gradient(delta, x.detach(), *added, add=True)
    assert relative(added[0], held[0] + expected[0]) <= ROUNDING
    assert relative(added[1], held[1] + expected[1]) <= ROUNDING
