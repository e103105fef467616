"""Curvature where training ended: against dense Hessians, known matrices and hand counts; and in whole scans."""

import dataclasses
import gzip
import itertools
import math
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import eigh_tridiagonal
from torch.func import functional_call, grad, jacrev

import fasttrain
import fasttrain.prepare
from fasttrain import ScanSpec, UserError, curvature
from fasttrain.backends.base import Setting
from fasttrain.cli import main
from fasttrain.cli.progress import summary
from fasttrain.curvature import TOLERANCE, choose, loss_slope, measure, spectrum_ends
from fasttrain.data import task
from fasttrain.models import build, draw_weights, input_shape
from fasttrain.prepare import numerics, prepare
from fasttrain.records import Censored, Curvature, Estimate, History, Outcome, Probe, ProbeResult
from fasttrain.schema import GROUPS
from fasttrain.spec import SHORT

EPS = np.finfo(np.float64).eps
NONE = History(np.array([], np.int64), np.array([]), np.array([]))
SHAPE = (1, 4, 4)


def setting_of(**fields) -> tuple[Setting, list]:
    spec = ScanSpec(**{"data": "gaussian:1x4x4", "classes": 3, **fields})
    return Setting(spec, 16, torch.device("cpu"), torch.float32, SHAPE), list(spec.variants(10))


def drawn(setting, variant, seed, n):
    """Inputs and labels of a run, as a module takes them."""
    own = task(setting.spec, variant.labels, variant.classes, seed, n, variant.inputs)
    return torch.as_tensor(own.inputs()).view(-1, *input_shape(variant, SHAPE)), torch.as_tensor(own.y)


def result_of(setting, variant, seed, n, steps):
    """A run after some steps of plain Adam on all samples; its initial weights if there are none."""
    weights = draw_weights(variant, SHAPE, scan_seed=setting.spec.seed, seed=seed, n=n)
    module = build(variant, SHAPE).double()
    module.load_state_dict({name: torch.as_tensor(w) for name, w in weights.items()}, strict=False)
    x, y = drawn(setting, variant, seed, n)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    kept = {name: p.detach().numpy() for name, p in (*module.named_parameters(), *module.named_buffers())}
    right = bool((module.eval()(x).argmax(1) == y).all())
    outcome = Outcome.FITTED if right else Outcome.OUT_OF_BUDGET
    return ProbeResult(Probe(0, n, seed), outcome, steps, -1, math.nan, math.nan, NONE, weights=kept)


def dense(setting, variant, result):
    """Loss, gradient norm and all eigenvalues, by torch.func over the flat parameters."""
    module = build(variant, SHAPE).double().eval()
    x, y = drawn(setting, variant, result.probe.seed, result.probe.n)
    names = [name for name, _ in module.named_parameters()]
    shapes = [result.weights[name].shape for name in names]
    flat = torch.cat([torch.as_tensor(result.weights[name]).reshape(-1) for name in names])
    rest = {k: torch.as_tensor(w) for k, w in result.weights.items() if k not in names}

    def loss(flat):
        parts = torch.split(flat, [math.prod(shape) for shape in shapes])
        named = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.nn.functional.cross_entropy(functional_call(module, {**named, **rest}, (x,)), y)

    found = jacrev(grad(loss))(flat).numpy()
    gradient = grad(loss)(flat)
    return float(loss(flat)), float(gradient.norm()), np.linalg.eigvalsh((found + found.T) / 2)


def agrees(found: Curvature, loss: float, norm: float, eigenvalues: np.ndarray, terms: int) -> None:
    """The three of ``dense`` against what was measured; ``terms`` bounds the length of the sums that were rounded."""
    largest = np.abs(eigenvalues).max()
    rounding = terms * EPS * largest
    assert found.loss == pytest.approx(loss, rel=terms * EPS)
    assert found.gradient_norm == pytest.approx(norm, rel=terms * EPS, abs=terms * EPS)
    for value, residual, end in (
        (found.lambda_min, found.residual_min, eigenvalues[0]),
        (found.lambda_max, found.residual_max, eigenvalues[-1]),
    ):
        assert np.abs(eigenvalues - value).min() <= residual + rounding
        assert abs(value - end) <= residual + rounding
        assert residual <= TOLERANCE * largest * (1 + TOLERANCE) + rounding
    assert found.converged


