import pytest
import torch

from fasttrain.optim import OPTIMIZERS

STEPS = 300
INSERTED = 120  # step of the whole at which the last model comes
PARAMS = 11
EPS = torch.finfo(torch.float64).eps
# Models differ in rate, momentum and size of their gradients: the last but one is where epsilon matters.
LR = [0.1, 0.003, 1.0, 0.01, 0.02]
MOMENTUM = [0.9, 0.0, 0.5, 0.99, 0.9]
SCALE = [1.0, 10.0, 1.0, 1e-8, 1.0]
BEGINS = [0, 0, 0, 0, INSERTED]


def gradients() -> torch.Tensor:
    """Fixed gradients [STEPS, E, P]: those of a model would amplify rounding by its own dynamics."""
    drawn = torch.randn(STEPS, len(LR), PARAMS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return drawn * torch.tensor(SCALE, dtype=torch.float64)[:, None]


def initial() -> torch.Tensor:
    return torch.randn(len(LR), PARAMS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(optimizer, params, grads, state, row) -> None:
    into = optimizer.accumulator(state, row)
    if into is not None:
        into.add_(grads)
        grads.fill_(torch.nan)
    optimizer.update(params, grads, state, row)


def stacked(name: str, grads: torch.Tensor, block: int = 50) -> torch.Tensor:
    """All models at once, coefficients made a block of steps ahead, the last model inserted on the way."""
    optimizer = OPTIMIZERS[name]
    params, state = torch.empty(0, PARAMS, dtype=torch.float64), []
    first = 0
    while first < STEPS:
        last = min(first + block, STEPS, *(b for b in BEGINS if b > first))
        models = [e for e, begin in enumerate(BEGINS) if begin <= first]
        joined = initial()[models]
        joined[: len(params)] = params
        grown = []
        for k in range(len(optimizer.state_names)):
            grown.append(torch.zeros_like(joined))
            if state:
                grown[k][: len(params)] = state[k]
        params, state = joined, grown
        steps = torch.tensor([[t - BEGINS[e] + 1 for e in models] for t in range(first, last)])
        lr = torch.tensor(LR, dtype=torch.float64)[models]
        momentum = torch.tensor(MOMENTUM, dtype=torch.float64)[models]
        tables = optimizer.tables(steps, lr, momentum)
        assert all(t.dtype == torch.float64 and t.shape == steps.shape for t in tables)
        for k, t in enumerate(range(first, last)):
            row = [table[k][:, None] for table in tables]
            step(optimizer, params, grads[t, models].clone(), state, row)
        first = last
    return params


def alone(name: str, grads: torch.Tensor, model: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One model with torch.optim: its parameters, and the sum of the sizes of its updates."""
    p = torch.nn.Parameter(initial()[model].clone())
    if name == "sgd":
        optimizer = torch.optim.SGD([p], lr=LR[model], momentum=MOMENTUM[model])
    else:
        optimizer = torch.optim.Adam([p], lr=LR[model])
    path = torch.zeros(PARAMS, dtype=torch.float64)
    for t in range(BEGINS[model], STEPS):
        before = p.detach().clone()
        p.grad = grads[t, model].clone()
        optimizer.step()
        path += (p.detach() - before).abs()
    return p.detach(), path


def bound(name: str, model: int, path: torch.Tensor) -> torch.Tensor:
    """How far rounding in float64 can put two evaluations of one update rule apart.

    Each step rounds the parameter once, by half an epsilon of its size. It takes an update with a relative
    error of a few epsilon, together that share of the way gone. In a decaying sum (buffer, moments) the
    errors of the terms weigh 1 / (1 - decay) at most. Adam's corrections 1 / (1 - beta^t) lose
    1 / (1 - beta) at t = 1.
    """
    decay = {"sgd": MOMENTUM[model], "adam": 0.9}[name]
    relative = 4 + 4 / (1 - decay) + (1000 if name == "adam" else 0)
    largest = initial()[model].abs() + path
    return EPS * (STEPS * largest + relative * (path + path.max()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_updates_are_those_of_torch_optim(name: str) -> None:
    grads = gradients()
    together = stacked(name, grads)
    for model in range(len(LR)):
        expected, path = alone(name, grads, model)
        limit = bound(name, model, path)
        assert ((together[model] - expected).abs() <= limit).all(), model
        # The bound must leave no room for a wrong rule.
        assert (limit < 1e-9 * (path + 1)).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_how_the_steps_are_cut_into_blocks_changes_no_bit(name: str) -> None:
    grads = gradients()
    whole = stacked(name, grads, block=STEPS)
    for block in (1, 7, 100):
        assert torch.equal(stacked(name, grads, block=block), whole)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("other", [torch.nan, torch.inf, 0.0, 1e300])
def test_a_models_gradient_touches_no_other_model(name: str, other: float) -> None:
    grads = gradients()
    changed = grads.clone()
    changed[30:, 1] = other
    before, after = stacked(name, grads), stacked(name, changed)
    others = [0, 2, 3, 4]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_has_the_same_bits_in_any_company_and_place(name: str, dtype: torch.dtype) -> None:
    """Also where a row does not start on a whole vector, as fused multiply-adds would show."""
    optimizer = OPTIMIZERS[name]
    grads = gradients().to(dtype)

    def train(models: list[int]) -> torch.Tensor:
        params = initial()[models].to(dtype)
        state = [torch.zeros_like(params) for _ in optimizer.state_names]
        steps = torch.arange(1, 101)[:, None].expand(100, len(models))
        lr = torch.tensor(LR, dtype=torch.float64)[models]
        tables = optimizer.tables(steps, lr, torch.tensor(MOMENTUM, dtype=torch.float64)[models])
        for t in range(100):
            row = [table[t].to(dtype)[:, None] for table in tables]
            step(optimizer, params, grads[t, models].clone(), state, row)
        return params

    whole = train([0, 1, 2, 3, 4])
    for models in ([3], [4, 2], [1, 3, 0], [4, 3, 2, 1, 0]):
        assert torch.equal(train(models), whole[models])


def test_state_names_are_those_of_torch() -> None:
    for name, torch_class in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.ones(2)
        optimizer = torch_class([p], lr=0.1, **({"momentum": 0.9} if name == "sgd" else {}))
        optimizer.step()
        arrays = [key for key, value in optimizer.state[p].items() if value.shape == p.shape]
        assert list(OPTIMIZERS[name].state_names) == arrays
