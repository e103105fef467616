"""A report says what the file says, stands alone, and its commands make the file."""

import dataclasses
import html
import json
import re
import shlex
import shutil
import subprocess

import pytest

import fasttrain
from fasttrain import ScanSpec, UserError, report
from fasttrain.cli import main
from fasttrain.prepare import prepare
from fasttrain.reporting import bibtex, commands, latex, page, protocol, warnings
from fasttrain.store import HDF5Store
from fasttrain.wording import curve_cells

SMALL = {"data": "gaussian:8", "classes": 2, "steps": 300, "check_every": 20, "seed": 4}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "emc.h5"
    fasttrain.scan(ScanSpec(**SMALL, widths=(2, 3, 5), n_max=25, max_probes=24), out=path)
    return path


@pytest.fixture(scope="module")
def results(file):
    return fasttrain.load(file)


SPECS = [
    ScanSpec(),
    ScanSpec(widths=(4, 8), batch_size=("full", 64), early_stop=False, elasticity=False),
    ScanSpec(arch=("cnn", "vit"), lr=(0.1, 1e-5), optimizer=("sgd", "muon"), nesterov=True, weight_decay=(0.0, 5e-4)),
    ScanSpec(budget="300epochs", labels=("true", "corrupted:0.2"), classes=(3, 10), data="gaussian:1x8x8"),
    ScanSpec(search="paper", seeds=3, growth=1.3, n_max=50),
    ScanSpec(search="grid", n=(10, 20), seeds=5),
    ScanSpec(steps=500, scaling="compound", widths=(4, 8), depths=(1, 2), clip=1.0, warmup=10, schedule="cosine"),
    ScanSpec(max_probes=96, seed=7, device="cpu", backend="native", precision="float64", data="./a b'c.csv"),
]


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_options_make_the_spec(spec, monkeypatch):
    """As a shell would take the line apart, and the program the options."""
    seen = []
    monkeypatch.setattr(fasttrain, "preview", lambda spec: seen.append(spec) or exit(7))
    line = shlex.join(["scan", *spec.options(), "--dry-run"])
    with pytest.raises(SystemExit):
        main(shlex.split(line))
    assert seen == [spec]


def test_the_commands_make_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = fasttrain.scan(ScanSpec(**SMALL, widths=(2, 3), max_probes=10), out="emc.h5", curvature=1)
    last = fasttrain.extend("emc.h5", {"widths": (2, 3, 4), "max_probes": 12})
    lines = commands(last)
    assert [line.split()[1] for line in lines] == ["scan", "extend"]
    (tmp_path / "emc.h5").unlink()
    for line in lines:
        assert main([*shlex.split(line)[1:], "--quiet"]) == 0
    again = fasttrain.load("emc.h5")
    assert (again.spec, again.earlier) == (last.spec, last.earlier) == (last.spec, (first.spec,))
    assert again.curves.equals(last.curves)
    assert len(again.curvature) == len(last.curvature) == 3


def test_the_page_has_what_the_table_has(results):
    text = page(results)
    _, rows, _ = curve_cells(results.curves)
    shown = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    for row in rows:
        assert [html.escape(cell) for cell in row] in shown
    for line in [*protocol(results), *warnings(results), *commands(results)]:
        assert html.escape(line, quote=False) in text.replace("&#39;", "'").replace("&#34;", '"')
    assert text.count("<svg") >= 4
    identifiers = re.findall(r'\sid="([^"]+)"', text)
    figures = [set(re.findall(r'\sid="([^"]+)"', svg)) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]
    for number, own in enumerate(figures):
        for other in figures[:number]:  # clip paths of one must not be those of another
            assert not {one for one in own & other if re.fullmatch(r"[pm][0-9a-f]{10}", one)}
    assert len(identifiers) > 20


