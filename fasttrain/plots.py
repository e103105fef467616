"""Figures of results, as matplotlib objects: for a column of a paper, legible without colour.

Nothing of matplotlib's global state is touched: a figure is made and given back.
"""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pandas as pd

from fasttrain.analysis import Results
from fasttrain.errors import UserError
from fasttrain.estimators import estimates
from fasttrain.measured import SETTINGS, Measured, meaningless, measured, select, value_text
from fasttrain.spec import ScanSpec, budget_text
from fasttrain.store import check_output, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
"""What ``save`` writes, by the ending of the name."""
COLUMNS = {1: 3.35, 2: 6.9}
"""Width in inches of one and of two columns of a two-column paper."""
# Okabe and Ito (2008), told apart with any colour vision; yellow and black left out. Markers and dashes differ too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_MOST_SERIES = len(_COLOURS) * len(_DASHES)
_STYLE: dict[str, Any] = {
    "font.size": 8.0,
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "errorbar.capsize": 1.8,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "fasttrain",  # equal results, equal files
}
_BUDGETS = 8  # budgets of a plot against it, from a tenth of the scan's to all of it
_CURVES = 3  # training curves of a variant where none are named
_SCALING = ("params", "width", "depth")


@dataclass(slots=True, eq=False)
class _Series:
    """What is drawn in one colour.

    Attributes:
        label: for the legend.
        source: the results that it is of.
        variants: of these.
    """

    label: str
    source: Results
    variants: list[Measured] = field(default_factory=list)


