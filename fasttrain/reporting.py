"""A scan as one page: what was measured and how, in words for a methods section, with tables, figures and warnings."""

import io
import itertools
import math
import os
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fasttrain import plots
from fasttrain.analysis import Results
from fasttrain.errors import UserError
from fasttrain.scaling import fit_scaling
from fasttrain.spec import FULL_BATCH, ScanSpec, budget_text
from fasttrain.stopping import PLATEAU_AFTER, PLATEAU_LOSS, PLATEAU_RATIO
from fasttrain.store import check_output, write_whole
from fasttrain.wording import SETTINGS, curve_cells, setting_text, shared_settings, varying_settings

BIBTEX = """@misc{shwartzziv2024flexible,
  title = {Just How Flexible are Neural Networks in Practice?},
  author = {Shwartz-Ziv, Ravid and Goldblum, Micah and Bansal, Arpit and Bruss, C. Bayan and LeCun, Yann and Wilson, Andrew Gordon},
  year = {2024},
  eprint = {2406.11463},
  archivePrefix = {arXiv}
}

@misc{nakkiran2019deep,
  title = {Deep Double Descent: Where Bigger Models and More Data Hurt},
  author = {Nakkiran, Preetum and Kaplun, Gal and Bansal, Yamini and Yang, Tristan and Barak, Boaz and Sutskever, Ilya},
  year = {2019},
  eprint = {1912.02292},
  archivePrefix = {arXiv}
}
"""
"""What a scan builds on."""
_TEXT = {"arch", "activation", "norm", "optimizer", "schedule", "inputs", "labels", "interval", "notes"}
_SHOWN = (
    "fasttrain_version", "torch_version", "numpy_version", "python_version", "platform", "device", "device_name",
    "backend", "precision", "generator", "data_source", "data_sha256", "started", "ended", "seconds", "model_steps",
    "occupancy", "memory_retreats",
)  # fmt: skip


