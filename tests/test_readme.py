"""README and the Makefile do what they say: commands and code are run, the sample output is compared."""

import re
import shlex
from pathlib import Path

import pytest

import fasttrain
from fasttrain import ScanSpec
from fasttrain.cli import main
from fasttrain.models import parameter_count
from fasttrain.spec import read_toml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBERS = ("width", "depth", "params", "EMC50", "EMC/param", "runs")
SMALL = "scan --arch mlp --widths 4,8,12 --steps 200 --max-probes 8 --device cpu --quiet --out emc.h5"

# Not of interest here, and true on machines whose BLAS is not MKL.
pytestmark = pytest.mark.filterwarnings("ignore:this BLAS gives a model other bits:UserWarning")


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(program, text=README):
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    return [line for line in lines if line.split()[0] == program]


def cells(line):
    """The cells of a line of a table: columns are at least two blanks apart."""
    return re.split(r"\s{2,}", line.strip())


def run(line, capsys):
    status = main(shlex.split(line))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small result file."""
    path = tmp_path_factory.mktemp("readme") / "emc.h5"
    assert main([*shlex.split(SMALL)[:-1], str(path)]) == 0
    return path.read_bytes()


@pytest.fixture(autouse=True)
def _beside_a_small_file(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    for name in ("emc.h5", "scan.h5"):
        (tmp_path / name).write_bytes(small)


def test_the_first_screen_has_the_two_commands_and_the_main_job():
    screen = README.splitlines()[:40]
    for line in ("make scan", "make test", "fasttrain scan --arch mlp --widths 4,8,16,24"):
        assert line in screen


def test_all_commands_are_of_a_kind_that_is_checked():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands("make")) >= 2
    assert len(commands("fasttrain")) >= 4
    assert len(lines) == len(commands("make")) + len(commands("fasttrain"))


@pytest.mark.parametrize("line", commands("make"))
def test_make_commands_are_targets(line):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE)


def test_make_scan_runs_the_main_job():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    job = re.search(r"^scan:.*\n\t\S*/(fasttrain scan .*)$", makefile, flags=re.MULTILINE)[1]
    assert job == "fasttrain scan --arch mlp --widths 4,8,16,24 --out emc.h5 --overwrite"


@pytest.mark.parametrize("line", commands("fasttrain"))
def test_fasttrain_commands_work(line, capsys):
    for number, block in enumerate(blocks("toml")):
        name = re.match(r"# (\S+\.toml)\n", block)
        assert name, f"TOML block {number} starts with its file name"
        Path(name[1]).write_text(block, encoding="utf-8")
    _, verb, *rest = shlex.split(line)
    if verb == "scan" and not {"--dry-run", "--help"} & set(rest):
        line += " --dry-run"
    if verb == "extend":
        line += " --quiet"
    status, out, err = run(line.removeprefix("fasttrain "), capsys)
    assert (status, err) == (0, "")
    assert out


def test_the_toml_file_has_known_fields(tmp_path):
    (block,) = blocks("toml")
    (tmp_path / "scan.toml").write_text(block, encoding="utf-8")
    spec = ScanSpec(**read_toml(tmp_path / "scan.toml"))
    assert spec.widths == (8, 16)
    assert spec.n_max == 1500
    assert len(spec.variants(10)) == 8


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number, capsys):
    exec(compile(blocks("python")[number], f"README block {number}", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


def pages(found):
    """What a function finds on the pages of docs, each with the name of its page; the tutorial is run as a whole."""
    paths = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "tutorial.md")
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
    return [pytest.param(one, id=f"{name}-{k}") for name, text in texts.items() for k, one in enumerate(found(text))]


@pytest.mark.parametrize("line", pages(lambda text: commands("fasttrain", text)))
def test_commands_of_the_documents_work(line, capsys):
    status, out, err = run(line.removeprefix("fasttrain "), capsys)
    assert (status, err) == (0, "")
    assert out


@pytest.mark.parametrize("block", pages(lambda text: blocks("python", text)))
def test_python_blocks_of_the_documents_run(block):
    exec(compile(block, "a block of docs", "exec"), {"__name__": "docs"})


def test_the_tutorial_from_top_to_bottom(capsys):
    """Each command meets what those before it have left."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    steps = re.findall(r"^```(sh|python)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(steps) >= 6
    for language, block in steps:
        if language == "python":
            exec(compile(block, "tutorial", "exec"), {"__name__": "tutorial"})
            assert capsys.readouterr().out
            continue
        for line in block.splitlines():
            status, out, err = run(line.removeprefix("fasttrain "), capsys)
            assert (status, err) == (0, ""), line
            assert out
    assert Path("first.png").read_bytes()[:4] == b"\x89PNG"
    results = fasttrain.load("pair.h5")
    assert sorted(set(results.curves["width"])) == [3, 5, 7]


def test_ranges_are_as_described():
    for text, values in re.findall(r"`([\d:^]+)` is ([\d,\s]+\d)", README):
        assert ScanSpec(widths=text).widths == tuple(int(v) for v in values.split(","))
    assert len(re.findall(r"`[\d:^]+` is \d", README)) == 2


def test_sample_output_looks_like_what_is_printed(capsys):
    (sample,) = blocks("text")
    status, printed, _ = run("show emc.h5", capsys)
    assert status == 0
    shown, real = sample.splitlines(), printed.splitlines()
    assert shown[0] == real[0]  # the conditions
    assert shown[1] == real[1] == ""
    assert cells(shown[2]) == cells(real[2])  # the headings
    assert shown[-2] == real[-2] == ""
    ending = r"emc\.h5: (\d+) variants, (\d+) training runs, complete"
    variants, runs = (int(n) for n in re.fullmatch(ending, shown[-1]).groups())
    assert re.fullmatch(ending, real[-1])
    assert variants == len(shown) - 5
    assert runs > sum(row["runs"] for row in sample_rows())  # the rest are short


def sample_rows():
    (sample,) = blocks("text")
    lines = sample.splitlines()
    headings = cells(lines[2])
    rows = []
    for line in lines[3:-2]:
        row = dict(zip(headings, cells(line), strict=False))
        low, high = (float(x) for x in re.fullmatch(r"\[(\S+), (\S+)\]", row["90% interval"]).groups())
        numbers = {name: float(row[name]) for name in NUMBERS}
        rows.append({**numbers, "low": low, "high": high})
    return rows


def test_sample_output_is_of_the_default_scan_and_agrees_with_itself():
    rows = sample_rows()
    variants = ScanSpec(widths="4,8,16,24").variants(10)
    assert [(row["width"], row["depth"]) for row in rows] == [(v.width, v.depth) for v in variants]
    assert [row["params"] for row in rows] == [parameter_count(v, (64,)) for v in variants]
    for row in rows:
        assert row["low"] < row["EMC50"] < row["high"]
        # Both are printed to three digits or more: each is off by half a unit of the third, 0.5 %, at most.
        assert row["EMC/param"] == pytest.approx(row["EMC50"] / row["params"], rel=0.0101)


def test_the_line_that_is_explained_is_in_the_sample():
    row = next(row for row in sample_rows() if row["width"] == 16)
    text = " ".join(README.split())
    said = re.search(
        r"with 16 hidden units fit (\S+) random labels without an error, with 90 % probability between "
        r"(\S+) and (\S+); that is (\S+) samples a parameter, found with (\d+) training runs",
        text,
    )
    expected = [row["EMC50"], row["low"], row["high"], row["EMC/param"], row["runs"]]
    assert [float(x) for x in said.groups()] == expected


def test_options_that_are_named_exist(capsys):
    accepted = "".join(
        run(f"{verb} --help", capsys)[1] for verb in ("scan", "show", "rerun", "compare", "fit", "plot", "export")
    )
    named = set(re.findall(r"--[a-z][a-z-]*", README))
    assert len(named) >= 10
    assert named <= set(re.findall(r"--[a-z][a-z-]*", accepted))


def documents():
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [str(path.relative_to(ROOT)) for path in (*top, *sorted(ROOT.glob("docs/**/*.md")))]


@pytest.mark.parametrize("name", documents())
def test_links_between_documents_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target
