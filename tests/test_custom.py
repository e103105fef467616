"""Models of the user's own: what they need, what vmap can batch, and what is said of the rest before training."""

import hashlib
import importlib
import sys
from pathlib import Path

import my_models
import numpy as np
import pytest
import torch

from fasttrain import ScanSpec, UserError, scan
from fasttrain.cli import main
from fasttrain.models import custom, draw_weights, parameter_count

SHAPE = (1, 8, 8)


def variant(name: str, width: int = 4):
    return ScanSpec(arch=f"my_models:{name}", widths=width).variants(10)[0]


@pytest.mark.parametrize("name", ["residual", "plain_cnn", "tied"])
def test_what_vmap_batches_is_accepted_and_counted(name):
    one = variant(name)
    custom.check(one, SHAPE, batched=True)
    module = getattr(my_models, name)(4, 1, SHAPE, 10)
    assert parameter_count(one, SHAPE) == sum(p.numel() for p in module.parameters())


BAD = {
    "wrong_shape": "shape (6, 11); expected (6, 10)",
    "failing": "width 4 is not for me",
    "no_module": "gave a int",
    "no_parameters": "has no parameters",
    "NUMBER": "is not a function",
    "missing": "cannot be imported",
    "dropped": "layer 2 (Dropout) gives other outputs",
    "normed_and_dropped": "layer 3 (Dropout) gives other outputs",
    "frozen": "parameter 1.weight is frozen",
    "random_buffer": "buffer mask is random",
    "numpy_drawn": "parameter 1.bias differs from call to call",
    "unused": "parameter spare.weight has no part",
    "exiting": "raised for width 4, depth 1: SystemExit: no",
    "elsewhere": "parameter 1.weight is on the device meta",
    "one_for_all": "gives the same parameter 1.weight at every call",
    "seeding": "seeds torch's generator",
    "growing": "gives modules with other parameters at every call",
    "pair": "gave a tuple; expected a tensor of logits",
    "not_finite": "logits at the initial weights are not finite",
    "overwriting": "writes into its inputs",
    "lazy": "parameter 1.weight has no shape yet",
}
UNBATCHED = {
    "normed": "layer 2 (BatchNorm1d) mixes the samples",
    "untracked": "layer 2 (BatchNorm1d) mixes the samples",
    "branching": "vmap cannot batch it",
    "counting": "buffer calls changes in place",
    "doubling": "other outputs in eval()",
    "recurrent": "vmap cannot batch it",
}


@pytest.mark.parametrize(("name", "said"), [*BAD.items(), *UNBATCHED.items()])
def test_what_cannot_be_trained_is_named_before_training(name, said):
    with pytest.raises(UserError) as caught:
        custom.check(variant(name), SHAPE, batched=True)
    assert caught.value.option == "arch"
    assert said in caught.value.expected
    assert "\n" not in str(caught.value)
    assert ("--backend loop" in caught.value.expected) == (name in UNBATCHED)


def test_a_module_is_tried_in_the_precision_that_it_trains_in():
    custom.check(variant("single_only"), SHAPE, batched=True)
    with pytest.raises(UserError, match=r"fails on inputs of shape .*dtype"):
        scan(ScanSpec(arch="my_models:single_only", widths=3, precision="float64"))


@pytest.mark.parametrize("name", UNBATCHED)
def test_the_loop_takes_what_vmap_cannot_batch(name):
    custom.check(variant(name), SHAPE, batched=False)


def test_weights_are_drawn_by_the_module_under_the_runs_key():
    one = variant("residual")
    state = torch.get_rng_state()
    first, again, other = (draw_weights(one, SHAPE, scan_seed=0, seed=seed, n=30) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first["first.weight"], other["first.weight"])
    bound = 1 / 8  # torch's own initialisation of a layer of 64 inputs
    assert 0.9 * bound < np.abs(first["first.weight"]).max() <= bound
    scaled = draw_weights(
        ScanSpec(arch="my_models:residual", widths=4, init_scale=3).variants(10)[0], SHAPE, scan_seed=0, seed=1, n=30
    )
    np.testing.assert_array_equal(scaled["first.weight"], 3 * first["first.weight"])
    np.testing.assert_array_equal(scaled["first.bias"], first["first.bias"])


def test_two_closures_of_one_function_are_two_models():
    first, second = my_models.closure(1), my_models.closure(2)
    spec = ScanSpec(arch=[first, second, first], widths=4)
    names = [v.arch for v in spec.variants(10)]
    assert len(names) == len(set(names)) == 2
    assert names[1].startswith("my_models:closure.<locals>.made#")
    assert [parameter_count(v, SHAPE) for v in spec.variants(10)] == [
        parameter_count(variant("residual", width), SHAPE) for width in (4, 8)
    ]
    assert ScanSpec(arch=second, widths=4) != ScanSpec(arch=first, widths=4)
    assert ScanSpec.from_json(spec.to_json()) == spec


def test_a_callable_is_kept_by_name_and_hash(tmp_path):
    spec = ScanSpec(arch=my_models.residual, widths=3, steps=200, max_probes=6, n_max=20)
    assert spec.arch == ("my_models:residual",)
    assert ScanSpec.from_json(spec.to_json()) == spec
    results = scan(spec, out=tmp_path / "own.h5")
    assert results.attrs["variant_backends"] == "vmap"
    source = Path(my_models.__file__).read_bytes()
    assert results.attrs["arch_source"] == f"my_models:residual={hashlib.sha256(source).hexdigest()}"
    assert set(results.curves["arch"]) == {"my_models:residual"}
    assert results.curves["params"][0] == 65 * 3 + 4 * 3 + 6 + 40


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_alone.py").write_text("from my_models import residual as made\nbroken = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    arguments = ["scan", "--arch", "mine_alone:made", "--widths", "3", "--dry-run"]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "", "fasttrain: --arch mine_alone:made: cannot be imported (ZeroDivisionError: division by zero)\n"
    )  # fmt: skip
    (tmp_path / "mine_alone.py").write_text("from my_models import residual as made\n")
    importlib.invalidate_caches()
    assert main(arguments) == 0
    assert "mine_alone:made" in capsys.readouterr().out


def test_a_closure_serves_within_its_process():
    def factory(width, depth, in_shape, classes):
        return my_models.residual(width, depth, in_shape, classes)

    results = scan(ScanSpec(arch=factory, widths=3, steps=100, max_probes=4, n_max=8))
    assert results.attrs["status"] == "complete"


def test_batch_norm_of_ones_own_trains_in_the_loop_only(tmp_path):
    fields = {"arch": "my_models:normed", "widths": 8, "steps": 300, "max_probes": 5, "n_max": 12}
    out = tmp_path / "own.h5"
    with pytest.raises(UserError, match="mixes the samples"):
        scan(ScanSpec(**fields), out=out)
    assert not out.exists()
    results = scan(ScanSpec(**fields, backend="loop"), out=out)
    assert (results.probes["outcome"] == "fitted").any()