def report(results: Results, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes what a paper needs of a scan, as the name of the file asks for.

    ``.html`` is a page that needs nothing else (no script, no network, figures inside): the table and figures of the
    scan, its protocol in sentences, the fit of EMC to parameters, counts of how runs ended, whatever is to be known
    before the numbers are used, the conditions, and the command that does it again. ``.tex`` is the table for LaTeX,
    with the package booktabs. ``.bib`` is what to cite.

    Args:
        results: from ``load`` or ``scan``.
        out: the file.
        overwrite: whether it may replace a file.

    Raises:
        UserError: nothing was measured yet, the name has another ending, or ``out`` cannot be written.
    """
    path = Path(out)
    made = {".html": page, ".tex": latex, ".bib": bibtex}.get(path.suffix.lower())
    if made is None:
        raise UserError("out", path, "expected a name that ends in .html, .tex or .bib")
    check_output(path, overwrite)
    if not len(results.probes):
        raise UserError("file", results.path or "results", "has no runs yet")
    write_whole(path, made(results).encode())


def page(results: Results) -> str:
    """The text of the page that ``report`` writes."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=False)
    template = environment.from_string(resources.files("fasttrain").joinpath("report.html").read_text(encoding="utf-8"))
    names, rows, titles = curve_cells(results.curves)
    columns = [(titles.get(name, SETTINGS.get(name, name)), name in _TEXT) for name in names]
    figures = [{"svg": Markup(svg), "caption": caption} for svg, caption in _figures(results)]
    return template.render(
        title=f"EMC50 of {len(results.curves)} variants on {results.spec.data}",
        summary=_summary(results),
        warnings=warnings(results),
        columns=columns,
        rows=[[(cell, name in _TEXT) for cell, name in zip(row, names, strict=True)] for row in rows],
        figures=figures,
        protocol=protocol(results),
        scaling=_scaling(results),
        diagnostics=_diagnostics(results),
        conditions=[(name, _value(results.attrs[name])) for name in _SHOWN if results.attrs.get(name, "") != ""],
        commands="\n".join(commands(results)),
        bibtex=bibtex(results),
    )


def latex(results: Results) -> str:
    """The table of a scan for LaTeX, with the package booktabs."""
    names, rows, titles = curve_cells(results.curves)
    kept = [k for k, name in enumerate(names) if any(row[k] for row in rows)]
    aligned = "".join("l" if names[k] in _TEXT else "r" for k in kept)
    heading = [_escaped(titles.get(names[k], SETTINGS.get(names[k], names[k]))) for k in kept]
    lines = [" & ".join(_escaped(row[k]) for k in kept) + r" \\" for row in rows]
    shared = _escaped(", ".join([results.spec.data, *shared_settings(results.curves.to_dict("records"))]))
    return "\n".join(
        [
            f"% {shared}",
            rf"\begin{{tabular}}{{{aligned}}}",
            r"\toprule",
            " & ".join(heading) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def bibtex(results: Results) -> str:
    """What to cite: the program in the version that made the file, and what it builds on."""
    started = str(results.attrs.get("started", ""))[:4]
    year = f"  year = {{{started}}},\n" if started.isdigit() else ""
    program = (
        "@software{fasttrain,\n  title = {fasttrain: EMC scaling curves of small neural networks},\n"
        f"{year}  version = {{{results.attrs.get('fasttrain_version', '')}}}\n}}\n\n"
    )
    return program + BIBTEX


def protocol(results: Results) -> list[str]:
    """How a scan was made, in sentences that stand in a methods section as they are."""
    spec = results.spec
    curves = results.curves
    return [
        _said_of_data(results),
        _said_of_models(curves),
        _said_of_training(spec, curves),
        _said_of_fits(spec),
        _said_of_search(spec, curves),
        _said_of_machine(results),
    ]


def commands(results: Results) -> list[str]:
    """The command lines that make the file, that of the scan and those of its extensions."""
    name = "emc.h5" if results.path is None else results.path.name
    specs = [*results.earlier, results.spec]
    extra = ["--save-weights"] if results.attrs.get("save_weights") else []
    looked_at = results.attrs.get("curvature_runs", 0)
    extra += ["--curvature", str(looked_at)] if looked_at else []
    lines = [shlex.join(["fasttrain", "scan", *specs[0].options(), *extra, "--out", name])]
    for before, after in itertools.pairwise(specs):
        changed = [one for one in ScanSpec.__dataclass_fields__ if getattr(before, one) != getattr(after, one)]
        lines.append(shlex.join(["fasttrain", "extend", name, *after.options(changed)]))
    return lines


def warnings(results: Results) -> list[str]:
    """What is to be known before numbers of a scan are used, a sentence each."""
    out = []
    status = results.attrs.get("status")
    if status != "complete":
        out.append(f"The scan is not complete (status {status}): estimates are preliminary.")
    curves = results.curves
    for column, text in (
        ("censored", "EMC50 lies out of the range that was tried: a bound, no estimate"),
        ("budget_spent", "the runs were used up before the interval was as narrow as asked for"),
        ("budget_limited", "EMC50 would rise by more than 10 % with ten times the budget: a lower bound at this one"),
        ("misfit", "the runs contradict the curve that EMC50 is read from"),
    ):
        flagged = curves[
            curves[column].isin(["above", "below"]) if column == "censored" else curves[column].astype(bool)
        ]
        if len(flagged):
            names = "; ".join(_variant(row, curves) for row in flagged.to_dict("records"))
            out.append(f"{len(flagged)} of {len(curves)} variants ({names}): {text}.")
    if not results.attrs.get("bitwise_independent", 1):
        out.append("The last bits of a run depended on what trained beside it, on the machine of this scan.")
    if results.attrs.get("unmatched"):
        out.append(f"Variants that were left out: {results.attrs['unmatched']}.")
    return out


def _summary(results: Results) -> str:
    ended = {"complete": "complete", "interrupted": "stopped before it was done"}.get(
        str(results.attrs.get("status")), "killed, or still running"
    )
    return (
        f"{len(results.probes):,} training runs of {len(results.curves)} variants; the scan is {ended}. EMC50 is the number of "
        "training samples that half of the training runs fit without an error, at the budget of optimizer steps given "
        "below; EMC at a fixed budget is a lower bound of what a model can fit."
    )


def _figures(results: Results) -> list[tuple[str, str]]:
    content = f"{100 * float(results.curves['interval'].iloc[0]):g} %"
    kinds = [("params", f"EMC50 against trained parameters, with {content} intervals. Open triangles are bounds.")]
    if results.curves["width"].nunique() > 1:
        kinds.append(("width", f"EMC50 against width, with {content} intervals."))
    if results.curves["depth"].nunique() > 1:
        kinds.append(("depth", f"EMC50 against depth, with {content} intervals."))
    kinds += [
        ("fit", "Share of training runs that fit, the posterior's prediction of it, and the interval of EMC50."),
        ("history", "Loss and error of the runs nearest to EMC50 at their checks."),
        ("budget", "EMC50 at smaller budgets, from the steps at which runs fitted."),
        ("gap", "Training accuracy less held-out accuracy of fitted runs."),
    ]
    out = []
    for kind, caption in kinds:
        try:
            figure = plots.plot(results, kind)
        except UserError:  # there is nothing of the kind, or too much of it
            continue
        image = io.StringIO()
        plots.write_svg(figure, image, salt=kind)
        text = image.getvalue()
        out.append((text[text.index("<svg") :], caption))
    return out


def _said_of_data(results: Results) -> str:
    spec, attrs = results.spec, results.attrs
    shape = str(attrs.get("data_shape", "")).replace("x", " x ")
    size = int(attrs.get("data_size", 0))
    held = f" {int(attrs['data_test_size']):,} samples were held out." if attrs.get("data_test_size") else ""
    source = f"{size:,} samples of {spec.data}" if size else f"samples drawn from {spec.data}"
    classes = sorted(set(results.curves["classes"]))
    labels = {
        "random": "drawn uniformly over the classes for each sample",
        "true": "those of the data set",
    }
    said = [labels.get(one, f"true, but for a share of {one.partition(':')[2]} drawn anew") for one in spec.labels]
    how = {
        "real": "standardised",
        "shuffled": "standardised, with their features permuted",
        "gaussian": "Gaussian of the same moments",
    }
    inputs = " or ".join(how[one] for one in spec.inputs)
    return (
        f"Data: each training run had n distinct samples out of {source} (shape {shape}), inputs {inputs}. "
        f"Labels of {' or '.join(map(str, classes))} classes were {' or '.join(said)}.{held} Every run drew its own samples, labels, "
        "initial weights and order of minibatches, keyed by seed and n."
    )


def _said_of_models(curves: pd.DataFrame) -> str:
    said = []
    for arch, rows in curves.groupby("arch", sort=False):
        widths, depths = (", ".join(map(str, sorted(set(rows[name])))) for name in ("width", "depth"))
        what = {"mlp": "multilayer perceptrons", "cnn": "convolutional networks", "vit": "vision transformers"}.get(
            str(arch), f"models of {arch}"
        )
        acts = " or ".join(sorted({str(one) for one in rows["activation"]} - {"none"}))
        params = f"{rows['params'].min():,} to {rows['params'].max():,} trained parameters"
        with_acts = f" and {acts} activations" if acts else ""
        said.append(f"{what} of width {widths} and depth {depths}{with_acts} ({params})")
    return f"Models: {'; '.join(said)}. Weights were drawn from N(0, gain^2 / fan-in), biases started at 0."


def _said_of_training(spec: ScanSpec, curves: pd.DataFrame) -> str:
    rows = curves.to_dict("records")
    optimizers = " or ".join(dict.fromkeys(str(row["optimizer"]) for row in rows))
    rates = ", ".join(dict.fromkeys(f"{row['lr']:g}" for row in rows))
    raced = (
        " (raced for each variant; the winner was measured anew on fresh seeds)" if any(curves["race"] != "") else ""
    )
    batches = " or ".join("all n" if one == FULL_BATCH else str(one) for one in spec.batch_size)
    options = []
    if any(row["momentum"] for row in rows):
        options.append(f"momentum {spec.momentum:g}{' (Nesterov)' if spec.nesterov else ''}")
    options += [f"weight decay {one:g}" for one in spec.weight_decay if one]
    options += [f"{one} schedule" for one in spec.schedule if one != "constant"]
    options += [f"warm-up of {spec.warmup} steps"] if spec.warmup else []
    options += [f"gradients clipped at norm {spec.clip:g}"] if spec.clip else []
    options += [f"label smoothing {spec.label_smoothing:g}"] if spec.label_smoothing else []
    more = f", {', '.join(options)}" if options else ""
    return (
        f"Training: softmax cross-entropy with {optimizers}, learning rate {rates}{raced}{more}, batches of {batches} samples drawn "
        f"without replacement within epochs, for at most {_amount(spec)} a run."
    )


def _amount(spec: ScanSpec) -> str:
    digits, unit = re.fullmatch(r"(\d+)(\D+)", budget_text(spec)).groups()  # type: ignore[union-attr]
    return f"{int(digits):,} {'optimizer ' if unit == 'steps' else ''}{unit}"


def _said_of_fits(spec: ScanSpec) -> str:
    early = (
        f"ended early where, after {100 * PLATEAU_AFTER:g} % of its budget, its best training loss was above "
        f"{100 * PLATEAU_LOSS:g} % of ln C and above {PLATEAU_RATIO:g} times that at half of its steps so far, or "
        if spec.early_stop
        else "ended "
    )
    return (
        f"Fit: every {spec.check_every} steps at most, and at the last one, the whole training set was evaluated; a run fitted if the "
        f"label's logit was strictly the largest for all n samples at a check. A run was {early}where its loss was not finite. All runs that "
        "did not fit count as failures."
    )


def _said_of_search(spec: ScanSpec, curves: pd.DataFrame) -> str:
    content = f"{100 * spec.interval:g} %"
    how = {
        "adaptive": (
            "n was chosen in rounds, where a posterior over (ln EMC50, slope, lapse rate) expected 10 to 90 % of the runs to fit, until the "
            f"half-width of the {content} interval of EMC50 was at most {100 * spec.tolerance:g} % of it or {spec.max_probes} runs were made"
        ),
        "paper": f"for each of {spec.seeds} seeds n grew by a factor of {spec.growth:g} until the first failure",
        "grid": f"{spec.seeds} runs were made at each of a grid of n",
    }[spec.search]
    third = (
        " EMC50 at a third of the budget, and with it the elasticity d ln EMC50 / d ln budget, was measured with runs of its own."
        if spec.shortens
        else ""
    )
    low, high = int(curves["n_min"].min()), int(curves["n_max"].max())
    return (
        f"Search: {how}; n lay between {low:,} and {high:,}, with at most {spec.seeds} seeds at one n. P(fit | n) was modelled as a logistic "
        f"function of ln n with a lapse rate; EMC50 is the posterior median of its midpoint, and intervals are equal-tailed.{third}"
    )


def _said_of_machine(results: Results) -> str:
    attrs = results.attrs
    name = "" if attrs.get("device_name") in (None, "") else f" ({attrs['device_name']})"
    seconds = f", in {float(attrs['seconds']):,.0f} s" if "seconds" in attrs else ""
    return (
        f"Computation: fasttrain {attrs.get('fasttrain_version', '')} with PyTorch {attrs.get('torch_version', '')} in {attrs.get('precision', '')} on "
        f"{attrs.get('device', '')}{name}, backend {attrs.get('backend', '')}{seconds}. Every run can be made again from the file."
    )


def _scaling(results: Results) -> list[str]:
    try:
        found = fit_scaling(results)
    except UserError as error:
        return [f"No fit of EMC = a params^alpha: {error.expected}."]
    lines = []
    for row in found.fits.to_dict("records"):
        named = ", ".join(f"{name} {row[name]}" for name in found.by if found.fits[name].nunique() > 1)
        if math.isnan(row["alpha"]):
            lines.append(f"{named or 'All variants'}: no fit. {row['notes']}")
            continue
        content = f"{100 * found.interval:g} %"
        lines.append(
            f"{named or 'All variants'}: EMC = {math.exp(row['log_a']):.3g} params^{row['alpha']:.3g}, with alpha in "
            f"[{row['alpha_low']:.3g}, {row['alpha_high']:.3g}] ({content}), from {row['variants']} variants"
            + (f", {row['censored']} of them bounds" if row["censored"] else "")
            + (f". {row['notes']}" if row["notes"] else ".")
        )
    return lines


def _diagnostics(results: Results) -> dict[str, Any]:
    outcomes = ("fitted", "plateaued", "diverged", "out_of_budget")
    counts = results.probes.groupby(["variant", "outcome"]).size().unstack(fill_value=0)
    settings = varying_settings(results.curves.to_dict("records"))
    columns = [(SETTINGS[name], name in _TEXT) for name in settings]
    columns += [(name.replace("_", " "), False) for name in outcomes]
    columns += [("slope", False), ("lapse", False), ("misfit p", False)]
    rows = []
    for row in results.curves.to_dict("records"):
        cells = [(setting_text(row, name), name in _TEXT) for name in settings]
        for name in outcomes:
            here = name in counts and row["variant"] in counts.index
            cells.append((f"{int(counts.loc[row['variant'], name]) if here else 0}", False))
        cells += [(_value(float(row[name])), False) for name in ("slope", "lapse", "misfit_p")]
        rows.append(cells)
    lines = [
        "All training runs, those at a third of the budget included. Slope: steepness of P(fit) over ln n; lapse: probability to fail "
        "where n is no obstacle; misfit p: p-value of a test that the runs follow the model.",
    ]
    if len(results.curvature):
        lines.append(
            f"{len(results.curvature)} runs have gradient norms and extreme Hessian eigenvalues (fasttrain show --curvature)."
        )
    return {"columns": columns, "rows": rows, "lines": lines}


def _variant(row: dict[str, Any], curves: pd.DataFrame) -> str:
    names = varying_settings(curves.to_dict("records"))
    return ", ".join(f"{SETTINGS[name]} {setting_text(row, name)}" for name in names)


def _value(value: object) -> str:
    if isinstance(value, float | np.floating):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


_LATEX = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "<": "$<$", ">": "$>$"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


__all__ = ("bibtex", "commands", "latex", "page", "protocol", "report", "warnings")