FAMILIES = {
    "relu": {"arch": "mlp", "widths": 6},
    "tanh": {"arch": "mlp", "widths": 5, "depths": 2, "activation": "tanh"},
    "cnn": {"arch": "cnn", "widths": 3, "depths": 2},
    "vit": {"arch": "vit", "widths": 4, "heads": 2, "patch": 2, "activation": "gelu"},
}


@pytest.fixture
def three(monkeypatch):
    """Of a family: setting, variant and three runs of unequal n, for batches of three and passes of 8 samples."""
    monkeypatch.setattr(curvature, "_DENSE", 0)
    monkeypatch.setattr(curvature, "_at_once", lambda *_: 3)
    monkeypatch.setattr(curvature, "_rows", lambda *_: 8)  # three passes, the last ones of which two models are past

    def made(family):
        setting, (variant,) = setting_of(**FAMILIES[family])
        keys = ((0, 8, 120), (1, 19, 0), (2, 7, 40))
        runs = [result_of(setting, variant, seed, n, steps) for seed, n, steps in keys]
        assert runs[0].outcome is Outcome.FITTED
        assert runs[1].outcome is not Outcome.FITTED
        return setting, variant, runs

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_unequal_n_agree_with_the_dense_hessian(family, three):
    setting, variant, runs = three(family)
    for found, run in zip(measure(setting, [variant] * 3, runs), runs, strict=True):
        truth = dense(setting, variant, run)
        assert len(truth[2]) > curvature._BASIS
        agrees(found, *truth, 100 * len(truth[2]))
        assert found.products > curvature._POWER_STEPS + curvature._BASIS
        assert math.isnan(found.loss_slope)


def test_company_changes_numbers_by_rounding_only(three):
    setting, variant, runs = three("tanh")
    together = measure(setting, [variant] * 3, runs)
    for one, run in zip(together, runs, strict=True):
        (alone,) = measure(setting, [variant], [run])
        assert alone.loss == pytest.approx(one.loss, rel=100 * EPS)
        assert alone.gradient_norm == pytest.approx(one.gradient_norm, rel=1e4 * EPS)
        rounding = 1e4 * EPS * one.lambda_max
        assert abs(alone.lambda_min - one.lambda_min) <= alone.residual_min + one.residual_min + rounding
        assert abs(alone.lambda_max - one.lambda_max) <= alone.residual_max + one.residual_max + rounding
    # In another order the same models are in the same batch.
    turned = measure(setting, [variant] * 3, runs[::-1])
    assert repr(turned[::-1]) == repr(together)  # NaN are equal to NaN in it


def test_graphs_made_again_for_every_pass_give_the_same_bits(three, monkeypatch):
    setting, variant, runs = three("relu")
    kept = measure(setting, [variant] * 3, runs)
    monkeypatch.setattr(curvature, "_KEPT_BYTES", 0)
    assert not curvature._Models(setting, [variant], runs[:1])._keeps
    assert repr(measure(setting, [variant] * 3, runs)) == repr(kept)  # NaN are equal to NaN in it


def test_few_parameters_take_the_whole_hessian():
    setting, (variant,) = setting_of(widths=6)
    run = result_of(setting, variant, 0, 9, 60)
    (found,) = measure(setting, [variant], [run])
    truth = dense(setting, variant, run)
    agrees(found, *truth, 100 * len(truth[2]))
    assert found.products == len(truth[2]) == 123


def test_the_linear_classifier_has_no_negative_eigenvalue():
    """Its loss is convex, and flat along shifts of all logits: the smallest eigenvalue is 0."""
    setting, (variant,) = setting_of(depths=0)
    (found,) = measure(setting, [variant], [result_of(setting, variant, 0, 20, 30)])
    assert abs(found.lambda_min) <= 51 * 100 * EPS * found.lambda_max


def test_batch_normalisation_is_measured_at_its_running_averages(monkeypatch):
    setting, (variant,) = setting_of(arch="cnn", norm="batch", widths=4)
    runs = [result_of(setting, variant, seed, 10, 30) for seed in range(2)]
    assert not np.array_equal(runs[0].weights["norms.0.running_mean"], np.zeros(4))
    monkeypatch.setattr(curvature, "_at_once", lambda *_: 2)
    for found, run in zip(measure(setting, [variant] * 2, runs), runs, strict=True):
        agrees(found, *dense(setting, variant, run), 1e4)


