"""Every kernel against its float64 reference, fed with what the kernel before it gave."""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ragged import FEATURES, NAN, Ragged, close

from fasttrain.kernels import drivers, fused, reference, tiles
from fasttrain.stopping import Monitor, StopRules

RAGGED = (1, 3, 16, 13), (40, 5, 300, 1)
CASES = [
    pytest.param({"depth": 2, "activation": "gelu", "optimizer": "adam"}, id="gelu-adam"),
    pytest.param({"depth": 2, "activation": "leaky_relu", "optimizer": "adamw"}, id="leaky-adamw"),
    pytest.param({"depth": 1, "activation": "sigmoid", "batch": 0}, id="sigmoid-sgd-full"),
    pytest.param({"depth": 0, "optimizer": "adam", "batch": 70}, id="linear-adam-70"),
    pytest.param({"depth": 1, "activation": "tanh", "classes": 70}, id="tanh-sgd-70-classes"),
    # Widths of several blocks of units, many inputs, many classes.
    pytest.param({"widths": (130,), "ns": (5,), "features": 3072, "batch": 3, "activation": "silu"}, id="3072-inputs"),
    pytest.param({"widths": (1024,), "ns": (2,), "features": 2, "batch": 2, "optimizer": "adam"}, id="1024-wide"),
    pytest.param({"widths": (3,), "ns": (4,), "classes": 1000, "batch": 3}, id="1000-classes"),
]


@pytest.mark.parametrize("fields", CASES)
def test_a_step_stage_by_stage(fields):
    fields = dict(fields)
    widths, ns = fields.pop("widths", RAGGED[0]), fields.pop("ns", RAGGED[1])
    bench = Ragged(widths, ns, **fields)
    models, shape = bench.models, bench.shape
    models._table[:, tiles.STEP.value] = 3
    bench.poison()
    depth, count = shape.depth, len(widths)
    before = [bench.weights(k) for k in range(count)]
    samples = [bench.batch(k, 3) for k in range(count)]
    inputs = [bench.inputs(k, samples[k]) for k in range(count)]

    for layer in range(depth):
        models._hidden(layer, "hidden", 0, 0, train=True)
        for k, width in enumerate(widths):
            x = inputs[k] if layer == 0 else bench.acts(k, 0, layer - 1)[: len(samples[k]), :width]
            z = reference.linear(x[None], *(t[None] for t in before[k][layer]))[0]
            slope = torch.empty_like(z)
            reference.activate_(shape.activation, z, slope)
            block = bench.acts(k, 0, layer)
            close(block[: len(z), :width], z)
            assert (block[: len(z), width:] == 0).all()
            assert block[len(z) :].isnan().all()
            if shape.activation == "gelu":
                close(bench.acts(k, 2, layer)[: len(z), :width], slope)

    start_head(bench)
    deltas = []
    for k, width in enumerate(widths):
        x = inputs[k] if depth == 0 else bench.acts(k, 0, depth - 1)[: len(samples[k]), :width]
        out = reference.logits(x[None], *(t[None] for t in before[k][depth]))
        labels = torch.as_tensor(bench.made[k].labels[samples[k]])
        onehot = torch.nn.functional.one_hot(labels, shape.classes).T[None].double()
        losses, delta = reference.head(out, onehot, torch.full((1, len(labels)), 1 / len(labels), dtype=torch.float64))
        close(bench.acts(k, -1)[: len(labels), : shape.classes], delta[0].T)
        assert (bench.acts(k, -1)[: len(labels), shape.classes :] == 0).all()
        mean, right = (column[k] for column in models.last_step())
        assert mean == pytest.approx(losses.item(), rel=1e-13)
        assert right == reference.strictly_right(out[0].T, onehot[0].T).sum().item()
        deltas.append([bench.acts(k, -1)[: len(labels), : shape.classes]])

    fused_back = shape.classes <= fused._FUSED_CLASSES
    for layer in range(depth, 0, -1):
        if layer < depth or not fused_back:
            models._back(layer, 0)
        for k, width in enumerate(widths):
            upper = deltas[k][0]
            a = bench.acts(k, 0, layer - 1)[: len(samples[k]), :width]
            x = inputs[k] if layer == 1 else bench.acts(k, 0, layer - 2)[: len(samples[k]), :width]
            z = reference.linear(x[None], *(t[None] for t in before[k][layer - 1]))[0]
            slope = torch.empty_like(z)
            reference.activate_(shape.activation, z, slope)
            close(z, a)
            block = bench.acts(k, 1, layer - 1)
            close(block[: len(z), :width], (upper @ before[k][layer][0]) * slope)
            assert (block[: len(z), width:] == 0).all()
            assert block[len(z) :].isnan().all()
            deltas[k].insert(0, block[: len(z), :width])

    start_weights(bench)
    for k, width in enumerate(widths):
        after = bench.weights(k)
        for layer in range(depth + 1):
            x = inputs[k] if layer == 0 else bench.acts(k, 0, layer - 1)[: len(samples[k]), :width]
            grad_w, grad_b = (torch.empty_like(t)[None] for t in before[k][layer])
            reference.linear_gradient(deltas[k][layer].T[None], x[None], grad_w, grad_b)
            for param, grad, found in zip(before[k][layer], (grad_w[0], grad_b[0]), after[layer], strict=True):
                expected = param.clone()
                first, second = torch.zeros_like(param), torch.zeros_like(param)
                reference.update(shape.optimizer, expected, grad, first, second, bench.made[k].rates, 4)
                # Adam divides a gradient by its own size: a small one keeps few of its digits.
                if shape.optimizer == "sgd":
                    close(found, expected)
                else:
                    assert (found - expected).abs().max() <= 1e-9 * bench.made[k].rates[0]
                    assert (expected - param).abs().max() > 0.1 * bench.made[k].rates[0]


