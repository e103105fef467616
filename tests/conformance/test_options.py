"""Optimizers and options of the stacked backends: the oracle's path, a model's own bits, and who carries what."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Bench

from fasttrain import ScanSpec, UserError
from fasttrain.backends import choose
from fasttrain.backends import triton as triton_backend
from fasttrain.backends.base import OPTIONS, Setting
from fasttrain.optim import OPTIMIZERS

STEPS = 25
NS = [5, 40, 150, 90, 11]
ALL = {"clip": 0.5, "weight_decay": (0.02, 0.1), "label_smoothing": 0.1, "schedule": "cosine", "warmup": 5}
CASES = [
    {"optimizer": "sgd", "nesterov": True, "schedule": "linear", "label_smoothing": 0.2, "init_scale": 0.5},
    {"optimizer": "sgd", "lr": (0.01, 0.1), "batch_size": "full", **ALL},
    {"optimizer": "adam", "lr": (0.003, 0.02), "warmup": 7, "clip": 0.3},
    {"optimizer": "adamw", "lr": (0.003, 0.02), **ALL},
    {"optimizer": "rmsprop", "weight_decay": 0.05, "lr": (0.001, 0.01)},
    {"optimizer": "shampoo", **ALL},
    {"optimizer": "muon", "nesterov": True, **ALL},
]


def ident(fields: dict) -> str:
    return "-".join(map(str, fields.values()))


def walk(backend: str, fields: dict, nudge: float = 0.0):
    """Minibatch losses [S, E], final parameters and the losses of a last check, in float64."""
    fields = {"widths": 9, "batch_size": 16, "classes": 4, "depths": 2, "steps": STEPS, "lr": (0.01, 0.05), **fields}
    losses, finals, runs = Bench(backend, NS, **fields, check_every=STEPS).walk(STEPS, nudge)
    checks = np.array([run.monitor.history().train_loss for run in runs])
    assert checks.shape == (len(NS), 1)
    return losses.T, finals, checks


@pytest.mark.parametrize("fields", CASES, ids=ident)
def test_the_path_is_the_oracles_to_rounding(fields):
    """As in test_trajectory.py: to what inputs that differ by four units in the last place do to the oracle."""
    truth, nudged = walk("loop", fields), walk("loop", fields, nudge=4 * 2.0**-52)
    for backend in ("vmap", "stacked"):
        for own, expected, moved in zip(walk(backend, fields), truth, nudged, strict=True):
            size = np.abs(expected).max(1)
            allowed = 30 * np.abs(moved - expected).max(1) / size + 64 * 2.0**-52
            assert (np.abs(own - expected).max(1) / size <= allowed).all()
            assert allowed.max() < 1e-8
    assert truth[0][:, -5:].mean() < 0.95 * truth[0][:, :5].mean()


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked"])
@pytest.mark.parametrize("field", [{"label_smoothing": 0.2}, {"clip": 0.1}, {"warmup": 3}], ids=str)
def test_an_option_changes_the_path_and_checks_stay_plain(backend, field):
    """One full-batch step: the loss is the smoothed one; a check is the plain one of the parameters it finds."""
    bench, plain = (
        Bench(backend, [40], widths=9, classes=4, batch_size="full", check_every=1, steps=10, optimizer="sgd", **more)
        for more in (field, {})
    )
    paths = []
    for one in (bench, plain):
        state = one.backend.init(one.runs([0]))
        one.backend.run(state, 1)
        paths.append((state.runs[0], one.parameters(state, 0), one.backend.parameters(state, 0)))
    (run, own, named), (_, other, _) = paths
    assert not np.array_equal(own, other)
    x, y = run.task.pool[run.task.rows], run.task.y

    def loss(p: dict, smoothing: float) -> float:
        hidden = np.maximum(x @ p["layers.0.weight"].T + p["layers.0.bias"], 0)
        logits = torch.as_tensor(hidden @ p["layers.1.weight"].T + p["layers.1.bias"])
        log_p = torch.log_softmax(logits, 1)
        target = torch.nn.functional.one_hot(torch.as_tensor(y), 4).double() * (1 - smoothing) + smoothing / 4
        return float(-(target * log_p).sum(1).mean())

    smoothing = field.get("label_smoothing", 0.0)
    assert run.batch_loss == pytest.approx(loss(run.initial_weights(bench.setting), smoothing), rel=1e-12)
    assert run.monitor.history().train_loss[-1] == pytest.approx(loss(named, 0.0), rel=1e-12)


def test_the_initial_scale_is_of_weights():
    one, half = (Bench("loop", [40], widths=9, init_scale=scale) for scale in (1.0, 0.5))
    (a,), (b,) = one.runs([0]), half.runs([0])
    for (name, full), scaled in zip(
        a.initial_weights(one.setting).items(), b.initial_weights(half.setting).values(), strict=True
    ):
        np.testing.assert_array_equal(scaled, full * 0.5)
        assert full.any() == name.endswith("weight")


MANY = [33, 5, 129, 300, 77, 1, 256, 131, 64, 201]


@pytest.mark.parametrize(
    ("backend", "fields"),
    [
        ("stacked", {"optimizer": "sgd", "nesterov": True}),
        ("stacked", {"optimizer": "rmsprop", "depths": 0}),
        ("stacked", {"optimizer": "adamw", "batch_size": "full"}),
        ("stacked", {"optimizer": "shampoo", "depths": 2}),
        ("stacked", {"optimizer": "shampoo", "widths": 17, "batch_size": 5}),
        ("stacked", {"optimizer": "muon", "depths": 2}),
        ("stacked", {"optimizer": "muon", "widths": 65, "batch_size": 5}),
        ("vmap", {"optimizer": "shampoo"}),
        ("vmap", {"optimizer": "muon"}),
    ],
    ids=str,
)
def test_company_order_and_time_of_insertion_change_no_bit(backend, fields):
    """With all options, models of different decay, and roots of Shampoo's renewed at different steps of the whole."""
    fields = {"widths": 5, "batch_size": 7, "lr": (0.001, 0.01), "check_every": 13, **ALL, **fields}
    bench = Bench(backend, MANY, torch.float32, **fields)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        bench.assert_company_changes_no_bit(([3], [7, 2, 4], list(range(9, -1, -1))), 12)
    torch.set_num_threads(1)
    bench.assert_insertion_changes_no_bit(inserted=13, dropped=19, steps=23)


