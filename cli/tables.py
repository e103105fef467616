"""What the commands print, as lines of plain text: the results of a scan and the preview of one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from fasttrain.wording import (
    BEYOND,
    LOSERS,
    SETTINGS,
    Row,
    curve_cells,
    meaningless,
    setting_text,
    shared_settings,
    varying_settings,
)

if TYPE_CHECKING:
    import pandas

    from fasttrain import Preview, Rerun, Results

_STATUS = {
    "complete": "complete",
    "interrupted": "interrupted before it was done",
    "running": "not closed: the scan was killed or still runs",
}
_LEFT = {
    "arch",
    "activation",
    "norm",
    "optimizer",
    "schedule",
    "inputs",
    "labels",
    "interval",
    "state",
    "notes",
    "outcome",
}


def results_text(
    results: "Results", path: str, losers: bool = False, curves: "pandas.DataFrame | None" = None
) -> list[str]:
    """The table of a scan, the conditions that it was measured under, and where it is kept.

    Args:
        results: what to show.
        path: of their file, to be named.
        losers: whether to show the learning rates that lost a race too.
        curves: rows of its curves to show, all by default.
    """
    shown = results.curves if curves is None else curves
    return [_conditions(results, shown), "", *curve_table(shown, losers), "", _source(results, path)]


def estimates_text(results: "Results", estimates: "pandas.DataFrame", path: str, losers: bool = False) -> list[str]:
    """The table of a scan with another estimator's EMC, what that assumes, and what is to be known of the runs.

    Args:
        results: of the scan.
        estimates: ``fasttrain.estimates`` of them.
        path: of their file, to be named.
        losers: whether to show the learning rates that lost a race too.
    """
    shown = {"estimate": "emc50", "low": "emc50_low", "high": "emc50_high", "censored": "censored"}
    columns = {theirs: estimates[own].to_numpy() for own, theirs in shown.items()}
    content, name = estimates.attrs["interval"], estimates.attrs["estimator"]
    # What was noted of the estimate at the full budget is not said of this one.
    silent = {"elasticity": math.nan, "budget_limited": False, "misfit": False}
    frame = results.curves.assign(**silent, **columns, n_probes=estimates["n_probes"].to_numpy(), interval=content)
    settings = varying_settings(frame.to_dict("records"))
    warnings = []
    for row, said in zip(frame.to_dict("records"), estimates["warnings"], strict=True):
        if said and (losers or row["race"] not in LOSERS):
            names = [f"{SETTINGS[one]} {setting_text(row, one)}" for one in settings if not meaningless(row, one)]
            warnings.append(f"{', '.join(names)}: {said}.")
    beyond = {"above": "above what was tried", "below": "below what was tried"}
    title = "EMC50" if name == "emc50" else f"EMC ({name})"
    return [
        _conditions(results),
        "",
        *curve_table(frame, losers, title, beyond),
        "",
        f"{title}: {estimates.attrs['assumes']}",
        *warnings,
        "",
        _source(results, path),
    ]


def _conditions(results: "Results", curves: "pandas.DataFrame | None" = None) -> str:
    """What all variants that are shown were measured under."""
    rows = (results.curves if curves is None else curves).to_dict("records")
    conditions = [results.spec.data, *shared_settings(rows)]
    conditions += [f"budget {results.spec.budget}"] if results.spec.budget is not None else []
    conditions += [] if results.spec.early_stop else ["no early stop"]
    conditions += [str(results.attrs[name]) for name in ("precision", "device", "backend") if results.attrs.get(name)]
    return ", ".join(conditions)


def _source(results: "Results", path: str) -> str:
    """The file, how much is in it, and how the scan ended."""
    status = results.attrs.get("status")
    return (
        f"{path}: {count(len(results.curves), 'variant')}, {count(len(results.probes), 'training run')}, "
        f"{_STATUS.get(str(status), status)}"
    )


def curve_table(
    frame: "pandas.DataFrame", losers: bool = False, title: str = "EMC50", beyond: Mapping[str, str] = BEYOND
) -> list[str]:
    """One line a variant, under a line of headings; settings that all variants share are left out.

    Args:
        frame: ``Results.curves``.
        losers: whether there is a line for the learning rates that were dropped from a race or lost it.
        title: heading of ``emc50``.
        beyond: what is to be said of a censored row.
    """
    return aligned(*curve_cells(frame, losers, title, beyond))


def rerun_text(again: "Rerun", results: "Results", probe: int) -> list[str]:
    """The training curve of a run made again, how it ended, and whether that is what the file says."""
    row = results.probes.iloc[probe]
    settings = [setting_text(row, name) for name in ("arch", "activation", "optimizer", "labels")]
    sizes = f"width {row['width']}, depth {row['depth']}, lr {row['lr']:g}, n {row['n']}, seed {row['seed']}"
    cells = [
        [str(step), f"{loss:.6g}", f"{accuracy:.4f}"] for step, loss, accuracy in again.history.itertuples(index=False)
    ]
    result = again.result
    ended = f"{result.outcome} after {result.steps} steps: {result.outcome.message}"
    if not math.isnan(result.test_accuracy):
        ended += f"; {100 * result.test_accuracy:.1f} % of the held-out samples are right"
    looked_at = []
    if again.curvature is not None:
        one = {**asdict(again.curvature), "probe": probe, "n": row["n"], "outcome": result.outcome}
        looked_at = [*aligned(list(_CURVATURE), [_curvature_cells(one)], _CURVATURE), ""]
    same = f"not the same as in the file: {', '.join(again.differs)}" if again.differs else "the same as in the file"
    return [
        f"run {probe}: {results.spec.data}, {', '.join(settings)}, {sizes}",
        "",
        *aligned(["step", "loss", "accuracy"], cells, {}),
        "",
        *looked_at,
        f"{ended}; {same}.",
    ]


def curvature_text(results: "Results") -> list[str]:
    """One line for each run whose end was looked at, and how many of them have a negative eigenvalue."""
    if results.curvature.empty:
        return ["No curvature is in this file: scan --curvature K measures it."]
    runs = results.probes.set_index("probe")
    rows = [{**runs.loc[one["probe"]].to_dict(), **one} for one in results.curvature.to_dict("records")]
    settings = varying_settings(results.curves.to_dict("records"))
    columns = [*settings, *_CURVATURE]
    cells = [[*(setting_text(row, name) for name in settings), *_curvature_cells(row)] for row in rows]
    negative = sum(row["lambda_min"] < -row["residual_min"] for row in rows)
    return [
        *aligned(columns, cells, _CURVATURE),
        "",
        f"{count(len(rows), 'run')}, of which {negative} with an eigenvalue that is surely negative; "
        f"{sum(not row['converged'] for row in rows)} not converged. Diagnostics: no estimate depends on them.",
    ]


_CURVATURE = {
    "probe": "run",
    "n": "n",
    "outcome": "outcome",
    "loss": "loss",
    "gradient_norm": "|gradient|",
    "loss_slope": "slope",
    "lambda_min": "lambda min",
    "residual_min": "+-",
    "lambda_max": "lambda max",
    "residual_max": "+-",
    "products": "products",
    "notes": "notes",
}


def _curvature_cells(row: Row) -> list[str]:
    """The cells of ``_CURVATURE``."""

    def short(name: str, form: str = "#.3g") -> str:
        return "-" if math.isnan(row[name]) else f"{row[name]:{form}}"

    return [
        str(row["probe"]),
        str(row["n"]),
        str(row["outcome"]),
        *(short(name) for name in ("loss", "gradient_norm", "loss_slope")),
        *(
            short(name, form)
            for end in ("min", "max")
            for name, form in ((f"lambda_{end}", "#.3g"), (f"residual_{end}", ".0e"))
        ),
        str(row["products"]),
        "" if row["converged"] else "not converged",
    ]


def preview_text(preview: "Preview") -> list[str]:
    """The variants of a scan, and what it would take."""
    rows = [
        {**asdict(row.variant), "params": row.params, "n": f"{row.n_min} to {row.n_max}"} for row in preview.variants
    ]
    settings = varying_settings(rows)
    table = aligned(
        [*settings, "params", "n"],
        [[*(setting_text(row, name) for name in settings), str(row["params"]), row["n"]] for row in rows],
        {},
    )
    data = f", {bytes_text(preview.data_bytes)} of data" if preview.data_bytes else ""
    likely = f"; likely {seconds_text(preview.seconds_likely)}" if preview.seconds_likely is not None else ""
    return [
        ", ".join(shared_settings(rows)),
        "",
        *table,
        "",
        f"{count(len(rows), 'variant')} on {preview.device}, {preview.backend}, {preview.precision}, "
        f"{count(preview.slots, 'slot')}",
        f"memory: about {bytes_text(preview.memory_bytes)}, at most {bytes_text(preview.model_bytes)} a model{data}",
        f"cost: at most {number_text(preview.model_steps_most)} model-steps, "
        f"{seconds_text(preview.seconds_most)}{likely}",
        *(f"left out: {line}" for line in preview.unmatched),
        "Nothing was trained or written.",
    ]


def count(number: int, noun: str) -> str:
    """``1 variant``, ``2 variants``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def seconds_text(seconds: float) -> str:
    """A duration in the units that suit it: ``0.4 s``, ``42 s``, ``1 min 15 s``, ``2 h 05 min``."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def number_text(number: float) -> str:
    """A count to three digits: ``950``, ``12.3 k``, ``4.56 M``."""
    if not math.isfinite(number):
        return "unknown"
    scaled, unit = float(number), ""
    for larger in ("k", "M", "G", "T", "P"):
        if scaled < 999.5:
            break
        scaled, unit = scaled / 1000, f" {larger}"
    decimals = 0 if not unit or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{decimals}f}{unit}"


def bytes_text(number: float) -> str:
    """Memory: ``12 KiB``, ``210 MiB``, ``1.4 GiB``."""
    for unit in ("KiB", "MiB"):
        number /= 1024
        if number < 1023.5:
            return f"{max(number, 1):.0f} {unit}"
    return f"{number / 1024:.1f} GiB"


def _of_text(column: str) -> bool:
    return column.endswith("interval") or column.removesuffix("_a").removesuffix("_b") in _LEFT


def aligned(columns: Sequence[str], cells: Sequence[Sequence[str]], titles: Mapping[str, str]) -> list[str]:
    """Lines of a table under a line of headings.

    Args:
        columns: their names; those of text are flush left.
        cells: text, one row a line.
        titles: headings of columns that are not settings.
    """
    lines = [[titles.get(name, SETTINGS.get(name, name)) for name in columns], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return [
        "  ".join(
            cell.ljust(width) if _of_text(name) else cell.rjust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


def plain(text: str) -> str:
    """Text that any terminal can show: file names may hold control characters and bytes that are no UTF-8."""
    printable = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return printable.encode(errors="backslashreplace").decode()
