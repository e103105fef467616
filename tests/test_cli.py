import dataclasses
import errno
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fasttrain
from fasttrain import ScanSpec, UserError
from fasttrain.cli import main
from fasttrain.cli.options import FIELDS
from fasttrain.records import Censored, Estimate, History, Outcome, Probe, ProbeResult, Problem, Race
from fasttrain.store import HDF5Store

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def replace(monkeypatch):
    """Put a fake in the place of a public function, which need not be imported for that."""

    def put(name, function):
        monkeypatch.setitem(fasttrain.__dict__, name, function)

    return put


@pytest.fixture
def scanned(replace):
    """What the command line gives to ``fasttrain.scan``, in whose place a fake writes a file."""
    calls = []

    def scan(spec, **keywords):
        calls.append((spec, keywords))
        write(spec, keywords["out"])
        return fasttrain.load(keywords["out"])

    replace("scan", scan)
    return calls


def estimate(variant, emc50=NAN, low=NAN, high=NAN, censored=Censored.NO, **keywords):
    flags = {"budget_spent": False, "finished": True, "n_probes": 30, **keywords}
    return Estimate(variant, emc50, low, high, 4.0, 0.01, censored, **flags)


def probe(variant):
    history = History(np.array([100]), np.array([0.1]), np.array([1.0]))
    return ProbeResult(Probe(variant, 50, 0), Outcome.FITTED, 100, 100, 0.1, 0.0, history)


def write(spec, path, estimates=None, runs=3, status="complete"):
    variants = spec.variants(10)
    problems = [Problem(i, v, 100 * (i + 1), 2, 1797) for i, v in enumerate(variants)]
    store = HDF5Store(Path(path), overwrite=True)
    store.begin(spec, problems, {"precision": "float32", "device": "cpu", "backend": "vmap"})
    store.append([probe(i % len(variants)) for i in range(runs)])
    store.put_curves(estimates or [estimate(i, 662.4, 641.2, 683.0) for i in range(len(variants))])
    if status != "running":
        store.finish(status, {})
    store.close()


BAD = [
    ("arch", "rnn"),
    ("activation", "reluu"),
    ("data", "-"),
    ("widths", "0"),
    ("widths", "-4"),
    ("widths", "8:4"),
    ("widths", "1:10000000"),
    ("depths", "2:1"),
    ("n-max", "1"),
    ("n-min", "0"),
    ("classes", "1"),
    ("lr", "0"),
    ("lr", "-1"),
    ("lr", "nan"),
    ("lr", "inf"),
    ("momentum", "1"),
    ("batch-size", "half"),
    ("steps", "0"),
    ("seeds", "0"),
    ("interval", "90"),
    ("tolerance", "0"),
    ("max-probes", "0"),
    ("search", "random"),
    ("search", "grid"),
    ("growth", "1"),
    ("n", "100"),
    ("seed", "-1"),
    ("device", "gpu"),
    ("backend", "graphs"),
    ("precision", "half"),
    ("labels", "wrong"),
    ("optimizer", "lion"),
    ("spec", "none.toml"),
]


@pytest.mark.parametrize(("option", "value"), BAD)
def test_bad_input_is_one_line_status_2_and_no_file(replace, capsys, tmp_path, option, value):
    def scan(spec, **_):
        raise UserError("data", spec.data, "expected digits or gaussian:D")

    replace("scan", scan)
    assert main(["scan", f"--{option}", value]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fasttrain: --{option} {value}: ")
    assert err.count("\n") == 1
    assert len(err) > len(f"fasttrain: --{option} {value}: ") + 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["widths", "activation", "lr", "data", "device", "steps"])
def test_an_empty_value_is_shown_in_quotes(capsys, option):
    assert main(["scan", f"--{option}", ""]) == 2
    assert capsys.readouterr().err.startswith(f"fasttrain: --{option} '': expected ")


