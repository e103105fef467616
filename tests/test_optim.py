import dataclasses
import math

import pytest
import torch
from torch.optim import lr_scheduler

from fasttrain import ScanSpec, optim
from fasttrain.backends import oracle_optimizers
from fasttrain.ensemble import Layout, capacity
from fasttrain.optim import OPTIMIZERS, Optimizer, Rates, clip_, lr_factor, make_optimizer, orthogonal
from fasttrain.spec import Variant

STEPS = 60
INSERTED = 33  # step of the whole at which the last model comes: not when the others renew Shampoo's roots
SHAPES = {"tall": (7, 3), "wide": (2, 2, 3, 1), "vector": (5,)}
EPS = torch.finfo(torch.float64).eps
# Models differ in rates and size of their gradients: the last but one is where epsilon matters.
LR = [0.1, 0.003, 1.0, 0.01, 0.02]
MOMENTUM = [0.9, 0.0, 0.5, 0.99, 0.9]
DECAY = [0.1, 0.0, 0.05, 1e-3, 0.01]
SCALE = [1.0, 10.0, 1.0, 1e-8, 1.0]
BEGINS = [0, 0, 0, 0, INSERTED]
BUDGETS = [STEPS, STEPS + 1, 3 * STEPS, STEPS, STEPS + 50]

ALL = [{"optimizer": name} for name in OPTIMIZERS]
DECAYED = [{"optimizer": name, "weight_decay": DECAY} for name in OPTIMIZERS]
CASES = [
    *ALL,
    *DECAYED,
    {"optimizer": "sgd", "nesterov": True},
    {"optimizer": "muon", "nesterov": True, "weight_decay": DECAY},
    {"optimizer": "sgd", "clip": 2.0},
    {"optimizer": "sgd", "clip": 2.0, "weight_decay": DECAY, "nesterov": True, "schedule": "linear"},
    {"optimizer": "adam", "clip": 2.0, "schedule": "cosine", "warmup": 20},
    {"optimizer": "adamw", "weight_decay": DECAY, "schedule": "linear", "warmup": 1},
    {"optimizer": "shampoo", "clip": 5.0, "weight_decay": DECAY, "schedule": "cosine"},
]
EACH = pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(map(str, fields)) + fields["optimizer"])


def layout(padded: bool = True) -> Layout:
    """Of the parameters; without padding, so that rows start anywhere."""
    made = Layout(SHAPES)
    if not padded:
        at = 0
        for name, shape in SHAPES.items():
            made.offsets[name], at = at, at + math.prod(shape)
        made.size = at
    return made


def variant(fields: dict, model: int = 0) -> Variant:
    """What the spec's defaults make of a case, with the rates of a model."""
    (plain,) = ScanSpec(widths=4).variants(10)
    own = {**fields, "lr": LR[model], "momentum": MOMENTUM[model]}
    if "weight_decay" in fields:
        own["weight_decay"] = fields["weight_decay"][model]
    return dataclasses.replace(plain, **own)


def packed(drawn: torch.Tensor, where: Layout) -> torch.Tensor:
    """Rows [..., P] with what was drawn [..., parameters] at the parameters, and zeros between them."""
    rows = drawn.new_zeros(*drawn.shape[:-1], where.size)
    flat, begin = rows.view(-1, where.size), 0
    for name, view in where.views(flat).items():
        size = math.prod(SHAPES[name])
        view.copy_(drawn.reshape(-1, drawn.shape[-1])[:, begin : begin + size].reshape(view.shape))
        begin += size
    return rows


COUNT = sum(map(math.prod, SHAPES.values()))


