"""Whole training runs of the triton backend: the oracle's path, the same bits in any company, whole scans."""

import dataclasses

import numpy as np
import pytest
import torch
from harness import Bench
from ragged import Ragged

from fasttrain import ScanSpec, UserError, scan
from fasttrain.backends import choose, make_backend, together
from fasttrain.backends import triton as backend_module
from fasttrain.backends.base import Setting
from fasttrain.spec import SHORT

# Both below and above the batch size of 16, no multiple of a block; widths on both sides of a block of 16 units.
WIDTHS, NS = (3, 16, 1), (40, 5, 70)
CASES = [
    {"depths": 0, "optimizer": "adam"},
    {"depths": 1, "optimizer": "sgd"},
    {"depths": 2, "optimizer": "adam", "activation": "gelu"},
    {"depths": 3, "optimizer": "sgd", "activation": "tanh", "batch_size": "full"},
    {"depths": 4, "optimizer": "sgd", "activation": "sigmoid"},
    {"depths": 1, "optimizer": "adam", "widths": 17},
    {"depths": 1, "optimizer": "adamw", "weight_decay": 0.5},
    {"depths": 1, "optimizer": "sgd", "weight_decay": 0.5, "batch_size": "full"},
]


def bench_of(backend: str, fields: dict, dtype=torch.float64, **more) -> Bench:
    fields = {
        "widths": WIDTHS,
        "batch_size": 16,
        "lr": 0.02,
        "classes": 4,
        "steps": 9,
        "check_every": 3,
        **fields,
        **more,
    }
    return Bench(backend, list(NS), dtype, **fields)


def force(monkeypatch, whole: bool) -> None:
    """One driver for all shapes."""
    real = backend_module.configuration
    monkeypatch.setattr(backend_module, "configuration", lambda **kw: dataclasses.replace(real(**kw), whole=whole))


# Full batches, of any size, are always cut into stages.
DRIVEN = [(fields, whole) for fields in CASES for whole in (False, True)]
DRIVEN = [(fields, whole) for fields, whole in DRIVEN if not (whole and fields.get("batch_size") == "full")]


@pytest.mark.parametrize(("fields", "whole"), DRIVEN, ids=str)
def test_the_path_is_the_oracles_step_by_step(fields, whole, monkeypatch):
    """In float64, over four steps, to what rounding does to the oracle itself (as in the conformance suite)."""
    force(monkeypatch, whole)
    walks = {}
    for name, nudge in (("loop", 0.0), ("nudged", 4 * 2.0**-52), ("triton", 0.0)):
        bench = bench_of("triton" if name == "triton" else "loop", fields, check_every=9)
        runs = bench.runs(range(len(NS)))
        for run in runs:
            run.task = type(run.task)(run.task.pool * (1 + nudge), run.task.rows, run.task.y)
        state = bench.backend.init(runs)
        losses = []
        for step in range(1, 5):
            bench.backend.run(state, step)
            losses.append([run.batch_loss for run in state.runs])
        walks[name] = np.array(losses), [bench.parameters(state, i) for i in range(len(NS))]
    floor = 64 * 2.0**-52
    for k in range(len(NS)):
        truth, nudged, own = ((w[0][:, k], w[1][k]) for w in (walks["loop"], walks["nudged"], walks["triton"]))
        for t, n, o in zip(truth, nudged, own, strict=True):
            assert t.shape == o.shape
            allowed = 30 * np.abs(n - t).max() + floor * np.abs(t).max()
            assert np.abs(o - t).max() <= allowed
            assert allowed < 1e-9 * max(np.abs(t).max(), 1)
        assert np.ptp(truth[0]) > 1e-3


def final(bench, state, position):
    checks = state.models.history([position])[0]
    return np.concatenate([bench.parameters(state, position), checks.ravel()])


INVARIANT = [
    pytest.param({"depths": 1, "optimizer": "adam"}, id="adam-1"),
    pytest.param({"depths": 2, "optimizer": "sgd", "activation": "silu", "batch_size": 7}, id="sgd-2-silu-7"),
]


