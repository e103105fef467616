"""The memory that a plan counts for data and scratch, against the arrays that are alive while a scan runs."""

import ctypes
import gc
import tracemalloc

import numpy as np
import pytest
import torch

import fasttrain
from fasttrain import ScanSpec, UserError
from fasttrain.backends.base import Run
from fasttrain.data import check, describe, prepare
from fasttrain.kernels import native
from fasttrain.machine import Peak
from fasttrain.models import parameter_count
from fasttrain.plan import probe_bytes
from fasttrain.prepare import numerics
from fasttrain.prepare import prepare as prepared
from fasttrain.records import Probe, Problem
from fasttrain.trainer import Trainer

SAMPLES, FEATURES, TESTED = 4000, 400, 4000
MANY = {"labels": "random,true,corrupted:0.2", "inputs": "real,shuffled"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    rng = np.random.default_rng(0)
    folder, out = tmp_path_factory.mktemp("memory"), {}
    arrays = {
        "numbers": {"x": rng.standard_normal((SAMPLES, FEATURES))},
        "pixels": {"x": rng.integers(0, 256, (SAMPLES, 20, 20)).astype(np.uint8)},
    }
    test = {"x_test": rng.standard_normal((TESTED, FEATURES)), "y_test": np.arange(TESTED) % 10}
    for name, some in {**arrays, "official": {**arrays["numbers"], **test}}.items():
        np.savez(path := folder / f"{name}.npz", **some, y=np.arange(SAMPLES) % 10)
        out[name] = str(path)
    fasttrain.scan(ScanSpec(widths=3, n_max=20, steps=20, max_probes=3))  # imports what a scan does
    return out


def of_torch() -> int:
    """Bytes of all tensors that are alive, but for those that share an array's memory."""
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) is torch.Tensor]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.resizable()}.values())


def alive(spec: ScanSpec, monkeypatch) -> tuple[int, int]:
    """Bytes of arrays and tensors at the end of a scan, when its runs are gone, and the peak until then."""
    check(spec)  # reads the file, which is no part of the plan
    prepare.part.cache_clear()
    gc.collect()
    found = []

    def close(trainer: Trainer) -> None:
        _, peak = tracemalloc.get_traced_memory()
        domain = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]
        arrays = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(domain).traces)
        tensors = of_torch() - before
        found.append((arrays + tensors, peak + tensors))
        plain(trainer)

    plain = Trainer.close
    monkeypatch.setattr(Trainer, "close", close)
    before = of_torch()
    tracemalloc.start()
    try:
        fasttrain.scan(spec)
    finally:
        tracemalloc.stop()
    return found[0]


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        ("numbers", {"backend": "native", **MANY}),
        ("numbers", {"backend": "native", "precision": "float64", "labels": "true", "inputs": "shuffled"}),
        ("pixels", {"backend": "native", **MANY}),
        ("official", {"backend": "native", **MANY}),
        *(
            pytest.param(data, fields, marks=pytest.mark.slow)
            for data in ("numbers", "pixels")
            for fields in (
                {"backend": "loop", **MANY},
                {"backend": "vmap"},
                {"backend": "vmap", "labels": "true,corrupted:0.5", "precision": "float64"},
                {"backend": "vmap", "labels": "random,true", "widths": (2, 3)},
                {"backend": "stacked", "labels": "random,true", "inputs": "real,shuffled"},
                {"backend": "stacked", "inputs": "real,gaussian"},
            )
        ),
    ],
    ids=str,
)
def test_the_data_of_a_plan_are_what_is_kept(files, data, fields, monkeypatch):
    spec = ScanSpec(
        **{"data": files[data], "widths": 3, "n_max": 6, "steps": 200, "max_probes": 3, "lr": 0.1, **fields}
    )
    plan = prepared(spec).plan
    kept, peak = alive(spec, monkeypatch)
    assert kept <= plan.data_bytes + 2**20  # estimates, histories, code
    assert peak <= plan.memory_bytes
    # Not much more than there is: but what joins pools may hold three of them at once, and need not.
    joins = fields["backend"] in ("vmap", "stacked") and ("," in fields.get("labels", "") or "inputs" in fields)
    assert plan.data_bytes <= (3 if joins else 1.7) * peak


