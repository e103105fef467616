"""Figures: what is drawn is what the tables say, equal figures are equal files, and what cannot be drawn is named."""

import itertools
import math

import matplotlib
import numpy as np
import pytest

import fasttrain
from fasttrain import ScanSpec, UserError, plot, plots
from fasttrain.cli import main
from fasttrain.prepare import prepare
from fasttrain.store import HDF5Store

SMALL = {"data": "gaussian:8", "classes": 2, "steps": 300, "check_every": 20, "max_probes": 24, "seed": 4}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plots") / "emc.h5"
    fasttrain.scan(ScanSpec(**SMALL, widths=(3, 5), activation=("relu", "tanh")), out=path)
    return path


@pytest.fixture(scope="module")
def results(file):
    return fasttrain.load(file)


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """Width 5 is beyond the range above, width 1 below it."""
    path = tmp_path_factory.mktemp("bounded") / "bounded.h5"
    return fasttrain.scan(ScanSpec(**SMALL, widths=(1, 5), n_min=12, n_max=18), out=path)


def lines(axes):
    """Label and points of what has a label."""
    bars = {bar.get_label(): bar.lines[0].get_xydata() for bar in axes.containers}
    plain = {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}
    return bars | plain


def legend(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


@pytest.mark.parametrize("kind", ["params", "width"])
def test_points_and_intervals_are_those_of_the_table(results, kind):
    figure = plot(results, kind)
    [axes] = figure.axes
    drawn = lines(axes)
    assert legend(figure) == ["activation relu", "activation tanh"]
    for activation, rows in results.curves.groupby("activation"):
        rows = rows.sort_values(kind)
        np.testing.assert_array_equal(drawn[f"activation {activation}"], rows[[kind, "emc50"]].to_numpy(float))
    bars = next(bar for bar in axes.containers if bar.get_label() == "activation tanh")
    ends = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
    rows = results.curves[results.curves["activation"] == "tanh"].sort_values(kind)
    np.testing.assert_allclose(ends, rows[["emc50_low", "emc50_high"]], rtol=1e-12)
    assert axes.get_yscale() == axes.get_xscale() == "log"
    if kind == "params":
        [line] = [one.get_xydata() for one in axes.lines if one.get_linestyle() == "--" and len(one.get_xydata()) == 2]
        np.testing.assert_array_equal(line[:, 0], line[:, 1])


def test_bounds_are_open_triangles(bounded):
    assert bounded.curves["censored"].tolist() == ["below", "above"]
    [axes] = plot(bounded).axes
    marks = {line.get_marker(): line for line in axes.lines if line.get_fillstyle() == "none"}
    for marker, row, bound in (("v", 0, 12), ("^", 1, 18)):
        np.testing.assert_array_equal(marks[marker].get_xydata(), [[bounded.curves["params"][row], bound]])


def test_shares_of_fits_are_counted(results):
    [axes] = plot(results, "fit", selection="width=5,activation=relu").axes
    row = results.curves.query("width == 5 and activation == 'relu'").iloc[0]
    runs = results.probes.query(f"variant == {row.variant} and seed < 2**20")
    wanted = (runs["outcome"] == "fitted").groupby(runs["n"]).mean()
    [points] = axes.collections
    np.testing.assert_allclose(points.get_offsets(), np.column_stack([wanted.index, wanted]), rtol=1e-12)
    [curve] = [line for line in axes.lines if len(line.get_xydata()) == 200]
    x, y = curve.get_xydata().T
    # Where it crosses one half, EMC50 is; the prediction is a mean over the posterior, not its median.
    assert row.emc50_low < np.interp(-0.5, -y, x) < row.emc50_high


def test_training_curves_are_those_of_the_runs(results):
    figure = plot(results, "history", probes=[0, 7])
    above, below = figure.axes
    assert legend(figure) == ["run 0", "run 7"]
    for probe, loss in lines(above).items():
        curve = results.history(int(probe.split()[1]))
        np.testing.assert_array_equal(loss, curve[["step", "train_loss"]])
    np.testing.assert_allclose(below.lines[0].get_ydata(), 100 * (1 - results.history(0)["train_accuracy"]))
    # By default some of each variant, each variant named once.
    assert len(legend(plot(results, "history"))) == 4


def test_emc_against_the_budget(results):
    [axes] = plot(results, "budget", selection="activation=relu").axes
    drawn = lines(axes)
    assert set(drawn) == {"width 3", "width 5"}
    for width, points in ((width, drawn[f"width {width}"]) for width in (3, 5)):
        at = results.curves.query(f"width == {width} and activation == 'relu'").index.item()
        for budget, emc in points:
            found = fasttrain.estimates(results, budget=f"{budget:.0f}steps").iloc[at]
            assert emc == found["estimate"]
        assert points[-1, 0] == 300
        assert points[-1, 1] == results.curves["emc50"][at]


def test_the_generalisation_gap_needs_held_out_samples(results, tmp_path):
    with pytest.raises(UserError, match="labels must be true or corrupted"):
        plot(results, "gap")
    found = fasttrain.scan(ScanSpec(widths=4, labels="true", steps=300, max_probes=12, n_max=200))
    [axes] = plot(found, "gap").axes
    runs = found.probes.query("outcome == 'fitted'")
    [points] = [line.get_xydata() for line in axes.lines if line.get_linestyle() == "None"]
    np.testing.assert_allclose(points, np.column_stack([runs["n"], 100 * (1 - runs["test_accuracy"])]))


def test_files_are_overlaid_by_name(results, bounded):
    assert legend(plot([results, bounded], "width", by="activation")) == [
        "emc, activation relu",
        "emc, activation tanh",
        "bounded, activation relu",
    ]


def test_depths_are_whole_numbers(tmp_path):
    found = fasttrain.scan(ScanSpec(**SMALL, widths=(4,), depths=(1, 2)))
    [axes] = plot(found, "depth").axes
    assert axes.get_xscale() == "linear"
    assert axes.get_xticks().tolist() == [1, 2]
    assert len(lines(axes)) == 1


@pytest.mark.parametrize("ending", plots.FORMATS)
def test_equal_results_are_equal_files(results, tmp_path, ending):
    paths = [tmp_path / f"{k}.{ending}" for k in range(2)]
    for path in paths:
        plot(results, out=path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    if ending == "png":
        from PIL import Image

        with Image.open(paths[0]) as image:
            assert image.size == (1005, 723)
    if ending == "svg":
        assert "EMC50 (samples)" in paths[0].read_text()  # text, not outlines


def test_nothing_global_is_touched(results):
    before = dict(matplotlib.rcParams)
    backend = matplotlib.rcParams._get_backend_or_none()
    plot(results)
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.rcParams._get_backend_or_none() == backend


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB: protanopia, deuteranopia, tritanopia.
BLIND = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
]


def lab(rgb):
    """CIE L*a*b* of linear sRGB, D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_colours_are_told_apart_with_any_colour_vision():
    """At least 10 in CIE L*a*b* apart, where 2.3 is a just noticeable difference; and none is lost on white."""
    rgb = [np.array(matplotlib.colors.to_rgb(colour)) for colour in plots._COLOURS]
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in rgb]
    for matrix in (np.eye(3), *map(np.array, BLIND)):
        seen = [lab(np.clip(matrix @ c, 1e-6, 1)) for c in linear]
        assert min(math.dist(a, b) for a, b in itertools.combinations(seen, 2)) > 10
        assert max(one[0] for one in seen) < 80


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"kind": "pie"}, "kind=pie: expected one of params, width"),
        ({"columns": 3}, "columns=3: expected 1 or 2"),
        ({"by": "colour"}, "by=colour: no such setting"),
        ({"selection": "width=9"}, "select=width=9: no variant has it; there are 3, 5"),
        ({"probes": [1]}, "probes=1: are for --kind history"),
        ({"kind": "history", "probes": [10**6]}, "no such probe"),
        ({"interval": 2.0}, "interval=2.0: expected"),
        ({"out": "a.jpeg"}, "expected a name that ends in .png, .svg, .pdf"),
        ({"out": "/nowhere/a.png"}, "its folder /nowhere does not exist"),
    ],
)
def test_what_cannot_be_drawn_is_named(results, arguments, what):
    with pytest.raises(UserError, match=what):
        plot(results, **arguments)


def test_without_files_or_runs(tmp_path, results):
    with pytest.raises(UserError, match="expected one file or more"):
        plot([])

    spec = ScanSpec(**SMALL, widths=3)
    store = HDF5Store(tmp_path / "e.h5", overwrite=False)
    store.begin(spec, prepare(spec).problems, {})
    store.finish("interrupted", {})
    for kind in plots.KINDS:
        with pytest.raises(UserError, match="file="):
            plot(fasttrain.load(tmp_path / "e.h5"), kind)


def test_from_the_command_line(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(file)]) == 0
    assert capsys.readouterr().out == f"emc-params.png: params of {file}\n"
    assert main(["plot", str(file)]) == 2
    assert "--out emc-params.png: exists" in capsys.readouterr().err
    line = "--kind history --probe 1,2 --columns 2 --title Runs --out two.pdf --overwrite"
    assert main(["plot", str(file), *line.split()]) == 0
    assert (tmp_path / "two.pdf").read_bytes()[:5] == b"%PDF-"
    for options, what in (
        ("--probe x", "--probe x: expected the index of a run"),
        ("--kind pie", "--kind pie: expected one of params"),
        ("--columns 0", "--columns 0: expected 1 or 2"),
    ):
        assert main(["plot", str(file), *options.split()]) == 2
        assert what in capsys.readouterr().err
    assert main(["plot"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["emc-params.png", "two.pdf"]


def test_linear_classifiers_have_no_width(results):
    linear = fasttrain.scan(ScanSpec(**SMALL, depths=(0,)))
    with pytest.raises(UserError, match="only linear classifiers"):
        plot(linear, "width")
    [axes] = plot([results, linear], "width", selection="classes=2").axes
    assert axes.get_xticks().tolist() == [3, 5]
    assert len(plot(linear, "params").axes) == 1


def test_a_title_is_no_formula(results, tmp_path):
    plot(results, title=r"cost in $\undefined, 5 $", out=tmp_path / "a.svg")
    assert r"cost in $\undefined, 5 $" in (tmp_path / "a.svg").read_text()