def start_head(bench: Ragged) -> None:
    """The head alone: the launches of a step, without those before and after it."""
    only(bench, drivers.head_stage)


def start_weights(bench: Ragged) -> None:
    only(bench, drivers.weights_stage)


def only(bench: Ragged, kernel) -> None:
    models, start = bench.models, bench.models._start
    models._start = lambda which, *args, **named: start(which, *args, **named) if which is kernel else None
    try:
        models._step(0)
    finally:
        del models._start


@pytest.mark.parametrize(
    ("whole", "depth", "classes", "batch"),
    [
        *((whole, depth, classes, 16) for whole in (False, True) for depth, classes in ((0, 3), (1, 5), (2, 70))),
        # Minibatches and full batches of more samples than a pass has otherwise.
        (False, 0, 3, 290),
        (True, 0, 3, 290),
        (False, 1, 3, 0),
    ],
)
def test_a_check_counts_and_sums_as_the_reference(whole, depth, classes, batch):
    """Ties are wrong; whole sets of one sample and of several passes."""
    bench = Ragged(
        (1, 3, 16), (1, 40, 600 if batch != 16 else 300), depth=depth, classes=classes, activation="relu", whole=whole,
        check_every=1, budget=1, optimizer="sgd", batch=batch,
    )  # fmt: skip
    models = bench.models
    models._rates[:, 0] = 0.0  # the weights stand still
    # The first model's logits are all equal.
    place = models._place(models._order[0])
    models._params.tensor[place.params[0] : sum(place.params)] = 0
    bench.poison()
    models.run(1)
    for k, checks in enumerate(models.history(range(3))):
        everything = np.arange(len(bench.made[k].rows))
        x = bench.inputs(k, everything)
        weights = bench.weights(k)
        for w, b in weights[:-1]:
            x = torch.relu(x @ w.T + b)
        out = x @ weights[-1][0].T + weights[-1][1]
        onehot = torch.nn.functional.one_hot(torch.as_tensor(bench.made[k].labels), classes).double()
        assert checks.shape == (1, 2)
        assert checks[0, 0] == pytest.approx(reference.cross_entropy(out, onehot).mean().item(), rel=1e-13)
        assert checks[0, 1] == (~reference.strictly_right(out, onehot)).sum().item()
    assert models.history([0])[0][0, 1] == 1
    assert models.ended().all()


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("whole", [False, True])
def test_a_logit_that_is_not_finite_ends_its_model_alone(poison, whole):
    bench = Ragged((3, 4), (30, 30), whole=whole, check_every=1, optimizer="sgd", budget=4)
    place = bench.models._place(bench.models._order[0])
    bench.models._params.tensor[sum(place.params) - 4] = poison  # a bias of the head
    bench.models.run(2)
    assert bench.models.ended().tolist() == [True, False]
    first, other = bench.models.history([0, 1])
    assert len(first) == 1
    assert not np.isfinite(first[0, 0])
    assert first[0, 1] > 0
    assert np.isfinite(other).all()
    assert len(other) == 2