def test_smoothing_and_decay_are_no_part_of_the_loss():
    plain, (variant,) = setting_of(widths=6)
    run = result_of(plain, variant, 0, 9, 60)
    trained = dataclasses.replace(variant, label_smoothing=0.2, weight_decay=0.1)
    assert repr(measure(plain, [trained], [run])) == repr(measure(plain, [variant], [run]))


def truncated(matrix: np.ndarray, steps: int, rng: np.random.Generator) -> float:
    """Smallest Ritz value of so many steps of Lanczos with full orthogonalisation."""
    basis = [rng.standard_normal(len(matrix))]
    basis[0] /= np.linalg.norm(basis[0])
    alpha, beta = [], []
    for _ in range(steps):
        u = matrix @ basis[-1]
        alpha.append(basis[-1] @ u)
        for _ in range(2):
            u = u - np.transpose(basis) @ (np.array(basis) @ u)
        beta.append(np.linalg.norm(u))
        basis.append(u / beta[-1])
    return float(eigh_tridiagonal(alpha, beta[:-1])[0][0])


def test_a_short_lanczos_says_positive_where_the_truth_is_negative():
    """Fitted runs near EMC50; which of them fit, and so which one shows it first, is the machine's."""
    prepared = prepare(ScanSpec(widths=8, activation="tanh"))
    for n, seed in itertools.product((225, 227, 206, 190), range(3)):
        with numerics(prepared):
            [run] = itertools.chain.from_iterable(prepared.again([Probe(0, n, seed)]))
            [found] = prepared.measured([run])
            models = curvature._Models(prepared.setting, [prepared.problems[0].variant], [run])
            matrix = np.stack([models.products([0], [row])[0] for row in np.eye(models.size)])
        matrix = (matrix + matrix.T) / 2
        short = [truncated(matrix, 30, np.random.default_rng(k)) for k in range(5)]
        if run.fitted and min(short) > 0:
            break
    else:
        pytest.fail("no run shows it")
    assert run.train_loss == pytest.approx(found.loss, rel=1e-4)  # trained in float32
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] < 0
    assert found.converged
    assert found.lambda_min < -found.residual_min < 0
    for value, residual, end in (
        (found.lambda_min, found.residual_min, eigenvalues[0]),
        (found.lambda_max, found.residual_max, eigenvalues[-1]),
    ):
        rounding = len(matrix) * EPS * eigenvalues[-1]
        assert np.abs(eigenvalues - value).min() <= residual + rounding
        assert abs(value - end) <= residual + rounding


SPECTRA = {
    "zero": np.zeros(120),
    "identity": np.full(120, 2.0),
    "rank 3": np.r_[np.zeros(117), -1.0, 4.0, 5.0],
    "positive": np.linspace(1e-3, 7.0, 120),
    "negative": -np.geomspace(1e-3, 1e3, 120),
    "tiny": np.r_[np.linspace(-1e-20, 3e-20, 120)],
    "close to zero": np.r_[-1e-4, np.linspace(0.0, 1.0, 119) ** 8],
    "symmetric": np.linspace(-2.0, 2.0, 120),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name, monkeypatch):
    monkeypatch.setattr(curvature, "_DENSE", 0)
    values = SPECTRA[name]
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((120, 120)))
    matrix = (rotation * values) @ rotation.T
    found = spectrum_ends(lambda v: matrix @ v, 120, np.random.default_rng(0))
    largest = np.abs(values).max()
    rounding = 120 * EPS * largest
    assert found.converged
    assert abs(found.lambda_min - values.min()) <= found.residual_min + rounding
    assert abs(found.lambda_max - values.max()) <= found.residual_max + rounding
    assert max(found.residual_min, found.residual_max) <= TOLERANCE * largest * (1 + TOLERANCE) + rounding


def test_what_has_not_converged_says_so_and_its_residual_still_bounds_the_error(monkeypatch):
    monkeypatch.setattr(curvature, "_RESTARTS", 2)
    values = np.linspace(-1.0, 1.0, 4000)
    found = spectrum_ends(lambda v: values * v, 4000, np.random.default_rng(0))
    assert not found.converged
    for value, residual in ((found.lambda_min, found.residual_min), (found.lambda_max, found.residual_max)):
        assert TOLERANCE < residual < 1
        assert np.abs(values - value).min() <= residual


