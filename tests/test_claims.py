"""The claims of the study: their rules on results whose truth is known, and the study from end to end."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from simulated import scanned

import fasttrain
from fasttrain import claims
from fasttrain.claims import CLAIMS, decided, scans_of, study
from fasttrain.cli import main

PARAMS = [400, 600, 900, 1350]
BY_NAME = {claim.name: claim for claim in CLAIMS}


class Frames(tuple):
    """Curves and probes, as ``Results`` has them."""

    @property
    def curves(self):
        return self[0]

    @property
    def probes(self):
        return self[1]


def merged(*parts):
    """Several scans as one, their variants numbered on."""
    curves, probes, first = [], [], 0
    for one, runs in parts:
        curves.append(one.assign(variant=one["variant"] + first))
        probes.append(runs.assign(variant=runs["variant"] + first))
        first += len(one)
    return Frames((pd.concat(curves, ignore_index=True), pd.concat(probes, ignore_index=True)))


def of(share, key, **settings):
    return scanned([share * p for p in PARAMS], PARAMS, key=key, slope=15.0, **settings)


def verdicts(claim, results):
    found = decided(BY_NAME[claim], results)
    return found.verdict, [finding.verdict for finding in found.findings], found


@pytest.mark.parametrize(("share", "verdict"), [(0.4, "supported"), (1.5, "not supported")])
def test_parameters_are_compared_with_one(share, verdict):
    results = {name: Frames(of(share, key)) for key, name in enumerate(("mlp", "cnn", "vit"))}
    said, each, found = verdicts("parameters", results)
    assert said == verdict
    assert len(each) == 12
    assert all(finding.low < share < 1.1 * finding.high for finding in found.findings)
    assert found.runs == sum(len(one.probes) for one in results.values())


def test_one_model_that_fits_as_many_as_it_has_parameters_contradicts_all_others():
    results = {"mlp": Frames(of(0.4, 1)), "cnn": Frames(of(0.5, 2)), "vit": Frames(of(0.3, 3))}
    results["vit"] = Frames(scanned([120, 180, 270, 2700], PARAMS, key=4, slope=15.0))
    said, each, _ = verdicts("parameters", results)
    assert said == "not supported"
    assert each.count("not supported") == 1


@pytest.mark.parametrize(
    ("mlp", "cnn", "vit", "verdict", "each"),
    [
        (0.3, 0.5, 0.4, "supported", ["supported", "supported"]),
        (0.5, 0.3, 0.2, "not supported", ["not supported", "supported"]),
        (0.3, 0.5, 0.5, "undecided", ["supported", "undecided"]),
    ],
)
def test_cnn_must_beat_both(mlp, cnn, vit, verdict, each):
    results = {
        "mlp": Frames(of(mlp, 1, arch="mlp")),
        "cnn": Frames(of(cnn, 2, arch="cnn")),
        "vit": Frames(of(vit, 3, arch="vit")),
    }
    said, found, whole = verdicts("architectures", results)
    assert (said, found) == (verdict, each)
    for finding, ratio in zip(whole.findings, (cnn / mlp, cnn / vit), strict=True):
        assert finding.low < ratio < finding.high
        assert (finding.p < 0.05) == (finding.verdict != "undecided")


def test_minibatches_are_held_against_the_full_batch_twice():
    steps = merged(of(0.3, 1, batch_size=64), of(0.5, 2, batch_size=0))
    samples = merged(of(0.5, 3, batch_size=64), of(0.3, 4, batch_size=0))
    said, each, found = verdicts("minibatches", {"equal-steps": steps, "equal-samples": samples})
    assert said == "not supported"
    assert each == ["not supported", "supported"]
    assert found.findings[0].estimate == pytest.approx(0.6, rel=0.06)
    assert "equal samples seen" in found.findings[1].what


def test_relu_is_held_against_every_other_activation():
    names = ("relu", "tanh", "sigmoid", "gelu", "silu", "leaky_relu")
    shares = dict(zip(names, (0.4, 0.3, 0.2, 0.6, 0.4, 0.4), strict=True))
    one = merged(*(of(share, key, activation=name) for key, (name, share) in enumerate(shares.items())))
    said, each, found = verdicts("activations", {"activations": one})
    assert said == "not supported"
    assert each == ["supported", "supported", "not supported", "undecided", "undecided"]
    assert [finding.what.split()[4] for finding in found.findings] == [f"{name}," for name in names[1:]]


def accuracies(models, values):
    """Fitted runs of a grid with these held-out accuracies."""
    rows = [
        {"width": width, "activation": name, "outcome": "fitted", "test_accuracy": value}
        for (width, name), value in zip(models, values, strict=True)
    ]
    return Frames((None, pd.DataFrame(rows)))


@pytest.mark.parametrize(("sign", "verdict"), [(1, "supported"), (-1, "not supported")])
def test_the_gap_of_true_and_random_labels_against_accuracy(sign, verdict):
    params = [300 + 100 * k for k in range(8)]
    gaps = np.linspace(0.1, 0.8, 8)
    random = scanned([0.3 * p for p in params], params, key=1, slope=15.0, labels="random")
    true = scanned(
        [0.3 * p * math.exp(g) for p, g in zip(params, gaps, strict=True)], params, 15.0, key=2, labels="true"
    )
    models = [(k + 1, "relu") for k in range(8)]
    results = {"labels": merged(random, true), "accuracy": accuracies(models, 0.7 + sign * 0.2 * gaps)}
    said, _, found = verdicts("generalisation", results)
    assert said == verdict
    assert found.findings[0].estimate * sign > 0.8
    few = {"labels": results["labels"], "accuracy": accuracies(models[:3], [0.5, 0.6, 0.7])}
    said, _, found = verdicts("generalisation", few)
    assert said == "undecided"
    assert math.isnan(found.findings[0].estimate)


def test_the_designs_are_what_the_claims_say():
    specs = scans_of()
    assert {name for claim in CLAIMS for name in claim.scans} == set(specs)
    assert specs["equal-samples"].budget == f"{64 * specs['equal-steps'].steps}samples"
    counts = []
    for name in ("mlp", "cnn", "vit"):
        prepared = fasttrain.prepare.prepare(specs[name])
        counts.append([problem.params for problem in prepared.problems])
    ratios = np.array(counts) / counts[2]
    assert (abs(np.log(ratios)) < math.log(1.05)).all()
    larger = scans_of(4.0, seed=3)
    for name, spec in specs.items():
        assert larger[name].seed == 3
        assert larger[name].tolerance == pytest.approx(spec.tolerance / 2)
    assert larger["mlp"].steps == 4 * specs["mlp"].steps


def small(scale=1.0, seed=0):
    """The scans with perceptrons alone, and with runs that are too short to say anything."""
    specs = scans_of(1.0, seed)
    out = {}
    for name, spec in specs.items():
        arch = {"arch": "mlp", "depths": 1} if name in ("cnn", "vit") else {}
        budget = {"budget": "2000samples"} if spec.budget else {"steps": 60}
        probes = {} if spec.search == "grid" else {"max_probes": 6}
        widths = {"widths": spec.widths[:2], "activation": spec.activation[:2], "lr": spec.lr[:1]}
        out[name] = replace(spec, check_every=20, **arch, **budget, **probes, **widths)
    return out


def stop_at(path, spec, runs):
    """In place of a scan's file, that of one which was stopped."""

    def stop(progress):
        if progress.probes_done >= runs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasttrain.run._REPORT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            fasttrain.scan(spec, out=path, overwrite=True, on_progress=stop)
    assert len(fasttrain.load(path).probes) >= runs