def plot(
    results: Results | Sequence[Results],
    kind: str = "params",
    *,
    selection: str | Sequence[str] = (),
    by: str | Sequence[str] | None = None,
    probes: Sequence[int] = (),
    interval: float | None = None,
    columns: int = 1,
    title: str = "",
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> "Figure":
    """A figure of one or several results, overlaid.

    Args:
        results: from ``load`` or ``scan``.
        kind: ``"params"``, EMC50 against parameters, with the line EMC = parameters; ``"width"`` or ``"depth"``,
            against these; ``"fit"``, the share of runs that fit against n, with the posterior; ``"history"``, training
            curves; ``"budget"``, EMC50 against the budget, from the fit steps of the runs; ``"gap"``, the
            generalisation gap of fitted runs against n.
        selection: variants to take, as ``fasttrain compare --a`` has it: ``"width=8,16"``.
        by: settings that tell series apart, a sequence or separated by commas; ``None`` takes all that differ, but for
            the one of the axis.
        probes: of history, the runs to draw; by default some of each variant, those nearest to EMC50.
        interval: probability content of intervals; ``None`` takes that of the results.
        columns: 1 or 2, of a two-column paper.
        title: of the figure.
        out: a file to write it to, as ``save`` does.
        overwrite: whether ``out`` may replace a file.

    Returns:
        A ``matplotlib.figure.Figure`` that no window or global state knows of.

    Raises:
        UserError: an argument is out of its range, there is nothing to draw, or ``out`` cannot be written.
    """
    sources = [results] if isinstance(results, Results) else list(results)
    if kind not in KINDS:
        raise UserError("kind", kind, f"expected one of {', '.join(KINDS)}")
    if columns not in COLUMNS:
        raise UserError("columns", columns, "expected 1 or 2")
    if not sources:
        raise UserError("files", 0, "expected one file or more")
    if probes and (kind != "history" or len(sources) > 1):
        raise UserError("probes", ",".join(map(str, probes)), "are for --kind history of one file")
    if by is not None:
        by = [by] if isinstance(by, str) else by
        by = [name.strip().replace("-", "_") for text in by for name in text.split(",") if name.strip()]
        for name in by:
            if name not in SETTINGS:
                raise UserError("by", name, f"no such setting; expected some of {', '.join(SETTINGS)}")
    if out is not None:
        _format(Path(out), overwrite)
    series = _series(sources, kind, selection, by, interval)
    if not probes and len(series) > _MOST_SERIES:
        told = (
            f"tell more series apart than the {_MOST_SERIES} that can be drawn; select variants, or group them by less"
        )
        raise UserError("by", ",".join(by or ()) or "all settings", told)
    width = COLUMNS[columns]
    tall = (1.0 if kind == "history" else 0.72) * COLUMNS[1]
    with _styled() as figure_of:
        figure = figure_of(figsize=(width, tall), layout="constrained")
        KINDS[kind](figure, series, interval, probes)
        if title:
            figure.axes[0].set_title(_plain(title))
    if out is not None:
        save(figure, out, overwrite=overwrite)
    return figure


def save(figure: "Figure", path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes a figure as PNG (300 dots an inch), SVG or PDF, by the ending of the name; equal figures as equal bytes.

    Raises:
        UserError: the ending is another one, or the file exists or cannot be written.
    """
    path = Path(path)
    kind = _format(path, overwrite)
    undated: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    image = io.BytesIO()
    with _styled():
        figure.savefig(image, format=kind, metadata=undated.get(kind, {}))
    write_whole(path, image.getbuffer())


def write_svg(figure: "Figure", out: TextIO, salt: str) -> None:
    """Writes a figure as SVG; its names are those of no figure with another salt: several may stand on a page."""
    import matplotlib

    with _styled(), matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata={"Date": None})


def _format(path: Path, overwrite: bool) -> str:
    """What to write, by the ending of a name that may be written."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UserError("out", path, f"expected a name that ends in {', '.join('.' + one for one in FORMATS)}")
    check_output(path, overwrite)
    return kind


@contextlib.contextmanager
def _styled() -> Iterator[Callable[..., "Figure"]]:
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("kind", "plot", f"matplotlib is missing ({error}); pip install matplotlib") from None
    with matplotlib.style.context(["default", _STYLE]):
        yield Figure


def _series(
    sources: Sequence[Results],
    kind: str,
    selection: str | Sequence[str],
    by: Sequence[str] | None,
    interval: float | None,
) -> list[_Series]:
    """The variants of all results in groups, in the order of the files and their rows."""
    chosen: list[tuple[Results, Measured]] = []
    missing: list[str] = []
    for source in sources:
        found, left_out = measured(select(source, selection, "select") if selection else source, interval)
        chosen += [(source, one) for one in found]
        missing += left_out
    if not chosen:
        raise UserError("file", sources[0].path or "results", missing[0] if missing else "has no variant with runs")
    rows = [one.row for _, one in chosen]
    names = list(by) if by is not None else _telling(rows, kind)
    groups: dict[tuple[Any, ...], _Series] = {}
    shown = _file_names(sources)
    for source, one in chosen:
        number = next(k for k, each in enumerate(sources) if each is source)
        key = (number, *(one.row[name] for name in names))
        if key not in groups:
            words = [shown[number]] if len(sources) > 1 else []
            words += [f"{name} {value_text(name, one.row[name])}" for name in names if not meaningless(one.row, name)]
            groups[key] = _Series(_plain(", ".join(words)), source)
        groups[key].variants.append(one)
    return list(groups.values())


def _plain(text: str) -> str:
    """Text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def _telling(rows: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """The settings that differ between variants and are not those of the axis."""
    axis = {"params": {"width", "heads"}, "width": {"width", "heads"}, "depth": {"depth"}}.get(kind, {"heads"})
    raced = {"lr"} if all(row["race"] for row in rows) else set()
    left_out = axis | raced | {"momentum", "steps_budget"}
    return [
        name
        for name in SETTINGS
        if name not in left_out and len({value_text(name, row[name]) for row in rows if not meaningless(row, name)}) > 1
    ]


def _file_names(sources: Sequence[Results]) -> list[str]:
    """What a legend calls the files: their names, with folders where these are equal."""
    paths = [source.path or Path(f"results {number}") for number, source in enumerate(sources, 1)]
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _looks(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    }


def _scaling(kind: str) -> Callable[..., None]:
    def draw(figure: "Figure", series: Sequence[_Series], interval: float | None, probes: Sequence[int]) -> None:
        axes = figure.subplots()
        drawn: list[float] = []
        if kind == "width" and not any(each.row["width"] for one in series for each in one.variants):
            raise UserError("kind", kind, "there are only linear classifiers, which have no width")
        for number, one in enumerate(series):
            looks = _looks(number)
            shown = [each for each in one.variants if kind != "width" or each.row["width"]]
            variants = sorted(shown, key=lambda each: each.row[kind])
            known = [each for each in variants if each.known]
            x = [float(each.row[kind]) for each in known]
            ends = [(each.estimate.emc50, each.estimate.emc50_low, each.estimate.emc50_high) for each in known]
            y = [end[0] for end in ends]
            # An end out of the range that was tried is drawn to the end of that.
            down = [mid - max(low, each.row["n_min"]) for (mid, low, _), each in zip(ends, known, strict=True)]
            up = [min(high, each.row["n_max"]) - mid for (mid, _, high), each in zip(ends, known, strict=True)]
            axes.errorbar(x, y, yerr=[np.maximum(down, 0), np.maximum(up, 0)], label=one.label or None, **looks)
            drawn += x + y
            for each in variants:
                if each.estimate.censored in ("above", "below"):
                    above = each.estimate.censored == "above"
                    bound = float(each.row["n_max" if above else "n_min"])
                    # Of growing size: those of several series at one place are seen.
                    size = 5 + 3 * (number % 4)
                    axes.plot(
                        [float(each.row[kind])], [bound], marker="^" if above else "v", markersize=size,
                        fillstyle="none", color=looks["color"], linestyle="none", clip_on=False,
                    )  # fmt: skip
                    drawn += [bound]
        if not drawn:
            raise UserError("file", series[0].source.path or "results", "has no EMC50 yet, and no bound of one")
        _logarithmic(axes.set_yscale, axes.yaxis)
        if kind != "depth":
            _logarithmic(axes.set_xscale, axes.xaxis)
        if kind != "params":
            sizes = {int(each.row[kind]) for one in series for each in one.variants}
            axes.set_xticks(sorted(sizes - ({0} if kind == "width" else set())), minor=False)
        if kind == "params":
            low, high = axes.get_xlim()
            bottom, top = axes.get_ylim()
            axes.plot([low, high], [low, high], color="0.6", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
            axes.annotate(
                "EMC = parameters", (high, high), textcoords="offset points", xytext=(-4, 3), ha="right", va="bottom",
                rotation=0, color="0.4", fontsize=6.5,
            )  # fmt: skip
            axes.set_xlim(low, high)
            axes.set_ylim(bottom, max(top, 1.4 * high))
        axes.set_xlabel(
            {"params": "parameters", "width": _width_name(series), "depth": "depth (layers or blocks)"}[kind]
        )
        axes.set_ylabel("EMC50 (samples)")
        _legend(axes, several=len(series) > 1)

    return draw


def _width_name(series: Sequence[_Series]) -> str:
    archs = {each.row["arch"] for one in series for each in one.variants}
    return {"mlp": "width (hidden units)", "cnn": "width (channels)", "vit": "width (embedding)"}.get(
        archs.pop() if len(archs) == 1 else "", "width"
    )


def _fit(figure: "Figure", series: Sequence[_Series], interval: float | None, probes: Sequence[int]) -> None:
    """P(fit | n): shares of the runs, the posterior's prediction, and where EMC50 lies."""
    axes = figure.subplots()
    for number, (label, each) in enumerate(_each(series)):
        looks = _looks(number)
        looks.pop("marker")
        post = each.post
        if not post.ns.size:
            continue
        x = np.linspace(math.log(post.ns[0]), math.log(post.ns[-1]), 200)
        axes.plot(np.exp(x), post.fit_probability(x), label=label, **looks)
        counts = post.fits + post.fails
        axes.scatter(
            post.ns, post.fits / counts, s=4 + 3 * counts, facecolors="none", edgecolors=looks["color"],
            marker=_MARKERS[number % len(_MARKERS)], linewidths=0.7,
        )  # fmt: skip
        if each.known:
            low, high = each.estimate.emc50_low, min(each.estimate.emc50_high, each.row["n_max"])
            axes.axvspan(low, high, color=looks["color"], alpha=0.15, linewidth=0)
    axes.axhline(0.5, color="0.6", linewidth=0.6, zorder=0)
    _logarithmic(axes.set_xscale, axes.xaxis)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("training samples n")
    axes.set_ylabel("share of runs that fit")
    _legend(axes, several=sum(len(one.variants) for one in series) > 1)


def _each(series: Sequence[_Series]) -> list[tuple[str, Measured]]:
    """Every variant with a label of its own: width and depth where the series has several."""
    out = []
    for one in series:
        for each in one.variants:
            words = [one.label] if one.label else []
            if len(one.variants) > 1:
                sizes = [name for name in ("width", "depth") if len({v.row[name] for v in one.variants}) > 1]
                words += [f"{name} {each.row[name]}" for name in sizes or ("params",)]
            out.append((", ".join(words) or str(each.row["arch"]), each))
    return out


def _history(figure: "Figure", series: Sequence[_Series], interval: float | None, probes: Sequence[int]) -> None:
    """Loss and error of runs at their checks."""
    above, below = figure.subplots(2, 1, sharex=True)
    if probes:
        [source] = {id(one.source): one.source for one in series}.values()
        runs = [(f"run {probe}", source, probe) for probe in probes]
    else:
        runs = [
            (label, source, probe) for label, source, each in _with_source(series) for probe in _nearest(source, each)
        ]
    if not runs:
        raise UserError("file", series[0].source.path or "results", "has no runs yet")
    seen: dict[str, int] = {}
    for label, source, probe in runs:
        curve = source.history(probe)
        number = seen.setdefault(label, len(seen))
        first = list(seen).index(label) == len(seen) - 1 and not any(line.get_label() == label for line in above.lines)
        looks = _looks(number) | {"marker": None, "linewidth": 0.9}
        above.plot(curve["step"], curve["train_loss"], label=label if first else "_", **looks)
        below.plot(curve["step"], 100 * (1 - curve["train_accuracy"]), **looks)
        if len(curve):
            end = curve.iloc[-1]
            fitted = source.probes["outcome"].iloc[probe] == "fitted"
            style = {"marker": "o" if fitted else "x", "color": looks["color"], "markersize": 3.5, "linestyle": "none"}
            above.plot([end["step"]], [end["train_loss"]], **style)
            below.plot([end["step"]], [100 * (1 - end["train_accuracy"])], **style)
    above.set_yscale("log")
    above.set_ylabel("training loss (nats)")
    below.set_ylabel("training error (%)")
    below.set_xlabel("optimizer steps (end: circle fitted, cross not)")
    _legend(above, several=len(seen) > 1)


def _with_source(series: Sequence[_Series]) -> list[tuple[str, Results, Measured]]:
    sources = [one.source for one in series for _ in one.variants]
    return [(label, source, each) for (label, each), source in zip(_each(series), sources, strict=True)]


def _nearest(source: Results, each: Measured) -> list[int]:
    """The runs of a variant whose n is nearest to its EMC50."""
    runs = source.probes[source.probes["variant"] == each.row["variant"]]
    middle = each.estimate.emc50 if each.known else float(runs["n"].median())
    distance = (np.log(runs["n"]) - math.log(middle)).abs()
    return runs.loc[distance.sort_values(kind="stable").index, "probe"].head(_CURVES).tolist()


def _budget(figure: "Figure", series: Sequence[_Series], interval: float | None, probes: Sequence[int]) -> None:
    """EMC50 as it would have been with less of the budget."""
    axes = figure.subplots()
    unit = ""
    drawn = False
    found: dict[int, list[tuple[int, pd.DataFrame]]] = {}
    for one in series:
        if id(one.source) not in found:
            spec = one.source.spec
            whole, own = _amount(spec)
            if unit and unit != own:
                raise UserError("files", budget_text(spec), f"has another unit of its budget than {unit}")
            unit = own
            shares = np.geomspace(0.1, 1.0, _BUDGETS)
            amounts = sorted({max(1, round(whole * share)) for share in shares})
            found[id(one.source)] = [
                (amount, estimates(one.source, "emc50", interval=interval, budget=f"{amount}{unit}"))
                for amount in amounts
            ]
    for number, (label, source, each) in enumerate(_with_source(series)):
        at = [int(key) for key in source.curves["variant"]].index(int(each.row["variant"]))
        points = [(amount, frame.iloc[at]) for amount, frame in found[id(source)]]
        known = [(amount, row) for amount, row in points if math.isfinite(row["estimate"])]
        if not known:
            continue
        drawn = True
        x, y = [amount for amount, _ in known], np.array([row["estimate"] for _, row in known])
        low = np.array([max(row["low"], each.row["n_min"]) for _, row in known])
        high = np.array([min(row["high"], each.row["n_max"]) for _, row in known])
        axes.errorbar(x, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], label=label, **_looks(number))
    if not drawn:
        raise UserError("file", series[0].source.path or "results", "has no EMC50 at any budget yet")
    _logarithmic(axes.set_xscale, axes.xaxis)
    _logarithmic(axes.set_yscale, axes.yaxis)
    axes.set_xlabel({"steps": "budget (optimizer steps)"}.get(unit, f"budget ({unit})"))
    axes.set_ylabel("EMC50 (samples)")
    _legend(axes, several=sum(len(one.variants) for one in series) > 1)


def _amount(spec: ScanSpec) -> tuple[int, str]:
    text = budget_text(spec)
    digits = "".join(itertools.takewhile(str.isdigit, text))
    return int(digits), text[len(digits) :]


def _gap(figure: "Figure", series: Sequence[_Series], interval: float | None, probes: Sequence[int]) -> None:
    """Training accuracy, which is 1, less that on held-out samples, of fitted runs."""
    axes = figure.subplots()
    drawn = False
    for number, (label, source, each) in enumerate(_with_source(series)):
        runs = source.probes[source.probes["variant"] == each.row["variant"]]
        runs = runs[(runs["outcome"] == "fitted") & runs["test_accuracy"].notna()]
        if runs.empty:
            continue
        drawn = True
        looks = _looks(number)
        gap = 100 * (1 - runs["test_accuracy"])
        axes.plot(
            runs["n"], gap, linestyle="none", marker=looks["marker"], color=looks["color"], alpha=0.35, markersize=2.5
        )
        mean = gap.groupby(runs["n"]).mean()
        bins = np.unique(np.geomspace(mean.index.min(), mean.index.max() + 1, 7))
        middle = gap.groupby(np.digitize(runs["n"], bins)).mean()
        at = runs["n"].groupby(np.digitize(runs["n"], bins)).mean()
        axes.plot(at, middle, label=label, **looks)
    if not drawn:
        told = "has no fitted run that was tried on held-out samples: labels must be true or corrupted"
        raise UserError("file", series[0].source.path or "results", told)
    _logarithmic(axes.set_xscale, axes.xaxis)
    axes.set_xlabel("training samples n")
    axes.set_ylabel("generalisation gap (%)")
    _legend(axes, several=sum(len(one.variants) for one in series) > 1)


def _logarithmic(scale: Callable[[str], None], axis: "Axis") -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: "Axes", several: bool) -> None:
    """What is what, above the axes, where it hides nothing."""
    if several:
        handles, labels = axes.get_legend_handles_labels()
        longest = max(map(len, labels))
        wide = axes.figure.get_figwidth()  # type: ignore[union-attr]
        columns = max(1, min(len(labels), int(wide * 20 / (longest + 6))))
        axes.figure.legend(handles, labels, loc="outside upper center", ncols=columns)


KINDS: dict[str, Callable[..., None]] = {
    **{kind: _scaling(kind) for kind in _SCALING},
    "fit": _fit,
    "history": _history,
    "budget": _budget,
    "gap": _gap,
}
"""What draws each kind of figure."""