def test_the_samples_of_a_step_are_those_of_every_backend():
    ns = (1, 2, 3, 5, 6, 7, 40, 255, 257, 1000)
    bench = Ragged((1,) * len(ns), ns, batch=37, depth=1, budget=10**9, check_every=10**9)
    models = bench.models
    for step in (0, 1, 26, 10**6):
        models._table[:, tiles.STEP.value] = step
        models._drawn.tensor.fill_(-1)
        models._hidden(0, "hidden", 0, 0, train=True)
        for k in range(len(ns)):
            at, size = models._place(models._order[k]).drawn
            found = models._drawn.tensor[at : at + size].view(2, -1).numpy()
            model, samples = bench.made[k], bench.batch(k, step)
            rows = models._place(models._order[k]).inputs.at + model.rows
            np.testing.assert_array_equal(found[0], rows[samples])
            np.testing.assert_array_equal(found[1], model.labels[samples])


@pytest.mark.parametrize("seed", range(6))
def test_the_stop_rules_are_those_of_the_monitor(seed):
    """``decide`` on made-up checks of many models, against the monitor of the other backends."""
    rng = np.random.default_rng(seed)
    n, count = 64, 12
    # Side by side: a long budget, a short one with another cadence, and one that no plateau ends.
    low = 0.85  # some of the flat ones lie below it
    kinds = (
        StopRules(1010, 20, plateau_loss=low),
        StopRules(337, 7, plateau_loss=low),
        StopRules(337, 20, early_stop=False, plateau_loss=low),
    )
    rules = [kinds[k % 3] for k in range(count)]
    checks = 51
    slope = rng.uniform(0, 0.1, (count, 1))
    losses = np.exp(-slope * np.arange(checks) + rng.normal(0, 0.05, (count, checks)))
    wrong = rng.integers(1, n, (count, checks))
    wrong[0, 3] = 0
    losses[1, 2] = NAN
    losses[2, 4] = np.inf
    bench = Ragged(
        (1,) * count, (n,) * count, whole=False, budget=[r.steps for r in rules],
        check_every=[r.check_every for r in rules], plateau_after=[r.plateau_after for r in rules],
        plateau_loss=low,
    )  # fmt: skip
    models = bench.models
    ended = np.zeros(count, dtype=int)
    for check in range(checks):
        models._check_losses[:, 0] = torch.as_tensor(losses[:, check] * n)
        models._check_wrong[:, 0] = torch.as_tensor(wrong[:, check])
        models._table[:, tiles.STEP.value] = torch.tensor([r.step_of(check + 1) - 1 for r in rules])
        only_decide(bench)
        ended[models.ended() & (ended == 0)] = check + 1
    outcomes = set()
    for k in range(count):
        own = rules[k]
        monitor = Monitor(own)
        expected = next(
            c + 1
            for c in range(checks)
            if (outcome := monitor.observe(own.step_of(c + 1), float(losses[k, c]), int(wrong[k, c]), n)) is not None
        )
        outcomes.add(str(outcome))
        assert ended[k] == expected
        found = models.history([k])[0]
        np.testing.assert_array_equal(found[:, 1], wrong[k, :expected])
        np.testing.assert_allclose(found[:, 0], losses[k, :expected], rtol=1e-15)
        again = Monitor(own)
        again.record(found[:-1, 0], found[:-1, 1], n)
        assert again.observe(own.step_of(expected), float(found[-1, 0]), int(found[-1, 1]), n) == outcome
    assert {"fitted", "diverged", "plateaued", "out_of_budget"} <= outcomes