def gradients(where: Layout | None = None, nudge: float = 0.0) -> torch.Tensor:
    """Fixed gradients [STEPS, E, P]: those of a model would amplify rounding by its own dynamics."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randn(STEPS, len(LR), COUNT, dtype=torch.float64, generator=rng)
    drawn *= 1 + nudge * torch.randn(drawn.shape, dtype=torch.float64, generator=rng)
    return packed(drawn * torch.tensor(SCALE, dtype=torch.float64)[:, None], where or layout())


def initial(where: Layout | None = None) -> torch.Tensor:
    drawn = torch.randn(len(LR), COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return packed(drawn, where or layout())


def step(optimizer: Optimizer, params, grads, state, row) -> None:
    into = optimizer.accumulator(state, row)
    if into is not None:
        into.add_(grads)
        grads.fill_(torch.nan)
    optimizer.update(params, grads, state, row)


def made(fields: dict, where: Layout | None = None) -> Optimizer:
    return make_optimizer(variant(fields), where or layout())


def rates(fields: dict, models: list[int]) -> Rates:
    return Rates.of((variant(fields, model), BUDGETS[model]) for model in models)


def stacked(fields: dict, grads: torch.Tensor, block: int = 50) -> torch.Tensor:
    """All models at once, coefficients made a block of steps ahead, the last model inserted on the way."""
    optimizer = made(fields)
    params = initial()[:0]
    state = [params.new_zeros(0, size) for size in optimizer.state_sizes]
    first = 0
    while first < STEPS:
        last = min(first + block, STEPS, *(b for b in BEGINS if b > first))
        models = [e for e, begin in enumerate(BEGINS) if begin <= first]
        params = torch.cat([params, initial()[models][len(params) :]])
        state = [torch.cat([old, old.new_zeros(len(models) - len(old), old.shape[1])]) for old in state]
        steps = torch.tensor([[t - BEGINS[e] + 1 for e in models] for t in range(first, last)])
        tables = optimizer.tables(steps, rates(fields, models))
        assert all(t.dtype == torch.float64 and t.shape == steps.shape for t in tables)
        for k, t in enumerate(range(first, last)):
            step(optimizer, params, grads[t, models].clone(), state, [table[k][:, None] for table in tables])
        first = last
    return params


def torch_optimizer(one: Variant, params) -> torch.optim.Optimizer:
    common = {"lr": one.lr, "weight_decay": one.weight_decay}
    # torch has no Nesterov momentum of 0; it would be none.
    moves = {"momentum": one.momentum, "nesterov": one.nesterov and one.momentum > 0}
    if one.optimizer == "sgd":
        return torch.optim.SGD(params, **common, **moves)
    if one.optimizer == "muon":
        return oracle_optimizers.Muon(params, **common, **moves)
    if one.optimizer == "shampoo":
        return oracle_optimizers.Shampoo(params, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[one.optimizer](
        params, **common
    )


def torch_scheduler(optimizer, schedule: str, warmup: int, budget: int):
    """torch's own schedulers, one after the other."""
    rest = budget - warmup
    main = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, 1.0, 1),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, rest),
        "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, rest),
    }[schedule]()
    if not warmup:
        return main
    rise = lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, max(1, warmup - 1))
    return lr_scheduler.SequentialLR(optimizer, [rise, main], [warmup])