def test_errors_of_the_library_are_one_line(replace, capsys, tmp_path):
    def scan(spec, *, out, **_):
        raise UserError("out", out, "exists;\nchoose another name")

    replace("scan", scan)
    assert main(["scan", "--out", "a\nb.h5"]) == 2
    assert capsys.readouterr().err == "fasttrain: --out a\\nb.h5: exists; choose another name\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["scna"], "scan"),
        (["scan", "--widhts", "4"], "--widths"),
        (["scan", "--out"], "--out"),
        (["scan", "extra"], "extra"),
        (["show"], "FILE"),
        (["show", "a", "b"], "b"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_errors_of_click_are_one_line_and_status_2(capsys, args, says):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"fasttrain: [^\n]+\n", err)
    assert says in err


def test_spec_file_fills_in_and_the_command_line_wins(scanned, tmp_path):
    Path("scan.toml").write_text('widths = [3, 5]\nlr = 0.5\nn-max = 77\nbatch-size = "full"\nsteps = 900\n')
    assert main(["scan", "--spec", "scan.toml", "--lr", "0.25", "--steps", "10000", "--quiet"]) == 0
    spec, _ = scanned[0]
    # --steps 10000 is the default, but it was given.
    assert spec == ScanSpec(widths=(3, 5), lr=0.25, n_max=77, batch_size="full", steps=10_000)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("widthz = 4", "--spec scan.toml: widthz: no such field"),
        ("steps = 'many'", "--steps many: expected"),
        ("widths = ", "--spec scan.toml: is not TOML"),
    ],
)
def test_bad_spec_file(capsys, content, line):
    Path("scan.toml").write_text(content)
    assert main(["scan", "--spec", "scan.toml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fasttrain: {line}")
    assert err.count("\n") == 1
    assert not Path("emc.h5").exists()


def test_every_option_reaches_the_spec(scanned):
    values = {
        "arch": "mlp,vit",
        "widths": "4:8:4",
        "depths": "1,2",
        "scaling": "compound",
        "match_params": True,
        "norm": "batch",
        "heads": "2",
        "patch": "3",
        "inputs": "real,shuffled",
        "lr_search": "all",
        "nesterov": True,
        "weight_decay": "0,0.1",
        "schedule": "cosine",
        "warmup": "3",
        "clip": "2",
        "label_smoothing": "0.1",
        "init_scale": "0.5",
        "activation": "tanh,gelu",
        "data": "gaussian:8",
        "labels": "true",
        "classes": "2,3",
        "optimizer": "sgd",
        "lr": "0.1,1",
        "momentum": "0.5",
        "batch_size": "full,8",
        "steps": "50",
        "check_every": "5",
        "early_stop": False,
        "elasticity": False,
        "search": "grid",
        "growth": "1.5",
        "n": "5,9",
        "seeds": "4",
        "n_min": "3",
        "n_max": "99",
        "interval": "0.5",
        "tolerance": "0.2",
        "max_probes": "9",
        "seed": "11",
        "device": "cpu",
        "backend": "loop",
        "precision": "float64",
    }
    args = []
    for name, value in values.items():
        option = name.replace("_", "-")
        args += [f"--{option}" if value is True else f"--no-{option}"] if isinstance(value, bool) else []
        args += [] if isinstance(value, bool) else [f"--{option}", value]
    assert main(["scan", *args, "--out", "x.h5", "--overwrite", "--quiet"]) == 0
    spec, keywords = scanned[0]
    assert spec == ScanSpec(**values)
    assert {*values, "budget"} == {field.name for field in dataclasses.fields(ScanSpec)}
    flags = {"overwrite": True, "save_weights": False, "curvature": 0, "on_progress": None}
    flags |= {"time_limit": None, "checkpoint": None}
    assert keywords == {"out": "x.h5", **flags}


def test_a_budget_is_given_in_one_way(scanned, capsys, tmp_path):
    assert main(["scan", "--budget", "3e2 epochs", "--early-stop", "--quiet"]) == 0
    assert main(["scan", "--budget", "500steps", "--overwrite", "--quiet"]) == 0
    assert [spec for spec, _ in scanned] == [ScanSpec(budget="300epochs"), ScanSpec(steps=500)]
    capsys.readouterr()
    assert main(["scan", "--steps", "10000", "--budget", "300epochs"]) == 2
    line = "fasttrain: --budget 300epochs: steps=10000 is given too; expected one of the two\n"
    assert capsys.readouterr().err == line
    # Of a file and the command line, the latter wins, whichever of the two it gives.
    Path("scan.toml").write_text("steps = 900\nearly-stop = false\n")
    Path("epochs.toml").write_text('budget = "7epochs"\n')
    assert main(["scan", "--spec", "scan.toml", "--budget", "300epochs", "--overwrite", "--quiet"]) == 0
    assert main(["scan", "--spec", "epochs.toml", "--steps", "10000", "--overwrite", "--quiet"]) == 0
    assert [spec for spec, _ in scanned[2:]] == [ScanSpec(budget="300epochs", early_stop=False), ScanSpec()]


def test_the_table_names_a_budget_that_is_not_in_steps(scanned, capsys):
    assert main(["scan", "--budget", "300epochs", "--no-early-stop", "--quiet"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("10 classes, budget 300epochs, no early stop, float32, cpu, vmap")


def test_defaults_are_those_of_the_library_and_lists_may_be_given_in_parts(scanned):
    assert main(["scan"]) == 0
    assert main(["scan", "--widths", "4", "--widths", "8:9", "--lr", "1", "--lr", "2"]) == 0
    assert scanned[0][0] == ScanSpec()
    assert scanned[0][1]["out"] == "emc.h5"
    assert scanned[0][1]["overwrite"] is False
    assert callable(scanned[0][1]["on_progress"])
    assert scanned[1][0] == ScanSpec(widths=(4, 8, 9), lr=(1, 2))


def test_help_shows_every_field_with_its_default(capsys):
    assert main(["scan", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert set(FIELDS) == {field.name for field in dataclasses.fields(ScanSpec)}
    for field in dataclasses.fields(ScanSpec):
        default = field.default
        if default is None:
            shown = FIELDS[field.name].default
        else:
            shown = ",".join(str(v) for v in (default if isinstance(default, tuple) else (default,)))
        option = f"--{field.name.replace('_', '-')}"
        if default is False:
            assert f"{option} " in text
            continue
        if default is True:
            option, shown = rf"{option} / --no-{field.name.replace('_', '-')}", field.name.replace("_", "-")
        assert re.search(rf"{option} [^\[]*\[default: {re.escape(shown)}\]", text), option
    for option in ("--spec", "--out", "--overwrite", "--save-weights", "--quiet", "--dry-run"):
        assert f"{option} " in text


def test_no_arguments_print_help_and_version_prints_the_version(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "scan" in out
    assert "show" in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fasttrain {fasttrain.__version__}\n"


@pytest.mark.parametrize("args", [["--help"], ["scan", "--help"], ["scan", "--widths", "0"]])
def test_help_and_errors_are_quick_and_import_nothing_heavy(args):
    code = (
        "import sys; from fasttrain.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'pandas', 'h5py', 'scipy', 'sklearn', 'rich.live'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )

    def seconds(*command):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return time.perf_counter() - start

    bare = statistics.median(seconds("-c", "pass") for _ in range(5))
    assert statistics.median(seconds("-c", code, *args) for _ in range(5)) - bare < 0.5


def test_import_fasttrain_leaves_torch_alone():
    code = "import fasttrain, sys; fasttrain.ScanSpec; sys.exit(bool({'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_scan_prints_the_table_on_standard_output(scanned, capsys):
    assert main(["scan", "--widths", "4,8", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "digits, mlp, relu, adam, lr 0.01, batch 64, random labels, 10 classes, float32, cpu, vmap",
        "",
        "width  depth  params  EMC50  90% interval  EMC/param  runs  notes",
        "    4      1     100    662  [641, 683]         6.62    30",
        "    8      1     200    662  [641, 683]         3.31    30",
        "",
        "emc.h5: 2 variants, 3 training runs, complete",
    ]
    assert main(["show", "emc.h5"]) == 0
    assert capsys.readouterr().out == out


def test_table_marks_what_is_censored_spent_and_unfinished(capsys):
    spec = ScanSpec(widths="4:8", lr=(0.01,), interval=0.5)
    write(
        spec,
        "emc.h5",
        [
            estimate(0, censored=Censored.ABOVE, low=1797.0, high=INF),
            estimate(1, censored=Censored.BELOW, low=0.0, high=2.0),
            estimate(2, 45.26, 40.04, INF, budget_spent=True),
            estimate(3, finished=False, n_probes=0),
            estimate(4, 5.123, 4.9, 5.4),
        ],
        status="interrupted",
    )
    assert main(["show", "emc.h5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:8] == [
        "width  depth  params   EMC50  50% interval  EMC/param  runs  notes",
        "    4      1     100  > 1797                   > 18.0    30  above n-max",
        "    5      1     200     < 2                 < 0.0100    30  below n-min",
        "    6      1     300    45.3  [40.0, inf)       0.151    30  runs used up",
        "    7      1     400       -                        -     0  unfinished",
        "    8      1     500    5.12  [4.90, 5.40]     0.0102    30",
    ]
    assert lines[-1] == "emc.h5: 5 variants, 3 training runs, interrupted before it was done"


def test_table_shows_the_settings_that_vary(capsys):
    spec = ScanSpec(widths="4", depths="0,1", optimizer="sgd,adam", batch_size="32,full", labels="random,true")
    write(spec, "emc.h5")
    assert main(["show", "emc.h5"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    # The linear classifier has no activation, which is no reason for a column.
    assert lines[2].split()[:5] == ["width", "depth", "optimizer", "batch", "labels"]
    assert lines[3].split()[:5] == ["-", "0", "sgd", "32", "random"]
    assert lines[4].split()[:5] == ["-", "0", "sgd", "full", "random"]
    assert lines[0].startswith("digits, mlp, relu, lr 0.01, 10 classes")
    assert len({len(line[: line.index("[")]) for line in lines[3:19]}) == 1
    assert "\x1b" not in text


def test_table_has_the_winner_of_a_race_and_show_all_the_losers(capsys):
    spec = ScanSpec(widths="4,8", lr="0.001,0.01,0.1")
    stands = [Race.DROPPED, Race.WON, Race.LOST, Race.RUNNING, Race.RUNNING, Race.DROPPED]
    raced = {"race_emc50": 700.0, "race_low": 690.0, "race_high": 710.0}
    write(
        spec,
        "emc.h5",
        [
            estimate(i, 662.4 - i, 641.2, 683.0, race=race, finished=race is not Race.RUNNING, **raced)
            for i, race in enumerate(stands)
        ],
    )
    assert main(["show", "emc.h5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "lr" not in lines[0]
    assert lines[2:6] == [
        "width  depth     lr  params  EMC50  90% interval  EMC/param  runs  notes",
        "    4      1   0.01     200    661  [641, 683]         3.31    30  lr won of 0.001,0.01,0.1",
        "    8      1  0.001     400    659  [641, 683]         1.65    30  unfinished, lr in a race of 0.001,0.01,0.1",
        "    8      1   0.01     500    658  [641, 683]         1.32    30  unfinished, lr in a race of 0.001,0.01,0.1",
    ]
    assert lines[6:] == ["", "emc.h5: 6 variants, 3 training runs, complete"]
    assert main(["show", "emc.h5", "--all"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert len(everything) == len(lines) + 3
    assert set(lines) < set(everything)
    assert [line.split("  ")[-1] for line in everything[3:9]] == [
        "lr dropped",
        "lr won of 0.001,0.01,0.1",
        "lr lost",
        "unfinished, lr in a race of 0.001,0.01,0.1",
        "unfinished, lr in a race of 0.001,0.01,0.1",
        "lr dropped",
    ]


@pytest.mark.parametrize("content", [None, b"", b"not hdf5"])
def test_show_of_a_bad_file(capsys, content):
    if content is not None:
        Path("bad.h5").write_bytes(content)
    assert main(["show", "bad.h5"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fasttrain: FILE bad.h5: ")
    assert err.count("\n") == 1


def interrupted(runs, estimates=None):
    def scan(spec, *, out, **_):
        if runs is not None:
            write(spec, out, estimates, runs=runs, status="interrupted")
        raise KeyboardInterrupt

    return scan


def test_ctrl_c_says_what_was_kept(replace, capsys):
    estimates = [estimate(0, 50.0, 40.0, 60.0), estimate(1, n_probes=7), estimate(2, n_probes=0)]
    replace("scan", interrupted(37, estimates))
    assert main(["scan", "--widths", "4,8,16"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "Interrupted: 37 finished runs of 3 variants are kept in emc.h5 (fasttrain show emc.h5); "
        "fasttrain resume emc.h5 goes on.\n"
    )


def test_ctrl_c_before_anything_was_written(replace, capsys):
    replace("scan", interrupted(None))
    assert main(["scan"]) == 130
    assert capsys.readouterr().err == "Interrupted: nothing was written.\n"
    write(ScanSpec(), "emc.h5")
    assert main(["scan", "--overwrite"]) == 130
    assert capsys.readouterr().err == "Interrupted: nothing was written; emc.h5 is as it was.\n"


def test_ctrl_c_elsewhere_leaves_with_130(replace, capsys):
    def load(path):
        raise KeyboardInterrupt

    replace("load", load)
    assert main(["show", "emc.h5"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_full_disk_is_one_line(replace, capsys):
    def scan(spec, *, out, **_):
        write(spec, out, status="running")
        raise OSError(errno.ENOSPC, "No space left on device")

    replace("scan", scan)
    assert main(["scan"]) == 1
    assert capsys.readouterr().err == (
        "fasttrain: the scan to emc.h5 stopped: No space left on device; the runs finished before are in emc.h5\n"
    )


def test_other_exceptions_are_not_hidden(replace):
    def scan(spec, **_):
        raise RuntimeError("a bug")

    replace("scan", scan)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["scan"])


def test_dry_run_prints_the_cost_and_writes_nothing(replace, capsys, tmp_path):
    def preview(spec):
        problems = [Problem(i, v, 310 + i, 2, 1797) for i, v in enumerate(spec.variants(10))]
        return SimpleNamespace(
            variants=tuple(problems),
            memory_bytes=230 * 2**20,
            model_bytes=7 * 2**20,
            data_bytes=6 * 2**20,
            model_steps_most=12_345_678,
            seconds_most=200.0,
            seconds_likely=61.0,
            slots=32,
            device="cpu",
            backend="vmap",
            precision="float32",
            unmatched=("no width of vit matches",),
        )

    replace("preview", preview)
    replace("scan", lambda *_, **__: pytest.fail("a dry run must not scan"))
    assert main(["scan", "--widths", "4,8", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "mlp, relu, adam, lr 0.01, batch 64, random labels, 10 classes",
        "",
        "width  depth  params          n",
        "    4      1     310  2 to 1797",
        "    8      1     311  2 to 1797",
        "",
        "2 variants on cpu, vmap, float32, 32 slots",
        "memory: about 230 MiB, at most 7 MiB a model, 6 MiB of data",
        "cost: at most 12.3 M model-steps, 3 min 20 s; likely 1 min 01 s",
        "left out: no width of vit matches",
        "Nothing was trained or written.",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("device", "cuda:7", "not on this machine; expected one of cpu"),
        ("backend", "triton", "it needs a CUDA device; expected auto, stacked, vmap or loop here"),
        ("precision", "bf16x3", "only the triton backend rounds its products, and it needs a CUDA device"),
    ],
)
def test_what_this_machine_cannot_do_is_one_line_and_no_file(capsys, tmp_path, monkeypatch, option, value, words):
    """The whole way down, on a machine that has no GPU or says so."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = tmp_path / "never.h5"
    assert main(["scan", f"--{option}", value, "--out", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fasttrain: --{option} {value}: {words}")
    assert err.count("\n") == 1
    assert not path.exists()