def only_decide(bench: Ragged) -> None:
    models, start = bench.models, bench.models._start
    models._start = lambda which, *a, **named: start(which, *a, **named) if which is drivers.decide_stage else None
    try:
        models._check(0)
    finally:
        del models._start


def test_inputs_stay_in_their_own_type():
    """uint8 pixels are converted as they are loaded."""
    bench = Ragged((3,), (40,), inputs=torch.uint8)
    assert bench.models._pool.tensor.dtype == torch.uint8
    bench.poison()
    bench.models._hidden(0, "hidden", 0, 0, train=True)
    samples = bench.batch(0, 0)
    x = bench.inputs(0, samples)
    assert x.max() > 100
    z = reference.linear(x[None], *(t[None] for t in bench.weights(0)[0]))[0].clamp(min=0)
    close(bench.acts(0, 0)[: len(samples), :3], z)


def products(precision: str) -> float:
    """Relative RMS error of the logits of a linear classifier with 784 inputs."""
    bench = Ragged((0,), (64,), depth=0, features=784, dtype=torch.float32, precision=precision, batch=64)
    exact = Ragged((0,), (64,), depth=0, features=784, dtype=torch.float64, batch=64)
    found = []
    for one in (bench, exact):
        start_head(one)
        found.append(one.acts(0, -1)[:, :5].double())
    return ((found[0] - found[1]).square().mean() / found[1].square().mean()).sqrt().item()


def test_precisions_lose_what_their_bits_say():
    """Unit roundoffs: float32 2^-24, of two bfloat16 parts about 2^-17, of tf32 2^-11, of bfloat16 2^-8."""
    error = {name: products(name) for name in fused.PRECISIONS}
    for name, unit in (("bf16x3", 2.0**-17), ("tf32", 2.0**-11), ("bf16", 2.0**-8)):
        assert unit / 16 < error[name] < 2 * unit, name
    assert error["ieee"] < 2.0**-20
    assert list(itertools.pairwise(error.values())) == list(itertools.pairwise(sorted(error.values())))


@triton.jit
def elementwise(z, out, ACTIVATION: tl.constexpr, FROM_VALUE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, slope = tiles.activate(tl.load(z + at), ACTIVATION)
    tl.store(out + at, a)
    tl.store(out + SIZE + at, tiles.slope_of(a, ACTIVATION) if FROM_VALUE else slope)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", fused.ACTIVATIONS)
def test_activations_and_slopes_are_the_references(name, dtype):
    """Against torch in float64. What is added up inside is at most about one, and a dozen roundings deep."""
    z = torch.cat(
        [torch.linspace(-30, 30, 3000), torch.linspace(-0.2, 0.2, 1090), torch.tensor([0, -0.0, 1e-30, 80, -80, -1e-3])]
    )
    z = z.to(dtype)
    out = torch.full((2, len(z)), NAN, dtype=dtype)
    elementwise[(1,)](z, out, name, name not in fused._KEEPS_SLOPES, len(z))
    expected, slope = z.double().clone(), torch.empty(len(z), dtype=torch.float64)
    reference.activate_(name, expected, slope)
    unit = torch.finfo(dtype).eps / 2
    size = torch.maximum(z.double().abs(), expected.abs())
    assert ((out[0] - expected).abs() <= 12 * unit * size + torch.finfo(dtype).tiny).all()
    assert ((out[1] - slope).abs() <= 12 * unit * z.double().abs().clamp(min=1)).all()


def test_the_interpreter_is_on_and_the_inputs_are_seven():
    assert fused.INTERPRETED
    assert FEATURES == 7