@pytest.mark.parametrize("fields", INVARIANT)
def test_company_order_slot_and_driver_change_no_bit(fields, monkeypatch):
    """float32: all together in stages; alone, permuted, and put into freed places in whole steps."""
    force(monkeypatch, False)
    bench = bench_of("triton", fields, torch.float32)
    state = bench.backend.init(bench.runs(range(3)))
    bench.backend.run(state, 6)
    expected = [final(bench, state, k) for k in range(3)]
    assert all(np.isfinite(e).all() for e in expected)
    for whole in (False, True):
        force(monkeypatch, whole)
        bench = bench_of("triton", fields, torch.float32)
        alone = bench.backend.init(bench.runs([0]))
        bench.backend.run(alone, 6)
        np.testing.assert_array_equal(final(bench, alone, 0), expected[0])
        # 1 leaves after three steps; 2 and another 1 come, into its place and a new one.
        state = bench.backend.init(bench.runs([1, 0]))
        bench.backend.run(state, 3)
        state = bench.backend.insert(bench.backend.select(state, [1]), bench.runs([2, 1]))
        bench.backend.run(state, 6)
        np.testing.assert_array_equal(final(bench, state, 0), expected[0])
        bench.backend.run(state, 9)
        for position, k in ((1, 2), (2, 1)):
            np.testing.assert_array_equal(final(bench, state, position), expected[k])


@pytest.mark.parametrize(("fields", "whole"), [(INVARIANT[0].values[0], True), (INVARIANT[1].values[0], False)])
def test_runs_go_on_from_where_they_were(fields, whole, monkeypatch):
    """Saved between two checks, from runs of different ages; taken in by another state, in another order."""
    force(monkeypatch, whole)
    short = {"steps": 5, "check_every": 2, "early_stop": False}

    def ended(bench, state, until):
        report = bench.backend.run(state, until)
        return {r.probe.seed: (r, bench.parameters(state, position)) for position, r in report.ended}

    bench = bench_of("triton", fields, torch.float32, **short)
    wanted = ended(bench, bench.backend.init(bench.runs([0, 1])), 5)
    state = bench.backend.init(bench.runs([0]))
    bench.backend.run(state, 1)
    state = bench.backend.insert(state, bench.runs([1]))
    bench.backend.run(state, 3)
    saved = dict(enumerate(bench.backend.saved(state)))
    assert [int(one["step"]) for one in saved.values()] == [3, 2]
    assert [len(one["checks"]) for one in saved.values()] == [1, 1]
    assert {one["params"].dtype for one in saved.values()} == {np.dtype("float32")}
    other = bench_of("triton", fields, torch.float32, **short)
    state = other.backend.insert(other.backend.init(other.runs([1], saved)), other.runs([0], saved))
    found = ended(other, state, 3)
    assert found.keys() == wanted.keys() == {0, 1}
    for seed, (result, parameters) in wanted.items():
        mine, values = found[seed]
        assert (mine.outcome, mine.steps) == (result.outcome, 5)
        np.testing.assert_array_equal(mine.history.step, [2, 4, 5])
        np.testing.assert_array_equal(mine.history.train_loss, result.history.train_loss)
        np.testing.assert_array_equal(values, parameters)


def test_full_batches_in_any_company():
    bench = bench_of("triton", {"batch_size": "full", "depths": 1}, torch.float32)
    state = bench.backend.init(bench.runs([2, 0]))
    bench.backend.run(state, 3)
    alone = bench.backend.init(bench.runs([0]))
    bench.backend.run(alone, 3)
    np.testing.assert_array_equal(final(bench, state, 1), final(bench, alone, 0))


@pytest.mark.parametrize("whole", [False, True], ids=["stages", "whole"])
def test_outcomes_and_histories_are_the_oracles(whole, monkeypatch):
    """Runs that fit, explode, and go on to the end; a check at the last step though it is no multiple."""
    force(monkeypatch, whole)
    found = {}
    for backend in ("loop", "triton"):
        bench = Bench(
            backend, [2, 12, 3, 30], features=5, widths=4, classes=2, optimizer="sgd", lr=(0.3, 1e30), batch_size=4,
            steps=23, check_every=5,
        )  # fmt: skip
        state = bench.backend.init(bench.runs(range(4)))
        results = []
        while state is not None and state.clock < 23:
            report = bench.backend.run(state, min(state.clock + 10, 23))
            results += [result for _, result in report.ended]
            keep = sorted(set(range(len(state.runs))) - {position for position, _ in report.ended})
            state = bench.backend.select(state, keep) if keep else None
        found[backend] = {r.probe.seed: r for r in results}
    assert found["loop"].keys() == found["triton"].keys() == {0, 1, 2, 3}
    for seed, loop in found["loop"].items():
        own = found["triton"][seed]
        assert (own.outcome, own.steps, own.fit_step) == (loop.outcome, loop.steps, loop.fit_step)
        assert own.train_error == loop.train_error or not np.isfinite(loop.train_loss)
        np.testing.assert_array_equal(own.history.step, loop.history.step)
        np.testing.assert_allclose(own.history.train_loss, loop.history.train_loss, rtol=1e-9)
    assert {str(r.outcome) for r in found["triton"].values()} >= {"fitted", "diverged"}