def test_drawn_data_belong_to_their_runs():
    assert prepared(ScanSpec(data="gaussian:64", widths=3, n_max=20)).plan.data_bytes == 0


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("width", [1, 16, 300])
@pytest.mark.parametrize("batch", [1, 64, 1000, "full"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_slot_holds_a_model_of_native_and_its_scratch(dtype, batch, width, depth):
    """What the compiled kernels ask for: parameters, optimizer state and a thread's scratch, beside the indices."""
    spec = ScanSpec(widths=width, depths=depth, batch_size=batch)
    (variant,) = spec.variants(10)
    info = describe("digits")
    problem = Problem(0, variant, parameter_count(variant, info.shape), 2, 1797)
    struct = native.Model(
        features=64, width=variant.width, depth=depth, classes=10, batch=variant.batch_size, n=1797,
        optimizer=list(native.OPTIMIZERS).index("adam"),
    )  # fmt: skip
    library, item = native.library(dtype), np.dtype(dtype).itemsize
    elements = 3 * library.parameters_size(ctypes.byref(struct)) + library.scratch_size(ctypes.byref(struct))
    assert probe_bytes(problem, spec, info, item, backend="native") >= item * elements


TIGHT = ScanSpec(widths=1024, depths=2, backend="stacked", data="gaussian:64", n_max=400, check_every=4)


def test_where_memory_limits_the_slots_it_is_measured(monkeypatch):
    """And so many models then take what the plan says."""
    estimated = prepared(TIGHT).plan
    assert not estimated.tight
    monkeypatch.setattr("fasttrain.prepare.available_bytes", lambda device: 700 * 2**20)
    one = prepared(TIGHT)
    plan = one.plan
    assert plan.tight
    assert 2 <= plan.slots < estimated.slots
    assert plan.model_bytes != estimated.model_bytes
    gc.collect()
    with numerics(one):
        peak = Peak(one.setting.device)
        [problem] = one.problems
        backend = one.make_backend(one.setting, problem.variant)
        state = backend.init([Run.of(one.setting, problem, Probe(0, 400, k)) for k in range(plan.slots)])
        backend.run(state, one.setting.spec.check_every)
        # Slots are replaced in parts, with both sets there for a moment.
        state = backend.select(state, range(plan.slots - 1))
        taken = peak.bytes
    # The numbers of models that are stacked are few (ensemble.capacity): up to half as many again.
    assert 0.5 * plan.memory_bytes < taken < 1.5 * plan.memory_bytes


def test_where_memory_is_plenty_nothing_is_tried(monkeypatch):
    def tried(device):
        raise AssertionError("measured")

    monkeypatch.setattr("fasttrain.prepare.Peak", tried)
    assert prepared(TIGHT).plan.slots == 64
    monkeypatch.setattr("fasttrain.prepare.available_bytes", lambda device: 700 * 2**20)
    with pytest.raises(AssertionError, match="measured"):
        prepared(TIGHT)


def test_a_system_that_does_not_tell_leaves_the_estimate(monkeypatch):
    def silent(device):
        raise OSError("no such file")

    monkeypatch.setattr("fasttrain.prepare.Peak", silent)
    monkeypatch.setattr("fasttrain.prepare.available_bytes", lambda device: 700 * 2**20)
    plan = prepared(TIGHT).plan
    assert plan.model_bytes == probe_bytes(plan.costliest.problem, TIGHT, check(TIGHT), 4, "cpu", "stacked")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_models_that_do_not_fit_after_all_are_named(monkeypatch, error):
    def full(self, state, until):
        raise error

    monkeypatch.setattr("fasttrain.backends.vmap.VmapBackend.run", full)
    monkeypatch.setattr("fasttrain.prepare.available_bytes", lambda device: 700 * 2**20)
    with pytest.raises(UserError, match=r"widths=1024: a model of .* parameters takes about .* GiB to train"):
        prepared(TIGHT)


def test_a_peak_counts_what_was_freed_again():
    peak = Peak(torch.device("cpu"))
    before = peak.bytes
    one = torch.ones(64 * 2**18)
    del one
    assert 60 * 2**20 < peak.bytes - before < 80 * 2**20
    assert Peak(torch.device("cpu")).bytes < 20 * 2**20
