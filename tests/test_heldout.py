"""Held-out accuracy, weights that are kept, and runs made again."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch

import fasttrain
from fasttrain import ScanSpec, UserError
from fasttrain.cli import main
from fasttrain.data import check, test_set
from fasttrain.models import build
from fasttrain.spec import SHORT

SPECS = {
    "native": ScanSpec(widths=(6, 20), labels="true,random", steps=400, max_probes=8, n_max=200),
    "cnn": ScanSpec(arch="cnn", widths=8, labels="corrupted:0.1", steps=400, check_every=50, max_probes=5, n_max=24),
    "loop": ScanSpec(
        arch="cnn", norm="batch", widths=6, labels="true", inputs="shuffled", steps=300, max_probes=5, n_max=24
    ),
    "float64": ScanSpec(arch="vit", widths=4, labels="true", steps=300, max_probes=4, n_max=16, precision="float64"),
}


@pytest.fixture(scope="module", params=SPECS)
def kept(request, tmp_path_factory):
    """A scan that kept its weights, and its file."""
    path = tmp_path_factory.mktemp("kept") / f"{request.param}.h5"
    return fasttrain.scan(SPECS[request.param], out=path, save_weights=True), path


def test_the_accuracy_is_that_of_the_kept_weights_on_what_was_held_out(kept):
    results, _ = kept
    spec = results.spec
    info = check(spec)
    fitted = results.probes[results.probes["outcome"] == "fitted"]
    assert len(fitted) >= 2
    seen = set()
    for row in fitted.itertuples():
        (variant,) = [v for v in spec.variants(10) if (v.width, v.labels) == (row.width, row.labels)]
        if row.labels == "random":
            assert np.isnan(row.test_accuracy)
            continue
        x, y = test_set(spec, row.labels, row.inputs, 10)
        assert len(y) == 359
        module = build(variant, info.shape).double().eval()
        missing, unexpected = module.load_state_dict(
            {name: torch.as_tensor(w) for name, w in results.weights(row.probe).items()}, strict=False
        )
        assert not unexpected
        assert all(name.endswith("num_batches_tracked") for name in missing)
        with torch.no_grad():
            logits = module(torch.as_tensor(x).view(-1, *((64,) if variant.arch == "mlp" else info.shape)))
        # A logit in float32 may change places with one that is as large to rounding.
        assert abs((logits.argmax(1).numpy() == y).mean() - row.test_accuracy) <= 1 / len(y)
        seen.add(row.test_accuracy)
    assert not seen or max(seen) > 0.15  # better than chance
    failed = results.probes[results.probes["outcome"] != "fitted"]
    assert failed["test_accuracy"].isna().all()


def test_weights_are_in_the_file_for_fitted_runs_only(kept):
    results, path = kept
    loaded = fasttrain.load(path)
    for row in results.probes.itertuples():
        if row.outcome != "fitted":
            with pytest.raises(UserError, match="were not kept"):
                loaded.weights(row.probe)
            continue
        with h5py.File(path) as file:
            stored = {name: data[()] for name, data in file[f"weights/{row.probe}"].items()}
        found = loaded.weights(row.probe)
        assert found.keys() == stored.keys()
        for name, values in found.items():
            np.testing.assert_array_equal(values, stored[name])
        assert sum(v.size for k, v in found.items() if "running" not in k and "tracked" not in k) == row.params


def test_a_run_made_again_is_the_same_to_the_bit(kept):
    results, path = kept
    for outcome in sorted(set(results.probes["outcome"])):
        probe = int(results.probes.index[results.probes["outcome"] == outcome][-1])
        again = fasttrain.rerun(path, probe)
        assert again.differs == ()
        assert again.history.equals(results.history(probe))
        if outcome == "fitted":
            for name, values in results.weights(probe).items():
                np.testing.assert_array_equal(again.result.weights[name], values)


def test_a_short_run_made_again_is_as_short(tmp_path, monkeypatch):
    """Confirming runs of a race on seeds of short ones."""
    monkeypatch.setattr("fasttrain.search.CONFIRM", SHORT)
    fields = {"widths": 6, "n_max": 200, "lr": (0.003, 0.01), "schedule": "cosine", "max_probes": 6}
    spec = ScanSpec(**fields, budget="90epochs", early_stop=False)
    path = tmp_path / "short.h5"
    probes = fasttrain.scan(spec, out=path).probes
    short = probes[probes["seed"] >= SHORT]
    full = np.ceil(90 * short["n"] / 64)
    assert (short["steps_budget"] == np.maximum(1, np.round(full / 3))).all()
    spent = short[short["outcome"] == "out_of_budget"]
    assert len(spent)
    assert (spent["steps"] == spent["steps_budget"]).all()
    for probe in short.index[:3]:
        assert fasttrain.rerun(path, int(probe)).differs == ()


def test_what_differs_from_the_file_is_named(kept):
    _, path = kept
    loaded = fasttrain.load(path)
    loaded.probes.loc[0, "train_loss"] += 1e-9
    assert fasttrain.rerun(loaded, 0).differs == ("train_loss",)


def test_without_being_asked_nothing_is_kept(tmp_path):
    results = fasttrain.scan(dataclasses.replace(SPECS["native"], max_probes=3), out=tmp_path / "no.h5")
    with h5py.File(tmp_path / "no.h5") as file:
        assert "weights" not in file
    with pytest.raises(UserError, match="were not kept"):
        results.weights(0)


def test_rerun_from_the_command_line(tmp_path, capsys):
    path = str(tmp_path / "x.h5")
    fasttrain.scan(dataclasses.replace(SPECS["native"], max_probes=3), out=path)
    assert main(["rerun", path, "--probe", "0"]) == 0
    assert "the same as in the file" in capsys.readouterr().out
    for probe, said in (("-1", "index of a run"), ("x", "index of a run"), ("10000", "no such probe")):
        assert main(["rerun", path, "--probe", probe]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert said in err
        assert err.count("\n") == 1
        assert f"--probe {probe}" in err


def test_another_generator_is_refused(tmp_path):
    path = tmp_path / "x.h5"
    fasttrain.scan(dataclasses.replace(SPECS["native"], max_probes=3), out=path)
    with h5py.File(path, "a") as file:
        file.attrs["generator_digest"] = "another"
    with pytest.raises(UserError, match="draws other random numbers"):
        fasttrain.rerun(path, 0)


def test_other_data_or_sources_are_refused(tmp_path):
    path = tmp_path / "mine.csv"
    rng = np.random.default_rng(0)
    lines = [",".join([*(f"{v:.3f}" for v in rng.standard_normal(3)), str(k % 2)]) for k in range(40)]
    path.write_text("a,b,c,label\n" + "\n".join(lines) + "\n")
    spec = ScanSpec(data=str(path), widths=3, steps=100, max_probes=3, n_max=8)
    results = fasttrain.scan(spec, out=tmp_path / "x.h5")
    assert fasttrain.rerun(results, 0).differs == ()
    path.write_text("a,b,c,label\n" + "\n".join(reversed(lines)) + "\n")
    with pytest.raises(UserError, match="not the data that the scan was made with"):
        fasttrain.rerun(tmp_path / "x.h5", 0)
    with h5py.File(tmp_path / "x.h5", "a") as file:
        file.attrs["arch_source"] = "mine:model=0"
    path.write_text("a,b,c,label\n" + "\n".join(lines) + "\n")
    with pytest.raises(UserError, match="not the source"):
        fasttrain.rerun(tmp_path / "x.h5", 0)