@pytest.mark.parametrize("optimizer", ["rmsprop", "shampoo", "muon"])
def test_a_model_that_explodes_touches_nobody_else(optimizer):
    bench = Bench("stacked", MANY, torch.float32, widths=5, batch_size=7, optimizer=optimizer, lr=(0.01, 1e38), clip=1)
    bench.assert_an_explosion_touches_nobody_else(25)


ASKED = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "Nesterov momentum": {"optimizer": "sgd", "nesterov": True},
    "weight decay": {"weight_decay": 0.1},
    "schedule": {"schedule": "cosine"},
    "warm-up": {"warmup": 10},
    "gradient clipping": {"clip": 1.0},
    "label smoothing": {"label_smoothing": 0.1},
    "initialisation scale": {"init_scale": 0.5},
}


def carried(backend: str, fields: dict, monkeypatch) -> bool:
    """Whether a backend takes a variant that asks for this."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    spec = ScanSpec(widths=8, data="gaussian:7", **fields)
    device = torch.device("cuda:0" if backend == "triton" else "cpu")
    try:
        return choose(backend, Setting(spec, 7, device, torch.float32), spec.variants(10)[0]) == backend
    except UserError:
        return False


def test_the_table_in_the_documents_is_what_the_backends_say(monkeypatch):
    assert set(OPTIONS) < set(ASKED)
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| option \|.*?(?=\n\n)", text, flags=re.MULTILINE | re.DOTALL)
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert header == ["option", "loop", "vmap", "stacked", "native", "triton"]
    assert [line[0] for line in lines] == list(ASKED)
    for option, *cells in lines:
        for backend, cell in zip(header[1:], cells, strict=True):
            assert cell == ("yes" if carried(backend, ASKED[option], monkeypatch) else "-"), (option, backend)


def test_auto_takes_a_backend_that_carries_an_option(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for option, fields in ASKED.items():
        spec = ScanSpec(widths=8, data="gaussian:7", **fields)
        for device, first, second in (("cpu", "native", "stacked"), ("cuda:0", "triton", "vmap")):
            setting = Setting(spec, 7, torch.device(device), torch.float32)
            expected = first if carried(first, fields, monkeypatch) else second
            assert choose("auto", setting, spec.variants(10)[0]) == expected, option
    assert triton_backend.OPTIONS == ("weight decay",)
    spec = ScanSpec(data="gaussian:7", clip=1.0)
    setting = Setting(spec, 7, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="backend=native: it has no gradient clipping; expected auto, stacked"):
        choose("native", setting, spec.variants(10)[0])
