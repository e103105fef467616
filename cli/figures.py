"""``fasttrain plot`` and ``fasttrain export``: what leaves a file for papers and other programs."""

from pathlib import Path

import click

import fasttrain
from fasttrain.cli.tables import count, plain

_EXAMPLES = """\b
Examples:
  fasttrain plot emc.h5
  fasttrain plot emc.h5 --kind fit --select width=8,16 --out fit.pdf
  fasttrain plot relu.h5 tanh.h5 --kind width --out activations.svg
"""


@click.command("plot", epilog=_EXAMPLES, short_help="Draw EMC curves, fits, training curves.")
@click.argument("files", nargs=-1)
@click.option(
    "--kind",
    default="params",
    show_default=True,
    metavar="|".join(("params", "width", "depth", "fit", "history", "budget", "gap")),
    help="EMC50 against parameters, width, depth or budget; share of runs that fit, or generalisation gap, against n; "
    "training curves.",
)
@click.option(
    "--select", "selection", multiple=True, metavar="NAME=VALUE", help="Variants to take, such as width=8,16."
)
@click.option("--by", metavar="LIST", help="Settings that tell series apart.  [default: all that differ]")
@click.option("--probe", "probes", multiple=True, metavar="ID", help="With --kind history, the runs to draw.")
@click.option("--columns", default="1", show_default=True, metavar="1|2", help="Width, in columns of a paper.")
@click.option("--title", default="", metavar="TEXT", help="Title of the figure.")
@click.option("--out", metavar="FILE", help="A .png, .svg or .pdf file.  [default: named after FILE and KIND]")
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
def plot_command(
    files: tuple[str, ...],
    kind: str,
    selection: tuple[str, ...],
    by: str | None,
    probes: tuple[str, ...],
    columns: str,
    title: str,
    out: str | None,
    overwrite: bool,
) -> int:
    """Draw a figure of one or several files, overlaid: colour-blind safe, and sized for a two-column paper.

    Points with intervals are estimates; open triangles are bounds, of variants whose EMC50 is out of range.
    """
    if not files:
        raise fasttrain.UserError("files", 0, "expected one file or more")
    for probe in (one for text in probes for one in text.split(",")):
        if not probe.isdecimal() or len(probe) > 18:
            raise fasttrain.UserError("probe", probe, "expected the index of a run, 0 or more")
    path = out if out is not None else f"{Path(files[0]).stem}-{kind}.png"
    fasttrain.plot(
        [fasttrain.load(file) for file in files],
        kind,
        selection=selection,
        by=by,
        probes=[int(one) for text in probes for one in text.split(",")],
        columns=int(columns) if columns in ("1", "2") else columns,  # type: ignore[arg-type]
        title=title,
        out=path,
        overwrite=overwrite,
    )
    click.echo(plain(f"{path}: {kind} of {', '.join(files)}"))
    return 0


_EXPORT_EXAMPLES = """\b
Examples:
  fasttrain export emc.h5 --out emc.csv
  fasttrain export emc.h5 --table probes --select width=8,16 --out runs.parquet
  fasttrain export emc.h5 --table history --out curves.jsonl
"""


@click.command("export", epilog=_EXPORT_EXAMPLES, short_help="Write a table as CSV, Parquet or JSON lines.")
@click.argument("file")
@click.option(
    "--table",
    default="curves",
    show_default=True,
    metavar="curves|probes|history|curvature",
    help="Variants, training runs, their training curves, or their curvature.",
)
@click.option("--select", "selection", multiple=True, metavar="NAME=VALUE", help="Of which variants: width=8,16.")
@click.option("--out", required=True, metavar="FILE", help="A .csv, .parquet or .jsonl file.")
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
def export_command(file: str, table: str, selection: tuple[str, ...], out: str, overwrite: bool) -> int:
    """Write a table of a file as CSV, Parquet (with units and descriptions) or JSON lines."""
    rows = fasttrain.export(fasttrain.load(file), out, table, selection=selection, overwrite=overwrite)
    click.echo(plain(f"{out}: {count(rows, 'row')} of {table}"))
    return 0


@click.command(
    "report",
    epilog="""\b
Examples:
  fasttrain report emc.h5 --out emc.html
  fasttrain report emc.h5 --out table.tex
  fasttrain report emc.h5 --out emc.bib
""",
    short_help="Write a page, a LaTeX table, or what to cite.",
)
@click.argument("file")
@click.option("--out", required=True, metavar="FILE", help="A .html page, a .tex table, or a .bib of what to cite.")
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
def report_command(file: str, out: str, overwrite: bool) -> int:
    """Write what a paper needs of a scan: a self-contained page, the table for LaTeX, or what to cite.

    The page has table, figures, the protocol in words for a methods section, fits, diagnostics, warnings, conditions
    and the command that does it again.
    """
    fasttrain.report(fasttrain.load(file), out, overwrite=overwrite)
    click.echo(plain(f"{out}: report of {file}"))
    return 0