def test_warnings_are_those_of_the_table(results):
    said = " ".join(warnings(results))
    for column, words in (
        ("budget_spent", "used up"),
        ("budget_limited", "lower bound at this"),
        ("misfit", "contradict"),
    ):
        count = int(results.curves[column].astype(bool).sum())
        assert (words in said) == (count > 0)
    censored = int(results.curves["censored"].isin(["above", "below"]).sum())
    assert censored > 0
    assert f"{censored} of 3 variants" in said


def test_nothing_in_a_file_becomes_markup(results):
    changed = dataclasses.replace(results.spec, data="gaussian:8") and results
    changed.attrs["unmatched"] = "<script>alert(1)</script>"
    changed.attrs["device_name"] = "<img src=x>"
    text = page(changed)
    del changed.attrs["unmatched"], changed.attrs["device_name"]
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_the_page_asks_for_nothing(results):
    text = page(results)
    assert not re.findall(r"<(script|link|img|iframe|object|embed)\b", text)
    outside = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", text)
    assert all(one.startswith("#") for one in outside), outside


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_a_request(results, tmp_path):
    """Its log of all network events has none but that of the file, and what it renders has table and figures."""
    out = tmp_path / "emc.html"
    report(results, out)
    log = tmp_path / "net.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path / 'user'}"]
    command = [BROWSER, *flags, f"--log-net-log={log}", "--dump-dom", out.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("<svg") == page(results).count("<svg")
    assert "To do it again" in done.stdout
    events = json.loads(log.read_text()) if log.exists() else {"events": []}
    asked = {str(one.get("params", {}).get("url", "")) for one in events["events"]}
    mine = {url for url in asked if url.startswith("http") and "google" not in url and "gvt1" not in url}
    assert mine == set()


def test_latex_is_whole(results):
    text = latex(results)
    _, rows, _ = curve_cells(results.curves)
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].strip().splitlines()[1:]
    assert len(body) == len(rows)
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
    assert all(line.count("&") == columns - 1 and line.endswith(r"\\") for line in body)
    assert not re.search(r"(?<!\\)[%#_](?!.*digits)", "\n".join(body))
    assert "$>$ 25" in text


def test_what_to_cite(results):
    text = bibtex(results)
    assert len(re.findall(r"^@\w+\{\w+,$", text, re.M)) == 3
    assert text.count("{") == text.count("}")
    assert f"version = {{{fasttrain.__version__}}}" in text


def test_an_interrupted_scan_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("fasttrain.run._REPORT_SECONDS", 0.0)

    def stop(progress):
        if progress.probes_done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fasttrain.scan(ScanSpec(**SMALL, widths=(3,)), out=tmp_path / "emc.h5", on_progress=stop)
    results = fasttrain.load(tmp_path / "emc.h5")
    assert "not complete" in warnings(results)[0]
    report(results, tmp_path / "a.html")


def test_without_runs_there_is_nothing_to_report(tmp_path):
    spec = ScanSpec(**SMALL, widths=(3,))
    store = HDF5Store(tmp_path / "emc.h5", overwrite=False)
    store.begin(spec, prepare(spec).problems, {})
    store.finish("interrupted", {})
    with pytest.raises(UserError, match="has no runs yet"):
        report(fasttrain.load(tmp_path / "emc.h5"), tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_from_the_command_line(file, tmp_path, capsys):
    for ending, begins in (("html", b"<!doctype html>"), ("tex", b"% gaussian:8"), ("bib", b"@software{fasttrain")):
        out = tmp_path / f"a.{ending}"
        assert main(["report", str(file), "--out", str(out)]) == 0
        assert out.read_bytes().startswith(begins)
        assert capsys.readouterr().out == f"{out}: report of {file}\n"
    assert main(["report", str(file), "--out", str(tmp_path / "a.html")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["report", str(file), "--out", str(tmp_path / "a.pdf")]) == 2
    assert "expected a name that ends in .html, .tex or .bib" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bib", "a.html", "a.tex"]
