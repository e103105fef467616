"""The doctor finds what is wrong, completion scripts complete, and mistyped names are guessed."""

import json
import subprocess
import sys

import numpy as np
import pytest

import fasttrain
from fasttrain import doctor
from fasttrain.cli import main


def by_name(checks):
    return {check.name: check for check in checks}


def test_all_is_well_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("All is well: scans can be run here.\n")
    for line in ("ok      backend native: within", "ok      a scan, stopped and resumed: "):
        assert line in out
    assert f"fasttrain {fasttrain.__version__}" in out
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_backend_is_found(monkeypatch, capsys):
    """One that forgets the bias: its losses are near, and not those of plain torch."""
    from fasttrain.kernels import reference

    right = reference.linear

    def wrong(x, weight, bias, out=None):
        return right(x, weight, bias * (1 - 1e-6), out=out)

    monkeypatch.setattr(reference, "linear", wrong)
    monkeypatch.setattr(doctor, "_scan", lambda: ("ok", ""))
    found = by_name(fasttrain.diagnose())
    assert found["backend stacked"].status == "failed"
    assert "differ from plain torch" in found["backend stacked"].detail
    assert found["backend vmap"].status == "ok"
    assert main(["doctor", "--json"]) == 1
    assert {one["name"] for one in json.loads(capsys.readouterr().out) if one["status"] == "failed"} == {
        "backend stacked"
    }


def test_what_is_missing_and_what_breaks_is_told_apart(monkeypatch):
    def gone(name):
        raise doctor.PackageNotFoundError(name)

    def broken(device):
        raise RuntimeError("no BLAS\nat all")

    monkeypatch.setattr(doctor, "version", gone)
    monkeypatch.setattr(doctor, "keeps_models_apart", broken)
    monkeypatch.setattr("fasttrain.kernels.native.library", _unavailable)
    monkeypatch.setattr(doctor, "_scan", lambda: ("ok", ""))
    found = by_name(fasttrain.diagnose())
    assert (found["versions"].status, found["versions"].detail) == ("failed", "fasttrain is not installed")
    assert found["optional packages"].status == "missing"
    assert (found["models apart in BLAS"].status, found["models apart in BLAS"].detail) == (
        "failed",
        "RuntimeError: no BLAS at all",
    )
    assert found["backend native"].status == "missing"
    assert "no compiler" in found["backend native"].detail


def _unavailable(*_):
    from fasttrain.kernels.native import Unavailable

    raise Unavailable("no compiler")


def test_a_scan_that_ends_otherwise_is_found(monkeypatch):
    original = doctor.scan

    def other(spec, **options):
        found = original(spec, **options)
        if "out" not in options:
            found.curves.loc[0, "emc50"] = np.nextafter(found.curves["emc50"][0], np.inf)
        return found

    monkeypatch.setattr(doctor, "scan", other)
    assert doctor._scan()[0] == "failed"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "_FASTTRAIN_COMPLETE" in capsys.readouterr().out


def test_completion_completes():
    code = "from fasttrain.cli import main; main()"
    words = {"_FASTTRAIN_COMPLETE": "bash_complete", "COMP_WORDS": "fasttrain sc", "COMP_CWORD": "1"}
    import os

    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True)
    assert done.stdout.split() == ["plain,scan"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("scan --optimizer adma", "(did you mean adam?)"),
        ("scan --data digit", "(did you mean digits?)"),
        ("scan --activation tahn,relu", "--activation tahn"),
        ("scna", "Did you mean 'scan'?"),
        ("scan --widhts 4", "--widths"),
        ("completion bsh", "expected one of bash, zsh, fish (did you mean bash?)"),
    ],
)
def test_mistyped_names_are_guessed(line, what, capsys):
    assert main(line.split()) == 2
    assert what in capsys.readouterr().err


def test_no_guess_where_nothing_is_near(capsys):
    assert main(["scan", "--optimizer", "xyz"]) == 2
    assert "did you mean" not in capsys.readouterr().err