EPOCHS, STEPS = {"budget": "6epochs", "early_stop": False}, {"steps": 23, "check_every": 5}


@pytest.mark.parametrize(("fields", "whole"), [(EPOCHS, False), (EPOCHS, True), (STEPS, False)], ids=str)
def test_budgets_are_each_runs_own(fields, whole, monkeypatch):
    """Epochs at unequal n, and short runs beside full ones."""
    force(monkeypatch, whole)
    found = {}
    for backend in ("loop", "triton"):
        bench = Bench(
            backend, [12, 5, 30, 30], features=5, widths=3, classes=4, optimizer="sgd", lr=0.1, batch_size=8,
            seeds=[0, 1, 2, SHORT], **fields,
        )  # fmt: skip
        _, results = bench.step(bench.backend.init(bench.runs(range(4))), 40)
        found[backend] = {r.probe.seed: r for r in results}
    budgets = {0: 9, 1: 4, 2: 23, SHORT: 8} if "budget" in fields else {0: 23, 1: 23, 2: 23, SHORT: 8}
    assert found["loop"].keys() == found["triton"].keys() == budgets.keys()
    for seed, loop in found["loop"].items():
        own = found["triton"][seed]
        assert (own.outcome, own.steps, own.fit_step) == (loop.outcome, loop.steps, loop.fit_step)
        assert own.outcome != "out_of_budget" or own.steps == budgets[seed]
        np.testing.assert_array_equal(own.history.step, loop.history.step)
        np.testing.assert_allclose(own.history.train_loss, loop.history.train_loss, rtol=1e-9)
    spent = {seed for seed, result in found["triton"].items() if result.outcome == "out_of_budget"}
    assert fields is STEPS or spent >= {2, SHORT}


def test_models_of_several_cadences_are_launched_in_few_different_blocks():
    """In whatever blocks they are launched, no check is left out."""
    bench = Ragged((3, 5, 2), (20, 9, 33), budget=[7, 12, 20], check_every=[2, 3, 5])
    blocks, stages = [], bench.models._stages
    bench.models._stages = lambda steps: (blocks.append((steps, *bench.models._check_steps(steps))), stages(steps))
    bench.models.run(9)
    bench.models.run(11)
    at = np.cumsum([steps for steps, *_ in blocks])
    assert at[-1] == 20
    checked = [int(end) for end, (steps, *due) in zip(at, blocks, strict=True) if due == [steps - 1]]
    # Up to 12 cadences differ; then one model is left, and a check may fall inside a block.
    assert [end for end in checked if end <= 12] == [2, 3, 4, 5, 6, 7, 9, 10, 12]
    mixed = [block for end, block in zip(at, blocks, strict=True) if end <= 12]
    assert all(not due or due == [steps - 1] for steps, *due in mixed)
    assert {steps for steps, *_ in mixed} <= {1, 2, 4}
    together = Ragged((3, 5, 2), (20, 9, 33), budget=[7, 12, 20], check_every=[2, 3, 5], whole=True)
    together.models.run(20)
    for own, other in zip(bench.models.history(range(3)), together.models.history(range(3)), strict=True):
        np.testing.assert_array_equal(own, other)
    assert [len(checks) for checks in bench.models.history(range(3))] == [4, 4, 4]