@pytest.mark.parametrize("size", [100, 300])
def test_products_that_are_not_finite_give_nan(size):
    assert not spectrum_ends(lambda v: np.full(size, math.inf), size, np.random.default_rng(0)).converged
    setting, (variant,) = setting_of(widths=size // 20)
    run = result_of(setting, variant, 0, 9, 0)
    broken = dataclasses.replace(run, weights={name: w * math.nan for name, w in run.weights.items()})
    first, second = measure(setting, [variant] * 2, [broken, run])
    assert all(map(math.isnan, (first.loss, first.gradient_norm, first.lambda_min, first.residual_max)))
    assert not first.converged
    assert second.converged


def test_misuse_is_an_error():
    setting, (variant,) = setting_of(widths=6)
    run = result_of(setting, variant, 0, 9, 0)
    with pytest.raises(ValueError, match="no weights"):
        measure(setting, [variant], [dataclasses.replace(run, weights=None)])
    with pytest.raises(ValueError, match="several shapes"):
        measure(setting, [variant, dataclasses.replace(variant, width=7)], [run, run])


@pytest.mark.parametrize("where", ["between", "solver"])
def test_what_is_raised_ends_all_solvers(where, monkeypatch):
    setting, (variant,) = setting_of(widths=6)
    runs = [result_of(setting, variant, seed, 9, 0) for seed in range(3)]
    calls = []

    def stop(*_):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt

    if where == "solver":
        monkeypatch.setattr(curvature, "spectrum_ends", lambda product, size, rng: stop(product(np.ones(size))))
        calls += [0] * 3
    with pytest.raises(KeyboardInterrupt):
        measure(setting, [variant] * 3, runs, between=stop if where == "between" else lambda: None)
    assert not [thread for thread in threading.enumerate() if "curvature" in thread.name]


def test_the_slope_is_that_of_the_last_half():
    step = np.arange(1, 21) * 50
    loss = np.where(step < 500, 17.0, 3.0 * (step / 500.0) ** -1.5)
    assert loss_slope(History(step, loss, loss)) == pytest.approx(-1.5, abs=1e-12)
    # Two rows: ln 4 - ln 1 over ln 2.
    assert loss_slope(History(step[:2], np.array([1.0, 4.0]), loss[:2])) == pytest.approx(2.0, abs=1e-12)
    for bad in (loss[:1], np.r_[loss[:19], math.inf], np.r_[loss[:19], 0.0], loss[:0]):
        assert math.isnan(loss_slope(History(step[: len(bad)], bad, bad)))


def estimate(**changes) -> Estimate:
    return Estimate(
        **{**dataclasses.asdict(Estimate(0, 100.0, 90.0, 110.0, 9.0, 0.0, Censored.NO, False, True, 9)), **changes}
    )


def test_the_nearest_runs_are_chosen_half_of_them_fitted():
    def runs(fitted, *keys):
        outcome = Outcome.FITTED if fitted else Outcome.PLATEAUED
        return [ProbeResult(Probe(0, n, seed), outcome, 1, -1, 0.0, 0.0, NONE) for n, seed in keys]

    def keys(count, results, **changes):
        return [(r.probe.n, r.probe.seed) for r in choose(estimate(**changes), results, count)]

    fits = runs(True, (90, 0), (99, 5), (99, 1), (80, 0), (120, 0))
    fails = runs(False, (300, 0), (102, 0), (101, 0))
    both = [*fails, *fits]
    assert keys(4, both) == keys(4, both[::-1]) == [(99, 1), (99, 5), (101, 0), (102, 0)]
    assert keys(3, both) == [(99, 1), (99, 5), (101, 0)]
    assert keys(1, both) == [(99, 1)]
    assert keys(0, both) == []
    assert keys(20, both) == sorted((r.probe.n, r.probe.seed) for r in both)
    assert keys(4, fits) == [(90, 0), (99, 1), (99, 5), (120, 0)]  # 120 is nearer to 100 than 80, in ln n
    assert keys(6, both) == [(90, 0), (99, 1), (99, 5), (101, 0), (102, 0), (300, 0)]
    assert keys(2, [*runs(True, (100, SHORT)), *both]) == [(99, 1), (101, 0)]
    above = {"censored": Censored.ABOVE, "emc50": math.nan, "emc50_low": 300.0, "emc50_high": math.inf}
    assert keys(2, both, **above) == [(120, 0), (300, 0)]
    below = {"censored": Censored.BELOW, "emc50": math.nan, "emc50_low": 0.0, "emc50_high": 80.0}
    assert keys(2, both, **below) == [(80, 0), (101, 0)]
    assert keys(2, both, emc50=math.nan) == []


SMALL = {"widths": (3, 6), "steps": 400, "check_every": 50, "max_probes": 14, "data": "gaussian:8", "classes": 3}


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    path = tmp_path_factory.mktemp("curvature") / "emc.h5"
    seen = []
    return fasttrain.scan(ScanSpec(**SMALL), out=path, curvature=4, on_progress=seen.append), path, seen


def test_a_scan_looks_at_runs_of_every_variant_and_changes_nothing_else(scanned):
    results, path, seen = scanned
    plain = fasttrain.scan(ScanSpec(**SMALL))
    pd.testing.assert_frame_equal(results.curves, plain.curves, check_exact=True)
    assert plain.curvature.empty
    assert list(plain.curvature.columns) == list(results.curvature.columns)
    again = fasttrain.scan(ScanSpec(**SMALL), curvature=4)  # in memory
    joined = [
        r.curvature.merge(r.probes[["probe", "variant", "n", "seed", "outcome"]], on="probe") for r in (results, again)
    ]
    key = ["variant", "n", "seed"]
    pd.testing.assert_frame_equal(*(j.sort_values(key).drop(columns="probe").reset_index(drop=True) for j in joined))
    assert joined[0].groupby("variant").size().tolist() == [4, 4]
    assert joined[0].groupby("variant")["outcome"].agg(lambda o: (o == "fitted").sum()).tolist() == [2, 2]
    assert results.curvature["row"].tolist() == list(range(8))
    assert results.curvature["converged"].all()
    for row in results.curvature.itertuples():
        stored = results.probes.iloc[row.probe]
        assert row.loss == pytest.approx(stored["train_loss"], rel=1e-4)  # trained in float32
        curve = results.history(row.probe)
        late = curve[curve["step"] >= curve["step"].iloc[-1] / 2]
        slope = np.polyfit(np.log(late["step"]), np.log(late["train_loss"]), 1)[0] if len(late) > 1 else math.nan
        assert row.loss_slope == pytest.approx(slope, rel=1e-9, nan_ok=True)
    assert results.attrs["status"] == "complete"
    assert results.attrs["curvature_seconds"] > 0 == plain.attrs["curvature_seconds"]
    assert results.attrs["model_steps"] == results.probes["steps"].sum()
    assert (seen[-1].measured, seen[-1].to_measure) == (8, 8)
    assert "curvature of 8/8 runs" in summary(seen[-1])[1]
    pd.testing.assert_frame_equal(fasttrain.load(path).curvature, results.curvature)


def test_variants_of_one_shape_are_measured_with_their_own_data():
    own = {"widths": 4, "data": "digits", "classes": None, "labels": "random,true", "n_max": 60, "max_probes": 10}
    spec = ScanSpec(**{**SMALL, **own})
    results = fasttrain.scan(spec, curvature=2)
    rows = results.probes.iloc[results.curvature["probe"]]
    assert set(rows["labels"]) == {"random", "true"}
    np.testing.assert_allclose(results.curvature["loss"], rows["train_loss"], rtol=1e-4)


def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path):
    calls = []

    def second_interrupts(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(fasttrain.prepare, "measure", second_interrupts)
    with pytest.raises(KeyboardInterrupt):
        fasttrain.scan(ScanSpec(**SMALL), out=tmp_path / "emc.h5", curvature=2)
    results = fasttrain.load(tmp_path / "emc.h5")
    assert results.attrs["status"] == "interrupted"
    assert results.curves["finished"].all()
    assert (results.probes["seed"] < SHORT).sum() == results.curves["n_probes"].sum()
    assert len(results.curvature) == 2
    assert results.attrs["curvature_seconds"] > 0


def test_a_run_that_ends_otherwise_is_left_out(monkeypatch):
    again = fasttrain.prepare.Prepared.again

    def other(self, probes):
        for results in again(self, probes):
            yield [dataclasses.replace(r, train_loss=r.train_loss * (1 + (r.probe == probes[1]))) for r in results]

    monkeypatch.setattr(fasttrain.prepare.Prepared, "again", other)
    with pytest.warns(UserWarning, match="1 of 4 runs ended otherwise"):
        results = fasttrain.scan(ScanSpec(**SMALL), curvature=2)
    assert len(results.curvature) == 3


def test_a_run_made_again_has_the_same_curvature(scanned, capsys):
    results, path, _ = scanned
    row = results.curvature.iloc[0]
    again = fasttrain.rerun(path, int(row["probe"]), curvature=True)
    assert again.differs == ()
    largest = max(abs(row["lambda_min"]), row["lambda_max"])
    assert again.curvature.lambda_max == pytest.approx(row["lambda_max"], abs=2 * TOLERANCE * largest)
    assert again.curvature.gradient_norm == pytest.approx(row["gradient_norm"], rel=1e-9)
    assert fasttrain.rerun(path, int(row["probe"])).curvature is None
    assert main(["rerun", str(path), "--probe", str(int(row["probe"])), "--curvature"]) == 0
    out = capsys.readouterr().out
    assert "lambda min" in out
    assert f"{row['lambda_max']:#.3g}" in out


def test_show_prints_the_table(scanned, tmp_path, capsys):
    results, path, _ = scanned
    assert main(["show", str(path)]) == 0
    assert "lambda" not in capsys.readouterr().out
    assert main(["show", str(path), "--curvature"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8 + 2
    for line, row in zip(lines[1:9], results.curvature.itertuples(), strict=True):
        assert {f"{row.lambda_min:#.3g}", f"{row.lambda_max:#.3g}", str(row.products)} <= set(line.split())
    negative = int((results.curvature["lambda_min"] < -results.curvature["residual_min"]).sum())
    assert lines[-1].startswith(f"8 runs, of which {negative} with")
    fasttrain.scan(ScanSpec(**{**SMALL, "max_probes": 2}), out=tmp_path / "none.h5")
    assert main(["show", str(tmp_path / "none.h5"), "--curvature"]) == 0
    assert "scan --curvature K" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["-1", "x", "1.5"])
def test_bad_numbers_are_refused(value, tmp_path, capsys):
    assert main(["scan", "--curvature", value, "--out", str(tmp_path / "x.h5")]) == 2
    err = capsys.readouterr().err
    assert f"--curvature {value}: expected a whole number" in err
    with pytest.raises(UserError, match="whole number"):
        fasttrain.scan(ScanSpec(**SMALL), curvature=-1, out=tmp_path / "x.h5")
    assert not list(tmp_path.iterdir())


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


class Flat(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear = torch.nn.Linear(8, classes)

    def forward(self, x):
        return _Once.apply(self.linear(x.flatten(1)))


def once(width, depth, in_shape, classes):
    return Flat(classes)


def branching(width, depth, in_shape, classes):
    class Branching(Flat):
        def forward(self, x):
            out = self.linear(x.flatten(1))
            return out * 2 if out.detach().abs().sum() < 0 else out

    return Branching(classes)


def test_modules_of_the_users_own():
    fields = {**SMALL, "steps": 100, "max_probes": 4, "backend": "loop", "widths": 1}
    with pytest.raises(UserError, match="cannot be differentiated twice") as caught:
        fasttrain.scan(ScanSpec(**{**fields, "arch": once}), curvature=1)
    assert caught.value.option == "curvature"
    # What vmap cannot batch is measured one after the other.
    results = fasttrain.scan(ScanSpec(**{**fields, "arch": branching}), curvature=2)
    assert len(results.curvature) == 2
    rows = results.probes.iloc[results.curvature["probe"]]
    np.testing.assert_allclose(results.curvature["loss"], rows["train_loss"], rtol=1e-4)
    assert (results.curvature["products"] == 27).all()


@pytest.mark.parametrize("version", [1, 2])
def test_older_files_have_none(version, tmp_path):
    packed = Path(__file__).parent / "data" / f"version{version}.h5.gz"
    (tmp_path / "old.h5").write_bytes(gzip.decompress(packed.read_bytes()))
    results = fasttrain.load(tmp_path / "old.h5")
    assert results.curvature.empty
    assert list(results.curvature.columns) == [column.name for column in GROUPS["curvature"]]
    assert results.curvature["converged"].dtype == np.bool_