def alone(fields: dict, grads: torch.Tensor, model: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One model with torch.optim or a plain reference: its row, and the sum of the sizes of its updates."""
    one, where = variant(fields, model), layout()
    row = initial()[model : model + 1]
    params = {name: torch.nn.Parameter(view[0].clone()) for name, view in where.views(row).items()}
    optimizer = torch_optimizer(one, params.values())
    scheduler = torch_scheduler(optimizer, one.schedule, one.warmup, BUDGETS[model])
    path = torch.zeros(where.size, dtype=torch.float64)
    for t in range(BEGINS[model], STEPS):
        before = row.clone()
        for name, view in where.views(grads[t, model : model + 1].clone()).items():
            params[name].grad = view[0].clone()
        if one.clip:
            torch.nn.utils.clip_grad_norm_(params.values(), one.clip)
        optimizer.step()
        scheduler.step()
        for name, view in where.views(row).items():
            view[0] = params[name].detach()
        path += (row - before)[0].abs()
    return row[0], path


@EACH
def test_stacked_updates_are_those_of_torch_optim_or_the_papers(fields: dict) -> None:
    """To what gradients that differ by four units in the last place do to the reference itself.

    Each step also rounds the parameter once in either evaluation, by half an epsilon of its size.
    """
    grads, nudged = gradients(), gradients(nudge=4 * EPS)
    together = stacked(fields, grads)
    for model in range(len(LR)):
        expected, path = alone(fields, grads, model)
        moved = (alone(fields, nudged, model)[0] - expected).abs().max()
        limit = 30 * moved + EPS * STEPS * (initial()[model].abs() + path)
        assert ((together[model] - expected).abs() <= limit).all(), model
        # The bound must leave no room for a wrong rule. An eigenvalue of Shampoo's is known to rounding times the
        # largest, here 1e4, and its smallest is 1e-2.
        assert (limit < (1e-7 if fields["optimizer"] == "shampoo" else 1e-9) * (path + 1)).all()
        assert path.max() > 1e-4 or SCALE[model] < 1e-4


@EACH
def test_how_the_steps_are_cut_into_blocks_changes_no_bit(fields: dict) -> None:
    grads = gradients()
    whole = stacked(fields, grads, block=STEPS)
    for block in (7, 25):
        assert torch.equal(stacked(fields, grads, block=block), whole)


@EACH
def test_a_models_gradient_touches_no_other_model(fields: dict) -> None:
    grads, others = gradients(), [0, 2, 3, 4]
    before = stacked(fields, grads)
    for value in (torch.nan, torch.inf, 0.0, 1e300):
        changed = grads.clone()
        changed[30:, 1] = value * (grads[0, 1] != 0) if math.isfinite(value) else value
        after = stacked(fields, changed)
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[1], after[1])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_has_the_same_bits_in_any_company_and_place(fields: dict, dtype: torch.dtype) -> None:
    """Where all is elementwise, also where a row does not start on a whole vector."""
    elementwise = fields["optimizer"] not in ("shampoo", "muon")
    for where in [layout()] + [layout(padded=False)] * elementwise:
        optimizer, grads, begin = made(fields, where), gradients(where).to(dtype), initial(where).to(dtype)

        def train(models: list[int], optimizer=optimizer, grads=grads, begin=begin) -> torch.Tensor:
            held = models + models[:1] * (capacity(len(models)) - len(models))
            params = begin[held]
            state = [params.new_zeros(len(held), size) for size in optimizer.state_sizes]
            # Ages differ, by no multiple of 10.
            steps = torch.arange(1, 41)[:, None] + torch.tensor([3 * model for model in held])
            tables = optimizer.tables(steps, rates(fields, held))
            for t in range(40):
                row = [table[t].to(dtype)[:, None] for table in tables]
                step(optimizer, params, grads[t, held].clone(), state, row)
            return params[: len(models)]

        whole = train([0, 1, 2, 3, 4])
        for models in ([3], [4, 2], [1, 3, 0], [4, 3, 2, 1, 0]):
            assert torch.equal(train(models), whole[models])


@pytest.mark.parametrize("warmup", [0, 1, 2, 17])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_factors_are_those_of_torchs_schedulers(schedule: str, warmup: int) -> None:
    """Theirs are products of many steps, each of which rounds."""
    budget = 60
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch_scheduler(optimizer, schedule, warmup, budget)
    found = []
    for done in range(budget):
        found.append(optimizer.param_groups[0]["lr"])
        assert abs(lr_factor(schedule, warmup, budget, done) - found[-1]) <= 8 * budget * EPS, done
        optimizer.step()
        scheduler.step()
    assert max(found) == pytest.approx(1.0)
    assert (min(found[warmup:]) < 0.1) == (schedule != "constant")
    if schedule != "constant":
        assert lr_factor(schedule, warmup, budget, budget) == lr_factor(schedule, warmup, budget, budget + 9) == 0.0


def test_without_a_schedule_the_rate_is_untouched() -> None:
    fields = {"optimizer": "sgd"}
    lr, momentum = made(fields).tables(torch.arange(1, 9)[:, None].expand(8, 5), rates(fields, [0, 1, 2, 3, 4]))
    assert torch.equal(lr, torch.tensor(LR, dtype=torch.float64).expand(8, 5))
    assert torch.equal(momentum, torch.tensor(MOMENTUM, dtype=torch.float64).expand(8, 5))


def test_clipping_is_by_each_models_own_norm() -> None:
    grads = torch.tensor([[3.0, 4.0], [0.3, 0.4], [300.0, 400.0], [0.0, 0.0]], dtype=torch.float64)
    clipped = grads.clone()
    clip_(clipped, 1.0)
    torch.testing.assert_close(clipped.norm(dim=1), torch.tensor([1.0, 0.5, 1.0, 0.0]).double(), rtol=1e-6, atol=0)
    assert torch.equal(clipped[[1, 3]], grads[[1, 3]])
    for own, row in zip(clipped, grads, strict=True):
        p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        p.grad = row.clone()
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        torch.testing.assert_close(own, p.grad, rtol=4 * EPS, atol=0)


def test_newton_schulz_is_the_polynomial_on_the_singular_values() -> None:
    """For odd polynomials p, p(U S V^T) = U p(S) V^T; so after five of them, to their slope at 0 of 485."""
    for rows, columns in ((4, 6), (6, 4), (5, 5), (1, 3)):
        drawn = torch.randn(3, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        u, s, v = torch.linalg.svd(drawn, full_matrices=False)
        s = s / (s.norm(dim=1, keepdim=True) + 1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        expected = u @ torch.diag_embed(s) @ v
        limit = 485 * 8 * max(rows, columns) * EPS
        for found in (orthogonal(drawn), torch.stack([oracle_optimizers.newton_schulz(g) for g in drawn])):
            assert (found - expected).abs().max() < limit
        assert 0.5 < s.min() < s.max() < 1.3


def test_shampoos_first_step_is_what_its_definition_says() -> None:
    """With L = eps I + G G^T and R = eps I + G^T G the singular values s become s / sqrt(s^2 + eps)."""
    grad = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u, s, v = torch.linalg.svd(grad, full_matrices=False)
    expected = -(u @ torch.diag(s / (s**2 + 1e-2).sqrt()) @ v)
    p = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    p.grad = grad
    oracle_optimizers.Shampoo([p], lr=1.0).step()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-11)


def test_large_dimensions_keep_the_diagonal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optim.SHAMPOO_LARGEST == 1024
    monkeypatch.setattr(optim, "SHAMPOO_LARGEST", 4)
    real = oracle_optimizers.Shampoo
    monkeypatch.setattr(oracle_optimizers, "Shampoo", lambda *a, **k: real(*a, **k, largest=4))
    fields = {"optimizer": "shampoo"}
    assert made(fields).state_sizes == (64 * 5, 64 * 2)  # 7 | 3 x 3, 2 x 2 | 6, 5: each in 64 elements
    test_stacked_updates_are_those_of_torch_optim_or_the_papers(fields)


def test_a_lone_model_of_an_age_renews_its_roots_as_in_company() -> None:
    """Only rows that are due are decomposed, two of them at least."""
    fields = {"optimizer": "shampoo"}
    grads = gradients()
    optimizer = made(fields)

    def train(ages: list[int]) -> torch.Tensor:
        params = initial()[: len(ages)]
        state = [params.new_zeros(len(ages), size) for size in optimizer.state_sizes]
        tables = optimizer.tables(torch.arange(1, 31)[:, None] + torch.tensor(ages), rates(fields, [0] * len(ages)))
        for t in range(30):
            step(optimizer, params, grads[t, : len(ages)].clone(), state, [table[t][:, None] for table in tables])
        return params

    assert torch.equal(train([0, 4, 7])[0], train([0, 0, 0])[0])
    assert not torch.equal(train([0, 4, 7])[1], train([0, 0, 0])[1])


def test_state_names_are_those_of_torch() -> None:
    for name in ("sgd", "adam", "adamw", "rmsprop"):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.ones(2)
        optimizer = torch_optimizer(variant({"optimizer": name}), [p])
        optimizer.step()
        arrays = [key for key, value in optimizer.state[p].items() if value.shape == p.shape]
        assert list(OPTIMIZERS[name].state_names) == arrays
        assert made({"optimizer": name}).state_sizes == (layout().size,) * len(arrays)


def test_the_gradient_is_accumulated_only_where_nothing_else_needs_it() -> None:
    assert made({"optimizer": "sgd"}).accumulates
    for more in ({"clip": 1.0}, {"nesterov": True}, {"weight_decay": [0.1]}):
        assert not made({"optimizer": "sgd", **more}).accumulates
