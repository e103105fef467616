"""Runs under way that go on from the disk: the same bits as runs that nobody stopped, on every backend."""

import contextlib
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from test_resume import assert_same

import fasttrain
from fasttrain import ScanSpec, UserError, checkpoints
from fasttrain import run as module
from fasttrain.backends import make_backend
from fasttrain.backends.apart import ApartBackend, Processes
from fasttrain.backends.base import Run
from fasttrain.checkpoints import checkpoint_path, keep, kept
from fasttrain.cli import main
from fasttrain.prepare import numerics, prepare
from fasttrain.records import Probe
from fasttrain.spec import OPTIMIZERS
from fasttrain.trainer import Trainer

IMAGES = {"data": "gaussian:1x6x6", "classes": 3}
PLAIN = {"data": "gaussian:9", "classes": 3, "depths": (2,)}
CASES = [
    *[("loop", {**PLAIN, "optimizer": optimizer}) for optimizer in OPTIMIZERS],
    *[("stacked", {**PLAIN, "optimizer": optimizer}) for optimizer in OPTIMIZERS],
    ("loop", {**IMAGES, "arch": "cnn", "norm": "batch"}),
    ("loop", {**PLAIN, "optimizer": "sgd", "schedule": "cosine", "warmup": 9}),
    ("stacked", {**PLAIN, "optimizer": "sgd", "schedule": "cosine", "warmup": 9}),
    ("stacked", {**PLAIN, "batch_size": "full"}),
    ("vmap", {**IMAGES, "arch": "cnn"}),
    ("vmap", {**IMAGES, "arch": "vit", "optimizer": "adamw", "weight_decay": 0.01}),
    ("native", {**PLAIN, "optimizer": "sgd"}),
    ("native", {**PLAIN, "optimizer": "adam"}),
    ("native", {**PLAIN, "optimizer": "adam", "precision": "float64"}),
    ("apart", PLAIN),
]
PROBES = [Probe(0, 40, 3), Probe(0, 23, 1), Probe(0, 61, 0)]
STOPPED = (20, 7)  # steps before the second and third run joined, and steps after it: not at a check


def ended(backend, state):
    """The results of all runs of a state with their parameters, by probe."""
    found = {}
    while True:
        report = backend.run(state, state.clock + 10)
        gone = dict(report.ended)
        for position, result in gone.items():
            found[result.probe] = result, backend.parameters(state, position)
        keep = [i for i in range(len(state.runs)) if i not in gone]
        if not keep:
            return found
        if gone:
            state = backend.select(state, keep)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=[f"{n}-{'-'.join(map(str, f.values()))}" for n, f in CASES])
def test_runs_go_on_bit_for_bit(tmp_path, name, fields):
    own = "stacked" if name == "apart" else name
    spec = ScanSpec(**{"widths": (4,), "steps": 60, "check_every": 10, "early_stop": False, "backend": own, **fields})
    prepared = prepare(spec)
    [problem] = prepared.problems
    setting = prepared.setting

    with contextlib.ExitStack() as stack, numerics(prepared):

        def made():
            if name != "apart":
                return make_backend(own, setting, problem.variant)
            processes = Processes(1)
            stack.callback(processes.close)
            return ApartBackend(own, setting, problem.variant, processes)

        def runs(probes, saved=None):
            return [Run.of(setting, problem, probe, saved and saved[probe]) for probe in probes]

        backend = made()
        wanted = ended(backend, backend.init(runs(PROBES)))
        state = backend.init(runs(PROBES[:1]))
        assert not backend.run(state, STOPPED[0]).ended
        state = backend.insert(state, runs(PROBES[1:]))
        assert not backend.run(state, sum(STOPPED)).ended
        saved = dict(zip(PROBES, backend.saved(state), strict=True))
        assert [int(saved[probe]["step"]) for probe in PROBES] == [sum(STOPPED), STOPPED[1], STOPPED[1]]
        keep(tmp_path / "emc.h5", "mine", {probe: one | {"clock": np.zeros(3)} for probe, one in saved.items()})
        read = kept(tmp_path / "emc.h5", "mine")
        # In other company: one after the other, and in another order.
        other = made() if name == "apart" else backend
        state = other.init(runs(PROBES[2:], read))
        state = other.insert(state, runs([PROBES[1], PROBES[0]], read))
        found = ended(other, state)
        # What was saved is not what goes on: saving changed nothing.
        still = ended(backend, backend.init(runs(PROBES, saved)))
    for probe, (result, parameters) in wanted.items():
        for mine, values in (found[probe], still[probe]):
            assert (mine.outcome, mine.steps, mine.train_loss) == (result.outcome, result.steps, result.train_loss)
            assert np.array_equal(mine.history.train_loss, result.history.train_loss)
            assert np.array_equal(mine.history.train_accuracy, result.history.train_accuracy)
            assert all(np.array_equal(values[key], parameters[key]) for key in parameters)