def test_the_study_runs_goes_on_and_says_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "scans_of", small)
    made = []
    first = study(tmp_path / "out", on_scan=lambda name, spec: made.append(name))
    assert made == list(small())
    said = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert [one["claim"] for one in said["claims"]] == [claim.name for claim in CLAIMS]
    assert {one["verdict"] for one in said["claims"]} <= {"supported", "not supported", "undecided"}
    stop_at(tmp_path / "out" / "labels.h5", small()["labels"], 5)
    made.clear()
    again = study(tmp_path / "out", on_scan=lambda name, spec: made.append(name))
    assert made == ["labels"]
    assert claims.as_frame(again).equals(claims.as_frame(first))
    with pytest.raises(fasttrain.UserError, match="holds another scan"):
        study(tmp_path / "out", seed=1)

    assert main(["study", "findings", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    shown = capsys.readouterr().out
    for claim, one in zip(CLAIMS, again, strict=True):
        assert f"{claim.name}: {one.verdict.upper()}" in shown
        assert claim.hypothesis in shown
        assert claim.design in shown
    assert main(["study", "findings", "--out", str(tmp_path / "out"), "--quiet", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(CLAIMS)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--scale", "0"], "--scale 0.0: expected a number above 0"),
        (["--scale", "much"], "--scale much: expected a number above 0"),
        (["--seed", "-1"], "--seed -1: expected a whole number"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: is no folder"),
    ],
)
def test_bad_options_are_one_line(args, line, capsys):
    assert main(["study", "findings", "--quiet", *args]) == 2
    assert capsys.readouterr().err.startswith(f"fasttrain: {line}")