def test_a_whole_scan_is_the_oracles(tmp_path):
    fields = {
        "widths": (2, 3), "data": "gaussian:4", "classes": 2, "steps": 9, "check_every": 3, "max_probes": 4,
        "batch_size": 4, "lr": 0.1, "precision": "float64", "device": "cpu",
    }  # fmt: skip
    columns = ["width", "n", "seed", "outcome", "steps", "fit_step", "train_error"]
    tables = {}
    for name in ("loop", "triton"):
        results = scan(ScanSpec(backend=name, **fields), out=tmp_path / f"{name}.h5")
        tables[name] = results.probes[columns].sort_values(["width", "n", "seed"]).reset_index(drop=True)
    assert tables["triton"].equals(tables["loop"])
    attrs = results.attrs
    assert attrs["variant_backends"] == "triton,triton"
    assert attrs["launches"] > 0
    assert all("BH=16" in part for part in attrs["variant_configurations"].split(";"))
    assert attrs["bitwise_independent"] == 1


def test_models_of_a_width_class_share_launches():
    spec = ScanSpec(widths=(1, 9, 16, 17, 200, 1024), depths=(0, 1), data="gaussian:7", backend="triton")
    keys = [together("triton", variant) for variant in spec.variants(10)]
    assert [key.width for key in keys] == [0, 16, 16, 16, 32, 256, 1024]
    setting = Setting(spec, 7, torch.device("cpu"), torch.float32)
    for variant, key in zip(spec.variants(10), keys, strict=True):
        own, shared = (backend_module.configured(setting, v) for v in (variant, key))
        assert own == shared
        assert together("triton", key) == key
    assert backend_module.PRODUCTS.keys() >= {"auto", "float32", "float64"}


def test_what_the_kernels_do_not_carry_is_said_in_a_line():
    for fields, words in (
        ({"widths": 1025}, "largest width is 1,024"),
        ({"classes": 1025}, "largest number of classes"),
        ({"optimizer": "muon"}, "it has no optimizer muon"),
        ({"clip": 1.0}, "it has no gradient clipping"),
    ):
        spec = ScanSpec(data="gaussian:7", backend="triton", **fields)
        setting = Setting(spec, 7, torch.device("cpu"), torch.float32)
        with pytest.raises(UserError, match=words):
            choose("triton", setting, spec.variants(10)[0])
    assert set(backend_module.fused.OPTIMIZERS) == {"sgd", "adam", "adamw"}
    assert set(backend_module.PRODUCTS.values()) == set(backend_module.fused.PRECISIONS)


def test_launches_are_counted():
    """2 L + 1 a step, and L + 1 and a verdict a check of one pass; one in all where a program makes whole steps."""
    for whole, steps, expected in ((False, 2, 2 * 5), (False, 5, 5 * 5 + 3 + 1), (True, 5, 1)):
        bench = Ragged((3,), (20,), depth=2, whole=whole)
        bench.models.run(steps)
        assert bench.models.launches == expected


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weight_decay_and_rates_are_each_models_own(optimizer):
    """Three models with a learning rate, momentum and weight decay each, against torch.optim in float64."""
    bench = Ragged((3, 5, 2), (20, 9, 33), optimizer=optimizer, budget=10, check_every=10)
    classes = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    steps = 4
    bench.models.run(steps)
    decayed = set()
    for k, model in enumerate(bench.made):
        lr, momentum, decay = model.rates
        decayed.add(decay)
        params = [torch.tensor(t, requires_grad=True) for pair in model.weights for t in pair]
        more = {"momentum": momentum} if optimizer == "sgd" else {}
        own = classes[optimizer](params, lr=lr, weight_decay=decay, **more)
        for step in range(steps):
            samples = bench.batch(k, step)
            hidden = torch.relu(bench.inputs(k, samples) @ params[0].T + params[1])
            logits = hidden @ params[2].T + params[3]
            own.zero_grad()
            torch.nn.functional.cross_entropy(logits, torch.as_tensor(model.labels[samples])).backward()
            own.step()
        expected = np.concatenate([p.detach().numpy().ravel() for p in params])
        # Adam's quotients of small gradients keep fewer digits than the sums that they come from.
        np.testing.assert_allclose(bench.parameters(k), expected, rtol=1e-9, atol=1e-11)
    assert len(decayed) == 3


def test_backend_is_built_by_name():
    spec = ScanSpec(data="gaussian:7", backend="triton")
    setting = Setting(spec, 7, torch.device("cpu"), torch.float32)
    (variant, *_) = spec.variants(10)
    assert choose("triton", setting, variant) == "triton"
    assert make_backend("triton", setting, together("triton", variant)).name == "triton"