LONG = ScanSpec(widths=(3, 5), data="gaussian:8", classes=2, steps=3000, check_every=50, max_probes=24, seed=4)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return fasttrain.scan(LONG, out=tmp_path_factory.mktemp("unbroken") / "emc.h5")


@pytest.fixture
def begun(monkeypatch):
    """The steps at which runs went on."""
    steps = []
    original = Run.of.__func__

    def of(cls, setting, problem, probe, begun=None):
        run = original(cls, setting, problem, probe, begun)
        if begun is not None:
            steps.append(run.step)
        return run

    monkeypatch.setattr(Run, "of", classmethod(of))
    return steps


def killed(path, monkeypatch, after):
    """A scan that is stopped as soon as so many of its runs are done and others are in a checkpoint."""
    written = checkpoints.keep

    def kill(where, own, runs):
        written(where, own, runs)
        done = len(fasttrain.load(where).probes)
        if done >= after and any(saved["step"] > 0 for saved in runs.values()):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "keep", kill)
        patch.setattr(module, "_CHECKPOINT_SHARE", 1e9)
        patch.setattr(module, "_COMMIT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            fasttrain.scan(LONG, out=path, checkpoint=1e-6)


def test_a_scan_goes_on_with_what_was_under_way(tmp_path, monkeypatch, unbroken, begun):
    path = tmp_path / "emc.h5"
    killed(path, monkeypatch, 7)
    assert checkpoint_path(path).exists()
    assert begun == []
    found = fasttrain.resume(path)
    assert begun
    assert max(begun) > 0
    assert_same(found, unbroken)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["emc.h5"]
    assert (found.probes["finished"] >= found.probes["started"]).all()
    assert (found.probes["started"] >= 0).all()


def test_again_and_again(tmp_path, monkeypatch, unbroken, begun):
    path = tmp_path / "emc.h5"
    killed(path, monkeypatch, 5)
    for _ in range(200):
        found = fasttrain.resume(path, time_limit=0.3, checkpoint=1000.0)
        if found.attrs["status"] == "complete":
            break
    assert len(begun) > 1
    assert_same(found, unbroken)


def test_the_time_limit_leaves_a_checkpoint_where_one_was_asked_for(tmp_path):
    for checkpoint in (None, 1000.0):
        path = tmp_path / f"{checkpoint}.h5"
        assert fasttrain.scan(LONG, out=path, time_limit=0.05, checkpoint=checkpoint).attrs["status"] == "interrupted"
        assert checkpoint_path(path).exists() == (checkpoint is not None)


def damaged(contents):
    half = contents[: len(contents) // 2]
    flipped = bytearray(contents)
    flipped[len(contents) // 3] ^= 4
    other = contents.replace(b'"params"', b'"parans"')
    return {"half": half, "flipped": bytes(flipped), "empty": b"", "renamed": other, "noise": b"\x00\xff" * 50}


@pytest.mark.parametrize("kind", ["half", "flipped", "empty", "renamed", "noise"])
def test_a_damaged_checkpoint_costs_the_runs_under_way_alone(tmp_path, monkeypatch, unbroken, begun, kind):
    path = tmp_path / "emc.h5"
    killed(path, monkeypatch, 7)
    place = checkpoint_path(path)
    place.write_bytes(damaged(place.read_bytes())[kind])
    with pytest.warns(UserWarning, match="emc.h5.checkpoint is damaged, or of another scan or installation"):
        found = fasttrain.resume(path)
    assert begun == []
    assert_same(found, unbroken)
    assert not place.exists()


def test_wrong_contents_behind_right_checksums_are_found(tmp_path, monkeypatch, unbroken):
    path = tmp_path / "emc.h5"
    killed(path, monkeypatch, 7)
    prepared = prepare(LONG)
    own = module.identity(LONG, (), module.stated_conditions(prepared))
    right = kept(path, own)
    assert right
    assert module.sound(prepared, right)
    probe, saved = next(iter(right.items()))

    def with_(**changes):
        return {probe: {**saved, **changes}}

    wrong = [
        with_(step=np.array(10**9)),
        with_(step=np.array(-1)),
        with_(step=np.array(0.5)),
        with_(params=saved["params"][:-1]),
        with_(params=saved["params"].astype(np.float64)),
        with_(checks=saved["checks"][:, :1]),
        with_(checks=np.full((int(saved["step"]) // 50, 2), np.nan)),
        with_(checks=np.zeros((int(saved["step"]) // 50 + 1, 2))),
        with_(clock=np.zeros(2)),
        with_(clock=np.array([0.0, np.nan, 1.0])),
        {probe: {name: values for name, values in saved.items() if name != "clock"}},
        {probe: {name: values for name, values in saved.items() if name != "optimizer"}},
        {Probe(9, 5, 0): saved},
        {Probe(0, 0, 0): saved},
    ]
    assert not any(module.sound(prepared, one) for one in wrong)
    keep(path, own, wrong[3])
    with pytest.warns(UserWarning, match="is damaged"):
        assert_same(fasttrain.resume(path), unbroken)


def test_a_checkpoint_of_other_versions_is_left_alone(tmp_path, monkeypatch, begun):
    path = tmp_path / "emc.h5"
    killed(path, monkeypatch, 7)
    monkeypatch.setattr(torch, "__version__", "0.0")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fasttrain.resume(path)
    assert any("checkpoint is damaged, or of another scan or installation" in str(one.message) for one in said)
    assert begun == []


def test_a_full_disk_stops_no_scan(tmp_path, monkeypatch, unbroken):
    tried = []

    def full(*_):
        tried.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "keep", full)
    monkeypatch.setattr(module, "_CHECKPOINT_SHARE", 1.0)
    found = fasttrain.scan(LONG, out=tmp_path / "emc.h5", checkpoint=0.05)
    assert tried
    assert_same(found, unbroken)


def test_another_scan_and_an_extension_drop_it(tmp_path, monkeypatch, begun):
    path = tmp_path / "emc.h5"
    killed(path, monkeypatch, 7)
    saved = checkpoint_path(path).read_bytes()
    fasttrain.extend(path, {"max_probes": 30})
    assert not checkpoint_path(path).exists()
    checkpoint_path(path).write_bytes(saved)
    fasttrain.scan(
        ScanSpec(**{"widths": (2,), "steps": 50, "max_probes": 2, "data": "gaussian:2"}), out=path, overwrite=True
    )
    assert not checkpoint_path(path).exists()
    assert begun == []


def test_workers_hand_over_what_they_hold():
    """A checkpoint waits for the turns that threads are in, and drops no result that comes meanwhile."""
    prepared = prepare(LONG)
    with numerics(prepared):
        trainer = Trainer(
            prepared.setting, prepared.problems, prepared.make_backend, 8, workers=2, bucket=prepared.bucket
        )
        asked = [Probe(0, 8 + k, k) for k in range(30)]
        trainer.submit(asked)
        results, saved = [], {}
        while not trainer.idle:
            results += trainer.advance()
            saved = trainer.saved(results.extend)
            assert len(saved) == trainer.running
            assert not {r.probe for r in results} & saved.keys()
        trainer.close()
    assert sorted(r.probe.seed for r in results) == list(range(30))


def test_bad_times_are_named(tmp_path, capsys):
    with pytest.raises(UserError, match="checkpoint=0: expected a time above 0"):
        fasttrain.scan(LONG, out=tmp_path / "emc.h5", checkpoint=0)
    with pytest.raises(UserError, match="checkpoint=60: is for a scan with a file"):
        fasttrain.scan(LONG, checkpoint=60)
    assert main(["scan", "--checkpoint", "soon", "--out", str(tmp_path / "emc.h5")]) == 2
    assert capsys.readouterr().err.startswith("fasttrain: --checkpoint soon: expected a time above 0, such as")
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(tmp_path, unbroken):
    path = tmp_path / "emc.h5"
    line = "--widths 3,5 --data gaussian:8 --classes 2 --steps 3000 --check-every 50 --max-probes 24 --seed 4 --quiet"
    assert main(["scan", *line.split(), "--out", str(path), "--time-limit", "0.1s", "--checkpoint", "10m"]) == 75
    assert checkpoint_path(path).exists()
    assert main(["resume", str(path), "--quiet", "--checkpoint", "10m"]) == 0
    pd.testing.assert_frame_equal(fasttrain.load(path).curves, unbroken.curves, check_exact=True)


def test_a_complete_scan_and_its_end_leave_no_checkpoint(tmp_path, monkeypatch, unbroken):
    """Killed between the end of a scan and that of its checkpoint; and inside of the writing of one."""
    path = tmp_path / "emc.h5"
    killed(path, monkeypatch, 7)
    left = tmp_path / ".emc.h5.checkpoint.next"
    left.write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "drop", lambda path: None)
        fasttrain.resume(path)
    assert checkpoint_path(path).exists()
    assert_same(fasttrain.resume(path), unbroken)
    assert [each.name for each in tmp_path.iterdir()] == ["emc.h5"]


def test_what_has_ended_is_committed_before_a_checkpoint_forgets_it(tmp_path, monkeypatch):
    path = tmp_path / "emc.h5"
    seen = []

    def look(where, own, runs):
        seen.append(len(fasttrain.load(where).probes))
        done.append(scans[0].done)
        raise MemoryError  # which stops no scan either

    done, scans = [], []
    start = module._Scan.run
    monkeypatch.setattr(module._Scan, "run", lambda self: (scans.append(self), start(self))[1])
    monkeypatch.setattr(checkpoints, "keep", look)
    monkeypatch.setattr(module, "_CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 1e9)
    assert fasttrain.scan(LONG, out=path, checkpoint=1e-6).attrs["status"] == "complete"
    assert max(seen) > 0
    assert seen == done
