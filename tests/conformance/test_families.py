"""CNNs, vision transformers and modules of the user's: the oracle's path, and a model's own bits in any company."""

import itertools

import my_models
import numpy as np
import pytest
import torch
from harness import Bench

from fasttrain.activations import ACTIVATIONS
from fasttrain.spec import OPTIMIZERS

STEPS = 12
NS = [5, 40, 150, 33, 11]
IMAGES = {"data": "gaussian:2x4x4", "features": 32}
# Every architecture with every optimizer and with every activation; the slow ones add every pair of the two.
PAIRS = [
    {"arch": arch, "widths": 6, "depths": depth, "optimizer": optimizer, "activation": activation, "lr": (0.003, 0.01)}
    for arch, depth in (("cnn", 2), ("vit", 1), ("mlp", 2), ("linear", 1))
    for optimizer, activation in zip(itertools.cycle(OPTIMIZERS), ACTIVATIONS, strict=False)
    if arch != "linear" or activation != "identity"
]
MORE = [
    {"arch": arch, "widths": 6, "depths": depth, "optimizer": optimizer, "activation": activation, "lr": (0.003, 0.01)}
    for arch, depth in (("cnn", 2), ("vit", 2), ("mlp", 2))
    for optimizer, activation in itertools.product(OPTIMIZERS, ACTIVATIONS)
]
OTHERS = [
    {"arch": "cnn", "widths": 4, "depths": 3, "batch_size": "full", "optimizer": "sgd", "lr": 0.02},
    {"arch": "cnn", "widths": 3, "depths": 1, "clip": 0.1, "weight_decay": 0.1, "label_smoothing": 0.1},
    {"arch": "vit", "widths": 6, "heads": 3, "patch": 2, "depths": 1, "batch_size": "full"},
    {"arch": "my_models:residual", "widths": 6, "depths": 2},
    {"arch": "my_models:residual", "widths": 5, "optimizer": "muon", "nesterov": True},
]


def ident(fields: dict) -> str:
    return "-".join(map(str, fields.values()))


def walk(backend: str, fields: dict, nudge: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Minibatch losses [E, S] and final parameters [E, P] in float64."""
    fields = {"batch_size": 9, "classes": 4, **IMAGES, **fields, "check_every": 10_000}
    losses, finals, _ = Bench(backend, NS, **fields).walk(STEPS, nudge)
    return losses.T, finals


SLOW = [pytest.param(fields, marks=pytest.mark.slow) for fields in MORE]


@pytest.mark.parametrize("fields", [*PAIRS, *OTHERS, *SLOW], ids=ident)
def test_the_path_is_the_oracles_to_rounding(fields):
    """As in test_trajectory.py: to what inputs that differ by a few units in the last place do to the oracle."""
    truth = walk("loop", fields)
    nudges = [walk("loop", fields, nudge=k * 2.0**-52) for k in (4, -4)]
    for i, own in enumerate(walk("vmap", fields)):
        size = np.abs(truth[i]).max(1)
        moved = np.max([np.abs(nudged[i] - truth[i]).max(1) for nudged in nudges], axis=0) / size
        assert (np.abs(own - truth[i]).max(1) / size <= 30 * moved + 256 * 2.0**-52).all()
        # A run may meet a gradient that is zero but for rounding, which RMSprop's first step takes to full size; a
        # wrong step would show in all of them.
        assert np.median(moved) < 1e-9


# What an optimizer does is bit for bit its own in test_options.py: here a few of them, and every activation.
IN_COMPANY = [p for p in PAIRS if p["arch"] == "cnn" or (p["arch"] == "vit" and p["optimizer"] in ("adam", "muon"))]


@pytest.mark.parametrize("fields", [*IN_COMPANY, *OTHERS, *SLOW], ids=ident)
def test_company_and_order_change_no_bit(fields):
    bench = Bench("vmap", [33, 5, 129, 300, 77, 1, 256], torch.float32, **{"batch_size": 7, **IMAGES, **fields})
    companies = [list(range(7)), [3], [5, 2, 0], [6, 5, 4, 3, 2, 1, 0]]
    found: dict[int, np.ndarray] = {}
    for company in companies:
        state = bench.backend.init(bench.runs(company))
        bench.backend.run(state, 6)
        losses, wrong = bench.backend._evaluate(state)
        for position, k in enumerate(company):
            own = np.append(bench.parameters(state, position), [losses[position], wrong[position]])
            assert np.isfinite(own).all()
            np.testing.assert_array_equal(found.setdefault(k, own), own)


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_random_labels_on_a_few_samples_are_fitted(arch, backend):
    bench = Bench(backend, [12, 20], torch.float32, 64, arch=arch, widths=16, data="digits", steps=3000, check_every=50)
    _, results = bench.step(bench.backend.init(bench.runs(range(2))), 3000)
    assert [result.outcome for result in results] == ["fitted"] * 2


def test_batch_normalisation_is_evaluated_with_its_running_averages():
    """In the loop: what a check finds for the first samples does not depend on the samples beside them."""
    bench = Bench("loop", [30], arch="cnn", norm="batch", widths=4, **IMAGES)
    state = bench.backend.init(bench.runs([0]))
    bench.backend.run(state, 20)
    (trained,) = state.trained
    whole = bench.backend._evaluate(trained)
    model, x, y = trained.model.eval(), trained.x, trained.y
    alone = torch.cat([model(x[k : k + 1]) for k in range(len(x))])
    assert whole[0] == pytest.approx(torch.nn.functional.cross_entropy(alone, y).item(), rel=1e-12)
    kept = bench.backend.parameters(state, 0)
    assert not np.array_equal(kept["norms.0.running_mean"], np.zeros(4))
    assert not trained.model.training or trained.model.train()


def test_pixels_stay_bytes_and_give_the_bits_of_standardised_inputs(tmp_path):
    """Alone, all runs share the pixels; beside a run with shuffled ones, all are standardised beforehand."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.integers(0, 256, (60, 3, 4, 4), dtype=np.uint8), y=np.arange(60) % 5)
    fields = {"data": str(tmp_path / "x.npz"), "features": 48, "arch": "cnn", "widths": 5, "batch_size": 7}
    bench = Bench("vmap", [20, 30, 25, 9], torch.float32, inputs=("real", "shuffled"), **fields)
    found = []
    for company in ([0, 2], [0, 2, 1]):  # the second variant, which every other run has, is shuffled
        state = bench.backend.init(bench.runs(company))
        bench.backend.run(state, 8)
        found.append([bench.parameters(state, k) for k in range(2)])
        assert (state.pool.dtype == torch.uint8) == (len(company) == 2)
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0][0], found[0][1])


def test_the_module_of_a_user_is_what_trains():
    bench = Bench("vmap", NS, arch="my_models:residual", widths=6, depths=2, **IMAGES)
    state = bench.backend.init(bench.runs([0]))
    module = my_models.residual(6, 2, (2, 4, 4), 10)
    assert bench.backend.parameters(state, 0).keys() == dict(module.named_parameters()).keys()
